"""Shared base classes of all families. They keep what we write on disk a stock checkpoint of transformers."""

import math

import torch
from torch import nn
from torch.nn.attention.flex_attention import and_masks, create_block_mask
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

LAYER_TYPES = ("full_attention", "sliding_attention")

# Standard names of the sizes; a class may store one under another name, see [`field_of`].
_LAYERS = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")
_SIZES = (
    *_LAYERS, "vocab_size", "hidden_size", "intermediate_size", "n_inner", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "d_ff", "encoder_ffn_dim",
    "decoder_attention_heads", "decoder_ffn_dim",
)  # fmt: skip
MAX_LAYERS = 1024
# rope_type -> keys of rope_parameters that it needs, and that it may have, besides rope_theta
_LENGTH = "original_max_position_embeddings"
_ROPE_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), (_LENGTH,)),
    "yarn": (
        ("factor", _LENGTH),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", _LENGTH), ("attention_factor", "factor")),
    "llama3": (("factor", _LENGTH, "low_freq_factor", "high_freq_factor"), ()),
    "proportional": (("partial_rotary_factor",), ("factor",)),
}


def get_field(config, name, default=None):
    """Return a field of a configuration, or the default if its class has no such field.

    Other keys of a checkpoint's configuration are ignored, as the stock class does: for example the `sliding_window` of
    a Qwen model that was converted to Llama.
    """
    return getattr(config, name) if name in type(config).__dataclass_fields__ else default


class StockConfigMixin:
    """Mixin for a subclass of a stock configuration, with the same fields and the same `model_type`.

    The configuration is written as the stock one: `architectures` contains the stock class names. It is not registered
    with `AutoConfig`.
    """

    _stock_names = {}  # our class name -> stock class name, where removing the prefix "My" does not give it

    @classmethod
    def stock_name(cls, class_name):
        """Return the name of the stock class for one of our classes: MyLlamaModel -> LlamaModel."""
        return cls._stock_names.get(class_name, class_name.removeprefix("My"))

    def to_dict(self):
        # Not in save_pretrained: push_to_hub and to_json_file must write the same.
        config = super().to_dict()
        config.pop("auto_map", None)  # code of somebody else, which the model was trained without
        config["architectures"] = [self.stock_name(name) for name in config.get("architectures") or []] or None
        # transformers 4 reads rope_theta and rope_scaling; transformers 5 reads rope_parameters.
        rope = dict(config.get("rope_parameters") or {})
        if "rope_theta" in rope:
            config["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
        return config

    def validate_architecture(self):
        """Check nothing when a configuration is created; `check_architecture` does when a model is built."""

    validate_rope = validate_architecture

    def check_architecture(self):
        """Raise ValueError if a value is out of range, or does not fit another."""
        check_values(self)
        width, heads = self.hidden_size, self.num_attention_heads
        names = {name: field_of(type(self), name) for name in ("hidden_size", "num_attention_heads", "head_dim")}
        # A family whose head_dim has a default of its own (Qwen3, T5) does not derive it from the width.
        if getattr(type(self), names["head_dim"], None) is None and width % heads:
            raise ValueError(f"{names['num_attention_heads']} ({heads}) must divide {names['hidden_size']} ({width})")
        rope, head_dim = get_field(self, "rope_parameters") or {}, get_field(self, names["head_dim"]) or width // heads
        if rope and head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; rotary embeddings rotate pairs, so it must be even")
        check_rope(rope, head_dim)
        for layer_type in get_field(self, "layer_types") or ():
            if layer_type not in LAYER_TYPES:
                raise ValueError(f"layer_types contains '{layer_type}'; choose from {', '.join(LAYER_TYPES)}")
            if layer_type == "sliding_attention" and self.sliding_window is None:
                raise ValueError("layer_types contains 'sliding_attention'; set sliding_window and use_sliding_window")


def field_of(config_class, name):
    """Return the field in which a configuration class stores what has a standard name: n_layer of GPT-2."""
    return config_class.attribute_map.get(name, name)


def check_sizes(config_class, values):
    """Raise ValueError if a size among some fields of a configuration is below 1; its class may divide by it."""
    for name in {field_of(config_class, name) for name in _SIZES} & set(values):
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"{name} is {values[name]}; it must be at least 1")


