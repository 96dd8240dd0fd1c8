"""The base class of a recipe's sections: how a key is declared and how its value is read.

Values come from YAML, from flags (always text) or from Python. They are converted to the declared type first and then
validated by pydantic in strict mode, so that `batch_size: true` or `2.5` is refused rather than rounded.
"""

import os
import re
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError
from typing_extensions import NotRequired, TypedDict, is_typeddict

from ..errors import RecipeError, hide_secrets
from ..files import RepeatedKeyError, read_yaml

MANY = 1 << 24  # larger values of a row or a step are a mistake; refusing them is better than running out of memory
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}


def fixed(default, help, *, on_resume="refuse", tasks=None, needs=None, **limits):
    """Declare a key whose value a resumed run must keep.

    Args:
        default: its default value.
        help: one or two sentences for `--help`, the docs and the JSON schema, with the unit.
        on_resume: see [`changeable`].
        tasks: the tasks for which the key has an effect; None means all. With others, it is refused.
        needs: the key that must be set for this one to have an effect; without it, this one is refused.
        limits: pydantic's `ge`, `gt`, `le` and `lt`.
    """
    extra = {"on_resume": on_resume} | ({"tasks": list(tasks)} if tasks else {}) | ({"needs": needs} if needs else {})
    return Field(default, description=help, json_schema_extra=extra, **limits)


def changeable(default, help, **options):
    """Declare a key whose value may differ in a resumed run, because it does not matter or because something more
    reliable is compared: the tokens in a file rather than its name. See [`fixed`] for the arguments."""
    return fixed(default, help, on_resume="accept", **options)


def one_or_many(item, schema):
    """Return the type of a list that may also be given as one item: `log_with: wandb`."""
    return Annotated[list[item], WithJsonSchema({"anyOf": [schema, {"type": "array", "items": schema}]})]


Texts = one_or_many(str, {"type": "string"})


def _path(text):
    if re.search(r"[\0-\x1f]", text):
        raise PydanticCustomError("control", "holds a control character")
    return os.path.expanduser(text)


# A file or folder, or what may name one. A shell expands ~ in a flag, but nothing does in a recipe. Recipes that are
# written or shown (mode json) have no credentials of URLs.
PathText = Annotated[str, AfterValidator(_path), PlainSerializer(hide_secrets, when_used="json")]


class TrainedTokenizer(TypedDict):
    """A tokenizer that is trained on the training text."""

    __pydantic_config__ = STRICT
    train: Literal["bpe", "unigram", "wordpiece", "characters"]
    vocab_size: NotRequired[Annotated[int, WithJsonSchema({"type": "integer", "minimum": 100})]]


class WeightAveraging(TypedDict):
    """An average of the weights over the steps; `ema` is the share of it that stays at each step."""

    __pydantic_config__ = STRICT
    ema: Annotated[float, Field(gt=0, lt=1)]


class Source(TypedDict, total=False):
    """One of several data sources; `weight` is its share of the rows, in any unit, and `name` that of its validation
    set."""

    __pydantic_config__ = STRICT
    name: str
    train_file: PathText | list[PathText] | None
    val_file: PathText | list[PathText] | None
    dataset: str | None
    weight: Annotated[float, Field(ge=0)]
    max_epochs: Annotated[float, Field(gt=0, le=MANY)] | None
    dataset_config: str | None
    dataset_split: str
    dataset_revision: str | None
    text_column: str | None
    document: Literal["file", "line"]


class Stage(TypedDict):
    """A stage of a mixture: after `step` steps the sources that it names have other weights."""

    __pydantic_config__ = STRICT
    step: Annotated[int, Field(ge=1)]
    weights: dict[str, Annotated[float, Field(ge=0)]]


class Section(BaseModel):
    """A group of keys; unknown keys and wrong types are refused."""

    model_config = STRICT

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, value, info):
        value = convert(value, cls.model_fields[info.field_name].annotation)
        texts = value if isinstance(value, list) else [value]
        if "" in texts and info.field_name != "start_context":
            raise PydanticCustomError("empty", "is empty")
        if any(isinstance(text, str) and re.search("[\ud800-\udfff]", text) for text in texts):
            raise PydanticCustomError("not_text", "is not text")
        return value


def members(hint):
    """Return the alternatives of a type: `int | None` gives [int, NoneType]."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [inner for option in typing.get_args(hint) for inner in members(option)]
    return [hint]


def plain_type(option):
    """Return the built-in type of values of one alternative: Literal["a"] gives str, list[str] gives list."""
    if is_typeddict(option):
        return dict
    origin = typing.get_origin(option) or option
    return str if origin is Literal else origin


def choices(hint):
    """Return the values that a key may take, or () if any value of its type is allowed."""
    for option in members(hint):
        if typing.get_origin(option) is Literal:
            return typing.get_args(option)
        if typing.get_origin(option) is list and (of_items := choices(typing.get_args(option)[0])):
            return of_items
    return ()


def describe_type(hint):
    """Return a type in words: `int | None` gives "a whole number"."""
    plain = [plain_type(option) for option in members(hint) if option is not type(None)]
    return " or ".join(dict.fromkeys(TYPE_NAMES.get(option, "a list") for option in plain))


def convert(value, hint):
    """Return `value` converted to the type `hint`, or unchanged if it does not fit (pydantic then refuses it).

    A flag's value is always text, and YAML 1.1 reads `1e-3` as text.
    """
    options = {plain_type(option): option for option in members(hint)}
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        value = _convert_text(value, options)
    if isinstance(value, float) and value.is_integer() and int in options and float not in options:
        return int(value)
    if isinstance(value, (list, tuple)) and list in options:
        (item,) = typing.get_args(options[list]) or (Any,)
        return [convert(entry, item) for entry in value]
    if isinstance(value, dict) and typing.get_args(options.get(dict))[:1] == (str,):  # YAML reads names such as 0
        return {str(name): entry for name, entry in value.items()}
    if isinstance(value, dict) and is_typeddict(options.get(dict)):
        hints = typing.get_type_hints(options[dict])
        return {name: convert(entry, hints.get(name, Any)) for name, entry in value.items()}
    return value


def _convert_text(text, options):
    stripped = text.strip()
    if type(None) in options and stripped.lower() in ("null", "none"):
        return None
    if (dict in options and stripped[:1] == "{") or (list in options and str not in options and stripped[:1] == "["):
        try:
            value = read_yaml(stripped)
        except RepeatedKeyError as error:
            raise RecipeError(f"{text:.80}: {error}; give it once") from None
        except ValueError:
            return text
        is_text = str in options and isinstance(value, dict) and None in value.values()  # '{question}' of a template
        return text if is_text else value
    if str in options:
        return text
    if bool in options and stripped.lower() in ("true", "false", "yes", "no", "on", "off"):  # YAML 1.1 has them all
        return stripped.lower() in ("true", "yes", "on")
    for number in (int, float):
        if (int in options or float in options) and not re.match(r"[-+]?0[0-9_]+$", stripped):  # octal in YAML 1.1
            try:
                return number(stripped)
            except ValueError:
                continue
    return [text] if list in options else text
