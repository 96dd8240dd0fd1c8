from .configuration_llama import MyLlamaConfig
from .modeling_llama import (
    MyLlamaForCausalLM,
    MyLlamaForSequenceClassification,
    MyLlamaModel,
    MyLlamaPreTrainedModel,
)

__all__ = [
    "MyLlamaConfig",
    "MyLlamaForCausalLM",
    "MyLlamaForSequenceClassification",
    "MyLlamaModel",
    "MyLlamaPreTrainedModel",
]