def check_values(config):
    """Check what configurations of all families, and those of transformers, have in common.

    Raises:
        ValueError: a size is below 1, or another value is out of range.
    """
    values = {name: getattr(config, name) for name in type(config).__dataclass_fields__}
    check_sizes(type(config), values)
    for name in _LAYERS:
        name = field_of(type(config), name)
        if (values.get(name) or 0) > MAX_LAYERS:  # each takes a millisecond to make, without weights
            raise ValueError(f"{name} is {values[name]}; it must be at most {MAX_LAYERS}")
    heads, key_heads = (getattr(config, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(key_heads, int) and heads % key_heads:
        raise ValueError(f"num_key_value_heads ({key_heads}) must divide num_attention_heads ({heads}); set it")
    for name, value in values.items():
        if value is None:
            continue
        if ("dropout" in name or name.endswith("_pdrop")) and not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; a dropout must be at least 0 and below 1")
        if name.endswith(("norm_eps", "norm_epsilon")) and value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
        if name in ("initializer_range", "initializer_factor", "init_std") and value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")
        if name in ("hidden_act", "activation_function") and value not in ACT2FN:
            raise ValueError(f"{name} '{value}' is unknown; choose one of {', '.join(ACT2FN)}")


def check_rope(rope, head_dim):
    """Check a `rope_parameters` completely; the library only logs warnings.

    Raises:
        ValueError: a type, a key or a value that the rotary embeddings cannot use.
    """
    rope = {name: value for name, value in rope.items() if value is not None or name == "rope_type"}
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))  # "type" in old files
    if rope.get("partial_rotary_factor") == 1 and rope_type != "proportional":  # all of a head, as without it
        rope.pop("partial_rotary_factor")
    if rope_type not in _ROPE_KEYS:
        raise ValueError(f"rope_parameters: rope_type {rope_type!r} is unknown; choose {', '.join(_ROPE_KEYS)}")
    required, optional = _ROPE_KEYS[rope_type]
    if missing := [name for name in required if name not in rope]:
        raise ValueError(f"rope_parameters: rope_type {rope_type} needs {' and '.join(missing)}")

    def is_number(value, low=5e-324):  # the smallest number above 0
        return type(value) in (int, float) and low <= value < math.inf

    for name, value in rope.items():
        if name not in (*required, *optional, "rope_theta"):
            raise ValueError(f"rope_parameters: rope_type {rope_type} has no key {name!r}; remove it")
        is_valid, expected = is_number(value), "a finite number above 0"
        if name == "truncate":
            is_valid, expected = isinstance(value, bool), "true or false"
        elif name == "factor":
            is_valid, expected = is_number(value, low=1), "a finite number of at least 1"
        elif name in ("short_factor", "long_factor"):
            is_valid = isinstance(value, (list, tuple)) and len(value) == head_dim // 2 and all(map(is_number, value))
            expected = f"a list of {head_dim // 2} numbers above 0, half of the size of a head"
        if not is_valid:
            raise ValueError(f"rope_parameters: {name} must be {expected}, not {value!r}")
    if rope_type == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError("rope_parameters: high_freq_factor must be above low_freq_factor")


class StockPreTrainedModel(PreTrainedModel):
    """Base class of all models: what the library may do with them, and their name in the library."""

    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config, *arguments, **options):
        config.check_architecture()
        super().__init__(config, *arguments, **options)

    @classmethod
    def _can_set_attn_implementation(cls):
        return (
            True  # the library looks for the call of the kernel in the class's module, and here it is in [`Attention`]
        )

    def _get_name(self):
        # The Trainer looks this name up in the library's lists, for example to shift the labels of a causal model.
        return self.config.stock_name(type(self).__name__.removeprefix("FSDP"))  # as fully_shard renames the class


