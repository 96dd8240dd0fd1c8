"""Evaluation: sums over all rows and all processes, divided once."""

import math
import warnings
from pathlib import Path

import evaluate as evaluate_library
import numpy as np
import torch
from accelerate.utils import gather_object

from .data.sampler import micro_batches
from .distributed import to_device
from .errors import InputError, first_line
from .tasks.objectives import IGNORED, counts, targets

METRICS = Path(__file__).parent / "metrics"


@torch.no_grad()
def evaluate(
    model,
    objective,
    data,
    rows,
    batch_size,
    accelerator,
    token_bytes=None,
    must_stop=lambda: False,
    is_judged=True,
    metrics=(),
):
    """The mean loss of some rows, each counted once, whatever the batch size and the number of processes.

    Args:
        objective: what is learned; see data/objectives.
        data: the rows, as the objective takes them.
        rows: array of row numbers.
        token_bytes: bytes of text per token id, for the loss in bits per byte.
        must_stop: asked before each batch, by all processes together; True ends the evaluation.
        is_judged: whether labelled rows are judged by the task's metrics too.
        metrics: names of more, see [`judge`].
    Returns:
        None when it was ended; else loss (nats per target), perplexity, tokens (the targets), and bits_per_byte (None
        without token_bytes). Where rows are pairs of sentences, the loss is the sum of both tasks', and there are
        nsp_loss (nats per pair) and nsp_accuracy besides; the perplexity is that of the masked tokens. Where rows
        are judged, there are `metrics` (see [`judge`]) in place of the perplexity.
    Raises:
        InputError: see [`judge`].
    """
    was_training = model.training
    model.eval()
    losses, tokens, text_bytes, pairs, pair_loss, right, said = [], 0, 0, 0, 0.0, 0, []
    rounds = math.ceil(len(rows) / (batch_size * accelerator.num_processes))
    # every process takes part in every round, with an empty batch where its rows have run out
    for _, share in micro_batches(rows, batch_size, accelerator.process_index, accelerator.num_processes, rounds):
        if must_stop():
            model.train(was_training)
            return None
        batch = objective.batch(data, share, size=batch_size)
        inputs = {key: to_device(value, accelerator.device) for key, value in batch.items()}
        found = counts(batch)
        outputs = objective.forward(model, inputs, dict.fromkeys(found, 1))  # divided by 1: sums
        losses.append(outputs.loss.clone())  # which a CUDA graph may write again
        tokens += found["num_items_in_batch"]
        if "next_sentence_label" in batch:
            label, scores = inputs["next_sentence_label"], outputs.seq_relationship_logits.float()
            pair_loss += torch.nn.functional.cross_entropy(scores, label, reduction="sum").item()
            right += int((scores.argmax(-1) == label).sum())
            pairs += found["num_pairs_in_batch"]
        if is_judged and hasattr(objective, "predictions"):
            said += zip(share.tolist(), objective.predictions(outputs, data, share), strict=True)
        if token_bytes is not None:
            labels = targets(batch)[targets(batch) != IGNORED]
            text_bytes += int(token_bytes[labels.numpy()].sum())
    model.train(was_training)
    loss_sum = sum(torch.stack(losses).tolist()) if losses else 0.0  # read once, so that no batch is waited for
    if accelerator.num_processes > 1:
        sums = [loss_sum, tokens, text_bytes, pairs, pair_loss, right]
        sums = accelerator.reduce(torch.tensor(sums, dtype=torch.float64, device=accelerator.device))
        loss_sum, tokens, text_bytes, pairs, pair_loss, right = sums.tolist()
    figures = _figures(loss_sum - pair_loss, int(tokens), text_bytes)
    if pairs:
        figures |= {"nsp_loss": pair_loss / pairs, "nsp_accuracy": right / pairs}
        figures["loss"] += figures["nsp_loss"]
    if is_judged and hasattr(objective, "predictions"):
        if accelerator.num_processes > 1:  # each row once, whoever had it
            said = gather_object(said)
        numbers, predictions = zip(*sorted(said, key=lambda pair: pair[0]), strict=True)
        figures = {"loss": figures["loss"], "tokens": figures["tokens"]}
        figures["metrics"] = judge(*objective.judged(data, np.array(numbers), predictions), metrics)
    return figures


def load_metric(name, kind=None):
    """A metric of the library `evaluate`.

    Raises:
        InputError: there is none by that name, or it needs what is not installed.
    """
    try:
        return evaluate_library.load(name, kind, keep_in_memory=True)
    except Exception as error:  # of the network, of the library
        raise InputError(f"metric {name} cannot be had: {first_line(error)[:300]}") from None


def judge(name, kind, predictions, references, more=()):
    """What is usual for a task, by the library `evaluate` and a metric of ours, which needs no Hub.

    Args:
        name: "classification", "entities", "answers" or "language_modeling": the file in metrics/, which says what it
            takes and gives.
        kind: its configuration, None where there is but one.
        more: names of other metrics, of the Hub or paths, that take the same; theirs that have the name of one of ours
            are called NAME_KEY.
    Returns:
        name -> value.
    Raises:
        InputError: another metric cannot be had, or does not take what the task gives.
    """
    found = {}
    for one in (str(METRICS / f"{name}.py"), *more):
        metric = load_metric(one, kind if one.startswith(str(METRICS)) else None)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of figures that a few rows do not define
                figures = metric.compute(predictions=predictions, references=references)
        except Exception as error:  # whatever the metric thinks of
            raise InputError(f"metric {one} does not take what the task gives: {first_line(error)[:300]}") from None
        for key, value in figures.items():
            if isinstance(value, (int, float, np.number)):
                found[f"{Path(one).stem}_{key}" if key in found else key] = float(value)
    return found


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
    found = judge("language_modeling", None, [loss_sum], [{"tokens": tokens, "bytes": text_bytes}])
    return {"bits_per_byte": None, "tokens": tokens} | found
