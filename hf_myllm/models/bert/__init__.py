from .configuration_bert import MyBertConfig
from .modeling_bert import (
    MyBertForMaskedLM,
    MyBertForPreTraining,
    MyBertForQuestionAnswering,
    MyBertForSequenceClassification,
    MyBertForTokenClassification,
    MyBertModel,
    MyBertPreTrainedModel,
)

__all__ = [
    "MyBertConfig",
    "MyBertForMaskedLM",
    "MyBertForPreTraining",
    "MyBertForQuestionAnswering",
    "MyBertForSequenceClassification",
    "MyBertForTokenClassification",
    "MyBertModel",
    "MyBertPreTrainedModel",
]
