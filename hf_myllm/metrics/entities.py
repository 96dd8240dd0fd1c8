"""What named entities are judged by, for the library `evaluate`, by seqeval (Nakayama 2018).

It counts as CoNLL's own script does: an entity is right when its type, its first and its last word are.

Loaded by its path, so that nothing is asked of the Hub.
"""

import warnings

import datasets
import evaluate
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score


class Entities(evaluate.Metric):
    """precision, recall and f1 of whole entities, and accuracy of words; takes sentences as lists of labels."""

    def _info(self):
        sentences = {name: datasets.Sequence(datasets.Value("string")) for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(sentences)
        )

    def _compute(self, predictions, references):
        scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of labels that are not of the BIO kind, which count each as it is
            found = {name: float(score(references, predictions, zero_division=0)) for name, score in scores.items()}
        return found | {"accuracy": float(accuracy_score(references, predictions))}
