"""Stock classes of transformers that are trained like our own: their loss, their checks, their runs."""

import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import assert_same_run, read_metrics, write_story
from conftest import train as run_train
from families import CASES
from launching import run_command, run_ranks, start, wait_for
from models.stock_types import DECODERS, SIZES, stock_flags
from patches import log_compilation

from hf_myllm.build_data import default_max_len
from hf_myllm.errors import InputError
from hf_myllm.generate import generate, load_tokenizer
from hf_myllm.models import FAMILIES
from hf_myllm.models.auto import training_class
from hf_myllm.models.probe import check_class
from hf_myllm.recipe import Recipe
from hf_myllm.tasks import TASKS
from hf_myllm.train import train

FEW = ("gemma3_text", "qwen3_moe", "mamba", "roberta", "deberta-v2")  # the most different ones
ALL = [name if name in FEW else pytest.param(name, marks=pytest.mark.chaos) for name in SIZES]
TEXTS = [write_story(seed) for seed in range(30)]


def make_model(name, task=None, **changed):
    family = FAMILIES[name]
    sizes = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **SIZES[name], **changed}
    torch.manual_seed(0)
    return family.tasks[task or next(iter(family.tasks))](family.config(**sizes))


def make_recipe(name, folder, **changed):
    tokenizer = {"train": "bpe" if name in DECODERS else "wordpiece", "vocab_size": 300}
    recipe = Recipe(
        model=name,
        config=SIZES[name],
        data={"tokenizer": tokenizer, "max_len": 32},
        training={"max_steps": 4, "batch_size": 2, "total_batch_size": 4, "learning_rate": 1e-3},
        run={"save_model": folder, "save_freq": 2, "log_level": "error"},
    )
    for key, value in changed.items():
        section = next(part for part in (recipe.data, recipe.training, recipe.run, recipe) if hasattr(part, key))
        setattr(section, key, value)
    return recipe


