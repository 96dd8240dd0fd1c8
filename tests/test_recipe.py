"""A recipe means one thing, from a file or from flags, and a wrong one is refused by name."""

import pytest
import torch
import yaml
from conftest import ROOT

from hf_myllm.errors import RecipeError
from hf_myllm.models import FAMILIES
from hf_myllm.recipe import Recipe
from hf_myllm.recipe.config_section import config_types
from hf_myllm.recipe.flags import parse
from hf_myllm.recipe.sections import ALIASES, FIELDS, SECTION_OF, SECTIONS
from hf_myllm.tasks import TASKS


def read(*argv):
    return parse([str(argument) for argument in argv], FAMILIES)


def test_each_name_stands_in_one_section_and_in_no_config():
    names = [name for section in SECTIONS.values() for name in section.model_fields]
    assert len(names) == len(set(names)) == len(FIELDS) == len(SECTION_OF)
    for family in FAMILIES.values():
        assert not set(names) & set(config_types(family.config))
    assert not set(ALIASES) & set(names)
    assert set(ALIASES.values()) <= set(names)


def test_the_flags_that_users_know_work_without_a_recipe():
    recipe = read(
        *"--model gpt --train_file train.bin --val_file val.bin --epochs 1 --learning_rate 1e-4 --batch_size 8".split(),
        *"--max_len 256 --stride 128 --eval_freq 20 --eval_iter 5 --tokenizer gpt2 --save_model out".split(),
        *["--start_context", ""],
    )
    assert (recipe.data.train_file, recipe.data.val_file) == ("train.bin", "val.bin")
    assert recipe.training.learning_rate == 1e-4
    assert (recipe.data.max_len, recipe.data.stride) == (256, 128)
    assert (recipe.evaluation.eval_freq, recipe.evaluation.eval_iter, recipe.evaluation.start_context) == (20, 5, "")
    assert (recipe.data.tokenizer, recipe.run.save_model) == ("gpt2", "out")


def test_aliases_and_ways_to_write_a_flag():
    recipe = read(
        "--train_file=a.txt", "--num_epochs", 2, "--save_path", "x", "--valid_file", "v.txt", "--load_model", "m",
        "--compile", "--grad-clip", "0.5", "--n_layer", 3, "--hidden_size", 96, "--warmup_steps", "1e3",
        "--model", "gpt",
    )  # fmt: skip
    assert (recipe.training.epochs, recipe.run.save_model, recipe.data.val_file) == (2.0, "x", "v.txt")
    assert (recipe.run.init_from, recipe.training.compile, recipe.training.grad_clip) == ("m", True, 0.5)
    assert recipe.config == {"n_layer": 3, "n_embd": 96}
    assert recipe.training.warmup_steps == 1000
    assert read("--train_file", "a.txt", "b.txt").data.train_file == ["a.txt", "b.txt"]
    assert read("--train_file", "a", "--start_context", "- a list").evaluation.start_context == "- a list"
    assert read("--train_file", "a", "--save_freq", "null").run.save_freq is None


def test_flags_win_over_the_file_and_yaml_numbers_are_numbers(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "config: {n_layer: 2, resid_pdrop: 0}\n"
        "data: {train_file: [a.txt], tokenizer: {train: bpe, vocab_size: 300}}\n"
        "training: {learning_rate: 1e-3, min_lr: 1e-4, epochs: 2}\n"
    )
    recipe = read(file, "--learning_rate", "2e-3", "--n_layer", "4")
    assert (recipe.training.learning_rate, recipe.training.min_lr) == (2e-3, 1e-4)
    assert recipe.config == {"n_layer": 4, "resid_pdrop": 0}
    assert recipe.data.tokenizer == {"train": "bpe", "vocab_size": 300}


