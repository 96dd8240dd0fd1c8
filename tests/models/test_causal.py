"""Every decoder family computes what its stock class computes: files, logits, loss, gradients and generated text."""

import importlib
import json

import pytest
import torch
from families import DECODERS
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    pipeline,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import find_labels

from hf_myllm.models import decoder
from hf_myllm.precision import cast_to_bf16

families = pytest.mark.parametrize("family", DECODERS.values(), ids=DECODERS)
# Compiling takes seconds, and Qwen3 compiles what Llama does, with two more norms.
compiled_families = pytest.mark.parametrize(
    "family",
    [pytest.param(case, marks=[pytest.mark.chaos] * (name == "qwen3")) for name, case in DECODERS.items()],
    ids=DECODERS,
)


def batch(rows=2, length=33, seed=1):
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


VARIANTS = [(family, variant) for family in DECODERS.values() for variant in family.variants]


@pytest.mark.parametrize(
    ("family", "variant"), VARIANTS, ids=[f"{family.name}-{variant}" for family, variant in VARIANTS]
)
def test_logits_loss_and_gradients_equal_stock(tmp_path, family, variant):
    ours, stock = family.make_pair(tmp_path, **variant)
    if "attn_implementation" in variant:
        stock.set_attn_implementation(variant["attn_implementation"])
        ours.set_attn_implementation(variant["attn_implementation"])
    ids, labels = batch(length=50), batch(length=50, seed=2)
    labels[0, 5:9] = -100
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)
    mine, theirs = (model(ids, labels=labels, use_cache=False) for model in (ours, stock))  # as in training
    torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=0)
    mine.loss.backward()
    theirs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=0)


@families
def test_padding_positions_and_embeddings_equal_stock(tmp_path, family):
    ours, stock = family.make_pair(tmp_path)
    ids, mask = batch(), torch.ones(2, 33, dtype=torch.long)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    packed = torch.cat([torch.arange(20), torch.arange(13)]).expand(2, -1)
    cases = [
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions},
        {"input_ids": ids, "attention_mask": mask.flip(1)},
        {"input_ids": ids, "position_ids": packed, "use_cache": False},
        {"inputs_embeds": torch.randn(2, 33, 48)},
        {"input_ids": ids, "logits_to_keep": 3},
    ]
    if family.name == "gpt":
        cases.append({"input_ids": ids, "token_type_ids": batch(seed=3)})
    for inputs in cases:
        torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=0)


