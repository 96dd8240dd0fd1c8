"""The flags of the commands that take a recipe, one for each key, and their `--help`."""

from argparse import SUPPRESS

from ..errors import Parser, RecipeError
from . import _load
from .config_section import config_types
from .fields import choices, members, plain_type
from .messages import COMMAND_LINE
from .sections import ALIASES, FIELDS, SECTIONS

MOST_USED = (
    *("train_file", "val_file", "tokenizer", "max_len", "epochs", "max_steps", "batch_size", "learning_rate"),
    *("save_model", "init_from"),
)
METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT"}


def parse(argv, families, prog="hf-myllm train"):
    """Return the recipe of a command line.

    Args:
        argv: an optional recipe (file or name) first, then `--key value`, `--key=value`, or `--key` for a boolean.
        families: see `Recipe.check_family`; the names of their configurations are flags too.
    """
    arguments = list(argv)
    path = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    flags = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            flags.append("--" + name[2:].replace("-", "_") + equals + value)
        elif name.startswith("-") and flags and flags[-1].startswith("--") and "=" not in flags[-1]:
            flags[-1] += f"={argument}"  # argparse would take the value "-1e-4" for a flag
        else:
            flags.append(argument)
    values, rest = build_parser(families, prog).parse_known_args(flags)
    others = {}  # names of the configuration of a family that has no flags of its own, or unknown
    while rest and rest[0].startswith("--"):
        name, equals, value = rest.pop(0)[2:].partition("=")
        others[name] = value if equals else rest.pop(0) if rest and not rest[0].startswith("--") else "true"
    if rest:
        raise RecipeError(
            f"unexpected argument '{rest[0]}'; a recipe comes first, then --key value, with one value for most keys"
        )
    overrides = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in vars(values).items()
    } | others
    return _load(path, overrides, COMMAND_LINE, families).check_sources()


def build_parser(families, prog="hf-myllm train", parser=None, with_choices=False):
    """Return an argparse parser with all keys as flags, grouped by section.

    Args:
        parser: add the flags to this parser instead of a new one.
        with_choices: let argparse know the values of each key; shell completion uses them.
    """
    parser = parser or Parser(prog=prog, allow_abbrev=False)
    parser.usage = "%(prog)s [RECIPE] [--key value ...]"
    parser.description = "RECIPE is a YAML file, or the name of a recipe that ships (see `hf-myllm recipes`)."
    parser.argument_default = SUPPRESS
    most_used = parser.add_argument_group("most used")
    help = f"{', '.join(families)}, or any model type of transformers. Default: that of init_from, else gpt."
    model = most_used.add_argument("--model", metavar="NAME", help=help)
    if with_choices:
        model.choices = families.known_names()
    tasks = "; ".join(f"{name}: {', '.join(family.tasks)}" for name, family in families.items())
    most_used.add_argument("--task", help=f"What the model is trained for. Default: the family's first of {tasks}.")
    for name in MOST_USED:
        _add_flag(most_used, name, with_choices)
    for section, model in SECTIONS.items():
        group = parser.add_argument_group(section)
        for name in model.model_fields:
            if name not in MOST_USED:
                _add_flag(group, name, with_choices)
        if section == "run":
            group.add_argument("--quiet", nargs="?", const=True, help="The same as --log_level warning.")
    for alias, name in ALIASES.items():
        parser.add_argument(f"--{alias}", nargs=_nargs(name), help=SUPPRESS)
    known = set()
    for name, family in families.items():
        names = config_types(family.config)
        parser.add_argument_group(f"config of {name}", ", ".join(f"--{key}" for key in names))
        for key in names:
            if key not in known:
                parser.add_argument(f"--{key}", help=f"config of {name}" if with_choices else SUPPRESS)
                known.add(key)
    return parser


def _nargs(name):
    plain = {plain_type(option) for option in members(FIELDS[name].annotation)}
    return "?" if bool in plain else "+" if list in plain and name not in ("datasets", "mixture_schedule") else None


def _add_flag(group, name, with_choices):
    field = FIELDS[name]
    help = field.description + "".join(f" Alias: --{alias}." for alias, key in ALIASES.items() if key == name)
    if field.default is not None and field.default is not False:
        help += f" Default: {field.default}."
    values = choices(field.annotation)
    metavar = "|".join(values) or METAVARS.get(plain_type(members(field.annotation)[0]), "VALUE")
    if len(metavar) > 50:
        help, metavar = f"{help} One of {', '.join(values)}.", "TEXT"
    const = {"const": True} if _nargs(name) == "?" else {}
    action = group.add_argument(f"--{name}", nargs=_nargs(name), metavar=metavar, help=help.replace("%", "%%"), **const)
    if with_choices and values:
        action.choices = values
