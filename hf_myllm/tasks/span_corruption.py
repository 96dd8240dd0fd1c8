"""Span corruption: predict the spans of text that sentinels stand for (Raffel et al. 2020, section 3.3)."""

from itertools import count

import numpy as np

from ..data.sampler import derive_seed, random_uint64
from ..errors import InputError
from ..models.auto import num_positions
from .encoder_decoder import CorruptedText

NUM_SENTINELS = 100  # of T5, and of a tokenizer that is trained for this task


class SpanCorruption(CorruptedText):
    """Predict the corrupted spans of a row.

    `mlm_probability` is the share of the tokens that are corrupted, in spans of `mean_span_length` tokens on average.
    The encoder reads the text with a sentinel in place of each span, and the end token: exactly max_len tokens, which
    decides how much text a row has. The targets are each sentinel with its span, and the end token. Text and spans
    alternate, so a row starts with text and ends with a span; all ways to divide them are equally likely.
    """

    new_tokens = CorruptedText.new_tokens | {
        # descending ids, as in T5's tokenizer
        "extra_special_tokens": [f"<extra_id_{index}>" for index in reversed(range(NUM_SENTINELS))]
    }
    min_text_tokens = 2
    target_name = "targets"

    def prepare_tokenizer(self, is_trained):
        super().prepare_tokenizer(is_trained)
        vocab = self.tokenizer.get_vocab()
        forms = ("<extra_id_{}>", "▁<extra_id_{}>")  # the second is mT5's
        form = next((form for form in forms if form.format(0) in vocab), None)
        if form is None:
            raise InputError(
                f"task {self.name} needs a tokenizer with sentinels, <extra_id_0> and so on, which "
                f"{self.tokenizer.name_or_path or 'this one'} does not have: give T5's, or "
                "{train: unigram, vocab_size: 8192}"
            )
        names = (form.format(index) for index in count())
        self.sentinels = []
        while (token_id := vocab.get(next(names))) is not None:
            self.sentinels.append(token_id)
        self.sentinels = np.array(self.sentinels)

    def configure(self, model_config, max_len):
        super().configure(model_config, max_len)
        share, mean = self.settings.mlm_probability, self.settings.mean_span_length
        self.text_length = text_length(max_len - self.num_special_tokens, share, mean)
        self.num_noise, self.num_spans = noise_counts(self.text_length, share, mean)
        self.num_targets = self.num_noise + self.num_spans + 1
        if self.num_spans > len(self.sentinels):
            raise InputError(
                f"max_len {max_len}: a row has {self.num_spans} spans, and the tokenizer has {len(self.sentinels)} "
                "sentinels; lower max_len, or raise mean_span_length"
            )
        positions = num_positions(model_config)
        if positions and self.num_targets > positions:
            raise InputError(
                f"mlm_probability {share}: a row has {self.num_targets} targets, and the model has {positions} "
                "positions; lower it, or max_len"
            )
        self.logits_share = self.num_targets / max_len
        self.text_share = self.num_noise / self.num_targets

    @property
    def blank(self):
        return self.tokenizer.convert_ids_to_tokens(int(self.sentinels[0]))

    def check_prompt(self, text, max_positions):
        super().check_prompt(text, max_positions)
        if self.blank not in text:
            example = f"'a {self.blank} house'"
            raise InputError(
                f"start_context: the model fills in sentinels; put {self.blank} in the text, as in {example}"
            )

    def batch(self, rows, indices, step=None, size=None):
        """Return input_ids (rows, max_len), decoder_input_ids and labels (rows, targets)."""
        text, first = rows.read(indices)
        is_noise = self.draw_noise(indices, step)
        before = np.concatenate([np.ones((len(text), 1), dtype=bool), is_noise[:, :-1]], axis=1)
        starts_span, starts_text = is_noise & ~before, ~is_noise & before
        inputs = self.add_special_tokens(self._with_sentinels(text, starts_span, ~is_noise))
        # a span's sentinel replaces the text before the span
        targets = self._with_sentinels(text, starts_text, is_noise)
        targets = np.concatenate([targets, np.full((len(text), 1), self.tokenizer.eos_token_id)], axis=1)
        is_repeated = np.arange(self.text_length) < first[:, None]
        is_repeated = is_repeated[starts_text | is_noise].reshape(len(text), -1)
        is_repeated = np.pad(is_repeated, ((0, 0), (0, 1)))
        return self.make_batch({"input_ids": inputs}, targets, is_repeated, size)

    def _with_sentinels(self, text, starts, is_kept):
        """Return the tokens of `text` that are kept, with the sentinels 0, 1, 2 ... in place of those at `starts`."""
        sentinels = self.sentinels[np.maximum(np.cumsum(starts, axis=1) - 1, 0)]
        return np.where(starts, sentinels, text)[starts | is_kept].reshape(len(text), -1)

    def draw_noise(self, indices, step):
        """Return which tokens of some rows are corrupted: (rows, text_length) bool."""
        seeds = [derive_seed(self.seed, "spans", step, int(index)) for index in indices]
        num_text = self.text_length - self.num_noise
        draws = random_uint64(seeds, self.text_length)
        lengths = np.empty((len(seeds), 2 * self.num_spans), dtype=np.int64)  # text, span, text, span, ...
        lengths[:, 0::2] = divide(num_text, self.num_spans, draws[:, :num_text])
        lengths[:, 1::2] = divide(self.num_noise, self.num_spans, draws[:, num_text:])
        is_noise = np.arange(2 * self.num_spans) % 2 == 1
        return np.array([np.repeat(is_noise, row) for row in lengths]).reshape(len(seeds), self.text_length)


def divide(total, parts, draws):
    """Divide `total` items into `parts` of at least one item, all ways equally likely.

    Args:
        draws: (rows, total) random numbers.
    Returns:
        (rows, parts) lengths.
    """
    cuts = np.sort(np.argsort(draws[:, : total - 1], axis=1)[:, : parts - 1] + 1, axis=1)
    return np.diff(np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, total))), axis=1)


def noise_counts(length, share, mean_span_length):
    """Return how many tokens of a text are corrupted, and in how many spans."""
    num_noise = min(max(1, round(length * share)), length - 1)
    return num_noise, min(max(1, round(num_noise / mean_span_length)), num_noise, length - num_noise)


def text_length(num_inputs, share, mean_span_length):
    """Return the length of the longest text of which no more than `num_inputs` tokens and sentinels remain."""
    for length in count(3):
        num_noise, num_spans = noise_counts(length, share, mean_span_length)
        if length - num_noise + num_spans > num_inputs:
            return length - 1
