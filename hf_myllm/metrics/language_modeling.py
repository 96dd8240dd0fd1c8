"""What language models are judged by, for the library `evaluate`.

Loaded by its path, so that nothing is asked of the Hub.
"""

import math

import datasets
import evaluate


class LanguageModeling(evaluate.Metric):
    """loss in nats per token, perplexity, and bits_per_byte, which compares models whose tokenizers differ; None where
    no bytes are told. Takes the loss of each text, summed over its tokens, and how many tokens and bytes it has.
    """

    def _info(self):
        number = datasets.Value("float64")
        counts = {"tokens": datasets.Value("int64"), "bytes": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": number, "references": counts}),
        )

    def _compute(self, predictions, references):
        total = math.fsum(predictions)
        tokens, text = (sum(one[name] for one in references) for name in ("tokens", "bytes"))
        loss = total / max(1, tokens)
        bits = total / math.log(2) / text if text else None
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits}
