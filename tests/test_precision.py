"""`precision` of a recipe, the launcher's mixed_precision, TF32, and deterministic algorithms."""

import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import read_metrics, read_weights, train
from families import CASES
from transformers import AutoModelForCausalLM

from hf_myllm.distributed import create_accelerator, process_settings
from hf_myllm.errors import InputError
from hf_myllm.generate import generate, generate_text, load
from hf_myllm.optim import build_optimizer
from hf_myllm.precision import (
    allow_tf32,
    choose_precision,
    convert_to_fp8,
    describe_fp8,
    explain_nondeterminism,
    inference_precision,
    preserved_tf32,
    restore_from_fp8,
)
from hf_myllm.recipe import Recipe
from hf_myllm.run_state import MAX_SCALE_STEPS, RunState
from hf_myllm.tasks.base import Task
from hf_myllm.train import evaluate
from hf_myllm.train import train as hf_train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Answer for a GPU that the machine need not have: `gpu(has_bf16=False, capability=(7, 5))` is a Tesla T4."""

    def describe(has_bf16=True, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr("hf_myllm.precision.is_torchao_available", lambda: True)

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    describe()
    return describe


def test_auto_is_bf16_on_a_gpu_that_has_it(gpu):
    assert choose_precision("auto", CUDA) == "bf16"
    assert choose_precision("auto", CPU) == "fp32"
    gpu(has_bf16=False, capability=(7, 5))
    assert choose_precision("auto", CUDA) == "fp32"


def test_the_launcher_s_precision_replaces_auto_and_contradicts_others(gpu, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # also what `accelerate launch` passes by default
    assert choose_precision("auto", CUDA) == choose_precision("bf16", CUDA) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert choose_precision("auto", CUDA) == choose_precision("fp16", CUDA) == "fp16"
    with pytest.raises(InputError, match="precision: bf16 in the recipe and fp16 for the launcher"):
        choose_precision("bf16", CUDA)
    assert choose_precision("bf16", CUDA, trains=False) == "fp16"


@pytest.mark.parametrize(
    ("precision", "device", "capability", "message"),
    [
        ("fp16", CPU, (9, 0), "precision: fp16 needs a GPU; use bf16 or fp32"),
        ("fp8", CPU, (9, 0), "precision: fp8 needs an NVIDIA GPU"),
        ("fp8", CUDA, (8, 0), "precision: fp8 needs an NVIDIA GPU with compute capability 8.9"),
    ],
)
def test_what_a_device_cannot_train_in_is_one_line_and_no_reason_not_to_evaluate(
    gpu, precision, device, capability, message
):
    gpu(capability=capability)
    with pytest.raises(InputError, match=message):
        choose_precision(precision, device)
    assert choose_precision(precision, device, trains=False) == choose_precision("auto", device)


def test_fp8_without_torchao_is_one_line(gpu, monkeypatch):
    monkeypatch.setattr("hf_myllm.precision.is_torchao_available", lambda: False)
    with pytest.raises(InputError, match="precision: fp8 needs the package torchao; pip install torchao"):
        choose_precision("fp8", CUDA)


def test_tf32_is_allowed_on_a_gpu_and_restored():
    matmul = torch.backends.cuda.matmul
    assert matmul.fp32_precision == "none"
    with preserved_tf32():
        allow_tf32(CPU)
        assert not matmul.allow_tf32
        allow_tf32(CUDA)
        assert matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    assert not matmul.allow_tf32
    assert matmul.fp32_precision == "none"
    with preserved_tf32():  # a choice of the caller stays
        torch.set_float32_matmul_precision("highest")
        allow_tf32(CUDA)
        assert not matmul.allow_tf32
        matmul.allow_tf32 = False


def test_a_run_in_bf16_is_evaluated_and_sampled_in_bf16(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(*tiny(max_steps=5, eval_freq=5, precision="bf16")) == 0
    assert "1 CPU, precision bf16\n" in capsys.readouterr().out
    assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["precision"] == "bf16"
    assert evaluate(run)["loss"] == read_metrics(run, "val_loss")[-1]
    assert evaluate(run, precision="fp32")["loss"] != read_metrics(run, "val_loss")[-1]
    model, tokenizer = load(run)
    dtypes = set()
    model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    with inference_precision("bf16", CPU):
        expected = generate_text(model, tokenizer, "Anna", temperature=0)
    assert dtypes == {torch.bfloat16}
    assert generate(run, "Anna", temperature=0) == expected
    assert not torch.is_autocast_enabled("cpu")


def test_precision_says_what_changes_on_resume(tiny, tmp_path, capsys):
    flags = tiny(max_steps=4, save_freq=2, eval_freq=None)
    assert train(*flags) == 0
    assert "1 CPU, precision fp32 (auto)\n" in capsys.readouterr().out
    before = read_weights(tmp_path / "run")
    flags = [*flags, "--init_from", "resume", "--max_steps", 6, "--allow_changed", "--precision", "bf16"]
    assert train(*flags) == 0
    assert "the precision changed from fp32 to bf16" in capsys.readouterr().out
    assert read_weights(tmp_path / "run") != before


def test_contradictions_are_one_line(tiny, tmp_path, capsys, monkeypatch):
    assert train(*tiny(precision="fp16")) == 2
    assert capsys.readouterr().err == "error: precision: fp16 needs a GPU; use bf16 or fp32\n"
    assert train(*tiny(precision="fp32", dtype="bfloat16")) == 2
    assert "precision: fp32 needs weights in float32, and dtype is bfloat16" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(*tiny(precision="fp32")) == 2
    assert "precision: fp32 in the recipe and bf16 for the launcher" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def step(monkeypatch):
    """Call a function in each step of a run, before the forward pass: `step(function)`."""
    forward = Task.forward

    def install(function):
        def call(*arguments):
            function()
            return forward(*arguments)

        monkeypatch.setattr(Task, "forward", call)

    return install


def test_a_deterministic_run_uses_deterministic_algorithms_only(tiny, tmp_path, step):
    seen = []
    step(lambda: seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))))
    assert train(*tiny(max_steps=2, deterministic="true")) == 0
    assert set(seen) == {(True, ":4096:8")}
    seen.clear()
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert train(*tiny(max_steps=2, save_model=tmp_path / "other")) == 0
    assert set(seen) == {(False, None)}
    assert read_weights(tmp_path / "run") == read_weights(tmp_path / "other")


def test_an_operation_that_is_not_deterministic_is_one_line(tiny, step, capsys):
    step(lambda: torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2)))
    assert train(*tiny(max_steps=2, deterministic="true", eval_freq=None)) == 2
    assert capsys.readouterr().err == (
        "error: rank 0 of 1, in step 1: deterministic: put_ has no deterministic algorithm; train without "
        "deterministic\n"
    )


def test_a_gpu_that_was_used_without_determinism_is_one_line():
    error = RuntimeError(
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or ... you must set "
        "an environment variable before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8"
    )
    assert "set CUBLAS_WORKSPACE_CONFIG=:4096:8 when it starts" in explain_nondeterminism(error)
    assert explain_nondeterminism(ValueError("another")) is None


# ---- fp8, emulated on a CPU


@pytest.fixture
def fp8(monkeypatch):
    pytest.importorskip("torchao", reason="fp8 needs torchao")
    monkeypatch.setattr("hf_myllm.precision._problem", lambda precision, device: None)


FP8_SIZES = {
    "gpt": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1},
    "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize(("family", "converted", "total"), [("gpt", 7, 9), ("llama", 13, 15), ("bert", 12, 14)])
def test_fp8_converts_the_inner_layers_and_every_parameter_moves(fp8, family, converted, total):
    case = CASES[family]
    model_class = case.family.tasks["mlm" if family == "bert" else "causal"]
    torch.manual_seed(0)
    model = model_class(case.make_config(**FP8_SIZES[family])).train()
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.95), 1e-8, 0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    state = list(model.state_dict())
    ids = torch.arange(64).view(2, 32)
    exact = model(input_ids=ids, labels=ids)
    convert_to_fp8(model, emulate=True)
    assert describe_fp8(model) == f"fp8 in {converted} of {total} linear layers; bf16 in the first and the head"
    outputs = model(input_ids=ids, labels=ids)
    assert outputs.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert not torch.equal(outputs.logits, exact.logits)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stays = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert not stays
    assert list(model.state_dict()) == state
    restore_from_fp8(model)
    assert not any("FP8" in type(module).__name__ for module in model.modules())


def test_an_fp8_run_saves_and_resumes_like_any_other(fp8, tiny, tmp_path, capsys, monkeypatch):
    flags = tiny(max_steps=12, save_freq=6, eval_freq=12, learning_rate=1e-3)
    assert train(*flags, "--precision", "bf16", "--save_model", tmp_path / "bf16") == 0
    run = tmp_path / "run"
    result = hf_train(Recipe.load(tmp_path / "bf16" / "recipe.yaml", precision="fp8", save_model=str(run)))
    out = capsys.readouterr().out
    assert "precision fp8\n            fp8 in 7 of 9 linear layers; bf16 in the first and the head\n" in out
    losses = read_metrics(run, "loss")
    assert losses == pytest.approx(read_metrics(tmp_path / "bf16", "loss"), rel=0.02)
    assert losses != read_metrics(tmp_path / "bf16", "loss")
    stock, loading = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert type(stock).__name__ == "GPT2LMHeadModel"
    assert not any(loading.values())
    ids = torch.arange(20)[None]
    assert torch.allclose(stock(ids).logits, result.model(ids).logits, atol=1e-5)  # no fp8 is left in the result
    reference = read_weights(run)
    shutil.rmtree(run / "checkpoint-12")
    (run / "model.safetensors").unlink()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert train(*flags, "--init_from", "resume") == 0
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert "the precision changed" not in capsys.readouterr().out
    assert read_weights(run) == reference
    shutil.rmtree(run / "checkpoint-12")
    (run / "model.safetensors").unlink()
    assert train(*flags, "--init_from", "resume") == 0
    assert "the precision changed from fp8 to fp32" in capsys.readouterr().out


def test_fp8_that_would_have_no_effect_is_one_line(fp8, tiny, capsys):
    assert train(*tiny(precision="fp8", n_embd=36)) == 2
    assert "precision: fp8 has no effect on this model" in capsys.readouterr().err


def test_ranks_that_would_choose_other_precisions_are_one_line(monkeypatch):
    monkeypatch.setattr("hf_myllm.distributed.gather", lambda accelerator, name: [name, "bf16"])
    with (
        process_settings(),
        pytest.raises(InputError, match="auto is bf16 on some GPUs and fp32 on"),
    ):
        create_accelerator()


def test_fp16_gives_up_when_lowering_the_loss_scale_does_not_help():
    recipe, shown = Recipe(training={"max_skipped_steps": 1}), []
    run = SimpleNamespace(
        recipe=recipe,
        start_step=0,
        total_steps=100,
        is_new=True,
        resume_state=None,
        resume_from=None,
        accelerator=SimpleNamespace(scaler=object()),
        sampler=SimpleNamespace(rows_of_step=lambda step: torch.arange(8)),
        train_rows=SimpleNamespace(name="text"),
        reporter=SimpleNamespace(warning=shown.append),
    )
    state = RunState(run)
    for _ in range(MAX_SCALE_STEPS):
        state.record_step(1, 2.0, math.inf, False)
    state.record_step(1, 2.0, 1.0, False)
    assert state.skipped_steps == 0
    state.record_step(1, math.nan, math.nan, False)
    assert len(shown) == 1  # as in other precisions
    for _ in range(MAX_SCALE_STEPS - 1):
        state.record_step(1, 2.0, math.inf, False)
    with pytest.raises(InputError, match="gradient norm inf .* 25 skipped steps in a row"):
        state.record_step(1, 2.0, math.inf, False)
