"""The moving average of the weights: its arithmetic, its checkpoints, its evaluation, the model that is published."""

import json
import shutil

import pytest
import torch
from conftest import assert_same_run, read_metrics, read_weights, train
from distributed.test_ranks import run_sharded
from launching import run_ranks
from safetensors.torch import load_file
from small_runs import copy_until
from small_runs import flags as as_flags

import hf_myllm
from hf_myllm import checkpoint
from hf_myllm.ema import WeightAverage
from hf_myllm.models.gpt import GPTForCausalLM
from hf_myllm.recipe import Recipe


@pytest.fixture
def averaged(kept_run):
    return kept_run[0]


@pytest.fixture
def recipe(kept_run):
    """Return the keys of the run without its average and its folder."""
    left_out = ("weight_averaging", "final_model", "save_model")
    return {name: value for name, value in kept_run[1].items() if name not in left_out}


def read_average(run, step):
    """Return the average in a checkpoint: name -> tensor."""
    state = load_file(run / f"checkpoint-{step}" / "trainer_state" / "optimizer.safetensors")
    return {name.removesuffix("/ema"): value for name, value in state.items() if name.endswith("/ema")}


def weights_of(folder):
    return dict(GPTForCausalLM.from_pretrained(folder).named_parameters())


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
    model[1].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_average_is_in_fp32_and_leaves_out_skipped_steps_and_frozen_weights(dtype):
    model = small_model(dtype)
    average = WeightAverage(model, 0.25)
    assert list(average.parameters) == ["0.weight", "0.bias", "1.weight"]
    expected = [p.detach().float().clone() for p in average.parameters.values()]
    for step in range(4):
        for parameter in average.parameters.values():
            parameter.data += torch.randn_like(parameter)
        is_finite = torch.tensor(step != 2)
        average.update(step, is_finite)
        factor = torch.tensor(1 - min(0.25, (1 + step) / (10 + step)))
        if is_finite:
            weights = [p.detach().float() for p in average.parameters.values()]
            expected = [e.lerp(w, factor) for e, w in zip(expected, weights, strict=True)]
        assert all(torch.equal(*pair) for pair in zip(average.averages, expected, strict=True))
    own = [p.detach().clone() for p in model.parameters()]
    with average.applied():
        assert torch.equal(model[0].weight, expected[0].to(dtype))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), own, strict=True))


