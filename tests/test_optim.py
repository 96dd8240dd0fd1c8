"""The learning-rate schedules, AdamW and Muon, skipped steps and the optimizer's state by name."""

import shutil

import pytest
import torch
from conftest import train

from hf_myllm.models.gpt import GPTConfig, GPTForCausalLM
from hf_myllm.optim import (
    Muon,
    add_updates,
    build_optimizer,
    hidden_matrices,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    step_if,
    update_momenta,
)
from hf_myllm.recipe.fields import choices
from hf_myllm.recipe.sections import FIELDS

SCHEDULES = choices(FIELDS["lr_schedule"].annotation)


def rates(schedule, total=100, **options):
    return [learning_rate(step, total, 1.0, 0.1, schedule, **options) for step in range(total)]


def test_the_schedules_warm_up_and_decay_to_the_floor():
    assert set(rates("constant")) == {1.0}
    for schedule in set(SCHEDULES) - {"constant"}:
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


def test_the_schedules_work_for_very_short_runs():
    for schedule in SCHEDULES:
        for total, warmup in ((1, 0), (1, 1), (5, 5), (3, 2)):
            values = [learning_rate(step, total, 1.0, 0.1, schedule, warmup) for step in range(total)]
            assert all(0 < value <= 1 for value in values)


def test_a_muon_run_resumes_bit_for_bit(tiny, tmp_path):
    flags = tiny(optimizer="muon", max_steps=24)
    assert train(*flags, "--save_model", tmp_path / "uninterrupted") == 0
    shutil.copytree(tmp_path / "uninterrupted", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-24")  # as if the run had been killed before step 24
    (tmp_path / "resumed" / "model.safetensors").unlink()
    assert train(*flags, "--save_model", tmp_path / "resumed", "--resume") == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("uninterrupted", "resumed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("before", "after"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_changed_optimizer_is_refused_or_starts_with_an_empty_state(tiny, capsys, before, after):
    assert train(*tiny(optimizer=before, max_steps=4)) == 0
    flags = tiny(optimizer=after, max_steps=6, warmup_steps=4)
    assert train(*flags, "--resume") == 2
    assert f"optimizer was '{before}' and is '{after}'" in capsys.readouterr().err
    assert train(*flags, "--resume", "--allow_changed") == 0
    assert f"the optimizer changed from {before} to {after}; its state starts empty" in capsys.readouterr().out


def small_model():
    torch.manual_seed(0)
    return GPTForCausalLM(GPTConfig(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=0))


def test_only_matrices_decay():
    model = small_model()
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (not name.endswith("bias") and ".ln_" not in name), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


class TensorRows(dict):
    """Stands in for checkpoint.OptimizerFiles."""

    def rows(self, name, start=0, stop=None):
        return self[name][start:stop] if self[name].dim() else self[name]


def test_muon_optimizes_the_matrices_of_the_layers_and_adamw_the_rest():
    model = small_model()
    muon, adamw = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1, "muon").optimizers
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    assert by_muon == {
        name for name in names.values() if ".h." in name and name.endswith("weight") and ".ln_" not in name
    }
    by_adamw = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw
    decayed = {names[p] for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_muon_updates_as_torch_does():
    """With tall and wide matrices, several of each shape, and one without a gradient."""
    shapes = [(6, 18), (6, 6), (24, 6), (6, 18), (6, 6), (24, 6)]
    weights = {}
    for optimizer_class in (torch.optim.Muon, Muon):
        torch.manual_seed(0)
        weights[optimizer_class] = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = optimizer_class(weights[optimizer_class], 1e-2, 0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(5):
            for weight in weights[optimizer_class][:-1]:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
    torch.testing.assert_close(*weights.values(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [0, 1], ids=["linear", "conv1d"])
def test_muon_takes_fused_projections_apart(dim):
    """Three projections in one matrix are updated as three matrices are."""
    torch.manual_seed(0)
    parts = [torch.randn(6, 6) for _ in range(6)]
    fused = [torch.nn.Parameter(torch.cat(parts[start : start + 3], dim)) for start in (0, 3)]
    separate = [torch.nn.Parameter(part) for part in parts]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Muon([{"params": fused, "projections": (3, dim)}], **settings), Muon(separate, **settings)
    for _ in range(3):
        for parameter in separate:
            parameter.grad = torch.randn(6, 6)
        for index, parameter in enumerate(fused):
            parameter.grad = torch.cat([p.grad for p in separate[3 * index : 3 * index + 3]], dim)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([p.detach() for p in separate[:3]], dim), fused[0])
    assert torch.equal(torch.cat([p.detach() for p in separate[3:]], dim), fused[1])
    assert optimizers[0].state[fused[0]]["momentum_buffer"].shape == fused[0].shape


def test_the_projections_of_gpt_are_known_to_muon():
    model = small_model()
    known = {name: hidden_matrices(model).get(parameter) for name, parameter in model.named_parameters()}
    fused = {name for name, projections in known.items() if projections and projections[0] == 3}
    assert fused == {name for name in known if name.endswith("c_attn.weight")}
    for name in fused:
        weight, (_, dim) = dict(model.named_parameters())[name], known[name]
        assert weight.shape[dim] == 3 * weight.shape[1 - dim]


def test_the_compiled_updates_of_muon_are_one_graph_for_every_step():
    """On a GPU they are compiled. Neither the learning rate nor a skipped step compiles them again."""
    weights, gradients, buffers = ([torch.randn(4, 6) for _ in range(3)] for _ in range(3))
    gradients[1][0, 0] = float("nan")
    options = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    compiled = [torch.compile(function, **options) for function in (update_momenta, add_updates)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rate, found_inf in ((1e-3, 0.0), (2e-3, 1.0), (3e-3, 0.0)):
            results = []
            for update, add in ((update_momenta, add_updates), compiled):
                changed = [tensor.clone() for tensor in (*weights, *buffers)]
                skip = torch.tensor(found_inf)
                updates = update(gradients, changed[3:], 0.95, skip).nan_to_num()
                add(changed[:3], updates, 1 - 0.1 * rate * (1 - skip), rate * (1 - skip))
                results.append(changed)
            torch.testing.assert_close(*results, atol=0, rtol=0, equal_nan=True)
            unchanged = [torch.equal(a, b) for a, b in zip(results[0], (*weights, *buffers), strict=True)]
            assert all(unchanged) if found_inf else not any(unchanged)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_changes_no_bit(name):
    model, ids = small_model(), torch.arange(16).view(2, 8)
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.95), 1e-8, 0.1, name)

    def state():
        return [p.clone() for p in model.parameters()] + [
            t.clone() for t in optimizer_tensors(model, optimizer).values()
        ]

    before = None
    for is_skipped in (False, True, False):
        model(ids, labels=ids).loss.backward()
        if is_skipped:
            before = state()
            for parameter in model.parameters():
                parameter.grad *= float("nan")
        step_if(optimizer, torch.tensor(not is_skipped))
        optimizer.zero_grad()
        if is_skipped:
            assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, state(), strict=True) if a.dim() > 1 and a.numel() > 50)


def test_chained_optimizers_share_the_learning_rate():
    optimizer = build_optimizer(small_model(), 1e-3, (0.9, 0.95), 1e-8, 0.1, "muon")
    for load in (False, True):
        if load:
            optimizer.load_state_dict(optimizer.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = 0.5 + load
        assert {group["lr"] for part in optimizer.optimizers for group in part.param_groups} == {0.5 + load}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_by_name_is_restored_bit_for_bit(name):
    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        ids = torch.randint(0, 50, (2, 8))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model, restored = small_model(), small_model()
    first = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.1, name)
    for seed in range(3):
        step(model, first, seed)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, first).items()}
    state_names = {"step", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if name == "muon" else set())
    assert {key.rpartition("/")[2] for key in tensors} == state_names
    restored.load_state_dict(model.state_dict())
    second = build_optimizer(restored, 1e-3, (0.9, 0.95), 1e-8, 0.1, name)
    load_optimizer_tensors(restored, second, TensorRows(tensors))
    step(model, first, 9)
    step(restored, second, 9)
    for a, b in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(a, b)
