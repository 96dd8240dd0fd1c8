"""What a task provides: rows, batches, a loss, metrics, and what the console shows.

A task is a subclass of [`Task`] in a file of its own and one line in the registry in `tasks/__init__.py`. A run uses
its task in this order:

    task = tasks.build(name, tokenizer, settings)     checks the tokenizer; labelled tasks also find their labels
    task.config_settings()                            what the model's configuration takes from the task
    task.configure(model_config, max_len)             completes the task with what the model's configuration decides
    train_data, val_data, stats = task.load(...)      tokenizes the data, or opens it in the cache
    rows = task.make_rows(train_data, name, stride)   training sequences with a length, read by index
    batch = task.batch(rows, indices, step, size)     the model's inputs, a dict of tensors
    outputs = task.forward(model, inputs, counts)     outputs whose loss is the sum over all targets divided by counts

`batch` must be a pure function of (seed, step, indices): a run that resumes makes the same batches again.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..data import corpus
from ..data.packing import StridedRows, pack_documents
from ..data.sampler import evenly_spaced
from ..data.streaming import StreamedRows, Streams
from ..errors import InputError
from ..generate import encode_prompt, generate_text
from ..models.loss import IGNORE_INDEX

_MARK_SEARCH_TOKENS = 20_000_000  # tokens in which a document mark must occur
_SHOWN_TOKENS = 24


@dataclass
class Settings:
    """The keys of a recipe's `data` section that tasks read; their help is in recipe/sections.py."""

    max_len: int | None = None
    stride: int | None = None
    packing: str | None = None
    mlm_probability: float = 0.15
    mean_span_length: float = 3.0
    whole_word_masking: bool = False
    val_fraction: float = 0.0
    max_eval_rows: int | None = None
    splits_by_position: bool = False  # no key of a recipe: for runs that began with version 0.1
    bin_dtype: str = "auto"
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | list | None = None
    problem_type: str | None = None
    skip_bad_rows: bool = False
    unanswerable: bool | None = None
    max_answer_len: int = 30
    chat_template: str | None = None
    target_column: str | None = None
    source_prefix: str | None = None
    max_target_len: int = 128
    label_smoothing: float = 0.0
    num_beams: int = 1
    labels: list | None = None
    class_weights: str | dict | None = None
    columns: dict | None = None
    template: str | dict | None = None
    long_texts: str = "cut"


