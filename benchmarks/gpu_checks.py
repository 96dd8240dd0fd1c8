"""The correctness checks of gpu.py.

Each is a function of a [`Place`] that reports everything it looks at: what, what was expected, what came, and whether
that is right, None where the device cannot do it. It runs in a process of its own. A rehearsal makes the same
assertions at a tiny size.
"""

import importlib.util
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peers import WORKS, run_peer, shrink, write_corpus
from processes import Forked, tail

from hf_myllm import precision as precision_module
from hf_myllm.checkpoint import load_trainer_state
from hf_myllm.cli import main as run_command
from hf_myllm.models import FAMILIES
from hf_myllm.models.loading import use_flex_attention
from hf_myllm.optim import Muon, build_optimizer, optimizer_tensors, step_if
from hf_myllm.precision import cast_to_bf16
from hf_myllm.reporting.metrics_log import read_metrics

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
from launching import launcher_environment  # noqa: E402

FP32, BF16 = 1e-4, 2e-2  # relative errors
HERE = "not on this device"


@dataclass
class Place:
    """Where an item runs.

    Attributes:
        folder: for its files.
        device: "cuda" or "cpu".
        is_rehearsal: whether everything is small.
        data: folder with the novels' train.bin and val.bin, or None.
        write: called with each dict that the item reports.
    """

    folder: Path
    device: str
    is_rehearsal: bool
    data: Path | None
    write: callable

    @property
    def on_gpu(self):
        return self.device == "cuda"

    def report(self, check, expected, got, ok):
        self.write({"check": check, "expected": expected, "got": got, "ok": None if ok is None else bool(ok)})

    def report_below(self, check, limit, got):
        self.report(check, f"< {limit:g}", f"{got:.1e}", got < limit)  # not for NaN


# ---- the numbers of a step