@families
def test_hidden_states_and_attentions_equal_stock(tmp_path, family):
    ours, stock = family.make_pair(tmp_path)
    for model in (ours, stock):
        model.set_attn_implementation("eager")
    mine = ours(batch(), output_hidden_states=True, output_attentions=True)
    theirs = stock(batch(), output_hidden_states=True, output_attentions=True)
    assert len(mine.hidden_states) == len(theirs.hidden_states) == 4
    for a, b in zip(mine.hidden_states + mine.attentions, theirs.hidden_states + theirs.attentions, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@families
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_equals_stock(tmp_path, family, use_cache, beams):
    ours, stock = family.make_pair(tmp_path)
    padded = batch(3, 12)
    mask = torch.ones_like(padded)
    mask[0, :5], mask[2, :1] = 0, 0  # left padding, as in batches for generation
    settings = {"max_new_tokens": 20, "do_sample": False, "use_cache": use_cache, **beams}
    settings |= {"pad_token_id": 0, "eos_token_id": None}
    mine = ours.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(mine, stock.generate(padded, attention_mask=mask, **settings))
    alone = ours.generate(padded[:1, 5:], **settings)  # padding does not change what a row generates
    assert torch.equal(alone[0, 7:], mine[0, 12:])


@families
def test_generation_with_a_static_cache_equals_stock(tmp_path, family):
    ours, stock = family.make_pair(tmp_path)
    settings = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    settings |= {"pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(batch(2, 9), **settings), stock.generate(batch(2, 9), **settings))


@families
def test_saved_folder_is_a_stock_checkpoint(tmp_path, family):
    family.make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [family.stock_generator]
    assert config["model_type"] == family.family.config.model_type
    assert not {"auto_map", "_name_or_path"} & set(config)
    weights = load_file(tmp_path / "model.safetensors")
    stock = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    if config["tie_word_embeddings"]:
        expected.pop("lm_head.weight")
    assert {name: tensor.shape for name, tensor in weights.items()} == expected


@families
def test_stock_checkpoint_loads(tmp_path, family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.family.config.model_type, **family.sizes, **family.no_dropout)
    stock = AutoModelForCausalLM.from_config(config).eval()
    stock.save_pretrained(tmp_path)
    ours, loading = family.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    torch.testing.assert_close(ours(batch()).logits, stock(batch()).logits, atol=1e-5, rtol=0)
    module = importlib.import_module(f"hf_myllm.models.{family.name}")
    body_class = getattr(module, family.model_class.__name__.replace("ForCausalLM", "Model"))
    body, loading = body_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    body.save_pretrained(tmp_path / "body")  # the model without a head loads both ways too
    again = AutoModel.from_pretrained(tmp_path / "body")
    expected = stock.base_model(batch()).last_hidden_state
    torch.testing.assert_close(again(batch()).last_hidden_state, expected, atol=1e-5, rtol=0)


@families
def test_sharded_save_and_bf16_load(tmp_path, family):
    ours = family.make_model().eval()
    ours.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = family.model_class.from_pretrained(tmp_path).eval()
    assert torch.equal(again(batch()).logits, ours(batch()).logits)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(stock(batch()).logits, ours(batch()).logits, atol=1e-5, rtol=0)
    assert family.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@families
def test_resized_embeddings_stay_tied(tmp_path, family):
    ours = family.make_model(tie_word_embeddings=True)
    ours.resize_token_embeddings(120)
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    ours.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.out_features == 120


@compiled_families
@pytest.mark.parametrize("compiled", [False, True])
def test_causal_training_builds_no_mask(family, compiled, monkeypatch):
    """The sdpa kernel gets is_causal and no mask of length x length."""
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask is None, is_causal))
        return attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    def forbid(*args, **kwargs):
        raise AssertionError("a mask was built")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    for module in (decoder, importlib.import_module(family.model_class.__module__)):
        for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, forbid)
    model = family.make_model().train()
    # aot_eager traces the whole graph, forward and backward, without a C++ compiler
    step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    loss = step(input_ids=batch(), shift_labels=batch(), use_cache=False, num_items_in_batch=torch.tensor(66)).loss
    loss.backward()
    assert seen
    assert all(pair == (True, True) for pair in seen)


@compiled_families
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()  # flex attention has no backward pass on a CPU
def test_packed_documents_do_not_attend_to_each_other(family, attention):
    """Positions that restart separate documents; on a GPU, training uses flex attention for this."""
    ours = family.make_model().eval()
    ours.set_attn_implementation(attention)
    lengths = [(13, 20), (5, 28)]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    first = torch.tensor([[True] * a + [False] * b for a, b in lengths])
    before, other = ours(batch(), position_ids=positions, use_cache=False).logits, batch()
    other[first] = batch(seed=9)[first]
    after = ours(other, position_ids=positions, use_cache=False).logits
    assert torch.equal(before[~first], after[~first])
    assert not torch.equal(before[first], after[first])
    alone = ours(batch()[:1, 13:], use_cache=False).logits  # the same as in a row of its own
    torch.testing.assert_close(before[:1, 13:], alone, atol=1e-5, rtol=0)


