"""One-line messages for invalid recipes: `<file or "the command line">: <problem>; <what to do>`."""

import difflib
from pathlib import Path

from ..errors import RecipeError, show
from .fields import Source, Stage, choices, describe_type, members
from .sections import ALIASES, FIELDS, SECTION_OF, SECTIONS

COMMAND_LINE = "the command line"
LIMITS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
EXPECTED = {
    "tokenizer": "a name, a folder or {train: bpe, vocab_size: N} (or unigram, wordpiece, characters)",
    "class_weights": "balanced, or a mapping of classes to weights",
    "weight_averaging": "{ema: 0.999}, with a number above 0 and below 1",
}
_ITEM_TYPES = {"string_type": "text", "float_type": "a number"}  # of what a list or mapping holds
TOP_LEVEL = (*SECTIONS, "model", "task", "config")
# key -> its names in nanoGPT, transformers' TrainingArguments and example scripts
_FOREIGN_NAMES = {
    "batch_size": "per_device_train_batch_size",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "compile": "torch_compile",
    "dataset": "dataset_name",
    "dataset_config": "dataset_config_name",
    "epochs": "num_train_epochs",
    "epsilon": "adam_epsilon",
    "eval_freq": "eval_interval eval_steps",
    "eval_iter": "eval_iters",
    "grad_clip": "max_grad_norm",
    "init_from": "model_name_or_path resume_from_checkpoint",
    "log_freq": "log_interval logging_steps",
    "log_with": "report_to wandb_log",
    "lr_schedule": "lr_scheduler_type",
    "label_smoothing": "label_smoothing_factor",
    "max_len": "block_size max_seq_length sequence_length max_source_length max_source_len",
    "max_target_len": "max_target_length",
    "max_steps": "max_iters",
    "metric_for_best": "metric_for_best_model",
    "optimizer": "optim",
    "patience": "early_stopping_patience",
    "precision": "mixed_precision bf16 fp16",
    "project_name": "project wandb_project",
    "push_to_hub": "hub_model_id",
    "save_freq": "save_steps",
    "save_model": "out_dir output_dir",
    "tokenizer": "tokenizer_name",
    "target_column": "summary_column",
    "text_column": "source_column",
    "total_batch_size": "total_batch",
    "val_file": "validation_file",
    "val_fraction": "validation_split_percentage",
    "warmup_steps": "warmup_iters",
}
FOREIGN_NAMES = {foreign: name for name, names in _FOREIGN_NAMES.items() for foreign in names.split()}
# The same size in the configurations of different families.
_SIZES = (
    ("n_layer", "num_hidden_layers", "num_layers", "encoder_layers"),
    ("n_head", "num_attention_heads", "num_heads", "encoder_attention_heads"),
    ("n_embd", "hidden_size", "d_model"),
    ("n_inner", "intermediate_size", "d_ff", "encoder_ffn_dim"),
    ("n_positions", "n_ctx", "max_position_embeddings"),
)


def unknown_key(name, where, section=None, more=()):
    """Return the error for a key that does not exist, or not in this section; `more` are further known names."""
    place = SECTION_OF.get(ALIASES.get(name, name), "" if name in TOP_LEVEL else None)
    if place is not None and section != place:
        instead = f", not in '{section}:'" if section else ""
        target = f"in the section '{place}:'" if place else "at the top of a recipe"
        return RecipeError(f"{where}: {show(name)} belongs {target}{instead}; move it there")
    shown = f"unknown key {show(name)}" + (f" in {section}" if section else "")
    if where == COMMAND_LINE:
        shown = shown.replace(show(name), f"--{name}")
    if name in FOREIGN_NAMES:
        return RecipeError(f"{where}: {shown}; it is called '{FOREIGN_NAMES[name]}' here")
    for sizes in _SIZES:
        if name in sizes and (own := [other for other in sizes if other in more]):
            return RecipeError(f"{where}: {shown}; it is called '{own[0]}' here")
    known = {*FIELDS, *ALIASES, *TOP_LEVEL, *more} - {name}
    nearest = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.5)
    return RecipeError(
        f"{where}: {shown}; " + (f"did you mean '{nearest[0]}'?" if nearest else "--help lists the keys")
    )


def refuse_other_run(path, save_model):
    """Raise RecipeError if `path` is the recipe.yaml of a run and names another folder, which would be resumed: that of
    the run that this is a copy of, or where it was before."""
    is_run = path.name == "recipe.yaml" and (path.parent / "run.json").is_file()
    if is_run and path.parent.resolve() != Path(save_model).resolve():
        raise RecipeError(
            f"{path}: it would resume the run in its save_model, {save_model}; to resume this one, give --save_model "
            f"{path.parent}"
        )


def explain(error, origins, fields=FIELDS):
    """Return the RecipeError for the first problem in a pydantic ValidationError.

    Args:
        origins: key -> where its value came from, if that is not `Recipe(...)` in Python.
        fields: key -> its declaration.
    """
    problems = error.errors(include_url=False)
    same_key = [problem for problem in problems if problem["loc"][:2] == problems[0]["loc"][:2]]
    # a mapping's, of a key that may also be text; a misspelled key before the one that is missing for it
    problem = max(same_key, key=lambda problem: (len(problem["loc"]), problem["type"] == "extra_forbidden"))
    path, code, value = list(problem["loc"]), problem["type"], problem["input"]
    name = path[min(1, len(path) - 1)] if path[0] in (*SECTIONS, "config") else path[0]
    where = origins.get(name, "Recipe")
    hint = fields[name].annotation if name in fields else str
    items = {"datasets": Source, "mixture_schedule": Stage}.get(name)
    if items and len(path) > 3:  # datasets[0].weight
        where, name = f"{where}: {name}[{path[2]}]", path[3]
        hint = items.__annotations__.get(name, str)
    if code == "extra_forbidden" and name not in EXPECTED:
        section = path[0] if len(path) == 2 else None
        return unknown_key(name, where, section, items.__annotations__ if items and len(path) > 2 else ())
    return RecipeError(f"{where}: '{name}' {_requirement(path, code, value, hint, problem.get('ctx', {}))}")


def _requirement(path, code, value, hint, details):
    """Return what a value must be, and what it is."""
    if len(path) == 1 and code in ("model_type", "dict_type") and path[0] in (*SECTIONS, "config"):
        return f"is a section and must hold keys, not {show(value)}"
    if code == "missing":
        return "is missing; give it"
    if code == "not_text":
        return "is not text that UTF-8 can hold; correct it"
    if code == "control":  # "C:\new"
        return f"is {show(value)}, with a control character; in YAML give a path with backslashes without double quotes"
    if code == "empty":
        return "is empty; give a value, or remove it"
    if value is None:
        return "has no value; give one, or remove the key"
    if code in LIMITS:
        words, bound = LIMITS[code]
        return f"must be {words} {details[bound]:.12g}, not {show(value)}"
    num_types = len([option for option in members(hint) if option is not type(None)])
    expected = next((EXPECTED[name] for name in path if name in EXPECTED), describe_type(hint))
    if code in _ITEM_TYPES and len(path) > (2 if num_types < 2 else 3):
        expected = _ITEM_TYPES[code]
    elif code == "literal_error" and choices(hint) and not set(path) & set(EXPECTED):
        expected = f"one of {', '.join(choices(hint))}"
    return f"must be {expected}, not {show(value)}"
