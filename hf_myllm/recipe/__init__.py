"""A recipe: everything that a run depends on, as typed keys in sections.

A recipe comes from a YAML file, from flags or from Python. A key's name is unique over all sections, so every key is
also a flag, and flags override the file: `hf-myllm train quickstart --learning_rate 1e-4`. The section `config` takes
the architecture's own names from its stock configuration class.

Nothing is loaded or written here. An invalid recipe is refused with one line that names the key, its file and the
nearest known key.
"""

import difflib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from ..errors import ModelError, RecipeError, show
from ..files import read_yaml
from ..terminal import warn
from .config_section import check_config, config_types
from .data_section import MLM_PROBABILITY, TASKS, Data
from .fields import MANY, convert
from .messages import explain, refuse_other_run, unknown_key
from .sections import (
    ALIASES,
    EVALUATION_KEYS,
    EXCLUSIVE,
    FIELDS,
    SECTION_OF,
    SECTIONS,
    Evaluation,
    Hub,
    Lora,
    Run,
    Training,
)

_MAX_BATCH_TOKENS = 1 << 27  # of a micro-batch; more are a mistake
RECIPES = Path(__file__).parent.parent / "recipes"  # the recipes that ship with the package


class Recipe(BaseModel):
    """A validated recipe.

    `Recipe(model="gpt", config={...}, data={...})` checks all keys, types, limits and combinations that do not depend
    on the model family. `check_family` checks the rest when a run is built.

    Raises:
        RecipeError: an unknown key, a wrong type, an impossible value or combination.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(
        None, description="Model family, or any model type of transformers. Default: that of init_from, else gpt."
    )
    task: str | None = Field(None, description="What the model is trained for. Default: the family's first task.")
    config: dict[str, Any] = Field({}, description="Architecture, in the names of the stock configuration class.")
    data: Data = Field(default_factory=Data)
    training: Training = Field(default_factory=Training)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    lora: Lora = Field(default_factory=Lora)
    run: Run = Field(default_factory=Run)
    hub: Hub = Field(default_factory=Hub)
    _overrides: set | None = PrivateAttr(None)  # keys that `load` got beside a file; None if there was no file

    @classmethod
    def load(cls, path_or_name=None, **overrides):
        """Load a recipe from a YAML file, or by the name of one that ships, with some keys overridden.

        Example: `Recipe.load("quickstart", max_steps=100, config={"n_layer": 2})`.
        """
        return _load(path_or_name, overrides, "Recipe.load")

    def __eq__(self, other):
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def to_dict(self):
        """Return the recipe as nested dictionaries of plain values."""
        return self.model_dump()

    def to_yaml(self):
        """Return the recipe as YAML text that `Recipe.load` reads, without credentials of URLs."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def relevant(self):
        """Return `to_dict()` without keys that have no effect: unset, of another task, or of a feature that is off."""
        values = self.model_dump(mode="json")
        for name, section in SECTION_OF.items():
            if values[section][name] is None or self._missing(name):
                del values[section][name]
        return {name: value for name, value in values.items() if value}

    def value_of(self, name):
        """Return the value of a key, whichever section it is in."""
        return getattr(getattr(self, SECTION_OF[name]), name)

    def _mlm_probability(self):
        return MLM_PROBABILITY.get(self.task, 0.15)

    def _missing(self, name):
        """Return what a key lacks to have an effect: another task, or another key that is not set; None if nothing."""
        details = FIELDS[name].json_schema_extra
        if self.task in TASKS and self.task not in details.get("tasks", [self.task]):
            return "task"
        needed = details.get("needs")
        if needed and self.value_of(needed) in (None, False):
            is_of_source = needed == "dataset" and self.data.datasets  # whose keys default to those of the section
            return None if is_of_source else needed

    def identity(self):
        """Return the keys that define the run, flat: two recipes with equal identities train the same model."""
        keys = {"model": self.model, "task": self.task}
        keys |= {f"config.{name}": value for name, value in self.config.items()}
        keys |= self.data.mixture_identity()
        for name, field in FIELDS.items():
            if field.json_schema_extra["on_resume"] == "refuse":
                keys[name] = self.value_of(name)
        return keys

    @property
    def family(self):
        """The name of the model's family, by which its classes are found: `stock:NAME` for those of transformers."""
        return "stock:" * (self.training.implementation == "stock") + self.model

    def check_family(self, families, origins=None):
        """Check what depends on the model family, and fill in the model and the task if they were left open.

        Args:
            families: the `FAMILIES` of the package.
            origins: key -> where its value came from, for messages.
        """
        self.model = find_model(self.model, vars(self.run), families)
        family = families[self.family]
        self.task = self.task or next(iter(family.tasks))
        if self.task not in family.tasks:
            choices = " or ".join(family.tasks)
            if self.task == "seq2seq" and "instruction" in family.tasks:
                choices = "instruction, with prompt and completion: a decoder reads the source as a prompt"
            raise RecipeError(f"task '{self.task}' is not a task of {self.model}; choose {choices}")
        self.config = check_config(self.config, self.model, family.config, origins or {})
        if self.data.mlm_probability is None:
            self.data.mlm_probability = self._mlm_probability()
        return self

    def copy_checked(self, families, has_train_data=False, has_eval_data=False):
        """Return a copy, checked as it is now, without the data that data in memory replaces."""
        recipe = Recipe.model_validate(self.to_dict()).check_family(families)
        recipe._overrides = self._overrides
        for name in ("train_file", "dataset", "datasets") * has_train_data + ("val_file",) * has_eval_data:
            setattr(recipe.data, name, None)
        return recipe

    def check_task(self, task, takes_positions=True):
        """Refuse keys that have no effect, and fill in the packing if it was left open.

        A key of the file may stay when a flag or Python code switches off the key that it needs.

        Args:
            task: the task's class, with its `packings`, the default first.
            takes_positions: whether the model's class does; otherwise a default packing keeps no documents apart.
        """
        data, overrides = self.data, self._overrides or ()
        self._check_columns(task)
        filled_in = {"packing": data.packing, "final_model": "last", "mlm_probability": self._mlm_probability()}
        for name, field in FIELDS.items():
            is_default = self.value_of(name) in (field.default, None, filled_in.get(name))
            missing = None if is_default else self._missing(name)
            if missing == "task":
                raise RecipeError(f"{name} has no effect with task {self.task}; remove it")
            if missing and (name in overrides or missing not in overrides):
                raise RecipeError(f"{name} has no effect without {missing}; set it too, or remove {name}")
        data.packing = data.packing or task.default_packing(takes_positions)
        if data.packing not in task.packings:
            choices = " or ".join(task.packings)
            raise RecipeError(f"packing {data.packing} cannot be used with task {self.task}; use {choices}")
        if data.packing in ("pad", "best_fit") and data.stride:
            raise RecipeError(f"stride has no effect with packing {data.packing}, whose rows are documents; remove it")
        if data.streaming:
            _check_streaming(self)
        return self

    def _check_columns(self, task):
        """Check `columns` and `template` against the columns that the task has names for; see [`check_task`]."""
        columns, template = self.data.columns or {}, self.data.template or {}
        if template and isinstance(template, str) == bool(task.own_columns):
            forms = "a mapping of " + ", ".join(task.own_columns) if task.own_columns else "one text"
            raise RecipeError(f"template: task {self.task} cannot use {template!r:.80}; give {forms}")
        if template and any(source.get("text_column") for source in self.data.datasets or ()):
            raise RecipeError("template: a source of datasets has a text_column too; give one of them")
        for name in [*columns, *(template if task.own_columns else ())]:
            if name not in task.own_columns:
                known = f"choose {', '.join(task.own_columns)}" if task.own_columns else "use text_column"
                raise RecipeError(f"columns: task {self.task} has no column {name!r}; {known}")

    def check_sources(self, has_train_data=False, has_eval_data=False):
        """Check that there is data to train or evaluate on, from the recipe or in memory, and not from both.

        Data in memory replace the data of a recipe file, with a warning, but not those that Python code names too.
        """
        data = self.data
        for name in ("train_file", "dataset", "datasets", "val_file"):
            is_given = has_eval_data if name == "val_file" else has_train_data
            if is_given and getattr(data, name):
                if self._overrides is None or name in self._overrides:
                    raise RecipeError(f"{name}: data in memory is given too; leave out one of the two")
                warn(f"{name} of the recipe is not read; the data in memory replaces it")
        has_training_data = has_train_data or bool(data.train_file or data.dataset or data.datasets)
        if not self.evaluation.eval_only and not has_training_data:
            raise RecipeError("there is nothing to train on; give --train_file FILE, or --dataset ID of the Hub")
        if self.evaluation.eval_only and not (data.val_file or has_training_data or has_eval_data):
            raise RecipeError("there is nothing to evaluate on; give --val_file FILE")
        return self

    def check_evaluation(self):
        """Check that no key which was given beside the run's recipe is one that an evaluation does not use."""
        for name in self._overrides or ():
            if name in FIELDS and name not in EVALUATION_KEYS:
                raise RecipeError(f"{name} has no effect on an evaluation; remove it")
        return self

    def check_batch(self):
        """Check that a micro-batch and a step have a size that a machine can hold, once no size is left open."""
        section = self.training
        tokens = min(section.batch_size, section.total_batch_size) * self.data.max_len
        if tokens > _MAX_BATCH_TOKENS or section.total_batch_size > MANY:
            raise RecipeError(
                f"batch_size: {tokens:,} tokens at once and {section.total_batch_size:,} rows per step are too many; "
                "lower it, or gradient_accumulation_steps"
            )

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, values, handler, info):
        """Resolve aliases, and turn pydantic's errors into one line."""
        origins = info.context or {}
        if isinstance(values, dict):
            values = {
                name: _resolve_aliases(value, "Recipe") if name in SECTIONS and isinstance(value, dict) else value
                for name, value in values.items()
            }
        try:
            return handler(values)
        except ValidationError as error:
            raise explain(error, origins) from None

    @model_validator(mode="after")
    def _check(self, info):
        origins = info.context or {}
        for pair in EXCLUSIVE:
            if all(self.value_of(name) is not None for name in pair):
                where = origins.get(pair[0], "Recipe")
                raise RecipeError(f"{where}: {pair[0]} and {pair[1]} are both given; give one of them")
        starts_from_model = self.run.init_from != "scratch" or self.run.resume
        if self.lora.r and not starts_from_model:
            raise RecipeError("lora needs a trained model to add to; give --init_from FOLDER_OR_HUB_ID")
        if self.lora.r and self.data.add_tokens:
            raise RecipeError("add_tokens needs trained embeddings, and lora freezes them; remove one of the two")
        if self.evaluation.eval_only and self.run.dry_run:
            raise RecipeError("dry_run shows what training would do, and eval_only does not train; remove one of them")
        if self.evaluation.eval_only and not starts_from_model:
            raise RecipeError("eval_only needs a trained model; give --load_model FOLDER, or --init_from resume")
        return self


