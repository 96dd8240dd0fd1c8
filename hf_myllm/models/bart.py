"""BART: Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training", 2020.

On the same weights these classes compute what the stock BART classes compute.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import BartConfig
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
from .stock import StockConfigMixin, StockPreTrainedModel

_POSITION_OFFSET = 2  # the first two rows of the position embeddings are never used, as in fairseq


@strict
class MyBartConfig(StockConfigMixin, BartConfig):
    """[`BartConfig`], with the same fields, for the classes of this file."""

    def check_architecture(self):
        super().check_architecture()
        if self.d_model % self.decoder_attention_heads:
            raise ValueError(f"decoder_attention_heads ({self.decoder_attention_heads}) must divide d_model")
        if not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is false; BART shares one embedding, leave it out")
        if self.encoder_layerdrop or self.decoder_layerdrop:
            raise ValueError("encoder_layerdrop and decoder_layerdrop are not supported; set them to 0")
        if self.is_decoder or not self.is_encoder_decoder:
            raise ValueError("is_decoder and is_encoder_decoder must keep their defaults; this is an encoder-decoder")


class MyBartEmbedding(nn.Embedding):
    """Token embedding, multiplied by the square root of its width with `scale_embedding`."""

    def __init__(self, config: MyBartConfig):
        super().__init__(config.vocab_size, config.d_model, config.pad_token_id)
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else None

    def forward(self, input_ids):
        embedded = super().forward(input_ids)
        return embedded if self.scale is None else embedded * self.scale


class MyBartLayer(GradientCheckpointingLayer):
    """Self-attention, in the decoder cross-attention, and the feed-forward network, each with a residual connection and
    post-normalization."""

    def __init__(self, config: MyBartConfig, layer_idx: int, is_decoder: bool):
        super().__init__()
        heads = config.decoder_attention_heads if is_decoder else config.encoder_attention_heads
        inner = config.decoder_ffn_dim if is_decoder else config.encoder_ffn_dim
        head_dim = config.d_model // heads
        attention = (config, layer_idx, heads, head_dim, head_dim**-0.5, config.attention_dropout, True)
        self.self_attn = EncoderDecoderAttention(*attention, is_causal=is_decoder)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        if is_decoder:
            self.encoder_attn = EncoderDecoderAttention(*attention)
            self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, inner)
        self.fc2 = nn.Linear(inner, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.activation_fn = ACT2FN[config.activation_function]
        self.dropout, self.activation_dropout = nn.Dropout(config.dropout), nn.Dropout(config.activation_dropout)
        self.is_decoder = is_decoder

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        output, _ = self.self_attn(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(output))
        if self.is_decoder and encoder_hidden_states is not None:
            output, _ = self.encoder_attn(
                hidden_states, encoder_attention_mask, encoder_hidden_states, past_key_values, **kwargs
            )
            hidden_states = self.encoder_attn_layer_norm(hidden_states + self.dropout(output))
        output = self.fc2(self.activation_dropout(self.activation_fn(self.fc1(hidden_states))))
        hidden_states = self.final_layer_norm(hidden_states + self.dropout(output))
        return hidden_states if self.is_decoder else clamp_fp16(hidden_states), attention_mask


class MyBartPreTrainedModel(StockPreTrainedModel):
    """Base class of the BART models."""

    config: MyBartConfig
    base_model_prefix = "model"
    _no_split_modules = ["MyBartLayer"]
    _keys_to_ignore_on_load_unexpected = ["encoder.version", "decoder.version"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(MyBartLayer, index=0),
        "attentions": OutputRecorder(EncoderDecoderAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(EncoderDecoderAttention, index=1, layer_name="encoder_attn"),
    }


class MyBartStack(StackMixin, MyBartPreTrainedModel):
    """The encoder or the decoder."""

    def __init__(self, config: MyBartConfig, is_decoder: bool):
        super().__init__(config)
        self.is_decoder = is_decoder
        num_layers = config.decoder_layers if is_decoder else config.encoder_layers
        self.embed_tokens = MyBartEmbedding(config)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + _POSITION_OFFSET, config.d_model)
        self.layers = nn.ModuleList([MyBartLayer(config, layer_idx, is_decoder) for layer_idx in range(num_layers)])
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, inputs_embeds, start, num_keys):
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + (start + _POSITION_OFFSET)
        return self.dropout(self.layernorm_embedding(inputs_embeds + self.embed_positions(positions))), {}


class MyBartModel(EncoderDecoderMixin, MyBartPreTrainedModel):
    """BART without a head. On disk it is a stock BartModel."""

    reads_own_inputs = True
    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: MyBartConfig):
        super().__init__(config)
        self.shared = MyBartEmbedding(config)
        self.encoder = MyBartStack(config, is_decoder=False)
        self.decoder = MyBartStack(config, is_decoder=True)
        self.post_init()


class MyBartForConditionalGeneration(ConditionalGenerationMixin, MyBartPreTrainedModel):
    """BART with a language-modeling head. On disk it is a stock BartForConditionalGeneration."""

    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}
    _keys_to_ignore_on_load_missing = ["final_logits_bias"]

    def __init__(self, config: MyBartConfig):
        super().__init__(config)
        self.model = MyBartModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MyBartForConditionalGeneration):
            init.zeros_(module.final_logits_bias)

    def run_body(self, *arguments, **options):
        return self.model(*arguments, **options)

    def resize_token_embeddings(self, *arguments, **options):
        embeddings = super().resize_token_embeddings(*arguments, **options)
        added = max(0, embeddings.num_embeddings - self.final_logits_bias.shape[1])
        self.final_logits_bias = nn.functional.pad(self.final_logits_bias, (0, added))[:, : embeddings.num_embeddings]
        return embeddings
