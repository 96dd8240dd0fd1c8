"""T5 and BART compute what their stock classes compute: files, logits, loss, gradients and generated text."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import ENCODER_DECODERS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.utils.generic import find_labels

from hf_myllm.errors import ModelError
from hf_myllm.models import loading
from hf_myllm.models.encoder_decoder import shift_tokens_right
from hf_myllm.models.t5 import position_buckets
from hf_myllm.optim import build_optimizer, hidden_matrices
from hf_myllm.precision import cast_to_bf16
from hf_myllm.recipe import Recipe
from hf_myllm.train import set_learning_rate

T5, BART = ENCODER_DECODERS["t5"], ENCODER_DECODERS["bart"]
ONE_LAYER = {
    "t5": {"num_layers": 1, "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu"},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
}
T5_1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VARIANTS = [(case, variant) for case in ENCODER_DECODERS.values() for variant in case.variants]
families = pytest.mark.parametrize("family", ENCODER_DECODERS.values(), ids=ENCODER_DECODERS)


def ids(length=33, seed=1):
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(seed))


def batch(padded=False):
    """Return inputs whose rows have 33 and 25 tokens, and 21 and 15 labels."""
    labels, mask = ids(21, seed=2), torch.ones(2, 33, dtype=torch.long)
    labels[0, 15:], mask[0, 25:] = -100, 0
    inputs = {"input_ids": ids(), "labels": labels}
    return inputs | ({"attention_mask": mask, "decoder_attention_mask": (labels != -100).long()} if padded else {})


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_close(mine, theirs, **tolerance):
    torch.testing.assert_close(mine, theirs, **{"atol": 2e-5, "rtol": 1e-5, **tolerance})


@pytest.mark.parametrize(
    ("family", "variant"), VARIANTS, ids=[f"{family.name}-{variant}" for family, variant in VARIANTS]
)
def test_logits_loss_and_gradients_equal_stock(tmp_path, family, variant):
    ours, stock = family.make_pair(tmp_path, **variant)
    for model in (ours, stock):
        model.set_attn_implementation(variant.get("attn_implementation", "sdpa"))
    for inputs in (batch(), batch(padded=True)):
        mine, theirs = ours(**inputs), stock(**inputs)
        has_label = inputs["labels"] != -100  # outputs at padding are undefined
        assert_close(mine.logits[has_label], theirs.logits[has_label])
        assert_close(mine.loss, theirs.loss)
        mine, theirs = gradients(ours, mine.loss), gradients(stock, theirs.loss)
        for name, gradient in mine.items():
            assert gradient is not None, name  # DDP would wait for it
            assert_close(gradient, theirs.pop(name), msg=name)
        assert all(gradient is None for gradient in theirs.values())


@families
def test_outputs_on_request_equal_stock(tmp_path, family):
    ours, stock = family.make_pair(tmp_path)
    for model in (ours, stock):
        model.set_attn_implementation("eager")
    inputs = {**batch(), "output_hidden_states": True, "output_attentions": True}
    mine, theirs = ours(**inputs), stock(**inputs)
    assert set(mine) == set(theirs) - {"past_key_values"}  # of which training has no use
    assert [len(mine[name]) for name in ("encoder_hidden_states", "decoder_hidden_states")] == [4, 3]
    for name in mine:
        assert_close(mine[name], theirs[name], msg=name)
    ours.config.return_dict = False
    assert isinstance(ours(**batch()), tuple)


@families
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=str,
)
def test_generation_equals_stock(tmp_path, family, settings):
    ours, stock = family.make_pair(tmp_path, eos_token_id=5, forced_eos_token_id=5)
    inputs = batch(padded=True)
    settings = {"max_new_tokens": 20, "do_sample": False, "no_repeat_ngram_size": 1, **settings}
    settings["attention_mask"] = inputs["attention_mask"]
    results = []
    for model in (ours, stock):
        torch.manual_seed(0)
        results.append(model.generate(inputs["input_ids"], **settings))
    assert torch.equal(*results)
    assert results[0].unique().numel() > 5
    assert (results[0] == 5).any()
    if not settings["do_sample"]:  # padding does not change what a row generates
        del settings["attention_mask"]
        alone = ours.generate(inputs["input_ids"][:1, :25], **settings)
        count = settings.get("num_return_sequences", 1)
        assert torch.equal(alone, results[0][:count, : alone.shape[1]])


@families
def test_early_end_of_a_row_equals_stock(tmp_path, family):
    ours, stock = family.make_pair(tmp_path)
    free = ours.generate(ids(), max_new_tokens=20, do_sample=False, eos_token_id=None, forced_eos_token_id=None)
    end = int(free[0, 7])  # the first row then ends here at the latest
    mine, theirs = (
        model.generate(ids(), max_new_tokens=20, do_sample=False, eos_token_id=end) for model in (ours, stock)
    )
    assert torch.equal(mine, theirs)
    assert (mine[0] == end).nonzero()[0] <= 7


@families
def test_decoding_with_a_cache_equals_the_whole_row(family):
    ours = family.make_model().eval()
    whole = ours(input_ids=ids(), decoder_input_ids=ids(12, seed=3))
    encoder_outputs, cache = ours.get_encoder()(ids()), None
    for step in range(12):
        outputs = ours(
            encoder_outputs=tuple(encoder_outputs.values()),
            decoder_input_ids=ids(12, seed=3)[:, step : step + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = outputs.past_key_values
        assert_close(outputs.logits[:, 0], whole.logits[:, step])
    assert cache.get_seq_length() == 12


@families
def test_a_folder_is_a_stock_checkpoint_both_ways(tmp_path, family):
    stock_class = getattr(transformers, family.stock_generator)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.name, **{**family.sizes, **family.no_dropout, "decoder_start_token_id": 0})
    stock = stock_class(config).eval()
    stock.save_pretrained(tmp_path / "stock")
    ours, info = family.model_class.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(info.values())
    assert_close(ours.eval()(**batch()).logits, stock(**batch()).logits)
    ours.load_state_dict(stock.state_dict())
    ours.save_pretrained(tmp_path / "ours", max_shard_size="50KB")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == ([family.stock_generator], family.name)
    assert config["decoder_start_token_id"] == 0
    theirs = load_file(tmp_path / "stock" / "model.safetensors")
    mine = {name: x for path in (tmp_path / "ours").glob("model-*.safetensors") for name, x in load_file(path).items()}
    assert {name: value.shape for name, value in mine.items()} == {name: value.shape for name, value in theirs.items()}
    again, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    again.load_state_dict(ours.state_dict())
    module = importlib.import_module(f"hf_myllm.models.{family.name}")
    body, info = getattr(module, f"My{family.stock}Model").from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"]
    body.save_pretrained(tmp_path / "body")  # the model without a head loads both ways too
    inputs = {"input_ids": ids(), "decoder_input_ids": ids(5)}
    expected = AutoModel.from_pretrained(tmp_path / "body")(**inputs).last_hidden_state
    assert_close(body.eval()(**inputs).last_hidden_state, expected)


@families
@pytest.mark.parametrize("kept", ["all", "shared", "lm_head", "decoder"])
def test_checkpoints_with_any_of_the_tied_weights_load(tmp_path, family, kept):
    """Those of transformers 3 have all copies, others one; BART's lack the bias of the logits."""
    ours = family.make_model().eval()
    prefix = f"{ours.base_model_prefix}." if family is BART else ""
    tied = {
        "shared": f"{prefix}shared.weight",
        "encoder": f"{prefix}encoder.embed_tokens.weight",
        "decoder": f"{prefix}decoder.embed_tokens.weight",
        "lm_head": "lm_head.weight",
    }
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for name, key in tied.items():
        if kept not in ("all", name):
            del state[key]
    if family is BART:
        del state["final_logits_bias"]
        state[f"{prefix}encoder.version"] = torch.tensor([3.0])
    else:
        state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(32, 4)
    ours.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = family.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.eval()(**batch()).logits, ours(**batch()).logits)
    assert again.lm_head.weight is again.get_input_embeddings().weight is again.get_decoder().embed_tokens.weight


