"""The recipe's words for people, for editors and for shells, from the one place that declares them.

python -m hf_myllm.reference markdown > docs/recipes.md
python -m hf_myllm.reference schema > docs/recipe.schema.json
source <(python -m hf_myllm.reference bash)      # completes hf-myllm; zsh after `autoload bashcompinit; bashcompinit`
"""

import dataclasses
import json
import sys
import types
import typing

from .errors import Parser, exit_on_input_error
from .models import FAMILIES
from .recipe import ALIASES, MANY, SECTIONS, WORDS, config_types

_MAPPINGS = {
    "tokenizer": {
        "type": "object",
        "properties": {
            "train": {"enum": ["bpe", "unigram", "wordpiece"]},
            "vocab_size": {"type": "integer", "minimum": 100},
        },
        "required": ["train", "vocab_size"],
        "additionalProperties": False,
    }
}
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping"}
_LIMITS = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
_INTRODUCTION = """# What a recipe may say

Every key of every section, with its default. A key's name is unique, so each is a flag as well, which wins over the
file: `--learning_rate 1e-4`. "Midway" says whether a run may be resumed with another value; where it may not,
`--allow_changed` goes on all the same, as another run.

This page is made by `python -m hf_myllm.reference markdown`. The same as a JSON schema, with which editors complete and
check a recipe: [recipe.schema.json](recipe.schema.json); a recipe names it in a comment,
`# yaml-language-server: $schema=PATH/recipe.schema.json`."""


def markdown():
    """The page docs/recipes.md."""
    lines = [_INTRODUCTION, "", "## (top)", "", "| key | what it is |", "|---|---|"]
    lines.append(f"| `model` | the family of the model: {', '.join(FAMILIES)}. Default: gpt |")
    tasks = "; ".join(f"{name}: {', '.join(family.tasks)}" for name, family in FAMILIES.items())
    lines.append(f"| `task` | what the model learns ({tasks}). Default: the family's first |")
    for section, owner in SECTIONS.items():
        lines += ["", f"## {section}", "", "| key | type | default | what it is | midway |", "|---|---|---|---|---|"]
        for key in dataclasses.fields(owner):
            hint, limits = WORDS[key.name][1], key.metadata
            said = {
                name: limits[name] for name in _LIMITS if name in limits and limits[name] < MANY
            }  # others: mistakes
            bounds = ", ".join(f"{_LIMITS[name]} {value:,}" for name, value in said.items())
            kind = " or ".join(_names(hint)) + (f", {bounds}" if bounds else "")
            if "choices" in limits:
                kind = ", ".join(f"`{one}`" for one in limits["choices"])
            default = "" if key.default is None else f"`{json.dumps(key.default)}`"
            midway = "yes" if limits["on_resume"] == "accept" else ""
            lines.append(f"| `{key.name}` | {kind} | {default} | {limits['help']} | {midway} |")
    lines += ["", "Other names: " + ", ".join(f"`{alias}` for `{name}`" for alias, name in ALIASES.items()) + "."]
    lines += ["", "## config", "", "The architecture, in the stock configuration's own names, as flags too."]
    for name, family in FAMILIES.items():
        lines += ["", f"**{name}**: " + ", ".join(f"`{key}`" for key in config_types(family.config))]
    return "\n".join(lines)


def _options(hint):
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _names(hint):
    for option in _options(hint):
        if option is not type(None):
            of = typing.get_args(option)
            yield f"list of {_NAMES.get(of[0], of[0])}s" if typing.get_origin(option) is list else _NAMES[option]


