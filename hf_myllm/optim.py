"""The optimizer, and the learning rate as a pure function of the step."""

import math

import torch


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


def build_optimizer(model, learning_rate, betas, epsilon, weight_decay):
    """AdamW (Loshchilov and Hutter 2019) with decay on matrices only: weights of projections and embeddings, as
    GPT-2's reproductions and the transformers Trainer have it; never biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)


def optimizer_tensors(model, optimizer):
    """The optimizer's state as a flat dict of tensors, "<parameter's name>/<state's name>"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{names[parameter]}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def load_optimizer_tensors(model, optimizer, tensors):
    """The reverse of [`optimizer_tensors`].

    Raises:
        KeyError: a tensor belongs to no parameter of the model.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {name: number for number, name in enumerate(ordered)}
    state = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        state.setdefault(numbers[name], {})[part] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