class Task:
    """A training task.

    Args:
        tokenizer: a fast tokenizer, or None for token ids (.bin) without one.
        seed: seed of everything that the task draws at random.
        settings: fields of [`Settings`].
    """

    name = "task"  # the name in a recipe; `tasks.build` sets it
    packings = ("stream", "documents", "pad", "best_fit")  # the values of `packing` that it supports, the default first
    is_labelled = False  # reads labelled examples (see labelled.py) instead of a stream of tokens
    has_predictions = False  # predicts labels: metrics and `hf_myllm.predict` instead of perplexity and generated text
    generates_predictions = False  # generates texts, which evaluations and `hf_myllm.predict` compare with targets
    has_windows = False  # a text may be several rows, whose logits are averaged for its prediction and its loss
    num_special_tokens = 0  # positions of a row that hold no text
    num_target_positions = 0  # positions that a decoder needs for targets
    min_text_tokens = 1  # tokens of text that a row must have room for
    length_group_steps = 32  # steps among which rows are grouped by length
    unit = "nats per token"  # unit of the loss
    target_name = "tokens"  # what the loss is a mean over
    has_bits_per_byte = False  # the targets add up to the text
    logits_share = 0.0  # share of a row's positions that get logits over the vocabulary (to estimate memory)
    never_predicted = ()  # token ids that are never a target
    chance_loss = 0.0  # loss, in nats, of guessing what is predicted beside the tokens
    text_share = 1.0  # share of the targets that are text; the others are known: their loss is 0
    new_tokens = {}  # special tokens of a tokenizer that is trained for the task: {attribute: token or list}
    own_columns = ()  # names of columns that `columns` and `template` of a recipe may give
    target_note = "(\u00b7 is a position without a target)"  # explains `describe_target`
    labels = None  # [`labels.Labels`] of tasks that have them

    def __init__(self, tokenizer=None, seed=0, **settings):
        self.tokenizer, self.seed, self.settings = tokenizer, seed, Settings(**settings)
        self.max_len, self.packing = self.settings.max_len, self.settings.packing or self.packings[0]
        self.resolved_settings = {}  # keys that the recipe leaves open, with the values that follow from the data

    @property
    def pads_rows(self):
        """Whether rows may be shorter than max_len."""
        return self.packing in ("pad", "best_fit")

    @property
    def has_stride(self):
        """Whether rows may overlap."""
        return not self.pads_rows

    @property
    def isolates_documents(self):
        """Whether the documents of a row do not attend to each other."""
        return self.packing in ("documents", "best_fit")

    # ---- construction

    def prepare_tokenizer(self, is_trained):
        """Check that the tokenizer has what the task needs, and complete it.

        Args:
            is_trained: whether the model was trained for this task before, so that its tokenizer is kept as it is.
        Raises:
            InputError: the tokenizer lacks something.
        """

    def find_labels(self, source, stored_config, is_trained):
        """Set `labels` from the training data, or from the configuration of a trained model."""

    def config_settings(self):
        """Return the values of the model's configuration that the task decides."""
        return {}

    def configure(self, model_config, max_len):
        """Complete the task with what the model's configuration decides.

        Args:
            max_len: tokens per row.
        Raises:
            InputError: the model or the row is too small for the task.
        """
        self.max_len = max_len
        if max_len < self.num_special_tokens + self.min_text_tokens:
            raise InputError(
                f"max_len {max_len} is too small: task {self.name} adds {self.num_special_tokens} special tokens to "
                "each row; raise it"
            )

    # ---- rows and batches

    def load(self, training, validation=None, show_progress=False):
        """Tokenize the data, or open it in the cache.

        Args:
            training: list of training sources.
            validation: the validation source, or None to hold out `val_fraction` of the training data.
        Returns:
            training data, validation data (each None if there is none), and a dict of statistics of the data.
        """
        fraction, limit = 0.0 if validation else self.settings.val_fraction, self.settings.max_eval_rows
        options = self.settings.bin_dtype, show_progress, self.settings.splits_by_position
        train_tokens, val_tokens, stats = None, None, {}
        if training:
            loaded = [
                corpus.load_tokens(
                    source, self.tokenizer, fraction, *options, first=self._first_tokens(source, fraction)
                )
                for source in training
            ]
            parts, held_out, all_stats = zip(*loaded, strict=True)
            train_tokens = corpus.concatenate(parts)
            stats = all_stats[0] if len(training) == 1 else corpus.merge_stats(all_stats)
            if held_out := [tokens for tokens in held_out if tokens is not None]:
                val_tokens = corpus.concatenate(held_out)
        if validation:
            counts = [self.tokens_of_rows(limit)] if limit else ()
            val_tokens, _, _ = corpus.load_tokens(validation, self.tokenizer, 0.0, *options, first=counts)
        return train_tokens, val_tokens, stats

    def _first_tokens(self, source, fraction):
        """Return how many tokens `max_train_rows` and, if a part is held out, `max_eval_rows` need of a source; () for
        all."""
        if not source.max_rows:
            return ()
        counts = [self.tokens_of_rows(source.max_rows, self.settings.stride)]
        if fraction:
            held_out = self.settings.max_eval_rows or max(1, round(source.max_rows * fraction / (1 - fraction)))
            counts.append(self.tokens_of_rows(held_out))
        return counts

    def tokens_of_rows(self, count, stride=None):
        """Return in how many tokens of text there are `count` rows, or more: documents may be shorter than a row."""
        length = getattr(self, "text_length", self.max_len)
        return (count - 1) * (stride or length) + length + (2 * count if self.pads_rows else 1)

    def make_rows(self, data, name, stride=None):
        """Return the rows of some data, which have a length and are read by index.

        Args:
            data: what `load` returned, or [`streaming.Streams`].
            name: what to call the data in messages.
            stride: tokens from the start of a row to the start of the next; default: rows do not overlap.
        """
        raise NotImplementedError

    def text_rows(self, data, name, length, stride=None, ahead=0, marks=()):
        """Return the rows of tokens of text, by the task's packing.

        Args:
            length: tokens of text per row, where rows are equally long.
            ahead: see [`StridedRows`].
            marks: the token ids that separate documents, unless they run into each other.
        """
        if isinstance(data, Streams):
            return StreamedRows(data, length, name, ahead)
        if marks:
            _require_marks(data, marks, name)
        if not self.pads_rows:
            return StridedRows(data, length, stride or length, name, ahead)
        is_packed = self.packing == "best_fit"
        return pack_documents(data, name, marks, self.max_len, self.num_special_tokens, is_packed, ahead)

    def batch(self, rows, indices, step=None, size=None):
        """Return the model's inputs and targets for some rows: a dict of tensors, without the counts of the targets.

        Args:
            step: the training step; None in an evaluation, which draws the same each time.
            size: add empty rows without targets up to this number, so that all micro-batches have one shape.
        """
        raise NotImplementedError

    def targets(self, batch):
        """Return the labels of a batch, IGNORE_INDEX where there is no target."""
        return batch["labels"]

    def count_targets(self, batch):
        """Return the number of targets of each part of the loss, by the name of the model's argument for it."""
        return {"num_items_in_batch": int((self.targets(batch) != IGNORE_INDEX).sum())}

    @property
    def row_tokens(self):
        """What [`count_tokens`] returns of a full row."""
        return self.max_len

    def count_tokens(self, batch):
        """Return how many tokens of text a batch reads, without padding and empty rows."""
        has_target = (batch["labels"] != IGNORE_INDEX).reshape(len(batch["labels"]), -1).any(dim=1)
        if "attention_mask" in batch:
            return int(batch["attention_mask"][has_target].sum())
        return int(has_target.sum()) * batch["input_ids"].shape[1]

    def forward(self, model, inputs, counts):
        """Return the model's outputs, whose loss is the sum over all targets divided by `counts`.

        The logits of the vocabulary are skipped: they would take more memory than all else.
        """
        return model(**inputs, **counts, use_cache=False, skip_logits=True)

    # ---- evaluation

    def batch_sums(self, inputs, outputs):
        """Return what `loss_metrics` needs of a batch beside its loss and targets: a dict of numbers to add up."""
        return {}

    def loss_metrics(self, sums):
        """Return the metrics of sums over all rows: loss (nats), tokens (targets), bytes, and those of `batch_sums`."""
        return language_metrics(sums["loss"], int(sums["tokens"]), sums["bytes"])

    def example_metrics(self, rows, indices, predictions):
        """Return the metrics, such as the loss, that need all rows of an example together; see `has_windows`."""
        return {}

    def length_keys(self, rows):
        """Return a function from row numbers to keys, by which rows of similar length sort together; None if all are
        equally long."""
        return rows.lengths

    def sort_by_length(self, rows, indices):
        """Return row numbers with those of similar length together, the longest first."""
        keys = self.length_keys(rows)
        return indices if keys is None else indices[np.argsort(-keys(indices), kind="stable")]

    @classmethod
    def default_packing(cls, takes_positions):
        """Return the packing of a recipe that leaves it open; without positions, documents cannot share a row."""
        return next(name for name in cls.packings if takes_positions or name in ("stream", "pad"))

    def choose_rows(self, rows, count):
        """Return the indices of `count` rows to evaluate, evenly spaced; all if `count` is None or too large."""
        return evenly_spaced(count, len(rows))

    def describe_metrics(self, metrics):
        """Return the metrics beside the loss in a few words, or "" if there are none."""
        return "" if metrics.get("bits_per_byte") is None else f"{metrics['bits_per_byte']:.3f} bits per byte"

    # ---- what a person sees

    def summary_lines(self, train_rows, val_rows, stats):
        """Return lines about the data for the beginning of a run; `stats` are those of the training data."""
        return []

    def describe_target(self, batch, index):
        """Return what the model is to predict of one row of a batch."""
        return show_tokens(self.tokenizer, self.targets(batch)[index])

    def check_prompt(self, text, max_positions):
        """Raise InputError if `sample` cannot use this text."""
        encode_prompt(self.tokenizer, text, max_positions)

    def sample(self, model, text, **sampling):
        """Return text that continues `text`; see [`generate_text`] for the options."""
        return generate_text(model, self.tokenizer, text, **sampling)

    def usage(self, run_dir, prompt=None):
        """Return a label and a command that uses the trained model; `run_dir` and `prompt` are quoted for a shell."""
        prompt = prompt or "'Once upon a time'"
        return "generate", f"hf-myllm generate {run_dir} --prompt {prompt}"

    def update_generation_config(self, model, stats):
        """Set the tokens that end generated text, if the training data decides them; `stats` are its statistics."""


