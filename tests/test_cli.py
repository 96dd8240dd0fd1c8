"""The command line: its commands, entry points and exit codes."""

import runpy
import sys

import pytest
from conftest import ROOT, run_cli, train

from hf_myllm import cli
from hf_myllm.reporting.plots import AXES


def test_help_lists_the_commands(capsys):
    assert run_cli() == 0
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert name in shown
        assert command.help.split(",")[0] in " ".join(shown.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_help(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run_cli(name, "--help") == 0
    shown = capsys.readouterr()
    assert f"hf-myllm {name}" in shown.out


def test_the_help_of_train_is_wrapped_and_begins_with_the_most_used_keys(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_cli("train", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups[1:] == [
        *("most used:", "data:", "training:", "evaluation:", "lora:", "run:", "hub:"),
        *("config of gpt:", "config of llama:", "config of qwen3:", "config of bert:", "config of t5:"),
        "config of bart:",
    ]


def test_the_shipped_recipes_are_listed(capsys):
    assert run_cli("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in ROOT.glob("recipes/*.yaml"))
    assert all(len(line.split()) > 5 for line in lines)


def test_train_is_the_default_command(capsys):
    for arguments in (["nope.yaml"], ["train", "nope.yaml"]):
        assert run_cli(*arguments) == 2
        assert "recipe nope.yaml does not exist; `hf-myllm recipes` lists" in capsys.readouterr().err
    for arguments, message in (
        (["compare", "a", "b"], "the commands are train,"),
        (["trian"], "did you mean 'train'?"),
    ):
        assert run_cli(*arguments) == 2
        assert f"there is no command or recipe '{arguments[0]}'; {message}" in capsys.readouterr().err
    assert run_cli("--lerning_rate", 1) == 2
    assert "unknown key --lerning_rate; did you mean 'learning_rate'?" in capsys.readouterr().err
    assert run_cli("quickstart", "--n_layers", 1) == 2  # found by its name
    assert "unknown key --n_layers" in capsys.readouterr().err


def test_evaluate_reads_the_recipe_of_a_run(tiny, tmp_path, stories, capsys):
    run = tmp_path / "run"
    assert train(*tiny(max_steps=4, save_freq=None)) == 0
    capsys.readouterr()
    assert train(run / "recipe.yaml", "--eval_only", "--load_model", run) == 0
    expected = capsys.readouterr().out
    assert "validation loss" in expected
    assert run_cli("evaluate", run) == 0
    assert capsys.readouterr().out == expected
    assert run_cli("evaluate", run, "--val_file", stories / "00.txt", "--batch_size", 2) == 0
    assert "00.txt" in capsys.readouterr().out
    assert run_cli("evaluate", tmp_path / "nope") == 2
    assert "recipe.yaml does not exist; give the folder of a run" in capsys.readouterr().err
    assert run_cli("evaluate") == 2


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", ["train", "prepare", "predict", "generate", "plot", "page", "reference", "hub", "cli"])
def test_python_m_works(name, monkeypatch, capsys):
    arguments = {"hub": ["push", "--help"]}.get(name, ["--help"])
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(f"hf_myllm.{name}", run_name="__main__", alter_sys=False)
    assert exit.value.code == 0
    assert "usage: hf-myllm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt, 130, "stopped by Ctrl-C\n"),
        (cli.InputError("a\nb \x1b[31m"), 2, "error: a b \ufffd[31m\n"),
        (cli.PeerFailure("another rank prints the cause"), 2, ""),
    ],
)
def test_exit_codes(error, code, message, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setitem(cli.COMMANDS, "recipes", cli.Command("fails", fail, lambda parser: None))
    assert run_cli("recipes") == code
    assert capsys.readouterr().err == message


def test_a_closed_pipe_is_no_error():
    import subprocess

    command = f"{sys.executable} -m hf_myllm.cli recipes; echo code $? >&2"
    result = subprocess.run(
        ["bash", "-c", f"({command}) | true"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in result.stderr


def test_the_axes_of_plot_are_known():
    parser = cli.Parser()
    cli._plot_arguments(parser)
    assert next(action.choices for action in parser._actions if action.dest == "by") == tuple(AXES)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell, capsys):
    pytest.importorskip("shtab")
    assert run_cli("--print-completion", shell) == 0
    script = capsys.readouterr().out
    for word in ("--learning_rate", "--n_layer", "constant", "evaluate", "best_fit"):
        assert word in script
