"""The package works from a wheel, in a folder without the repository."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel once, without network."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("hf_myllm", "recipes", "accelerate_configs"):  # a copy: a build leaves files in the source folder
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "wheel", source, "-w", folder, *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return next(folder.glob("hf_myllm-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return a function that runs `hf-myllm` as installed from the wheel, in an empty folder."""
    target, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    command = [sys.executable, "-m", "pip", "install", wheel, "--target", target, "--no-deps", "--no-index", "-q"]
    subprocess.run([*command, "--disable-pip-version-check"], check=True, capture_output=True)
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(target)}

    def run(*arguments):
        script = [sys.executable, target / "bin" / "hf-myllm", *map(str, arguments)]
        return subprocess.run(script, cwd=empty, env=environ, capture_output=True, text=True, timeout=300)

    run.folder, run.target, run.environ = empty, target, environ
    return run


def test_the_wheel_holds_the_same_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("recipes", "accelerate_configs"):
        for path in (ROOT / folder).iterdir():
            assert zipfile.ZipFile(wheel).read(f"hf_myllm/{folder}/{path.name}") == path.read_bytes()
    for path in (ROOT / "hf_myllm").rglob("*"):  # templates, too
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in names
    assert not any(name.startswith(("tests/", "benchmarks/", "recipes/")) for name in names)


def test_recipes_are_listed(installed):
    script = "import hf_myllm; print(hf_myllm.__file__)"  # not the repository, which may be installed too
    command = [sys.executable, "-c", script]
    module = subprocess.run(command, cwd=installed.folder, env=installed.environ, capture_output=True, text=True)
    assert module.stdout.startswith(str(installed.target))
    result = installed("recipes")
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == sorted(
        path.stem for path in ROOT.glob("recipes/*.yaml")
    )


@pytest.mark.chaos
def test_the_quickstart_trains_by_name(installed, stories):
    small = (
        "--n_layer 1 --n_head 2 --n_embd 16 --max_len 16 --batch_size 2 --max_steps 2 --warmup_steps 0 --eval_iter 1"
    )
    small = [*small.split(), "--tokenizer", "{train: bpe, vocab_size: 300}", "--start_context", "Anna"]
    result = installed("train", "quickstart", *small, "--train_file", stories, "--save_model", "run")
    assert result.returncode == 0, result.stderr
    for name in ("config.json", "model.safetensors", "recipe.yaml", "loss.png", "report.html", "README.md"):
        assert (installed.folder / "run" / name).stat().st_size
    result = installed("generate", "run", "--prompt", "Anna", "--max_new_tokens", 3)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Anna")
