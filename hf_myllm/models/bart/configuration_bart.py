"""Configuration of BART."""

from huggingface_hub.dataclasses import strict
from transformers import BartConfig

from ..stock import StockConfigMixin


@strict
class MyBartConfig(StockConfigMixin, BartConfig):
    """[`BartConfig`], with the same fields, for the classes of this folder."""

    def check_architecture(self):
        super().check_architecture()
        if self.d_model % self.decoder_attention_heads:
            raise ValueError(f"decoder_attention_heads ({self.decoder_attention_heads}) must divide d_model")
        if not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is false; BART shares one embedding, leave it out")
        if self.encoder_layerdrop or self.decoder_layerdrop:
            raise ValueError("encoder_layerdrop and decoder_layerdrop are not supported; set them to 0")
        if self.is_decoder or not self.is_encoder_decoder:
            raise ValueError("is_decoder and is_encoder_decoder must keep their defaults; this is an encoder-decoder")
