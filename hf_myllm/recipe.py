"""What a recipe may say.

A recipe is a YAML file whose keys are grouped in sections. Every key's name is unique over all sections, so each is
also a flag, and flags win over the file: `train recipes/quickstart.yaml --learning_rate 1e-4`. The section `config`
takes the architecture's own names from its stock configuration class.

Nothing is loaded or written here: a recipe that cannot work is refused before anything happens, in one line that
names the key, the file and the nearest known key.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field

import yaml
from transformers import PreTrainedConfig

from .errors import InputError


def word(default, help, *, on_resume="refuse", **limits):
    """A key of a recipe: its default, its help with units, and what values it takes.

    Args:
        on_resume: "refuse" when a run with another value would be another run; "accept" when it may change midway, or
            when something surer than its name is compared (for files, the tokens in them).
        limits: `minimum`, `above` (exclusive), `maximum`, `below` (exclusive), `choices`.
    """
    return field(default=default, metadata={"help": help, "on_resume": on_resume, **limits})


MANY = 1 << 24  # more of anything in one row or step is a mistake, better refused than run out of memory for


@dataclass
class Data:
    train_file: str | list[str] | None = word(
        None,
        "text to train on: .txt (or any text, by a glob), .jsonl, .parquet, a folder of one of these, or a .bin of "
        "token ids; {stdlib} stands for the folder of the running Python's standard library",
        on_resume="accept",
    )
    val_file: str | list[str] | None = word(None, "text to validate on, of the same kinds", on_resume="accept")
    datasets: list[dict] | None = word(
        None,
        "several sources, instead of train_file: a list of {train_file or dataset, weight}, and dataset_config, "
        "dataset_split, dataset_revision, text_column, document where they differ; the weights are shares of the rows",
        on_resume="accept",
    )
    dataset: str | None = word(None, "a data set of the Hugging Face Hub, instead of train_file", on_resume="accept")
    dataset_config: str | None = word(None, "its configuration", on_resume="accept")
    dataset_split: str = word("train", "its split to train on", on_resume="accept")
    dataset_revision: str | None = word(None, "its revision: a branch, tag or commit", on_resume="accept")
    text_column: str | None = word(
        None,
        "the column that holds the text in .jsonl, .parquet and Hub data, or the words of token_classification; "
        "default: text, or tokens",
        on_resume="accept",
    )
    text_pair_column: str | None = word(
        None, "the column of the second text, where pairs are judged", on_resume="accept"
    )
    label_column: str | list[str] = word(
        "label",
        "the column of the label, or of the words' labels; or several columns of 0 and 1, of which any number may hold",
        on_resume="accept",
    )
    problem_type: str | None = word(
        None,
        "what a label is; default: the number or name of one class, or of several where it is a list",
        choices=("single_label_classification", "multi_label_classification", "regression"),
    )
    unanswerable: bool | None = word(
        None,
        "whether a question may have no answer; default: whether one of the training data has none",
        on_resume="accept",
    )
    max_answer_len: int = word(30, "tokens of an answer, at most", minimum=1, maximum=MANY, on_resume="accept")
    chat_template: str | None = word(
        None, "a file (Jinja) with the form of a chat, for a tokenizer that has none, or in place of its own"
    )
    skip_bad_rows: bool = word(
        False,
        "leave out labelled rows that cannot be learned from, and count them, rather than stop",
        on_resume="accept",
    )
    document: str = word("file", "what a document is in a text file", choices=("file", "line"), on_resume="accept")
    val_fraction: float = word(
        0.05, "share of the documents held out to validate on when there is no val_file", minimum=0, below=1
    )
    bin_dtype: str = word("auto", "number type of a .bin", choices=("auto", "uint16", "uint32"), on_resume="accept")
    tokenizer: str | dict | None = word(
        None,
        "a Hub id, a folder, or {train: bpe, vocab_size: 8192} to train one on the training text (or unigram; "
        "wordpiece for BERT); "
        "default: the one of the model in init_from",
    )
    add_tokens: list[str] | None = word(
        None, "tokens to add to the tokenizer; the model of init_from gets an embedding for each"
    )
    max_len: int | None = word(
        None, "tokens per row; default: as many as the model has positions", minimum=1, maximum=MANY
    )
    stride: int | None = word(
        None,
        "tokens of text from the start of a training row to the start of the next; default: as many as a row has. Of "
        "question_answering: tokens of a long context from row to row; default: half of what fits",
        minimum=1,
        maximum=MANY,
    )
    streaming: bool = word(
        False, "read the corpus a window at a time, for one that is larger than the disk; needs max_steps"
    )
    streaming_window: int = word(
        100_000_000, "tokens of a window, within which rows come in random order", minimum=1, maximum=1 << 40
    )
    packing: str | None = word(
        None,
        "how documents fill rows. stream: one after another, over the ends of rows; documents: the same, but no token "
        "attends to one of another document, and positions begin anew at each; pad: one document a row, as long as the "
        "longest of its batch; best_fit: whole documents, as many as fit a row, which do not see each other. Default: "
        "stream; best_fit for instruction",
        choices=("stream", "documents", "pad", "best_fit"),
    )
    mlm_probability: float = word(0.15, "share of a row's tokens that masked-LM tasks predict", above=0, below=1)
    whole_word_masking: bool = word(False, "mask all tokens of a word or none")


@dataclass
class Training:
    epochs: float | None = word(None, "times over the training rows; default: 1", above=0, maximum=MANY)
    max_steps: int | None = word(None, "optimizer steps, instead of epochs", minimum=1, maximum=1 << 40)
    batch_size: int = word(8, "rows per process per micro-batch", minimum=1, maximum=MANY, on_resume="accept")
    total_batch_size: int | None = word(None, "rows per optimizer step over all processes", minimum=1, maximum=MANY)
    gradient_accumulation_steps: int | None = word(
        None, "micro-batches per optimizer step, instead of total_batch_size", minimum=1, on_resume="accept"
    )
    optimizer: str = word(
        "adamw",
        "adamw; or muon, which learns the matrices of the layers in fewer steps, with AdamW for all else",
        choices=("adamw", "muon"),
    )
    learning_rate: float = word(3e-4, "peak learning rate", above=0)
    min_lr: float = word(0.0, "learning rate at the end of a linear, cosine or wsd schedule", minimum=0)
    lr_schedule: str = word(
        "cosine", "shape of the learning rate after the warm-up", choices=("constant", "linear", "cosine", "wsd")
    )
    warmup_steps: int = word(0, "steps over which the learning rate rises to its peak", minimum=0)
    decay_steps: int | None = word(None, "steps of the final fall of wsd; default: a fifth of all", minimum=1)
    weight_decay: float = word(0.1, "weight decay, on matrices only", minimum=0)
    beta1: float = word(0.9, "AdamW's first-moment decay", minimum=0, below=1)
    beta2: float = word(0.95, "AdamW's second-moment decay", minimum=0, below=1)
    epsilon: float = word(1e-8, "AdamW's epsilon", above=0)
    grad_clip: float = word(1.0, "largest norm of the gradient; 0: no clipping", minimum=0)
    max_skipped_steps: int = word(
        0,
        "steps in a row that may be left out because their loss or gradient is not finite; 0: stop at the first",
        minimum=0,
    )
    dtype: str = word(
        "float32",
        "number type of the weights, whatever that of init_from's file; bfloat16 halves the memory, and loses small "
        "updates (mixed precision is the launcher's to say)",
        choices=("float32", "bfloat16"),
    )
    gradient_checkpointing: bool = word(
        False,
        "compute each layer again in the backward pass instead of keeping what it made: less memory, a third more work",
        on_resume="accept",
    )
    compile: bool = word(False, "compile the model with torch.compile", on_resume="accept")


@dataclass
class Evaluation:
    eval_freq: int | None = word(
        None, "steps between evaluations; default: one at the end", minimum=1, on_resume="accept"
    )
    eval_iter: int | None = word(
        None,
        "batches of total_batch_size rows in each evaluation of the training and of the validation loss; default: 20. "
        "The one at the end reads all validation rows",
        minimum=1,
        maximum=MANY,
        on_resume="accept",
    )
    start_context: str | None = word(
        None,
        'text that the sample of an evaluation continues ("": from nothing), or whose [MASK] it fills in; default: no '
        "sample",
        on_resume="accept",
    )
    max_new_tokens: int = word(100, "tokens of a sample", minimum=1, maximum=MANY, on_resume="accept")
    temperature: float = word(
        0.8, "temperature of a sample; 0: the likeliest token each time", minimum=0, maximum=100, on_resume="accept"
    )
    top_k: int = word(50, "draw a sample from the k likeliest tokens; 0: from all", minimum=0, on_resume="accept")
    metrics: list[str] | None = word(
        None, "more metrics of the library evaluate, by name or path, for labelled data", on_resume="accept"
    )
    metric_for_best: str | None = word(
        None,
        "a figure of the validation, as val_loss or val_f1, by which the best checkpoint is kept; all evaluations then "
        "read all validation rows",
        on_resume="accept",
    )
    greater_is_better: bool | None = word(
        None,
        "whether more of metric_for_best is better; default: not of losses, perplexities, bits and errors",
        on_resume="accept",
    )
    patience: int | None = word(
        None, "evaluations without a better metric_for_best after which training stops", minimum=1, on_resume="accept"
    )
    final_model: str | None = word(
        None,
        "which model the run's folder holds at the end; default: the best where there is a metric_for_best, else the "
        "last",
        choices=("best", "last"),
        on_resume="accept",
    )
    eval_only: bool = word(False, "evaluate on all validation rows, print, and write nothing", on_resume="accept")


@dataclass
class Lora:
    r: int | None = word(
        None,
        "rank of the matrices that LoRA adds and trains, with the model itself frozen; default: no LoRA",
        minimum=1,
    )
    lora_alpha: int | None = word(None, "scale of what they add, over r; default: twice r", minimum=1)
    lora_dropout: float = word(0.0, "dropout before them", minimum=0, below=1)
    target_modules: list[str] | None = word(
        None, "names of the modules that they are added to, or all-linear; default: peft's for the family"
    )
    merge_lora: bool = word(
        False, "add them into the model at the end, so that the run's folder holds a whole one", on_resume="accept"
    )


@dataclass
class Run:
    save_model: str = word("out", "the run's folder", on_resume="accept")
    init_from: str = word(
        "scratch",
        "scratch; resume: continue the run in save_model from its newest checkpoint (from the start where it has "
        "none); or a folder or Hub id of a model of this family",
        on_resume="accept",
    )
    dry_run: bool = word(
        False, "say what the run would do, in seconds, and end: sizes, counts, a first batch", on_resume="accept"
    )
    resume: bool = word(False, "the same as --init_from resume", on_resume="accept")
    allow_changed: bool = word(False, "resume although the recipe or the data has changed", on_resume="accept")
    save_freq: int | None = word(500, "steps between checkpoints; null: one at the end", minimum=1, on_resume="accept")
    save_total_limit: int = word(2, "newest checkpoints to keep", minimum=1, on_resume="accept")
    log_freq: int = word(1, "steps between lines of metrics.jsonl", minimum=1, on_resume="accept")
    log_level: str = word(
        "info",
        "what is said in the terminal: info; warning: only what may be wrong; error: only why the run ends; debug: all "
        "that the libraries say, too",
        choices=("debug", "info", "warning", "error"),
        on_resume="accept",
    )
    quiet: bool = word(False, "the same as --log_level warning", on_resume="accept")
    log_with: list[str] | None = word(
        None,
        "trackers that get what metrics.jsonl gets; each is a package of its own",
        choices=("tensorboard", "wandb", "trackio"),
        on_resume="accept",
    )
    project_name: str = word("hf_myllm", "the project in the trackers", on_resume="accept")
    profile: int | None = word(
        None,
        "steps to record with torch's profiler, after the first ones: a trace, and the time by kind",
        minimum=1,
        maximum=1000,
        on_resume="accept",
    )
    seed: int = word(1337, "seed of the initial weights, the order of rows, and dropout", minimum=0, maximum=1 << 62)


@dataclass
class Hub:
    push_to_hub: str | None = word(
        None,
        "a repository of the Hugging Face Hub, as user/name, to which each checkpoint's model is uploaded while "
        "training goes on, and the last with its model card",
        on_resume="accept",
    )
    hub_private_repo: bool = word(False, "make it a private one, where it is new", on_resume="accept")
    hub_revision: str | None = word(None, "its branch; default: main", on_resume="accept")
    language: str | None = word(
        None, "the language of its text for its model card, as the Hub calls it: en, de ...", on_resume="accept"
    )
    license: str | None = word(
        None, "the model's licence for its model card, as the Hub calls it: mit, apache-2.0 ...", on_resume="accept"
    )


@dataclass
class Recipe:
    model: str = word("gpt", "the family of the model")
    task: str | None = word(None, "what the model learns; default: the family's first")
    config: dict = field(default_factory=dict, metadata={"help": "the architecture, in the stock config's own names"})
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    lora: Lora = field(default_factory=Lora)
    run: Run = field(default_factory=Run)
    hub: Hub = field(default_factory=Hub)

    def to_dict(self):
        return dataclasses.asdict(self)

    def to_yaml(self):
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def identity(self):
        """The keys whose value makes the run what it is, flat: two recipes with equal ones train the same."""
        keys = {"model": self.model, "task": self.task}
        keys |= {f"config.{key}": value for key, value in self.config.items()}
        if self.data.datasets:
            keys["weights"] = [one.get("weight", 1.0) for one in self.data.datasets]
        for section in SECTIONS:
            values = getattr(self, section)
            for key in dataclasses.fields(values):
                if key.metadata["on_resume"] == "refuse":
                    keys[key.name] = getattr(values, key.name)
        return keys


SECTIONS = {"data": Data, "training": Training, "evaluation": Evaluation, "lora": Lora, "run": Run, "hub": Hub}
TOP = {"model": str, "task": str | None}  # the keys outside sections
COMMAND_LINE = "the command line"
ALIASES = {
    "num_epochs": "epochs",
    "save_path": "save_model",
    "valid_file": "val_file",
    "load_model": "init_from",
}
# Of each pair, a recipe gives one; a flag takes the place of the file's.
EXCLUSIVE = (
    ("train_file", "dataset"),
    ("train_file", "datasets"),
    ("dataset", "datasets"),
    ("total_batch_size", "gradient_accumulation_steps"),
    ("epochs", "max_steps"),
)
# leaf name -> (section, type, field); a test holds that no name stands in two sections
WORDS = {
    key.name: (section, typing.get_type_hints(owner)[key.name], key)
    for section, owner in SECTIONS.items()
    for key in dataclasses.fields(owner)
}


def parse(argv, families):
    """The recipe that a command line asks for.

    Args:
        argv: an optional recipe file first, then `--key value`, `--key=value` or, for a yes-or-no key, `--key`.
        families: family name -> its `config` class, whose fields `config` may set, and its `tasks`.

    Raises:
        InputError: an unknown key, a wrong type, an impossible value or combination, a file that is not a recipe.
    """
    if "-h" in argv or "--help" in argv:
        print(describe(families))
        raise SystemExit(0)
    recipe = Recipe()
    given = {}  # key -> where it was said, and by which name, for messages
    arguments = list(argv)
    if arguments and not arguments[0].startswith("--"):
        path = arguments.pop(0)
        _read_file(recipe, path, families, given)
    _read_flags(recipe, arguments, families, given)
    _check(recipe, families, given)
    return recipe


def config_types(config_class):
    """The names that `config` may set for a family, with their types: the stock class's own and their synonyms."""
    common = {key.name for key in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}
    own = {key.name: key.type for key in dataclasses.fields(config_class) if key.name not in common}
    return own | {alias: own[name] for alias, name in config_class.attribute_map.items() if name in own}