def find_model(name, run, families):
    """Return the name of a recipe's family; if the recipe has none, that of the model that the run starts from.

    Args:
        run: the keys of the section `run`.
    Raises:
        InputError: there is no such family, or no such model.
    """
    init_from, written = run.get("init_from") or "scratch", Path(run.get("save_model") or "out") / "recipe.yaml"
    if name is None and run.get("resume"):
        with suppress(RecipeError):  # there is no run yet, or its recipe was edited
            name = read_file(written).get("model")
    if name is None and init_from != "scratch":
        return families.name_of_model(os.path.expanduser(init_from))
    name = "gpt" if name is None else name
    try:
        return families[name] and families.name_of(name)
    except (KeyError, TypeError, AttributeError):
        ours, all_names = families, families.known_names()
        nearest = [near for names in (ours, all_names) for near in difflib.get_close_matches(str(name), names)]
        hint = f"; did you mean {' or '.join(map(repr, dict.fromkeys(nearest)))}?" if nearest else ""
        raise RecipeError(
            f"model {show(name)} is not known; there is {', '.join(families)}, or any model_type of transformers{hint}"
        ) from None


def _check_streaming(recipe):
    data = recipe.data
    others = {"epochs": recipe.training.epochs, "stride": data.stride, "deduplicate": data.deduplicate}
    others |= {"max_epochs": any(source.get("max_epochs") for source in data.datasets or ())}
    others |= {f"packing {data.packing}": data.packing in ("pad", "best_fit")}
    for name, is_set in others.items():
        if is_set:
            raise RecipeError(f"streaming cannot be combined with {name}; remove one of them")
    if recipe.training.max_steps is None:
        raise RecipeError("streaming needs the number of steps; give --max_steps N")