# ---- helpers


def language_metrics(loss_sum, tokens, num_bytes=0):
    """Return loss (nats per token), perplexity, bits_per_byte (None without bytes) and tokens."""
    loss = loss_sum / max(1, tokens)
    bits = loss_sum / math.log(2) / num_bytes if num_bytes else None
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits, "tokens": tokens}


def cross_entropy(logits, labels, **options):
    """Return the sum of the losses over all targets; `options` are those of torch."""
    options = {"ignore_index": IGNORE_INDEX, "reduction": "sum"} | options
    return torch.nn.functional.cross_entropy(logits, labels, **options)


def to_tensors(batch, size=None):
    """Return arrays as tensors, int64 or float32, with empty rows added up to `size`."""
    tensors = {}
    for name, values in batch.items():
        missing = 0 if size is None else max(0, size - len(values))
        # an empty row attends to itself: a row that attends to nothing would be NaN
        fill = IGNORE_INDEX if "label" in name else 1 if name == "attention_mask" else 0
        filled = np.pad(values, [(0, missing), *[(0, 0)] * (values.ndim - 1)], constant_values=fill)
        dtype = np.float32 if filled.dtype.kind == "f" else np.int64
        tensors[name] = torch.from_numpy(np.ascontiguousarray(filled, dtype=dtype))
    return tensors


