"""Precision: the data types that a model computes in."""

import torch
from transformers.modeling_layers import GradientCheckpointingLayer


def cast_to_bf16(model):
    """Pass bfloat16 hidden states from layer to layer under autocast, as [`~hf_myllm.distributed.shard_model`] does.

    Autocast alone keeps the residual stream in fp32, which doubles its memory traffic.
    """
    for layer in layers(model):
        layer.register_forward_pre_hook(_cast_hidden_states)


def _cast_hidden_states(layer, inputs):
    hidden_states, *others = inputs
    if torch.is_autocast_enabled(hidden_states.device.type):
        return (hidden_states.bfloat16(), *others)


def layers(model):
    """Return the layers of a model, which are sharded and compiled one by one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
