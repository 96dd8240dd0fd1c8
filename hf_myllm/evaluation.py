"""Evaluation: sums over all rows and all processes, divided once."""

import math

import numpy as np
import torch

from .data.objectives import IGNORED
from .data.order import micro_batches


@torch.no_grad()
def evaluate(model, read_batch, rows, batch_size, accelerator, token_bytes=None):
    """The mean loss of some rows, each counted once, whatever the batch size and the number of processes.

    Args:
        read_batch: called with row numbers and a size, gives the model's inputs with that many rows.
        rows: array of row numbers.
        token_bytes: bytes of text per token id, for the loss in bits per byte.
    Returns:
        loss (nats per token), perplexity, tokens, and bits_per_byte (None without token_bytes).
    """
    was_training = model.training
    model.eval()
    loss_sum, tokens, text_bytes = 0.0, 0, 0
    rounds = math.ceil(len(rows) / (batch_size * accelerator.num_processes))
    # every process takes part in every round, with an empty batch where its rows have run out
    for _, share in micro_batches(rows, batch_size, accelerator.process_index, accelerator.num_processes, rounds):
        batch = read_batch(share, batch_size)
        labels = batch["shift_labels"][batch["shift_labels"] != IGNORED]
        outputs = model(
            **{key: value.to(accelerator.device) for key, value in batch.items()}, num_items_in_batch=1, use_cache=False
        )
        loss_sum += outputs.loss.item()
        tokens += labels.numel()
        if token_bytes is not None:
            text_bytes += int(token_bytes[labels.numpy()].sum())
    model.train(was_training)
    if accelerator.num_processes > 1:
        sums = torch.tensor([loss_sum, tokens, text_bytes], dtype=torch.float64, device=accelerator.device)
        loss_sum, tokens, text_bytes = accelerator.reduce(sums).tolist()
    return _figures(loss_sum, int(tokens), text_bytes)


def unigram_level(training, validation, vocab_size, token_bytes=None, limit=20_000_000):
    """The validation loss of a model that knows only how often each token occurs: what any context must beat.

    Frequencies are the training data's, plus one for each id so that none is impossible; of a large corpus, the first
    `limit` tokens are read.
    """
    counts = np.bincount(training.read(0, min(limit, len(training))), minlength=vocab_size) + 1.0
    target = np.asarray(validation.read(0, min(limit, len(validation))))[1:]
    loss_sum = -np.log(counts / counts.sum())[target].sum()
    return _figures(float(loss_sum), len(target), 0 if token_bytes is None else int(token_bytes[target].sum()))


def _figures(loss_sum, tokens, text_bytes):
    loss = loss_sum / max(1, tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "tokens": tokens,
        "bits_per_byte": loss_sum / math.log(2) / text_bytes if text_bytes else None,
    }
