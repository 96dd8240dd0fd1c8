"""Rows into inputs and labels."""

import numpy as np
import torch

IGNORED = -100  # what torch's cross-entropy, and with it transformers, leaves out of the loss


def causal(windows, first, size=None):
    """Predict each next token.

    Args:
        windows, first: as [`Rows.read`] returns them.
        size: add empty rows, which no loss counts, up to this many: all micro-batches then have one shape.
    Returns:
        input_ids and shift_labels, (rows, max_len) int64 tensors.
    """
    inputs, labels = windows[:, :-1], windows[:, 1:].copy()
    labels[np.arange(labels.shape[1]) < first[:, None]] = IGNORED
    if size is not None and size > len(inputs):
        missing = ((0, size - len(inputs)), (0, 0))
        inputs, labels = np.pad(inputs, missing), np.pad(labels, missing, constant_values=IGNORED)
    return {
        "input_ids": torch.from_numpy(np.ascontiguousarray(inputs)),
        "shift_labels": torch.from_numpy(labels),
    }
