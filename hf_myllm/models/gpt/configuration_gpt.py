"""GPT's configuration: GPT-2's, and on disk nothing else."""

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config
from transformers.activations import ACT2FN


@strict
class GPTConfig(GPT2Config):
    """[`GPT2Config`], with the same fields and the same `model_type`, for the classes of this folder.

    What it writes is a stock GPT-2 configuration: `architectures` names the stock class, so that every tool that
    reads GPT-2 reads our folders, with no custom code. It is never registered with `AutoConfig`.

    Raises:
        ValueError: `n_head` does not divide `n_embd`, a value is out of range, or cross-attention is asked for.
    """

    _stock_architectures = {
        "GPTModel": "GPT2Model",
        "GPTForCausalLM": "GPT2LMHeadModel",
        "GPTForSequenceClassification": "GPT2ForSequenceClassification",
    }

    def validate_architecture(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least 1")
        if self.layer_norm_epsilon <= 0 or self.initializer_range < 0:
            raise ValueError("layer_norm_epsilon must be above 0, and initializer_range at least 0")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"n_inner is {self.n_inner}, and must be at least 1, or null for 4 * n_embd")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and a dropout must be at least 0 and below 1")
        if self.activation_function not in ACT2FN:
            raise ValueError(f"activation_function '{self.activation_function}' is not one of {', '.join(ACT2FN)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head ({self.n_head}) must divide n_embd ({self.n_embd})")
        if self.add_cross_attention:
            raise ValueError("add_cross_attention is for encoder-decoder models, which this class does not build")

    def to_dict(self):
        # Here rather than in save_pretrained, so that push_to_hub and config.json agree.
        written = super().to_dict()
        names = written.get("architectures") or []
        written["architectures"] = [self._stock_architectures.get(name, name) for name in names] or None
        written["n_ctx"] = self.n_positions  # GPT-2's first configurations had it, and converters to GGUF still read it
        return written
