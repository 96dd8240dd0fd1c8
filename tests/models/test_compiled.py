"""What a compiled training step computes and stores. The compiler's code for a CPU is read here, not run."""

import re

import pytest
import torch
from families import DECODERS
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code

from hf_myllm.precision import cast_to_bf16


def training_batch():
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, 1)
    labels[0, 3:9] = -100
    count = torch.tensor(60)
    inputs = {"input_ids": ids, "shift_labels": labels, "num_items_in_batch": count}
    return inputs | {"use_cache": False, "skip_logits": True}


@pytest.mark.parametrize(("name", "trains_head"), [("gpt", True), ("gpt", False), ("llama", True)])
def test_the_compiled_loss_and_its_gradients_equal_the_uncompiled(name, trains_head):
    model = DECODERS[name].make_model(tie_word_embeddings=False, num_hidden_layers=1).train()
    model.lm_head.weight.requires_grad_(trains_head)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (model, step):
        model.zero_grad()
        loss = forward(**training_batch()).loss
        (3 * loss).backward()  # as the loss is scaled for ranks and micro-batches
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    assert ("lm_head.weight" in results[0][1]) == trains_head
    with torch.no_grad():
        torch.testing.assert_close(step(**training_batch()).loss, results[0][0])


def test_a_compiled_step_stores_the_logits_once_and_in_bf16(monkeypatch):
    """One buffer: the gradient of the logits overwrites them, and nothing of their size is kept in fp32."""
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *args, **options: lambda *tensors: None)
    model = DECODERS["gpt"].make_model(n_layer=1).train()
    cast_to_bf16(model)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**training_batch()).loss
        loss.backward()

    with torch._inductor.config.patch(fx_graph_cache=False):
        _, code = run_and_get_code(torch.compile(step))
    buffers = re.findall(r"= empty_strided_cpu\(\((?:66, 97|2, 33, 97)\), \([\d, ]+\), (\S+)\)", "\n".join(code))
    assert buffers == ["torch.bfloat16"]
