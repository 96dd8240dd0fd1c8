"""Hostile and careless recipes: one line within a second, and nothing written."""

import re

import pytest
from conftest import train
from test_recipe import read

import hf_myllm
from hf_myllm.data.tokenizer import train_bpe
from hf_myllm.errors import RecipeError
from hf_myllm.files import read_yaml
from hf_myllm.recipe import Recipe


def bomb(levels=8, width=10):
    """YAML of a kilobyte that stands for 10^8 values."""
    rows = ["&a0 [" + ",".join("x" * width) + "]"]
    rows += [f"&a{level} [" + ",".join([f"*a{level - 1}"] * width) + "]" for level in range(1, levels)]
    return "training: {max_steps: [" + ", ".join(rows) + "]}"


TEXTS = {
    "anchors in anchors": (bomb(), "its anchors expand to too many values"),
    "an anchor in itself": ("training: &a {max_steps: [*a]}", "its anchors expand to too many values"),
    "a file without end": ("# " + "x" * (1 << 21), "longer than"),
    "sexagesimal": ("training: {max_steps: 1:30}", "'max_steps' must be a whole number, not '1:30'"),
    "octal": ("training: {max_steps: 010}", "'max_steps' must be a whole number, not '010'"),
    "octal of YAML 1.2": ("training: {max_steps: 0o10}", "'max_steps' must be a whole number, not '0o10'"),
    "hexadecimal": ("training: {max_steps: 0xff}", "'max_steps' must be a whole number, not '0xff'"),
    "a sexagesimal float": ("training: {learning_rate: 1:30.5}", "'learning_rate' must be a number, not '1:30.5'"),
    "a huge hexadecimal": ("training: {max_steps: 0x" + "f" * 9999 + "}", "must be a whole number, not '0xff"),
    "a huge number": ("training: {max_steps: " + "9" * 9999 + "}", "not valid YAML"),
    "an empty entry": ("data: {add_tokens: ''}", "'add_tokens' is empty"),
    "an empty entry of a list": ("data: {add_tokens: [a, '']}", "'add_tokens' is empty"),
    "half a character": ('run: {save_model: "a\\udc80"}', "'save_model' is not text that UTF-8 can hold"),
    "accumulation": ("training: {gradient_accumulation_steps: 10000000}", "must be at most 65536"),
    "a LoRA rank": ("run: {init_from: x}\nlora: {r: 1000000}", "'r' must be at most 4096"),
    "a key of the top": ("data: {model: gpt}", "'model' belongs at the top of a recipe, not in 'data:'"),
    "a section in a section": ("data: {training: {}}", "'training' belongs at the top of a recipe, not in 'data:'"),
    "an alias in another section": ("data: {num_epochs: 1}", "'epochs' belongs in the section 'training:'"),
    "a repeated key": ("data: {val_file: {a: x, a: y}}", "line 1: key 'a' is given twice"),
    "a repeated section": ("data: {}\nmodel: gpt\ndata: {}", "line 1: key 'data' is given twice"),
    "an unknown model with keys": ("model: gtp\nconfig: {width: 3}", "model 'gtp' is not known; .*did you mean 'gpt'"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_a_hostile_recipe_is_one_short_line(case, tmp_path):
    text, message = TEXTS[case]
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        read(tmp_path / "recipe.yaml")
    assert len(str(error.value)) < 2200


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "gtp", "--foo", "1"], "model 'gtp' is not known"),
        (["--model", "gtp", "--n_layer", "1"], "model 'gtp' is not known; .*; did you mean 'gpt'"),
        (["--seed", "010"], "'seed' must be a whole number, not '010'"),
        (["--save_model", "a\udc80"], "'save_model' is not text that UTF-8 can hold"),
        (["--val_file", "{a: x, a: y}"], "key 'a' is given twice; give it once"),
        (["--class_weights", "{dog: -1}"], "'class_weights' must be at least 0, not -1"),
        (["--class_weights", "{dog: many}"], "'class_weights' must be a number, not 'many'"),
        (["--class_weights", "equal"], "'class_weights' must be balanced, or a mapping of classes to weights"),
        (["--val_file", "{a: 3}"], "'val_file' must be text, not 3"),
    ],
)
def test_hostile_flags(argv, message):
    with pytest.raises(RecipeError, match=message):
        read(*argv)


def test_plain_values_of_yaml_are_those_of_version_1_2():
    text = "[1, -2, +3, 1_000, 1e-3, 1.5, .5, 2., -1.5e3, .inf, true, False, null, ~, yes, on, 2024-01-01, 1:30, 010]"
    numbers = [1, -2, 3, 1000, 1e-3, 1.5, 0.5, 2.0, -1500.0, float("inf")]
    assert read_yaml(text) == [*numbers, True, False, None, None, "yes", "on", "2024-01-01", "1:30", "010"]
    assert read_yaml("base: &b {a: 1}\nother: {<<: *b, c: 2}") == {"base": {"a": 1}, "other": {"a": 1, "c": 2}}
    recipe = Recipe(hub={"language": "no"}, run={"project_name": "010"})
    assert read_yaml(recipe.to_yaml())["hub"]["language"] == "no"
    assert read_yaml(recipe.to_yaml())["run"]["project_name"] == "010"


