"""What a model computes in: a recipe's `precision`, TF32 for what stays in fp32, and deterministic algorithms."""

import logging
import os
import re
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import is_torchao_available
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .errors import InputError


def choose_precision(precision, device, trains=True):
    """Return the precision that a recipe asks for on a device: "fp32", "bf16", "fp16" or "fp8".

    "auto" is bf16 where the GPU computes in it, else fp32. A setting of the launcher comes first.

    Args:
        trains: whether the model is trained. If it is not, a precision that the device lacks counts as auto.
    Raises:
        InputError: the device cannot train in the precision, or the launcher asks for another.
    """
    launched = _launched_precision()
    if trains and launched and precision not in ("auto", launched):
        raise InputError(f"precision: {precision} in the recipe and {launched} for the launcher; remove one of the two")
    precision = launched or precision
    problem = _problem(precision, device)
    if trains and problem:
        raise InputError(f"precision: {precision} {problem}")
    if precision == "auto" or problem or (precision == "fp8" and not trains):
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if has_bf16 else "fp32"
    return precision


def _launched_precision():
    """Return the precision that the launcher or an Accelerator of the caller has set, or None.

    `accelerate launch` passes "no" if it was not told a precision, so "no" leaves the choice to the recipe.
    """
    if AcceleratorState._shared_state:
        mixed_precision = AcceleratorState().mixed_precision
        return "fp32" if mixed_precision == "no" else mixed_precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if launched == "no" else launched


def _problem(precision, device):
    """Return why a device cannot train in a precision and what to do instead, or None if it can."""
    if precision == "fp16" and device.type == "cpu":
        return "needs a GPU; use bf16 or fp32"
    if precision == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        return "needs an NVIDIA GPU with compute capability 8.9 (Ada, Hopper) or newer; use bf16 or fp32"
    if precision == "fp8" and not is_torchao_available():
        return "needs the package torchao; pip install torchao"
    return None


def describe_precision(accelerator, precision):
    """Return what an Accelerator computes in and, if a recipe's `precision` is auto, why."""
    name, is_cuda = accelerator.precision, accelerator.device.type == "cuda"
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == name:
        reason = "set by the launcher"
    elif name == "fp32" and is_cuda:
        reason = "auto: this GPU has no bf16; --precision fp16 is faster"
    else:
        reason = "auto"
    shown = f"{name} with TF32" if name == "fp32" and is_cuda else name
    return f"{shown} ({reason})" if precision == "auto" else shown


