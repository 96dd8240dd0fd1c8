"""Prints how far our classes are from the stock ones on the same weights: `python tests/models/parity.py`.

Largest absolute difference in fp32, over all variants of the tests: outputs, loss and gradients; outputs by plain
attention; outputs of rows padded on the left and on the right, where there is no padding; gradients with checkpointing.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import test_bert
import test_causal


def distance(mine, theirs):
    return max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))


def outputs(model, where=None, **inputs):
    found = [value for key, value in model(**inputs).items() if key != "loss" and torch.is_tensor(value)]
    return [value if where is None or value.shape[:2] != where.shape else value[where] for value in found]


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def compare(ours, stock, inputs, mask):
    """One row of the table: check -> difference."""
    row = {"outputs": distance(outputs(ours, **inputs), outputs(stock, **inputs))}
    real = mask.bool()
    padded = {**inputs, "attention_mask": mask}
    row["padded"] = distance(outputs(ours, real, **padded), outputs(stock, real, **padded))
    if len(inputs) > 1:
        row["loss"] = distance([ours(**inputs).loss], [stock(**inputs).loss])
        mine, theirs = gradients(ours, inputs), gradients(stock, inputs)
        row["gradients"] = distance([mine[name] for name in theirs], theirs.values())
        ours.gradient_checkpointing_enable()
        again = gradients(ours.train(), inputs)  # no dropout in these configurations
        row["checkpointed"] = distance([again[name] for name in theirs], theirs.values())
        ours.eval()
    for model in (ours, stock):
        model.set_attn_implementation("eager")
    row["eager"] = distance(outputs(ours, **inputs), outputs(stock, **inputs))
    return row


def rows():
    with tempfile.TemporaryDirectory() as folder:
        for family in test_causal.FAMILY.values():
            worst = {}
            for number, variant in enumerate(family.variants):
                ours, stock = family.pair(Path(folder) / f"{family.name}{number}", **variant)
                for model in (ours, stock):
                    model.set_attn_implementation(variant.get("attn_implementation", "sdpa"))
                inputs = {"input_ids": test_causal.batch(), "labels": test_causal.batch(seed=2), "use_cache": False}
                for check, value in compare(ours, stock, inputs, test_bert.PADDING).items():
                    worst[check] = max(worst.get(check, 0.0), value)
            yield f"{family.name}, {len(family.variants)} variants", family.stock, worst
        for head, (_, labels) in test_bert.LABELS.items():
            ours, stock = test_bert.pair(head, Path(folder) / head)
            inputs = {"input_ids": test_bert.batch(), **labels}
            yield "bert", f"Bert{head}", compare(ours, stock, inputs, test_bert.PADDING)


CHECKS = ("outputs", "loss", "gradients", "eager", "padded", "checkpointed")

if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"| family | stock class | {' | '.join(CHECKS)} |")
    print("|---" * (2 + len(CHECKS)) + "|")
    for family, stock, found in rows():
        values = ("" if check not in found else f"{found[check]:.0e}" if found[check] else "0" for check in CHECKS)
        print(f"| {family} | {stock} | {' | '.join(values)} |")