def describe(families):
    """The text of --help, from the one place that describes each key."""
    lines = ["usage: accelerate launch -m hf_myllm.train [recipe.yaml] [--key value ...]", ""]
    lines.append(f"--model  the family: {', '.join(families)} (default: gpt)")
    tasks = "; ".join(f"{', '.join(family.tasks)} ({name})" for name, family in families.items())
    lines.append(f"--task  what the model learns: {tasks} (default: the family's first)")
    for section, owner in SECTIONS.items():
        lines += ["", f"{section}:"]
        for key in dataclasses.fields(owner):
            choices = f" [{', '.join(key.metadata['choices'])}]" if "choices" in key.metadata else ""
            default = "" if key.default is None else f" (default: {key.default})"
            lines.append(f"  --{key.name}{choices}  {key.metadata['help']}{default}")
    lines += ["", "aliases: " + ", ".join(f"--{alias} for --{name}" for alias, name in ALIASES.items())]
    for name, family in families.items():
        lines += ["", f"config of {name}: " + ", ".join(f"--{key}" for key in config_types(family.config))]
    return "\n".join(lines)


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which plain YAML silently drops the first."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_file(recipe, path, families, given):
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _UniqueKeys)
    except FileNotFoundError:
        raise InputError(f"recipe {path} does not exist; the ones that ship are in recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path!r} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(f"recipe {path}:{line} not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        raise InputError(f"recipe {path} holds no keys; a recipe is a YAML mapping, see recipes/quickstart.yaml")
    family = _coerce(content.get("model", recipe.model), str, "model", path)
    for key, value in content.items():
        if key in TOP:
            setattr(recipe, key, _coerce(value, TOP[key], key, path))
        elif key == "config" or key in SECTIONS:
            if not isinstance(value, dict):
                raise InputError(f"{path}: '{key}' is a section, and must hold keys, not {value!r}")
            for leaf, leaf_value in value.items():
                _assign(recipe, leaf, leaf_value, path, families, given, section=key, family=family)
        elif key in WORDS:
            raise InputError(f"{path}: '{key}' belongs in the section '{WORDS[key][0]}:'")
        else:
            raise InputError(f"{path}: unknown key '{key}'{_nearest(key, families, family)}")


def _read_flags(recipe, arguments, families, given):
    pairs = []
    while arguments:
        flag = arguments.pop(0)
        if not flag.startswith("--"):
            raise InputError(f"unexpected argument '{flag}'; a recipe comes first, and then --key value")
        key, equals, value = flag[2:].partition("=")
        values = [value] if equals else []
        while not equals and arguments and not arguments[0].startswith("--"):
            values.append(arguments.pop(0))
        pairs.append((key.replace("-", "_"), values))
    for key, values in pairs:  # the family first: it says which names `config` has
        if key in TOP:
            setattr(recipe, key, _coerce(values[-1] if values else None, TOP[key], key, f"--{key}"))
    for key, values in pairs:
        if key in TOP:
            continue
        name = ALIASES.get(key, key)
        is_switch = name in WORDS and WORDS[name][1] is bool
        takes_many = name in WORDS and list[str] in typing.get_args(WORDS[name][1])
        if not values and not is_switch:
            raise InputError(f"--{key} needs a value")
        if len(values) > 1 and not takes_many:
            raise InputError(f"--{key} takes one value, and got {len(values)}: {' '.join(values)}")
        value = True if not values else values if len(values) > 1 else values[0]
        _assign(recipe, key, value, COMMAND_LINE, families, given, family=recipe.model)


def _assign(recipe, key, value, where, families, given, section=None, family="gpt"):
    name = ALIASES.get(key, key)
    config = config_types(families[family].config) if family in families else {}
    if section == "config" or (section is None and name not in WORDS and name in config):
        if name not in config:
            raise InputError(f"{where}: unknown key '{key}' in config of {family}{_nearest(key, families, family)}")
        value = _coerce(value, config[name], key, where)
        name = families[family].config.attribute_map.get(name, name)  # hidden_size is GPT-2's n_embd
        recipe.config[name] = value
    elif name not in WORDS or (section is not None and WORDS[name][0] != section):
        if name in WORDS:
            raise InputError(f"{where}: '{key}' belongs in the section '{WORDS[name][0]}:', not in '{section}:'")
        shown = f"--{key}" if section is None else f"'{key}' in {section}"
        raise InputError(f"{where}: unknown key {shown}{_nearest(key, families, family)}")
    else:
        owner, hint, declared = WORDS[name]
        value = _coerce(value, hint, key, where)
        _limit(value, declared.metadata, key, where)
        if name == "init_from" and value == "resume":  # what the run started from stays known
            name, value = "resume", True
        if value == "" and name != "start_context":
            raise InputError(f"{where}: '{key}' is empty")
        setattr(getattr(recipe, owner), name, value)
    if given.get(name, (where, key)) != (where, key) and given[name][0] == where:
        raise InputError(f"{where}: '{given[name][1]}' and '{key}' are the same: give one of them")
    given[name] = (where, key)


def _coerce(value, hint, key, where):
    """`value` as the type `hint`, from YAML or from a flag's text; YAML 1.1 reads 1e-3 as text, so text may be a
    number."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if is_union else (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("null", "none") and type(None) in options):
        if type(None) in options:
            return None
        raise InputError(f"{where}: '{key}' has no value")
    is_list = str not in options and any(typing.get_origin(option) is list for option in options)
    brackets = "{" if dict in options else "[" if is_list else None
    if brackets and isinstance(value, str) and value.lstrip().startswith(brackets):
        try:
            value = yaml.load(value, _UniqueKeys)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise InputError(f"{where}: '{key}' is not a valid mapping or list: {value!r}") from None
    for option in options:
        if option is bool:
            words = {"true": True, "false": False, "yes": True, "no": False}
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in words:
                return words[value.lower()]
        elif option in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
                if math.isfinite(number) and (option is float or number == int(number)):
                    exact = isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdigit())
                    return option(int(value) if exact else number)
            except (ValueError, OverflowError):
                pass
        elif option is str and isinstance(value, str):
            return value
        elif option is dict and isinstance(value, dict):
            return value
        elif typing.get_origin(option) is list and isinstance(value, (list, str)):
            items = value if isinstance(value, list) else [value]  # one flag's one value
            return [_coerce(item, typing.get_args(option)[0], key, where) for item in items]
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    wanted = " or ".join(dict.fromkeys(names.get(o, "a list") for o in options if o is not type(None)))
    raise InputError(f"{where}: '{key}' must be {wanted}, not {value!r}")


def _limit(value, limits, key, where):
    if value is None:
        return
    checks = {
        "minimum": (lambda bound: value >= bound, "at least"),
        "above": (lambda bound: value > bound, "more than"),
        "maximum": (lambda bound: value <= bound, "at most"),
        "below": (lambda bound: value < bound, "less than"),
    }
    for name, (holds, phrase) in checks.items():
        if name in limits and not holds(limits[name]):
            raise InputError(f"{where}: '{key}' must be {phrase} {limits[name]}, not {value}")
    for one in value if isinstance(value, list) else [value]:
        if "choices" in limits and one not in limits["choices"]:
            raise InputError(f"{where}: '{key}' must be one of {', '.join(limits['choices'])}, not '{one}'")


def _check(recipe, families, given):
    """What no key can know alone."""
    for pair in EXCLUSIVE:
        owners = [getattr(recipe, WORDS[name][0]) for name in pair]
        if all(getattr(owner, name) is not None for owner, name in zip(owners, pair, strict=True)):
            places = [given[name][0] for name in pair]
            if places[0] == places[1]:
                raise InputError(f"{places[0]}: {pair[0]} and {pair[1]} are both given: give one of them")
            loser = 1 - places.index(COMMAND_LINE)
            setattr(owners[loser], pair[loser], None)
    data, training, evaluation = recipe.data, recipe.training, recipe.evaluation
    if recipe.model not in families:
        raise InputError(f"model '{recipe.model}' is not known; there is {', '.join(families)}")
    tasks = families[recipe.model].tasks
    recipe.task = recipe.task or next(iter(tasks))
    if recipe.task not in tasks:
        raise InputError(f"task '{recipe.task}' is not one of {recipe.model}, which learns {' or '.join(tasks)}")
    if recipe.task == "mlm_nsp" and (data.packing not in (None, "stream") or data.stride):
        name = "stride" if data.stride else "packing"
        raise InputError(f"{name} has no meaning with task mlm_nsp, whose rows are pairs of sentences: leave it out")
    is_labelled = recipe.task not in ("causal", "mlm", "mlm_nsp")
    data.packing = data.packing or ("best_fit" if recipe.task == "instruction" else "stream")
    if data.packing in ("pad", "best_fit") and data.stride:
        raise InputError(f"stride has no meaning with packing {data.packing}, whose rows are documents: leave it out")
    _check_datasets(data.datasets or [], given)
    if is_labelled:
        others = {"stride": data.stride and recipe.task != "question_answering", "streaming": data.streaming}
        others |= {"datasets": data.datasets}
        if recipe.task == "instruction":
            others["packing stream, whose rows are cut anywhere,"] = data.packing == "stream"
            others["packing documents, whose rows are cut anywhere,"] = data.packing == "documents"
        else:
            others |= {"packing": data.packing != "stream", "start_context": evaluation.start_context is not None}
        if impossible := [name for name, value in others.items() if value]:
            raise InputError(f"{impossible[0]} has no meaning with task {recipe.task}: leave it out")
    if evaluation.metrics and (not is_labelled or recipe.task == "instruction"):
        raise InputError(f"metrics judge labelled data, and task {recipe.task} has none: leave it out")
    if evaluation.metric_for_best and not evaluation.metric_for_best.startswith("val_"):
        evaluation.metric_for_best = f"val_{evaluation.metric_for_best}"
    if not evaluation.metric_for_best:
        for name in ("patience", "final_model"):
            if getattr(evaluation, name) not in (None, "last"):
                raise InputError(
                    f"{name} {getattr(evaluation, name)} needs to know what is best: give --metric_for_best"
                )
    elif not evaluation.eval_freq:
        raise InputError("metric_for_best needs evaluations to choose from: give --eval_freq N")
    evaluation.final_model = evaluation.final_model or ("best" if evaluation.metric_for_best else "last")
    if recipe.lora.r is None:
        for name in ("lora_alpha", "target_modules", "lora_dropout", "merge_lora"):
            if getattr(recipe.lora, name):
                raise InputError(f"{name} has no meaning without LoRA: give --r 16, or leave it out")
    elif recipe.run.init_from == "scratch" and not recipe.run.resume:
        raise InputError("lora adds to a model that is trained already: give --init_from FOLDER_OR_HUB_ID")
    elif data.add_tokens:
        raise InputError("add_tokens needs embeddings that are trained, and lora leaves them as they are: leave it out")
    if data.streaming:
        others = {"epochs": training.epochs, "datasets": data.datasets, "stride": data.stride}
        others |= {"packing": data.packing in ("pad", "best_fit"), "task mlm_nsp": recipe.task == "mlm_nsp"}
        if impossible := [name for name, value in others.items() if value]:
            raise InputError(f"streaming does not go with {impossible[0]}: leave one of them out")
        if training.max_steps is None:
            raise InputError("streaming needs to know when to stop: give --max_steps N")
    if recipe.run.quiet:
        recipe.run.log_level = "warning"
    if recipe.run.resume and recipe.run.init_from == "resume":
        recipe.run.init_from = "scratch"
    if not evaluation.eval_only and not (data.train_file or data.dataset or data.datasets):
        raise InputError("there is nothing to train on: give --train_file FILE, or --dataset ID of the Hub")
    if evaluation.eval_only and not (data.val_file or data.train_file or data.dataset or data.datasets):
        raise InputError("there is nothing to evaluate on: give --val_file FILE")
    if evaluation.eval_only and recipe.run.dry_run:
        raise InputError("dry_run says what training would do, and eval_only does not train: leave one of them out")
    if evaluation.eval_only and recipe.run.init_from == "scratch" and not recipe.run.resume:
        raise InputError("eval_only needs a trained model: give --load_model FOLDER, or --init_from resume")
    if isinstance(data.tokenizer, dict):
        _check_trained_tokenizer(data.tokenizer, given["tokenizer"][0])
    if training.min_lr > training.learning_rate:
        raise InputError(f"min_lr ({training.min_lr}) must not be above learning_rate ({training.learning_rate})")
    if training.max_steps and training.warmup_steps > training.max_steps:
        raise InputError(f"warmup_steps ({training.warmup_steps}) must not be above max_steps ({training.max_steps})")


def _check_datasets(datasets, given):
    """Each has a source and a weight, and no word that is not known."""
    words = ("dataset_config", "dataset_split", "dataset_revision", "text_column", "document")
    for number, one in enumerate(datasets, start=1):
        where = f"{given['datasets'][0]}: datasets, the {number}."
        for key, value in one.items():
            if key not in ("train_file", "dataset", "weight", *words):
                near = difflib.get_close_matches(str(key), ("train_file", "dataset", "weight", *words), n=1)
                raise InputError(f"{where}: unknown key '{key}'{f'; did you mean {near[0]!r}?' if near else ''}")
            one[key] = _coerce(value, float if key == "weight" else WORDS[key][1], key, where)
            _limit(one[key], {"above": 0} if key == "weight" else WORDS[key][2].metadata, key, where)
        if bool(one.get("train_file")) == bool(one.get("dataset")):
            raise InputError(f"{where}: give one of train_file and dataset")
    weights = [one.get("weight", 1.0) for one in datasets]
    if weights and not min(weights) / sum(weights) >= 1e-6:
        raise InputError(f"datasets: the weight {min(weights)} is less than a millionth of all: leave that source out")


def _check_trained_tokenizer(settings, where):
    unknown = set(settings) - {"train", "vocab_size"}
    kind = settings.get("train")
    if unknown or kind not in ("bpe", "unigram", "wordpiece") or not isinstance(settings.get("vocab_size"), int):
        raise InputError(
            f"{where}: tokenizer must be a name, a folder or {{train: bpe, vocab_size: N}} (or unigram, wordpiece): "
            f"{settings}"
        )
    if settings["vocab_size"] > MANY:
        raise InputError(f"{where}: vocab_size must be at most {MANY}, not {settings['vocab_size']}")
    if kind == "wordpiece" and settings["vocab_size"] < 100:
        raise InputError(f"{where}: vocab_size must be at least 100, not {settings['vocab_size']}")
    if kind != "wordpiece" and settings["vocab_size"] < 257:
        raise InputError(
            f"{where}: a byte-level tokenizer has 256 bytes and an end-of-text token: vocab_size must be at least 257, "
            f"not {settings['vocab_size']}"
        )


def _nearest(key, families, family):
    known = [*WORDS, *ALIASES, *SECTIONS, *TOP, "config"]
    if family in families:
        known += config_types(families[family].config)
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else "; --help lists the keys"
