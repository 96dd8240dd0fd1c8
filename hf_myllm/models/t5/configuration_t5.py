"""Configuration of T5."""

from huggingface_hub.dataclasses import strict
from transformers import T5Config
from transformers.activations import ACT2FN

from ..stock import StockConfigMixin


@strict
class MyT5Config(StockConfigMixin, T5Config):
    """[`T5Config`], with the same fields, for the classes of this folder.

    T5 1.1 is `feed_forward_proj="gated-gelu"` and `tie_word_embeddings=False`: a head of its own, without the scaling
    of its input. The stock class reads this setting in a file, but then calls each model tied.
    """

    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = None  # default: pad_token_id

    def __post_init__(self, **kwargs):
        is_tied = self.tie_word_embeddings
        super().__post_init__(tie_word_embeddings=is_tied, **kwargs)  # sets scale_decoder_outputs
        self.tie_word_embeddings = is_tied
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id

    def get_text_config(self, decoder=None, encoder=None):
        config = super().get_text_config(decoder, encoder)
        if decoder and not encoder:  # a copy, which generation makes a cache for
            config.num_layers = config.num_decoder_layers
        return config

    def check_architecture(self):
        super().check_architecture()
        gate, _, activation = self.feed_forward_proj.rpartition("-")
        if gate not in ("", "gated") or activation not in ACT2FN:
            raise ValueError(f"feed_forward_proj '{self.feed_forward_proj}' is unknown; give relu or gated-gelu")
        exact = self.relative_attention_num_buckets // 4  # the decoder has twice as many
        if exact < 1 or self.relative_attention_max_distance <= 2 * exact:
            raise ValueError(
                "relative_attention_num_buckets must be at least 4, and below twice relative_attention_max_distance"
            )
        if self.is_decoder or not self.is_encoder_decoder:
            raise ValueError("is_decoder and is_encoder_decoder must keep their defaults; this is an encoder-decoder")
