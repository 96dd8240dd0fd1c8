"""Damaged folders, full disks, templates that fail and terminals that cannot show a text: one line, nothing torn."""

import errno
import hashlib
import io
import json
import shutil
import threading

import pytest
from conftest import read_metrics, run_cli, train
from small_runs import write_lines

import hf_myllm
from hf_myllm.data.cache import cached_folder
from hf_myllm.data.tokenizer import render_chat
from hf_myllm.errors import InputError, ModelError
from hf_myllm.generate import load_tokenizer
from hf_myllm.recipe import Recipe
from hf_myllm.reporting import metrics_log

NAMED = "caf\u00e9 \u6f22\u5b57 "


@pytest.fixture(scope="module")
def finished(stories, tmp_path_factory):
    """Return the folder of a finished run, and the flags that trained it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(NAMED * 400, encoding="utf-8")
    recipe = Recipe(
        config={"n_layer": 1, "n_head": 2, "n_embd": 16},
        data={
            "train_file": str(folder / "text.txt"),
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "max_len": 16,
            "val_fraction": 0.2,
        },
        training={"max_steps": 4, "batch_size": 4},
        evaluation={"eval_freq": 2, "start_context": ""},
        run={"save_model": str(folder / "run"), "save_freq": 2},
    )
    hf_myllm.train(recipe)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def resume(run, **flags):
    return train(run / "recipe.yaml", "--save_model", run, "--resume", *(f"--{k}={v}" for k, v in flags.items()))


def errors(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines


# ---- terminals


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_text_that_the_output_cannot_show_is_replaced(finished, tmp_path, monkeypatch, encoding):
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", output)
    recipe = Recipe.load(finished / "recipe.yaml", save_model=str(tmp_path / "again"))
    assert hf_myllm.train(recipe).step == 4
    assert run_cli("generate", finished, "--prompt", NAMED, "--max_new_tokens", 2) == 0
    output.flush()
    shown = output.buffer.getvalue().decode(encoding)
    assert "step 2: training loss" in shown
    assert "?" in shown


# ---- chat templates


@pytest.fixture
def tokenizer(finished):
    return load_tokenizer(finished)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}"
TEMPLATES = {
    "{{ raise_exception('no') }}": "the chat template refuses it: no",
    "{% for": "the chat template refuses it",
    "{{ messages[9].content.x }}": "the chat template refuses it",
    "{{ 1 / 0 }}": "the chat template refuses it",
    LOOPS: "the chat template does not end within 0.3 seconds",
}


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_template_that_raises_or_does_not_end_is_an_error(tokenizer, monkeypatch, in_thread):
    monkeypatch.setattr("hf_myllm.data.tokenizer.TEMPLATE_SECONDS", 0.3)
    caught = []

    def render():
        for tokenizer.chat_template, message in TEMPLATES.items():
            with pytest.raises((ValueError, ModelError), match=message) as error:
                render_chat(tokenizer, [{"role": "user", "content": "hello"}])
            caught.append(error)

    if in_thread:
        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
    else:
        render()
    assert len(caught) == len(TEMPLATES)


def test_templates_of_commands_end_in_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_myllm.data.tokenizer.TEMPLATE_SECONDS", 0.3)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = write_lines(tmp_path / "chats.jsonl", [{"messages": turns}] * 9)
    for template in (LOOPS, "{{ raise_exception('no') }}"):
        (run / "chat_template.jinja").write_text(template)
        assert run_cli("generate", run, "--chat", "--prompt", "hi") == 2
        (error,) = errors(capsys)
        assert TEMPLATES[template] in error
        flags = ["--task", "instruction", "--train_file", rows, "--chat_template", run / "chat_template.jinja"]
        flags += ["--init_from", run, "--save_model", tmp_path / "chat", "--max_steps", 1, "--max_len", 16]
        assert train("--model", "gpt", *flags) == 2
        assert TEMPLATES[template] in errors(capsys)[-1]
        assert not (tmp_path / "chat").exists()


# ---- disks


def test_a_full_disk_without_a_run_names_no_resume(finished, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "curves.svg")

    monkeypatch.setattr("hf_myllm.reporting.plots.plot", fail)
    assert run_cli("plot", finished) == 2
    assert errors(capsys) == ["error: curves.svg: No space left on device; free some space, then try again"]


@pytest.mark.parametrize("step", ["before", "after"])
def test_a_disk_that_is_full_at_run_json_is_one_line(finished, tmp_path, capsys, monkeypatch, step):
    write, calls = metrics_log._write_json, []

    def fail(run_dir, content):
        calls.append(content)
        if step == "before" or content.get("published_step"):
            raise OSError(errno.ENOSPC, "No space left on device", str(run_dir / "run.json.partial"))
        write(run_dir, content)

    monkeypatch.setattr(metrics_log, "_write_json", lambda run_dir, content: fail(tmp_path / "run", content))
    assert train(finished / "recipe.yaml", "--save_model", tmp_path / "run") == 2
    (error,) = errors(capsys)
    assert error.endswith("run.json.partial: No space left on device; free some space, then use --init_from resume")
    monkeypatch.undo()
    assert resume(tmp_path / "run") == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_cache_that_lost_or_truncated_a_file_is_made_again(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    prepare = ("prepare", finished / "recipe.yaml", "--save_model", tmp_path / "run")
    assert run_cli(*prepare) == 0
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    contents = {path: path.read_bytes() for path in files}
    assert {"index.json", "shard-00000.bin", "shard-00000.documents", "tokenizer.json"} <= {path.name for path in files}
    for index, (path, content) in enumerate(contents.items()):
        if index % 3 == 0:
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if index % 3 == 1 else bytes(len(content)))
        assert run_cli(*prepare) == 0
        assert {path: path.read_bytes() for path in files} == contents


@pytest.mark.parametrize("position", [0, 5_000_000, 9_999_999, None])
@pytest.mark.parametrize("name", ["a.bin", "train/a.bin"])
def test_a_cached_file_that_changed_is_made_again(name, position, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    made = []

    def make(folder):
        made.append(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(10_000_000))

    file = cached_folder(["key"], make) / name
    cached_folder(["key"], make)
    shutil.copytree(file.parents[name.count("/")], tmp_path / "copy")  # has other times
    shutil.rmtree(file.parents[name.count("/")])
    (tmp_path / "copy").rename(file.parents[name.count("/")])
    cached_folder(["key"], make)
    assert len(made) == 1
    if position is None:
        file.unlink()
    else:  # a single byte
        with open(file, "r+b") as damaged:
            damaged.seek(position)
            damaged.write(b"\1")
    assert cached_folder(["key"], make) / name == file
    assert len(made) == 2
    assert file.read_bytes() == bytes(10_000_000)


# ---- damaged folders


def sign(checkpoint, name, content):
    """Replace a file of a checkpoint, and its digest in the marker."""
    data = content.encode()
    (checkpoint / name).write_bytes(data)
    marker = checkpoint / "trainer_state" / "complete.json"
    record = json.loads(marker.read_text())
    record["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
    marker.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "change",
    [{"step": "4"}, {"num_processes": 0}, {"recipe": {}}, {"data": {"training data": 3}}, {"skipped": None}, [], None],
    ids=str,
)
def test_a_state_of_another_type_is_one_line(run, capsys, change):
    newest = run / "checkpoint-4"
    state = json.loads((newest / "trainer_state" / "state.json").read_text())
    sign(newest, "trainer_state/state.json", json.dumps(state | change if isinstance(change, dict) else change))
    assert resume(run, max_steps=6, allow_changed="true") == 2
    assert "checkpoint-4/trainer_state/state.json: it cannot be used" in errors(capsys)[-1]


RUN_FACTS = [
    {"launches": [{"a": 1}], "parameters": "x", "data": {"training": 1}, "labels": [1, 2], "recipe": "text", "unit": 3},
    {"launches": 3, "data": {"training": {"sources": [3]}}, "unigram_loss": "low", "published_step": "four"},
    {"launches": [{"step": 0, "time": 1e300, "processes": 1, "device": "x", "precision": "x", "system": "x",
                   "versions": {}}], "parameters": -1, "trained_parameters": [1]},
    {"launches": [], "license": 3, "language": [], "base_model": {}, "data": None},
    [], None,
]  # fmt: skip
LINES = [
    '{"step": 2, "loss": "low", "learning_rate": [1]}', '{"step": 3, "train_loss": {}, "val_loss": "x"}',
    '{"step": true}', '{"step": -1}', '{"step": 9e99}', "[1]", "3", "nonsense", '{"step": 2, "sample": 5}',
    '{"step": 2, "loss": NaN, "learning_rate": 1e999, "train_loss": Infinity}', '{"step": 2, "peak_memory_gb": null}',
    '{"step": 4, "learning_rate": null, "train_seconds": "x", "tokens": null, "tokens_per_second": null}',
]  # fmt: skip


@pytest.mark.parametrize("content", RUN_FACTS, ids=lambda content: json.dumps(content)[:40])
def test_a_report_of_damaged_facts_is_written(run, content):
    (run / "run.json").write_text(json.dumps(content))
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n".join(LINES) + "\n")
    assert run_cli("report", run) == 0
    assert "<h2>Curves</h2>" in (run / "report.html").read_text()


def test_a_damaged_log_is_drawn(run, pictures):
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n".join(LINES) + "\n")
    assert run_cli("plot", run, "--output", run / "curves.png") == 0
    assert (run / "curves.png").stat().st_size > 10_000


def test_a_damaged_log_does_not_end_a_resumed_run(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n".join(LINES) + "\n")
    (run / "run.json").write_text(json.dumps(RUN_FACTS[0]))
    assert resume(run, max_steps=6, allow_changed="true") == 0
    assert read_metrics(run, "step")[-1] == 6


@pytest.mark.parametrize(
    ("command", "name", "content"),
    [
        ("generate", "config.json", "{"), ("predict", "config.json", "[]"), ("evaluate", "config.json", "{}"),
        ("evaluate", "config.json", '{"model_type": "gpt2", "n_head": "x"}'), ("predict", "recipe.yaml", "data: 3"),
        ("generate", "config.json", '{"model_type": 3}'), ("predict", "tokenizer.json", "{"),
        ("generate", "tokenizer_config.json", "["), ("generate", "model.safetensors", "x" * 99),
        ("evaluate", "model.safetensors", ""), ("generate", "generation_config.json", "["),
        ("evaluate", "recipe.yaml", "\x00"),
    ],
)  # fmt: skip
def test_commands_on_a_damaged_folder_end_in_one_line(run, tmp_path, capsys, command, name, content):
    write_lines(tmp_path / "rows.jsonl", [{"text": "a"}])
    (run / name).write_text(content)
    code = run_cli(command, run, *(["--input", tmp_path / "rows.jsonl"] if command == "predict" else []))
    lines = errors(capsys)
    assert code in (0, 2)
    assert len(lines) == (1 if code else 0), lines


def test_a_run_outside_the_main_thread_ends_like_any_other(finished, tmp_path):
    codes = []
    arguments = finished / "recipe.yaml", "--save_model", tmp_path / "run"
    thread = threading.Thread(target=lambda: codes.append(train(*arguments)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_an_error_of_the_api_has_the_documented_type(finished):
    with pytest.raises(InputError):
        hf_myllm.generate(finished, prompt=3)
