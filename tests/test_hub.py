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
from conftest import ROOT, command, run_command, train, write_story
from hub_server import STAGES, TOKEN, serve
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hf_myllm.errors import InputError
from hf_myllm.hub import push as hub
from hf_myllm.recipe import Recipe
from hf_myllm.reporting import summary

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


@pytest.fixture
def impatient(monkeypatch, server, tmp_path):
    """The server, with hub.push() in this process, hardly a wait between tries, and no look at the model."""
    known, address = server
    monkeypatch.setattr(hub, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(hub, "check", lambda folder: None)  # a process of its own each time; held by other tests
    monkeypatch.setattr(hub, "check_target", lambda repo: None)
    from huggingface_hub import HfApi

    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=address, token=TOKEN))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False, raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return known


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


def test_a_second_push_takes_the_old_model_away_and_nothing_else(impatient, run):
    hub.push(run, NAME)
    impatient.files(NAME)["model-00001-of-00002.safetensors"] = b"of another model"
    theirs = {
        "notes.txt": b"somebody's",
        "onnx/model.safetensors": b"somebody's too",
        "tokenizer_docs/about.md": b"and this",
        "README.md": b"# edited on the Hub",
    }
    impatient.files(NAME).update(theirs)
    hub.push(run, NAME)
    assert "model-00001-of-00002.safetensors" not in impatient.files(NAME)
    assert {name: impatient.files(NAME)[name] for name in theirs} == theirs


def test_a_public_repository_takes_nothing_that_was_to_be_private(impatient, run):
    hub.push(run, NAME)
    before = dict(impatient.files(NAME))
    with pytest.raises(InputError, match=f"{NAME} is there already, and public"):
        hub.push(run / "checkpoint-10", NAME, private=True)
    assert impatient.files(NAME) == before


def test_other_files_of_the_folder_stay_here(impatient, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for name in ("tokenizer_training_secrets.txt", "vocab.customers", "private.safetensors", "tokenizer.json.partial"):
        (other / name).write_text("mine")
    (other / "merges.txt").symlink_to("/etc/passwd")
    hub.push(other, NAME)
    assert set(impatient.files(NAME)) == {path.name for path in run.iterdir() if hub._is_shared(path.name)}


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
        f"| training | 40 files in stories | 38 | {about['data']['training']['tokens']:,} |",
        f"| loss | {last['val_loss']:.4f} |",
        "It reads at most 32 tokens",
    ):
        assert said in text, said
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert recipe["data"]["train_file"] == "stories"
    assert recipe["training"]["max_steps"] == 20


def test_the_card_has_no_path_and_no_secret(tiny, tmp_path, monkeypatch):
    """A recipe with a path, or a secret, in every place that takes one."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "secret-home"
    for number in range(3):
        (home / "acme").mkdir(parents=True, exist_ok=True)
        (home / "acme" / f"{number}.txt").write_text(write_story(number) * 4)
    files = [home / "acme" / "0.txt", "secret-home/acme/1.txt"]  # absolute and relative
    words = tiny(train_file=None, val_file="secret-home/acme/2.txt", max_steps=4, project_name=f"secret-home/{TOKEN}")
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
def test_a_way_to_a_file_is_known_by_its_looks(value, shown):
    assert summary._named({"tokenizer": [value]}) == {"tokenizer": [shown]}


def test_the_recipe_of_the_card_trains_the_same_model(tiny, tmp_path):
    """Zeros and noes are values too."""
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


def test_figures_are_those_of_the_model_that_they_stand_beside(run):
    """Of a checkpoint between two evaluations, none goes into the front matter."""
    (run / "checkpoint-10").rename(run / "checkpoint-15")  # as one between
    try:
        head, text = front_matter(hub.card(run / "checkpoint-15", NAME, "half-way"))
    finally:
        (run / "checkpoint-15").rename(run / "checkpoint-10")
    assert "model-index" not in head
    assert "after step 10, which is not quite this model's step 15" in text
    assert 'revision="half-way"' in text
    assert f"In 15 steps it has read at most {15 * 8 * 32:,} tokens" in text
    head, _ = front_matter(hub.card(run / "checkpoint-10", NAME))
    assert "model-index" in head


def test_a_run_that_goes_on_says_of_which_step_its_model_is(tiny, tmp_path):
    """The model at the root is that of the run's end, whatever a longer run has logged since."""
    assert train(*tiny(max_steps=20, eval_freq=10)) == 0
    folder = tmp_path / "run"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 30, "train_loss": 0.1, "val_loss": 0.1}) + "\n")
    head, text = front_matter(hub.card(folder, NAME))
    assert "after step 20" in text
    assert "0.1000" not in text


