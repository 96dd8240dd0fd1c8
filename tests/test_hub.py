"""Pushing to the Hub: which files, the model card, the check by stock transformers, and a Hub that fails."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import run_command, train, write_story
from families import ENCODER_DECODERS
from hub_server import STAGES, TOKEN, serve
from launching import start
from patches import train_online_and_slowly
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hf_myllm import cli
from hf_myllm.errors import HubError
from hf_myllm.hub import push as hub
from hf_myllm.hub import stock_check
from hf_myllm.hub.card import make_card, write_card
from hf_myllm.recipe import Recipe
from hf_myllm.reporting.facts import public_value

NAME = "user/a-model"


@pytest.fixture
def server():
    with serve() as (state, address):
        yield state, address


def environment(address, home, **more):
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return kept | {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)} | more


@pytest.fixture
def logged_in(monkeypatch, server, tmp_path):
    """The server, for a run in this process and the processes that it starts to push."""
    state, address = server
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name, value in environment(address, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory, stories):
    """A finished run on files in a folder whose name must not be published."""
    folder = tmp_path_factory.mktemp("secret-folder")
    shutil.copytree(stories, folder / "stories")
    words = ["--train_file", folder / "stories", "--tokenizer", "{train: bpe, vocab_size: 300}", "--max_len", 32]
    words += ["--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--max_steps", 20, "--eval_freq", 10, "--eval_iter", 1]
    assert train(*words, "--save_freq", 10, "--license", "mit", "--save_model", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def stock_here(monkeypatch):
    """Let the check run stock transformers in this process, where this package hides: imports take seconds."""

    def run(arguments, cwd, env, **options):
        script, *rest = arguments[1:]
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.partition(".")[0] == "hf_myllm"]:
                patch.delitem(sys.modules, name)
            patch.setattr(sys, "argv", [script, *rest])
            patch.setattr(sys, "path", [str(Path(script).parent), *sys.path])
            patch.chdir(cwd)
            try:
                runpy.run_path(script, run_name="__main__")
                code, error = 0, ""
            except SystemExit as exit:
                code, error = 1, str(exit)
            except Exception:
                code, error = 1, traceback.format_exc()
        return subprocess.CompletedProcess(arguments, code, "", error)

    monkeypatch.setattr(stock_check, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def fake_hub(monkeypatch, server, tmp_path):
    """The server; push() works in this process, retries at once, and skips the check by stock transformers."""
    state, address = server
    monkeypatch.setattr(hub, "RETRY_DELAYS", (0.01, 0.01))
    monkeypatch.setattr(hub, "check", lambda folder: None)  # slow; other tests cover it
    monkeypatch.setattr(hub, "check_target", lambda repo: None)
    from huggingface_hub import HfApi

    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=address, token=TOKEN))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False, raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return state


def test_others_can_load_what_is_pushed(run, server, tmp_path):
    state, address = server
    arguments = "push", run, NAME, "--private"
    result = run_command(*arguments, module="hf_myllm.hub", env=environment(address, tmp_path / "one"))
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rf"pushed: {address}/{NAME}/commit/\w+\n", result.stdout)
    assert result.stderr == ""
    repo = state.repos[NAME]
    assert repo["private"]
    assert repo["commits"] == [("main", "Model of run")]
    files = state.files(NAME)
    assert set(files) == {
        *("README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors", "tokenizer.json"),
        "tokenizer_config.json",
    }
    for name in set(files) - {"README.md"}:
        assert files[name] == (run / name).read_bytes(), name
    # with the four lines of the card, in a process that does not import this package
    card = files["README.md"].decode()
    lines = re.search(r"```python\n(.*?)```", card, re.S)[1].strip()
    assert len(lines.splitlines()) <= 4
    script = lines + "\nimport sys\nassert 'hf_myllm' not in sys.modules"
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(address, tmp_path / "two"),
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("Once upon a time")


def test_from_pretrained_gives_the_same_bytes_back(run, server, fake_hub, tmp_path):
    _, address = server
    hub.push(run / "checkpoint-10", NAME, revision="half-way")
    script = (
        "import sys; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        "name, out = sys.argv[1:]\n"
        "A.from_pretrained(name, revision='half-way').save_pretrained(out)\n"
        "T.from_pretrained(name, revision='half-way')\n"
    )
    arguments = [sys.executable, "-c", script, NAME, str(tmp_path / "back")]
    loaded = subprocess.run(arguments, capture_output=True, text=True, env=environment(address, tmp_path / "two"))
    assert loaded.returncode == 0, loaded.stderr
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (run / "checkpoint-10" / name).read_bytes()


def test_a_second_push_replaces_the_model_and_keeps_other_files(fake_hub, run):
    hub.push(run, NAME)
    fake_hub.files(NAME)["model-00001-of-00002.safetensors"] = b"of another model"
    others = {
        "notes.txt": b"notes",
        "onnx/model.safetensors": b"another format",
        "tokenizer_docs/about.md": b"docs",
        "README.md": b"# edited on the Hub",
    }
    fake_hub.files(NAME).update(others)
    hub.push(run, NAME)
    assert "model-00001-of-00002.safetensors" not in fake_hub.files(NAME)
    assert {name: fake_hub.files(NAME)[name] for name in others} == others


def test_a_private_push_is_refused_by_a_public_repository(fake_hub, run):
    hub.push(run, NAME)
    before = dict(fake_hub.files(NAME))
    with pytest.raises(HubError, match=f"{NAME}: it exists and is public"):
        hub.push(run / "checkpoint-10", NAME, private=True)
    assert fake_hub.files(NAME) == before


def test_only_model_files_are_pushed(fake_hub, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for name in ("tokenizer_training_secrets.txt", "vocab.customers", "private.safetensors", "tokenizer.json.partial"):
        (other / name).write_text("mine")
    (other / "merges.txt").symlink_to("/etc/passwd")
    hub.push(other, NAME)
    assert set(fake_hub.files(NAME)) == {path.name for path in run.iterdir() if hub._is_shared(path.name)}


# ---- the card


def front_matter(card):
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_describes_the_model_its_training_and_its_metrics(run):
    head, text = front_matter((run / "README.md").read_text(encoding="utf-8"))
    assert head["license"] == "mit"
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    results = {result["type"]: result["value"] for result in head["model-index"][0]["results"][0]["metrics"]}
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert results["loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    about = json.loads((run / "run.json").read_text())
    for text_part in (
        *(
            "GPT2LMHeadModel",
            "trained from scratch",
            "## Usage",
            "## Evaluation",
            "loss.png",
            "## Data",
            "## Training",
            "## Limitations",
        ),
        f"{about['parameters']:,} parameters",
        f"| training | 40 files in stories | 38 | {about['data']['training']['tokens']:,} |",
        f"| loss | {last['val_loss']:.4f} |",
        "reads at most 32 tokens",
    ):
        assert text_part in text, text_part
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert recipe["data"]["train_file"] == "stories"
    assert recipe["training"]["max_steps"] == 20


def test_the_card_has_no_paths_and_no_secrets(tiny, tmp_path, monkeypatch):
    """Every key that takes a path gets one, and a secret."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "secret-home"
    for number in range(3):
        (home / "acme").mkdir(parents=True, exist_ok=True)
        (home / "acme" / f"{number}.txt").write_text(write_story(number) * 4)
    files = [home / "acme" / "0.txt", "secret-home/acme/1.txt"]  # absolute and relative
    words = tiny(
        train_file=None,
        val_file="secret-home/acme/2.txt",
        max_steps=4,
        project_name=f"secret-home/{TOKEN}",
        log_with="tensorboard",
    )
    assert train(*words, "--train_file", *files) == 0
    assert train(*words, "--train_file", *files, "--init_from", "run", "--save_model", "secret-home/tuned") == 0
    for run in (tmp_path / "run", home / "tuned"):
        head, text = front_matter((run / "README.md").read_text(encoding="utf-8"))
        assert not {word for word in ("secret", "acme", str(tmp_path), TOKEN) if word in str(head) + text}
        assert "| training | 0.txt, 1.txt |" in text
        assert head["model-index"][0]["results"][0]["dataset"]["name"] == "2.txt"
        recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
        assert recipe["data"]["train_file"] == ["0.txt", "1.txt"]
        assert recipe["data"]["val_file"] == "2.txt"
    assert recipe["run"]["init_from"] == "run"
    assert "trained from another model" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("C:\\Users\\jane\\x.txt", "x.txt"),
        ("C:/Users/jane/x.txt", "x.txt"),
        ("file:///home/jane/x.txt", "x.txt"),
        ("~/x.txt", "x.txt"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("cosine", "cosine"),
    ],
)
def test_paths_are_shortened_to_file_names(value, shown):
    assert public_value({"tokenizer": [value]}) == {"tokenizer": [shown]}


