"""What the tasks on labelled examples share: reading and checking records, batches with labels, named labels.

A *record* is an item of the data as it was read, a dict of columns. An *example* is a checked record. A *row* is one
training sequence; a long example may become several rows.
"""

from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import datasets
import numpy as np
import torch

from ..data.columns import BadRowError, fill_template, read_column, read_field, template_columns
from ..data.readers import read_rows
from ..data.sampler import evenly_spaced
from ..data.tokenizer import end_of_document
from ..data.tokenizer import fingerprint as tokenizer_fingerprint
from ..errors import InputError, printable
from ..terminal import first_of, plural
from .base import IGNORE_INDEX, Task, cross_entropy, join_segments, padded_width, require_tokens, to_tensors
from .labelled_rows import load_rows
from .labels import CLASSIFICATION, REGRESSION, LabelCollector, Labels


class LabelledTask(Task):
    """Base class of the tasks that read labelled examples. A subclass must provide

    texts(record, where)            the texts of a record, checked; a tokenizer is trained on them
    parse(record, where)            the example of a record, checked: a dict of what the other methods need, and
                                    key: a text; examples with the same key are held out together
                                    group: of each group the same share is held out; may be left out
                                    record: a dict to keep beside the rows, to show it with predictions or, if
                                    `record_features` is set, for metrics; may be left out
    tokenize(examples)              one encoding for each example
    example_rows(example, encoding) the rows of an example, dicts of LabelledRows' columns; whether it was cut

    It may override `read`, `update_stats`, `summary_lines` and the attributes below.
    """

    is_labelled = True
    pads_rows = True
    reads_labels = True  # False for predictions
    label_feature = datasets.Value("int64")  # type of a row's `labels`
    record_features = None  # columns of the `record` of each training example; None: it is not kept
    is_split_by_context = False  # whether several examples may have one `key`
    default_text_column = "text"  # `text_column` if the recipe does not set it
    cut_message = "split into several rows"  # what happens to examples that are longer than a row

    def __init__(self, tokenizer=None, seed=0, **settings):
        super().__init__(tokenizer, seed, **settings)
        self.text_column = self.settings.text_column or self.default_text_column
        self.label_column = self.settings.label_column or "label"
        self.label_columns = self.label_column if isinstance(self.label_column, list) else [self.label_column]
        if self.text_column in self.label_columns:
            raise InputError(f"label_column: {self.text_column!r} is the column of the text too; name two columns")

    def prepare_tokenizer(self, is_trained):
        require_tokens(self.name, self.tokenizer, ())

    def load(self, training, validation=None, show_progress=False):
        train_rows, val_rows, stats = None, None, {"train": {}}
        if training:
            fraction, limit = 0.0 if validation else self.settings.val_fraction, self.settings.max_eval_rows
            if fraction and limit and training[0].max_rows:
                fraction = limit / training[0].max_rows
            train_rows, val_rows = load_rows(training[0], self, fraction)
            val_rows = val_rows.first_examples(limit) if val_rows and limit else val_rows
            stats["train"] = train_rows.stats
        if validation:
            val_rows, _ = load_rows(validation, self)
            stats["validation"] = val_rows.stats
        return train_rows, val_rows, stats

    def cache_key(self):
        """Return what the rows depend on beside their source."""
        columns = [self.settings.text_pair_column, self.text_column, self.label_column]
        labels = (self.labels.problem_type, self.labels.names) if self.labels else None
        tokenizer = [tokenizer_fingerprint(self.tokenizer), self.tokenizer.special_tokens_map]
        if self.settings.columns or self.settings.template:
            columns += [self.settings.columns, self.settings.template]
        return [type(self).__name__, *tokenizer, self.max_len, labels, columns, self.settings.skip_bad_rows]

    def row_features(self):
        """Return the columns of the rows' Arrow file."""
        columns = {"input_ids": datasets.List(datasets.Value("uint32")), "second_text": datasets.Value("int64")}
        return datasets.Features(columns | {"labels": self.label_feature, "example": datasets.Value("int64")})

    def read(self, source):
        """Yield (where, record) of each record of a source, a dict of columns."""
        return read_rows(source, columns=self.used_columns())

    def read_first(self, source):
        """Yield what `read` does, up to the source's `max_rows`."""
        return islice(self.read(source), source.max_rows or None)

    @contextmanager
    def skipping_bad_rows(self, skipped):
        """With `skip_bad_rows`, end the block at a BadRowError, whose message the list `skipped` receives."""
        try:
            yield
        except BadRowError as problem:
            if not self.settings.skip_bad_rows:
                raise
            skipped.append(str(problem))

    def used_columns(self):
        """Return the names of the columns that the task reads."""
        return [self.text_column, self.settings.text_pair_column, *self.label_columns, *self.mapped_columns()]

    def mapped_columns(self):
        """Return the names of the columns that `columns` and `template` of the recipe read."""
        named = [name.split(".")[0] for name in (self.settings.columns or {}).values()]
        template = self.settings.template or {}
        templates = [template] if isinstance(template, str) else template.values()
        return [*named, *(name for text in templates for name in template_columns(text))]

    def map_columns(self, record, where, optional=()):
        """Return the columns that `columns` and `template` of the recipe make of a record.

        Args:
            optional: columns that are left out if the record does not have what they are made of.
        Raises:
            BadRowError: a column is missing, or cannot be a part of a text.
        """
        columns, templates = self.settings.columns or {}, self.settings.template or {}
        mapped = {}
        for name, make, spec in [
            *((name, read_field, column) for name, column in columns.items()),
            *((name, fill_template, text) for name, text in templates.items()),
        ]:
            try:
                mapped[name] = make(record, where, spec)
            except BadRowError:
                if name not in optional:
                    raise
        return mapped

    def update_stats(self, stats, example):
        """Add an example to the statistics of the data."""

    def summary_lines(self, train_rows, val_rows, stats):
        """Return lines about the data: how many texts are longer than a row, and what they become."""
        lines = []
        for part, own in (("", stats), ("validation: ", getattr(val_rows, "stats", {}))):
            if own.get("cut"):
                count = f"{own['cut']:,} of {plural(own['examples'], 'text')}"
                lines.append(f"{part}{count} longer than max_len {self.max_len}: {self.cut_message}")
        return lines

    def encode_truncated(self, texts, length=None):
        """Return the encodings of texts or of pairs of texts, cut to `length` tokens; default: max_len."""
        encodings = self.backend(length or self.max_len).encode_batch(texts)
        self.backend()  # the tokenizer is saved without truncation
        return encodings

    def backend(self, length=None):
        """Return the tokenizer's Rust backend without padding; it cuts texts to `length` tokens."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        if length:
            backend.enable_truncation(length)
        else:
            backend.no_truncation()
        return backend


class PredictionTask(LabelledTask):
    """Base class of the labelled tasks whose model has a head for them. A subclass must provide

    texts, parse, tokenize, example_rows       see [`LabelledTask`]
    loss_sum(outputs, labels, mask)            the loss, summed over all targets; `forward` divides it by their number
    predictions(outputs, rows, indices)        what the model predicts of some rows, one array each
    metric_inputs(rows, indices, predictions)  predictions and references in the form that metrics take
    compute_metrics(predictions, references)   a dict of metrics
    describe_predictions(rows, predictions)    a dict for each example, for people and JSON Lines
    describe_target(batch, index)              the target of one row in a few words, for the dry run
    labels                                     its [`Labels`], fixed, or from the data by [`LabelNames`]

    It may override

    label_feature, record_features             the types of a row's `labels` and of the kept records
    unit                                       the unit of the loss, if not that below
    is_pair                                    whether a row is two texts
    batch_labels(rows, indices, width)         the labels of a batch, if not one label or list of labels for each row
    read, update_stats, summary_lines, cut_message, default_text_column
    """

    packings = ("stream",)
    has_predictions = True
    is_pair = False  # whether a row is two texts
    length_group_steps = 8  # fewer than for text: where the length predicts the label, batches would hold one label

    @property
    def unit(self):
        is_regression = self.labels is not None and self.labels.problem_type == REGRESSION
        return "squared error per text" if is_regression else "nats per label"

    @property
    def num_special_tokens(self):
        return self.tokenizer.num_special_tokens_to_add(pair=self.is_pair)

    def prepare_tokenizer(self, is_trained):
        super().prepare_tokenizer(is_trained)
        if self.tokenizer.pad_token is None:  # stock pipelines pad their batches with it
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(end_of_document(self.tokenizer)[0])

    def config_settings(self):
        settings = self.labels.config_settings() if self.labels else {}
        return settings | {"pad_token_id": self.tokenizer.pad_token_id}  # decoders find the end of a text by it

    def configure(self, model_config, max_len):
        super().configure(model_config, max_len)
        stride, room = self.settings.stride, max_len - self.num_special_tokens
        if stride and stride > room:
            raise InputError(f"stride {stride} is above the {room} tokens of a row, and would leave out text; lower it")
        self.pad = model_config.pad_token_id
        self.has_token_types = getattr(model_config, "type_vocab_size", 0) > 1

    def make_rows(self, data, name, stride=None):
        return data

    def window_step(self, room):
        """Return the tokens from one window of a long text to the next, of windows of `room` tokens."""
        return min(self.settings.stride or max(1, room // 2), room)

    def batch(self, rows, indices, step=None, size=None):
        """Return input_ids and attention_mask (rows, length of the longest), token_type_ids if the model has them, and
        labels, whose shape is the task's."""
        texts = [rows.read(int(index)) for index in indices]
        width = padded_width([len(ids) for ids, _ in texts], self.max_len, longest_exact=8)
        ids, segments = join_segments([[ids[:second], ids[second:]] for ids, second in texts], width, self.pad)
        batch = {"input_ids": ids, "attention_mask": segments > 0}
        if self.has_token_types:
            batch["token_type_ids"] = segments == 2
        return to_tensors(batch | {"labels": self.batch_labels(rows, indices, width)}, size)

    def batch_labels(self, rows, indices, width):
        """Return the labels of some rows as an array."""
        return np.array(rows.row_labels[np.asarray(indices, dtype=np.int64)])

    def forward(self, model, inputs, counts):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        # of windows of long texts, in training
        weights = {"weights": inputs.pop("row_weights")} if "row_weights" in inputs else {}
        outputs = model(**inputs)
        loss_sum = self.training_loss_sum if model.training else self.loss_sum
        outputs.loss = loss_sum(outputs, labels, inputs["attention_mask"], **weights) / counts["num_items_in_batch"]
        return outputs

    def training_loss_sum(self, outputs, labels, mask):
        """Return the loss that training minimizes, if it differs from `loss_sum`, which is evaluated."""
        return self.loss_sum(outputs, labels, mask)

    def choose_rows(self, rows, count):
        """Return the indices of the rows of `count` examples."""
        return rows.rows_of_examples(evenly_spaced(count, rows.num_examples))

    def loss_metrics(self, sums):
        return {"loss": sums["loss"] / max(1, sums["tokens"])}

    def describe_metrics(self, metrics):
        return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "loss")

    def usage(self, run_dir, prompt=None):
        return "predict", f"hf-myllm predict {run_dir} --input FILE"


