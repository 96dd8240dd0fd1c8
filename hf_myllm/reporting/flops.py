"""The FLOPs and the memory of a training step, and the peak of a GPU, for the model FLOPs utilization (MFU)."""

import re

from torch import nn

from ..models.decoder import get_layer_types
from ..models.stock import LAYER_TYPES
from ..optim import hidden_matrices
from ..precision import layers

# GPU, as a pattern for its whole name without the maker -> peak dense tensor-core TFLOP/s with fp32 accumulation, by
# precision. From NVIDIA's data sheets, and for GeForce from the architecture papers; where they state the rate with
# sparsity, half of it.
_PEAK_TFLOPS = {
    r"GB200": {"bf16": 2500, "fp8": 5000},
    r"B200": {"bf16": 2250, "fp8": 4500},
    r"H200|GH200 \d+GB?( HBM3e)?|H100 \d+GB HBM\w+": {"bf16": 989, "fp8": 1979},
    r"H200 NVL|H100 NVL": {"bf16": 835, "fp8": 1671},
    r"H100 PCIe": {"bf16": 756, "fp8": 1513},
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": {"bf16": 312},
    r"A40": {"bf16": 149.7},
    r"A30": {"bf16": 165},
    r"A10": {"bf16": 125},
    r"A10G": {"bf16": 70},
    r"L40S": {"bf16": 362, "fp8": 733},
    r"L40": {"bf16": 181, "fp8": 362},
    r"L4": {"bf16": 121, "fp8": 242},
    r"RTX 6000 Ada Generation": {"bf16": 364, "fp8": 728},
    r"RTX A6000": {"bf16": 154.8},
    r"GeForce RTX 5090": {"bf16": 209.5, "fp8": 419},
    r"GeForce RTX 4090": {"bf16": 165.2, "fp8": 330.3},
    r"GeForce RTX 3090": {"bf16": 71},
    r"T4": {"fp16": 65},
    r"V100-SXM\d-\d+GB": {"fp16": 125},
    r"V100-PCIE-\d+GB": {"fp16": 112},
}

_CROSS_KEYS = r"\.(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj)\."  # of a decoder's attention to the encoder


def peak_flops(device_name, precision):
    """Return the peak FLOP/s of a GPU in a precision, or None if it is unknown.

    Args:
        device_name: as `torch.cuda.get_device_name` returns it.
        precision: "bf16", "fp16" or "fp8"; of others nothing is known.
    """
    name = re.sub("^(NVIDIA|Tesla) ", "", device_name)
    for pattern, peaks in _PEAK_TFLOPS.items():
        if re.fullmatch(pattern, name):
            peaks = {"fp16": peaks.get("bf16")} | peaks
            return peaks[precision] * 1e12 if peaks.get(precision) else None
    return None