def test_the_recipe_of_the_card_is_complete(tiny, tmp_path):
    """Values of zero are in it too."""
    assert train(*tiny(resid_pdrop=0.0, attn_pdrop=0.0, seed=0, min_lr=0.0, weight_decay=0.0, max_steps=4)) == 0
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    whole = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    plain = Recipe().to_dict()
    for section in ("config", "data", "training"):
        usual = plain[section] | shown.get(section, {})
        for key, value in whole[section].items():
            assert usual.get(key) == value or key in ("train_file", "val_file"), key
    assert shown["training"]["weight_decay"] == 0.0
    assert shown["run"]["seed"] == 0


def test_metrics_in_the_front_matter_are_those_of_the_pushed_step(run):
    """A checkpoint between two evaluations has none."""
    (run / "checkpoint-10").rename(run / "checkpoint-15")  # as if between two evaluations
    try:
        head, text = front_matter(make_card(run / "checkpoint-15", NAME, "half-way"))
    finally:
        (run / "checkpoint-15").rename(run / "checkpoint-10")
    assert "model-index" not in head
    assert "after step 10, which is not quite this model's step 15" in text
    assert 'revision="half-way"' in text
    assert f"In 15 steps it read at most {15 * 8 * 32:,} tokens" in text
    head, _ = front_matter(make_card(run / "checkpoint-10", NAME))
    assert "model-index" in head