def make_model(place, family, **settings):
    """Return a model of two layers with random weights, its biases and norms too, without dropout."""
    width, heads, vocab_size, length = (64, 4, 97, 64) if place.is_rehearsal else (768, 12, 4096, 256)
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 2, "vocab_size": vocab_size}
    sizes |= {"max_position_embeddings": length, "bos_token_id": 1, "eos_token_id": 1} | settings
    if family == "llama":
        sizes |= {"num_key_value_heads": heads // 2, "intermediate_size": 2 * width}
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(FAMILIES[family].config, name):
            sizes.setdefault(name, 0.0)
    torch.manual_seed(0)
    task = "causal" if FAMILIES[family].is_decoder else "mlm"
    model = FAMILIES[family].tasks[task](FAMILIES[family].config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.train()


def make_batch(config, rows=4, documents=False):
    """Return the arguments of a training step's forward pass: random tokens, with new documents at a third of a row."""
    draw, length = torch.Generator().manual_seed(1), config.max_position_embeddings
    ids = torch.randint(1, config.vocab_size, (2, rows, length), generator=draw)
    batch = {"input_ids": ids[0], "use_cache": False, "skip_logits": True}
    if config.model_type == "bert":
        positions = torch.rand((rows, length), generator=draw).argsort(1)[:, : length // 6]
        batch |= {"masked_positions": positions, "labels": ids[1].gather(1, positions)}
        return batch | {"num_items_in_batch": torch.tensor(positions.numel())}
    batch |= {"shift_labels": ids[1], "num_items_in_batch": torch.tensor(ids[1].numel())}
    if documents:
        start = length // 3
        positions = torch.cat([torch.arange(start), torch.arange(length - start)])
        batch["position_ids"] = positions.expand(rows, -1).contiguous()
    return batch


def to_device(batch, device):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def autocast(device, dtype):
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def loss_and_gradients(model, batch, device="cpu", dtype=torch.float32, compiled=False):
    """Return the loss and every gradient of a step on a device, as fp32 tensors of the host."""
    model = model.to(device)
    if dtype == torch.bfloat16:
        cast_to_bf16(model)
    forward = (
        torch.compile(lambda **inputs: model(**inputs).loss) if compiled else lambda **inputs: model(**inputs).loss
    )
    with autocast(device, dtype):
        loss = forward(**to_device(batch, device))
    loss.backward()
    gradients = {name: parameter.grad.float().cpu() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach().float().cpu()} | gradients


def report_errors(place, check, limit, values, reference):
    """Report the relative errors of the loss, of all gradients together, and of the one that is furthest off.

    A gradient that vanishes but for rounding, as that of BERT's key biases, is compared with the size of the others. A
    small one of few numbers (a bias) may be three times as far off as all together.
    """
    names = [name for name in reference if name != "loss"]
    whole, whole_reference = (torch.cat([part[name].flatten() for name in names]) for part in (values, reference))
    typical, errors = whole_reference.square().mean().sqrt(), {}
    for name in names:
        scale = reference[name].norm()
        if scale < 1e-3 * typical * reference[name].numel() ** 0.5:
            scale = typical * reference[name].numel() ** 0.5
        errors[name] = float((values[name] - reference[name]).norm() / scale)
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    error = float((values["loss"] / reference["loss"] - 1).abs())
    place.report_below(f"{check}: error of the loss", limit / 10, error)
    error = float((whole - whole_reference).norm() / whole_reference.norm())
    place.report_below(f"{check}: error of the gradients", limit, error)
    place.report_below(f"{check}: largest error of a gradient ({worst})", 3 * limit, errors[worst])


def families_of(place, compiled, names):
    """Return the families to check. Compiling for a CPU takes a minute each."""
    return names if place.on_gpu or not compiled else names[:1]


def check_gradients(place, compiled=False):
    """Compare the loss and every gradient with those of eager attention in fp32 on the CPU."""
    torch.set_float32_matmul_precision("highest")
    precisions = {"bf16": (torch.bfloat16, BF16)} | ({} if compiled else {"fp32": (torch.float32, FP32)})
    for precision, (dtype, limit) in precisions.items():
        for family in families_of(place, compiled, ("gpt", "llama", "bert")):
            reference_model = make_model(place, family, attn_implementation="eager")
            batch = make_batch(reference_model.config)
            reference = loss_and_gradients(reference_model, batch)
            values = loss_and_gradients(make_model(place, family), batch, place.device, dtype, compiled)
            check = f"{family}, {'compiled' if compiled else 'SDPA'}, {precision}"
            report_errors(place, check, limit, values, reference)


def check_isolation(place, compiled=False):
    """Compare documents in one row with flex attention to the dense mask, and change one of the documents."""
    torch.set_float32_matmul_precision("highest")
    how = "compiled" if compiled else "eager"
    for family in families_of(place, compiled, ("gpt", "llama")):
        batch = make_batch(make_model(place, family).config, documents=True)
        model = make_model(place, family)
        use_flex_attention(model, place.device)
        check = f"{family}, flex attention, {how}, bf16, against the dense mask"
        if model.config._attn_implementation == "flex_attention":
            reference = loss_and_gradients(make_model(place, family), batch)
            values = loss_and_gradients(model, batch, place.device, torch.bfloat16, compiled)
            report_errors(place, check, BF16, values, reference)
        else:
            place.report(check, f"< {BF16}", HERE, None)
        start = int((batch["position_ids"][0] == 0).nonzero()[-1])
        model = model.to(place.device).eval()
        forward = torch.compile(model) if compiled else model
        batch = to_device(batch, place.device)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "use_cache")}
        with torch.no_grad(), autocast(place.device, torch.bfloat16):
            before = forward(**inputs).logits[:, start:].clone()
            inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :start] % 7 + 1, inputs["input_ids"][:, start:]], 1)
            after = forward(**inputs).logits
        is_equal = torch.equal(before, after[:, start:])
        place.report(
            f"{family}, {how}: logits of document 2 when document 1 changes", "equal", word(is_equal), is_equal
        )


def word(is_equal):
    return "equal" if is_equal else "different"


# ---- the optimizer, dropout, waiting


