"""Data, models and folders of somebody else: nothing in them is run, followed out of the run's folder, or believed."""

import io
import json
import os
import pickle
import re
import zipfile

import pytest
import torch
import yaml
from conftest import run_cli, train
from small_runs import flags, generate, predict, read_lines, write_lines

from hf_myllm.data.pickled import read_token_ids
from hf_myllm.data.sources import file_source
from hf_myllm.errors import CheckpointError, DataError, RecipeError, first_line
from hf_myllm.files import markdown, markdown_code, open_new, write_text_atomically
from hf_myllm.recipe import Recipe
from hf_myllm.terminal import warn

METRIC = """
import datasets
import evaluate
import os
open(os.path.join({folder!r}, "ran"), "a").close()
class Halves(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{name: datasets.Value("int64") for name in ("predictions", "references")}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references):
        return {{"halves": 0.5}}
"""


def test_passwords_and_tokens_are_in_no_message(capsys):
    for secret in ("https://jane:s3cr@t@localhost:9/x.txt", "http://s3cr@localhost:9", "hf_" + "s3cr" * 6):
        for error in (DataError(f"{secret}: it is gone"), RecipeError(f"train_file: {secret!r} is gone")):
            assert "s3cr" not in str(error)
            assert str(error).endswith("is gone")
        with pytest.raises(DataError, match="(cannot be read|hf_...)") as raised:
            file_source(secret)
        assert "s3cr" not in str(raised.value)
        warn(f"retrying {secret} now")
        assert capsys.readouterr().err.strip() in (
            "warning: retrying https://***@localhost:9/x.txt now",
            "warning: retrying http://***@localhost:9 now",
            "warning: retrying hf_... now",
        )


# ---- programs