@families
def test_gradient_checkpointing_keeps_the_gradients(family):
    plain, checkpointed = family.make_model().train(), family.make_model().train()
    checkpointed.gradient_checkpointing_enable()
    results = [gradients(model, model(**batch(padded=True)).loss) for model in (plain, checkpointed)]
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@families
def test_a_training_step_compiles_to_one_graph(family):
    """With the loss that is fused with the head, which returns no logits."""
    model = family.make_model(**ONE_LAYER[family.name]).train()
    if family is BART:
        model.final_logits_bias.normal_()
    inputs = {**batch(padded=True), "num_items_in_batch": torch.tensor(60), "skip_logits": True}
    # aot_eager traces the whole graph, forward and backward, without a C++ compiler
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    mine, theirs = step(**inputs), model(**inputs)
    assert mine.logits is theirs.logits is None
    assert mine.past_key_values is theirs.past_key_values is None
    assert_close(mine.loss, theirs.loss)
    mine, theirs = gradients(model, mine.loss), gradients(model, theirs.loss)
    for name, gradient in mine.items():
        assert_close(gradient, theirs[name], msg=name)


@families
def test_the_loss_is_the_sum_divided_by_the_given_count(family):
    ours = family.make_model().eval()
    mean, summed = ours(**batch()).loss, ours(**batch(), num_items_in_batch=torch.tensor(1)).loss
    assert_close(summed / 36, mean)
    assert find_labels(family.model_class) == ["labels"]  # the Trainer would expect every other label in every batch


