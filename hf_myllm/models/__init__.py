"""The model families that can be trained: one folder and one line in `FAMILIES` each."""

from typing import NamedTuple

from .bert import (
    MyBertConfig,
    MyBertForMaskedLM,
    MyBertForPreTraining,
    MyBertForQuestionAnswering,
    MyBertForSequenceClassification,
    MyBertForTokenClassification,
)
from .gpt import GPTConfig, GPTForCausalLM, GPTForSequenceClassification
from .llama import MyLlamaConfig, MyLlamaForCausalLM, MyLlamaForSequenceClassification
from .qwen3 import MyQwen3Config, MyQwen3ForCausalLM, MyQwen3ForSequenceClassification


class Family(NamedTuple):
    """A model family. Everything that the package needs to know about a family is derived from this record."""

    display_name: str  # in the model card
    config: type  # configuration class
    tasks: dict  # recipe's `task` -> model class; the first is the default task of the family
    tokenizer: str = "bpe"  # the algorithm (a key of data.tokenizer.TRAINERS) that messages suggest

    @property
    def is_decoder(self):
        return "causal" in self.tasks


def _decoder(display_name, config, causal_lm, sequence_classifier):
    tasks = {"causal": causal_lm, "instruction": causal_lm, "classification": sequence_classifier}
    return Family(display_name, config, tasks)


FAMILIES = {  # recipe's `model` -> family
    "gpt": _decoder("GPT-2", GPTConfig, GPTForCausalLM, GPTForSequenceClassification),
    "llama": _decoder("Llama", MyLlamaConfig, MyLlamaForCausalLM, MyLlamaForSequenceClassification),
    "qwen3": _decoder("Qwen3", MyQwen3Config, MyQwen3ForCausalLM, MyQwen3ForSequenceClassification),
    "bert": Family(
        "BERT",
        MyBertConfig,
        {
            "mlm": MyBertForMaskedLM,
            "mlm_nsp": MyBertForPreTraining,
            "classification": MyBertForSequenceClassification,
            "token_classification": MyBertForTokenClassification,
            "question_answering": MyBertForQuestionAnswering,
        },
        tokenizer="wordpiece",
    ),
}


def find_family(model_type):
    """Return the family whose checkpoints have this `model_type` ("gpt2" for GPT), or None."""
    return next((family for family in FAMILIES.values() if family.config.model_type == model_type), None)


__all__ = ["FAMILIES", "Family", "find_family"]
