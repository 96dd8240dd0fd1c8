"""The command line: `hf-myllm COMMAND`. A command imports the libraries that it needs when it runs.

Exit codes: 0; 2 for a user's mistake, with one line on stderr; 128 + N after signal N (130 for Ctrl-C, 141 for a closed
pipe).
"""

import difflib
import os
import re
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from . import __version__
from .errors import CONTROL, InputError, Parser, PeerFailure, RankError, RecipeError, os_problem, printable
from .terminal import plural


def main(argv=None):
    """Run a command and exit with its code."""
    arguments = list(map(str, sys.argv[1:] if argv is None else argv))
    for stream in (sys.stdout, sys.stderr):  # text that the terminal's encoding cannot show is replaced
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_PlainText, streams)
    try:
        with _noted_interrupt() as interrupts:
            code = _dispatch(arguments) or 0
    except InputError as error:
        # all ranks of a launch read the same recipe: one per machine prints its mistakes
        is_printed = os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankError)
        if is_printed and not isinstance(error, PeerFailure):
            _print_error(" ".join(str(error).split()))
        code = 2
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + getattr(signal, "SIGPIPE", 13)  # which Windows lacks
    except (KeyboardInterrupt, Exception) as error:
        if interrupts or isinstance(error, KeyboardInterrupt):  # an import that it interrupts may raise anything
            print("stopped by Ctrl-C", file=sys.stderr)
            code = 128 + signal.SIGINT
        elif isinstance(error, OSError):
            _print_error(os_problem(error))
            code = 2
        else:
            raise
    finally:
        sys.stdout, sys.stderr = streams
    sys.exit(code)


def _print_error(text):
    print(f"error: {printable(text)}", file=sys.stderr)