def forget_end(run, copy):
    """Copy a run as it was when it was killed after step 2."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint-4", "*.safetensors", "config.json"))
    shutil.copytree(run / "checkpoint-2", copy / "checkpoint-2", dirs_exist_ok=True)


@pytest.mark.parametrize("name", ALL)
def test_a_stock_class_is_trained_and_resumed_to_the_same_bytes(name, tmp_path):
    result = train(make_recipe(name, tmp_path / "run"), train_data=TEXTS)
    forget_end(tmp_path / "run", tmp_path / "killed")
    train(make_recipe(name, tmp_path / "killed", resume=True), train_data=TEXTS)
    published = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "run", tmp_path / "killed")]
    assert published[0] == published[1]

    # The folder is stock: the Auto classes load it, and compute the same.
    head = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModelForMaskedLM
    stock = head.from_pretrained(tmp_path / "run").eval()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["architectures"] == [type(stock).__name__]
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, result.model(ids).logits, rtol=0, atol=0)
    prompt = "Anna" if name in DECODERS else "Anna [MASK] the cat."
    assert generate(tmp_path / "run", prompt, max_new_tokens=3).startswith(prompt)

    # From a saved folder, init_from is enough.
    recipe = make_recipe(name, tmp_path / "next", model=None, config={}, init_from=str(tmp_path / "run"))
    recipe.data.tokenizer = None
    train(recipe, train_data=TEXTS)
    assert f"model: {name}\n" in (tmp_path / "next" / "recipe.yaml").read_text()
    assert read_metrics(tmp_path / "next", "val_loss")[-1] < result.metrics["val_loss"]


def step_loss(model, ids, count=None):
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    count = (labels != -100).sum() if count is None else count
    loss = model(input_ids=ids, shift_labels=labels, num_items_in_batch=count, use_cache=False, skip_logits=True).loss
    loss.backward()
    return loss.item()


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", ["mistral", "qwen3_moe"])
def test_the_loss_of_a_step_is_the_librarys_and_exact_under_accumulation(name):
    model, ids = make_model(name).train(), torch.randint(97, (8, 17), generator=torch.Generator().manual_seed(0))
    ids[2, 9:] = 0  # a repeated token, which all experts do not share alike
    library = model(input_ids=ids, labels=ids).loss
    with_router_loss = step_loss(model, ids)
    whole = gradients(model)
    model.zero_grad()
    halves = [step_loss(model, part, 8 * 16) for part in ids.split(4)]
    assert sum(halves) == pytest.approx(with_router_loss, abs=1e-6)
    torch.testing.assert_close(gradients(model), whole, rtol=0, atol=1e-7)
    without_router_loss = step_loss(model.eval(), ids)
    assert without_router_loss == pytest.approx(library.item(), abs=1e-6)
    assert (with_router_loss != without_router_loss) == (name == "qwen3_moe")


def test_the_balance_loss_of_a_row_is_the_librarys():
    model = make_model("qwen3_moe", router_aux_loss_coef=0.5)
    ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
    outputs = model(input_ids=ids[:1], output_router_logits=True)
    assert model.router_loss(outputs.router_logits, ids[:1]).item() == pytest.approx(outputs.aux_loss.item(), rel=1e-6)
    # padding does not count, nor does a row that only fills the batch
    padded = torch.cat([ids, ids[:, :8]], dim=1)
    labels = torch.cat([ids, torch.full((2, 8), -100)], dim=1)
    labels[1] = -100
    outputs = model(input_ids=padded, output_router_logits=True)
    alone = model(input_ids=ids[:1], output_router_logits=True).aux_loss
    assert model.router_loss(outputs.router_logits, labels).item() == pytest.approx(alone.item(), rel=1e-5)


def test_a_class_that_does_not_do_what_a_task_expects_is_refused():
    def check(model, task, packing="stream", **expected):
        check_class(model, task, packing, **expected)

    check(make_model("mistral"), "causal", isolates_documents=True, pads_rows=True)
    for name in ("mamba", "opt", "gpt_oss"):
        with pytest.raises(InputError, match="does not keep the documents of a row apart, as packing best_fit"):
            check(make_model(name), "causal", "best_fit", isolates_documents=True)
    zeroed = make_model("opt")
    for layer in zeroed.model.decoder.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)  # no token sees another yet
    with pytest.raises(InputError, match="does not keep the documents of a row apart"):
        check(zeroed, "causal", isolates_documents=True)

    # An encoder with the head of a decoder.
    config = make_model("roberta").config
    model_class = training_class(transformers.RobertaForCausalLM)
    with pytest.raises(InputError, match="its tokens see later ones, .*is_decoder: true"):
        check(model_class(config), "causal")
    config.is_decoder = True
    check(model_class(config), "causal")

    class OtherLoss(transformers.MistralForCausalLM):
        def forward(self, input_ids=None, labels=None, use_cache=None, **inputs):
            outputs = super().forward(input_ids, labels=labels, use_cache=use_cache, **inputs)
            return outputs if labels is None else type(outputs)(loss=outputs.loss * 1.01, logits=outputs.logits)

    with pytest.raises(InputError, match="its loss of a row is"):
        check(training_class(OtherLoss)(make_model("mistral").config), "causal")


@pytest.mark.parametrize("name", ["roberta", "modernbert", "distilbert", "bert"])
def test_encoders_keep_packed_documents_apart(name):
    """The documents of a row give the same logits as each in a row of its own; a window is kept too."""
    family = FAMILIES[f"stock:{name}"]
    sizes = {"vocab_size": 97, "pad_token_id": 3, "max_position_embeddings": 64, "local_attention": 6}
    torch.manual_seed(0)
    model = family.tasks["mlm"](family.config(**sizes | SIZES.get(name, {"hidden_size": 24, "num_hidden_layers": 2})))
    model.eval()
    ids = torch.randint(4, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 14 + [1] * 26])
    positions = torch.tensor([[*range(14), *range(26)]])
    packed = model.stock_forward(input_ids=ids, document_ids=documents, position_ids=positions).logits
    for document in (slice(0, 14), slice(14, 40)):
        torch.testing.assert_close(packed[:, document], model(ids[:, document]).logits, rtol=0, atol=1e-6)


def test_what_keeps_no_documents_apart_gets_a_row_for_each_by_default():
    for name, packing in (("mamba", "pad"), ("rwkv", "pad"), ("mistral", "best_fit"), ("gpt", "best_fit")):
        recipe = Recipe(model=name, task="instruction").check_family(FAMILIES)
        recipe.check_task(TASKS["instruction"], FAMILIES[name].takes_positions("instruction"))
        assert recipe.data.packing == packing, name


@pytest.mark.parametrize(
    ("config", "limit", "expected"),
    [({}, 48, 48), ({"n_positions": 512}, 10**30, 512), ({"max_position_embeddings": 64}, 48, 64)],
)
def test_the_default_length_of_a_row(config, limit, expected):
    config, tokenizer = transformers.PreTrainedConfig(**config), SimpleNamespace(model_max_length=limit)
    assert default_max_len(config, tokenizer) == expected
    with pytest.raises(InputError, match="give --max_len N"):
        default_max_len(transformers.PreTrainedConfig(), SimpleNamespace(model_max_length=10**30))


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_our_class_and_the_stock_one_make_the_same_run(name, tmp_path, tiny_family):
    for implementation in ("ours", "stock"):
        folder = tmp_path / implementation
        changes = {"save_model": folder, "implementation": implementation, **CASES[name].no_dropout}
        assert run_train(*tiny_family(name)(max_steps=3, start_context=None, **changes)) == 0
    assert_same_run(tmp_path / "ours", tmp_path / "stock", 1e-5)
    configs = [json.loads((tmp_path / part / "config.json").read_text()) for part in ("ours", "stock")]
    assert configs[0]["architectures"] == configs[1]["architectures"]


def test_a_run_keeps_its_tokenizer_where_the_library_replaces_it(tmp_path):
    """AutoTokenizer splits the text of a model type `qwen2` by rules of its own, whatever the tokenizer's file says."""
    texts = [f"{text} 1234 1234 1234" for text in TEXTS]  # its rules split numbers into digits
    settings = {"tokenizer": {"train": "bpe", "vocab_size": 400}}
    train(make_recipe("qwen2", tmp_path / "run", **settings), train_data=texts)
    forget_end(tmp_path / "run", tmp_path / "killed")
    train(make_recipe("qwen2", tmp_path / "killed", resume=True, **settings), train_data=texts)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "killed")]
    assert weights[0] == weights[1]
    sample = "Anna 1234 1234"
    ids = load_tokenizer(tmp_path / "run")(sample)["input_ids"]
    assert ids == transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "run")(sample)["input_ids"]
    assert ids != transformers.AutoTokenizer.from_pretrained(tmp_path / "run")(sample)["input_ids"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "qwen"}, "model 'qwen' is not known; .*did you mean .*'qwen2'"),
        ({"model": "vit"}, "model vit is no text model with a head for any task"),
        ({"model": "gemma3"}, "text_config and vision_config.*its text model is gemma3_text"),
        ({"task": "mlm"}, "task 'mlm' is not a task of mistral; choose causal"),
        ({"config": {"n_embd": 32}}, "unknown key 'n_embd' in config of mistral"),
        ({"config": {"num_hidden_layers": 9999}}, "num_hidden_layers is 9999; it must be at most 1024"),
        (
            {"config": {**SIZES["mistral"], "num_key_value_heads": 3}},
            r"heads \(3\) must divide num_attention_heads \(2\)",
        ),
        (
            {"config": {"n_layer": 2}},
            "unknown key 'n_layer' in config of mistral; it is called 'num_hidden_layers' here",
        ),
        ({"config": {**SIZES["mistral"], "rope_parameters": {"rope_type": "x"}}}, "no MistralForCausalLM can be made"),
        (
            {"model": "mamba", "config": SIZES["mamba"], "max_len": None},
            "max_len: this model has no number of positions",
        ),
        ({"model": "xlnet", "config": {"d_model": 16, "n_layer": 1, "n_head": 1}}, "its tokens see later ones"),
        ({"model": "albert", "config": SIZES["albert"], "gradient_checkpointing": True}, "albert does not support it"),
        ({"model": "albert", "config": SIZES["albert"], "optimizer": "muon"}, "muon finds no matrices in the layers"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_anything_is_written(changed, message, tmp_path):
    recipe = make_recipe("mistral", tmp_path / "run", **changed)
    if changed.get("model") == "albert":
        recipe.data.tokenizer = {"train": "wordpiece", "vocab_size": 120}
    with pytest.raises(InputError, match=message) as error:
        train(recipe, train_data=TEXTS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "evil", "auto_map": {"AutoConfig": "m.C"}}, "type 'evil', .*code of its own .* is not run"),
        ({"model_type": None}, "names no model_type; give --model"),
        ({"model_type": "gemma3"}, "only text models can be trained; its text model is gemma3_text"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized"),
    ],
)
def test_a_checkpoint_that_cannot_be_trained_is_one_line(changed, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(make_model("mistral").config.to_dict() | changed))
    recipe = make_recipe("mistral", tmp_path / "run", model=None, config={}, init_from=str(tmp_path))
    with pytest.raises(InputError, match=message):
        train(recipe, train_data=TEXTS)
    assert not (tmp_path / "run").exists()


