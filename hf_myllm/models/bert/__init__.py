from .configuration_bert import MyBertConfig
from .heads_bert import (
    MyBertForMaskedLM,
    MyBertForPreTraining,
    MyBertForQuestionAnswering,
    MyBertForSequenceClassification,
    MyBertForTokenClassification,
)
from .modeling_bert import MyBertModel, MyBertPreTrainedModel

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