def test_a_run_averages_the_weights_of_its_steps_and_publishes_that(recipe, averaged, tmp_path, capsys):
    """The training is that of a run without an average; the average is the recursion over its checkpoints."""
    assert train(*as_flags(**recipe, save_model=tmp_path / "plain")) == 0
    for step in (4, 8):
        weights = [run / f"checkpoint-{step}" / "model.safetensors" for run in (averaged, tmp_path / "plain")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    before = read_average(averaged, 1)
    for step in range(2, 9):
        now, weights = read_average(averaged, step), weights_of(averaged / f"checkpoint-{step}")
        factor = torch.tensor(1 - min(0.5, step / (9 + step)))
        for name, value in now.items():
            assert torch.equal(value, before[name].lerp(weights[name].detach(), factor)), (step, name)
        before = now
    published = weights_of(averaged)
    assert published.keys() == before.keys()
    assert all(torch.equal(published[name], before[name]) for name in before)
    # the average is evaluated beside the weights
    metrics = hf_myllm.evaluate(averaged)
    lines = [line for line in read_metrics(averaged) if "val_loss" in line]
    assert lines[-1]["val_ema_loss"] == metrics["loss"]
    assert lines[-1]["val_loss"] == read_metrics(tmp_path / "plain", "val_loss")[-1]
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert lines[0]["val_ema_loss"] == lines[0]["val_loss"]
    card = (averaged / "README.md").read_text()
    assert "after step 8: the exponential moving average of its weights" in card
    assert f"value: {round(metrics['loss'], 6)}" in card
    assert json.loads((averaged / "run.json").read_text())["published_average"] is True


def test_the_average_resumes_bit_for_bit(recipe, averaged, tmp_path, capsys):
    run = tmp_path / "run"
    copy_until(averaged, 4, run)
    assert train(run / "recipe.yaml", "--save_model", run, "--resume") == 0
    for name in ("model.safetensors", "checkpoint-8/trainer_state/optimizer.safetensors"):
        assert (run / name).read_bytes() == (averaged / name).read_bytes()
    assert read_metrics(run, "val_ema_loss") == read_metrics(averaged, "val_ema_loss")
    # another decay is another run
    assert train(run / "recipe.yaml", "--save_model", run, "--resume", "--weight_averaging", "{ema: 0.9}") == 2
    assert "weight_averaging was {'ema': 0.5} and is {'ema': 0.9}" in capsys.readouterr().err


@pytest.mark.chaos
def test_the_best_by_the_average_is_the_average_of_that_step(recipe, tmp_path):
    average = {"weight_averaging": "{ema: 0.5}", "metric_for_best": "ema_loss", "eval_freq": 2}
    more = {"greater_is_better": True, "save_model": tmp_path / "run"}  # the first is the best
    values = {name: str(value) for name, value in (recipe | average | more).items()}
    result = hf_myllm.train(
        Recipe.load(None, **{"config": {n: values.pop(n) for n in ("n_layer", "n_head", "n_embd")}}, **values)
    )
    losses = {line["step"]: line["val_ema_loss"] for line in read_metrics(tmp_path / "run") if "val_loss" in line}
    best = max((step for step in losses if step), key=losses.get)
    assert best < 8
    expected, published = read_average(tmp_path / "run", best), weights_of(tmp_path / "run")
    assert all(torch.equal(published[name], expected[name]) for name in expected)
    assert all(torch.equal(p, expected[name]) for name, p in result.model.named_parameters())
    assert result.metrics["val_loss"] == losses[best]
    assert hf_myllm.evaluate(tmp_path / "run")["loss"] == losses[best]


@pytest.mark.chaos
def test_an_average_may_begin_in_a_branch(recipe, averaged, tmp_path, capsys):
    start = {"init_from": averaged / "checkpoint-7", "with_optimizer": True, "weight_averaging": "{ema: 0.75}"}
    assert train(*as_flags(**recipe | start, save_model=tmp_path / "on")) == 0
    before, weights = read_average(averaged, 7), weights_of(averaged / "checkpoint-8")
    factor = torch.tensor(1 - min(0.75, 8 / 17))
    for name, value in read_average(tmp_path / "on", 8).items():
        assert torch.equal(value, before[name].lerp(weights[name].detach(), factor))
    del start["weight_averaging"]
    assert train(*as_flags(**recipe | start, save_model=tmp_path / "none")) == 0
    assert not read_average(tmp_path / "none", 8)
    capsys.readouterr()
    start |= {"init_from": tmp_path / "none" / "checkpoint-8", "weight_averaging": "{ema: 0.75}", "max_steps": 9}
    assert train(*as_flags(**recipe | start, save_model=tmp_path / "later")) == 0
    assert "the average of the weights starts with those of step 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"weight_averaging": "{ema: 1}"}, "'weight_averaging' must be less than 1, not 1"),
        ({"weight_averaging": "{ema: 0}"}, "'weight_averaging' must be more than 0, not 0"),
        ({"weight_averaging": "{swa: 3}"}, "'weight_averaging' must be {ema: 0.999}, with a number above 0"),
        (
            {"weight_averaging": "{ema: 0.9, start: 3}"},
            "'weight_averaging' must be {ema: 0.999}, with a number above 0",
        ),
        ({"weight_averaging": "0.9"}, "'weight_averaging' must be {ema: 0.999}, with a number above 0"),
        ({"final_model": "ema"}, "final_model ema needs an average of the weights; give --weight_averaging"),
        ({"metric_for_best": "ema_loss"}, "metric_for_best: val_ema_loss is not a metric of task causal"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(recipe, tmp_path, capsys, flags, message):
    assert train(*as_flags(**recipe | flags, save_model=tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.chaos
def test_the_model_to_publish_may_change_without_training(averaged, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(averaged, run)
    assert train(run / "recipe.yaml", "--save_model", run, "--resume", "--final_model", "last") == 0
    assert read_weights(run) == read_weights(run / "checkpoint-8")
    assert train(run / "recipe.yaml", "--save_model", run, "--resume") == 0
    assert read_weights(run) == read_weights(averaged)


@pytest.mark.chaos
@pytest.mark.parametrize("more", [{}, {"optimizer": "muon"}, {"dtype": "bfloat16"}], ids=str)
def test_the_average_of_several_ranks_is_that_of_one(recipe, tmp_path, more):
    """DDP and FSDP2 with accumulation: the same average but for rounding; resumed, the same bytes; and what one number
    of ranks has saved, another loads bit for bit."""
    flags = recipe | more | {"weight_averaging": "{ema: 0.5}", "final_model": "ema", "batch_size": 2}
    flags |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    tolerance = {"muon": 1e-3}.get(more.get("optimizer"), 0.05 if more.get("dtype") else 1e-6)
    assert train(*as_flags(**flags, save_model=tmp_path / "one")) == 0
    for name, launch in (("ddp", run_ranks), ("fsdp", lambda *words: run_sharded("cpu", *words))):
        run, resumed = tmp_path / name, tmp_path / f"{name}-resumed"
        result = launch(2, *as_flags(**flags, save_model=run))
        assert result.returncode == 0, result.stderr
        assert_same_run(run, tmp_path / "one", tolerance)
        expected = pytest.approx(read_metrics(tmp_path / "one", "val_ema_loss"), abs=tolerance)
        assert read_metrics(run, "val_ema_loss") == expected
        assert load_file(run / "model.safetensors").keys() == load_file(tmp_path / "one" / "model.safetensors").keys()
        again = tmp_path / f"{name}-again"
        copy_until(run, 4, resumed)
        copy_until(run, 4, again)
        assert launch(2, *as_flags(**flags, save_model=resumed, init_from="resume")).returncode == 0
        assert read_weights(resumed) == read_weights(run)
        files = checkpoint.OptimizerFiles(run / "checkpoint-8")
        published = weights_of(run)
        for key in files:
            if key.endswith("/ema"):
                value = files.rows(key)
                assert value.dtype == torch.float32
                assert torch.equal(value.to(published[key[:-4]].dtype), published[key[:-4]])
        assert train(*as_flags(**flags, save_model=again, init_from="resume")) == 0
        assert read_metrics(again, "val_ema_loss") == expected


@pytest.mark.chaos
def test_lora_is_averaged(gpt, tmp_path):
    """The matrices are; merged, they make the model whose loss was measured."""
    text = tmp_path / "text.txt"
    text.write_text("Anna sees the cat. A king finds my friend. " * 60)
    flags = {"init_from": gpt, "train_file": text, "max_len": 32, "max_steps": 6, "batch_size": 4, "r": 4}
    flags |= {"learning_rate": 1e-2, "weight_averaging": "{ema: 0.5}", "final_model": "ema", "eval_freq": 3}
    for name, more in (("adapter", {}), ("merged", {"merge_lora": True})):
        run = tmp_path / name
        assert train(*as_flags(**flags | more, save_model=run)) == 0
        average = read_average(run, 6)
        assert average
        assert all(".lora_" in key for key in average)
        assert hf_myllm.evaluate(run)["loss"] == pytest.approx(read_metrics(run, "val_ema_loss")[-1], abs=1e-6)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(stored[key.replace(".default", "")], value) for key, value in average.items())