@families
def test_decoder_inputs_are_the_shifted_labels(family):
    ours, labels = family.make_model().eval(), batch()["labels"]
    shifted = ours.prepare_decoder_input_ids_from_labels(labels)
    assert shifted[0].tolist() == [ours.config.decoder_start_token_id, *labels[0, :15], *[ours.config.pad_token_id] * 5]
    logits = ours(input_ids=ids(), decoder_input_ids=shifted).logits
    assert torch.equal(logits, ours(**batch()).logits)
    embedded = ours.get_input_embeddings()(shifted)
    assert torch.equal(logits, ours(input_ids=ids(), decoder_inputs_embeds=embedded).logits)
    with pytest.raises(ValueError, match="config.pad_token_id is not set"):
        shift_tokens_right(labels, None, 0)
    with pytest.raises(ValueError, match="pass exactly one of input_ids and inputs_embeds"):
        ours(labels=labels)


@families
def test_layers_exchange_bf16_under_autocast(tmp_path, family):
    ours, stock = family.make_pair(tmp_path)
    exact, seen = ours(**batch(padded=True)).loss, []
    cast_to_bf16(ours)
    for stack in (ours.get_encoder(), ours.get_decoder()):
        stack.layers[0].register_forward_hook(lambda layer, inputs, output: seen.append(output[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (model(**batch(padded=True)).loss for model in (ours, stock))
    assert set(seen) == {torch.bfloat16} or family is T5  # whose normalization has its weight's type, as in stock
    assert_close(mine.float(), exact, atol=0.03, rtol=0)
    assert_close(theirs.float(), exact, atol=0.03, rtol=0)


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_stock(tmp_path, family, dtype):
    family.make_model().save_pretrained(tmp_path)
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ours = family.model_class.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {name: p.dtype for name, p in ours.named_parameters()} == {n: p.dtype for n, p in stock.named_parameters()}
    mine, theirs = ours(**batch()), stock(**batch())
    assert_close(mine.logits, theirs.logits, atol=0.05, rtol=0.05)
    assert mine.logits.isfinite().all()


@pytest.mark.parametrize(("family", "tied"), [(T5, True), (T5, False), (BART, True)])
def test_resized_embeddings_keep_the_ties(tmp_path, family, tied):
    ours = family.make_model(tie_word_embeddings=tied)
    ours.resize_token_embeddings(120)
    assert (ours.lm_head.weight is ours.get_input_embeddings().weight) == tied
    ours.save_pretrained(tmp_path)
    stock, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    mine, theirs = ours.eval()(**batch()).logits, stock.eval()(**batch()).logits
    assert mine.shape[-1] == 120
    assert_close(mine, theirs)


@families
def test_initialization_equals_stock(family):
    """The same standard deviations; T5 1.1's head, which the stock class ties, is drawn like any other matrix."""
    sizes = {"d_model": 128, "d_ff": 192, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192, "d_kv": 32}
    sizes = {key: value for key, value in sizes.items() if key in family.sizes}
    sizes |= {"num_heads": 4} if family is T5 else {"decoder_attention_heads": 4}
    torch.manual_seed(0)
    ours = family.model_class(family.make_config(**sizes))
    stock = getattr(transformers, family.stock_generator)(family.make_config(**sizes))
    expected = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        rel = 0.1 if parameter.numel() > 5000 else 0.6
        assert parameter.std().item() == pytest.approx(expected[name].std().item(), rel=rel, abs=1e-6), name
        assert parameter.mean().item() == pytest.approx(expected[name].mean().item(), abs=0.05), name


@pytest.mark.parametrize(
    ("is_decoder", "num_buckets", "max_distance"), [(0, 32, 128), (1, 32, 128), (0, 8, 20), (1, 8, 20)]
)
def test_relative_position_buckets_equal_stock(is_decoder, num_buckets, max_distance):
    distances = torch.arange(-300, 300)
    expected = T5Attention._relative_position_bucket(distances, not is_decoder, num_buckets, max_distance)
    mine = position_buckets(distances, num_buckets, max_distance, not is_decoder)
    assert torch.equal(mine, expected)
    assert mine.unique().numel() == num_buckets - (not is_decoder)  # bucket of distance 0 to the right is never used


def test_t5_1_1_keeps_a_head_of_its_own(tmp_path):
    ours, stock = T5.make_pair(tmp_path / "ours", **T5_1_1)
    assert not torch.equal(ours.lm_head.weight, ours.shared.weight)
    assert ours.encoder.embed_tokens.weight is ours.decoder.embed_tokens.weight is ours.shared.weight
    assert not stock.config.scale_decoder_outputs
    stock.save_pretrained(tmp_path / "stock")  # calls it tied in its configuration
    for folder in ("ours", "stock"):
        again = T5.model_class.from_pretrained(tmp_path / folder).eval()
        assert not again.config.tie_word_embeddings
        again.tie_weights()
        assert torch.equal(again(**batch()).logits, ours(**batch()).logits)
        assert type(loading.load_stock_model(tmp_path / folder)) is transformers.T5ForConditionalGeneration
    torch.manual_seed(0)
    fresh = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5.sizes, **T5_1_1, decoder_start_token_id=0)
    )
    fresh.save_pretrained(tmp_path / "tied")  # the stock class ties a new head, and does not scale its input
    again = T5.model_class.from_pretrained(tmp_path / "tied").eval()
    assert again.config.tie_word_embeddings
    assert_close(again(**batch()).logits, fresh.eval()(**batch()).logits)


def test_a_t5_whose_head_is_not_as_its_config_says_is_refused(tmp_path):
    for tied, tensors, message in (
        (True, {"lm_head.weight": torch.ones(97, 48)}, "ties lm_head.weight to shared.weight, which differs"),
        (
            False,
            {"lm_head.weight": None},
            "does not tie lm_head.weight to the embeddings, and its file has no such weight",
        ),
    ):
        model = T5.make_model(tie_word_embeddings=tied)
        model.save_pretrained(tmp_path)
        state = {
            name: x for name, x in {**load_file(tmp_path / "model.safetensors"), **tensors}.items() if x is not None
        }
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message):
            loading.build_model("t5", "seq2seq", loading.build_config("t5", {}, tmp_path), tmp_path)