def same_document(document_ids):
    """Return the mask function by which tokens attend to those of their own document only.

    Args:
        document_ids: (batch, length), equal within a document.
    """

    def is_same(batch, head, query, key):
        return document_ids[batch, query] == document_ids[batch, key]

    return is_same


def make_document_mask(document_ids, *conditions):
    """Return flex attention's block mask for rows of several documents, which do not attend to each other.

    The library's `flex_attention_mask` computes the same, but splits a compiled graph: it has `create_block_mask`
    compile itself.

    Args:
        document_ids: see [`same_document`].
        conditions: functions of the indices (batch, head, query, key) that must hold as well.
    """
    # Not compiled, the function stores a mask of length x length.
    create = create_block_mask if torch.compiler.is_compiling() else torch.compile(create_block_mask)
    (batch_size, length), condition = document_ids.shape, and_masks(same_document(document_ids), *conditions)
    return create(condition, batch_size, None, length, length, device=document_ids.device)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Compute attention in plain operations, which gives access to the weights.

    Args:
        module: the attention module. Its `num_key_value_groups` repeats the key-value heads; its `softmax_in_fp32`
            computes the softmax in fp32.
        query: (batch, heads, length, head size).
        key, value: (batch, key-value heads, length, head size).
        attention_mask: added to the scores, broadcast to (batch, heads, query length, key length); None for no mask.

    Returns:
        The output (batch, length, heads, head size) and the weights (batch, heads, query length, key length).
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    softmax_dtype = torch.float32 if getattr(module, "softmax_in_fp32", False) else None
    weights = nn.functional.softmax(scores, dim=-1, dtype=softmax_dtype).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class Attention(nn.Module):
    """Base class of the attention of all families: it calls the kernel that the configuration selects.

    Args:
        scaling: of the scores, the products of queries and keys.
        dropout: of the weights, in training.
        is_causal: what the kernels do when there is no mask.
    """

    eager_kernel = staticmethod(eager_attention)

    def __init__(self, config, head_dim, scaling, dropout, is_causal):
        super().__init__()
        self.config, self.head_dim, self.scaling, self.dropout = config, head_dim, scaling, dropout
        self.is_causal = is_causal

    def split_heads(self, states):
        """Return states (batch, length, heads * head size) as (batch, heads, length, head size)."""
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def attend(self, query, key, value, attention_mask, **kwargs):
        """Return the output (batch, length, heads * head size) and, with eager attention, the weights."""
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_kernel)
        dropout = self.dropout if self.training else 0.0
        output, weights = kernel(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return output.reshape(*output.shape[:2], -1), weights


def project(layer, hidden_states):
    """Return `layer(hidden_states)`, of a linear layer with a bias and of hidden states (batch, length, size).

    In a compiled training step, the kernel that computes the gradient of the output then sums that of the bias, too.
    """
    is_training = torch.compiler.is_compiling() and torch.is_grad_enabled()
    if not is_training or type(layer) not in (nn.Linear, Conv1D) or hidden_states.dim() != 3:
        return layer(hidden_states)
    bias = layer.bias.detach()
    if isinstance(layer, nn.Linear):
        output = nn.functional.linear(hidden_states, layer.weight, bias)
    else:
        output = torch.addmm(bias, hidden_states.flatten(0, 1), layer.weight).view(*hidden_states.shape[:2], -1)
    return _GradientOfBias.apply(output, layer.bias)


class _GradientOfBias(torch.autograd.Function):
    """Return the output, which includes the bias, and compute the gradient of the bias in two sums.

    Inductor fuses a sum over the positions of a row with the operation before it, one over all positions not.
    """

    @staticmethod
    def forward(ctx, output, bias):
        ctx.dtype = bias.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.sum(1, dtype=torch.float32).sum(0).to(ctx.dtype)