def schema():
    """The JSON schema of a recipe (draft 2020-12)."""
    sections = {}
    for section, owner in SECTIONS.items():
        keys = {key.name: _key_schema(key) for key in dataclasses.fields(owner)}
        for alias, name in ALIASES.items():
            if name in keys:
                keys[alias] = keys[name] | {"description": f"the same as {name}"}
        sections[section] = {"type": "object", "properties": keys, "additionalProperties": False}
    by_family = []
    for name, family in FAMILIES.items():
        config = {"type": "object", "additionalProperties": False}
        config["properties"] = {key: _of_config(hint) for key, hint in config_types(family.config).items()}
        condition = {"properties": {"model": {"const": name}}} | ({} if name == "gpt" else {"required": ["model"]})
        then = {"config": config, "task": {"enum": [*family.tasks, None]}}
        by_family.append({"if": condition, "then": {"properties": then}})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "a recipe of hf_myllm",
        "type": "object",
        "properties": {
            "model": {"enum": list(FAMILIES), "default": "gpt", "description": "the family of the model"},
            "task": {"type": ["string", "null"], "description": "what the model learns; default: the family's first"},
            "config": {"type": "object", "description": "the architecture, in the stock config's own names"},
            **sections,
        },
        "additionalProperties": False,
        "allOf": by_family,
    }


def _of_config(hint):
    """The schema of a key of the architecture, where its type is a plain one."""
    options = _options(hint)
    plain = all(option in (str, int, float, bool, type(None)) for option in options)
    return {"anyOf": [_kind(option, {}) for option in options]} if plain else {}


def _key_schema(key):
    limits, kinds = key.metadata, []
    for option in _options(WORDS[key.name][1]):
        kinds.append(_kind(option, limits))
        if typing.get_origin(option) is list and typing.get_args(option)[0] is str and {"type": "string"} not in kinds:
            kinds.append(_kind(str, limits))  # one is as good as a list of one
    if key.name in _MAPPINGS:
        kinds = [_MAPPINGS[key.name] if kind == {"type": "object"} else kind for kind in kinds]
    if key.name == "datasets":
        kinds = [{"type": "array", "items": _source_schema()} if kind["type"] == "array" else kind for kind in kinds]
    found = {"description": limits["help"], **({} if key.default is None else {"default": key.default})}
    return found | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _source_schema():
    """One of several sources."""
    names = ("train_file", "dataset", "dataset_config", "dataset_split", "dataset_revision", "text_column", "document")
    keys = {name: _key_schema(WORDS[name][2]) for name in names}
    keys["weight"] = {"type": "number", "exclusiveMinimum": 0}
    return {"type": "object", "properties": keys, "additionalProperties": False}


def _kind(option, limits):
    """The schema of one type that a key may have."""
    if typing.get_origin(option) is list:
        return {"type": "array", "items": _kind(typing.get_args(option)[0], limits)}
    names = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", type(None): "null"}
    found = {"type": names[option]}
    if option in (int, float):
        words = {"minimum": "minimum", "above": "exclusiveMinimum", "maximum": "maximum", "below": "exclusiveMaximum"}
        found |= {words[name]: limits[name] for name in words if name in limits}
    if option is str and "choices" in limits:
        found["enum"] = list(limits["choices"])
    return found


def bash():
    """A completion of flags, and of the values of those that have a few."""
    names = ["model", "task", *WORDS, *ALIASES]
    for family in FAMILIES.values():
        names += [key for key in config_types(family.config) if key not in names]
    cases = {"model": list(FAMILIES), "task": sorted({task for family in FAMILIES.values() for task in family.tasks})}
    cases |= {name: key.metadata["choices"] for name, (_, _, key) in WORDS.items() if "choices" in key.metadata}
    lines = [
        "_hf_myllm() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" words=""',
        '    case "${COMP_WORDS[COMP_CWORD-1]}" in',
    ]
    lines += [f'        --{name}) words="{" ".join(values)}" ;;' for name, values in cases.items()]
    lines += [f'        *) [[ "$word" == -* ]] && words="{" ".join(f"--{name}" for name in names)}" ;;', "    esac"]
    lines += ['    COMPREPLY=($(compgen -W "$words" -- "$word"))', "}", "complete -o default -F _hf_myllm hf-myllm"]
    return "\n".join(lines)


@exit_on_input_error
def main(argv):
    parser = Parser(prog="python -m hf_myllm.reference", description="the words of a recipe, for people and programs")
    parser.add_argument("form", choices=("markdown", "schema", "bash"))
    form = parser.parse_args(argv).form
    print({"markdown": markdown, "bash": bash}[form]() if form != "schema" else json.dumps(schema(), indent=1))


if __name__ == "__main__":
    sys.exit(main())
