from .configuration_qwen3 import MyQwen3Config
from .modeling_qwen3 import MyQwen3ForCausalLM, MyQwen3ForSequenceClassification, MyQwen3Model, MyQwen3PreTrainedModel

__all__ = [
    "MyQwen3Config",
    "MyQwen3ForCausalLM",
    "MyQwen3ForSequenceClassification",
    "MyQwen3Model",
    "MyQwen3PreTrainedModel",
]
