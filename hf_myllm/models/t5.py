"""T5: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020.

Versions 1.0 and 1.1. On the same weights these classes compute what the stock T5 classes compute. The bias of the
relative positions and the mask are added once per stack; the stock class adds them in each layer.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import T5Config
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import OutputRecorder

from .encoder_decoder import (
    ConditionalGenerationMixin,
    EncoderDecoderAttention,
    EncoderDecoderMixin,
    StackMixin,
    clamp_fp16,
)
from .loss import product_dtype
from .stock import StockConfigMixin, StockPreTrainedModel


@strict
class MyT5Config(StockConfigMixin, T5Config):
    """[`T5Config`], with the same fields, for the classes of this file.

    T5 1.1 is `feed_forward_proj="gated-gelu"` and `tie_word_embeddings=False`: a head of its own, without the scaling
    of its input. The stock class reads this setting in a file, but then calls each model tied.
    """

    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = None  # default: pad_token_id

    def __post_init__(self, **kwargs):
        is_tied = self.tie_word_embeddings
        super().__post_init__(tie_word_embeddings=is_tied, **kwargs)  # sets scale_decoder_outputs
        self.tie_word_embeddings = is_tied
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id

    def get_text_config(self, decoder=None, encoder=None):
        config = super().get_text_config(decoder, encoder)
        if decoder and not encoder:  # a copy, which generation makes a cache for
            config.num_layers = config.num_decoder_layers
        return config

    def check_architecture(self):
        super().check_architecture()
        gate, _, activation = self.feed_forward_proj.rpartition("-")
        if gate not in ("", "gated") or activation not in ACT2FN:
            raise ValueError(f"feed_forward_proj '{self.feed_forward_proj}' is unknown; give relu or gated-gelu")
        exact = self.relative_attention_num_buckets // 4  # the decoder has twice as many
        if exact < 1 or self.relative_attention_max_distance <= 2 * exact:
            raise ValueError(
                "relative_attention_num_buckets must be at least 4, and below twice relative_attention_max_distance"
            )
        if self.is_decoder or not self.is_encoder_decoder:
            raise ValueError("is_decoder and is_encoder_decoder must keep their defaults; this is an encoder-decoder")


def position_buckets(distances, num_buckets, max_distance, is_bidirectional):
    """Return the bucket of each distance, which is the position of a key minus that of its query.

    Half of the buckets are for one distance each, the others for logarithmically growing ranges up to `max_distance`;
    the last is for all beyond. Bidirectional attention uses half of all buckets for keys on the right; in causal
    attention these share the bucket of distance 0, and are masked.
    """
    offsets = 0
    if is_bidirectional:
        num_buckets //= 2
        offsets, distances = (distances > 0) * num_buckets, distances.abs()
    else:
        distances = (-distances).clamp(min=0)
    num_exact = num_buckets // 2
    growth = torch.log(distances.float() / num_exact) / math.log(max_distance / num_exact)
    ranges = (num_exact + (growth * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return offsets + torch.where(distances < num_exact, distances, ranges)


class MyT5LayerNorm(nn.Module):
    """Root-mean-square normalization in fp32, without a bias (Zhang and Sennrich 2019)."""

    def __init__(self, config: MyT5Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.layer_norm_epsilon

    def forward(self, hidden_states):
        normalized = hidden_states.float()
        normalized = normalized * torch.rsqrt(normalized.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normalized.to(self.weight.dtype)


class MyT5Attention(EncoderDecoderAttention):
    """Attention without scaling. The first layer of a stack has the bias of the relative positions for all layers."""

    projections = ("q", "k", "v", "o")

    def __init__(self, config: MyT5Config, layer_idx: int, is_causal: bool = False, has_bias: bool = False):
        super().__init__(
            config, layer_idx, config.num_heads, config.d_kv, 1.0, config.dropout_rate, bias=False, is_causal=is_causal
        )
        # In place of the scaling of the scores. At the full learning rate, the scores would soon saturate the softmax.
        self.q.init_scale = self.q.lr_scale = config.d_kv**-0.5
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
            self.relative_attention_bias.init_scale = config.d_model**-0.5
            self.relative_attention_bias.lr_scale = config.d_model**0.5  # other scores are sums over d_model products

    def add_position_bias(self, attention_mask, distances, num_keys, dtype):
        """Return the bias of the relative positions and the mask, (1 or batch, heads, queries, keys).

        Args:
            attention_mask: boolean, or added to the scores; None for none.
            distances: (queries + keys - 1), ascending; the first is that of the first key from the last query.
            dtype: data type of the scores.
        """
        config, minimum = self.config, torch.finfo(dtype).min
        buckets = position_buckets(
            distances,
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
            is_bidirectional=not self.is_causal,
        )
        bias = self.relative_attention_bias(buckets).t().to(dtype)
        if attention_mask is None and self.is_causal:
            bias = bias.masked_fill(distances > 0, minimum)
        # Key j has, for query i from the last, distance i + j of the list: a view instead of a lookup for each pair.
        bias = bias.unfold(-1, num_keys, 1).flip(-2).unsqueeze(0)
        if attention_mask is None:
            return bias
        if attention_mask.dtype == torch.bool:
            return torch.where(attention_mask, bias, minimum)
        return bias + attention_mask


class MyT5FeedForward(nn.Module):
    """Position-wise feed-forward network: ReLU, or gated GELU in T5 1.1 (Shazeer 2020)."""

    def __init__(self, config: MyT5Config):
        super().__init__()
        if config.is_gated_act:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)
        # "gelu_new" computes the tanh approximation of GELU in eight operations; torch has it as one.
        name = config.dense_act_fn
        self.act = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]
        self.is_gated = config.is_gated_act

    def forward(self, hidden_states):
        if self.is_gated:
            hidden_states = self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        else:
            hidden_states = self.act(self.wi(hidden_states))
        hidden_states = self.dropout(hidden_states)
        if not torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.to(self.wo.weight.dtype)  # fp32 in a model that is loaded in fp16
        return self.wo(hidden_states)


class MyT5Residual(nn.Module):
    """A sublayer with pre-normalization and a residual connection.

    Args:
        name: of the sublayer in checkpoints.
    """

    def __init__(self, config: MyT5Config, name: str, sublayer: nn.Module):
        super().__init__()
        self.name = name
        setattr(self, name, sublayer)
        self.layer_norm = MyT5LayerNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states, *arguments, **kwargs):
        output = getattr(self, self.name)(self.layer_norm(hidden_states), *arguments, **kwargs)
        output = output[0] if isinstance(output, tuple) else output  # attention returns its weights too
        return clamp_fp16(hidden_states + self.dropout(output))


class MyT5Block(GradientCheckpointingLayer):
    """Self-attention, in the decoder cross-attention, and the feed-forward network."""

    def __init__(self, config: MyT5Config, layer_idx: int, is_decoder: bool):
        super().__init__()
        self.has_bias = layer_idx == 0
        attention = MyT5Attention(config, layer_idx, is_causal=is_decoder, has_bias=self.has_bias)
        self.layer = nn.ModuleList([MyT5Residual(config, "SelfAttention", attention)])
        if is_decoder:
            self.layer.append(MyT5Residual(config, "EncDecAttention", MyT5Attention(config, layer_idx)))
        self.layer.append(MyT5Residual(config, "DenseReluDense", MyT5FeedForward(config)))

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        distances=None,
        **kwargs,
    ):
        if self.has_bias:
            num_keys = len(distances) + 1 - hidden_states.shape[1]
            attention_mask = self.layer[0].SelfAttention.add_position_bias(
                attention_mask, distances, num_keys, product_dtype(hidden_states)
            )
        hidden_states = self.layer[0](hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        if len(self.layer) == 3 and encoder_hidden_states is not None:
            hidden_states = self.layer[1](
                hidden_states, encoder_attention_mask, encoder_hidden_states, past_key_values, **kwargs
            )
        return self.layer[-1](hidden_states), attention_mask


class MyT5PreTrainedModel(StockPreTrainedModel):
    """Base class of the T5 models."""

    config: MyT5Config
    base_model_prefix = "transformer"
    _no_split_modules = ["MyT5Block"]
    _keep_in_fp32_modules = ["wo"]  # in fp16, which it overflows
    _supports_flash_attn = False  # no kernel of it adds a bias
    _supports_flex_attn = False
    # a second bias in the first T5 checkpoints, which nothing read
    _keys_to_ignore_on_load_unexpected = ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(MyT5Block, index=0),
        "attentions": OutputRecorder(MyT5Attention, index=1, layer_name="SelfAttention"),
        "cross_attentions": OutputRecorder(MyT5Attention, index=1, layer_name="EncDecAttention"),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialize as the paper's code (Mesh TensorFlow): matrices by their inputs, embeddings with 1."""
        factor = self.config.initializer_factor * getattr(module, "init_scale", 1.0)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=factor * module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=factor)
        elif isinstance(module, MyT5LayerNorm):
            init.constant_(module.weight, factor)


