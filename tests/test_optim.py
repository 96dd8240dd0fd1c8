import shutil

import pytest
import torch
from conftest import train

from hf_myllm.models.gpt import GPTConfig, GPTForCausalLM
from hf_myllm.optim import Muon, build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors, step_if


def rates(schedule, total=100, **options):
    return [learning_rate(step, total, 1.0, 0.1, schedule, **options) for step in range(total)]


def test_schedules_have_their_shapes():
    assert set(rates("constant")) == {1.0}
    for schedule in ("linear", "cosine", "wsd"):
        values = rates(schedule, warmup_steps=10)
        assert values[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
        assert values[10] == pytest.approx(1.0)
        assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))
        assert 0.1 <= values[-1] < 0.16
    assert rates("linear")[50] == pytest.approx(0.55) == rates("cosine")[50]
    assert rates("cosine")[25] > rates("linear")[25]
    wsd = rates("wsd", warmup_steps=10, decay_steps=30)
    assert wsd[69] == 1.0 == wsd[70]
    assert wsd[85] == pytest.approx(0.55)
    assert rates("wsd")[80] == 1.0 > rates("wsd")[81]


def test_a_schedule_survives_odd_sizes():
    for schedule in ("constant", "linear", "cosine", "wsd"):
        for total, warmup in ((1, 0), (1, 1), (5, 5), (3, 2)):
            values = [learning_rate(s, total, 1.0, 0.1, schedule, warmup, None) for s in range(total)]
            assert all(0 < value <= 1 for value in values)


def test_a_run_by_muon_goes_on_bit_for_bit(tiny, tmp_path):
    words = tiny(optimizer="muon", max_steps=24)
    assert train(*words, "--save_model", tmp_path / "whole") == 0
    (tmp_path / "parts").mkdir()
    assert train(*words, "--save_model", tmp_path / "parts") == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoint-24")  # as if it had been killed before
    assert train(*words, "--save_model", tmp_path / "parts", "--resume") == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_is_refused_or_begins_anew(tiny, capsys, before, after):
    assert train(*tiny(optimizer=before, max_steps=4)) == 0
    more = tiny(optimizer=after, max_steps=6, warmup_steps=4)
    assert train(*more, "--resume") == 2
    assert f"optimizer was '{before}' and is '{after}'" in capsys.readouterr().err
    assert train(*more, "--resume", "--allow_changed") == 0
    assert f"until now by {before}: {after} begins with moments of its own" in capsys.readouterr().out


def small():
    torch.manual_seed(0)
    return GPTForCausalLM(GPTConfig(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0))


def test_decay_is_on_matrices_only():
    model = small()
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (not name.endswith("bias") and ".ln_" not in name), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


class InMemory(dict):
    def rows(self, name, start=0, stop=None):
        return self[name][start:stop] if self[name].dim() else self[name]


def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest():
    model = small()
    muon, adamw = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1, "muon").parts
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    assert taken == {
        name for name in names.values() if ".h." in name and name.endswith("weight") and ".ln_" not in name
    }
    left = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert taken | left == set(names.values())
    assert not taken & left
    decayed = {names[p] for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_muon_is_torchs():
    """All matrices of a shape at once, tall and wide ones, and one that has no gradient."""
    shapes = [(6, 18), (6, 6), (24, 6), (6, 18), (6, 6), (24, 6)]
    weights = {}
    for kind in (torch.optim.Muon, Muon):
        torch.manual_seed(0)
        weights[kind] = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = kind(weights[kind], 1e-2, 0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(5):
            for weight in weights[kind][:-1]:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
    torch.testing.assert_close(*weights.values(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_to_be_taken_changes_no_bit(name):
    model, ids = small(), torch.arange(16).view(2, 8)
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.95), 1e-8, 0.1, name)

    def state():
        return [p.clone() for p in model.parameters()] + [
            t.clone() for t in optimizer_tensors(model, optimizer).values()
        ]

    kept = None
    for spoilt in (False, True, False):
        model(ids, labels=ids).loss.backward()
        if spoilt:
            kept = state()
            for parameter in model.parameters():
                parameter.grad *= float("nan")
        step_if(optimizer, torch.tensor(not spoilt))
        optimizer.zero_grad()
        if spoilt:
            assert all(torch.equal(a, b) for a, b in zip(kept, state(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(kept, state(), strict=True) if a.dim() > 1 and a.numel() > 50)


def test_one_learning_rate_is_for_all_parts():
    optimizer = build_optimizer(small(), 1e-3, (0.9, 0.95), 1e-8, 0.1, "muon")
    for load in (False, True):
        if load:
            optimizer.load_state_dict(optimizer.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = 0.5 + load
        assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.5 + load}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_by_name_comes_back_bit_for_bit(name):
    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        ids = torch.randint(0, 50, (2, 8))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model, again = small(), small()
    first = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1, name)
    for seed in range(3):
        step(model, first, seed)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, first).items()}
    kinds = {"step", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if name == "muon" else set())
    assert {key.rpartition("/")[2] for key in tensors} == kinds
    again.load_state_dict(model.state_dict())
    second = build_optimizer(again, 1e-3, (0.9, 0.95), 1e-8, 0.1, name)
    load_optimizer_tensors(again, second, InMemory(tensors))
    step(model, first, 9)
    step(again, second, 9)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
