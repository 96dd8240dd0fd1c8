"""What is told of a recipe's words is what they are."""

import json
import re
import subprocess

import jsonschema
import pytest
import transformers
import yaml
from conftest import ROOT

from hf_myllm import reference
from hf_myllm.models import FAMILIES
from hf_myllm.recipe import SECTIONS, WORDS

PINNED = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


@pytest.mark.skipif(transformers.__version__ != PINNED, reason="another transformers has other configuration keys")
@pytest.mark.parametrize(("form", "file"), [("markdown", "recipes.md"), ("schema", "recipe.schema.json")])
def test_what_lies_in_docs_is_current(form, file, capsys):
    reference.main([form])
    assert (ROOT / "docs" / file).read_text() == capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_ship_keep_to_the_schema_and_name_it(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), reference.schema())
    assert "\n# yaml-language-server: $schema=../docs/recipe.schema.json\n" in path.read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"training": {"lerning_rate": 1.0}},
        {"training": {"learning_rate": -1.0}},
        {"training": {"max_steps": 1.5}},
        {"run": {"log_with": ["pencil"]}},
        {"model": "gtp"},
        {"config": {"num_key_value_heads": 2}},
        {"model": "llama", "config": {"n_head": 2}},
        {"model": "bert", "task": "causal"},
        {"data": {"packing": "tight"}},
    ],
)
def test_the_schema_finds_what_is_wrong(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, reference.schema())


def test_a_resolved_recipe_keeps_to_the_schema():
    from hf_myllm.recipe import Recipe

    jsonschema.Draft202012Validator.check_schema(reference.schema())
    jsonschema.validate(Recipe().to_dict(), reference.schema())


def complete(*words):
    """What a real bash would offer for the last of these words."""
    typed = " ".join(f"'{word}'" for word in words)
    script = reference.bash() + f"\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _hf_myllm"
    script += '; printf "%s\\n" "${COMPREPLY[@]}"'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()


def test_a_shell_completes_flags_and_values():
    assert complete("hf-myllm", "--learn") == ["--learning_rate"]
    assert complete("hf-myllm", "--lr_schedule", "c") == ["constant", "cosine"]
    assert complete("hf-myllm", "--model", "") == list(FAMILIES)
    assert complete("hf-myllm", "reci") == []  # left to the shell: files
    assert set(complete("hf-myllm", "--")) >= {f"--{name}" for name in WORDS}


def test_no_key_is_left_out():
    page, schema = reference.markdown(), json.dumps(reference.schema())
    for name in (*WORDS, *SECTIONS):
        assert f"`{name}`" in page or f"## {name}" in page
        assert f'"{name}"' in schema
