"""The model types that are trained in the tests as stock classes: one entry each, with small sizes."""

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE = {**WIDTHS, "num_key_value_heads": 1}
DECODERS = {
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3_moe": {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gemma3_text": {
        **LLAMA_LIKE, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]
    },
    "phi3": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "gpt_neox": WIDTHS,
    "opt": {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32
    },
    "smollm3": LLAMA_LIKE,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 4},
    "gpt_oss": {**LLAMA_LIKE, "head_dim": 16, "num_local_experts": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}  # fmt: skip
ENCODERS = {
    "roberta": WIDTHS,
    "modernbert": WIDTHS,
    "deberta-v2": WIDTHS,
    "electra": {**WIDTHS, "embedding_size": 32},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "albert": {**WIDTHS, "embedding_size": 16},
    "xlm-roberta": WIDTHS,
}
SIZES = {**DECODERS, **ENCODERS}


def stock_flags(tiny, name, **changed):
    """Return the flags of a run on files, for a process of its own."""
    tokenizer = "{train: bpe, vocab_size: 300}" if name in DECODERS else "{train: wordpiece, vocab_size: 120}"
    keys = dict.fromkeys(("n_layer", "n_head", "n_embd", "start_context"))
    return tiny(**keys | {"model": name, **SIZES[name], "tokenizer": tokenizer} | changed)
