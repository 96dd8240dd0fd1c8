"""The exponential moving average (EMA) of the weights while they are trained."""

from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from .optim import AVERAGE
from .sharding import local_rows, to_local


class WeightAverage:
    """The exponential moving average of a model's trained weights, in fp32; of sharded weights, this rank's rows.

    After n steps the decay is at most (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage, so that the
    average soon forgets the initial weights.

    Args:
        model: prepared for its ranks and devices; weights without gradients are left out.
        decay: the share of the average that stays at each step.
    """

    def __init__(self, model, decay):
        self.model, self.decay = model, decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = [weight.to(torch.float32, copy=True) for weight in self._weights()]

    @torch.no_grad()
    def _weights(self):
        return [to_local(parameter).detach() for parameter in self.parameters.values()]

    @torch.no_grad()
    def update(self, step, is_finite):
        """Add the weights after a step, without waiting for the device.

        Args:
            step: from 0.
            is_finite: a tensor of one bool; False for a step that was skipped, which changes nothing.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        factor = (is_finite * share).to(self.averages[0].device)
        # One pass over the memory; torch's foreach operations take no factor from the device in a single one.
        for average, weight in zip(self.averages, self._weights(), strict=True):
            average.lerp_(weight.float(), factor)

    @contextmanager
    def applied(self):
        """Let the model have the average as its weights in the block, and its own weights again after it."""
        own = [weight.clone() for weight in self._weights()]
        try:
            self.apply(self.averages)
            yield
        finally:
            self.apply(own)

    @torch.no_grad()
    def apply(self, weights=None):
        """Make the average, or other weights, the weights of the model."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root keeps its gathered weights after an evaluation
        torch._foreach_copy_(self._weights(), weights or self.averages)

    def tensors(self):
        """Return the average, the rows of this rank, as {"<parameter name>/ema": tensor}."""
        return {f"{name}/{AVERAGE}": average for name, average in zip(self.parameters, self.averages, strict=True)}

    def load(self, tensors):
        """Load what [`tensors`] returned, on any number of ranks, and return True; return False if there is none.

        Raises:
            KeyError: the average of a parameter is missing.
        """
        if not any(name.endswith(f"/{AVERAGE}") for name in tensors):
            return False
        for (name, parameter), average in zip(self.parameters.items(), self.averages, strict=True):
            average.copy_(tensors.rows(f"{name}/{AVERAGE}", *local_rows(parameter)))
        return True
