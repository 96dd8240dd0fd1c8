"""The families that can be trained: one folder and one line each."""

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


class Family(NamedTuple):
    config: type  # the configuration's class
    tasks: dict  # a recipe's `task:` -> the class that it trains; the first is what the family does unless told


# A recipe's `model:` -> the family.
FAMILIES = {
    "gpt": Family(
        GPTConfig,
        {
            "causal": GPTForCausalLM,
            "instruction": GPTForCausalLM,
            "classification": GPTForSequenceClassification,
        },
    ),
    "llama": Family(
        MyLlamaConfig,
        {
            "causal": MyLlamaForCausalLM,
            "instruction": MyLlamaForCausalLM,
            "classification": MyLlamaForSequenceClassification,
        },
    ),
    "bert": Family(
        MyBertConfig,
        {
            "mlm": MyBertForMaskedLM,
            "mlm_nsp": MyBertForPreTraining,
            "classification": MyBertForSequenceClassification,
            "token_classification": MyBertForTokenClassification,
            "question_answering": MyBertForQuestionAnswering,
        },
    ),
}

__all__ = [
    "FAMILIES",
    "Family",
    "GPTConfig",
    "GPTForCausalLM",
    "GPTForSequenceClassification",
    "MyBertConfig",
    "MyBertForMaskedLM",
    "MyBertForPreTraining",
    "MyBertForQuestionAnswering",
    "MyBertForSequenceClassification",
    "MyBertForTokenClassification",
    "MyLlamaConfig",
    "MyLlamaForCausalLM",
    "MyLlamaForSequenceClassification",
]