def check_skipped_step(place):
    """Skip a step whose gradients are not finite: no byte of a parameter or of the optimizer's state may change."""
    for name in ("adamw", "muon"):
        model = make_model(place, "gpt").to(place.device)
        optimizer = build_optimizer(model, 1e-2, (0.9, 0.95), 1e-8, 0.1, name)
        batch, states = to_device(make_batch(model.config), place.device), []
        for is_finite in (True, False, True):
            with autocast(place.device, torch.bfloat16):
                model(**batch).loss.backward()
            if not is_finite:
                next(model.parameters()).grad[0] = float("nan")
            step_if(optimizer, torch.tensor(is_finite, device=place.device))
            optimizer.zero_grad()
            tensors = [*model.parameters(), *optimizer_tensors(model, optimizer).values()]
            states.append([tensor.detach().cpu().clone() for tensor in tensors])
        kept = sum(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
        moved = sum(not torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
        total = len(states[0])
        place.report(f"{name}: tensors unchanged by a skipped step", f"{total} of {total}", f"{kept}", kept == total)
        place.report(f"{name}: tensors that the next step changes", f"{total} of {total}", f"{moved}", moved == total)


def check_muon(place):
    """Compare the change of matrices in five steps with that by torch.optim.Muon."""
    size = 6 if place.is_rehearsal else 192
    shapes, changes = [(size, 3 * size), (size, size), (4 * size, size)] * 2, []
    for optimizer_class in (torch.optim.Muon, Muon):
        draw = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(place.device)) for shape in shapes]
        before = [weight.detach().clone() for weight in weights]
        optimizer = optimizer_class(weights, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(5):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=draw).to(place.device)
            optimizer.step()
        changes.append([(weight.detach() - old).cpu() for weight, old in zip(weights, before, strict=True)])
    errors = [float((ours - theirs).norm() / theirs.norm()) for theirs, ours in zip(*changes, strict=True)]
    place.report_below("Muon: error of five steps against torch.optim.Muon", BF16, max(errors))


def check_dropout(place):
    """Compute a step with dropout twice from one seed, and once from another."""
    for compiled in (False, True) if place.on_gpu else (False,):
        for family, name in (("gpt", "resid_pdrop"), ("bert", "hidden_dropout_prob")):
            model = make_model(place, family, **{name: 0.1}).to(place.device)
            forward = torch.compile(model) if compiled else model
            batch, losses = to_device(make_batch(model.config), place.device), []
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                with autocast(place.device, torch.bfloat16):
                    losses.append(forward(**batch).loss.item())
            how = "compiled" if compiled else "eager"
            got = ", ".join(f"{loss:.6f}" for loss in losses)
            is_right = losses[0] == losses[1] != losses[2]
            place.report(f"{family}, {how}: loss with dropout from seeds 1, 1, 2", "a, a, b", got, is_right)


