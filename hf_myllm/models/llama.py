"""Llama: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023. The shared decoder as it is."""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin, LlamaConfig

from .decoder import DecoderForCausalLM, DecoderModel, DecoderPreTrainedModel, SequenceClassificationMixin
from .stock import StockConfigMixin


@strict
class MyLlamaConfig(StockConfigMixin, LlamaConfig):
    """[`LlamaConfig`], with the same fields, for the classes of this file."""


class MyLlamaPreTrainedModel(DecoderPreTrainedModel):
    """Base class of the Llama models."""

    config: MyLlamaConfig
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # in the first Llama checkpoints; computed here


class MyLlamaModel(DecoderModel, MyLlamaPreTrainedModel):
    """Llama without a head. On disk it is a stock LlamaModel."""


class MyLlamaForCausalLM(DecoderForCausalLM, MyLlamaPreTrainedModel, GenerationMixin):
    """Llama with a language-modeling head. On disk it is a stock LlamaForCausalLM."""

    body_class = MyLlamaModel


class MyLlamaForSequenceClassification(SequenceClassificationMixin, MyLlamaPreTrainedModel):
    """Llama with a classifier of whole rows. On disk it is a stock LlamaForSequenceClassification."""

    body_class = MyLlamaModel
