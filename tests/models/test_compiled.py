"""What a compiled training step computes and stores. The compiler's code for a CPU is read here, not run."""

import re

import pytest
import torch
from families import DECODERS
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from transformers.pytorch_utils import Conv1D

from hf_myllm.models.stock import project
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


def test_the_loss_compiled_by_itself_equals_the_uncompiled():
    """As FSDP2 compiles it: the layers, the embeddings and the last norm are not part of its graph."""
    model = DECODERS["gpt"].make_model(num_hidden_layers=1).train()
    results = []
    for compute_loss in (model.compute_loss, torch.compile(model.compute_loss, fullgraph=True, backend="aot_eager")):
        model.compute_loss = compute_loss
        model.zero_grad()
        loss = model(**training_batch()).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


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


@pytest.mark.parametrize("layer", [torch.nn.Linear(6, 8), Conv1D(8, 6)])
def test_the_compiled_gradient_of_a_bias_is_that_of_the_layer(layer):
    graphs, inputs = [], torch.randn(2, 5, 6, requires_grad=True)

    def step(project):
        torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(0))
        layer.zero_grad()
        inputs.grad = None
        output = project(layer, inputs)
        output.square().sum().backward()
        return output.detach(), inputs.grad, layer.weight.grad, layer.bias.grad

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        project, fullgraph=True, backend=aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=keep)
    )
    torch.testing.assert_close(step(compiled), step(lambda layer, inputs: layer(inputs)))
    sums = [node.args[1] for node in graphs[0].graph.nodes if node.target == torch.ops.aten.sum.dim_IntList]
    assert sums == [[1], [0]]  # over the positions of a row, then over rows