def test_a_flag_takes_the_place_of_what_the_file_says_instead(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("data: {dataset: x/y}\ntraining: {max_steps: 100, total_batch_size: 8}\n")
    recipe = read(file, "--train_file", "a.txt", "--epochs", 2, "--gradient_accumulation_steps", 4)
    assert (recipe.data.dataset, recipe.data.train_file) == (None, "a.txt")
    assert (recipe.training.max_steps, recipe.training.epochs) == (None, 2.0)
    assert (recipe.training.total_batch_size, recipe.training.gradient_accumulation_steps) == (None, 4)


def test_a_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = read("--train_file", "a.txt", "--n_layer", 2, "--tokenizer", "{train: bpe, vocab_size: 300}", "--seed", 5)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert read(tmp_path / "recipe.yaml") == recipe


def test_resume_keeps_what_the_run_started_from(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {train_file: a.txt}\nrun: {init_from: some/model}\n")
    recipe = read(tmp_path / "recipe.yaml", "--init_from", "resume")
    assert (recipe.run.resume, recipe.run.init_from) == (True, "some/model")


def test_a_copy_of_a_run_does_not_resume_the_original(tmp_path):
    for name in ("run", "copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"data: {{train_file: a}}\nrun: {{save_model: {tmp_path}/run}}\n")
        (tmp_path / name / "run.json").write_text("{}")
    copy = tmp_path / "copy"
    with pytest.raises(RecipeError, match="it would resume the run in its save_model, .*run; to resume this one, give"):
        read(copy / "recipe.yaml", "--resume")
    assert read(copy / "recipe.yaml", "--resume", "--save_model", copy).run.save_model == str(copy)
    assert read(tmp_path / "run" / "recipe.yaml", "--resume").run.resume


def test_quiet_is_an_alias(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {train_file: a.txt}\nrun: {quiet: false, log_level: error}\n")
    assert read(tmp_path / "recipe.yaml").run.log_level == "error"
    recipe = read(tmp_path / "recipe.yaml", "--quiet")
    assert recipe.run.log_level == "warning"
    assert "quiet" not in recipe.to_yaml()


def test_a_recipe_from_python(tmp_path):
    recipe = Recipe(
        model="gpt",
        config={"hidden_size": 64},
        data={"train_file": [tmp_path / "a.txt"], "tokenizer": {"train": "bpe", "vocab_size": 300}},
        training={"num_epochs": 2, "learning_rate": "1e-4"},
        run={"save_model": tmp_path / "run", "init_from": "resume"},
    )
    assert recipe.data.train_file == [str(tmp_path / "a.txt")]
    assert (recipe.training.epochs, recipe.training.learning_rate) == (2.0, 1e-4)
    assert (recipe.run.save_model, recipe.run.resume) == (str(tmp_path / "run"), True)
    assert recipe.check_family(FAMILIES).check_task(TASKS["causal"]) is recipe
    assert (recipe.task, recipe.data.packing, recipe.config) == ("causal", "stream", {"n_embd": 64})
    recipe.training.batch_size = 2  # sections are mutable
    assert recipe.to_dict()["training"]["batch_size"] == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"lerning_rate": 1}}, "Recipe: unknown key 'lerning_rate' in training; did you mean"),
        ({"learning_rate": 1}, "Recipe: 'learning_rate' belongs in the section 'training:'"),
        ({"training": {"epochs": 1, "max_steps": 2}}, "Recipe: epochs and max_steps are both given"),
        ({"training": {"epochs": 1, "num_epochs": 2}}, "Recipe: 'epochs' and 'num_epochs' are the same key"),
        ({"data": 3}, "Recipe: 'data' is a section and must hold keys, not 3"),
    ],
)
def test_a_wrong_recipe_from_python_is_one_line(sections, message):
    with pytest.raises(RecipeError) as error:
        Recipe(**sections)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": "gtp"}, "model 'gtp' is not known; there is gpt, llama"),
        ({"config": {"n_layers": 2}}, "Recipe: unknown key 'n_layers' in config of gpt; did you mean 'n_layer'?"),
        ({"config": {"n_layer": "two"}}, "Recipe: 'n_layer' must be a whole number, not 'two'"),
        ({"task": "mlm"}, "task 'mlm' is not a task of gpt; choose causal"),
        ({"task": "classification", "data": {"streaming": True}}, "streaming has no effect with task classification"),
    ],
)
def test_the_family_is_checked_when_a_run_is_built(sections, message):
    recipe = Recipe(**sections)
    with pytest.raises(RecipeError) as error:
        recipe.check_family(FAMILIES).check_task(TASKS[recipe.task])
    assert message in str(error.value)


