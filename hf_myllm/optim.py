"""The optimizer, and the learning rate as a pure function of the step."""

import math

import torch
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer


def learning_rate(step, total_steps, peak, floor=0.0, schedule="cosine", warmup_steps=0, decay_steps=None):
    """The learning rate of a step, counted from 0.

    Schedules, after a linear warm-up: constant; linear and cosine (Loshchilov and Hutter 2017) fall from peak to
    floor over the rest of the run; wsd (warm-up, stable, decay: Hu et al. 2024) stays at the peak and falls linearly
    over the last decay_steps, a fifth of the run by default.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    fall = total_steps - warmup_steps
    if schedule == "wsd":
        fall = min(fall, decay_steps or max(1, total_steps // 5))
    progress = min(1.0, max(0.0, (step - (total_steps - fall)) / max(1, fall)))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return floor + (peak - floor) * left


def build_optimizer(model, learning_rate, betas, epsilon, weight_decay, name="adamw"):
    """The optimizer, with decay on matrices only: weights of projections and embeddings, as GPT-2's reproductions and
    the transformers Trainer have it; never biases and norms.

    adamw is AdamW (Loshchilov and Hutter 2019). muon is Muon (Jordan et al. 2024) for the matrices of the layers, whose
    steps it makes as long as AdamW's (Liu et al. 2025, "Muon is Scalable"), so that one learning rate serves both; and
    AdamW for embeddings, heads, biases and norms.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden = hidden_matrices(model) if name == "muon" else set()
    others = [parameter for parameter in parameters if parameter not in hidden]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)
    if not hidden:
        return adamw
    hidden = [parameter for parameter in parameters if parameter in hidden]  # in the model's order
    return ChainedOptimizer(
        [Muon(hidden, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw"), adamw],
    )


def hidden_matrices(model):
    """The parameters that muon takes."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return {parameter for layer in layers for parameter in layer.parameters() if parameter.dim() == 2}


class Muon(torch.optim.Muon):
    """torch's Muon, which takes matrices of a shape through its arithmetic together: one after the other, they are too
    small to fill a GPU, and a thousand operations a step to launch. Like torch's fused optimizers it takes no step
    where `found_inf`, a tensor that it is given, is 1."""

    together = 1 << 26  # entries; more would fill memory, and are enough for any device by themselves

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
            for parameters in alike.values():
                number = max(1, self.together // parameters[0].numel())
                for first in range(0, len(parameters), number):
                    self._step_alike(parameters[first : first + number], group)

    def _step_alike(self, parameters, group):
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        gradients = [to_local(parameter.grad) for parameter in parameters]
        means = [to_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        momentum, taken, found_inf = group["momentum"], 1.0, getattr(self, "found_inf", None)
        if found_inf is not None:  # the mean of a value and itself is that value
            taken = 1 - found_inf
            gradients = [torch.where(found_inf > 0, *pair) for pair in zip(means, gradients, strict=True)]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        updates = [update.bfloat16() for update in torch._foreach_lerp(gradients, means, momentum)]  # Nesterov's
        if isinstance(parameters[0], DTensor):  # its rows are spread over the processes, and each needs all of them
            updates = [to_full(_shared(*pair)) for pair in zip(updates, parameters, strict=True)]
        updates = orthogonalize(torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"])
        length = 0.2 * math.sqrt(max(updates.shape[1:]))  # by which an entry's root mean square is as AdamW's
        weights = [to_local(parameter) for parameter in parameters]
        updates = updates[:, slice(*_own_rows(parameters[0]))].to(weights[0]).contiguous()
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"] * taken)
        torch._foreach_sub_(weights, list(updates * (group["lr"] * length * taken)))


def orthogonalize(matrices, coefficients, steps, epsilon):
    """The orthogonal matrices nearest to some of one shape, (number, rows, columns) in bfloat16, roughly: their
    singular values come to lie around 1, by Newton and Schulz's iteration (Jordan et al. 2024, "Muon")."""
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if is_tall else matrices
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if is_tall else found


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters as one: they share their groups, their state, and what the gradient
    scaler tells them."""

    _step_supports_amp_scaling = True

    def __init__(self, parts):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self):
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state, first = self.param_groups[first:last], self.state, last

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.found_inf = getattr(self, "found_inf", None)
            part.step()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share()


def step_if(optimizer, holds):
    """Take a step if `holds`, a tensor of one bool, is true: the device itself decides, and the host does not wait for
    it, where the optimizer can do that: torch's fused ones, which the gradient scaler tells so, on CPU and CUDA."""
    inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate's
    first = inner.param_groups[0]["params"][0]
    decides = getattr(inner, "_step_supports_amp_scaling", False) and first.device.type in ("cpu", "cuda")
    if not decides or isinstance(first, DTensor):
        if holds.item():
            optimizer.step()
        return
    inner.found_inf = (~holds).float()
    try:
        optimizer.step()
    finally:
        del inner.found_inf


def optimizer_tensors(model, optimizer):
    """The optimizer's state as a flat dict of tensors, "<parameter's name>/<state's name>"; of parameters that are
    sharded over processes (FSDP2), this one's rows."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{names[parameter]}/{key}"] = to_local(torch.as_tensor(value)).detach().cpu().contiguous()
    return tensors


def load_optimizer_tensors(model, optimizer, tensors):
    """The reverse of [`optimizer_tensors`], whatever the number of processes that they were sharded over.

    Args:
        tensors: what has the names when iterated over, and gives the tensors by `rows(name, start, stop)`; for a
            sharded parameter, only this process's rows are asked for.
    Raises:
        KeyError, ValueError: a tensor belongs to no parameter of the model, or is of another shape.
    """
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {name: number for number, name in enumerate(ordered)}
    state = {}
    for key in tensors:
        name, _, part = key.rpartition("/")
        state.setdefault(numbers[name], {})[part] = _like(parameters[name], lambda *at, key=key: tensors.rows(key, *at))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def to_local(tensor):
    """What this process has of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor):
    """All of a tensor that may be sharded; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _own_rows(parameter):
    """Where this process's rows of a parameter start and stop: fully_shard gives each as many as torch.chunk would."""
    if not isinstance(parameter, DTensor):
        return 0, None
    length, size = len(parameter), math.ceil(len(parameter) / parameter.device_mesh.size())
    start = min(length, parameter.device_mesh.get_local_rank() * size)
    return start, min(length, start + size)


def _shared(rows, parameter):
    """This process's rows as a part of what is sharded as a parameter is."""
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(rows, mesh, parameter.placements, shape=shape, stride=stride, run_check=False)


def _like(parameter, rows):
    """A tensor of rows(start, stop), sharded as a parameter is."""
    value = _checked(rows(*_own_rows(parameter)), to_local(parameter))
    if not isinstance(parameter, DTensor) or value.dim() == 0:  # the number of steps
        return value
    return _shared(value.to(to_local(parameter).device), parameter)


def _checked(value, parameter):
    if value.dim() and value.shape != parameter.shape:
        raise ValueError(f"a tensor of {tuple(value.shape)} is not of a parameter of {tuple(parameter.shape)}")
    return value
