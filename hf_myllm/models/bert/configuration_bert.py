"""BERT's configuration: the stock one, and on disk nothing else."""

from huggingface_hub.dataclasses import strict
from transformers import BertConfig
from transformers.activations import ACT2FN


@strict
class MyBertConfig(BertConfig):
    """[`BertConfig`], with the same fields and the same `model_type`, for the classes of this folder.

    What it writes is a stock BERT configuration, `architectures` naming the stock class. It is never registered with
    `AutoConfig`.

    Raises:
        ValueError: the heads do not divide the width, a value is out of range, or a decoder is asked for.
    """

    _stock_architectures = {
        "MyBertModel": "BertModel",
        "MyBertForPreTraining": "BertForPreTraining",
        "MyBertForMaskedLM": "BertForMaskedLM",
        "MyBertForSequenceClassification": "BertForSequenceClassification",
        "MyBertForTokenClassification": "BertForTokenClassification",
        "MyBertForQuestionAnswering": "BertForQuestionAnswering",
    }

    def validate_architecture(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "max_position_embeddings", "type_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size ({self.hidden_size})"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if not 0 <= (getattr(self, name) or 0.0) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and a dropout must be at least 0 and below 1")
        if self.layer_norm_eps <= 0 or self.initializer_range < 0:
            raise ValueError("layer_norm_eps must be above 0, and initializer_range at least 0")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act '{self.hidden_act}' is not one of {', '.join(ACT2FN)}")
        if self.is_decoder or self.add_cross_attention:
            raise ValueError("is_decoder and add_cross_attention are for decoders, which these classes do not build")

    def to_dict(self):
        written = super().to_dict()
        names = written.get("architectures") or []
        written["architectures"] = [self._stock_architectures.get(name, name) for name in names] or None
        return written