def test_load_takes_a_name_and_overrides():
    recipe = Recipe.load("quickstart", epochs=2, config={"n_layer": 3}, training={"batch_size": 4})
    assert recipe.training.max_steps is None  # excluded by epochs
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.training.optimizer) == (2.0, 4, "muon")
    assert recipe.config["n_layer"] == 3
    assert recipe.config["n_head"] == 4
    assert Recipe.load() == Recipe()
    for overrides, message in (
        ({"lerning_rate": 1}, "Recipe.load: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"max_iters": 1}, "Recipe.load: unknown key 'max_iters'; it is called 'max_steps' here"),
    ):
        with pytest.raises(RecipeError) as error:
            Recipe.load("quickstart", **overrides)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", 0.5), "temperature has no effect without start_context; set it too, or remove temperature"),
        (("--project_name", "x"), "project_name has no effect without log_with"),
        (("--dataset_split", "test"), "dataset_split has no effect without dataset"),
        (("--mlm_probability", 0.3), "mlm_probability has no effect with task causal"),
        (("--max_answer_len", 3), "max_answer_len has no effect with task causal"),
        (("--skip_bad_rows", "on"), "skip_bad_rows has no effect with task causal"),
        (("--model", "bert", "--bin_dtype", "uint16", "--task", "classification"), "bin_dtype has no effect with task"),
        (("--model", "bert", "--start_context", "a [MASK]", "--top_k", 5), "top_k has no effect with task mlm"),
        (("--streaming_window", 1000), "streaming_window has no effect without streaming"),
    ],
)
def test_keys_without_an_effect_are_refused(flags, message, tmp_path):
    recipe = read("--train_file", "a.txt", *flags)
    with pytest.raises(RecipeError, match=message):
        recipe.check_task(TASKS[recipe.task])
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    loaded = Recipe.load(path)
    with pytest.raises(RecipeError, match=message):
        loaded.check_family(FAMILIES).check_task(TASKS[recipe.task])


