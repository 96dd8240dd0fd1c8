"""Word counting: predict how many words a text has. The smallest labelled task, which test_new_task.py registers."""

import datasets
import numpy as np
import torch

from hf_myllm.data.columns import read_text
from hf_myllm.data.tokenizer import end_of_document
from hf_myllm.tasks.base import IGNORE_INDEX
from hf_myllm.tasks.labelled import PredictionTask
from hf_myllm.tasks.labels import REGRESSION, Labels


class WordCount(PredictionTask):
    """Predict the number of words of a text, with a head of one output. The labels of a batch are (rows,)."""

    labels = Labels(REGRESSION)
    label_feature = datasets.Value("float32")

    def texts(self, record, where):
        return [read_text(record, where, self.text_column, "text_column")]

    def parse(self, record, where):
        (text,) = self.texts(record, where)
        return {"text": text, "count": float(len(text.split())), "key": text, "record": {self.text_column: text}}

    def tokenize(self, examples):
        return self.encode_truncated([example["text"] for example in examples])

    def example_rows(self, example, encoding):
        ids = encoding.ids or end_of_document(self.tokenizer)[:1]  # an empty text
        return [{"input_ids": ids, "second_text": len(ids), "labels": example["count"]}], bool(encoding.overflowing)

    def loss_sum(self, outputs, labels, mask):
        losses = (outputs.logits[:, 0].float() - labels) ** 2
        return torch.where(labels != IGNORE_INDEX, losses, 0).sum()

    def predictions(self, outputs, rows, indices):
        return list(outputs.logits[: len(indices), 0].float().cpu().numpy())

    def metric_inputs(self, rows, indices, predictions):
        return [float(count) for count in predictions], rows.row_labels[indices].tolist()

    def compute_metrics(self, predictions, references):
        return {"mean_error": float(np.abs(np.array(predictions) - references).mean())}

    def describe_predictions(self, rows, predictions):
        for record, count in zip(rows.records, predictions, strict=True):
            yield record | {"words": float(count)}

    def describe_target(self, batch, index):
        return f"{batch['labels'][index]:g} words"
