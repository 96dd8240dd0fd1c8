"""Causal language modeling: predict each next token."""

from functools import cached_property

import numpy as np

from ..data.packing import DocumentRows
from ..data.tokenizer import end_of_document
from ..errors import InputError
from .base import IGNORE_INDEX, Task, join_segments, padded_width, restart_positions, to_tensors


class CausalLM(Task):
    """Predict each next token.

    Unless packing is "stream", documents are separated at their marks (end or beginning of text), and position ids
    restart at each mark, from which the models see where a document begins. A mark is the last target of one document
    and the first input of the next: no target is lost, and a text that is generated from nothing starts as in training.
    """

    has_bits_per_byte = True
    logits_share = 1.0

    @cached_property
    def marks(self):
        """The token ids that separate documents; none if documents run into each other."""
        if self.packing == "stream":
            return []
        return sorted({end_of_document(self.tokenizer)[0], self.tokenizer.bos_token_id} - {None})

    def prepare_tokenizer(self, is_trained):
        if self.tokenizer is None and self.packing != "stream":
            raise InputError(
                f"packing {self.packing} needs the token that ends a document: give the --tokenizer of the data"
            )

    def make_rows(self, data, name, stride=None):
        return self.text_rows(data, name, self.max_len, stride, ahead=1, marks=self.marks)

    def batch(self, rows, indices, step=None, size=None):
        """Return input_ids and shift_labels, (rows, max_len), and position_ids if documents are isolated.

        With packing "pad", rows are as long as the longest of the batch, rounded up to a multiple of 8.
        """
        if isinstance(rows, DocumentRows):
            return self._batch_spans(rows, indices, size)
        windows, first = rows.read(indices)
        inputs, labels = windows[:, :-1], windows[:, 1:].copy()
        labels[np.arange(labels.shape[1]) < first[:, None]] = IGNORE_INDEX
        batch = {"input_ids": inputs, "shift_labels": labels}
        if self.marks:
            batch["position_ids"] = restart_positions(np.isin(inputs, self.marks))
        return to_tensors(batch, size)

    def _batch_spans(self, rows, indices, size):
        """See [`batch`]; a row is one or more whole documents."""
        documents = [[self._read_document(rows, *span) for span in rows.read(int(index))] for index in indices]
        width = self.max_len
        if not self.isolates_documents:
            width = padded_width([sum(len(inputs) for inputs, _ in row) for row in documents], self.max_len)
        inputs, segments = join_segments([[inputs for inputs, _ in row] for row in documents], width, self.marks[0])
        labels, _ = join_segments([[labels for _, labels in row] for row in documents], width, IGNORE_INDEX)
        batch = {"input_ids": inputs, "shift_labels": labels}
        if self.isolates_documents:
            batch["position_ids"] = restart_positions(np.diff(segments, prepend=0) != 0)
        return to_tensors(batch, size)

    @staticmethod
    def _read_document(rows, start, stop):
        """Return the inputs and the labels of a document in a row."""
        window = rows.tokens.read(start - 1, stop - start + 1).astype(np.int64)
        labels = window[1:].copy()
        if rows.loss_mask is not None:
            labels[rows.loss_mask.read(start, stop - start) == 0] = IGNORE_INDEX
        return window[:-1], labels

    def targets(self, batch):
        return batch["shift_labels"]

    def count_tokens(self, batch):
        return self.count_targets(batch)["num_items_in_batch"]
