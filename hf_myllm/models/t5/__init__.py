from .configuration_t5 import MyT5Config
from .modeling_t5 import MyT5ForConditionalGeneration, MyT5Model, MyT5PreTrainedModel

__all__ = ["MyT5Config", "MyT5ForConditionalGeneration", "MyT5Model", "MyT5PreTrainedModel"]