def test_a_model_of_others_is_not_said_to_be_ours(run, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(run).save_pretrained(tmp_path / "theirs")
    card = hub.card(tmp_path / "theirs", NAME)
    for said in ("with hf_myllm", "trained from", "validation data above"):
        assert said not in card.replace(hub._OURS, "")


def test_a_card_that_somebody_has_written_stays(impatient, run, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    (mine / "README.md").write_text("# My own words\n")
    hub.write_card(mine)
    for folder in (mine, mine / "checkpoint-10"):
        hub.push(folder, NAME)
        assert impatient.files(NAME)["README.md"] == b"# My own words\n"


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


@pytest.mark.parametrize("harm", ["tokenizer", "more tokens", "weights", "code"])
def test_a_damaged_folder_stays_here(run, tmp_path, harm):
    other = tmp_path / "other"
    shutil.copytree(run / "checkpoint-10" if harm == "weights" else run, other)
    if harm == "tokenizer":
        (other / "tokenizer.json").write_text("{broken")
    elif harm == "more tokens":
        tokenizer = AutoTokenizer.from_pretrained(other)
        tokenizer.add_tokens(["<a>", "<b>"])
        tokenizer.save_pretrained(other)
    elif harm == "weights":  # one that has all that the model needs but a layer norm
        weights = load_file(other / "model.safetensors")
        weights.pop("transformer.ln_f.weight")
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    else:
        (other / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
        (other / "config.json").write_text(json.dumps(config))
    message = {
        "tokenizer": "stock transformers cannot load",
        "more tokens": "its tokenizer has 302 tokens, and the model embeddings for 300",
        "weights": "the file has no transformer.ln_f.weight",
        "code": "holds no model that can be pushed",
    }
    with pytest.raises(InputError, match=message[harm]):
        hub.check(other)
    assert not (tmp_path / "ran").exists()


def test_other_logits_are_noticed(run, monkeypatch):
    stock = hub._STOCK.replace("found = model.eval", "model.lm_head.weight.data[3] += 1.0; found = model.eval")
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


def test_a_token_in_a_file_stops_it(impatient, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "README.md").write_text(f"export HF_TOKEN={TOKEN}")
    with pytest.raises(InputError, match="README.md of .* holds what looks like a token") as refused:
        hub.push(other, NAME)
    assert TOKEN not in str(refused.value)
    assert impatient.repos == {}


@pytest.mark.parametrize(
    ("repo", "changed", "message"),
    [
        ("no-user", {}, "push_to_hub 'no-user': give user/name"),
        (TOKEN, {}, "push_to_hub 'hf_...': give user/name"),
        ("a/b/c", {}, "give user/name"),
        (NAME, {"HF_TOKEN": None}, "nobody is logged in; call `hf auth login`, or set HF_TOKEN"),
        (NAME, {"offline": True}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_pushed_to_is_said_in_a_line(monkeypatch, repo, changed, message):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    if "HF_TOKEN" in changed:
        monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", "offline" in changed)
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        hub.check_target(repo)
    assert TOKEN not in str(refused.value)


def test_a_run_says_so_before_anything_is_trained_where_it_would_push(tiny, tmp_path, capsys):
    """HF_HUB_OFFLINE is set for all tests."""
    assert train(*tiny(), "--push_to_hub", NAME) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train(*tiny(), "--push_to_hub", NAME, "--dry_run") == 0


# ---- a Hub that fails


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
    last = result.stderr.strip()
    assert re.match(rf"not pushed  {NAME} cannot be pushed to: .*403", last)
    assert last.endswith(f"later: python -m hf_myllm.hub push {tmp_path}/run {NAME}")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_signal_ends_an_upload_that_goes_on(tiny, tmp_path, server):
    known, address = server
    known.slowly = 30
    words = [*tiny(epochs=None, eval_freq=None, save_freq=5), "--max_steps", "100000", "--push_to_hub", NAME]
    job = subprocess.Popen(
        command(*words), cwd=ROOT, env=environment(address, tmp_path / "home"), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any(stage == "upload" for stage, _ in known.requests) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 143
    assert "not pushed  the upload was cut short; later: python -m hf_myllm.hub push" in err
    assert not list((tmp_path / "run").glob("*.upload.partial"))


def test_what_a_killed_run_was_pushing_ends_with_it(tiny, tmp_path, server):
    known, address = server
    known.slowly = 3
    words = [*tiny(epochs=None, eval_freq=None, save_freq=5), "--max_steps", "100000", "--push_to_hub", NAME]
    job = subprocess.Popen(command(*words), cwd=ROOT, env=environment(address, tmp_path / "home"))
    deadline = time.monotonic() + 120
    while not any(stage == "upload" for stage, _ in known.requests) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.kill()
    job.wait()
    time.sleep(4)
    assert known.repos[NAME]["commits"] == []  # which might come after those of the run that goes on
