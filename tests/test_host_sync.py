"""A training step gives the device work without waiting for its results: nothing reads a value of a tensor."""

import importlib
import math
from functools import wraps

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import train
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_myllm.models.gpt import GPTConfig, GPTModel
from hf_myllm.optim import build_optimizer
from hf_myllm.tasks.base import Task

aten = torch.ops.aten
# Operations whose result, or its size, the host has to read.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.bincount}
READING = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__array__}
on_device = False  # whether what runs would run on the device, if there was one


class _RefuseOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not (on_device and func.overloadpacket in WAITING), f"{func} waits for the device"
        if on_device and func.overloadpacket in (aten.index, aten.index_put_, aten.index_put):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), f"{func} of a mask"
        return func(*args, **kwargs or {})


class _RefuseReading(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert not (on_device and func in READING), f"{func} waits for the device"
        return func(*args, **kwargs or {})


def switching(function, value):
    """Return the function; `on_device` has the value while it runs."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        global on_device
        before, on_device = on_device, value
        try:
            return function(*args, **kwargs)
        finally:
            on_device = before

    return wrapper


@pytest.fixture
def refuse_waiting(monkeypatch):
    """Let training steps fail that wait; making a batch and counting its targets are work of the host."""
    module = importlib.import_module("hf_myllm.train")
    monkeypatch.setattr(module, "training_step", switching(module.training_step, True))
    monkeypatch.setattr(module, "AsyncHostCopy", switching(module.AsyncHostCopy, False))
    for task in [Task, *Task.__subclasses__()]:
        for name in {"batch", "count_targets", "count_tokens"} & vars(task).keys():
            monkeypatch.setattr(task, name, switching(vars(task)[name], False))
    with _RefuseReading(), _RefuseOperations():
        yield


@pytest.mark.parametrize(("family", "optimizer"), [("gpt", "adamw"), ("llama", "muon"), ("bert", "muon")])
def test_a_training_step_reads_nothing(tiny_family, refuse_waiting, family, optimizer):
    quiet = {"start_context": None, "val_fraction": 0, "eval_freq": None, "eval_iter": None, "save_freq": None}
    quiet["weight_averaging"] = "{ema: 0.9}"
    flags = tiny_family(family)(max_steps=2, optimizer=optimizer, grad_clip=1.0, precision="bf16", **quiet)
    assert train(*flags) == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_loss_scale_of_fp16_reads_nothing(refuse_waiting, name):
    """As accelerate does it on a GPU: a step in range, and one that is not and lowers the scale."""
    Accelerator(cpu=True)
    model = GPTModel(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=97, n_positions=8))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(build_optimizer(model, 1e-2, (0.9, 0.95), 1e-8, 0.1, name), scaler=scaler)

    def step(factor):
        loss = model(torch.arange(8)[None]).last_hidden_state.square().sum() * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer.optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for factor, scale in ((math.inf, 2.0), (1.0, 2.0)):
        switching(step, True)(factor)
        assert scaler.get_scale() == scale
        pairs = list(zip(before, model.parameters(), strict=True))
        assert all(torch.equal(*pair) == math.isinf(factor) for pair in pairs)


def test_what_waits_is_found(refuse_waiting):
    values = torch.ones(3)
    waiting = (torch.Tensor.item, torch.Tensor.tolist, torch.nonzero, bool, lambda x: x[x > 0], lambda x: x.cpu())
    for function in waiting:
        with pytest.raises(AssertionError):
            switching(function, True)(values[:1])