def test_t5_generates_with_more_layers_in_the_decoder():
    """The stock class fails: its cache has as many layers as the encoder."""
    ours = T5.make_model(num_layers=1, num_decoder_layers=3).eval()
    settings = {"max_new_tokens": 8, "do_sample": False}
    outputs = [ours.generate(ids(), **settings, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*outputs)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(ours.generate(ids(), **settings, **static), outputs[0])


def test_t5_attends_by_distance_alone():
    """Beyond the training length too: the same text gives the same hidden states wherever it stands."""
    ours = T5.make_model().eval()
    mask = torch.cat([torch.zeros(2, 70), torch.ones(2, 33)], dim=1).long()
    shifted = ours.get_encoder()(torch.cat([ids(70), ids()], dim=1), mask).last_hidden_state
    assert_close(shifted[:, 70:], ours.get_encoder()(ids()).last_hidden_state)


def test_positions_of_bart_have_an_offset():
    ours = BART.make_model().train()
    ours(**batch()).loss.backward()
    used = ours.get_encoder().embed_positions.weight.grad.abs().sum(1) > 0
    assert used.tolist() == [False] * 2 + [True] * 33 + [False] * 31
    assert ours(input_ids=ids(64), labels=ids(64)).loss.isfinite()


def test_bart_reads_its_own_inputs_without_decoder_inputs(tmp_path):
    ours, stock = BART.make_pair(tmp_path)
    assert_close(ours(ids()).logits, stock(ids()).logits)


def test_the_logits_bias_of_bart_is_added_saved_and_extended(tmp_path):
    ours, _ = BART.make_pair(tmp_path)
    before = ours(**batch()).logits
    bias = torch.randn(1, 97)
    ours.final_logits_bias.copy_(bias)
    assert_close(ours(**batch()).logits, before + bias)
    ours.resize_token_embeddings(100)
    ours.save_pretrained(tmp_path)
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(stock.final_logits_bias[:, :97], bias)
    assert not stock.final_logits_bias[:, 97:].any()
    assert ours.resize_token_embeddings(50).num_embeddings == ours.final_logits_bias.shape[1] == 50


@families
def test_muon_optimizes_the_matrices_of_the_layers(family):
    model = family.make_model()
    hidden = {id(parameter) for parameter in hidden_matrices(model)}
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and (".block." in name or ".layers." in name) and "relative" not in name
        assert (id(parameter) in hidden) == is_matrix, name


def test_muon_trains_t5_as_its_equivalent_with_scaled_attention():
    """With q times sqrt(d_kv), embeddings and position biases by sqrt(d_model); the decay is the same."""
    scaled = {"q.weight": 4, "shared.weight": 1 / 8, "relative_attention_bias.weight": 1 / 8}
    recipe = Recipe(model="t5", training={"optimizer": "muon", "warmup_steps": 0, "lr_schedule": "constant"})
    run, trained = SimpleNamespace(recipe=recipe, total_steps=9), []
    for is_scaled in (True, False):
        model = T5.make_model(d_kv=16, d_model=64)
        factors = {
            parameter: next((factor for end, factor in scaled.items() if name.endswith(end)), 1)
            for name, parameter in model.named_parameters()
        }
        for module in [] if is_scaled else [module for module in model.modules() if hasattr(module, "lr_scale")]:
            del module.lr_scale
        with torch.no_grad():
            for parameter, factor in factors.items():
                parameter.mul_(1 if is_scaled else factor)
        optimizer = build_optimizer(model, 1e-2, (0.9, 0.95), 0.0, 0.1, "muon")
        for step in range(3):
            set_learning_rate(run, optimizer, step)
            torch.manual_seed(step)
            for parameter, factor in factors.items():
                parameter.grad = torch.randn_like(parameter) / (1 if is_scaled else factor)
            optimizer.step()
        trained.append([parameter * (factor if is_scaled else 1) for parameter, factor in factors.items()])
    for scaled, equivalent in zip(*trained, strict=True):
        torch.testing.assert_close(scaled, equivalent, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        (T5, {"feed_forward_proj": "gated-nope"}, "feed_forward_proj 'gated-nope' is unknown"),
        (T5, {"feed_forward_proj": "glu-gelu"}, "feed_forward_proj"),
        (T5, {"relative_attention_num_buckets": 2}, "relative_attention_num_buckets"),
        (T5, {"num_decoder_layers": 0}, "num_decoder_layers is 0"),
        (T5, {"is_encoder_decoder": False}, "is_encoder_decoder"),
        (BART, {"decoder_attention_heads": 5}, "decoder_attention_heads"),
        (BART, {"decoder_layers": 2000}, "decoder_layers is 2000"),
        (BART, {"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        (BART, {"decoder_layerdrop": 0.1}, "decoder_layerdrop"),
        (BART, {"activation_function": "nope"}, "activation_function"),
        (BART, {"init_std": -1.0}, "init_std"),
    ],
    ids=str,
)
def test_invalid_configurations_are_rejected(family, changed, message):
    with pytest.raises(Exception, match=message):
        family.make_config(**changed).check_architecture()


def test_a_width_that_the_heads_do_not_divide_is_valid_for_t5(tmp_path):
    """As in Flan-T5 small: 512 wide, with 6 heads of 64."""
    ours, stock = T5.make_pair(tmp_path, d_model=50, num_heads=6)
    assert_close(ours(**batch()).logits, stock(**batch()).logits)


def test_a_real_bart_equals_stock_and_pronounces_words(assets):
    folder = assets / "weights" / "bart-g2p-us"
    ours, info = BART.model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    stock = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    config = json.loads((folder / "config.json").read_text())
    words = ["hello", "transformer", "psychology", "a"]
    rows = [[1, *map(config["grapheme_chars"].index, word), 2] for word in words]
    width = max(map(len, rows))
    inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = (inputs != 0).long()
    labels = inputs.masked_fill(inputs == 0, -100)
    mine, theirs = (model(inputs, attention_mask=mask, labels=labels) for model in (ours.eval(), stock))
    assert_close(mine.logits, theirs.logits)
    assert_close(mine.loss, theirs.loss)
    for settings in ({}, {"num_beams": 4}):
        mine, theirs = (
            model.generate(inputs, attention_mask=mask, max_new_tokens=30, **settings) for model in (ours, stock)
        )
        assert torch.equal(mine, theirs)
        spoken = ["".join(config["phoneme_chars"][i] for i in row if i > 3) for row in mine.tolist()]
        assert spoken[:3] == ["hˈɛlO", "tɹænsfˈɔɹməɹ", "sIkˈɑləʤi"]  # noqa: RUF001, phonemes