def check_waiting(place):
    """Train with CUDA's debug mode, which raises an error where the host waits for the device inside a step."""
    train = importlib.import_module("hf_myllm.train")
    training_step = train.training_step

    def watched_step(run, model, optimizer, step):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            return training_step(run, model, optimizer, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    work = shrink(WORKS["gpt"], on_gpu=False)._replace(length=64)
    write_corpus(work, place.folder, 8)
    for peer, compiled in (("ours", False), ("muon", False), ("isolated", True)):
        check, problem = f"{peer}, {'compiled' if compiled else 'eager'}: times that a step waits for the device", None
        if place.on_gpu:
            train.training_step = watched_step
            try:
                run_peer(peer, work, place.folder, "bf16", compiled, warmup=4, steps=4)
            except RuntimeError as error:
                traceback.print_exc()
                problem = str(error).splitlines()[0][:100]
        place.report(check, "0", (problem or "0") if place.on_gpu else HERE, problem is None if place.on_gpu else None)


# ---- whole runs


def run_settings(place, name, **changed):
    """Return the command line of a small run on random tokens, in the folder `name`."""
    corpus = place.folder / "corpus.bin"
    if not corpus.exists():
        draw = np.random.default_rng(0)
        corpus.write_bytes((draw.integers(0, 50, 40_000) ** 2 // 26).astype(np.uint16).tobytes())
        corpus.with_name("val.bin").write_bytes(corpus.read_bytes()[:4000])
    width = 32 if place.is_rehearsal else 256
    settings = {"model": "gpt", "n_layer": 2, "n_head": 2, "n_embd": width, "vocab_size": 96, "max_len": 32}
    settings |= {"train_file": corpus, "val_file": corpus.with_name("val.bin"), "batch_size": 8, "max_steps": 24}
    settings |= {"save_freq": 8, "save_total_limit": 9, "learning_rate": 1e-3, "attn_pdrop": 0.0}
    settings |= {"precision": "bf16", "compile": place.on_gpu, "save_model": place.folder / name} | changed
    return ["train", *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]


def start_run(place, name, **changed):
    """Start a run in a forked process."""
    line = run_settings(place, name, **changed)

    def run():
        if torch.cuda._is_in_bad_fork():
            os.execv(sys.executable, [sys.executable, "-m", "hf_myllm.cli", *line])
        run_command(line)

    return Forked(run, place.folder / f"{name}.log")


def finish_run(process, seconds=600):
    """Wait for a run; raise RuntimeError with its last lines if it fails."""
    if process.wait(seconds):
        raise RuntimeError(f"exit code {process.code}: {tail(process.log)}")


def run_to_end(place, name, **how):
    finish_run(start_run(place, name, **how))


def resume_after_kill(place, name, **how):
    """Kill a run with SIGKILL after its first checkpoint, and resume it."""
    process = start_run(place, name, **how)
    run_dir, end = place.folder / name, time.monotonic() + 600
    while not any(line["step"] >= 11 for line in read_metrics(run_dir)):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"it did not reach step 11: {tail(process.log)}")
        time.sleep(0.002)
    process.stop(signal.SIGKILL)
    process.wait(10)
    is_cut = not (run_dir / "model.safetensors").exists()
    run_to_end(place, name, **how, init_from="resume")
    return is_cut


def resume_from_last_but_one(place, name, last_step, **how):
    """Resume a run that has ended, as if it had been killed before its last checkpoint."""
    shutil.rmtree(place.folder / name / f"checkpoint-{last_step}")
    (place.folder / name / "model.safetensors").unlink()
    run_to_end(place, name, **how, init_from="resume")


def last_loss(place, name):
    """Return the last validation loss of a run."""
    return [line["val_loss"] for line in read_metrics(place.folder / name) if "val_loss" in line][-1]


def weights_of(place, name):
    """Return the published weights of a run as one fp32 tensor."""
    from safetensors.torch import load_file

    tensors = load_file(place.folder / name / "model.safetensors")
    return torch.cat([tensors[key].float().flatten() for key in sorted(tensors)])


def check_resume(place, deterministic):
    """Kill and resume a run, and compare its weights with those of undisturbed runs."""
    how = {"deterministic": True} if deterministic else {}
    run_to_end(place, "reference", **how)
    is_cut = resume_after_kill(place, "resumed", **how)
    mode = "deterministic" if deterministic else "default"
    place.report(f"{mode}: the run is killed before its end", "killed", "killed" if is_cut else "it had ended", is_cut)
    reference, resumed = weights_of(place, "reference"), weights_of(place, "resumed")
    if deterministic:
        is_equal = torch.equal(reference, resumed)
        place.report("deterministic: weights after SIGKILL and resume", "equal", word(is_equal), is_equal)
        return
    run_to_end(place, "again")
    noise, difference = (
        (reference - other).norm() / reference.norm() for other in (weights_of(place, "again"), resumed)
    )
    place.report(
        "default: difference of weights after SIGKILL and resume",
        f"about that of two undisturbed runs, {float(noise):.1e}",
        f"{float(difference):.1e}",
        difference <= 3 * noise,
    )


def check_fp16(place):
    """Resume a run in fp16: the loss scale and its count of good steps go on where they were."""
    check = "fp16: loss scale of a run that was resumed"
    if not place.on_gpu:
        return place.report(check, "that of an undisturbed run", HERE, None)
    run_to_end(place, "undisturbed", precision="fp16", max_steps=16)
    run_to_end(place, "resumed", precision="fp16", max_steps=16)
    resume_from_last_but_one(place, "resumed", 16, precision="fp16", max_steps=16)
    scales = [
        load_trainer_state(place.folder / name / "checkpoint-16")["scaler"] for name in ("undisturbed", "resumed")
    ]
    place.report(check, str(scales[0]), str(scales[1]), scales[0] == scales[1])


def check_fp8(place):
    """Train in fp8: the loss is that of bf16, every parameter moves, and the run can be resumed and read.

    A rehearsal without a GPU emulates fp8, which needs torchao as well.
    """
    if not place.on_gpu:
        if importlib.util.find_spec("torchao") is None:
            return place.report("fp8: loss, parameters that move, resume, stock reload", "as bf16", HERE, None)
        precision_module._problem = lambda precision, device: None  # allow it on this device
    losses = []
    for precision in ("bf16", "fp8"):
        run_to_end(place, precision, precision=precision, save_freq=1, save_total_limit=24)
        losses.append(last_loss(place, precision))
    resume_from_last_but_one(place, "fp8", 24, precision="fp8", save_freq=1, save_total_limit=24)
    for what, loss in (("", losses[1]), (" after a resume", last_loss(place, "fp8"))):
        check = f"fp8{what}: difference of the validation loss from bf16's {losses[0]:.4f}"
        place.report_below(check, 0.02, abs(loss / losses[0] - 1))
    first, last = (stock_model_of(place.folder / "fp8" / f"checkpoint-{step}") for step in (17, 24))
    pairs = list(zip(first.parameters(), last.parameters(), strict=True))
    moved = sum(not torch.equal(*pair) for pair in pairs)
    place.report("fp8: parameters that move", str(len(pairs)), str(moved), moved == len(pairs))
    report_stock_loss(place, "fp8")


def stock_model_of(folder):
    """Return the stock model of a folder; raise RuntimeError if keys are missing or left over."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(loading.values()):
        raise RuntimeError(f"{folder}: the stock class does not read it as it is: {loading}")
    return model.eval()


def report_stock_loss(place, name):
    """Compare the loss that the stock class has on the validation rows with the run's own."""
    model = stock_model_of(place.folder / name)
    tokens = torch.from_numpy(np.fromfile(place.folder / "val.bin", dtype=np.uint16).astype(np.int64))
    rows = tokens[: (len(tokens) - 1) // 32 * 32 + 1]
    with torch.no_grad():
        logits = model(rows[:-1].view(-1, 32)).logits
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[1:]))
    own = last_loss(place, name)
    place.report(f"{name}: validation loss of the stock class", f"{own:.3f}", f"{loss:.3f}", abs(loss / own - 1) < 0.01)


def check_launched(place, kind):
    """Train by one process of DDP or FSDP2, resume, reload; each command must end by itself."""
    run_to_end(place, "alone")
    options = f"--config_file {shlex.quote(str(ROOT / 'accelerate_configs' / f'{kind}.yaml'))} --main_process_port 0"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.getenv("PYTHONPATH", "")])
    environment = os.environ | launcher_environment(1, options) | {"RANK": "0", "LOCAL_RANK": "0", "PYTHONPATH": paths}
    limit = 240 if place.is_rehearsal else 55  # seconds, for each of the two commands
    code = f"import faulthandler, sys; faulthandler.dump_traceback_later({limit - 5}); "  # where it hangs
    code += "from hf_myllm.cli import main; main(sys.argv[1:])"
    if kind == "fsdp2" and not place.on_gpu:
        code = "import patches; patches.shard_on_cpu(); " + code
    for step, more in ((16, {}), (24, {"init_from": "resume", "allow_changed": True})):
        line = run_settings(place, kind, max_steps=step, **more)
        command = [sys.executable, "-c", code, *line]
        log = place.folder / f"{kind}.log"
        with open(log, "a") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            is_done = process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            is_done = False
        print(tail(log, 60))
        result = "done" if is_done else tail(log, 3)
        place.report(f"{kind}, one process: train to step {step} and exit", "done", result, is_done)
    report_stock_loss(place, kind)