def test_a_huge_number_from_python_is_refused():
    with pytest.raises(RecipeError, match="'max_steps' must be .* thousands of digits"):
        Recipe(training={"max_steps": 10**6000})


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(
        "data:\n  train_file: [~/a.txt, b.txt]\n  val_file: ~/v.txt\n  tokenizer: ~/tok\n  chat_template: ~/c.jinja\n"
        "evaluation: {metrics: [~/m.py], start_context: ~/x}\nrun: {save_model: ~/runs/mine, init_from: ~/base}\n"
    )
    recipe, home = read(tmp_path / "recipe.yaml", "--val_file=~/w.txt"), str(tmp_path)
    assert recipe.data.train_file == [f"{home}/a.txt", "b.txt"]
    assert (recipe.data.val_file, recipe.data.tokenizer) == (f"{home}/w.txt", f"{home}/tok")
    assert recipe.data.chat_template == f"{home}/c.jinja"
    assert recipe.evaluation.metrics == [f"{home}/m.py"]
    assert recipe.evaluation.start_context == "~/x"  # text
    assert (recipe.run.save_model, recipe.run.init_from) == (f"{home}/runs/mine", f"{home}/base")
    datasets = Recipe(data={"datasets": [{"train_file": "~/a.txt"}, {"train_file": ["~/b.txt"]}]}).data.datasets
    assert [source["train_file"] for source in datasets] == [f"{home}/a.txt", [f"{home}/b.txt"]]


@pytest.mark.parametrize("name", ["recipe.yaml", "config.json", "README.md", "notes.txt"])
@pytest.mark.parametrize("init_from", ["scratch", "resume"])
def test_a_folder_with_files_of_another_origin_is_not_written_to(tiny, tmp_path, capsys, name, init_from):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("# mine\nmodel: gpt\n")
    assert train(*tiny(max_steps=2, init_from=init_from)) == 2
    assert f"holds files of another origin ({name})" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text() == "# mine\nmodel: gpt\n"


def test_logs_of_the_shell_and_of_slurm_may_be_in_the_folder(tiny, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("train.log", "slurm-12.out", "slurm-12.err"):
        (folder / name).write_text("hf-myllm\n")
    assert train(*tiny(max_steps=1)) == 0
    assert (folder / "train.log").read_text() == "hf-myllm\n"
    assert (folder / "model.safetensors").is_file()


def test_an_empty_folder_and_one_of_a_stopped_run_are_written_to(tiny, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".gitkeep").touch()
    assert train(*tiny(max_steps=2, start_context=None)) == 0
    for path in (folder / "model.safetensors", *folder.glob("checkpoint-*/trainer_state/complete.json")):
        path.unlink()
    for path in folder.glob("checkpoint-*"):
        path.rename(folder / f"old-{path.name}")  # stopped before its first checkpoint
    assert train(*tiny(max_steps=2, start_context=None)) == 0


LARGE = {
    "layers": ({"n_layer": 10**9}, "n_layer is 1000000000; it must be at most 1024"),
    "weights": ({"n_layer": 1000, "n_embd": 8192}, "weights take .* GB, and this machine has .* GB of memory"),
    "a batch": ({"batch_size": 10**7, "total_batch_size": 10**7}, "batch_size: 320,000,000 tokens at once"),
    "accumulation": ({"total_batch_size": None, "gradient_accumulation_steps": 65536, "batch_size": 1000},
                     "65,536,000 rows per step are too many"),
    "a step of many epochs": ({"total_batch_size": 1 << 24, "max_steps": 9},
                              "a step of 16,777,216 rows reads each of the .* rows over"),
    "a decay without wsd": ({"decay_steps": 2}, "decay_steps has no effect with lr_schedule cosine"),
    "a decay and a warmup": ({"max_steps": 10, "lr_schedule": "wsd", "decay_steps": 8, "warmup_steps": 4},
                             "warmup_steps 4 and decay_steps 8 are more than the run's 10 steps"),
    "a stride": ({"stride": 10**6}, "stride 1000000 is beyond the .* tokens of"),
    "a metric": ({"metric_for_best": "val_lss"}, "metric_for_best: val_lss is not a metric of task causal; .*val_loss"),
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_what_cannot_work_is_refused_before_a_folder_is_made(tiny, tmp_path, capsys, case):
    changes, message = LARGE[case]
    assert train(*tiny(**changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert re.search(message, error[0]), error
    assert not (tmp_path / "run").exists()


def test_data_from_two_places_is_refused(tmp_path, stories):
    tokenizer = train_bpe(["Anna likes the cat."], 300)
    tokenizer.save_pretrained(tmp_path / "tok")
    (tmp_path / "recipe.yaml").write_text(f"data: {{train_file: {stories}, tokenizer: {tmp_path / 'tok'}}}\n")
    texts = ["Anna likes the cat. " * 50] * 4
    options = {"max_steps": 1, "max_len": 16, "save_model": tmp_path / "run", "val_fraction": 0.25}
    options |= {"config": {"n_layer": 1, "n_head": 2, "n_embd": 16}}
    with pytest.raises(RecipeError, match="train_file: data in memory is given too"):
        hf_myllm.train(Recipe.load(tmp_path / "recipe.yaml", train_file="x.txt", **options), texts)
    with pytest.raises(RecipeError, match="val_file: data in memory is given too"):
        hf_myllm.train(Recipe(data={"val_file": "x.txt"}), texts, eval_data=texts)
    assert not (tmp_path / "run").exists()
    assert hf_myllm.train(Recipe.load(tmp_path / "recipe.yaml", **options), texts).step == 1  # of a file: replaced
