"""Causal language modeling: predict each next token."""

from functools import cached_property

import numpy as np

from ..data.packing import DocumentRows, StridedRows, pack_documents
from ..data.streaming import StreamedRows, Streams
from ..data.tokenizer import end_of_document
from ..errors import InputError
from .base import IGNORE_INDEX, Task, padded_width, require_marks, restart_positions, to_tensors


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
        if isinstance(data, Streams):
            return StreamedRows(data, self.max_len, name)
        if self.marks:
            require_marks(data, self.marks, name)
        if not self.pads_rows:
            return StridedRows(data, self.max_len, stride or self.max_len, name)
        return pack_documents(data, name, self.marks, self.max_len, 0, self.packing == "best_fit", ahead=1)

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
        row_spans = [rows.read(int(index)) for index in indices]
        width = self.max_len
        if not self.isolates_documents:
            width = padded_width([sum(stop - start for start, stop in spans) for spans in row_spans], self.max_len)
        inputs, labels = np.full((len(row_spans), width), self.marks[0]), np.full((len(row_spans), width), IGNORE_INDEX)
        starts = np.zeros(inputs.shape, dtype=bool)
        for row, spans in enumerate(row_spans):
            begin = 0
            for start, stop in spans:
                window = rows.tokens.read(start - 1, stop - start + 1)
                end = begin + stop - start
                inputs[row, begin:end], labels[row, begin:end] = window[:-1], window[1:]
                if rows.loss_mask is not None:
                    labels[row, begin:end][rows.loss_mask.read(start, stop - start) == 0] = IGNORE_INDEX
                starts[row, begin] = True
                begin = end
            starts[row, begin : begin + 1] = True  # the padding belongs to no document
        batch = {"input_ids": inputs, "shift_labels": labels}
        if self.isolates_documents:
            batch["position_ids"] = restart_positions(starts)
        return to_tensors(batch, size)

    def targets(self, batch):
        return batch["shift_labels"]

    def count_tokens(self, batch):
        return self.count_targets(batch)["num_items_in_batch"]
