"""The public names of the package, and what importing them costs."""

import subprocess
import sys

import pytest
from conftest import ROOT

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
    assert run(script).stdout == "True True True True\n"
