"""Configuration of Llama."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from ..stock import StockConfigMixin


@strict
class MyLlamaConfig(StockConfigMixin, LlamaConfig):
    """[`LlamaConfig`], with the same fields, for the classes of this folder."""
