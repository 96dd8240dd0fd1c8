"""Fixtures and helpers that the tests share: an isolated cache, a small corpus, a tiny recipe, the real assets."""

import json
import os
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import ROOT, command, run_command, skip_pictures  # noqa: F401, imported from here by the tests

# Before any Hugging Face library is imported: no network, and a cache of the tests' own.
_home = tempfile.TemporaryDirectory(prefix="hf_myllm_tests_")
# One thread per process: tests run side by side, and threads that wait for each other on busy cores are slow.
os.environ.update(OMP_NUM_THREADS="1", LOCAL_WORLD_SIZE=str(os.cpu_count()))
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_home.name, ACCELERATE_USE_CPU="true", TOKENIZERS_PARALLELISM="true")

ASSETS = Path(os.environ.get("HF_MYLLM_ASSETS", ROOT.parent / "shared" / "assets"))
LONGEST = (  # in this order
    "test_ranks",
    "test_train",
    "test_finetuning",
    "test_lora",
    "test_families",
    "test_hub",
    "test_launching",
)


def pytest_collection_modifyitems(items):
    """Start with the files that take longest, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _reset_compiler():
    """Forget what was compiled: torch.compile has a limit per function, over all tests."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(autouse=True)
def _reset_accelerator():
    """Forget an Accelerator that a test made: a run takes the precision of its caller's."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session", autouse=True)
def _draw():
    return skip_pictures()


@pytest.fixture(scope="module")
def pictures(_draw):
    """Draw the pictures of runs in this module's tests."""
    from hf_myllm.reporting import plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", _draw)
        yield


@pytest.fixture(scope="session")
def assets():
    if not ASSETS.is_dir():
        pytest.skip(f"no real data at {ASSETS}; HF_MYLLM_ASSETS names another folder")
    return ASSETS


def write_story(seed):
    """Return a small document with some structure to learn."""
    draw = random.Random(seed)
    names, verbs = ["Anna", "the cat", "a king", "my friend", "the old house"], ["sees", "likes", "finds", "forgets"]
    lines = [f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(names)}." for _ in range(draw.randint(4, 30))]
    return " ".join(lines) + "\n"


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """Return a folder of 40 small .txt documents."""
    folder = tmp_path_factory.mktemp("stories")
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(write_story(index), encoding="utf-8")
    return folder


@pytest.fixture
def tiny(stories, tmp_path):
    """Return the flags of a run that takes a second: with dropout, accumulation, and epochs that end within a step."""
    return Flags(
        train_file=stories,
        tokenizer="{train: bpe, vocab_size: 300}",
        n_layer=2,
        n_head=2,
        n_embd=32,
        max_len=32,
        batch_size=4,
        total_batch_size=8,
        epochs=3,
        learning_rate=3e-3,
        warmup_steps=5,
        eval_freq=20,
        eval_iter=2,
        save_freq=10,
        start_context="Anna",
        max_new_tokens=10,
        save_model=tmp_path / "run",
    )


@pytest.fixture
def tiny_family(tiny):
    """Return the flags of a tiny run of any family: `tiny_family("llama")`."""
    from families import CASES  # imports the package: after the environment is set

    gpt_sizes = dict.fromkeys(("n_layer", "n_head", "n_embd"))
    return lambda name: Flags(tiny | gpt_sizes | CASES[name].recipe())


@pytest.fixture
def tiny_bert(tiny_family):
    """Return the flags of a tiny run of BERT; the default task is mlm."""
    return tiny_family("bert")


def flags(**settings):
    """Return the settings of a recipe as flags; those that are None are left out."""
    return [text for key, value in settings.items() if value is not None for text in (f"--{key}", str(value))]


class Flags(dict):
    """The keys of a recipe; called, they are the arguments of a command line. A key with None is left out."""

    def __call__(self, **changes):
        keys = {**self, **changes}
        if "max_steps" in changes:  # a recipe has either of the two
            keys["epochs"] = None
            keys["warmup_steps"] = changes.get("warmup_steps", min(5, changes["max_steps"]))
        if keys.get("start_context") is None or keys.get("model") == "bert":  # no text is generated
            keys["max_new_tokens"] = changes.get("max_new_tokens")
        return flags(**keys)


def run_cli(*arguments):
    """Run a command of hf-myllm in this process; return its exit code."""
    from hf_myllm.cli import main

    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code


def train(*arguments):
    """Run the train command in this process; return its exit code."""
    return run_cli("train", *arguments)


# ---- the folder of a run


