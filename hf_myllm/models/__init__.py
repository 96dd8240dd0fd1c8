"""The families that can be trained: one folder and one line each."""

from typing import NamedTuple

from .bert import MyBertConfig, MyBertForMaskedLM, MyBertForPreTraining
from .gpt import GPTConfig, GPTForCausalLM
from .llama import MyLlamaConfig, MyLlamaForCausalLM


class Family(NamedTuple):
    config: type  # the configuration's class
    tasks: dict  # a recipe's `task:` -> the class that it trains; the first is what the family does unless told


# A recipe's `model:` -> the family.
FAMILIES = {
    "gpt": Family(GPTConfig, {"causal": GPTForCausalLM}),
    "llama": Family(MyLlamaConfig, {"causal": MyLlamaForCausalLM}),
    "bert": Family(MyBertConfig, {"mlm": MyBertForMaskedLM, "mlm_nsp": MyBertForPreTraining}),
}

__all__ = [
    "FAMILIES",
    "Family",
    "GPTConfig",
    "GPTForCausalLM",
    "MyBertConfig",
    "MyBertForMaskedLM",
    "MyBertForPreTraining",
    "MyLlamaConfig",
    "MyLlamaForCausalLM",
]