@pytest.mark.parametrize("where", ["file", "folder", "folder with the name of a known metric", "a user of the Hub"])
def test_the_code_of_a_metric_runs_only_if_it_is_trusted(tmp_path, noise, capsys, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    names = {"file": "./halves.py", "folder": "halves", "a user of the Hub": "someone/halves"}
    name = names.get(where, "accuracy")
    if where != "a user of the Hub":
        path = tmp_path / (name if where == "file" else f"{name}/{name}.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(METRIC.format(folder=str(tmp_path)))
    settings = flags(**noise, max_steps=1, metrics=name)
    settings += ["--eval_freq", "1"]
    for arguments in (settings, [*settings, "--dry_run"]):
        assert train(*arguments) == 2
        owner = "belongs to a user of the Hub" if "Hub" in where else "is a file or folder here"
        assert f"error: metrics: {name} {owner}, and its code is not run; give --trust" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()
    if where != "a user of the Hub":
        assert train(*settings, "--trust_metric_code", "true") == 0
        assert (tmp_path / "ran").exists()
        assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["val_halves"] == 0.5
        # the recipe of the run does not trust it for the next one who has it
        (tmp_path / "ran").unlink()
        assert run_cli("evaluate", tmp_path / "run") == 2
        assert "its code is not run" in capsys.readouterr().err
        assert not (tmp_path / "ran").exists()
        assert run_cli("evaluate", tmp_path / "run", "--trust_metric_code", "true") == 0
        assert "halves 0.5" in capsys.readouterr().out


@pytest.fixture
def custom_model(gpt, tmp_path):
    """A copy of a model whose configuration and tokenizer ask to run code beside them."""
    folder = tmp_path / "custom"
    folder.mkdir()
    for path in gpt.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")

    def customize(**changes):
        for name, classes in (
            ("config.json", {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
            ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]}),
        ):
            content = json.loads((folder / name).read_text()) | {"auto_map": classes}
            content |= changes if name == "config.json" else {}
            (folder / name).write_text(json.dumps(content))
        return folder

    return customize


def test_code_beside_a_model_is_not_run_and_nobody_is_asked(custom_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    folder = custom_model(model_type="evilmodel", architectures=["EvilForCausalLM"])
    (tmp_path / "a.txt").write_text("anna\n")
    new = flags(model="gpt", train_file=tmp_path / "a.txt", val_fraction=0, max_steps=1, save_model=tmp_path / "run")
    for run in (
        lambda: generate(folder, "--prompt", "x"),
        lambda: predict(folder, "--input", tmp_path / "a.txt"),
        lambda: train(*new, "--init_from", folder),
        lambda: train(*new, "--tokenizer", folder, "--n_layer", 1, "--n_head", 2, "--n_embd", 16, "--dry_run"),
    ):
        run()
        error = capsys.readouterr().err
        assert len([line for line in error.splitlines() if "error" in line]) <= 1, error
        assert "trust_remote_code" not in error
    assert not (tmp_path / "ran").exists()


def test_the_map_to_custom_code_is_not_saved(custom_model, tmp_path):
    (tmp_path / "a.txt").write_text("say anna: anna. rome " * 60)
    settings = {"model": "gpt", "train_file": tmp_path / "a.txt", "val_fraction": 0, "max_steps": 1, "max_len": 16}
    assert train(*flags(**settings, init_from=custom_model(), save_model=tmp_path / "run")) == 0
    saved = [path.read_text() for path in (tmp_path / "run").rglob("*.json")]
    assert len(saved) > 5
    assert not any("auto_map" in text for text in saved)


def test_a_librarys_advice_to_trust_a_file_is_not_passed_on():
    advice = "Weights only load failed. This file can still be loaded, re-running with `weights_only` set to `False`"
    assert first_line(ValueError(advice)) == "it holds more than tensors"
    asked = "It has code. Please pass the argument `trust_remote_code=True` to allow it."
    assert first_line(ValueError(asked)) == "It has code."
    assert first_line(ValueError("a (plain) message: x=True; see y")) == "a (plain) message: x=True; see y"


# ---- token ids that expand


def test_a_compressed_file_of_torch_save_is_not_read(tmp_path):
    stored, packed = tmp_path / "stored.pkl", tmp_path / "packed.pkl"
    torch.save(torch.zeros(1 << 20, dtype=torch.int64), stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert len(read_token_ids(stored)) == 1 << 20
    inner = tmp_path / "inner.pkl"
    inner.write_bytes(pickle.dumps(Reduced(torch.storage._load_from_bytes, packed.read_bytes())))
    for path in (packed, inner):
        with pytest.raises(DataError, match=f"{path.name} is a pickle that asks for more bytes than it has"):
            read_token_ids(path)


class Reduced:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ---- links and paths


def test_nothing_is_written_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "a.json").symlink_to(victim)
    with pytest.raises(OSError, match="it is a link"):
        write_text_atomically(tmp_path / "a.json", "x")
    (tmp_path / "b.json.partial").symlink_to(victim)
    write_text_atomically(tmp_path / "b.json", "x")
    assert (tmp_path / "b.json").read_text() == "x"
    (tmp_path / "c.json").symlink_to(victim)
    with pytest.raises(FileExistsError):
        open_new(tmp_path / "c.json")
    assert victim.read_text() == "mine"


LINKS = ["run.json", "metrics.jsonl", "recipe.yaml", "report.html", "loss.png", "config.json", ".lock", "README.md"]


@pytest.mark.parametrize("name", [*LINKS, "checkpoint-1", "checkpoint-2.partial", "profile", "tensorboard"])
def test_a_run_does_not_write_where_a_link_leads(tiny, tmp_path, capsys, name):
    victim, run, mine = tmp_path / "victim", tmp_path / "run", "# to repeat this run: as a run writes it"
    run.mkdir()
    (run / "recipe.yaml").write_text(mine)  # of a run that was stopped before its first checkpoint
    if name in LINKS:
        victim.write_text(mine)
    else:
        victim.mkdir()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    before = {*os.listdir(run), ".lock"}
    assert train(*tiny(max_steps=2, eval_freq=None, save_freq=1)) == 2
    error = capsys.readouterr().err
    assert "it is a link, and nothing is written through links; remove it" in error or "holds the checkpoints" in error
    assert {*os.listdir(run), ".lock"} == before
    assert victim.read_text() == mine if victim.is_file() else not os.listdir(victim)


def test_a_report_is_not_written_through_a_link(gpt, tmp_path, capsys):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    run.mkdir()
    for name in ("run.json", "metrics.jsonl", "recipe.yaml", "config.json"):
        (run / name).write_bytes((gpt / name).read_bytes())
    (run / "report.html").symlink_to(victim)
    (run / "loss.png.partial").symlink_to(victim)
    assert run_cli("report", run) == 2
    assert "it is a link" in capsys.readouterr().err
    assert victim.read_text() == "mine"


def test_linked_files_of_a_downloaded_folder_are_not_published(gpt, tmp_path):
    from hf_myllm import checkpoint
    from hf_myllm.hub import push

    secret = tmp_path / "secret"
    secret.write_text("a private key")
    source = next(gpt.glob("checkpoint-*"))
    folder, run = tmp_path / "run" / source.name, tmp_path / "run"
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "vocab.txt").symlink_to(secret)
    (run / "run.json").write_bytes((gpt / "run.json").read_bytes())
    for name in ("README.md", "loss.png"):
        (run / name).symlink_to(secret)
    for staged in (checkpoint.stage(folder), tmp_path / "staging"):
        if not staged.exists():
            staged.mkdir()
            push._stage(folder, staged, "user/model", None)
        assert not any(b"a private key" in path.read_bytes() for path in staged.iterdir())
        assert (staged / "config.json").is_file()
    for name in ("README.md", "loss.png"):
        (run / name).unlink()
    checkpoint.publish(folder, run)
    assert not (run / "vocab.txt").exists()
    (run / "config.json").unlink()
    (run / "config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="it is a link"):
        checkpoint.publish(folder, run)
    assert secret.read_text() == "a private key"


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/../../b", "..\\x", ".."])
def test_a_project_stays_in_the_runs_folder(name):
    with pytest.raises(RecipeError, match="project_name: .* leads out of the run's folder; give a name"):
        Recipe(run={"project_name": name})
    assert Recipe(run={"project_name": "my..project/a"}).run.project_name == "my..project/a"


# ---- what people read


def test_escape_sequences_do_not_reach_the_terminal(tmp_path, noise, capsys):
    evil = "\x1b]0;title\x07\x9b2J\u202e"
    names = [f"a{evil}", f"b{evil}"]
    rows = [{"text": f"anna {n} {evil}", "label": names[n % 2]} for n in range(40)]
    data = write_lines(tmp_path / "train.jsonl", rows)
    settings = flags(**noise | {"train_file": data, "val_file": None, "val_fraction": 0.2}, max_steps=2)
    outputs = []
    for arguments, code in (
        ((*settings, "--dry_run"), 0),
        (settings, 0),
        ((*settings, "--task", "token_classification"), 2),
        ((*settings, "--train_file", tmp_path / f"data{evil}"), 2),
    ):
        assert train(*arguments) == code
        outputs.append(capsys.readouterr())
    write_lines(tmp_path / "bad.jsonl", [*rows[:2], {"text": 3, evil: 1}])
    assert predict(tmp_path / "run", "--input", tmp_path / "bad.jsonl", "--skip_bad_rows") == 0
    outputs.append(capsys.readouterr())
    lines = outputs[-1].out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == [row["text"] for row in rows[:2]]
    assert {json.loads(line)["label"] for line in lines} <= set(names)
    for output in outputs:
        for text in (output.out, output.err):
            assert not set(text) & set("\x1b\x07\x9b\u202e"), text[:300]


def test_labels_are_shown_as_they_are_in_markdown(tmp_path, noise):
    evil = "`x` <img src=x onerror=alert(1)>\n\n# [a](javascript:b) | c"
    rows = [{"text": f"anna {n}", "label": [evil, "plain"][n % 2]} for n in range(40)]
    data = write_lines(tmp_path / "a|b`<i>.jsonl", rows)
    settings = noise | {"train_file": data, "val_file": None, "val_fraction": 0.2, "max_steps": 1}
    assert train(*flags(**settings)) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    one_line = " ".join(evil.split())
    assert f"Its labels are `` {one_line} ``, `plain`." in card
    outside = card.replace(f"`` {one_line} ``", "").partition("```yaml")[0]
    assert "<img" not in outside
    assert r"a\|b\`\<i\>.jsonl" in outside
    assert yaml.safe_load(card.split("---")[1])
    assert markdown("a_b *c*\n# d") == r"a\_b \*c\* # d"
    assert markdown_code("a: ```\nb", is_block=True) == "````yaml\na: ```\nb\n````"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_an_encoding_that_lacks_a_character_ends_nothing(tmp_path, encoding, monkeypatch, capsys):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    monkeypatch.setattr("hf_myllm.cli._dispatch", lambda arguments: print("caf\u00e9 \u4e2d x"))
    assert run_cli("recipes") == 0
    assert raw.getvalue().startswith(b"caf")
    assert raw.getvalue().endswith(b"x\n")


def test_git_lfs_pointers_in_a_models_folder_are_named(custom_model, tmp_path, capsys):
    folder, pointer = custom_model(), b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (folder / "model.safetensors").write_bytes(pointer)
    assert generate(folder, "--prompt", "x") == 2
    assert "model.safetensors: it is a Git LFS pointer; fetch it with git lfs pull" in capsys.readouterr().err
    (folder / "tokenizer.json").write_bytes(pointer)
    (tmp_path / "a.txt").write_text("anna")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "max_len": 16, "max_steps": 1, "save_model": tmp_path / "run"}
    assert train(*flags(model="gpt", train_file=tmp_path / "a.txt", tokenizer=folder, **sizes)) == 2
    assert re.search(r"(tokenizer.json|model.safetensors): it is a Git LFS pointer", capsys.readouterr().err)
