"""Text classification: one class or several classes of a text or a pair of texts, or a number (regression)."""

import warnings
from dataclasses import replace

import datasets
import numpy as np
import torch

from ..data.readers import read_documents
from ..data.tokenizer import end_of_document
from ..errors import InputError
from .base import IGNORE_INDEX, cross_entropy_sum
from .labelled import LabelNames, PredictionTask
from .labels import CLASSIFICATION, MULTI_LABEL, REGRESSION, Labels


class Classification(LabelNames, PredictionTask):
    """Predict the class of a text, which of several classes hold, or a number. A text longer than a row is cut.

    The labels of a batch are (rows,), or (rows, classes) of 0.0 and 1.0 for several classes.
    """

    cut_message = "cut"

    def __init__(self, tokenizer=None, seed=0, **settings):
        super().__init__(tokenizer, seed, **settings)
        self.text_pair_column = self.settings.text_pair_column
        self.is_pair = self.text_pair_column is not None

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
            return super().labels_of(source, self.settings.problem_type)
        if len(set(self.label_column)) < len(self.label_column):
            raise InputError(f"label_column names a column twice: {', '.join(self.label_column)}; name each once")
        return Labels(MULTI_LABEL, tuple(self.label_column))

    def read(self, source):
        if source.format == "text" and not self.reads_labels:
            return read_lines(source, self.text_column)
        return super().read(source)

    def texts(self, record, where):
        text = self.read_text(record, where, self.text_column, "text_column")
        if not self.is_pair:
            return [text]
        return [text, self.read_text(record, where, self.text_pair_column, "text_pair_column")]

    def parse(self, record, where):
        """Return the text, or the pair of texts, and the label."""
        texts = self.texts(record, where)
        label = self.labels.encode(self._label(record, where), where) if self.reads_labels else 0
        return (tuple(texts) if self.is_pair else texts[0]), label

    def label_values(self, record, where):
        value = self._label(record, where)
        return [(name, where) for name in value] if isinstance(value, list) else (value, where)

    def _label(self, record, where):
        if isinstance(self.label_column, list):
            return {name: self.read_cell(record, where, name, "label_column") for name in self.label_column}
        return self.read_cell(record, where, self.label_column, "label_column")

    def split_key(self, example):
        return (example[1] if self.labels.problem_type == CLASSIFICATION else None), repr(example[0])

    def record(self, example):
        if not self.reads_labels:
            texts = example[0] if self.is_pair else (example[0],)
            return dict(zip((self.text_column, self.text_pair_column), texts, strict=False))

    def tokenize(self, examples):
        return self.encode_truncated([text for text, _ in examples])

    def example_rows(self, example, encoding):
        ids = encoding.ids or end_of_document(self.tokenizer)[:1]  # a text without tokens
        types = encoding.type_ids
        second_text = types.index(1) if 1 in types else len(ids)
        return [{"input_ids": ids, "second_text": second_text, "labels": example[1]}], bool(encoding.overflowing)

    # ---- loss, predictions, metrics

    def loss_sum(self, outputs, labels, mask):
        logits = outputs.logits.float()
        if self.labels.problem_type == CLASSIFICATION:
            return cross_entropy_sum(logits, labels)
        if self.labels.problem_type == REGRESSION:
            losses = (logits[:, 0] - labels) ** 2
        else:
            losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return torch.where(labels != IGNORE_INDEX, losses, 0).sum()  # indexing would wait for the GPU

    def predictions(self, outputs, rows, indices):
        """Return the probability of each class, or the number, of each row."""
        logits = outputs.logits.float().cpu()[: len(indices)]
        if self.labels.problem_type == REGRESSION:
            return list(logits.numpy())
        return list((logits.softmax(-1) if self.labels.problem_type == CLASSIFICATION else logits.sigmoid()).numpy())

    def metric_inputs(self, rows, indices, predictions):
        values = np.stack(predictions)
        if self.labels.problem_type == REGRESSION:
            values = values[:, 0]
        elif self.labels.problem_type == CLASSIFICATION:
            values = values.argmax(-1)
        else:
            values = (values > 0.5).astype(np.float32)
        return values.tolist(), rows.row_labels[indices].tolist()

    def compute_metrics(self, predictions, references):
        return classification_metrics(predictions, references, self.labels)

    def describe_predictions(self, rows, predictions):
        """Yield the texts of each example with its label and the score of each class, or its number."""
        for record, scores in zip(rows.records, predictions, strict=True):
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