@pytest.mark.chaos
@pytest.mark.parametrize("name", SIZES)
def test_a_stock_class_killed_and_resumed_writes_the_same_bytes(name, tiny, tmp_path):
    reference, run = tmp_path / "reference", tmp_path / "killed"
    assert run_train(*stock_flags(tiny, name, save_freq=5, save_model=reference)) == 0
    process = start(*stock_flags(tiny, name, save_freq=5, save_model=run))
    wait_for([process], (run / "checkpoint-10").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "model.safetensors").exists()
    assert run_train(*stock_flags(tiny, name, save_freq=5, save_model=run), "--init_from", "resume") == 0
    assert (run / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert read_metrics(run, "loss") == read_metrics(reference, "loss")


@pytest.mark.chaos
@pytest.mark.parametrize("name", [name for name in SIZES if name != "rwkv"])  # which unrolls its loop over positions
def test_a_compiled_stock_class_has_the_same_losses_without_graph_breaks(name, tiny, tmp_path):
    config = FAMILIES[name].config(**SIZES[name]).to_dict()
    dropout = {key: 0.0 for key, value in config.items() if key.endswith(("dropout", "drop", "dropout_prob")) and value}
    flags = stock_flags(tiny, name, max_steps=4, eval_freq=None, save_freq=4, **dropout)
    assert run_train(*flags, "--save_model", tmp_path / "eager") == 0
    process = start(*flags, "--compile", "--save_model", tmp_path / "compiled", patch=log_compilation)
    assert process.wait(500) == 0, process.output()
    compiled, eager = (read_metrics(tmp_path / folder, "loss") for folder in ("compiled", "eager"))
    assert compiled == pytest.approx(eager, abs=1e-4)
    compiled, eager = (read_metrics(tmp_path / folder, "val_loss") for folder in ("compiled", "eager"))
    assert compiled == pytest.approx(eager, abs=1e-4)
    assert "Graph break" not in process.output()[1]


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3_text", "deberta-v2", "electra"])
def test_a_stock_class_is_the_same_on_two_ranks(name, tiny, tmp_path):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name not in DECODERS else {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        flags = stock_flags(tiny, name, max_steps=6, batch_size=2, save_model=folder, **dropout)
        result = run_ranks(count, *flags) if count > 1 else run_command(*flags)
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "2", tmp_path / "1", 1e-5)
