"""GPT: GPT-2's architecture, written for training.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. On the same weights it computes what
transformers' GPT2LMHeadModel computes, and it reads and writes the same files. Causal training never builds a mask, so
that the fused causal kernel runs, compiled or not.
"""

import math

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
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
from transformers.pytorch_utils import Conv1D  # a linear layer whose weight is (in, out), as GPT-2's files have it
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt import GPTConfig


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention in plain operations, for those who want to see the weights.

    Shapes: query, key, value (batch, heads, length, head size); returns (batch, length, heads, head size) and the
    weights (batch, heads, query length, key length).
    """
    if module.config.reorder_and_upcast_attn:  # Mistral's GPT-2: scale the keys first, and score in fp32
        scores = torch.matmul(query.float(), key.float().transpose(-1, -2) * scaling)
    else:
        scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class GPTAttention(nn.Module):
    """Causal multi-head self-attention; query, key and value come from one product."""

    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.is_causal = True  # read by the attention functions when there is no mask
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.ends_residual_branch = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.c_attn(hidden_states).chunk(3, dim=-1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        mixed = mixed.reshape(*hidden_states.shape[:-1], -1)
        return self.resid_dropout(self.c_proj(mixed)), weights


class GPTMLP(nn.Module):
    """Position-wise feed-forward network, four times as wide as the model unless `n_inner` says otherwise."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Conv1D(width, config.n_embd)
        # "gelu_new" spells GELU's tanh approximation out in eight operations; torch has the same function as one
        name = config.activation_function
        self.act = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]
        self.c_proj = Conv1D(config.n_embd, width)
        self.c_proj.ends_residual_branch = True
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states):
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPTBlock(GradientCheckpointingLayer):
    """Attention then feed-forward, each normalised before and added after."""

    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPTMLP(config)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        mixed, _ = self.attn(
            self.ln_1(hidden_states), past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPTPreTrainedModel(PreTrainedModel):
    """What every GPT class shares: how weights start, and what the library may do with them."""

    config: GPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]  # masks, which GPT-2's first files hold
    _can_record_outputs = {"hidden_states": GPTBlock, "attentions": GPTAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            # GPT-2's paper, section 2.3: the layers that end a residual branch start smaller by the root of the number
            # of branches, two a block. The flag sits on the leaf because transformers takes a module without parameters
            # of its own for one already initialised.
            branches = 2 * self.config.n_layer if getattr(module, "ends_residual_branch", False) else 1
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range / math.sqrt(branches))
            init.zeros_(module.bias)

    def _get_name(self):
        # the library looks classes up by this name, to know that a causal model's labels are to be shifted
        return self.config._stock_architectures.get(type(self).__name__, type(self).__name__)


class GPTModel(GPTPreTrainedModel):
    """The decoder without a head: token ids in, hidden states out."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([GPTBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        """Hidden states of the last block, normalised.

        Args:
            input_ids: (batch, length) token ids; or inputs_embeds (batch, length, n_embd), not both.
            past_key_values: a `Cache` of the positions before these; made here when `use_cache` is true.
            attention_mask: (batch, length of cache and input), 1 for tokens to attend to and 0 for padding.
            token_type_ids: (batch, length) ids of tokens whose embedding is added, as in stock GPT-2.
            position_ids: (batch, length), 0 to n_positions - 1. Positions that restart inside a row (and no mask, no
                cache) mark packed documents, which then do not attend to each other.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
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

        hidden_states = inputs_embeds + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        hidden_states = self.drop(hidden_states)
        # computed twice, under gradient checkpointing, the blocks must not write into a cache
        is_recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        cache = None if is_recomputed else past_key_values
        for block in self.h:
            hidden_states = block(hidden_states, cache, mask, use_cache=use_cache, position_ids=position_ids, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class GPTForCausalLM(GPTPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head, its weight shared with the token embedding unless the
    configuration says otherwise. On disk it is a stock GPT2LMHeadModel."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.transformer = GPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        *,
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
            The others as in [`GPTModel`].
        """
        shift_labels, skip_logits = kwargs.pop("shift_labels", None), kwargs.pop("skip_logits", False)
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
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


class GPTForSequenceClassification(GPTPreTrainedModel):
    """The decoder with a classifier of whole rows, by what it knows at the last token. On disk it is a stock
    GPT2ForSequenceClassification."""

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPTModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        **kwargs,
    ):
        """Logits (batch, num_labels), and the loss when labels are given.

        Args:
            labels: as in the stock class: (batch,) class ids; (batch, num_labels) of 0.0 and 1.0; (batch,) numbers.
            The others as in [`GPTModel`]. The last token is the rightmost that is not `config.pad_token_id`.
        Raises:
            ValueError: several rows, and the configuration has no pad_token_id.
        """
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
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
