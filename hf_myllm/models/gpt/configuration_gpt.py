"""Configuration of GPT: that of GPT-2."""

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

from ..stock import StockConfigMixin


@strict
class GPTConfig(StockConfigMixin, GPT2Config):
    """[`GPT2Config`], with the same fields, for the classes of this folder."""

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
