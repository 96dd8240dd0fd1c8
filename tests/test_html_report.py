"""RUN/report.html, in a real browser."""

import re
import shutil
import subprocess

import pytest
from conftest import run_cli, train

from hf_myllm.reporting import html as html_report

pytestmark = pytest.mark.usefixtures("pictures")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory, stories):
    folder = tmp_path_factory.mktemp("page") / "run <b>&"  # the name needs escaping
    words = ["--train_file", stories, "--tokenizer", "{train: bpe, vocab_size: 300}", "--max_len", 32]
    words += ["--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--max_steps", 40, "--eval_freq", 20, "--eval_iter", 1]
    assert train(*words, "--start_context", "Anna", "--max_new_tokens", 10, "--save_model", folder) == 0
    return folder


def test_the_report_is_complete_and_self_contained(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    for heading in (
        "Curves",
        "Samples",
        "after step 20",
        "Final metrics",
        "Data",
        "Where it ran",
        "Recipe",
        "To repeat it",
    ):
        assert heading in text
    assert "run &lt;b&gt;&amp;" in text
    assert "<b>" not in text
    assert "max_steps: 40" in text
    assert "n_embd: 32" in text
    assert "streaming_window" not in text  # a default, which nobody gave
    for term in ("a nat is 1.44 bits", "Bits per byte is", "The unigram loss is"):
        assert text.index(term) < text.index("<h2>Curves</h2>")
    assert "min-width: 36rem" not in text  # the curves shrink to a telephone's width
    assert " UTC</td>" in text
    outside = re.findall(r'(?:src|href|srcset)="(?!data:)[^"]*"', text)
    assert outside == []
    assert "<script" not in text
    assert "http" not in text


def test_samples_are_escaped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train_loss": 1.0, "sample": "<script>alert(1)</script>"}\n')
    html_report.write_report(tmp_path)
    assert "&lt;script&gt;alert(1)" in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium")
def test_a_browser_shows_it_in_light_and_dark_without_errors(run, tmp_path):
    from matplotlib.image import imread

    shots = {}
    for name, scheme in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{name}.png"
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
        ]
        command += [f"--user-data-dir={tmp_path / name}", "--host-resolver-rules=MAP * ~NOTFOUND"]  # no network
        command += ["--window-size=800,1200", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}"]
        result = subprocess.run([*command, (run / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
        assert shot.is_file(), result.stderr
        assert "CONSOLE" not in result.stderr
        shots[name] = imread(shot)[..., :3]
    assert shots["light"].mean() > 0.8
    assert shots["dark"].mean() < 0.3
    for picture in shots.values():  # the colours of the curves
        assert (picture.max(axis=2) - picture.min(axis=2) > 0.3).sum() > 1000


def test_the_report_can_be_written_again(run, capsys):
    (run / "report.html").unlink()
    assert run_cli("report", run) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    assert (run / "report.html").is_file()
    (run / "report.html").unlink()
    assert train(run / "recipe.yaml", "--resume") == 0  # a finished run writes a missing report
    assert (run / "report.html").is_file()
