"""Text classification: one class or several classes of a text or a pair of texts, or a number (regression)."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import torch

from ..data.columns import fill_template, read_text
from ..data.readers import read_documents
from ..data.tokenizer import end_of_document
from ..errors import InputError
from .base import IGNORE_INDEX, cross_entropy
from .labelled import LabelNames, PredictionTask
from .labels import CLASSIFICATION, MULTI_LABEL, REGRESSION, Labels

_LINE = None  # the column of a line of plain text: no file has a column of this name


class Classification(LabelNames, PredictionTask):
    """Predict the class of a text, which of several classes hold, or a number.

    A text longer than a row is cut, or becomes several overlapping rows, its windows. Their losses in training have
    weights, so that each text counts once; the prediction for the text is made of the mean of their logits. The labels
    of a batch are (rows,), or (rows, classes) of 0.0 and 1.0 for several classes.
    """

    def __init__(self, tokenizer=None, seed=0, **settings):
        super().__init__(tokenizer, seed, **settings)
        self.text_pair_column, self.template = self.settings.text_pair_column, self.settings.template
        self.is_pair = self.text_pair_column is not None
        self.has_windows = self.settings.long_texts == "windows"
        self.cut_message = "cut; long_texts: windows reads all of them"
        if self.has_windows:
            self.cut_message = "several windows, whose logits are averaged"

    def cache_key(self):
        return [*super().cache_key(), *([self.settings.stride, "windows"] if self.has_windows else ())]

    @property
    def label_feature(self):
        if (self.labels and self.labels.problem_type == CLASSIFICATION) or not self.reads_labels:
            return datasets.Value("int64")
        is_list = self.labels.problem_type == MULTI_LABEL
        return datasets.List(datasets.Value("float32")) if is_list else datasets.Value("float32")

    # ---- examples and rows

    def labels_of(self, source):
        if self.settings.problem_type == REGRESSION:
            return Labels(REGRESSION)
        if not isinstance(self.label_column, list):
            return super().labels_of(source)
        if len(set(self.label_column)) < len(self.label_column):
            raise InputError(f"label_column names a column twice: {', '.join(self.label_column)}; name each once")
        return Labels(MULTI_LABEL, tuple(self.label_column))

    def read(self, source):
        if source.format == "text" and not self.reads_labels:
            return read_lines(source, _LINE)
        return super().read(source)

    def texts(self, record, where):
        if _LINE in record:
            text = record[_LINE]
        elif self.template:
            text = fill_template(record, where, self.template)
        else:
            text = read_text(record, where, self.text_column, "text_column")
        if not self.is_pair:
            return [text]
        return [text, read_text(record, where, self.text_pair_column, "text_pair_column")]

    def parse(self, record, where):
        texts = self.texts(record, where)
        label = self.labels.encode(self.read_labels(record, where), where) if self.reads_labels else 0
        text = tuple(texts) if self.is_pair else texts[0]
        group = label if self.labels.problem_type == CLASSIFICATION else None
        columns = dict(zip((self.text_column, self.text_pair_column), texts, strict=False))
        return {"text": text, "label": label, "key": repr(text), "group": group, "record": columns}

    def label_values(self, record, where):
        value = self.read_labels(record, where)
        return [(name, where) for name in value] if isinstance(value, list) else (value, where)

    def tokenize(self, examples):
        if not self.has_windows:
            return self.encode_truncated([example["text"] for example in examples])
        encodings = self.backend().encode_batch([example["text"] for example in examples])
        return [
            self._split(example["text"], encoding) if len(encoding.ids) > self.max_len else encoding
            for example, encoding in zip(examples, encodings, strict=True)
        ]

    def _split(self, text, encoding):
        """Return the first window of a text, which has the others in `overflowing`; of a pair, the longer text is split
        and the other one cut to half a row."""
        texts, room, strategy = [text], self.max_len - self.num_special_tokens, "only_first"
        if self.is_pair:
            texts, parts = list(text), encoding.sequence_ids
            longer = int(parts.count(1) >= parts.count(0))
            kept = self.backend(room // 2).encode(texts[1 - longer], add_special_tokens=False)
            if kept.overflowing:
                texts[1 - longer] = texts[1 - longer][: kept.offsets[-1][1]]
            room, strategy = room - len(kept.ids), ("only_first", "only_second")[longer]
        backend = self.backend()
        backend.enable_truncation(self.max_len, stride=room - self.window_step(room), strategy=strategy)
        windows = backend.encode(*texts)
        self.backend()  # without truncation
        return windows

    def example_rows(self, example, encoding):
        windows = [encoding, *(encoding.overflowing if self.has_windows else ())]
        return [self._row(window, example["label"]) for window in windows], bool(encoding.overflowing)

    def _row(self, encoding, label):
        ids = encoding.ids or end_of_document(self.tokenizer)[:1]  # a text without tokens
        types = encoding.type_ids
        second_text = types.index(1) if 1 in types else len(ids)
        return {"input_ids": ids, "second_text": second_text, "labels": label}

    def batch(self, rows, indices, step=None, size=None):
        """Return the inputs and labels of some rows, in training with windows also their weights in the loss."""
        batch = super().batch(rows, indices, step, size)
        if self.has_windows and step is not None:
            indices = np.asarray(indices, dtype=np.int64)
            weights = len(rows) / rows.num_examples / rows.num_windows[indices]  # their mean over all rows is 1
            batch["row_weights"] = torch.zeros(len(batch["labels"]))
            batch["row_weights"][: len(indices)] = torch.from_numpy(weights)
        return batch

    # ---- loss, predictions, metrics

    def loss_sum(self, outputs, labels, mask):
        logits = outputs.logits.float()
        if self.labels.problem_type == CLASSIFICATION:
            return cross_entropy(logits, labels)
        return self._losses(logits, labels).sum()

    def _losses(self, logits, labels):
        """Return the losses of a regression or of several classes per text, in the shape of `labels`."""
        if self.labels.problem_type == REGRESSION:
            losses = (logits[:, 0] - labels) ** 2
        else:
            losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return torch.where(labels != IGNORE_INDEX, losses, 0)  # indexing would wait for the GPU

    def training_loss_sum(self, outputs, labels, mask, weights=None):
        if weights is None:
            return super().training_loss_sum(outputs, labels, mask)
        losses = (
            self.training_losses(outputs, labels)
            if self.has_one_class
            else self._losses(outputs.logits.float(), labels)
        )
        return (losses * weights.view(-1, *[1] * (losses.ndim - 1))).sum()

    def predictions(self, outputs, rows, indices):
        """Return the logits of each row."""
        return list(outputs.logits.float().cpu()[: len(indices)].numpy())

    def _scores(self, logits):
        """Return the probability of each class, or the number, of each text, given the logits (texts, classes)."""
        logits = torch.from_numpy(logits)
        if self.labels.problem_type == REGRESSION:
            return logits.numpy()
        return (logits.softmax(-1) if self.labels.problem_type == CLASSIFICATION else logits.sigmoid()).numpy()

    def example_metrics(self, rows, indices, predictions):
        if not self.has_windows:
            return {}
        examples, logits = mean_of_windows(rows, indices, predictions)
        labels = torch.from_numpy(self.batch_labels(rows, rows.first_rows[examples], 0))
        loss = self.loss_sum(SimpleNamespace(logits=torch.from_numpy(logits)), labels, None)
        return {"loss": loss.item() / labels.numel()}

    def metric_inputs(self, rows, indices, predictions):
        examples, logits = mean_of_windows(rows, indices, predictions)
        values = self._scores(logits)
        if self.labels.problem_type == REGRESSION:
            values = values[:, 0]
        elif self.labels.problem_type == CLASSIFICATION:
            values = values.argmax(-1)
        else:
            values = (values > 0.5).astype(np.float32)
        return values.tolist(), rows.row_labels[rows.first_rows[examples]].tolist()

    def compute_metrics(self, predictions, references):
        return classification_metrics(predictions, references, self.labels)

    def describe_predictions(self, rows, predictions):
        """Yield the texts of each example with its label and the score of each class, or its number."""
        _, logits = mean_of_windows(rows, np.arange(len(rows)), predictions)
        for record, scores in zip(rows.records, self._scores(logits), strict=True):
            if self.labels.problem_type == REGRESSION:
                yield record | {"score": float(scores[0])}
                continue
            scores = dict(zip(self.labels.names, scores.tolist(), strict=True))
            if self.labels.problem_type == MULTI_LABEL:
                yield record | {"labels": [name for name, score in scores.items() if score > 0.5], "scores": scores}
            else:
                best = max(scores, key=scores.get)
                yield record | {"label": best, "score": scores[best], "scores": scores}

    def describe_target(self, batch, index):
        label, names = batch["labels"][index], self.labels.names
        if self.labels.problem_type == REGRESSION:
            return f"{float(label):g}"
        if self.labels.problem_type == CLASSIFICATION:
            return names[int(label)]
        return ", ".join(name for name, flag in zip(names, label.tolist(), strict=True) if flag) or "none"


def mean_of_windows(rows, indices, predictions):
    """Return the numbers of the examples of some rows, and the mean of the logits of each one's rows."""
    groups = rows.group_by_example(indices, predictions)
    return np.array(list(groups)), np.stack([np.mean(logits, axis=0) for logits in groups.values()])


