"""Masked language modeling with next-sentence prediction on pairs of sentences (Devlin et al. 2019, section 3.1)."""

import math

import numpy as np

from ..data.packing import SentencePassages
from ..data.sampler import derive_seed, random_uint64
from ..data.tokenizer import ends_sentence
from ..errors import InputError
from .base import IGNORE_INDEX, cross_entropy, join_segments, to_tensors
from .masked_lm import MaskedLM


class SentencePairs(MaskedLM):
    """Predict masked tokens, and whether the second of two sentences follows the first.

    A row is [CLS] A [SEP] B [SEP], padded. A passage of one document is cut between two sentences, at random. A is the
    text before the cut, at most half a row. B is, half of the time, the text after the cut; the other half of the time,
    the text after such a cut in a passage of another document. Both candidates for B are drawn each time and cut to the
    shorter length, so that neither the length of B nor its end tells where it comes from. As in the paper, a "sentence"
    is any span of text; a passage without the end of a sentence is cut anywhere.
    """

    packings = ("stream",)
    num_special_tokens = 3
    min_text_tokens = 2
    pads_rows = True
    chance_loss = math.log(2)

    def configure(self, model_config, max_len):
        if model_config.type_vocab_size < 2:
            raise InputError(
                f"type_vocab_size is {model_config.type_vocab_size}, and task {self.name} tells two sentences apart by "
                "it: give 2"
            )
        super().configure(model_config, max_len)
        self.ends_sentence = ends_sentence(self.tokenizer, model_config.vocab_size)

    def make_rows(self, data, name, stride=None):
        return SentencePassages(data, (self.cls, self.sep), self.max_len - self.num_special_tokens, name)

    def batch(self, rows, indices, step=None, size=None):
        """Return input_ids, token_type_ids and attention_mask (rows, max_len), masked_positions and labels as in
        [`MaskedLM`], and next_sentence_label (rows,): 0 where B follows A."""
        pairs = [self.draw_pair(rows, int(index), step) for index in indices]
        texts = [[np.concatenate([[self.cls], a, [self.sep]]), np.concatenate([b, [self.sep]])] for a, b, _ in pairs]
        ids, segments = join_segments(texts, self.max_len, self.pad)
        batch = self.mask_tokens(ids, ~self.is_special[ids] & (segments > 0), indices, step)
        next_sentence = np.array([not is_next for *_, is_next in pairs], dtype=np.int64)
        batch |= {"token_type_ids": segments == 2, "attention_mask": segments > 0, "next_sentence_label": next_sentence}
        return to_tensors(batch, size)

    def draw_pair(self, passages, index, step):
        """Return two spans of tokens, and whether the second follows the first in the text."""
        draws = random_uint64([derive_seed(self.seed, "pair", step, index)], 4)[0].tolist()
        half = passages.length // 2
        before, after = self._cut(passages.read(index), draws[0])
        document = passages.document_of(index)
        first, stop = int(passages.first[document]), int(passages.first[document + 1])
        other = draws[2] % (len(passages) - (stop - first))  # a passage of another document
        start, rest = self._cut(passages.read(other + (stop - first if other >= first else 0)), draws[3])
        rest = rest if len(rest) else start  # a passage of a single token
        is_next = draws[1] % 2 == 0 and len(after) > 0
        length = min(half, len(after) or half, len(rest))
        return before[-half:], (after if is_next else rest)[:length], is_next

    def _cut(self, ids, draw):
        """Cut a passage in two after a token that ends a sentence and is not followed by another such token."""
        ends = self.ends_sentence[ids]
        cuts = np.flatnonzero(ends[:-1] & ~ends[1:]) + 1
        cut = cuts[draw % len(cuts)] if len(cuts) else 1 + draw % max(1, len(ids) - 1)
        return ids[:cut], ids[cut:]

    def count_targets(self, batch):
        pairs = int((batch["next_sentence_label"] != IGNORE_INDEX).sum())
        return super().count_targets(batch) | {"num_pairs_in_batch": pairs}

    def batch_sums(self, inputs, outputs):
        labels, logits = inputs["next_sentence_label"], outputs.seq_relationship_logits.float()
        return {
            "pair_loss": cross_entropy(logits, labels).item(),
            "correct_pairs": int((logits.argmax(-1) == labels).sum()),
            "pairs": int((labels != IGNORE_INDEX).sum()),
        }

    def loss_metrics(self, sums):
        """Return the metrics of the masked tokens, nsp_loss (nats per pair) and nsp_accuracy; loss is the total."""
        metrics = super().loss_metrics(sums | {"loss": sums["loss"] - sums["pair_loss"]})
        nsp_loss = sums["pair_loss"] / max(1, sums["pairs"])
        metrics |= {"nsp_loss": nsp_loss, "nsp_accuracy": sums["correct_pairs"] / max(1, sums["pairs"])}
        return metrics | {"loss": metrics["loss"] + nsp_loss}

    def describe_metrics(self, metrics):
        if "nsp_loss" not in metrics:  # of the unigram model
            return super().describe_metrics(metrics)
        masked, nsp_loss = metrics["loss"] - metrics["nsp_loss"], metrics["nsp_loss"]
        return f"masked tokens {masked:.4f}, next sentence {nsp_loss:.4f}, {metrics['nsp_accuracy']:.1%} right"

    def describe_target(self, batch, index):
        is_next = batch["next_sentence_label"][index] == 0
        return f"{super().describe_target(batch, index)} the second {'follows' if is_next else 'is from elsewhere'}"
