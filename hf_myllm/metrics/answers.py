"""What answers to questions are judged by, for the library `evaluate`, by torchmetrics, as SQuAD's own script does
(Rajpurkar et al. 2016, 2018): exact match, and F1 of the words in common, each with the reference that fits best. Case,
punctuation and articles do not count, and no answer is the text "".

Loaded by its path, so that nothing is asked of the Hub.
"""

import datasets
import evaluate
from torchmetrics.functional.text import squad


class Answers(evaluate.Metric):
    """exact_match and f1, as shares from 0 to 1."""

    def _info(self):
        text, number = datasets.Value("string"), datasets.Value("int32")
        answers = datasets.Sequence({"text": text, "answer_start": number})
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features(
                {
                    "predictions": {"id": text, "prediction_text": text},
                    "references": {"id": text, "answers": answers},
                }
            ),
        )

    def _compute(self, predictions, references):
        found = squad(predictions, references)
        return {"exact_match": float(found["exact_match"]) / 100, "f1": float(found["f1"]) / 100}