def read_metrics(run, key=None):
    """Return the lines of metrics.jsonl, or the values of one key in those that have it."""
    path = Path(run) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return lines if key is None else [line[key] for line in lines if key in line]


def read_weights(run):
    """Return the bytes of the published model, of all its shards."""
    files = sorted(Path(run).glob("model*.safetensors"))
    assert files
    return b"".join(file.read_bytes() for file in files)


def assert_same_run(run, reference, tolerance=1e-6):
    """Check that two runs had the same rows and learning rates at each step, and the same losses but for rounding."""
    for key in ("rows", "tokens", "learning_rate"):
        assert read_metrics(run, key) == read_metrics(reference, key), key
    for key in ("loss", "val_loss"):
        assert read_metrics(run, key) == pytest.approx(read_metrics(reference, key), abs=tolerance), key


def make_task(name, tokenizer, max_len, vocab_size=None, seed=0, **settings):
    """Return a task that is configured for a small BERT."""
    from hf_myllm import tasks

    task = tasks.build(name, tokenizer, settings, seed)
    config = {"vocab_size": vocab_size or len(tokenizer), "type_vocab_size": 2}
    task.configure(SimpleNamespace(**config, pad_token_id=getattr(tokenizer, "pad_token_id", None)), max_len)
    return task


def plain_run(task, accelerator, batch_size, token_bytes=None):
    """Return what evaluations need of a run."""
    recipe = SimpleNamespace(training=SimpleNamespace(batch_size=batch_size))
    return SimpleNamespace(task=task, accelerator=accelerator, recipe=recipe, token_bytes=token_bytes, metrics={})


@pytest.fixture(scope="session")
def entities_run(tmp_path_factory):
    """A folder with train.conll, val.conll and a trained run."""
    import small_runs as runs

    folder = tmp_path_factory.mktemp("words")
    runs.write_sentences(folder / "train.conll", 300, 0)
    runs.write_sentences(folder / "val.conll", 61, 1)
    settings = {
        "model": "bert",
        "task": "token_classification",
        **runs.BERT,
        **runs.DROPOUT,
        "tokenizer": runs.WORDPIECE,
        "max_len": 16,
    }
    settings |= {"train_file": folder / "train.conll", "val_file": folder / "val.conll", "save_model": folder / "run"}
    assert train(*runs.flags(**settings, batch_size=16, epochs=12, learning_rate=5e-3, eval_freq=100)) == 0
    return folder


@pytest.fixture(scope="session")
def kept_run(tmp_path_factory, stories):
    """Return the folder of a run of 8 steps that kept all checkpoints and an average of the weights, and its keys."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    keys = Flags(train_file=stories, tokenizer="{train: bpe, vocab_size: 300}", n_layer=1, n_head=2, n_embd=32)
    keys |= {"max_len": 32, "batch_size": 4, "total_batch_size": 8, "max_steps": 8, "save_freq": 1, "eval_iter": 2}
    keys |= {"save_total_limit": "null", "learning_rate": 3e-3, "warmup_steps": 2, "eval_freq": 4}
    keys |= {"weight_averaging": "{ema: 0.5}", "final_model": "ema", "save_model": folder}
    assert train(*keys(warmup_steps=2)) == 0
    return folder, keys


@pytest.fixture(scope="session")
def gpt(tmp_path_factory):
    """A small GPT that is trained a little, to start from."""
    import small_runs as runs

    folder = tmp_path_factory.mktemp("gpt")
    text = runs.write_lines(
        folder / "text.jsonl",
        [{"text": f"say {name}: {name}. {place}"} for name in runs.NAMES for place in runs.PLACES],
    )
    settings = runs.flags(
        **runs.GPT, tokenizer=runs.BPE, train_file=text, max_len=64, max_steps=60, batch_size=4, val_fraction=0
    )
    assert train(*settings, "--learning_rate", "5e-3", "--save_model", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def noise(tmp_path):
    """The settings of a classifier on random labels, which is best early."""
    import small_runs as runs

    settings = {
        "model": "gpt",
        "task": "classification",
        **runs.GPT,
        "tokenizer": runs.BPE,
        "max_len": 32,
        "batch_size": 8,
    }
    settings |= {
        "train_file": runs.write_noise(tmp_path / "train.jsonl", 64, 0),
        "val_file": runs.write_noise(tmp_path / "val.jsonl", 40, 1),
    }
    return settings | {
        "learning_rate": 5e-3,
        "lr_schedule": "constant",
        "eval_freq": 4,
        "save_freq": 10,
        "save_model": tmp_path / "run",
    }
