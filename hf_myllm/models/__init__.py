"""The families that can be trained: one folder and one line each."""

from .gpt import GPTConfig, GPTForCausalLM

# A recipe's `model:` -> the configuration and the class that it trains.
FAMILIES = {
    "gpt": (GPTConfig, GPTForCausalLM),
}

__all__ = ["FAMILIES", "GPTConfig", "GPTForCausalLM"]
