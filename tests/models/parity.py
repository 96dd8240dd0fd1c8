"""Print the largest difference between our classes and the stock ones: `python tests/models/parity.py`.

Same weights, fp32, all variants of tests/families.py. Columns: outputs, loss and gradients; outputs with eager
attention; outputs of rows padded on the left and on the right, except at padding; gradients with checkpointing.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import test_bert
import test_causal
import test_encoder_decoder
from families import DECODERS, ENCODER_DECODERS

CHECKS = ("outputs", "loss", "gradients", "eager", "padded", "checkpointed")


def max_difference(mine, theirs):
    return max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))


def outputs(model, mask=None, **inputs):
    tensors = [value for key, value in model(**inputs).items() if key != "loss" and torch.is_tensor(value)]
    return [value if mask is None or value.shape[:2] != mask.shape else value[mask] for value in tensors]


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def compare(ours, stock, inputs, mask):
    """Return one row of the table: check -> difference."""
    row = {"outputs": max_difference(outputs(ours, **inputs), outputs(stock, **inputs))}
    is_token = mask.bool()
    padded = {**inputs, "attention_mask": mask}
    row["padded"] = max_difference(outputs(ours, is_token, **padded), outputs(stock, is_token, **padded))
    if len(inputs) > 1:
        row["loss"] = max_difference([ours(**inputs).loss], [stock(**inputs).loss])
        mine, theirs = gradients(ours, inputs), gradients(stock, inputs)
        row["gradients"] = max_difference([mine[name] for name in theirs], theirs.values())
        ours.gradient_checkpointing_enable()
        mine = gradients(ours.train(), inputs)  # these configurations have no dropout
        row["checkpointed"] = max_difference([mine[name] for name in theirs], theirs.values())
        ours.eval()
    for model in (ours, stock):
        model.set_attn_implementation("eager")
    row["eager"] = max_difference(outputs(ours, **inputs), outputs(stock, **inputs))
    return row


def table():
    with tempfile.TemporaryDirectory() as folder:
        for family in [*DECODERS.values(), *ENCODER_DECODERS.values()]:
            worst = {}
            for index, variant in enumerate(family.variants):
                ours, stock = family.make_pair(Path(folder) / f"{family.name}{index}", **variant)
                for model in (ours, stock):
                    model.set_attn_implementation(variant.get("attn_implementation", "sdpa"))
                inputs = {"input_ids": test_causal.batch(), "labels": test_causal.batch(seed=2)}
                if family.name in ENCODER_DECODERS:
                    inputs = test_encoder_decoder.batch()
                inputs["use_cache"] = False
                for check, value in compare(ours, stock, inputs, test_bert.PADDING).items():
                    worst[check] = max(worst.get(check, 0.0), value)
            yield f"{family.name}, {len(family.variants)} variants", family.stock_generator, worst
        for head, (_, labels) in test_bert.LABELS.items():
            ours, stock = test_bert.pair(head, Path(folder) / head)
            inputs = {"input_ids": test_bert.batch(), **labels}
            yield "bert", f"Bert{head}", compare(ours, stock, inputs, test_bert.PADDING)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"| family | stock class | {' | '.join(CHECKS)} |")
    print("|---" * (2 + len(CHECKS)) + "|")
    for family, stock, row in table():
        values = ("" if check not in row else f"{row[check]:.0e}" if row[check] else "0" for check in CHECKS)
        print(f"| {family} | {stock} | {' | '.join(values)} |")
