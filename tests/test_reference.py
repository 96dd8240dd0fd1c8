"""The reference page and the JSON schema match the recipe's keys."""

import json
import re

import jsonschema
import pytest
import transformers
import yaml
from conftest import ROOT

from hf_myllm.cli import main
from hf_myllm.models import FAMILIES
from hf_myllm.recipe import Recipe
from hf_myllm.recipe.reference import markdown, render, schema
from hf_myllm.recipe.sections import ALIASES, FIELDS, SECTIONS

PINNED = re.search(r"^transformers==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


@pytest.mark.skipif(transformers.__version__ != PINNED, reason="another transformers has other configuration keys")
@pytest.mark.parametrize(("form", "file"), [("markdown", "recipes.md"), ("schema", "recipe.schema.json")])
def test_the_docs_are_current(form, file):
    assert (ROOT / "docs" / file).read_text() == render(form, FAMILIES) + "\n"


def test_the_reference_is_printed_or_written(tmp_path, capsys):
    file = tmp_path / "recipes.md"
    for arguments, code in (([], 0), (["--output", file], 0), (["--output", tmp_path / "none" / "recipes.md"], 2)):
        with pytest.raises(SystemExit) as exit:
            main(["reference", "markdown", *arguments])
        assert exit.value.code == code
    shown = capsys.readouterr()
    assert shown.out == file.read_text() == markdown(FAMILIES) + "\n"
    assert "recipes.md: cannot be written: No such file or directory; give another --output" in shown.err


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_match_the_schema_and_name_it(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), schema(FAMILIES))
    assert "\n# yaml-language-server: $schema=../docs/recipe.schema.json\n" in path.read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"training": {"lerning_rate": 1.0}},
        {"training": {"learning_rate": -1.0}},
        {"training": {"max_steps": 1.5}},
        {"run": {"log_with": ["pencil"]}},
        {"model": 3},
        {"config": {"num_key_value_heads": 2}},
        {"model": "llama", "config": {"n_head": 2}},
        {"model": "bert", "task": "causal"},
        {"data": {"packing": "tight"}},
    ],
)
def test_the_schema_refuses_mistakes(wrong):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema(FAMILIES))


def test_a_resolved_recipe_matches_the_schema():
    jsonschema.Draft202012Validator.check_schema(schema(FAMILIES))
    jsonschema.validate(Recipe().to_dict(), schema(FAMILIES))


def test_the_schema_accepts_aliases_and_single_items():
    recipe = {"run": {"log_with": "wandb", "quiet": True, "save_path": "x"}, "training": {"num_epochs": 2}}
    jsonschema.validate(recipe, schema(FAMILIES))


def test_no_key_is_left_out():
    page, text = markdown(FAMILIES), json.dumps(schema(FAMILIES))
    for name in (*FIELDS, *SECTIONS, *ALIASES, "quiet"):
        assert f"`{name}`" in page or f"## {name}" in page
        assert f'"{name}"' in text
