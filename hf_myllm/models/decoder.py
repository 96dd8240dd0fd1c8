"""The decoder that Llama-like families share, and the parts of it that every causal family uses.

A family subclasses `DecoderPreTrainedModel`, `DecoderModel`, `DecoderForCausalLM` and `SequenceClassificationMixin` and
replaces what differs: see llama.py and qwen3.py. On the same weights, a family computes exactly what its stock class
computes. Causal training never builds a mask, compiled or not, so that the fused causal kernel runs.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

# The library's rotary embedding supports every way to scale them and is the same for all these families.
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .loss import fuses_head_and_loss, linear_cross_entropy
from .stock import Attention, StockPreTrainedModel, get_field, make_document_mask


def get_layer_types(config):
    """Return the attention type of each layer. Without `layer_types`, a configuration has one type for all."""
    default = "full_attention" if get_field(config, "sliding_window") is None else "sliding_attention"
    return get_field(config, "layer_types") or [default] * config.num_hidden_layers


def make_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids, layer_type):
    """Return the mask of the layers of one type, or None where the sdpa kernel applies the same mask by itself.

    Args:
        position_ids: the caller's positions, or None. With positions that are generated here, the library would not
            recognize the plain causal case.
    """
    is_sliding = layer_type == "sliding_attention"
    has_positions_only = attention_mask is None and past_key_values is None
    is_windowed = is_sliding and inputs_embeds.shape[1] > config.sliding_window
    if config._attn_implementation == "sdpa" and has_positions_only and position_ids is None and not is_windowed:
        return None
    if config._attn_implementation == "flex_attention" and has_positions_only and position_ids is not None:
        starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
        allows = sliding_window_causal_mask_function(config.sliding_window) if is_sliding else causal_mask_function
        return make_document_mask(starts.cumsum(-1), allows)
    create_mask = create_sliding_window_causal_mask if is_sliding else create_causal_mask
    return create_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


def last_token(input_ids, pad_token_id, batch_size):
    """Return the index (batch,) of the last token of each row that is not padding; -1 if padding is unknown.

    Raises:
        ValueError: there are several rows and pad_token_id is None.
    """
    if pad_token_id is None and batch_size > 1:
        raise ValueError("config.pad_token_id is not set; set it to classify batches of several rows")
    if pad_token_id is None or input_ids is None:
        return -1
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (positions * (input_ids != pad_token_id)).argmax(-1)


class DecoderAttention(Attention):
    """Causal self-attention: rotary positions (Su et al. 2021), grouped key-value heads (Ainslie et al. 2023)."""

    softmax_in_fp32 = True  # see eager_attention

    def __init__(self, config, layer_idx):
        head_dim = get_field(config, "head_dim") or config.hidden_size // config.num_attention_heads
        super().__init__(config, head_dim, head_dim**-0.5, config.attention_dropout, is_causal=True)
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        is_sliding = get_layer_types(config)[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else None  # read by flash attention
        width, bias = config.hidden_size, get_field(config, "attention_bias", False)
        self.q_proj = nn.Linear(width, config.num_attention_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, width, bias=bias)

    def normalize(self, query, key):
        """Normalize query and key, both (batch, length, heads, head size), before the rotation. A family may override
        this."""
        return query, key

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, position_embeddings=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.normalize(self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape))
        value = self.split_heads(self.v_proj(hidden_states))
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        # Under autocast, rotation and normalization return fp32; flex attention needs one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, sliding_window=self.sliding_window, **kwargs)
        return self.o_proj(output), weights


class DecoderMLP(nn.Module):
    """Gated feed-forward network (SwiGLU: Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, get_field(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward network, each with pre-normalization and a residual connection."""

    def __init__(self, config, layer_idx, attention_class=DecoderAttention):
        super().__init__()
        self.self_attn = attention_class(config, layer_idx)
        self.mlp = DecoderMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class CausalModelMixin:
    """Forward pass of a decoder without a head.

    The class has the modules `layers` and `norm`, and overrides `embed_positions`.
    """

    def embed_positions(self, hidden_states, position_ids, **kwargs):
        """Return the input of the first layer, and the keyword arguments of every layer."""
        raise NotImplementedError

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        """Return the normalized hidden states of the last layer.

        Args:
            input_ids: (batch, length) token ids; or inputs_embeds (batch, length, hidden_size), not both.
            attention_mask: (batch, length of cache and input), 1 for tokens and 0 for padding; or a prepared mask; or
                a dict of prepared masks by layer type, as `generate` passes it.
            position_ids: (batch, length). Positions that restart within a row (without a mask or a cache) mark packed
                documents, which then do not attend to each other.
            past_key_values: a `Cache` of the positions before these; created here when `use_cache` is true.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        layer_types = get_layer_types(self.config)
        masks = attention_mask
        if not isinstance(attention_mask, dict):
            inputs = (self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
            masks = {layer_type: make_causal_mask(*inputs, layer_type) for layer_type in dict.fromkeys(layer_types)}
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start).unsqueeze(0)

        hidden_states, kwargs = self.embed_positions(inputs_embeds, position_ids, **kwargs)
        # Gradient checkpointing computes each layer twice; the layers must not write into the cache then.
        is_recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        cache = None if is_recomputed else past_key_values
        # Generation with early exit lowers num_hidden_layers for its draft.
        for layer, layer_type in zip(self.layers[: self.config.num_hidden_layers], layer_types, strict=False):
            mask = masks[layer_type]
            hidden_states = layer(hidden_states, cache, mask, position_ids=position_ids, use_cache=use_cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class CausalLMMixin:
    """A decoder with a language-modeling head; the class sets `body_class`, the decoder without a head."""

    body_class = None

    def __init__(self, config):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        setattr(self, self.base_model_prefix, self.body_class(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Return next-token logits (batch, length, vocab_size), and the mean cross-entropy in nats if labels are given.

        Args:
            labels: (batch, length) token ids, shifted here so that position t predicts label t + 1; -100 is ignored.
            logits_to_keep: number of last positions to compute logits for (0: all), or their indices.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels in this batch.
            shift_labels: (batch, length) token ids that are shifted already: position t predicts shift_labels t.
            skip_logits: return the loss only. Logits are the largest tensor of a step and returning them keeps them
                alive; a compiled step that does not return them never stores them in fp32.
            The others as in [`CausalModelMixin`]. `shift_labels` and `skip_logits` are not in the signature: the
            library's Trainer would expect a label of the signature in every batch.
        """
        shift_labels, skip_logits = kwargs.pop("shift_labels", None), kwargs.pop("skip_logits", False)
        outputs = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states, logits, loss = outputs.last_hidden_state, None, None
        if skip_logits and shift_labels is not None:
            loss = self.compute_loss(hidden_states, shift_labels, kwargs.get("num_items_in_batch"))
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep, :])
            if labels is not None or shift_labels is not None:
                loss = self.loss_function(
                    logits, labels, vocab_size=self.config.vocab_size, shift_labels=shift_labels, **kwargs
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def compute_loss(self, hidden_states, shift_labels, num_items_in_batch=None):
        """Return the loss of the last hidden states. Under FSDP2 it is compiled by itself, as each layer is."""
        if fuses_head_and_loss(self.lm_head, hidden_states):
            return linear_cross_entropy(self.lm_head, hidden_states, shift_labels, num_items_in_batch)
        logits, options = self.lm_head(hidden_states), {"num_items_in_batch": num_items_in_batch}
        return self.loss_function(logits, None, self.config.vocab_size, shift_labels=shift_labels, **options)


class SequenceClassificationMixin:
    """A decoder with a classifier of whole rows, applied to the last token; the class sets `body_class`."""

    body_class = None

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.body_class(config))
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ):
        """Return logits (batch, num_labels), and the loss if labels are given.

        Args:
            labels: as in the stock class: (batch,) class ids; (batch, num_labels) of 0.0 and 1.0; (batch,) numbers.
            The others as in [`CausalModelMixin`]. The last token is the rightmost that is not `config.pad_token_id`.

        Raises:
            ValueError: there are several rows and the configuration has no pad_token_id.
        """
        outputs = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        rows = torch.arange(len(outputs.last_hidden_state), device=outputs.last_hidden_state.device)
        last = last_token(input_ids, self.config.pad_token_id, len(rows))
        logits = self.score(outputs.last_hidden_state[rows, last])
        return SequenceClassifierOutputWithPast(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class DecoderPreTrainedModel(StockPreTrainedModel):
    """Base class of a Llama-like family. A subclass annotates `config` with its configuration class."""

    base_model_prefix = "model"
    attention_class = DecoderAttention
    _no_split_modules = ["DecoderLayer"]
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": DecoderAttention}


class DecoderModel(CausalModelMixin):
    """The decoder without a head: token ids in, hidden states out."""

    def __init__(self, config):
        super().__init__(config)
        self.vocab_size, self.padding_idx = config.vocab_size, config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, index, self.attention_class) for index in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def embed_positions(self, hidden_states, position_ids, **kwargs):
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        return hidden_states, {**kwargs, "position_embeddings": position_embeddings}


class DecoderForCausalLM(CausalLMMixin):
    """The decoder with a language-modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # How tensor, pipeline and FSDP parallelism treat the head; the plan of the layers is in the stock configuration.
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