@compiled_families
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_training_on_packed_documents_compiles_to_one_graph(family, attention):
    """Flex attention has no backward pass on a CPU; its forward pass includes the block mask."""
    model = family.make_model().train()
    model.set_attn_implementation(attention)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = {"shift_labels": batch(), "use_cache": False, "num_items_in_batch": torch.tensor(66)}
    with (
        torch.set_grad_enabled(attention == "sdpa"),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        for lengths in ((13, 20), (5, 28)):
            positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
            loss = step(input_ids=batch(), position_ids=positions, **inputs).loss
            if attention == "sdpa":
                loss.backward()
            model.set_attn_implementation("sdpa")
            torch.testing.assert_close(loss, model(input_ids=batch(), position_ids=positions, **inputs).loss)
            model.set_attn_implementation(attention)


@families
def test_skip_logits_returns_the_same_loss(family):
    model = family.make_model().eval()
    outputs = model(batch(), labels=batch(), skip_logits=True)
    assert outputs.logits is None
    assert torch.equal(outputs.loss, model(batch(), labels=batch()).loss)


@families
def test_layers_exchange_bf16_under_autocast_only(family):
    plain, cast = family.make_model().eval(), family.make_model().eval()
    cast_to_bf16(cast)
    seen = []
    for layer in cast.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    assert torch.equal(plain(batch()).logits, cast(batch()).logits)
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cast(batch(), labels=batch()).loss
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(loss.float(), plain(batch(), labels=batch()).loss, atol=0.03, rtol=0)


@families
def test_gradient_checkpointing_keeps_the_gradients(family):
    plain, checkpointed = family.make_model().train(), family.make_model().train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(batch(), labels=batch(), use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@families
def test_state_dicts_are_interchangeable_with_stock(tmp_path, family):
    """The library's Trainer resumes by load_state_dict, without conversion."""
    ours, stock = family.make_pair(tmp_path)
    again = family.model_class(ours.config).eval()
    again.load_state_dict(stock.state_dict())
    torch.testing.assert_close(again(batch()).logits, stock(batch()).logits, atol=1e-5, rtol=0)
    stock.load_state_dict(ours.state_dict())


@families
def test_the_trainer_recognizes_labels_and_model_type(family):
    assert find_labels(family.model_class) == ["labels"]  # the Trainer would expect every other label in every batch
    # The Trainer shifts the labels of these models for label smoothing.
    assert family.make_model()._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@families
def test_a_cache_does_not_break_gradient_checkpointing(family):
    plain, checkpointed = family.make_model().train(), family.make_model().train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(batch(), labels=batch(), past_key_values=DynamicCache(config=model.config)).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@families
def test_shift_labels_equal_shifted_labels(family):
    ours = family.make_model()
    ids = batch()
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    assert torch.equal(ours(ids, labels=ids).loss, ours(ids, shift_labels=shifted).loss)
    summed = ours(ids, shift_labels=shifted, num_items_in_batch=1).loss
    torch.testing.assert_close(summed / 64, ours(ids, labels=ids).loss)


@families
@pytest.mark.parametrize("tokens", ["gpt2", "llama2"])
def test_real_tokenizers_and_text_equal_stock(assets, tmp_path, family, tokens):
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / tokens)
    text = (assets / "corpora" / "tinyshakespeare.txt").read_text()[:4000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[:512].view(2, 256)
    positions = family.family.config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ours, stock = family.make_pair(tmp_path, vocab_size=len(tokenizer), **{positions: 256}, **ends)
    mine, theirs = ours(ids, labels=ids), stock(ids, labels=ids)
    torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=0)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    outputs = generator("ROMEO:", max_new_tokens=5, do_sample=False, return_tensors=True)
    start = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("ROMEO:")["input_ids"]])
    generated = ours.generate(start, max_new_tokens=5, do_sample=False)[0]
    assert outputs[0]["generated_token_ids"] == generated.tolist()


@families
def test_sequence_classifier_equals_stock(tmp_path, family):
    """With padding on both sides, for the three problem types, and as a stock checkpoint."""
    classifier = family.family.tasks["classification"]
    ours = classifier(family.make_config(num_labels=3, pad_token_id=0)).eval()
    ours.save_pretrained(tmp_path)
    stock, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    assert type(stock).__name__ == f"{family.stock}ForSequenceClassification"
    ids, mask = batch(), torch.ones_like(batch())
    ids[ids == 0] = 5
    ids[0, -3:], mask[0, -3:], ids[1, :4], mask[1, :4] = 0, 0, 0, 0
    problem_types = {
        "single_label_classification": torch.arange(len(ids)) % 3,
        "multi_label_classification": torch.rand(len(ids), 3).round(),
        "regression": torch.rand(len(ids), 3),
    }
    for problem_type, labels in problem_types.items():
        results = []
        for model in (ours, stock.eval()):
            model.config.problem_type = problem_type
            model.zero_grad()
            outputs = model(ids, attention_mask=mask, labels=labels)
            outputs.loss.backward()
            results.append(
                (outputs.logits, outputs.loss, model.score.weight.grad, model.get_input_embeddings().weight.grad)
            )
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="pad_token_id is not set"):
        classifier(family.make_config(num_labels=3, pad_token_id=None))(ids)
