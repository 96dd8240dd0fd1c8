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
    ("runnable", "variables", "policy"),
    [
        (1, {}, None),
        (os.cpu_count() + 1, {}, "passive"),
        (99, {"OMP_WAIT_POLICY": "active"}, "active"),
        (99, {"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_threads_sleep_where_others_want_all_cores(monkeypatch, tmp_path, runnable, variables, policy):
    """Unless the user chose how they wait."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    (tmp_path / "loadavg").write_text(f"0.50 0.40 0.30 {runnable}/103 4711\n")
    hf_myllm._sleep_on_a_busy_machine(tmp_path / "loadavg")
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
