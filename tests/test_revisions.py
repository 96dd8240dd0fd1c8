"""`id@revision` is a model of the Hub at a branch, tag or commit, downloaded once and then read from the cache."""

import json

import pytest
from conftest import read_weights, run_cli, train
from hub_server import TOKEN, serve

import hf_myllm
from hf_myllm.errors import ModelError
from hf_myllm.models import revisions

NAME = "user/a-model"


@pytest.fixture(scope="module")
def run(tmp_path_factory, stories):
    folder = tmp_path_factory.mktemp("model")
    sizes = ["--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--max_len", 32, "--max_steps", 2, "--save_freq", 1]
    data = ["--train_file", stories, "--tokenizer", "{train: bpe, vocab_size: 300}"]
    assert train(*sizes, *data, "--save_model", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def hub(run, monkeypatch, tmp_path):
    """A server with the model on main, and the model of the first step on a branch."""
    with serve() as (state, address):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        constants = {"ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}
        constants["HUGGINGFACE_CO_URL_TEMPLATE"] = address + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        branches = {"main": run, "first": run / "checkpoint-1"}
        files = {
            name: {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
            for name, folder in branches.items()
        }
        state.repos[NAME] = {"private": False, "branches": files, "commits": [("first", "x")]}
        revisions._download.cache_clear()
        yield state
    revisions._download.cache_clear()


@pytest.fixture
def offline(monkeypatch):
    def end():
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        revisions._download.cache_clear()

    return end


def test_a_revision_is_downloaded_once_and_recorded(run, hub, offline, stories, tmp_path):
    """Of the branch, not of main; training, evaluation and generation from the cache too."""
    flags = ["--train_file", stories, "--max_len", 32, "--max_steps", 1, "--init_from", f"{NAME}@first"]
    flags += ["--tokenizer", f"{NAME}@first"]
    assert train(*flags, "--save_model", tmp_path / "out") == 0
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    folder = revisions.resolve(f"{NAME}@first")
    assert facts["init_from"] == f"{NAME}@first"
    assert facts["init_from_commit"] == revisions.find_id(folder)[1]
    assert facts["base_model"] == NAME
    assert train(*flags, "--init_from", run / "checkpoint-1", "--save_model", tmp_path / "local") == 0
    assert read_weights(tmp_path / "out") == read_weights(tmp_path / "local")
    assert json.loads((tmp_path / "local" / "run.json").read_text())["init_from_commit"] is None
    weights = [line for _, line in hub.requests if line.startswith("GET") and "model.safetensors" in line]
    assert len(weights) == 1

    offline()
    num_requests = len(hub.requests)
    assert train(*flags, "--save_model", tmp_path / "again") == 0
    assert read_weights(tmp_path / "again") == read_weights(tmp_path / "out")
    commit = facts["init_from_commit"]
    assert train(*flags[:-2], "--init_from", f"{NAME}@{commit}", "--eval_only", "--val_file", stories / "00.txt") == 0
    assert run_cli("generate", f"{NAME}@first", "--prompt", "Anna", "--max_new_tokens", 2) == 0
    model, tokenizer = hf_myllm.load(f"{NAME}@first")
    assert len(tokenizer) == 300
    assert model.config.n_embd == 32
    assert len(hub.requests) == num_requests
    with pytest.raises(ModelError, match=f"{NAME}@main: the Hugging Face Hub did not give this revision"):
        revisions.resolve(f"{NAME}@main")


def test_an_adapter_names_the_commit_of_its_base_model(hub, offline, stories, tmp_path):
    flags = [
        "--train_file",
        stories,
        "--max_len",
        32,
        "--max_steps",
        1,
        "--r",
        2,
        "--save_model",
        tmp_path / "out",
    ]
    assert train(*flags, "--init_from", f"{NAME}@first") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == NAME
    assert config["revision"] == revisions.find_id(revisions.resolve(f"{NAME}@first"))[1]
    offline()
    assert run_cli("generate", tmp_path / "out", "--prompt", "Anna", "--max_new_tokens", 2) == 0


def test_paths_have_no_revision(run, hub, tmp_path, monkeypatch, stories, capsys):
    (tmp_path / "name@first").symlink_to(run)
    assert str(revisions.resolve(tmp_path / "name@first")) == str(tmp_path / "name@first")
    assert train("--train_file", stories, "--init_from", f"{run}@first", "--max_steps", 1) == 2
    assert f"{run}@first: {run} is a path here, which has no revisions; leave out @first" in capsys.readouterr().err
    with pytest.raises(ModelError, match=f"{NAME}@nope: the Hugging Face Hub did not give this revision") as error:
        revisions.resolve(f"{NAME}@nope")
    assert "\n" not in str(error.value)