def test_a_flag_may_switch_off_what_keys_of_the_file_need(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data: {dataset: user/x, dataset_config: en}\nevaluation: {start_context: a, temperature: 0.5}\n")
    for changes in ({"start_context": None}, {"train_file": "a.txt"}, {}):
        Recipe.load(path, **changes).check_family(FAMILIES).check_task(TASKS["causal"])
    recipe = Recipe.load(path, start_context=None, temperature=0.6)
    with pytest.raises(RecipeError, match="temperature has no effect without start_context"):
        recipe.check_family(FAMILIES).check_task(TASKS["causal"])
    mixed = {"datasets": [{"dataset": "user/x"}], "dataset_split": "test"}  # the default of the sources
    Recipe(data=mixed).check_family(FAMILIES).check_task(TASKS["causal"])


def test_only_relevant_keys_are_shown():
    recipe = read("--train_file", "a.txt", "--max_steps", 3)
    shown = recipe.relevant()
    assert "lora" not in shown
    assert "mlm_probability" not in shown["data"]
    assert "streaming_window" not in shown["data"]
    assert "max_answer_len" not in shown["data"]
    assert "hub_private_repo" not in shown.get("hub", {})
    assert shown["training"]["max_steps"] == 3
    assert read("--model", "bert", "--train_file", "a.txt").relevant()["data"]["mlm_probability"] == 0.15
    lora = read("--train_file", "a.txt", "--r", 4, "--init_from", "x").relevant()["lora"]
    assert lora == {"r": 4, "lora_dropout": 0.0, "merge_lora": False}


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_valid_and_says_what_it_does(path):
    recipe = read(path)
    name, config = recipe.model, recipe.config
    assert FAMILIES[name].config(**config)
    assert path.read_text().startswith("# ")
    assert f"recipes/{path.name}" in path.read_text().split("\n\n")[0] + path.read_text()[:600]


def test_help_names_every_key(capsys):
    with pytest.raises(SystemExit) as exit:
        read("--help")
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for name, field in FIELDS.items():
        assert f"--{name} " in shown
        assert len(field.description) > 10
    for family in FAMILIES.values():
        assert all(f"--{name}" in shown for name in config_types(family.config))


FILES = {
    "unknown key 'lerning_rate' in training; did you mean 'learning_rate'?": {"training": {"lerning_rate": 1}},
    "'learning_rate' belongs in the section 'training:'": {"learning_rate": 1},
    "'learning_rate' belongs in the section 'training:', not in 'data:'": {"data": {"learning_rate": 1}},
    "unknown key 'optimisation'": {"optimisation": {}},
    "unknown key 'n_layers' in config of gpt; did you mean 'n_layer'?": {"config": {"n_layers": 1}},
    "'batch_size' must be a whole number, not 2.5": {"training": {"batch_size": 2.5}},
    "'batch_size' must be a whole number, not True": {"training": {"batch_size": True}},
    "'compile' must be true or false, not 3": {"training": {"compile": 3}},
    "'stride' must be at least 1, not 0": {"data": {"stride": 0}},
    "unknown key 'eval_interval' in evaluation; it is called 'eval_freq' here": {"evaluation": {"eval_interval": 5}},
    "unknown key 'per_device_train_batch_size'; it is called 'batch_size' here": {"per_device_train_batch_size": 5},
    "datasets[1]: 'weight' must be at least 0": {
        "data": {"datasets": [{"dataset": "a"}, {"dataset": "b", "weight": -1}]}
    },
    "datasets[0]: unknown key 'wieght'; did you mean 'weight'?": {
        "data": {"datasets": [{"dataset": "a", "wieght": 2}]}
    },
    "'n_head' must be a whole number, not 3.5": {"config": {"n_head": 3.5}},
    "'quiet' must be true or false, not 3": {"run": {"quiet": 3}},
    "'learning_rate' must be a number, not nan": {"training": {"learning_rate": float("nan")}},
    "'learning_rate' must be more than 0, not -1": {"training": {"learning_rate": -1}},
    "'lr_schedule' must be one of constant, linear, cosine, wsd": {"training": {"lr_schedule": "cosin"}},
    "'learning_rate' has no value": {"training": {"learning_rate": None}},
    "'training' is a section": {"training": 3},
    "there is nothing to train on": {"model": "gpt"},
    "train_file and dataset are both given": {"data": {"train_file": "a", "dataset": "b"}},
    "epochs and max_steps are both given": {"data": {"train_file": "a"}, "training": {"epochs": 1, "max_steps": 1}},
    "gradient_accumulation_steps are both given": {
        "data": {"train_file": "a"},
        "training": {"total_batch_size": 8, "gradient_accumulation_steps": 2},
    },
    "min_lr (0.1) must not be above": {"data": {"train_file": "a"}, "training": {"min_lr": 0.1}},
    "model 'gtp' is not known; there is gpt, llama": {"model": "gtp"},
    "bpe's vocab_size must be at least 257": {
        "data": {"train_file": "a", "tokenizer": {"train": "bpe", "vocab_size": 3}}
    },
    "'tokenizer' must be a name, a folder or": {"data": {"train_file": "a", "tokenizer": {"train": "words"}}},
    "tokenizer: bpe needs a vocab_size": {"data": {"train_file": "a", "tokenizer": {"train": "bpe"}}},
    "'epochs' and 'num_epochs' are the same key": {"training": {"epochs": 1, "num_epochs": 2}},
    "'hidden_size' and 'n_embd' are the same key": {"config": {"n_embd": 64, "hidden_size": 32}},
    "'batch_size' must be at most": {"training": {"batch_size": 10**15}},
    "eval_only needs a trained model": {"data": {"val_file": "a"}, "evaluation": {"eval_only": True}},
}


@pytest.mark.parametrize("message", FILES, ids=str)
def test_a_wrong_file_is_refused(message, tmp_path):
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(FILES[message]))
    with pytest.raises(RecipeError) as error:
        read(tmp_path / "wrong.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys"),
        ("- a\n- b\n", "holds no keys"),
        ("training:\n  epochs: [1\n", "not valid YAML"),
        ("training: {epochs: 1, epochs: 2}\n", "'epochs' is given twice"),
        ("run: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a: \xe9", "cannot be read"),
        ("training: {epochs: " + "9" * 5000 + "}", "not valid YAML|cannot be|must be"),
        ("[" * 3000, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(text, message, tmp_path):
    (tmp_path / "wrong.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=message):
        read(tmp_path / "wrong.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n_layers", "2"], "--n_layers; did you mean 'n_layer'"),
        (["--learning_rate"], "argument --learning_rate: expected one argument"),
        (["--seed", "1", "2"], "unexpected argument '2'; a recipe comes first, then --key value"),
        (["recipe.yml"], "recipe.yml does not exist"),
        (["--epochs", "1", "stray.yaml"], "unexpected argument 'stray.yaml'"),
        (["--compile", "maybe"], "'compile' must be true or false"),
        (["--load_model", ""], "'init_from' is empty"),
        (["--init_from", "a", "--load_model", "b"], "'init_from' and 'load_model' are the same key"),
        (["--n_head", "3.5"], "'n_head' must be a whole number"),
        (["--learning_rate", "-1e-4"], "'learning_rate' must be more than 0, not -0.0001"),
    ],
)
def test_wrong_flags_are_refused(argv, message):
    with pytest.raises(RecipeError) as error:
        read(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [
        ("gpt_small", None, 124.5), ("gpt_medium", None, 354.9), ("llama_small", None, 123.6),
        ("llama_1b", 32000, 1100.0), ("bert_base", 30522, 110.1),
    ],
)  # fmt: skip
def test_recipes_build_models_of_the_size_that_they_say(name, vocab_size, millions):
    recipe = parse([str(ROOT / "recipes" / f"{name}.yaml")], FAMILIES)
    family = FAMILIES[recipe.model]
    positions = {
        family.config.attribute_map.get("max_position_embeddings", "max_position_embeddings"): recipe.data.max_len
    }
    with torch.device("meta"):
        settings = {"vocab_size": vocab_size} | positions | recipe.config
        model = family.tasks[recipe.task](family.config(**settings))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.3)
