"""Evaluation: sums over all rows and all processes, divided once."""

import math
from pathlib import Path

import evaluate as evaluate_library
import numpy as np
import torch
from accelerate.utils import gather_object

from .data.objectives import IGNORED, counts, targets
from .data.order import micro_batches


@torch.no_grad()
def evaluate(model, objective, read_batch, rows, batch_size, accelerator, token_bytes=None, must_stop=lambda: False):
    """The mean loss of some rows, each counted once, whatever the batch size and the number of processes.

    Args:
        objective: what is learned; see data/objectives.
        read_batch: called with row numbers and a size, gives the model's inputs with that many rows.
        rows: array of row numbers.
        token_bytes: bytes of text per token id, for the loss in bits per byte.
        must_stop: asked before each batch, by all processes together; True ends the evaluation.
    Returns:
        None when it was ended; else loss (nats per target), perplexity, tokens (the targets), and bits_per_byte (None
        without token_bytes). Where rows are pairs of sentences, the loss is the sum of both tasks', and there are
        nsp_loss (nats per pair) and nsp_accuracy besides; the perplexity is that of the masked tokens. Where texts are
        judged, there are `metrics` (see [`judge`]).
    """
    was_training = model.training
    model.eval()
    loss_sum, tokens, text_bytes, pairs, pair_loss, right, said = 0.0, 0, 0, 0, 0.0, 0, []
    rounds = math.ceil(len(rows) / (batch_size * accelerator.num_processes))
    # every process takes part in every round, with an empty batch where its rows have run out
    for _, share in micro_batches(rows, batch_size, accelerator.process_index, accelerator.num_processes, rounds):
        if must_stop():
            model.train(was_training)
            return None
        batch = read_batch(share, batch_size)
        inputs = {key: value.to(accelerator.device) for key, value in batch.items()}
        found = counts(batch)
        outputs = objective.forward(model, inputs, dict.fromkeys(found, 1))  # divided by 1: sums
        loss_sum += outputs.loss.item()
        tokens += found["num_items_in_batch"]
        if "next_sentence_label" in batch:
            label, scores = inputs["next_sentence_label"], outputs.seq_relationship_logits.float()
            pair_loss += torch.nn.functional.cross_entropy(scores, label, reduction="sum").item()
            right += int((scores.argmax(-1) == label).sum())
            pairs += found["num_pairs_in_batch"]
        if hasattr(objective, "predictions"):
            said.append(objective.predictions(outputs, batch))
        if token_bytes is not None:
            labels = targets(batch)[targets(batch) != IGNORED]
            text_bytes += int(token_bytes[labels.numpy()].sum())
    model.train(was_training)
    if accelerator.num_processes > 1:
        sums = [loss_sum, tokens, text_bytes, pairs, pair_loss, right]
        sums = accelerator.reduce(torch.tensor(sums, dtype=torch.float64, device=accelerator.device))
        loss_sum, tokens, text_bytes, pairs, pair_loss, right = sums.tolist()
    figures = _figures(loss_sum - pair_loss, int(tokens), text_bytes)
    if pairs:
        figures |= {"nsp_loss": pair_loss / pairs, "nsp_accuracy": right / pairs}
        figures["loss"] += figures["nsp_loss"]
    if said:
        if accelerator.num_processes > 1:  # each row once, whoever had it
            said = gather_object(said)
        predictions, labels = (np.concatenate(part) for part in zip(*said, strict=True))
        figures["metrics"] = judge(objective.labels.kind, predictions, labels)
    return figures


def judge(kind, predictions, labels):
    """What is usual for a task, by the library `evaluate` and a metric of ours, which needs no Hub.

    Args:
        kind: see [`tasks.Labels`].
        predictions, labels: arrays of the same shape.
    Returns:
        name -> value: accuracy, f1 (of class 1, where there are two), f1_macro, f1_micro and matthews; of several
        classes at once accuracy (all of a row right), f1_macro and f1_micro; of numbers mse, pearson and spearman.
    """
    metric = evaluate_library.load(str(Path(__file__).parent / "metrics" / "classification.py"), kind)
    return metric.compute(predictions=predictions.tolist(), references=labels.tolist())


def unigram_level(training, validation, vocab_size, token_bytes=None, never=(), limit=20_000_000):
    """The validation loss of a model that knows only how often each token occurs: what any context must beat.

    Frequencies are the training data's, plus one for each id so that none is impossible; of a large corpus, the first
    `limit` tokens are read.

    Args:
        never: ids that are nobody's target, as the special tokens of masked-LM tasks.
    """
    frequencies = np.bincount(training.read(0, min(limit, len(training))), minlength=vocab_size) + 1.0
    target = np.asarray(validation.read(0, min(limit, len(validation))))[1:]
    if len(never):
        frequencies[never], target = 0.0, target[~np.isin(target, never)]
    loss_sum = -np.log(frequencies[target] / frequencies.sum()).sum()
    return _figures(float(loss_sum), len(target), 0 if token_bytes is None else int(token_bytes[target].sum()))


def _figures(loss_sum, tokens, text_bytes):
    loss = loss_sum / max(1, tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "tokens": tokens,
        "bits_per_byte": loss_sum / math.log(2) / text_bytes if text_bytes else None,
    }