def restart_positions(starts):
    """Return position ids (rows, length) that restart at each True of `starts`."""
    positions = np.arange(starts.shape[1])
    return positions - np.maximum.accumulate(np.where(starts, positions, 0), axis=1)


def join_segments(rows, width, fill):
    """Return rows of one or more segments each, such as documents, as arrays.

    Args:
        rows: a list with the segments of each row, arrays of numbers.
        width: the length of a row, at least that of its segments.
        fill: the number in the rest of a row.
    Returns:
        the numbers (rows, width), and which segment each is of, counted from 1; 0 in the rest of a row.
    """
    values, segments = np.full((len(rows), width), fill), np.zeros((len(rows), width), dtype=np.int64)
    for row, parts in enumerate(rows):
        lengths = [len(part) for part in parts]
        values[row, : sum(lengths)] = np.concatenate(parts)
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, len(parts) + 1), lengths)
    return values, segments


def padded_width(lengths, limit=None, longest_exact=0):
    """Return the longest length, at least 1, rounded up to a multiple of 8, so that batches have few different shapes.

    Args:
        limit: the largest width.
        longest_exact: a length up to this one is not rounded up.
    """
    longest = max([1, *lengths])
    width = longest if longest <= longest_exact else -(-longest // 8) * 8
    return width if limit is None else min(limit, width)


def _require_marks(tokens, marks, name):
    """Raise InputError if none of the marks that separate documents occurs in the data."""
    if not np.isin(tokens.read(0, _MARK_SEARCH_TOKENS), marks).any():
        raise InputError(
            f"{name}: documents cannot be told apart, none of the tokens {marks} that separate documents is in the "
            f"first {min(_MARK_SEARCH_TOKENS, len(tokens)):,} tokens; write one after each document, or leave out "
            "packing"
        )


def require_tokens(task, tokenizer, names, suggestion="BERT's, or {train: wordpiece, vocab_size: 8192}"):
    """Raise InputError if the tokenizer lacks one of these special tokens; `suggestion` is one that has them."""
    if tokenizer is None:
        raise InputError(f"task {task} needs the data's tokenizer: give --tokenizer, or a model that has one")
    if missing := [name for name in names if getattr(tokenizer, name) is None]:
        raise InputError(
            f"task {task} needs a tokenizer with {', '.join(missing)}, which {tokenizer.name_or_path or 'this one'} "
            f"does not have: give {suggestion}"
        )


def show_tokens(tokenizer, ids):
    """Return tokens separated by bars: special ones by name, positions without a target as a dot."""
    special = set(tokenizer.all_special_ids)
    shown = []
    for token_id in ids.tolist()[:_SHOWN_TOKENS]:
        if token_id == IGNORE_INDEX:
            shown.append("·")
        elif token_id in special:
            shown.append(tokenizer.convert_ids_to_tokens(token_id))
        else:
            shown.append(repr(tokenizer.decode([token_id]))[1:-1])
    return join_tokens(shown, len(ids))


def join_tokens(shown, total):
    more = total - _SHOWN_TOKENS
    return "|".join(shown[:_SHOWN_TOKENS]) + (f"| ... {more} more" if more > 0 else "|")