def flops_per_token(model, length, head_share=1.0):
    """Return the FLOPs of a training step per token (Chowdhery et al. 2022, "PaLM", appendix B); None if unknown.

    A token costs 6 FLOPs for each parameter that it is multiplied with, 4 if the parameter is frozen, and the attention
    scores. Looking up an embedding costs nothing, unless the head multiplies with it too. Of an encoder-decoder, the
    tokens are those of the encoder; of a mixture of experts, only those that a token is sent to count.

    Args:
        length: tokens per row.
        head_share: the share of the tokens that the language-modeling head runs on; of an encoder-decoder, the tokens
            of the decoder per token of the encoder.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not _has_plain_attention(model):
        return None
    body, head = set(model.base_model.parameters()), getattr(model.get_output_embeddings(), "weight", None)
    looked_up = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)} - {head}
    config, decoder = model.config, set()
    if config.is_encoder_decoder:  # whose keys and values of the encoder's output are computed for the encoder's tokens
        named = model.get_decoder().named_parameters()
        decoder = {parameter for name, parameter in named if not re.search(_CROSS_KEYS, name)}
    flops = 0
    for name, parameter in model.named_parameters():  # a shared one once
        if parameter in looked_up:
            continue
        is_partial = parameter is head or parameter in decoder or parameter not in body
        share = head_share if is_partial else 1.0
        if "experts" in name:
            share *= config.num_experts_per_tok / len(parameter)
        flops += share * (6 if parameter.requires_grad else 4) * parameter.numel()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # of layers with attention within a row; a decoder of an encoder-decoder also attends to the encoder
    windows = [config.sliding_window if kind == "sliding_attention" else length for kind in get_layer_types(config)]
    lengths = sum(min(length, window) for window in windows)
    lengths += num_decoder_layers(config) * head_share * (1 + head_share) * length
    return flops + 12 * lengths * config.num_attention_heads * head_dim


def _has_plain_attention(model):
    """Return whether each layer of a model has its own attention with equal heads and, of experts, a known share."""
    config, blocks = model.config, layers(model)
    needed, others = (
        ("num_hidden_layers", "num_attention_heads", "hidden_size"),
        ("kv_lora_rank", "attention_hidden_size", "relative_attention"),
    )
    if not all(hasattr(config, name) for name in needed) or any(hasattr(config, name) for name in others):
        return False
    experts = [parameter for name, parameter in model.named_parameters() if "experts" in name]
    return (
        len(blocks) == config.num_hidden_layers + num_decoder_layers(config)
        and all(any("Attention" in type(module).__name__ for module in block.modules()) for block in blocks)
        and set(get_layer_types(config)) <= set(LAYER_TYPES)
        and (not experts or hasattr(config, "num_experts_per_tok"))
    )


def num_decoder_layers(config):
    """Return the number of layers in the decoder of an encoder-decoder; 0 for other models."""
    names = ("decoder_layers", "num_decoder_layers") if config.is_encoder_decoder else ()
    return next((getattr(config, name) for name in names if hasattr(config, name)), 0)


def memory_per_rank(
    model,
    tokens,
    logits_share=1.0,
    shards=1,
    is_16_bit=False,
    bytes_per_weight=4,
    optimizer="adamw",
    has_average=False,
    checkpoints_layers=False,
    compiles=False,
):
    """Return an estimate of the bytes of a rank: {what they hold: bytes}.

    It counts parameters, gradients and moments (two of AdamW, one of Muon); what fully_shard holds unsharded;
    activations after Korthikanti et al. 2022, "Reducing Activation Recomputation" (34 bytes per token, layer and hidden
    unit in 16 bits, without the attention scores, which the attention kernels do not store); and the logits with their
    gradient.

    Args:
        tokens: of a micro-batch.
        logits_share: the share of the tokens that have logits.
        shards: the ranks over which a parameter is sharded.
        has_average: whether there is a moving average of the weights, in 4 bytes each.
        checkpoints_layers: whether the layers' activations are computed again in the backward pass.
        compiles: whether the model is compiled.
    """
    config, unit = model.config, 1 if is_16_bit else 2
    trained, moments = model.num_parameters(only_trainable=True), 2 * model.num_parameters(only_trainable=True)
    if optimizer == "muon":
        moments -= sum(matrix.numel() for matrix in hidden_matrices(model) if matrix.requires_grad)
    state = (model.num_parameters() + trained + moments) * bytes_per_weight + 4 * trained * has_average
    gathered = 0
    if shards > 1:
        layer, root = unsharded_units(model)
        weights, gradients = root + 2 * layer, max(root, layer)  # the next layer is gathered while one runs
        gathered = 2 * unit * weights + (2 * unit + 4) * gradients  # gradients are summed in fp32
    # A decoder's layer that attends to an encoder too stores about 1.4 times as much.
    num_layers = config.num_hidden_layers + 1.4 * num_decoder_layers(config) * logits_share
    per_unit = 34 + 2 * num_layers if checkpoints_layers else 34 * num_layers  # one layer at a time is computed again
    # Logits in fp32 with their gradient; the compiled loss does not store the fp32 copy.
    per_logit = (4 if is_16_bit else 8) if compiles else (10 if is_16_bit else 12)
    return {
        "weights and optimizer": state / shards,
        "gathered weights": gathered,
        "activations": tokens * config.hidden_size * unit * per_unit,
        "logits": tokens * logits_share * config.vocab_size * per_logit,
    }


def unsharded_units(model):
    """Return the numbers of parameters that fully_shard gathers together: of the largest layer, and of what is beside
    the layers, the embeddings and the head."""
    in_layers = [{parameter for parameter in layer.parameters()} for layer in layers(model)]
    everything = sum(parameter.numel() for parameter in set().union(*in_layers))
    return max(sum(p.numel() for p in layer) for layer in in_layers), model.num_parameters() - everything
