"""Denoising: restore text from which spans are missing and whose sentences are in random order (Lewis et al. 2020,
section 2.2)."""

import math
from functools import cache

import numpy as np

from ..data.sampler import derive_seed, random_uint64
from ..data.tokenizer import ends_sentence
from .base import join_segments
from .encoder_decoder import CorruptedText


class Denoising(CorruptedText):
    """Restore a row of text.

    The encoder reads the sentences of each document in random order, with one mask token in place of each of some
    spans. `mlm_probability` is the share of the tokens that the spans hold; their lengths have a Poisson distribution
    with the mean `mean_span_length`. A span of length 0 inserts a mask token. The targets are the original row, so its
    bits per byte are those of text whose corrupted form is known.
    """

    new_tokens = CorruptedText.new_tokens | {"mask_token": "<mask>"}
    has_bits_per_byte = True
    logits_share = 1.0

    def configure(self, model_config, max_len):
        super().configure(model_config, max_len)
        self.mask, self.eos = self.tokenizer.mask_token_id, self.tokenizer.eos_token_id
        self.ends_sentence = ends_sentence(self.tokenizer, model_config.vocab_size)

    def batch(self, rows, indices, step=None, size=None):
        """Return input_ids and attention_mask, decoder_input_ids and labels, all (rows, max_len)."""
        text, first = rows.read(indices)
        seeds = [derive_seed(self.seed, "noise", step, int(index)) for index in indices]
        draws = random_uint64(seeds, 3 * self.text_length).reshape(len(seeds), 3, self.text_length)
        share, mean, texts = self.settings.mlm_probability, self.settings.mean_span_length, []
        for ids, (order, lengths, places) in zip(text, draws, strict=True):
            ids = permute_sentences(ids, self.ends_sentence[ids], ids == self.eos, order)
            texts.append([[*self.prefix, *infill(ids, self.mask, share, mean, lengths, places), *self.suffix]])
        inputs, mask = join_segments(texts, self.max_len, self.pad)
        targets = self.add_special_tokens(text)
        is_repeated = self.add_special_tokens(np.arange(self.text_length) < first[:, None], 0)
        return self.make_batch({"input_ids": inputs, "attention_mask": mask}, targets, is_repeated, size)


def permute_sentences(ids, is_end, is_mark, draws):
    """Return the tokens of a text with the sentences of each document in random order.

    Args:
        ids: (tokens,) token ids.
        is_end: (tokens,) bool, tokens that end a sentence; a sentence includes all that follow each other.
        is_mark: (tokens,) bool, tokens between documents, which stay where they are.
        draws: (tokens,) random numbers.
    """
    document = 2 * np.cumsum(is_mark) - is_mark  # a mark is a document of its own
    starts = np.diff(document, prepend=-1) != 0
    starts[1:] |= is_end[:-1] & ~is_end[1:]
    sentence = np.cumsum(starts) - 1
    return ids[np.lexsort((sentence, draws[sentence], document))]


def infill(ids, mask, share, mean_length, length_draws, place_draws):
    """Return the tokens of a text with a mask token in place of each of some spans.

    The spans hold the rounded share of the tokens, at least one. They are drawn until they do; the last one is cut.

    Args:
        ids: (tokens,) token ids.
        mask: id of the mask token.
        share: share of the tokens that the spans hold.
        mean_length: mean of the Poisson distribution of their lengths.
        length_draws, place_draws: (tokens,) random 64-bit integers.
    Returns:
        at most as many tokens as `ids`.
    """
    masked = min(len(ids), max(1, round(share * len(ids))))
    lengths = np.searchsorted(poisson_table(mean_length), length_draws[:masked] / 2.0**64, side="right")
    total = np.cumsum(lengths)
    lengths = lengths[: np.searchsorted(total, masked) + 1]  # no more spans than tokens, also if most have length 0
    lengths[-1] += masked - lengths.sum()
    # each order of the masks among the remaining tokens is equally likely
    places = np.argsort(place_draws[: len(ids) - masked + len(lengths)])[: len(lengths)]
    used = np.ones(len(ids) - masked + len(lengths), dtype=np.int64)  # tokens of the text in each place
    used[places] = lengths
    is_mask = np.zeros(len(used), dtype=bool)
    is_mask[places] = True
    first = np.minimum(np.cumsum(used) - used, len(ids) - 1)
    return np.where(is_mask, mask, ids[first])


@cache
def poisson_table(mean):
    """Return the cumulative Poisson distribution, until rounding hides what is left."""
    chances = [math.exp(-mean)]
    while len(chances) <= mean or chances[-1] > 1e-20:
        chances.append(chances[-1] * mean / len(chances))
    return np.cumsum(chances)
