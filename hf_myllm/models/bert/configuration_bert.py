"""Configuration of BERT."""

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from ..stock import StockConfigMixin


@strict
class MyBertConfig(StockConfigMixin, BertConfig):
    """[`BertConfig`], with the same fields, for the classes of this folder."""

    def check_architecture(self):
        super().check_architecture()
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("is_decoder and add_cross_attention are for decoders; this family is an encoder")
