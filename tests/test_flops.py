"""The peak of a GPU by its name, and the FLOPs of a step: what the MFU is made of."""

import pytest
from families import CASES

from hf_myllm.reporting.flops import flops_per_token, peak_flops

NAMES = {  # as torch.cuda.get_device_name returns them -> TFLOP/s in bf16, in fp8
    "NVIDIA H100 80GB HBM3": (989, 1979),
    "NVIDIA H100 PCIe": (756, 1513),
    "NVIDIA H100 NVL": (835, 1671),
    "NVIDIA H200": (989, 1979),
    "NVIDIA H200 NVL": (835, 1671),
    "NVIDIA GH200 480GB": (989, 1979),
    "NVIDIA B200": (2250, 4500),
    "NVIDIA GB200": (2500, 5000),
    "NVIDIA A100-SXM4-80GB": (312, None),
    "NVIDIA A100-PCIE-40GB": (312, None),
    "NVIDIA A100 80GB PCIe": (312, None),
    "NVIDIA A40": (149.7, None),
    "NVIDIA A10G": (70, None),
    "NVIDIA A10": (125, None),
    "NVIDIA L4": (121, 242),
    "NVIDIA L40": (181, 362),
    "NVIDIA L40S": (362, 733),
    "NVIDIA RTX A6000": (154.8, None),
    "NVIDIA RTX 6000 Ada Generation": (364, 728),
    "NVIDIA GeForce RTX 4090": (165.2, 330.3),
    "NVIDIA GeForce RTX 3090": (71, None),
    "Tesla T4": (None, None),
    "Tesla V100-SXM2-16GB": (None, None),
}
UNKNOWN = (
    *("NVIDIA RTX A1000", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA H20"),
    *(
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L400",
        "AMD Instinct MI300X",
        "NVIDIA",
    ),
)


@pytest.mark.parametrize("name", NAMES)
def test_peak_of_a_gpu_by_its_name(name):
    for precision, tflops in zip(("bf16", "fp8"), NAMES[name], strict=True):
        assert peak_flops(name, precision) == (tflops and pytest.approx(tflops * 1e12))
    assert peak_flops(name, "fp32") is None


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_a_gpu_that_is_not_known_has_no_peak(name, precision):
    assert peak_flops(name, precision) is None


def test_peak_in_fp16():
    assert peak_flops("NVIDIA H200", "fp16") == peak_flops("NVIDIA H200", "bf16")
    assert peak_flops("Tesla T4", "fp16") == 65e12
    assert peak_flops("Tesla V100-PCIE-32GB", "fp16") == 112e12


def flops(family, task, length=64, head_share=1.0, **changed):
    return flops_per_token(CASES[family].make_model(CASES[family].family.tasks[task], **changed), length, head_share)


def test_flops_of_a_token():
    """Those of a GPT of width 48 by hand: 12 width^2 per layer and biases and norms, the head, the attention."""
    width, layers, vocabulary, length = 48, 3, 97, 64
    per_layer = 12 * width**2 + (3 + 1 + 4 + 1) * width + 4 * width
    parameters = layers * per_layer + 2 * width + vocabulary * width
    assert flops("gpt", "causal") == 6 * parameters + 12 * layers * width * length


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_embeddings_that_are_only_looked_up_cost_nothing(family):
    tied, untied = (flops(family, "causal", tie_word_embeddings=tied) for tied in (True, False))
    assert tied == untied
    assert flops(family, "classification", num_labels=2, pad_token_id=0) == untied - 6 * (97 - 2) * 48


def test_the_head_of_a_masked_lm_costs_what_it_runs_on():
    whole, share = flops("bert", "mlm"), flops("bert", "mlm", head_share=0.15)
    head = 97 * 48 + 97 + 48 * 48 + 48 + 2 * 48
    assert whole - share == pytest.approx(0.85 * 6 * head)


def test_a_frozen_parameter_has_no_gradient_to_compute():
    model = CASES["llama"].make_model()
    trained = flops_per_token(model, 64)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert flops_per_token(model, 64) == trained - 2 * weight.numel()


def test_the_decoder_of_an_encoder_decoder_runs_on_its_own_tokens():
    """Those of a T5 by hand; keys and values of the encoder's output are computed for each token of the encoder."""
    width, inner, length, share = 48, 40, 64, 0.25
    projection, feed_forward = width * inner, 2 * width * 80
    encoder = 3 * (4 * projection + feed_forward + 2 * width) + width + 2 * 2 * projection
    decoder = 2 * (6 * projection + feed_forward + 3 * width) + width + 97 * width
    attention = 12 * inner * length * (3 + 2 * share * (1 + share))
    assert flops("t5", "seq2seq", length, share) == 6 * (encoder + share * decoder) + attention


def test_attention_counts_the_width_of_its_heads():
    """Qwen3's heads need not add up to the width."""
    base, longer = (flops("qwen3", "causal", length) for length in (64, 65))
    assert longer - base == 12 * 3 * (4 * 16)
