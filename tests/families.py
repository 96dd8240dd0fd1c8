"""The table that all tests of families read: one entry per family, with its stock classes and its small sizes."""

from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_myllm.models import FAMILIES

BPE, WORDPIECE = "{train: bpe, vocab_size: 300}", "{train: wordpiece, vocab_size: 120}"


@dataclass(kw_only=True)
class FamilyCase:
    """A family in the tests."""

    stock: str  # prefix of the stock class names
    stock_generator: str | None = None  # the stock class that generates text
    sizes: dict  # configuration of a unit test's model: 97 tokens, 64 positions, width 48, 3 layers, 4 heads
    run_sizes: dict  # configuration of a model that trains in a second, apart from its vocabulary and positions
    no_dropout: dict = field(default_factory=dict)
    variants: list = field(default_factory=list)  # changes of `sizes` that are compared with the stock class
    tokenizer: str = BPE  # of a run
    start_context: str = "Anna"

    def __post_init__(self):
        self.name = self.family = None  # set below from the key

    @property
    def model_class(self):
        return next(iter(self.family.tasks.values()))

    def make_config(self, **changed):
        return self.family.config(**{**self.sizes, **self.no_dropout, **changed})

    def make_model(self, model_class=None, **changed):
        """Return a model with random weights; every bias and norm differs from its initial value."""
        torch.manual_seed(0)
        model = (model_class or self.model_class)(self.make_config(**changed))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    def make_pair(self, folder, **changed):
        """Return our model that generates text and the stock one with the same weights."""
        ours = self.make_model(**changed)
        ours.save_pretrained(folder)
        auto_class = AutoModelForCausalLM if self.family.is_decoder else AutoModelForSeq2SeqLM
        stock, loading = auto_class.from_pretrained(folder, output_loading_info=True)
        assert type(stock).__name__ == self.stock_generator
        assert not any(loading.values())
        return ours.eval(), stock.eval()

    def recipe(self):
        """Return the recipe keys that select a tiny model of this family."""
        return {"model": self.name, **self.run_sizes, "tokenizer": self.tokenizer, "start_context": self.start_context}

    def assert_trained(self, folder):
        """Assert that a folder holds a model of this family."""
        assert AutoConfig.from_pretrained(folder).model_type == self.family.config.model_type


COMMON = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 1}
WIDTHS = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA_SIZES = {**COMMON, **WIDTHS, "max_position_embeddings": 64, "num_key_value_heads": 2}
RUN_WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ROPE_VARIANTS = [
    {"rope_parameters": {"rope_theta": 500.0, **scaling}}
    for scaling in (
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
        {
            "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
        },
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    )
]  # fmt: skip

T5_SIZES = {"vocab_size": 97, "d_model": 48, "d_kv": 10, "d_ff": 80, "num_heads": 4}
BART_WIDTHS = {"d_model": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 70, "max_position_embeddings": 64}
BART_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 6}

CASES = {
    "gpt": FamilyCase(
        stock="GPT2",
        stock_generator="GPT2LMHeadModel",
        sizes={**COMMON, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4},
        run_sizes={"n_layer": 2, "n_head": 2, "n_embd": 32},
        no_dropout={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        variants=[
            {},
            {"activation_function": "gelu"},
            {"n_inner": 100, "tie_word_embeddings": False},
            {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
            {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
            {"attn_implementation": "eager"},
        ],
    ),
    "llama": FamilyCase(
        stock="Llama",
        stock_generator="LlamaForCausalLM",
        sizes=LLAMA_SIZES,
        run_sizes={**RUN_WIDTHS, "num_key_value_heads": 1},
        variants=[
            {},
            {"num_key_value_heads": 4, "tie_word_embeddings": True},
            {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 20},
            {"attn_implementation": "eager"},
            {"pad_token_id": 3, "rms_norm_eps": 1e-5, "hidden_act": "gelu"},
            *ROPE_VARIANTS,
        ],
        # a real Llama's is a unigram model too
        tokenizer="{train: unigram, vocab_size: 300}",
    ),
    "qwen3": FamilyCase(
        stock="Qwen3",
        stock_generator="Qwen3ForCausalLM",
        sizes={**LLAMA_SIZES, "head_dim": 16},
        run_sizes={**RUN_WIDTHS, "num_key_value_heads": 1, "head_dim": 16},
        variants=[
            {},
            {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
            {"attn_implementation": "eager"},
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "attn_implementation": "eager"},
            {"use_sliding_window": True, "sliding_window": 60, "max_window_layers": 0},
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True},
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}},
        ],
    ),
    "bert": FamilyCase(
        stock="Bert",
        sizes={"vocab_size": 97, **WIDTHS, "max_position_embeddings": 64},
        run_sizes=RUN_WIDTHS,
        no_dropout={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        tokenizer=WORDPIECE,
        start_context="Anna [MASK] the cat.",
    ),
    "t5": FamilyCase(
        stock="T5",
        stock_generator="T5ForConditionalGeneration",
        sizes={**T5_SIZES, "num_layers": 3, "num_decoder_layers": 2},
        run_sizes={"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
        no_dropout={"dropout_rate": 0.0},
        variants=[
            {},
            {"attn_implementation": "eager"},
            {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},  # T5 1.1
            {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 8},
            {"relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-3},
        ],
        tokenizer="{train: unigram, vocab_size: 400}",  # of which 100 are sentinels
        start_context="Anna <extra_id_0> the cat.",
    ),
    "bart": FamilyCase(
        stock="Bart",
        stock_generator="BartForConditionalGeneration",
        sizes={"vocab_size": 97, **BART_WIDTHS, **BART_HEADS, "encoder_layers": 3, "decoder_layers": 2},
        run_sizes={
            **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        },
        no_dropout={"dropout": 0.0},
        variants=[
            {},
            {"attn_implementation": "eager"},
            {"scale_embedding": True, "activation_function": "gelu_new"},
            {"encoder_layers": 1, "decoder_layers": 3},
        ],
    ),
}
assert list(CASES) == list(FAMILIES), "add an entry to CASES for every family"
for name, case in CASES.items():
    case.name, case.family = name, FAMILIES[name]
DECODERS = {name: case for name, case in CASES.items() if case.family.is_decoder}
ENCODER_DECODERS = {name: case for name, case in CASES.items() if case.family.config.is_encoder_decoder}