@contextmanager
def inference_precision(precision, device):
    """Compute in a recipe's precision without an Accelerator, as the evaluations of its run do."""
    device = torch.device(device)
    name = choose_precision(precision, device, trains=False)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    with preserved_tf32(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        allow_tf32(device)
        yield


def allow_tf32(device):
    """Compute matrix products of fp32 tensors in TF32 on a GPU, unless the caller has chosen otherwise."""
    if device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "none":
        torch.backends.cuda.matmul.allow_tf32 = True


@contextmanager
def preserved_tf32():
    """Restore what [`allow_tf32`] sets, as does accelerate for a compiled model in fp32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        yield
    finally:
        if matmul.fp32_precision != before:
            matmul.allow_tf32 = before == "tf32"
            matmul.fp32_precision = before


@contextmanager
def deterministic_algorithms():
    """Let torch, its compiler and cuBLAS use deterministic algorithms only; restore torch's settings afterwards."""
    from torch._inductor import config as inductor

    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills_memory = settings.fill_uninitialized_memory
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
    try:
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False  # an aid for finding mistakes, which costs time
        with inductor.patch(deterministic=True):  # without timing kernels against each other
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fills_memory


def explain_nondeterminism(error):
    """Return the message for an error of torch about an operation that is not deterministic; None for other errors."""
    if isinstance(error, RuntimeError) and "CUBLAS_WORKSPACE_CONFIG" in str(error):
        return "deterministic: this process has used the GPU before; set CUBLAS_WORKSPACE_CONFIG=:4096:8 when it starts"
    operation = re.search(r"(\S+) does not have a deterministic implementation", str(error))
    return operation and f"deterministic: {operation[1]} has no deterministic algorithm; train without deterministic"


def cast_to_bf16(model):
    """Pass bfloat16 hidden states from layer to layer under autocast, as [`~hf_myllm.sharding.shard_model`] does.

    Autocast alone keeps the residual stream in fp32, which doubles its memory traffic.
    """
    for layer in layers(model):
        layer.register_forward_pre_hook(_cast_hidden_states, with_kwargs=True)


def _cast_hidden_states(layer, inputs, named):
    if not inputs:  # some stock classes name it
        inputs, named = (named.pop("hidden_states"),), named
    hidden_states, *others = inputs
    if torch.is_autocast_enabled(hidden_states.device.type):
        return (hidden_states.bfloat16(), *others), named


def layers(model):
    """Return the layers of a model, which are sharded and compiled one by one."""
    names = {name for kind in getattr(model, "_no_split_modules", None) or () for name in (kind, f"FSDP{kind}")}
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return layers or [module for module in model.modules() if type(module).__name__ in names]


# ---- fp8


class _FP8Linear(nn.Linear):
    """A linear layer that multiplies in fp8; [`convert_to_fp8`] makes a layer one, with its own parameters."""

    def forward(self, inputs):
        return _multiply_in_fp8(self, inputs, self.weight.t())


class _FP8Conv1D(Conv1D):
    """The same of the layer whose weight is (in, out), as GPT-2's."""

    def forward(self, inputs):
        return _multiply_in_fp8(self, inputs, self.weight)


_FP8_CLASSES = {nn.Linear: _FP8Linear, Conv1D: _FP8Conv1D}


def _multiply_in_fp8(layer, inputs, weight):
    """Return inputs @ weight + bias. Each tensor of the product and of its backward pass has one scale, of its own
    largest value."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args as multiply

    if torch.is_autocast_enabled(inputs.device.type):
        inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
    output = multiply.apply(inputs, weight, *layer.fp8_settings)
    return output if layer.bias is None else output + layer.bias.to(output.dtype)


def convert_to_fp8(model, emulate=False):
    """Let the linear layers of a model multiply in fp8, with torchao.

    For stability the first and the last of them and the head stay as they are; so do those with a size that is not a
    multiple of 16, which the kernels need. The parameters stay the same, so what is saved does not change.
    [`restore_from_fp8`] undoes it.

    Args:
        emulate: round as fp8 does and multiply in a wider type, for devices without fp8.
    Raises:
        InputError: there is no layer to convert, or the model has LoRA matrices.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao's, about kernels for other purposes
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    finally:
        logging.disable(disabled)

    if hasattr(model, "get_base_model"):
        raise InputError("precision: fp8 does not work with lora; use bf16")
    # Without accelerate's default enable_fsdp_float8_all_gather, which wraps weights in other parameters.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    outer = _outer_layers(model)
    # A layer of torchao's own, for its settings; the call also prepares the compiler.
    settings = convert_to_float8_training(nn.Sequential(nn.Linear(16, 16)), config=config)[0].linear_mm_config, config
    inner = [layer for layer in _linear_layers(model) if layer not in outer]
    converted = [layer for layer in inner if all(size % 16 == 0 for size in layer.weight.shape)]
    if not converted:
        raise InputError(
            "precision: fp8 has no effect on this model: none of its linear layers between the first and the head has "
            "sizes that are multiples of 16; use bf16"
        )
    for layer in converted:
        layer.__class__, layer.fp8_settings = _FP8_CLASSES[type(layer)], settings


def restore_from_fp8(model):
    """Undo [`convert_to_fp8`], if it was done."""
    for layer in _linear_layers(model):
        if type(layer) in _FP8_CLASSES.values():
            layer.__class__ = type(layer).__base__
            del layer.fp8_settings


def describe_fp8(model):
    """Return how many linear layers multiply in fp8, and which do not."""
    layers = _linear_layers(model)
    count = sum(type(layer) in _FP8_CLASSES.values() for layer in layers)
    others = len(layers) - len(_outer_layers(model)) - count
    odd = f", and in {others} whose sizes are not multiples of 16" if others else ""
    return f"fp8 in {count} of {len(layers)} linear layers; bf16 in the first and the head{odd}"


def _outer_layers(model):
    layers = _linear_layers(model)
    return {*layers[:1], *layers[-1:], model.get_output_embeddings()} - {None}


def _linear_layers(model):
    classes = (*_FP8_CLASSES, *_FP8_CLASSES.values())
    return [module for module in model.modules() if type(module) in classes]
