"""Masked language modeling: predict masked tokens from the text on both sides (Devlin et al. 2019, section 3.1)."""

import numpy as np
import torch

from ..data.packing import DocumentRows
from ..data.sampler import derive_seed, random_uint64
from ..data.tokenizer import continues_word, end_of_document
from ..generate import encode_masked, fill_mask
from .base import (
    IGNORE_INDEX,
    Task,
    join_segments,
    padded_width,
    require_tokens,
    restart_positions,
    show_tokens,
    to_tensors,
)

_LONGEST_WORD = 12  # tokens by which the last whole word of a row may exceed the masked share


class MaskedLM(Task):
    """Predict masked tokens.

    A row is [CLS] text [SEP]. `mlm_probability` is the share of the text's tokens that are chosen (rounded, at least
    one per row); of those, 80% become [MASK], 10% a random token, and 10% stay. Special tokens are never chosen. With
    whole_word_masking, all tokens of a word are chosen or none.
    """

    num_special_tokens = 2
    target_name = "masked tokens"

    @property
    def logits_share(self):
        return self.settings.mlm_probability

    @property
    def never_predicted(self):
        return self.tokenizer.all_special_ids

    def prepare_tokenizer(self, is_trained):
        require_tokens(self.name, self.tokenizer, ("cls_token", "sep_token", "mask_token"))

    def configure(self, model_config, max_len):
        super().configure(model_config, max_len)
        tokenizer, vocab_size = self.tokenizer, model_config.vocab_size
        self.cls, self.sep, self.mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
        self.pad = tokenizer.pad_token_id or 0
        self.ends = [self.sep, end_of_document(tokenizer)[0]]
        self.is_special = np.zeros(vocab_size, dtype=bool)
        self.is_special[[token_id for token_id in tokenizer.all_special_ids if token_id < vocab_size]] = True
        ids = np.array(sorted(set(tokenizer.get_vocab().values())))  # ids without a token are left out
        self.ordinary_ids = ids[~self.is_special[ids]]
        if self.settings.whole_word_masking:
            self.joins, self.joinable = continues_word(tokenizer, vocab_size)

    def make_rows(self, data, name, stride=None):
        marks = () if self.packing == "stream" else sorted({*self.ends, self.cls})
        return self.text_rows(data, name, self.max_len - self.num_special_tokens, stride, marks=marks)

    def batch(self, rows, indices, step=None, size=None):
        """Return input_ids (rows, max_len), masked_positions and labels (rows, slots).

        Each row has the same number of slots; a slot that a row does not need has the label IGNORE_INDEX. If documents
        are isolated there are also document_ids and position_ids; with packing "pad", attention_mask.
        """
        if isinstance(rows, DocumentRows):
            return self._batch_spans(rows, indices, step, size)
        windows, first = rows.read(indices)
        edges = np.full((len(windows), 1), self.cls), np.full((len(windows), 1), self.sep)
        ids = np.concatenate([edges[0], windows, edges[1]], axis=1)
        may_mask = ~self.is_special[ids] & (np.arange(ids.shape[1]) > first[:, None])
        batch = self.mask_tokens(ids, may_mask, indices, step)
        if self.isolates_documents:
            starts = ids == self.cls
            starts[:, 1:] |= np.isin(ids[:, :-1], self.ends)  # documents without a [CLS] between them
            batch |= {"document_ids": np.cumsum(starts, axis=1), "position_ids": restart_positions(starts)}
        return to_tensors(batch, size)

    def _batch_spans(self, rows, indices, step, size):
        """See [`batch`]; a row is one or more whole documents."""
        texts = [[self._read_document(rows, *span) for span in rows.read(int(index))] for index in indices]
        width = self.max_len
        if not self.isolates_documents:
            width = padded_width([sum(map(len, row)) for row in texts], self.max_len)
        ids, documents = join_segments(texts, width, self.pad)
        batch = self.mask_tokens(ids, ~self.is_special[ids] & (documents > 0), indices, step)
        if self.isolates_documents:  # the padding is a document of its own, with id 0
            batch |= {"document_ids": documents, "position_ids": restart_positions(np.diff(documents, prepend=0) != 0)}
        else:
            batch["attention_mask"] = documents > 0
        return to_tensors(batch, size)

    def _read_document(self, rows, start, stop):
        return np.concatenate([[self.cls], rows.tokens.read(start, stop - start), [self.sep]])

    def mask_tokens(self, ids, may_mask, indices, step):
        """Choose among the positions that may be masked and mask them.

        Args:
            ids: (rows, length) token ids.
            may_mask: (rows, length) bool.
            indices: (rows,) the rows' indices, from which the random draw follows.
        Returns:
            dict of input_ids (rows, length), masked_positions and labels (rows, slots).
        """
        num_rows, length = ids.shape
        share, whole_words = self.settings.mlm_probability, self.settings.whole_word_masking
        seeds = [derive_seed(self.seed, "mask", step, int(index)) for index in indices]
        draws = random_uint64(seeds, 3 * length).reshape(num_rows, 3, length)
        wanted = np.rint(may_mask.sum(axis=1) * share).astype(np.int64)
        wanted = np.maximum(wanted, may_mask.any(axis=1))
        slots = max(1, round(length * share)) + (_LONGEST_WORD if whole_words else 0)
        if whole_words:
            positions, used = self._choose_words(ids, may_mask, draws[:, 0], wanted, slots)
        else:
            # in random order, positions that may not be masked last
            order = np.argsort(np.where(may_mask, draws[:, 0] >> np.uint64(1), np.uint64(1 << 63)), axis=1)
            positions, used = order[:, :slots], np.arange(slots) < wanted[:, None]
        positions = np.where(used, positions, 0)
        chosen = np.take_along_axis(ids, positions, axis=1)
        dice = np.take_along_axis(draws[:, 1], positions, axis=1) % np.uint64(10)
        random_choice = np.take_along_axis(draws[:, 2], positions, axis=1) % np.uint64(len(self.ordinary_ids))
        replaced = np.where(dice < 8, self.mask, np.where(dice == 8, self.ordinary_ids[random_choice], chosen))
        inputs = ids.copy()
        row = np.broadcast_to(np.arange(num_rows)[:, None], used.shape)[used]
        inputs[row, positions[used]] = replaced[used]
        return {
            "input_ids": inputs,
            "masked_positions": positions,
            "labels": np.where(used, chosen, IGNORE_INDEX),
        }

    def _choose_words(self, ids, may_mask, draws, wanted, slots):
        """Choose whole words in random order; return positions (rows, slots) and which of the slots are used."""
        positions, used = np.zeros((len(ids), slots), dtype=np.int64), np.zeros((len(ids), slots), dtype=bool)
        starts = may_mask.copy()  # a word starts at each token that does not join the one before it
        starts[:, 1:] &= ~(self.joins[ids[:, 1:]] & self.joinable[ids[:, :-1]] & may_mask[:, 1:] & may_mask[:, :-1])
        for row in range(len(ids)):
            candidates = np.flatnonzero(may_mask[row])
            words = np.split(candidates, np.flatnonzero(starts[row, candidates])[1:]) if len(candidates) else []
            count = 0
            for index in np.argsort(draws[row, : len(words)]):
                word = words[index]
                # A word that exceeds the share is taken with the probability that keeps the share on average. If it
                # were always skipped, long words would hardly ever be chosen.
                excess = count + len(word) - wanted[row]
                if excess <= 0 or (draws[row, -1] % len(word) >= excess and count + len(word) <= slots):
                    positions[row, count : count + len(word)] = word
                    count += len(word)
                if excess >= 0:
                    break
            used[row, :count] = True
        return positions, used

    def describe_target(self, batch, index):
        ids, labels = batch["input_ids"][index], batch["labels"][index]
        used = labels != IGNORE_INDEX
        targets = torch.full_like(ids, IGNORE_INDEX)
        targets[batch["masked_positions"][index][used]] = labels[used]
        return show_tokens(self.tokenizer, targets)

    def check_prompt(self, text, max_positions):
        encode_masked(self.tokenizer, text, max_positions)

    def sample(self, model, text, **sampling):
        """Return `text` and the likeliest tokens at each of its mask tokens."""
        return fill_mask(model, self.tokenizer, text)

    def usage(self, run_dir, prompt=None):
        prompt = prompt or f"'Once upon a {self.tokenizer.mask_token}'"
        return "fill in", f"hf-myllm generate {run_dir} --prompt {prompt}"