class LabelNames:
    """Mix-in for the tasks that predict named labels. A subclass provides

    label_values(record, where)     the label of a record as (value, place), or a list of them
    """

    @property
    def has_one_class(self):
        """Whether a text, or each word of it, has one of the classes."""
        return self.labels.problem_type == CLASSIFICATION

    class_weights = None  # (classes,) weights of the training loss, whose mean over the training labels is 1

    def find_labels(self, source, stored_config, is_trained):
        """Set `labels`: those of a trained model, or those of the training data, in the order of the model's head.

        Raises:
            InputError: an example has no label, or the labels are of different types.
        """
        stored = Labels.from_config(stored_config) if stored_config else None
        if is_trained:
            self.labels = stored
            return
        self.labels = self._in_given_order(self.labels_of(source), source)
        if stored and (known := self.labels.in_order_of(stored)) != self.labels:
            if self.settings.labels:
                raise InputError(
                    f"labels: the model's head has them in the order {first_of(stored.names, 8)}; give that order, or "
                    "leave labels out"
                )
            self.labels = known
        weighs = self.settings.class_weights or self.settings.label_smoothing
        if weighs and not self.has_one_class:
            raise InputError(
                "class_weights and label_smoothing are for one class per text or word; remove them for "
                f"{self.labels.problem_type}"
            )

    def _in_given_order(self, labels, source):
        """Return the labels of the training data in the order of the recipe's `labels`, which may have more."""
        given = tuple(self.settings.labels or ())
        if not given:
            return labels
        if repeated := [name for name in given if given.count(name) > 1]:
            raise InputError(f"labels: {repeated[0]!r} is named twice; name each class once")
        if labels.problem_type == REGRESSION or labels.is_multi_hot:
            raise InputError(f"labels: the labels of {source.name} have no names; remove labels")
        return replace(labels, names=given)

    def load(self, training, validation=None, show_progress=False):
        train_rows, val_rows, stats = super().load(training, validation, show_progress)
        if self.settings.class_weights and train_rows is not None:
            self.class_weights = self._weigh_classes(train_rows)
        return train_rows, val_rows, stats

    def _count_labels(self, rows):
        """Return how many texts or words of some data have each label: (classes,)."""
        labels = rows.example_labels
        return np.bincount(labels[labels != IGNORE_INDEX], minlength=self.labels.num_labels)

    def _weigh_classes(self, rows):
        """Return the weights of the classes, given the training data."""
        given, names, counts = self.settings.class_weights, self.labels.names, self._count_labels(rows)
        if given == "balanced":
            weights = 1 / np.maximum(counts, 1)
        else:
            if unknown := [name for name in given if name not in names]:
                raise InputError(f"class_weights: {unknown[0]!r} is not one of the labels, {first_of(names, 8)}")
            weights = np.array([float(given.get(name, 1.0)) for name in names])
        return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)

    def training_loss_sum(self, outputs, labels, mask):
        if self.class_weights is None and not self.settings.label_smoothing:
            return self.loss_sum(outputs, labels, mask)
        return self.training_losses(outputs, labels, "sum")

    def training_losses(self, outputs, labels, reduction="none"):
        """Return the losses of one class per text or word, with class weights and label smoothing."""
        logits = outputs.logits.float().flatten(0, -2)
        if self.class_weights is not None:  # moved once: each copy waits for the GPU
            self.class_weights = self.class_weights.to(logits.device)
        options = {"weight": self.class_weights, "label_smoothing": self.settings.label_smoothing}
        return cross_entropy(logits, labels.flatten(), reduction=reduction, **options)

    def read_labels(self, record, where):
        """Return what a record has in the column of the label or, with several columns, a dict of them by name."""
        cells = {name: read_column(record, where, name, "label_column") for name in self.label_columns}
        return cells if isinstance(self.label_column, list) else cells[self.label_column]

    def labels_of(self, source):
        """Return the labels of training data."""
        collector = LabelCollector(self.settings.problem_type)
        for where, record in self.read_first(source):
            with self.skipping_bad_rows([]):
                self.texts(record, where)
                collector.add(self.label_values(record, where))
        if unknown := [name for name in collector.names if self.settings.labels and name not in self.settings.labels]:
            raise InputError(f"labels: {source.name} has {first_of(unknown, 8)} too; add what is missing")
        collector.names |= dict.fromkeys(self.settings.labels or ())
        return collector.labels(f"the beginning of {source.name}" if source.max_rows else source.name)

    def summary_lines(self, train_rows, val_rows, stats):
        """Return the share of each label in the training and the validation rows, and what the examples became."""
        lines = []
        for name, rows in (("training", train_rows), ("validation", val_rows)):
            if rows is None or self.labels.problem_type != CLASSIFICATION:
                continue
            counts = self._count_labels(rows)
            shares = counts / counts.sum()
            order = np.argsort(-shares, kind="stable")
            listed = [f"{printable(self.labels.names[index])} {shares[index]:.1%}" for index in order]
            lines.append(f"{name} labels: {first_of(listed, 8)}")
            if missing := [printable(self.labels.names[index]) for index in order if not counts[index]]:
                effect = "" if rows is train_rows else "; f1_macro leaves out a class that is not predicted either"
                lines.append(f"no {name} row has the label {first_of(missing, 8)}{effect}")
        if self.class_weights is not None:
            pairs = zip(self.labels.names, self.class_weights.tolist(), strict=True)
            lines.append(f"class weights: {first_of([f'{printable(name)} {weight:.3g}' for name, weight in pairs], 8)}")
        return lines + super().summary_lines(train_rows, val_rows, stats)
