"""The families that can be trained: one folder and one line each."""

from .gpt import GPTConfig, GPTForCausalLM
from .llama import MyLlamaConfig, MyLlamaForCausalLM

# A recipe's `model:` -> the configuration and the class that it trains.
FAMILIES = {
    "gpt": (GPTConfig, GPTForCausalLM),
    "llama": (MyLlamaConfig, MyLlamaForCausalLM),
}

__all__ = ["FAMILIES", "GPTConfig", "GPTForCausalLM", "MyLlamaConfig", "MyLlamaForCausalLM"]
