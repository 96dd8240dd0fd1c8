"""Llama's configuration: the stock one, and on disk nothing else."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.activations import ACT2FN


@strict
class MyLlamaConfig(LlamaConfig):
    """[`LlamaConfig`], with the same fields and the same `model_type`, for the classes of this folder.

    What it writes is a stock Llama configuration, `architectures` naming the stock class. It is never registered with
    `AutoConfig`.

    Raises:
        ValueError: the heads do not divide the width, the key-value heads do not divide the heads, a head's size is
            odd, or a value is out of range.
    """

    _stock_architectures = {
        "MyLlamaModel": "LlamaModel",
        "MyLlamaForCausalLM": "LlamaForCausalLM",
        "MyLlamaForSequenceClassification": "LlamaForSequenceClassification",
    }

    def validate_architecture(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size ({self.hidden_size})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, and rotary embeddings turn pairs: it must be even")
        if not 0 <= (self.attention_dropout or 0.0) < 1:
            raise ValueError(f"attention_dropout is {self.attention_dropout}, and must be at least 0 and below 1")
        if self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps is {self.rms_norm_eps}, and must be above 0")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act '{self.hidden_act}' is not one of {', '.join(ACT2FN)}")

    def to_dict(self):
        written = super().to_dict()
        names = written.get("architectures") or []
        written["architectures"] = [self._stock_architectures.get(name, name) for name in names] or None
        # as transformers 4 calls it, which would take 10000 and no scaling for granted; 5 reads rope_parameters
        rope = dict(written.get("rope_parameters") or {})
        if "rope_theta" in rope:
            written["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            written["rope_scaling"] = rope
        return written
