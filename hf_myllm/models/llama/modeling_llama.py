"""Llama, written for training.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023. On the same weights it computes what
transformers' LlamaForCausalLM computes, and it reads and writes the same files. Causal training never builds a mask,
so that the fused causal kernel runs, compiled or not; the stock class does, compiled.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Rotary embeddings come from the library: it has every way to scale them, kept up with the models that use them.
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_llama import MyLlamaConfig


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention in plain operations, for those who want to see the weights.

    Shapes: query (batch, heads, length, head size), key and value (batch, key-value heads, length, head size); returns
    (batch, length, heads, head size) and the weights (batch, heads, query length, key length).
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class MyLlamaRMSNorm(nn.Module):
    """Root-mean-square normalisation in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states):
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden_states.dtype)


class MyLlamaAttention(nn.Module):
    """Causal self-attention; rotary positions (Su et al. 2021), grouped key-value heads (Ainslie et al. 2023)."""

    def __init__(self, config: MyLlamaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True  # read by the attention functions when there is no mask
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, position_embeddings=None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


class MyLlamaMLP(nn.Module):
    """Gated feed-forward network (SwiGLU: Shazeer 2020)."""

    def __init__(self, config: MyLlamaConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MyLlamaDecoderLayer(GradientCheckpointingLayer):
    """Attention then feed-forward, each normalised before and added after."""

    def __init__(self, config: MyLlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MyLlamaAttention(config, layer_idx)
        self.mlp = MyLlamaMLP(config)
        self.input_layernorm = MyLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MyLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        mixed, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MyLlamaPreTrainedModel(PreTrainedModel):
    """What every Llama class shares."""

    config: MyLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MyLlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # computed, though Llama's first files hold it
    _can_record_outputs = {"hidden_states": MyLlamaDecoderLayer, "attentions": MyLlamaAttention}

    def _get_name(self):
        # the library looks classes up by this name, to know that a causal model's labels are to be shifted
        return self.config._stock_architectures.get(type(self).__name__, type(self).__name__)


class MyLlamaModel(MyLlamaPreTrainedModel):
    """The decoder without a head: token ids in, hidden states out."""

    def __init__(self, config: MyLlamaConfig):
        super().__init__(config)
        self.vocab_size, self.padding_idx = config.vocab_size, config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MyLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = MyLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

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
        """Hidden states of the last layer, normalised.

        Args:
            input_ids: (batch, length) token ids; or inputs_embeds (batch, length, hidden_size), not both.
            attention_mask: (batch, length of cache and input), 1 for tokens to attend to and 0 for padding.
            position_ids: (batch, length). Positions that restart inside a row (and no mask, no cache) mark packed
                documents, which then do not attend to each other.
            past_key_values: a `Cache` of the positions before these; made here when `use_cache` is true.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        if (
            self.config._attn_implementation == "sdpa"
            and attention_mask is None
            and position_ids is None
            and past_key_values is None
        ):
            mask = None  # plain causal attention, which the kernel does by itself
        else:
            # Only positions that the caller gave: ones made here would hide from the library that the mask is plain.
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + start).unsqueeze(0)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        # computed twice, under gradient checkpointing, the layers must not write into a cache
        is_recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        cache = None if is_recomputed else past_key_values
        for layer in self.layers[: self.config.num_hidden_layers]:  # fewer, when a draft is generated by early exit
            hidden_states = layer(
                hidden_states,
                cache,
                mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class MyLlamaForCausalLM(MyLlamaPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head. On disk it is a stock LlamaForCausalLM."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    # how the head is spread over devices; the rest is in the configuration
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MyLlamaConfig):
        super().__init__(config)
        self.vocab_size = config.vocab_size
        self.model = MyLlamaModel(config)
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
        """Next-token logits (batch, length, vocab_size), and the mean cross-entropy in nats when labels are given.

        Args:
            labels: (batch, length) token ids, shifted here so that position t predicts label t + 1; -100 is ignored.
            shift_labels: (batch, length) token ids already shifted: position t predicts shift_labels t. Not in the
                signature, where the library's Trainer would take it for something that each batch must have.
            logits_to_keep: how many last positions to compute logits for (0: all), or their indices.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels here.
            skip_logits: give the loss alone. Logits are the largest thing that a step computes, and what is given back
                must be kept: compiled, they then never exist in fp32. Not in the signature either.
            The others as in [`MyLlamaModel`].
        """
        shift_labels, skip_logits = kwargs.pop("shift_labels", None), kwargs.pop("skip_logits", False)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
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


class MyLlamaForSequenceClassification(MyLlamaPreTrainedModel):
    """The decoder with a classifier of whole rows, by what it knows at the last token. On disk it is a stock
    LlamaForSequenceClassification."""

    def __init__(self, config: MyLlamaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MyLlamaModel(config)
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
        """Logits (batch, num_labels), and the loss when labels are given.

        Args:
            labels: as in the stock class: (batch,) class ids; (batch, num_labels) of 0.0 and 1.0; (batch,) numbers.
            The others as in [`MyLlamaModel`]. The last token is the rightmost that is not `config.pad_token_id`.
        Raises:
            ValueError: several rows, and the configuration has no pad_token_id.
        """
        outputs = self.model(
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
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def last_token(input_ids, pad_token_id, rows):
    """Where each row's last token stands that is no padding; -1 where that is not to be known."""
    if pad_token_id is None and rows > 1:
        raise ValueError(
            "config.pad_token_id is not set, and rows of several lengths cannot be told from their padding"
        )
    if pad_token_id is None or input_ids is None:
        return -1
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (places * (input_ids != pad_token_id)).argmax(-1)
