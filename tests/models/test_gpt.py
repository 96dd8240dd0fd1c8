"""GPT is GPT-2: same files, same logits, same loss, same gradients, same text."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline

from hf_myllm.models.gpt import GPTConfig, GPTForCausalLM, GPTModel

SIZES = dict(vocab_size=97, n_positions=64, n_embd=48, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=1)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LAYOUT = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def make(**changed):
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(**{**SIZES, **NO_DROPOUT, **changed}))
    with torch.no_grad():  # weights far from their start, so that no bias or norm goes untested
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pair(folder, **changed):
    """Our model and the stock one with the same weights."""
    ours = make(**changed)
    ours.save_pretrained(folder)
    stock, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(stock) is GPT2LMHeadModel
    assert not any(loading.values())
    return ours.eval(), stock.eval()


def batch(rows=2, length=33):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 97, (rows, length), generator=generator)


VARIANTS = [
    {},
    {"activation_function": "gelu"},
    {"n_inner": 100, "tie_word_embeddings": False},
    {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
    {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    {"attn_implementation": "eager"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_same_logits_loss_and_gradients_as_stock(tmp_path, variant):
    ours, stock = pair(tmp_path, **variant)
    if "attn_implementation" in variant:
        stock.set_attn_implementation(variant["attn_implementation"])
        ours.set_attn_implementation(variant["attn_implementation"])
    ids, labels = batch(), batch()
    labels[0, 5:9] = -100
    mine, theirs = ours(ids, labels=labels), stock(ids, labels=labels)
    torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=0)
    mine.loss.backward()
    theirs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = gradients[name].T if name.endswith(LAYOUT) else gradients[name]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=0)


def test_padding_positions_embeddings_and_token_types_as_stock(tmp_path):
    ours, stock = pair(tmp_path)
    ids, mask = batch(), torch.ones(2, 33, dtype=torch.long)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    packed = torch.cat([torch.arange(20), torch.arange(13)]).expand(2, -1)
    for inputs in (
        dict(input_ids=ids, attention_mask=mask, position_ids=positions),
        dict(input_ids=ids, attention_mask=mask.flip(1)),
        dict(input_ids=ids, token_type_ids=batch(2, 33)),
        dict(input_ids=ids, position_ids=packed, use_cache=False),
        dict(inputs_embeds=torch.randn(2, 33, 48)),
        dict(input_ids=ids, logits_to_keep=3),
    ):
        torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=0)


def test_hidden_states_and_attentions_as_stock(tmp_path):
    ours, stock = pair(tmp_path)
    for model in (ours, stock):
        model.set_attn_implementation("eager")
    mine = ours(batch(), output_hidden_states=True, output_attentions=True)
    theirs = stock(batch(), output_hidden_states=True, output_attentions=True)
    assert len(mine.hidden_states) == len(theirs.hidden_states) == 4
    for a, b in zip(mine.hidden_states + mine.attentions, theirs.hidden_states + theirs.attentions, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generates_what_stock_generates(tmp_path, use_cache, beams):
    ours, stock = pair(tmp_path)
    padded = batch(3, 12)
    mask = torch.ones_like(padded)
    mask[0, :5], mask[2, :1] = 0, 0  # padded on the left, as batches to generate from are
    settings = dict(max_new_tokens=20, do_sample=False, use_cache=use_cache, pad_token_id=0, eos_token_id=None) | beams
    mine = ours.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(mine, stock.generate(padded, attention_mask=mask, **settings))
    alone = ours.generate(padded[:1, 5:], **settings)  # what a row says does not depend on its padding
    assert torch.equal(alone[0, 7:], mine[0, 12:])


def test_what_we_save_is_a_stock_gpt2_folder(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["model_type"] == "gpt2"
    assert config["n_ctx"] == config["n_positions"]
    assert not {"auto_map", "_name_or_path"} & set(config)
    weights = load_file(tmp_path / "model.safetensors")
    expected = GPT2LMHeadModel(AutoConfig.from_pretrained(tmp_path)).state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in expected.items() if name != "lm_head.weight"
    }


def test_stock_folders_load_in_ours(tmp_path):
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(AutoConfig.for_model("gpt2", **SIZES, **NO_DROPOUT)).eval()
    stock.save_pretrained(tmp_path)
    ours, loading = GPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    torch.testing.assert_close(ours(batch()).logits, stock(batch()).logits, atol=1e-5, rtol=0)
    base, loading = GPTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    base.save_pretrained(tmp_path / "base")  # the body alone goes both ways too
    again = AutoModel.from_pretrained(tmp_path / "base")
    expected = stock.transformer(batch()).last_hidden_state
    torch.testing.assert_close(again(batch()).last_hidden_state, expected, atol=1e-5, rtol=0)
    headed, loading = GPTForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(loading.values())
    torch.testing.assert_close(headed(batch()).logits, stock(batch()).logits, atol=1e-5, rtol=0)


def test_a_sharded_save_and_a_bf16_load(tmp_path):
    ours = make().eval()
    ours.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = GPTForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(batch()).logits, ours(batch()).logits)
    torch.testing.assert_close(stock(batch()).logits, ours(batch()).logits, atol=1e-5, rtol=0)
    assert GPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_resized_embeddings_stay_tied_and_stock(tmp_path):
    ours = make()
    ours.resize_token_embeddings(120)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    ours.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.out_features == 120


def test_weights_start_as_in_gpt2s_paper():
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(vocab_size=4000, n_positions=512, n_embd=256, n_layer=8, n_head=4))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif ".ln_" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            expected = 0.02 / (2 * 8) ** 0.5 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < expected / 50, name


def test_bad_architectures_are_refused():
    for changed, message in (
        ({"n_head": 5}, "n_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"resid_pdrop": 1.0}, "resid_pdrop"),
        ({"activation_function": "nope"}, "activation_function"),
        ({"add_cross_attention": True}, "cross"),
    ):
        with pytest.raises(Exception, match=message):
            GPTConfig(**{**SIZES, **changed})


@pytest.mark.parametrize("compiled", [False, True])
def test_causal_training_builds_no_mask(compiled, monkeypatch):
    """The kernel is told that attention is causal, and no tensor as large as length x length reaches it."""
    from hf_myllm.models.gpt import modeling_gpt

    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask is None, is_causal))
        return attend(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    def forbid(*args, **kwargs):
        raise AssertionError("a mask was built")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(modeling_gpt, "create_causal_mask", forbid)
    model = make().train()
    backend = "aot_eager" if compiled else None  # traces the whole graph, forward and backward, without a C++ compiler
    step = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
    loss = step(input_ids=batch(), shift_labels=batch(), use_cache=False, num_items_in_batch=torch.tensor(66)).loss
    loss.backward()
    assert seen
    assert all(pair == (True, True) for pair in seen)


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    plain = make().train()
    saving = make().train()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(batch(), labels=batch(), use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_shifted_labels_are_the_labels_moved():
    ours = make()
    ids = batch()
    moved = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    assert torch.equal(ours(ids, labels=ids).loss, ours(ids, shift_labels=moved).loss)
    summed = ours(ids, shift_labels=moved, num_items_in_batch=1).loss
    torch.testing.assert_close(summed / 64, ours(ids, labels=ids).loss)


def test_real_tokenizer_and_text_agree_with_stock(assets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / "gpt2")
    text = (assets / "corpora" / "tinyshakespeare.txt").read_text()[:4000]
    ids = torch.tensor(tokenizer(text)["input_ids"])[:512].view(2, 256)
    ours, stock = pair(tmp_path, vocab_size=len(tokenizer), n_positions=256, bos_token_id=50256, eos_token_id=50256)
    tokenizer.save_pretrained(tmp_path)
    mine, theirs = ours(ids, labels=ids), stock(ids, labels=ids)
    torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine.loss, theirs.loss, atol=1e-5, rtol=0)
    said = pipeline("text-generation", model=str(tmp_path))("ROMEO:", max_new_tokens=5, do_sample=False)
    start = torch.tensor([tokenizer("ROMEO:")["input_ids"]])
    assert said[0]["generated_text"] == tokenizer.decode(ours.generate(start, max_new_tokens=5, do_sample=False)[0])
