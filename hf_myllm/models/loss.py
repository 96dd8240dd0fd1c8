"""The loss of a language-modeling head, computed together with its gradient."""

import torch
from torch import nn

IGNORE_INDEX = -100  # the label of a position without a target, as in torch.nn.functional.cross_entropy


def fuses_head_and_loss(head, hidden_states):
    """Return whether [`linear_cross_entropy`] is faster here: in a compiled training step, with a plain head.

    Uncompiled, each of its operations would store a tensor of the size of the logits. In fp16, gradients are only in
    range after the multiplication by the loss scale.
    """
    is_training = torch.compiler.is_compiling() and torch.is_grad_enabled()
    return is_training and type(head) is nn.Linear and product_dtype(hidden_states) != torch.float16


def linear_cross_entropy(head, hidden_states, labels, count=None, logits_bias=None):
    """Return the cross-entropy of `head(hidden_states)` and the labels, summed and divided by `count`.

    Args:
        hidden_states: (..., hidden_size).
        labels: (...) token ids, -100 is ignored.
        count: default: the number of labels that are not ignored.
        logits_bias: (1, vocab_size), added to the logits in place of the head's bias.
    """
    count = (labels != IGNORE_INDEX).sum() if count is None else count
    bias = head.bias if logits_bias is None else logits_bias.flatten()
    tensors, dtype = (hidden_states.flatten(0, -2), head.weight, bias), product_dtype(hidden_states)
    tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    return _LinearCrossEntropy.apply(*tensors, labels.flatten(), count)


def product_dtype(tensor):
    """Return the data type in which a matrix product with a tensor is computed."""
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of the logits is computed in the forward pass, while a block of logits is in the cache.

    Computed in the backward pass, it would read all logits again, which are the largest tensor of a step.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, count):
        logits = nn.functional.linear(hidden_states, weight, bias)
        scores, has_label = logits.float(), (labels != IGNORE_INDEX)[:, None]
        # One kernel reads the logits and overwrites them by their gradient: a comparison and a sum instead of gather,
        # and a gradient that needs the losses.
        maximum = scores.amax(-1, keepdim=True)
        log_sum = (scores - maximum).exp().sum(-1, keepdim=True).log() + maximum
        is_label = torch.arange(scores.shape[-1], device=labels.device) == labels[:, None]
        label_scores = torch.where(is_label, scores, 0).sum(-1, keepdim=True)
        losses = log_sum - label_scores
        gradient = (scores - label_scores - losses).exp() - is_label.float()
        gradient = (gradient * (has_label / count)).to(logits.dtype)
        ctx.save_for_backward(
            gradient @ weight,
            gradient.mT @ hidden_states if ctx.needs_input_grad[1] else None,
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )
        return (losses * has_label).sum() / count

    @staticmethod
    def backward(ctx, gradient):
        return *(None if saved is None else saved * gradient for saved in ctx.saved_tensors), None, None
