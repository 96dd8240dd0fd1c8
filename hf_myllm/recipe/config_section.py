"""The section `config` of a recipe: the architecture, in the names of the stock configuration class."""

import dataclasses
from typing import Any

from pydantic import Field, ValidationError, create_model

from ..errors import RecipeError
from .fields import Section, convert, members
from .messages import explain, unknown_key


def config_types(config_class):
    """Return the names that `config` may set, with their types: the stock class's own names and their synonyms."""
    from transformers import PreTrainedConfig  # slow to import, and a recipe from Python does not need it

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}
    fields = [field for field in dataclasses.fields(config_class) if not field.name.startswith("_")]
    own = {field.name: field.type for field in fields if field.name not in common}
    return own | {alias: own[name] for alias, name in config_class.attribute_map.items() if name in own}


def config_section(config_class):
    """Return the section `config` of a family; it checks plain types only, the configuration class checks the rest."""
    plain = (str, int, float, bool, type(None))
    hints = {
        name: hint if all(option in plain for option in members(hint)) else Any
        for name, hint in config_types(config_class).items()
    }
    no_default = {"json_schema_extra": lambda schema: schema.pop("default", None)}
    return create_model(
        "Config", __base__=Section, **{name: (hint, Field(None, **no_default)) for name, hint in hints.items()}
    )


def check_config(values, model, config_class, origins):
    """Return the values of `config` in the names of the class's fields, converted to their types.

    Raises:
        RecipeError: a key is unknown, is given under two names, or has a value of another type.
    """
    section, hints = config_section(config_class), config_types(config_class)
    for name in values:
        if name not in section.model_fields:
            where = origins.get(name, "Recipe")
            raise unknown_key(name, where, f"config of {model}", section.model_fields)
    values = {name: convert(value, hints[name]) for name, value in values.items()}
    try:
        checked = section.model_validate(values).model_dump(include=set(values))
    except ValidationError as error:
        raise explain(error, origins, section.model_fields) from None
    resolved, written = {}, {}
    for name in values:  # hidden_size is GPT-2's n_embd
        stock = config_class.attribute_map.get(name, name)
        stock = stock if stock in hints else name  # Qwen3Moe's num_local_experts is no field
        if stock in resolved and origins.get(name) == origins.get(written[stock]):
            where = origins.get(name, "Recipe")
            raise RecipeError(f"{where}: '{written[stock]}' and '{name}' are the same key; give one of them")
        resolved[stock], written[stock] = checked[name], name
    return resolved
