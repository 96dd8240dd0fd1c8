"""Configuration of Qwen3."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from ..stock import StockConfigMixin


@strict
class MyQwen3Config(StockConfigMixin, Qwen3Config):
    """[`Qwen3Config`], with the same fields, for the classes of this folder."""
