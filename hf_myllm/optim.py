"""The learning rate of a step, the optimizer, and the optimizer's state as named tensors."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .errors import InputError
from .precision import layers
from .sharding import local_rows, to_full, to_local, to_sharded

AVERAGE = "ema"  # name in a checkpoint of what ema.py keeps of a parameter, beside its optimizer state


def learning_rate(step, total_steps, peak, floor=0.0, schedule="cosine", warmup_steps=0, decay_steps=None):
    """Return the learning rate of a step: a linear warmup to `peak`, then a decay to `floor`.

    To add a schedule, add a branch here and its name to the choices of `lr_schedule` in recipe/sections.py; then
    generate the reference again (CONTRIBUTING.md).

    Args:
        step: from 0 to total_steps - 1.
        schedule: "constant" stays at `peak`; "linear" and "cosine" (Loshchilov and Hutter 2017) decay from the end of
            the warmup to the end of the run; "wsd" (warmup, stable, decay; Hu et al. 2024) stays at `peak` and
            decays linearly over the last `decay_steps`.
        decay_steps: default: a fifth of the run.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    decay_start = warmup_steps
    if schedule == "wsd":
        decay_start = max(warmup_steps, total_steps - (decay_steps or max(1, total_steps // 5)))
    progress = (step - decay_start) / max(1, total_steps - decay_start)
    progress = min(1.0, max(0.0, progress))  # share of the decay that is done

    if schedule == "constant":
        return peak
    elif schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule in ("linear", "wsd"):
        factor = 1 - progress
    else:
        raise ValueError(f"unknown schedule {schedule!r}")
    return floor + (peak - floor) * factor  # factor falls from 1 to 0


def build_optimizer(model, learning_rate, betas, epsilon, weight_decay, name="adamw", compile_updates=False):
    """Return the optimizer of a model's trainable parameters.

    Only matrices (projections and embeddings) decay, not biases and norms, as in transformers' Trainer.

    Args:
        name: "adamw" (Loshchilov and Hutter 2019), or "muon" (Jordan et al. 2024) for the matrices of the layers and
            AdamW for embeddings, heads, biases and norms. Muon's updates are scaled to AdamW's root mean square (Liu
            et al. 2025, "Muon is Scalable for LLM Training"), so that one learning rate serves both. A family may scale
            it for some parameters; see [`lr_scales`].
        compile_updates: compile Muon's element-wise operations; AdamW's are one kernel as they are.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden, scales = (hidden_matrices(model), lr_scales(model)) if name == "muon" else ({}, {})
    if name == "muon" and not hidden:
        raise InputError("optimizer: muon finds no matrices in the layers of this model; use adamw")
    groups = {}
    for parameter in parameters:
        decay, scale = weight_decay if parameter.dim() >= 2 else 0.0, scales.get(parameter, 1.0)
        groups.setdefault((hidden.get(parameter), decay, scale), []).append(parameter)
    matrices, others = [], []
    for (projections, decay, scale), params in groups.items():
        # A decay is multiplied by the learning rate: it must not depend on the scale.
        group = {"params": params, "lr": learning_rate * scale, "lr_scale": scale, "weight_decay": decay / scale}
        if projections is None:
            others.append(group)
        else:
            matrices.append(group | {"projections": projections})
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    adamw = torch.optim.AdamW(others or [{"params": []}], lr=learning_rate, betas=betas, eps=epsilon, fused=fused)
    if not hidden:
        return adamw
    muon = Muon(matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
    if compile_updates:
        muon.compile()
    return ChainedOptimizer([muon, adamw])


def lr_scales(model):
    """Return the factors of Muon's learning rate, {parameter: factor}, of the parameters that have one.

    Updates of Muon and AdamW have one size, whatever that of the weights. A module whose weights are larger or smaller
    than those of other layers, because another factor of the model makes up for it, has `lr_scale`.
    """
    modules = [module for module in model.modules() if hasattr(module, "lr_scale")]
    return {parameter: module.lr_scale for module in modules for parameter in module.parameters(recurse=False)}


def hidden_matrices(model):
    """Return the matrices in the model's layers, which Muon optimizes, as {parameter: (projections, dimension)}.

    A module that computes several projections by one matrix has their number as `num_projections`; the matrix holds
    them side by side along the dimension of its outputs.
    """
    matrices = {}
    for module in [module for layer in layers(model) for module in layer.modules()]:
        if isinstance(module, nn.Embedding):  # T5's bias of relative positions
            continue
        projections = getattr(module, "num_projections", 1), 0 if isinstance(module, nn.Linear) else 1
        matrices |= {p: projections for p in module.parameters(recurse=False) if p.dim() == 2}
    return matrices


def update_momenta(gradients, buffers, momentum, found_inf):
    """Average gradients into the momentum buffers; return Nesterov's updates, (matrices, rows, columns) in bfloat16.

    If found_inf is 1, average each buffer with itself, which changes no bit.
    """
    gradients = [torch.where(found_inf > 0, *pair) for pair in zip(buffers, gradients, strict=True)]
    torch._foreach_lerp_(buffers, gradients, 1 - momentum)
    return torch.stack([update.bfloat16() for update in torch._foreach_lerp(gradients, buffers, momentum)])


def add_updates(weights, updates, decay, rate):
    """Multiply weights by `decay` and subtract `rate` times their updates; `decay` and `rate` are tensors."""
    torch._foreach_mul_(weights, decay)
    torch._foreach_sub_(weights, list(updates.to(weights[0]).contiguous() * rate))


class Muon(torch.optim.Muon):
    """torch.optim.Muon with batched updates: matrices of one shape are orthogonalized together.

    A single matrix is too small to fill a GPU, and a step would launch thousands of kernels. Like torch's fused
    optimizers, it skips a step if the attribute `found_inf`, a tensor, is 1; see [`step_if`].

    A parameter group may have `projections`, from [`hidden_matrices`]: its matrices then hold several projections, each
    of which is orthogonalized by itself.
    """

    max_batch_elements = 1 << 26  # limits the memory of an update; enough to fill any device
    found_inf = None
    _update_momenta, _add_updates = staticmethod(update_momenta), staticmethod(add_updates)

    def compile(self):
        """Compile what is not a matrix product: to one kernel before the orthogonalization and one after it."""
        self._update_momenta = torch.compile(update_momenta, dynamic=False)
        self._add_updates = torch.compile(add_updates, dynamic=False)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
            for parameters in by_shape.values():
                batch_size = max(1, self.max_batch_elements // parameters[0].numel())
                for start in range(0, len(parameters), batch_size):
                    self._step_batch(parameters[start : start + batch_size], group)

    def _step_batch(self, parameters, group):
        """Update parameters of one shape."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradients = [to_local(parameter.grad) for parameter in parameters]
        buffers = [to_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        weights = [to_local(parameter) for parameter in parameters]
        found_inf = weights[0].new_zeros(()) if self.found_inf is None else self.found_inf
        updates = self._update_momenta(gradients, buffers, group["momentum"], found_inf)
        if isinstance(parameters[0], DTensor):  # orthogonalization needs the rows of all ranks
            updates = torch.stack([to_full(to_sharded(*pair)) for pair in zip(updates, parameters, strict=True)])
        count, dim = group.get("projections", (1, 0))
        updates = updates.unflatten(dim + 1, (count, -1)).movedim(dim + 1, 1)  # (matrices, projections, rows, columns)
        shape = updates.shape
        updates = orthogonalize(updates.flatten(0, 1), group["ns_coefficients"], group["ns_steps"], group["eps"])
        updates = updates.view(shape).movedim(1, dim + 1).flatten(dim + 1, dim + 2)
        scale = 0.2 * math.sqrt(max(shape[2:]))  # to the root mean square of AdamW's updates
        rate = group["lr"] * (1 - found_inf)
        updates = updates[:, slice(*local_rows(parameters[0]))]
        self._add_updates(weights, updates, 1 - group["weight_decay"] * rate, scale * rate)


def orthogonalize(matrices, coefficients, steps, epsilon):
    """Return roughly the nearest orthogonal matrices, by Newton-Schulz iteration (Jordan et al. 2024, "Muon").

    `matrices` has the shape (batch, rows, columns). Singular values come to lie around 1.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class ChainedOptimizer(torch.optim.Optimizer):
    """Optimizers of different parameters as one optimizer, with their parameter groups and state."""

    _step_supports_amp_scaling = True  # torch's GradScaler then sets `found_inf` instead of skipping the call of step

    def __init__(self, optimizers):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share_state()

    def _share_state(self):
        start = 0
        for optimizer in self.optimizers:
            end = start + len(optimizer.param_groups)
            optimizer.param_groups, optimizer.state = self.param_groups[start:end], self.state
            start = end

    @torch.no_grad()
    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.found_inf = getattr(self, "found_inf", None)
            optimizer.step()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share_state()


def step_if(optimizer, condition):
    """Take an optimizer step if a condition, a tensor of one bool, is true.

    With torch's fused optimizers and [`Muon`] the device decides through `found_inf`, and the host does not wait.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    parameter = inner.param_groups[0]["params"][0]
    supports_found_inf = getattr(inner, "_step_supports_amp_scaling", False) and parameter.device.type in (
        "cpu",
        "cuda",
    )
    if not supports_found_inf or isinstance(parameter, DTensor):
        if condition.item():
            optimizer.step()
        return
    inner.found_inf = (~condition).float()
    try:
        optimizer.step()
    finally:
        del inner.found_inf


def optimizer_tensors(model, optimizer):
    """Return the optimizer's state, the rows of this rank, as {"<parameter name>/<state name>": tensor}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{names[parameter]}/{key}"] = to_local(torch.as_tensor(value)).detach()
    return tensors


def load_optimizer_tensors(model, optimizer, tensors):
    """Load what [`optimizer_tensors`] returned, on any number of ranks.

    Args:
        tensors: iterates over the names; `tensors.rows(name, start, stop)` returns rows of a tensor. A rank asks only
            for its own rows. See [`checkpoint.OptimizerFiles`].
    Raises:
        KeyError: a tensor belongs to no parameter of the optimizer.
        ValueError: a tensor has another shape than its parameter.
    """
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    indices = {name: index for index, name in enumerate(ordered)}
    state = {}
    for key in tensors:
        name, _, state_name = key.rpartition("/")
        if state_name == AVERAGE:
            continue
        parameter = parameters[name]
        local = to_local(parameter)
        value = tensors.rows(key, *local_rows(parameter))
        if value.dim() and value.shape != local.shape:
            raise ValueError(f"{key} has the shape {tuple(value.shape)}, its parameter {tuple(local.shape)}")
        if value.dim() and isinstance(parameter, DTensor):
            value = to_sharded(value.to(local.device), parameter)
        state.setdefault(indices[name], {})[state_name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def all_finite(tensors):
    """Return whether no number in tensors is NaN or infinite; the host waits for the device once."""
    extremes = [torch.stack(torch.aminmax(tensor.detach())).float() for tensor in tensors if tensor.numel()]
    return not extremes or bool(torch.stack(extremes).isfinite().all())
