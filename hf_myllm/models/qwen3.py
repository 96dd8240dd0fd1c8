"""Qwen3: Yang et al., "Qwen3 Technical Report", 2025. The shared decoder with normalized queries and keys."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderModel,
    DecoderPreTrainedModel,
    SequenceClassificationMixin,
)
from .stock import StockConfigMixin


@strict
class MyQwen3Config(StockConfigMixin, Qwen3Config):
    """[`Qwen3Config`], with the same fields, for the classes of this file."""


class MyQwen3Attention(DecoderAttention):
    """Attention that normalizes each head of query and key before the rotation."""

    def __init__(self, config: MyQwen3Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)

    def normalize(self, query, key):
        return self.q_norm(query), self.k_norm(key)


class MyQwen3PreTrainedModel(DecoderPreTrainedModel):
    """Base class of the Qwen3 models."""

    config: MyQwen3Config
    attention_class = MyQwen3Attention


class MyQwen3Model(DecoderModel, MyQwen3PreTrainedModel):
    """Qwen3 without a head. On disk it is a stock Qwen3Model."""


class MyQwen3ForCausalLM(DecoderForCausalLM, MyQwen3PreTrainedModel, GenerationMixin):
    """Qwen3 with a language-modeling head. On disk it is a stock Qwen3ForCausalLM."""

    body_class = MyQwen3Model


class MyQwen3ForSequenceClassification(SequenceClassificationMixin, MyQwen3PreTrainedModel):
    """Qwen3 with a classifier of whole rows. On disk it is a stock Qwen3ForSequenceClassification."""

    body_class = MyQwen3Model