def test_the_card_names_the_step_of_the_published_model(tiny, tmp_path):
    """A longer run may have logged more since."""
    assert train(*tiny(max_steps=20, eval_freq=10)) == 0
    folder = tmp_path / "run"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 30, "train_loss": 0.1, "val_loss": 0.1}) + "\n")
    head, text = front_matter(make_card(folder, NAME))
    assert "after step 20" in text
    assert "0.1000" not in text


def test_the_card_of_a_model_that_was_not_trained_here(run, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(run / "checkpoint-10", tmp_path / "checkpoint-10")  # without the files of its run
    head, text = front_matter(make_card(tmp_path / "checkpoint-10", NAME))
    assert head["model_name"] == NAME.rpartition("/")[2]
    assert "This is the model after step 10." in text
    assert "epochs" not in text
    AutoModelForCausalLM.from_pretrained(run).save_pretrained(tmp_path / "theirs")
    card = make_card(tmp_path / "theirs", NAME)
    for phrase in ("with hf_myllm", "trained from", "validation data above"):
        assert phrase not in card.replace("written by hf_myllm", "")


@pytest.mark.parametrize(
    ("architecture", "line"),
    [
        ("GPT2LMHeadModel", 'print(model("Once upon a time", max_new_tokens=16)[0]["generated_text"])'),
        ("BertForMaskedLM", 'print(model("Once upon a [MASK].")[0]["token_str"])'),
        ("BertForTokenClassification", 'model = pipeline("token-classification", model="user/a-model")'),
        ("BartForConditionalGeneration", 'model = AutoModelForSeq2SeqLM.from_pretrained("user/a-model")'),
        ("BertForQuestionAnswering", 'model = AutoModelForQuestionAnswering.from_pretrained("user/a-model")'),
    ],
)
def test_the_usage_example_is_valid_python(tmp_path, architecture, line):
    config = {"architectures": [architecture], "model_type": "bert", "max_position_embeddings": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    code = re.search(r"```python\n(.*?)```", make_card(tmp_path, NAME), re.S)[1]
    compile(code, "card", "exec")
    assert line in code.splitlines()
    assert len(code.splitlines()) <= 5


def test_an_edited_card_is_kept(fake_hub, run, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    (mine / "README.md").write_text("# My own text\n")
    write_card(mine)
    for folder in (mine, mine / "checkpoint-10"):
        hub.push(folder, NAME)
        assert fake_hub.files(NAME)["README.md"] == b"# My own text\n"


def test_the_card_of_a_classifier(tiny_bert, tmp_path):
    rows = [{"text": f"{word} day", "label": word} for word in ("good", "bad") * 20]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = tiny_bert(task="classification", train_file=tmp_path / "rows.jsonl", start_context=None, max_steps=4)
    assert train(*flags, "--eval_freq", "2", "--metric_for_best", "accuracy") == 0
    head, text = front_matter((tmp_path / "run" / "README.md").read_text(encoding="utf-8"))
    assert head["pipeline_tag"] == "text-classification"
    assert "| accuracy |" in text
    assert "No license was given" in text


# ---- what is not pushed


def test_a_model_that_stock_transformers_cannot_load_is_not_pushed(run, fake_hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "check", stock_check.check)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    with pytest.raises(SystemExit) as exit:
        cli.main(["push", other, NAME])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "stock transformers cannot load it: the file has no transformer.h.1" in err
    assert "Traceback" not in err
    assert fake_hub.repos == {}


@pytest.mark.parametrize("harm", ["tokenizer", "more tokens", "weights", "code"])
def test_a_damaged_folder_is_not_pushed(run, stock_here, tmp_path, harm):
    other = tmp_path / "other"
    shutil.copytree(run / "checkpoint-10" if harm == "weights" else run, other)
    if harm == "tokenizer":
        (other / "tokenizer.json").write_text("{broken")
    elif harm == "more tokens":
        tokenizer = AutoTokenizer.from_pretrained(other)
        tokenizer.add_tokens(["<a>", "<b>"])
        tokenizer.save_pretrained(other)
    elif harm == "weights":  # one layer norm is missing
        weights = load_file(other / "model.safetensors")
        weights.pop("transformer.ln_f.weight")
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    else:
        (other / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
        (other / "config.json").write_text(json.dumps(config))
    message = {
        "tokenizer": "stock transformers cannot load",
        "more tokens": "its tokenizer has 302 token ids, but the model has 300 embeddings",
        "weights": "the file has no transformer.ln_f.weight",
        "code": "holds no model that can be pushed",
    }
    with pytest.raises(HubError, match=message[harm]):
        stock_check.check(other)
    assert not (tmp_path / "ran").exists()


def test_a_run_checks_its_model_once_and_again_if_more_than_the_weights_changes(run, fake_hub, tmp_path, monkeypatch):
    """The pushes of a run in this process, as its background processes do them."""
    pushed, checked = tmp_path / "run", []
    shutil.copytree(run, pushed)

    def push_now(arguments, env, **options):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", env)
            hub.push(arguments[4], NAME)
        return SimpleNamespace(poll=lambda: 0, communicate=lambda: ("", None), returncode=0)

    monkeypatch.setattr(hub, "check", checked.append)
    monkeypatch.setattr(hub, "subprocess", SimpleNamespace(Popen=push_now, PIPE=None, STDOUT=None, DEVNULL=None))
    uploads = hub.BackgroundUploads(pushed, NAME)
    for step in (10, 20, 20):
        uploads.begin(step)
    assert [path.name for path in checked] == ["checkpoint-10.upload.partial"]
    config = json.loads((pushed / "config.json").read_text())
    (pushed / "config.json").write_text(json.dumps(config | {"attn_pdrop": 0.5}))
    uploads.finish()
    assert len(checked) == 2


def test_a_difference_in_logits_is_found(run, stock_here, tmp_path, monkeypatch):
    stock_check.check(run)
    script = stock_check.SCRIPT.read_text().replace(
        "    with torch", "    model.lm_head.weight.data[3] += 1.0\n    with torch"
    )
    (tmp_path / "changed.py").write_text(script)
    monkeypatch.setattr(stock_check, "SCRIPT", tmp_path / "changed.py")
    with pytest.raises(HubError, match="stock transformers computes other outputs .*logits differ by"):
        stock_check.check(run)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_encoder_decoder_passes_the_check(family, stock_here, tmp_path):
    ENCODER_DECODERS[family].make_model().save_pretrained(tmp_path)
    stock_check.check(tmp_path)


def test_an_adapter_to_a_local_model_is_not_pushed(run, tiny, tmp_path):
    assert (
        train(
            *tiny(
                init_from=run,
                save_model=tmp_path / "lora",
                tokenizer=None,
                n_layer=None,
                n_head=None,
                n_embd=None,
                max_steps=2,
                r=2,
            )
        )
        == 0
    )
    with pytest.raises(
        HubError, match="it is an adapter to the model in .*, which nobody else has; train with merge_lora"
    ):
        stock_check.check(tmp_path / "lora")


def test_a_folder_with_an_access_token_is_not_pushed(fake_hub, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "README.md").write_text(f"export HF_TOKEN={TOKEN}")
    with pytest.raises(HubError, match="README.md contains what looks like an access token") as refused:
        hub.push(other, NAME)
    assert TOKEN not in str(refused.value)
    assert fake_hub.repos == {}


@pytest.mark.parametrize(
    ("repo", "changed", "message"),
    [
        ("no-user", {}, "push_to_hub: 'no-user' is not a repository; give user/name"),
        (TOKEN, {}, "push_to_hub: 'hf_...' is not a repository; give user/name"),
        ("a/b/c", {}, "give user/name"),
        (NAME, {"HF_TOKEN": None}, "run `hf auth login` or set HF_TOKEN"),
        (NAME, {"offline": True}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_errors_of_check_target(monkeypatch, repo, changed, message):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if "HF_TOKEN" in changed:
        monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", "offline" in changed)
    with pytest.raises(HubError, match=re.escape(message)) as refused:
        hub.check_target(repo)
    assert TOKEN not in str(refused.value)


def test_a_run_checks_the_push_target_before_training(tiny, tmp_path, capsys):
    assert train(*tiny(), "--push_to_hub", NAME) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train(*tiny(), "--push_to_hub", NAME, "--dry_run") == 0


# ---- a Hub that fails


@pytest.mark.parametrize("failure", [503, "drop"])
@pytest.mark.parametrize("stage", ["create", "branch", "preupload", "batch", "upload", "commit"])
def test_a_temporary_failure_is_retried(fake_hub, run, stage, failure):
    fake_hub.failures[stage] = [failure]
    hub.push(run, NAME, revision="other")
    assert fake_hub.files(NAME, "other")["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert [branch for branch, _ in fake_hub.repos[NAME]["commits"]] == ["other"]


@pytest.mark.parametrize("stage", ["create", "preupload", "batch", "upload", "commit"])
def test_a_refusal_is_not_retried(fake_hub, run, stage):
    fake_hub.failures[stage] = [403] * 50
    with pytest.raises(HubError) as refused:
        hub.push(run, NAME)
    assert re.match(rf"{NAME}: the push failed: .*403", str(refused.value))
    assert "signature" not in str(refused.value)
    assert [name for name, _ in fake_hub.requests].count("create") == 1


def test_a_push_gives_up_after_some_attempts(fake_hub, run):
    for stage in STAGES:
        fake_hub.failures[stage] = ["drop"] * 200
    with pytest.raises(HubError, match=r"the push failed: .*\(3 attempts\)"):
        hub.push(run, NAME)


# ---- while training goes on


def test_a_run_pushes_its_checkpoints_and_its_model(tiny, tmp_path, logged_in, capsys):
    assert train(*tiny(max_steps=200, eval_freq=None, save_freq=50), "--push_to_hub", NAME) == 0
    assert f"pushed      {tmp_path}/run to {NAME}" in capsys.readouterr().out
    commits = [summary for _, summary in logged_in.repos[NAME]["commits"]]
    assert commits[-1] == "Model of run"
    assert all(re.fullmatch(r"Model of run after step (50|100|150)", summary) for summary in commits[:-1])
    assert logged_in.files(NAME)["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert not list((tmp_path / "run").glob("*.partial"))
    assert all(TOKEN.encode() not in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


@pytest.mark.chaos
def test_a_refused_push_is_reported_at_the_end_of_the_run(tiny, tmp_path, logged_in, capsys):
    logged_in.failures["create"] = [403] * 50
    assert train(*tiny(max_steps=20), "--push_to_hub", NAME) == 0
    last = capsys.readouterr().err.strip()
    assert re.match(rf"not pushed  {NAME}: the push failed: .*403", last)
    assert last.endswith(f"push later with hf-myllm push {tmp_path}/run {NAME}")
    assert (tmp_path / "run" / "model.safetensors").exists()


def start_online(address, home, *words):
    """Start a run that pushes to the server, in a forked process."""
    return start(
        *words, environment=environment(address, home) | {"HF_HUB_OFFLINE": "0"}, patch=train_online_and_slowly
    )


@pytest.mark.chaos
def test_a_signal_cancels_an_upload(tiny, tmp_path, server):
    state, address = server
    state.slowly = 30
    words = [*tiny(epochs=None, eval_freq=None, save_freq=5), "--max_steps", "100000", "--push_to_hub", NAME]
    job = start_online(address, tmp_path / "home", *words)
    deadline = time.monotonic() + 120
    while not any(stage == "upload" for stage, _ in state.requests) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 143
    assert "not pushed  the upload was cancelled; push later with hf-myllm push" in err
    assert not list((tmp_path / "run").glob("*.upload.partial"))


@pytest.mark.chaos
def test_the_upload_of_a_killed_run_ends_with_it(tiny, tmp_path, server):
    state, address = server
    state.slowly = 3
    words = [*tiny(epochs=None, eval_freq=None, save_freq=5), "--max_steps", "100000", "--push_to_hub", NAME]
    job = start_online(address, tmp_path / "home", *words)
    deadline = time.monotonic() + 120
    while not any(stage == "upload" for stage, _ in state.requests) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGKILL)
    job.wait()
    time.sleep(4)
    assert state.repos[NAME]["commits"] == []  # it could overwrite what the resumed run pushes
