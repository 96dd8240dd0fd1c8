"""Sharing: what leaves, what is said of it, and what a failing Hub does to a run (nothing)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, command, run_command, train
from hub_server import STAGES, TOKEN, serve

from hf_myllm import hub
from hf_myllm.errors import InputError

NAME = "user/a-model"


@pytest.fixture
def server():
    with serve() as (known, address):
        yield known, address


def environment(address, home, **more):
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return kept | {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)} | more


@pytest.fixture(scope="module")
def run(tmp_path_factory, stories):
    """A finished run, of files in a folder with a name that nobody is to see."""
    folder = tmp_path_factory.mktemp("secret-folder")
    shutil.copytree(stories, folder / "stories")
    words = ["--train_file", folder / "stories", "--tokenizer", "{train: bpe, vocab_size: 300}", "--max_len", 32]
    words += ["--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--max_steps", 20, "--eval_freq", 10, "--eval_iter", 1]
    assert train(*words, "--save_freq", 10, "--license", "mit", "--save_model", folder / "run") == 0
    return folder / "run"


def push(run, address, home, *more, **environ):
    return run_command("push", run, NAME, *more, module="hf_myllm.hub", env=environment(address, home, **environ))


def test_what_is_pushed_is_what_others_load(run, server, tmp_path):
    known, address = server
    result = push(run, address, tmp_path / "one", "--private")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rf"pushed: {address}/{NAME}/commit/\w+\n", result.stdout)
    assert result.stderr == ""
    repo = known.repos[NAME]
    assert repo["private"]
    assert repo["commits"] == [("main", "Model of run")]
    files = known.files(NAME)
    assert set(files) == {
        *("README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors", "tokenizer.json"),
        "tokenizer_config.json",
    }
    for name in set(files) - {"README.md"}:
        assert files[name] == (run / name).read_bytes(), name
    # by the four lines that the card gives, in a program that has never heard of us
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


def test_from_pretrained_gives_the_same_bytes_back(run, server, tmp_path):
    _, address = server
    assert push(run / "checkpoint-10", address, tmp_path / "one", "--revision", "half-way").returncode == 0
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


def test_a_second_push_takes_what_is_no_longer_there_away(run, server, tmp_path):
    known, address = server
    assert push(run, address, tmp_path).returncode == 0
    known.files(NAME)["model-00001-of-00002.safetensors"] = b"of another model"
    known.files(NAME)["notes.txt"] = b"somebody's"
    assert push(run, address, tmp_path).returncode == 0
    assert "model-00001-of-00002.safetensors" not in known.files(NAME)
    assert known.files(NAME)["notes.txt"] == b"somebody's"


# ---- the card


def front_matter(card):
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_says_what_how_and_how_well(run):
    head, text = front_matter((run / "README.md").read_text(encoding="utf-8"))
    assert head["license"] == "mit"
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    results = {one["type"]: one["value"] for one in head["model-index"][0]["results"][0]["metrics"]}
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert results["loss"] == pytest.approx(last["val_loss"], abs=1e-6)
    about = json.loads((run / "run.json").read_text())
    for said in (
        *(
            "GPT2LMHeadModel",
            "trained from nothing",
            "## Use",
            "## Results",
            "loss.png",
            "## Data",
            "## Training",
            "## Limits",
        ),
        f"{about['parameters']:,} parameters",
        f"| training | stories | 40 | {about['data']['training']['tokens']:,} |".replace("| 40 |", "| 38 |"),
        f"| loss | {last['val_loss']:.4f} |",
        "It reads at most 32 tokens",
    ):
        assert said in text, said
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert recipe["data"]["train_file"] == "stories"
    assert recipe["training"]["max_steps"] == 20


def test_the_card_has_no_path_and_no_secret(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    about = json.loads((run / "run.json").read_text())
    base = run.parent / "base-model"
    recipe["data"] |= {
        "val_file": str(run.parent / "x.txt"),
        "tokenizer": "my/tokenizer",
        "chat_template": "a\\b.jinja",
    }
    recipe["run"] |= {"init_from": str(base), "project_name": f"oh {TOKEN}"}
    shown = hub._public(recipe, about | {"local": ["my/tokenizer"]})
    for said in ("val_file: x.txt", "init_from: base-model", "tokenizer: tokenizer", "chat_template: b.jinja"):
        assert said in shown
    text = hub.card(run, NAME)
    for secret in (str(run.parent), "secret-folder", TOKEN):
        assert secret not in text
        assert secret not in shown.replace(TOKEN, "")
    (run / "recipe.yaml").rename(run / "kept.yaml")
    try:
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert TOKEN not in hub.card(run, NAME)
    finally:
        (run / "kept.yaml").replace(run / "recipe.yaml")


def test_a_card_that_somebody_has_written_stays(run, server, tmp_path):
    known, address = server
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    (mine / "README.md").write_text("# My own words\n")
    hub.write_card(mine)
    assert push(mine, address, tmp_path).returncode == 0
    assert known.files(NAME)["README.md"] == b"# My own words\n"


def test_the_cards_of_other_tasks_are_whole_too(tiny_bert, tmp_path):
    rows = [{"text": f"{word} day", "label": word} for word in ("good", "bad") * 20]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = tiny_bert(task="classification", train_file=tmp_path / "rows.jsonl", start_context=None, max_steps=4)
    assert train(*flags, "--eval_freq", "2", "--metric_for_best", "accuracy") == 0
    head, text = front_matter((tmp_path / "run" / "README.md").read_text(encoding="utf-8"))
    assert head["pipeline_tag"] == "text-classification"
    assert "| accuracy |" in text
    assert "No licence was given" in text


# ---- what may not leave


def test_a_model_that_stock_transformers_takes_for_another_stays_here(run, server, tmp_path):
    known, address = server
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    result = push(other, address, tmp_path)
    assert result.returncode == 2
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert known.repos == {}


def test_other_logits_are_noticed(run, monkeypatch):
    stock = hub._STOCK.replace("found = model", "model.lm_head.weight.data[3] += 1.0; found = model")
    hub.check(run)
    monkeypatch.setattr(hub, "_STOCK", stock)
    with pytest.raises(InputError, match="stock transformers makes another model of .*logits differ by"):
        hub.check(run)


def test_an_adapter_to_a_model_that_nobody_else_has_stays_here(run, tiny, tmp_path):
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
        InputError, match="is an adapter to the model in .*, which nobody else has: train with merge_lora"
    ):
        hub.check(tmp_path / "lora")


def test_a_token_in_a_file_stops_it(run, server, tmp_path):
    known, address = server
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "README.md").write_text(f"export HF_TOKEN={TOKEN}")
    result = push(other, address, tmp_path)
    assert result.returncode == 2
    assert "README.md of " in result.stderr
    assert "holds what looks like a token of the Hub: nothing was pushed" in result.stderr
    assert TOKEN not in result.stderr + result.stdout
    assert known.repos == {}


@pytest.mark.parametrize(
    ("flags", "changed", "message"),
    [
        (["--push_to_hub", "no-user"], {}, "push_to_hub 'no-user': give user/name"),
        (["--push_to_hub", TOKEN], {}, "give user/name"),
        (["--push_to_hub", NAME], {"HF_TOKEN": ""}, "nobody is logged in; call `hf auth login`, or set HF_TOKEN"),
        (["--push_to_hub", NAME], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_pushed_to_is_said_before_anything_is_trained(tiny, tmp_path, flags, changed, message):
    result = run_command(*tiny(), *flags, env=environment("http://127.0.0.1:9", tmp_path / "home") | changed)
    assert result.returncode == 2
    assert message in result.stderr
    assert TOKEN not in result.stderr
    assert not (tmp_path / "run").exists()


# ---- a Hub that fails


@pytest.fixture
def impatient(monkeypatch, server, tmp_path):
    """push() in this process, against the server, with hardly a wait between tries."""
    known, address = server
    monkeypatch.setattr(hub, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(hub, "check", lambda folder: None)  # held above
    monkeypatch.setattr(hub, "check_target", lambda repo: None)
    from huggingface_hub import HfApi

    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=address, token=TOKEN))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False, raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return known


@pytest.mark.parametrize("failure", [503, "drop"])
@pytest.mark.parametrize("stage", ["create", "branch", "preupload", "batch", "upload", "commit"])
def test_a_failure_that_passes_is_overcome(impatient, run, stage, failure):
    impatient.failures[stage] = [failure]
    hub.push(run, NAME, revision="other")
    assert impatient.files(NAME, "other")["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert [branch for branch, _ in impatient.repos[NAME]["commits"]] == ["other"]


@pytest.mark.parametrize("stage", ["create", "preupload", "batch", "upload", "commit"])
def test_a_refusal_is_said_once_and_not_tried_again(impatient, run, stage):
    impatient.failures[stage] = [403] * 50
    with pytest.raises(InputError) as refused:
        hub.push(run, NAME)
    assert re.match(rf"{NAME} cannot be pushed to: .*403", str(refused.value))
    assert "signature" not in str(refused.value)
    assert [name for name, _ in impatient.requests].count("create") == 1


def test_a_hub_that_is_gone_is_given_up_after_some_tries(impatient, run):
    for stage in STAGES:
        impatient.failures[stage] = ["drop"] * 200
    with pytest.raises(InputError, match=r"cannot be pushed to: .*\(3 tries\)"):
        hub.push(run, NAME)


# ---- while training goes on


def test_a_run_pushes_its_checkpoints_and_its_model(tiny, tmp_path, server):
    known, address = server
    words = [*tiny(max_steps=200, eval_freq=None, save_freq=50), "--push_to_hub", NAME]
    result = run_command(*words, env=environment(address, tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert f"pushed      {tmp_path}/run to {NAME}" in result.stdout
    commits = [summary for _, summary in known.repos[NAME]["commits"]]
    assert commits[-1] == "Model of run"
    assert all(re.fullmatch(r"Model of run after step (50|100|150)", summary) for summary in commits[:-1])
    assert known.files(NAME)["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert not list((tmp_path / "run").glob("*.partial"))
    assert all(TOKEN.encode() not in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_a_hub_that_refuses_does_not_end_a_run_and_is_said_at_its_end(tiny, tmp_path, server):
    known, address = server
    known.failures["create"] = [403] * 50
    result = run_command(*tiny(max_steps=20), "--push_to_hub", NAME, env=environment(address, tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    last = result.stdout.strip().splitlines()[-1]
    assert re.match(rf"not pushed  {NAME} cannot be pushed to: .*403", last)
    assert last.endswith(f"later: python -m hf_myllm.hub push {tmp_path}/run {NAME}")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_signal_ends_an_upload_that_goes_on(tiny, tmp_path, server):
    known, address = server
    known.slowly = 30
    words = [*tiny(epochs=None, eval_freq=None, save_freq=5), "--max_steps", "100000", "--push_to_hub", NAME]
    job = subprocess.Popen(
        command(*words), cwd=ROOT, env=environment(address, tmp_path / "home"), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any(stage == "upload" for stage, _ in known.requests) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    out = job.communicate(timeout=60)[0]
    assert job.returncode == 143
    assert "not pushed  the upload was cut short; later: python -m hf_myllm.hub push" in out
    assert not list((tmp_path / "run").glob("*.upload.partial"))
