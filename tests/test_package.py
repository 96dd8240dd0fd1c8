"""The public names of the package, and what importing them costs."""

import os
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT
from launching import start
from patches import import_again

import hf_myllm


def run(script):
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_importing_the_package_imports_no_large_library():
    script = "from hf_myllm import cli, Recipe; import sys; print({'torch', 'transformers'} & set(sys.modules))"
    assert run(script).stdout == "set()\n"


def test_every_public_name_exists():
    for name in hf_myllm.__all__:
        assert getattr(hf_myllm, name) is not None
        assert name in dir(hf_myllm)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hf_myllm.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("others", "variables", "policy"),  # others: the cores that other processes use
    [
        (0.3, {}, None),
        (0.7, {}, "passive"),
        (0.7, {"LOCAL_WORLD_SIZE": "1"}, "passive"),
        (0.7, {"LOCAL_WORLD_SIZE": "2"}, None),
        (0.7, {"OMP_WAIT_POLICY": "active"}, "active"),
        (0.7, {"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_threads_sleep_where_others_use_the_cores(monkeypatch, tmp_path, others, variables, policy):
    """Unless the user chose how they wait."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "torch", raising=False)

    def write_stat(seconds):
        used, all_cores = 1000 * others * seconds, 1000 * os.cpu_count() * seconds
        (tmp_path / "stat").write_text(f"cpu  0 {5000 + used:.0f} 0 {7000 + all_cores - used:.0f} 0 0 0 0 0 0\ncpu0\n")

    write_stat(0)
    monkeypatch.setattr("time.sleep", write_stat)
    hf_myllm._sleep_on_a_busy_machine(tmp_path / "stat")
    assert os.environ.get("OMP_WAIT_POLICY") == policy


@pytest.mark.parametrize(
    "script",
    [
        "import hf_myllm.train, hf_myllm.generate; from hf_myllm import train, generate",
        "from hf_myllm import train, generate; import hf_myllm.train, hf_myllm.generate",
        "from hf_myllm.train import RunResult; from hf_myllm import train, generate",
    ],
)
def test_a_submodule_does_not_hide_the_function_of_its_name(script):
    script += (
        "; import hf_myllm as h; print(callable(train), callable(generate), h.train is train, h.generate is generate)"
    )
    process = start(patch=partial(import_again, script))
    out, error = process.communicate(timeout=120)
    assert out == "True True True True\n", error
