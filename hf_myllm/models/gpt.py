"""GPT: GPT-2's architecture, Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

On the same weights it computes what the stock GPT-2 classes compute. Causal training never builds a mask, compiled or
not, so that the fused causal kernel runs.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, GPT2Config
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D  # a linear layer whose weight is (in, out), as in GPT-2 checkpoints

from .decoder import CausalLMMixin, CausalModelMixin, SequenceClassificationMixin
from .stock import Attention, StockConfigMixin, StockPreTrainedModel, eager_attention, project


@strict
class GPTConfig(StockConfigMixin, GPT2Config):
    """[`GPT2Config`], with the same fields, for the classes of this file."""

    _stock_names = {
        "GPTModel": "GPT2Model",
        "GPTForCausalLM": "GPT2LMHeadModel",
        "GPTForSequenceClassification": "GPT2ForSequenceClassification",
    }

    def check_architecture(self):
        super().check_architecture()
        if self.add_cross_attention:
            raise ValueError("add_cross_attention is for encoder-decoder models; this family does not support it")

    def to_dict(self):
        # Converters to GGUF read the key of GPT-2's first configurations.
        return super().to_dict() | {"n_ctx": self.n_positions}


def upcast_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Compute [`eager_attention`]; with `reorder_and_upcast_attn`, scale the keys first and compute scores in fp32."""
    if module.config.reorder_and_upcast_attn:
        query, key, scaling = query.float(), key.float() * scaling, 1.0
    return eager_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)


class GPTAttention(Attention):
    """Causal multi-head self-attention; one matrix product computes query, key and value."""

    eager_kernel = staticmethod(upcast_attention)

    def __init__(self, config: GPTConfig, layer_idx: int):
        head_dim = config.n_embd // config.n_head
        scaling = head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scaling /= layer_idx + 1
        super().__init__(config, head_dim, scaling, config.attn_pdrop, is_causal=True)
        self.layer_idx = layer_idx
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_attn.num_projections = 3  # Muon orthogonalizes each by itself
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.ends_residual_branch = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        parts = project(self.c_attn, hidden_states).chunk(3, dim=-1)
        query, key, value = (self.split_heads(part) for part in parts)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.resid_dropout(self.c_proj(output)), weights


class GPTMLP(nn.Module):
    """Position-wise feed-forward network, of width `n_inner` (default: 4 * n_embd)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Conv1D(width, config.n_embd)
        # "gelu_new" computes the tanh approximation of GELU in eight operations; torch has it as one.
        name = config.activation_function
        self.act = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]
        self.c_proj = Conv1D(config.n_embd, width)
        self.c_proj.ends_residual_branch = True
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states):
        return self.dropout(self.c_proj(self.act(project(self.c_fc, hidden_states))))


class GPTBlock(GradientCheckpointingLayer):
    """Attention and feed-forward network, each with pre-normalization and a residual connection."""

    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPTMLP(config)

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        output, _ = self.attn(
            self.ln_1(hidden_states), past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        hidden_states = hidden_states + output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPTPreTrainedModel(StockPreTrainedModel):
    """Base class of the GPT models."""

    config: GPTConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["GPTBlock"]
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]  # masks, in the first GPT-2 checkpoints
    _can_record_outputs = {"hidden_states": GPTBlock, "attentions": GPTAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            # GPT-2 paper, section 2.3: the last layer of a residual branch is initialized smaller by the square root of
            # the number of branches, two per block. The flag is on the leaf module: transformers considers a module
            # without parameters of its own as initialized.
            branches = 2 * self.config.n_layer if getattr(module, "ends_residual_branch", False) else 1
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range / math.sqrt(branches))
            init.zeros_(module.bias)


class GPTModel(CausalModelMixin, GPTPreTrainedModel):
    """GPT without a head: token ids in, hidden states out. On disk it is a stock GPT2Model."""

    layers = property(lambda self: self.h)  # the names that CausalModelMixin uses
    norm = property(lambda self: self.ln_f)

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([GPTBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def embed_positions(self, hidden_states, position_ids, token_type_ids=None, **kwargs):
        hidden_states = hidden_states + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        return self.drop(hidden_states), kwargs

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
        """See [`CausalModelMixin.forward`]; the arguments are in the order of GPT-2.

        Args:
            token_type_ids: (batch, length) token ids whose embeddings are added.
        """
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            **kwargs,
        )


class GPTForCausalLM(CausalLMMixin, GPTPreTrainedModel, GenerationMixin):
    """GPT with a language-modeling head. On disk it is a stock GPT2LMHeadModel."""

    body_class = GPTModel
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

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
        """See [`CausalLMMixin.forward`]; the arguments are in the order of GPT-2."""
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            token_type_ids=token_type_ids,
            **kwargs,
        )


class GPTForSequenceClassification(SequenceClassificationMixin, GPTPreTrainedModel):
    """GPT with a classifier of whole rows. On disk it is a stock GPT2ForSequenceClassification."""

    body_class = GPTModel

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
        """See [`SequenceClassificationMixin.forward`]; the arguments are in the order of GPT-2."""
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            **kwargs,
        )