@contextmanager
def _noted_interrupt():
    """Raise KeyboardInterrupt at Ctrl-C, as Python does, and note it in the list that this yields."""
    interrupts = []

    def receive(signum, frame):
        interrupts.append(signum)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or a caller's
        yield interrupts
        return
    signal.signal(signal.SIGINT, receive)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _PlainText:
    """A text stream without control characters but line breaks, carriage returns and tabs: what comes from files,
    models and libraries must not steer a terminal."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        return self._stream.write(CONTROL.sub("\ufffd", text))

    def writelines(self, lines):
        for line in lines:
            self.write(line)


def _dispatch(arguments):
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "--version") or name.startswith("--print-completion"):
        return build_parser(with_flags=name.startswith("--print-completion")).parse_args(arguments[:2] or [name])
    if name not in COMMANDS and re.fullmatch(r"\w+", name) and not Path(name).exists():
        recipes = [path.stem for path in (Path(__file__).parent / "recipes").glob("*.yaml")]
        if name not in recipes:
            near = difflib.get_close_matches(name, [*COMMANDS, *recipes], n=1, cutoff=0.75)
            hint = f"did you mean '{near[0]}'?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise RecipeError(f"there is no command or recipe '{name}'; {hint}")
    if name not in COMMANDS:  # `hf-myllm RECIPE --key value` trains
        name, arguments = "train", ["train", *arguments]
    command = COMMANDS[name]
    if command.add_arguments is None:
        return command.run(arguments[1:])
    options = vars(build_parser().parse_args(arguments))
    del options["command"]
    if command.loads_models:
        _say_start(on_stdout=command.loads_models == "stdout")
        from .distributed import silence_libraries

        silence_libraries()
    return command.run(**options)


def build_parser(with_flags=False):
    """Return the parser of all commands.

    Args:
        with_flags: also add the flags of `train` and `prepare`, which takes the import of the model families.
    """
    parser = Parser(
        prog="hf-myllm",
        description="Train, fine-tune and evaluate GPT, Llama, Qwen3, BERT, T5, BART and other models of transformers.",
        epilog="`hf-myllm RECIPE --key value` is short for `hf-myllm train RECIPE --key value`.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    if with_flags:
        _add_completion(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=f"{command.help}.")
        if command.add_arguments is not None:
            command.add_arguments(subparser)
        elif with_flags:
            from .models import FAMILIES
            from .recipe.flags import build_parser as add_flags

            add_flags(FAMILIES, parser=subparser, with_choices=True)
    return parser


def _add_completion(parser):
    try:
        import shtab
    except ImportError:
        raise InputError("--print-completion needs the package shtab; pip install shtab") from None
    shtab.add_argument_to(parser, "--print-completion", help="print a completion script for bash, zsh or tcsh")


# ---- commands that take a recipe


def _train(argv):
    return _run_recipe(_parse(argv), argv)


def _evaluate(argv):
    """Evaluate the model of a run: `hf-myllm evaluate RUN [--val_file FILE] [--key value ...]`."""
    usage = "usage: hf-myllm evaluate RUN [--val_file FILE] [--key value ...]"
    if argv and argv[0] in ("-h", "--help"):
        print(f"{usage}\n\nEvaluate the model of a run on all rows of its validation data, or of another file.")
        print("RUN is the folder of the run. Any key of its recipe may be overridden; see `hf-myllm train --help`.")
        return 0
    if not argv or argv[0].startswith("-"):
        raise RecipeError(f"{usage}; RUN is the folder of a run and comes first")
    run_dir, *flags = argv
    from .checkpoint import find_model, find_run_dir

    recipe = find_run_dir(run_dir) / "recipe.yaml"
    if not recipe.is_file():
        raise RecipeError(f"{recipe} does not exist; give the folder of a run")
    folders = ["--save_model", str(recipe.parent), "--init_from", str(find_model(run_dir, verify=False))]
    arguments = [str(recipe), *folders, "--eval_only", *flags]
    return _run_recipe(_parse(arguments, prog="hf-myllm evaluate").check_evaluation(), arguments)


def _prepare(argv):
    """Prepare the data of a recipe: `hf-myllm prepare RECIPE [--to FOLDER_OR_URL [--part 1/2]] [--key value ...]`, or
    check token shards by their digests: `hf-myllm prepare FOLDER/index.json`."""
    options = Parser(add_help=False, allow_abbrev=False)
    options.add_argument("--to")
    options.add_argument("--part", default="1/1")
    options, argv = options.parse_known_args(argv)
    part = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", options.part)
    if not part or not 1 <= int(part[1]) <= int(part[2]) or (options.to is None and options.part != "1/1"):
        raise RecipeError(f"--part {options.part}: give the number of a part and their count with --to, as in 1/2")
    if options.to is not None and not options.to.strip():
        raise RecipeError("--to: it is empty; give a folder or a URL")
    if argv and Path(argv[0]).name == "index.json":
        if options.to or argv[1:]:
            raise RecipeError(f"{argv[0]}: prepare checks an index and takes no options; give --to a recipe")
        from .data.shards import Index

        print(f"{argv[0]}: {plural(Index(argv[0]).verify(), 'shard')} checked, all whole")
        return
    if {"-h", "--help"} & set(argv):
        print("--to FOLDER_OR_URL writes token shards to read anywhere; --part 1/2 a part of them (docs/shards.md)\n")
    recipe = _parse(argv, prog="hf-myllm prepare")
    from .prepare import prepare_data

    prepare_data(recipe, options.to, tuple(map(int, part.groups())))


def _parse(argv, prog="hf-myllm train"):
    _say_start(argv)
    from .models import FAMILIES
    from .recipe.flags import parse

    return parse(argv, FAMILIES, prog)


def _say_start(argv=(), on_stdout=True):
    """Say that the command has started, as the imports take seconds; on stderr only if that is a terminal."""
    is_quiet = any(argument.startswith(("--quiet", "--log_level", "--log-level", "--help", "-h")) for argument in argv)
    is_shown = not is_quiet and (on_stdout or sys.stderr.isatty()) and os.environ.get("RANK", "0") == "0"
    if "torch" not in sys.modules and is_shown:
        stream = sys.stdout if on_stdout else sys.stderr
        print(f"hf-myllm    {__version__}, loading PyTorch and transformers ...", file=stream, flush=True)


def _run_recipe(recipe, argv):
    """Train, evaluate or do a dry run; return the exit code."""
    from .build import open_run
    from .evaluation import evaluate_all
    from .launcher import exit_with_launcher
    from .train import train

    exit_with_launcher()
    if not (recipe.run.dry_run or recipe.evaluation.eval_only):
        signum = train(recipe).stop_signal
        return 128 + signum if signum else 0
    with open_run(recipe) as run:
        if recipe.evaluation.eval_only:
            from .reporting.summary import print_evaluation

            metrics = evaluate_all(run)
            if run.accelerator.is_main_process:
                print_evaluation(run, metrics)
        elif run.accelerator.is_main_process:
            from .reporting import dry_run

            dry_run.show(run, argv)
    return 0


def _recipes():
    """List the recipes that ship, each with the first line of its comment."""
    from .recipe import RECIPES

    for path in sorted(RECIPES.glob("*.yaml")):
        first_line = path.read_text(encoding="utf-8").split("\n", 1)[0]
        print(f"{path.stem:<18}{first_line.removeprefix('# ')}")


def _reference_arguments(parser):
    parser.add_argument("form", choices=("markdown", "schema"), help="a page, or a JSON schema")
    parser.add_argument("--output", metavar="FILE", help="file to write (default: print)")


def _reference(form, output):
    from .files import write_text_atomically
    from .models import FAMILIES
    from .recipe.reference import render

    text = render(form, FAMILIES)
    if output in (None, "-"):
        return print(text)
    try:
        write_text_atomically(output, text + "\n")
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}; give another --output") from None


# ---- commands that take the folder of a run


def _generate_arguments(parser):
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run, a checkpoint or any model, or id@revision")
    parser.add_argument("--prompt", default="", help="text to continue, or to fill in (default: start from nothing)")
    parser.add_argument("--chat", action="store_true", help="apply the chat template to the prompt")
    parser.add_argument("--max_new_tokens", type=int, help="maximum number of tokens (default: 200)")
    parser.add_argument("--temperature", type=float, help="0 is greedy decoding (default: 0.8)")
    parser.add_argument("--top_k", type=int, help="sample from the k likeliest tokens; 0: all (default: 50)")
    parser.add_argument("--top_p", type=float, help="sample from the likeliest tokens up to this total (default: 1)")
    parser.add_argument("--num_samples", type=int, help="number of texts (default: 1)")
    parser.add_argument("--seed", type=int, help="seed of the first text; each next one adds 1 (default: 0)")


def _predict_arguments(parser):
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run or any such model, or id@revision")
    parser.add_argument("--input", required=True, help="file with the examples")
    parser.add_argument("--output", help="file to write (default: stdout)")
    parser.add_argument("--batch_size", type=int, default=32, help="rows at once (default: 32)")
    parser.add_argument("--max_len", type=int, help="tokens per row (default: the recipe's, or the model's positions)")
    parser.add_argument("--text_column", help="column of the text, or of the words (default: the recipe's)")
    parser.add_argument("--long_texts", choices=("cut", "windows"), help="texts beyond max_len (default: the recipe's)")
    parser.add_argument("--text_pair_column", help="column of the second text (default: the recipe's)")
    parser.add_argument("--target_column", help="column of the targets of generated texts (default: the recipe's)")
    parser.add_argument("--source_prefix", help="text before each source (default: the recipe's)")
    parser.add_argument("--max_target_len", type=int, help="tokens to generate, at most (default: the recipe's)")
    parser.add_argument("--num_beams", type=int, help="beams of the search; 1: greedy (default: the recipe's)")
    parser.add_argument("--skip_bad_rows", action="store_true", help="skip examples that cannot be used")


def _predict(output, **options):
    from .predict import predict_file

    count, skipped, metrics = predict_file(output=output, **options)
    for message in skipped[:3]:
        print(f"left out: {message}", file=sys.stderr)
    if output or skipped:
        more = f", {len(skipped):,} left out" if skipped else ""
        print(f"{plural(count, 'row')} judged{more}{f': {output}' if output else ''}", file=sys.stderr)
    for name, value in metrics.items():
        print(f"{name:<18}{value:.4g}", file=sys.stderr)


def _plot_arguments(parser):
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--by", default="step", choices=("step", "tokens", "time"), help="the x axis (default: step)")
    parser.add_argument(
        "--output",
        nargs="+",
        help=".png or .svg files to write (default: loss.png and loss.svg in the folder of one run; curves.png and "
        "curves.svg in the current folder for several)",
    )


def _plot(runs, by, output):
    from .reporting.plots import plot

    print("\n".join(map(str, plot(runs, by, output))))


def _report_arguments(parser):
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run")


def _report(run_dir):
    from .reporting import html, plots

    run_dir = Path(run_dir)
    try:
        plots.write_plot(run_dir)
        html.write_report(run_dir)
    except OSError as error:
        raise InputError(f"{run_dir}/report.html: it cannot be written: {error}") from None
    print(run_dir / "report.html")


def _average_arguments(parser):
    parser.add_argument(
        "folders", nargs="+", metavar="RUN", help="folder of a run, or folders of checkpoints or models"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder to write the average to")
    parser.add_argument("--last", type=int, metavar="N", help="newest checkpoints of the run (default: all)")
    parser.add_argument("--ema", type=float, metavar="X", help="average with this decay (default: all count alike)")


def _average(folders, output, last, ema):
    from .average import average
    from .reporting.console import format_loss

    result = average(folders, output, last, ema)
    how = "alike" if ema is None else f"with a decay of {ema}"
    print(f"averaged    {plural(len(result['folders']), 'model')} {how}: {', '.join(map(str, result['folders']))}")
    if result["problem"]:
        print(f"not evaluated: {result['problem']}")
    else:
        print(f"{'validation':<24}{'average':>12}{'last':>12}")
    for name, value in result["average"].items():
        columns = [
            f"{v:,}" if isinstance(v, int) else "" if v is None else format_loss(v)
            for v in (value, result["last"][name])
        ]
        print(f"{name.replace('_', ' '):<24}{columns[0]:>12}{columns[1]:>12}")
    print(f"written     {output}")


def _push_arguments(parser):
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run or of one of its checkpoints")
    parser.add_argument("repo", metavar="user/name", help="repository on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", help="branch to push to (default: main)")


def _push(run_dir, repo, private, revision):
    import huggingface_hub

    from .hub import push as hub

    huggingface_hub.utils.disable_progress_bars()
    hub.end_with_run()
    print(f"pushed: {hub.push(run_dir, repo, private, revision)}")


def _generate(**options):
    from .generate import print_texts

    print_texts(**options)


class Command(NamedTuple):
    """A command of the command line."""

    help: str
    run: object  # called with the parsed options or, without `add_arguments`, with the words after the command
    add_arguments: object = None  # of a parser; None: the command takes a recipe and its flags
    loads_models: str | None = None  # "stdout" or "stderr", where to say so: the imports take seconds


COMMANDS = {
    "train": Command("Train a model from a recipe", _train),
    "prepare": Command("Train the tokenizer and tokenize the data of a recipe, ahead of a launch", _prepare),
    "evaluate": Command("Evaluate the model of a run on all validation rows", _evaluate),
    "generate": Command("Generate text with a model, or fill in [MASK]", _generate, _generate_arguments, "stderr"),
    "predict": Command(
        "Label the examples of a file, answer their questions, or generate their targets",
        _predict,
        _predict_arguments,
        "stderr",
    ),
    "average": Command("Average the weights of checkpoints of a run", _average, _average_arguments, "stdout"),
    "plot": Command("Draw the curves of one or several runs", _plot, _plot_arguments),
    "report": Command("Write a run's report.html and loss.png", _report, _report_arguments),
    "push": Command("Push a run's model with its card to the Hugging Face Hub", _push, _push_arguments, "stderr"),
    "recipes": Command("List the recipes that ship", _recipes, lambda parser: None),
    "reference": Command("Print or write the reference of a recipe's keys", _reference, _reference_arguments),
}

if __name__ == "__main__":
    main()