def classification_metrics(predictions, references, labels):
    """Return accuracy, f1_macro, f1_micro; matthews of a single label, and f1 of the second of two classes.

    The accuracy of several classes is the share of texts with all of them right. A regression has mse, pearson and
    spearman.
    """
    from sklearn import metrics as sklearn_metrics  # slow to import, and not every run needs it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metrics that a few rows do not define
        if labels.problem_type == REGRESSION:
            return regression_metrics(predictions, references)
        metrics = {"accuracy": float(sklearn_metrics.accuracy_score(references, predictions))}
        for average in ("macro", "micro"):
            score = sklearn_metrics.f1_score(references, predictions, average=average, zero_division=0)
            metrics[f"f1_{average}"] = float(score)
        if labels.problem_type == CLASSIFICATION:
            metrics["matthews"] = float(sklearn_metrics.matthews_corrcoef(references, predictions))
            if labels.num_labels == 2:
                metrics["f1"] = float(sklearn_metrics.f1_score(references, predictions, zero_division=0))
    return metrics


def regression_metrics(predictions, references):
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_squared_error

    varies = len(set(predictions)) > 1 and len(set(references)) > 1  # else correlations are not defined
    return {
        "mse": float(mean_squared_error(references, predictions)),
        "pearson": float(pearsonr(references, predictions)[0]) if varies else 0.0,
        "spearman": float(spearmanr(references, predictions)[0]) if varies else 0.0,
    }


def read_lines(source, column):
    """Yield (where, record) of each line of plain text, with the line in a column."""
    for index, (text, _) in enumerate(read_documents(replace(source, document="line")), start=1):
        yield f"{source.name} text {index}", {column: text.strip()}