class MyT5Stack(StackMixin, MyT5PreTrainedModel):
    """The encoder or the decoder."""

    layers = property(lambda self: self.block)  # the name that StackMixin uses

    def __init__(self, config: MyT5Config, is_decoder: bool):
        super().__init__(config)
        self.is_decoder = is_decoder
        num_layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.block = nn.ModuleList([MyT5Block(config, layer_idx, is_decoder) for layer_idx in range(num_layers)])
        self.final_layer_norm = MyT5LayerNorm(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, inputs_embeds, start, num_keys):
        last_query = inputs_embeds.shape[1] - 1
        distances = torch.arange(num_keys + last_query, device=inputs_embeds.device) - (start + last_query)
        return self.dropout(inputs_embeds), {"distances": distances}

    def finish(self, hidden_states):
        return self.dropout(self.final_layer_norm(hidden_states))


class MyT5Model(EncoderDecoderMixin, MyT5PreTrainedModel):
    """T5 without a head. On disk it is a stock T5Model."""

    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: MyT5Config):
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.shared.lr_scale = config.d_model**0.5  # as it is larger than the matrices
        self.encoder = MyT5Stack(config, is_decoder=False)
        self.decoder = MyT5Stack(config, is_decoder=True)
        self.add_head(config)
        self.post_init()

    def add_head(self, config):
        pass

    def get_expanded_tied_weights_keys(self, all_submodels=False):
        # The setting is about the head only; both stacks share one embedding in all versions.
        is_tied = self.config.tie_word_embeddings
        return {name: source for name, source in self._tied_weights_keys.items() if is_tied or "lm_head" not in name}


class MyT5ForConditionalGeneration(ConditionalGenerationMixin, MyT5Model):
    """T5 with a language-modeling head. On disk it is a stock T5ForConditionalGeneration."""

    _tied_weights_keys = {**MyT5Model._tied_weights_keys, "lm_head.weight": "shared.weight"}

    def add_head(self, config):
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.output_scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0

    def run_body(self, *arguments, **options):
        return MyT5Model.forward(self, *arguments, **options)

    def tie_weights(self, missing_keys=None, recompute_mapping=True):
        super().tie_weights(missing_keys, recompute_mapping)
        if missing_keys is not None and not self.config.scale_decoder_outputs:
            # The stock class saves a T5 1.1 as tied in any case; it has a head of its own if the file has one.
            self.config.tie_word_embeddings = "lm_head.weight" in self.all_tied_weights_keys
