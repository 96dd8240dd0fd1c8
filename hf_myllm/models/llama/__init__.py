from .configuration_llama import MyLlamaConfig
from .modeling_llama import MyLlamaForCausalLM, MyLlamaModel, MyLlamaPreTrainedModel

__all__ = ["MyLlamaConfig", "MyLlamaForCausalLM", "MyLlamaModel", "MyLlamaPreTrainedModel"]
