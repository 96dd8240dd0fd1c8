from .configuration_bart import MyBartConfig
from .modeling_bart import MyBartForConditionalGeneration, MyBartModel, MyBartPreTrainedModel

__all__ = ["MyBartConfig", "MyBartForConditionalGeneration", "MyBartModel", "MyBartPreTrainedModel"]
