"""What the tasks of encoder-decoders share: special tokens, packed rows of text, the decoder's inputs, samples."""

import numpy as np

from ..data.tokenizer import special_affixes
from ..errors import InputError
from ..generate import encode_source
from .base import IGNORE_INDEX, Task, require_tokens, to_tensors

_SUGGESTION = "another, or {train: unigram, vocab_size: 8192}"


class EncoderDecoder(Task):
    """Base class of the tasks of encoder-decoders."""

    new_tokens = {"eos_token": "</s>", "pad_token": "<pad>"}

    def prepare_tokenizer(self, is_trained):
        require_tokens(self.name, self.tokenizer, self.new_tokens, _SUGGESTION)

    @property
    def num_special_tokens(self):
        return sum(map(len, special_affixes(self.tokenizer)))

    def configure(self, model_config, max_len):
        super().configure(model_config, max_len)
        self.pad, self.decoder_start = self.tokenizer.pad_token_id, model_config.decoder_start_token_id
        if self.decoder_start is None:
            raise InputError(
                "decoder_start_token_id: the model's configuration has none, and its decoder starts from it; give "
                f"--decoder_start_token_id, for example {self.pad}, the padding token"
            )

    def check_prompt(self, text, max_positions):
        encode_source(self.tokenizer, text, max_positions)


class CorruptedText(EncoderDecoder):
    """Base class of the tasks that restore packed rows of text. A subclass sets `text_length` in `configure`."""

    packings = ("stream",)
    has_stride = False

    @property
    def blank(self):
        """The token, as text, that stands for a gap in a source."""
        return self.tokenizer.mask_token

    def configure(self, model_config, max_len):
        super().configure(model_config, max_len)
        self.prefix, self.suffix = special_affixes(self.tokenizer)
        self.text_length = max_len - self.num_special_tokens

    def make_rows(self, data, name, stride=None):
        return self.text_rows(data, name, self.text_length)

    def add_special_tokens(self, rows, fill=None):
        """Return an array (rows, length) between the prefix and the suffix; `fill` replaces their token ids."""
        edges = (self.prefix, self.suffix) if fill is None else ([fill] * len(self.prefix), [fill] * len(self.suffix))
        before, after = (np.tile(np.array(ids, dtype=rows.dtype), (len(rows), 1)) for ids in edges)
        return np.concatenate([before, rows, after], axis=1)

    def make_batch(self, inputs, targets, is_repeated, size):
        """Return the tensors of a batch.

        Args:
            inputs: dict of the encoder's inputs.
            targets: (rows, length) token ids.
            is_repeated: (rows, length) bool, targets that do not count because another row has them.
            size: see [`Task.batch`].
        """
        # from all targets: the decoder reads those that do not count too
        decoder_inputs = np.concatenate([np.full((len(targets), 1), self.decoder_start), targets[:, :-1]], axis=1)
        labels = np.where(is_repeated, IGNORE_INDEX, targets)
        return to_tensors({**inputs, "decoder_input_ids": decoder_inputs, "labels": labels}, size)

    def usage(self, run_dir, prompt=None):
        return super().usage(run_dir, prompt or f"'Once upon a {self.blank}'")

    @property
    def row_tokens(self):
        return self.text_length

    def count_tokens(self, batch):
        return int((batch["labels"] != IGNORE_INDEX).any(dim=1).sum()) * self.text_length