def find_recipe(path_or_name):
    """Return the path of a recipe file, or of a recipe that ships, by its name."""
    shipped = RECIPES / f"{path_or_name}.yaml"
    if not Path(path_or_name).is_file() and Path(path_or_name).name == str(path_or_name) and shipped.is_file():
        return str(shipped)
    return str(path_or_name)


def read_file(path):
    """Return the content of a recipe file: a dictionary of sections."""
    try:
        with open(path, encoding="utf-8") as file:
            content = read_yaml(file.read(1 << 21))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist; `hf-myllm recipes` lists the ones that ship") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path!r} cannot be read: {error}") from None
    except ValueError as error:
        raise RecipeError(f"recipe {path}: {error}; correct it") from None
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} holds no keys; a recipe is a YAML mapping, see recipes/quickstart.yaml")
    return content


def _load(path_or_name, overrides, where, families=None):
    """Return the recipe of a file with overrides, which win.

    Args:
        overrides: key -> value; `config` and the sections may be given as dictionaries.
        where: the source of the overrides, for messages.
        families: if given, names of a family's configuration are accepted as keys, and the family is checked.
    """
    sections, origins = {}, {}
    path = None if path_or_name is None else find_recipe(path_or_name)
    for name, value in ({} if path is None else read_file(path)).items():
        if name not in Recipe.model_fields:
            raise unknown_key(name, path)
        if isinstance(value, dict):
            value = _resolve_aliases(value, path)
            origins |= dict.fromkeys(value, path)
        sections[name], origins[name] = value, path
    flat = {}
    for name, value in overrides.items():
        flat |= value if name in SECTIONS and isinstance(value, dict) else {name: value}
    flat = _resolve_aliases(flat, where)
    of_config = {name for family in (families or {}).values() for name in config_types(family.config)}
    if families and not set(flat) <= {*SECTION_OF, *of_config, "model", "task", "config"}:
        run = sections.get("run") if isinstance(sections.get("run"), dict) else {}
        model = find_model(flat.get("model", sections.get("model")), run | flat, families)
        of_config |= set(config_types(families[model].config))
    for name, value in flat.items():
        section = SECTION_OF.get(name, "config" if name in of_config else None)
        if section or (name == "config" and isinstance(value, dict)):
            section, keys = (section, {name: value}) if section else ("config", value)
            if isinstance(sections.setdefault(section, {}), dict):
                sections[section] = sections[section] | keys
            origins |= dict.fromkeys(keys, where)
        elif name in ("model", "task", "config"):
            sections[name] = value
        else:
            raise unknown_key(name, where, more=of_config)
        origins[name] = where
        if convert(value, str | None) is not None:
            _drop_replaced(name, sections, origins, where)
    recipe = Recipe.model_validate(sections, context=origins)
    recipe._overrides = set(overrides) if path is None else {name for name, place in origins.items() if place == where}
    if recipe.run.resume and path is not None and "save_model" not in flat:
        refuse_other_run(Path(path), recipe.run.save_model)
    with suppress(ModelError):  # raised again when the run is built, if the recipe has no other mistake
        return recipe if families is None else recipe.check_family(families, origins)
    return recipe


def _drop_replaced(name, sections, origins, where):
    """Remove the file's value of the keys that exclude `name`."""
    for pair in EXCLUSIVE:
        if name in pair:
            other = pair[1 - pair.index(name)]
            if origins.get(other, where) != where:
                sections[SECTION_OF[other]].pop(other, None)
                origins[other] = where


def _resolve_aliases(values, where):
    """Return the keys of one source with every alias replaced by the key that it stands for."""
    values = dict(values)
    for alias, name in ALIASES.items():
        if alias in values:
            if name in values:
                raise RecipeError(f"{where}: '{name}' and '{alias}' are the same key; give one of them")
            values[name] = values.pop(alias)
    if values.get("init_from") == "resume":  # init_from keeps what the run started from
        values["resume"] = True
        del values["init_from"]
    if "quiet" in values:
        quiet = convert(values.pop("quiet"), bool)
        if not isinstance(quiet, bool):
            raise RecipeError(f"{where}: 'quiet' must be true or false, not {quiet!r}")
        if quiet:
            values["log_level"] = "warning"
    return values
