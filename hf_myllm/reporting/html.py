"""RUN/report.html: the whole of a run on one page, in one file that needs no network and no script.

A run makes it at its end; `python -m hf_myllm.page RUN` makes it at any time.
All of it is read from the run's folder: recipe.yaml, run.json, metrics.jsonl.
"""

import base64
import html
import shlex
import sys
import tempfile
import time
from pathlib import Path

from ..errors import InputError, Parser, exit_on_input_error, printable
from ..files import write_text_atomically
from . import plots as plot
from .metrics_log import read_metrics, read_run

_SAMPLES = 12  # shown at most, evenly spread
_STYLE = """
:root { color-scheme: light dark; --text: #24292f; --dim: #59636e; --ground: #ffffff; --box: #f6f8fa; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --text: #d1d7e0; --dim: #9198a1; --ground: #0d1117; --box: #151b23; --line: #3d444d; }
}
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: var(--text); background: var(--ground);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.dim, td.dim, figcaption { color: var(--dim); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
dl div { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .8rem; }
dt { color: var(--dim); font-size: .8rem; } dd { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem; margin: .3rem 0;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30rem;
  font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
figure.curves { margin: 0; overflow-x: auto; } img { width: 100%; min-width: 36rem; max-width: 52rem; }
"""


def make(folder):
    """Write RUN/report.html.

    Raises:
        InputError: the run has no curves yet.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    about, lines = read_run(folder), read_metrics(folder)
    evaluations = [line for line in lines if "train_loss" in line]
    steps = [line for line in lines if "learning_rate" in line]
    recipe = folder / "recipe.yaml"
    parts = [
        _summary(about, steps, evaluations),
        _section("Curves", _curves(plot.read(folder))),
        _section("Samples", _samples(evaluations)),
        _section("Final metrics", _metrics(about, evaluations)),
        _section("Data", _data(about)),
        _section("Where it ran", _launches(about)),
        _section("Recipe", _code(recipe.read_text(encoding="utf-8")) if recipe.is_file() else ""),
        _section("To repeat it", _commands(folder)),
    ]
    name = html.escape(folder.resolve().name)
    kind = " · ".join(html.escape(str(about[key])) for key in ("class", "task") if about.get(key))
    text = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
        f'<p class="dim">{kind}</p>\n{"".join(parts)}</body>\n</html>\n'
    )
    write_text_atomically(folder / "report.html", text)


def _section(title, content):
    return f"<h2>{title}</h2>\n{content}\n" if content else ""


def _code(text):
    return f"<pre>{html.escape(chr(10).join(map(printable, text.splitlines())))}</pre>"


def _table(rows, head=None):
    """Rows of cells; numbers stand to the right."""
    lines = []
    if head:
        lines.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
    for row in rows:
        cells = []
        for cell in row:
            kind = ' class="number"' if isinstance(cell, (int, float)) else ""
            shown = f"{cell:,}" if isinstance(cell, int) else f"{cell:.4f}" if isinstance(cell, float) else str(cell)
            cells.append(f"<td{kind}>{html.escape(shown)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _summary(about, steps, evaluations):
    """The few figures that one looks for first."""
    boxes = {}
    last = evaluations[-1] if evaluations else {}
    if last.get("val_loss") is not None:
        boxes[f"validation loss ({about.get('unit', 'nats per token')})"] = f"{last['val_loss']:.4f}"
    for key in ("val_accuracy", "val_f1", "val_exact_match", "val_pearson", "val_matthews_correlation"):
        if isinstance(last.get(key), float):
            boxes[key.removeprefix("val_").replace("_", " ")] = f"{last[key]:.4f}"
    if last.get("val_bits_per_byte") is not None:
        boxes["bits per byte"] = f"{last['val_bits_per_byte']:.3f}"
    if about.get("parameters"):
        boxes["parameters"] = f"{about['parameters']:,}"
    if about.get("trained_parameters", 0) < about.get("parameters", 0):
        boxes["of them trained"] = f"{about['trained_parameters']:,}"
    if steps:
        boxes["steps"] = f"{steps[-1]['step']:,}"
    if steps and "train_seconds" in steps[-1]:
        boxes["training time"] = duration(steps[-1]["train_seconds"])
    if steps and "tokens_per_second" in steps[-1]:
        boxes["tokens a second"] = f"{steps[-1]['tokens_per_second']:,.0f}"
    if memory := max((line.get("peak_memory_gb", 0) for line in steps), default=0):
        boxes["peak memory"] = f"{memory:.2f} GB"
    if steps and steps[-1].get("mfu"):
        boxes["MFU"] = f"{steps[-1]['mfu']:.1%}"
    inside = "".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>" for key, value in boxes.items()
    )
    return f"<dl>{inside}</dl>\n"


def duration(seconds):
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {round(seconds) % 60} s"


def _curves(run):
    """The same picture for a light and for a dark page; the browser takes the one that fits."""
    with tempfile.TemporaryDirectory() as aside:
        pictures = {}
        for name in ("light", "dark"):
            path = Path(aside) / f"{name}.svg"
            plot.draw([run], [path], is_dark=name == "dark")
            pictures[name] = "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure class="curves"><picture><source media="(prefers-color-scheme: dark)" srcset="{pictures["dark"]}">'
        f'<img alt="loss and learning rate over the steps" src="{pictures["light"]}"></picture></figure>'
    )


def _samples(evaluations):
    """What the model said as it learned, from the first evaluation to the last."""
    said = [line for line in evaluations if line.get("sample")]
    if len(said) > _SAMPLES:
        said = [said[round(number * (len(said) - 1) / (_SAMPLES - 1))] for number in range(_SAMPLES)]
    shown = []
    for line in said:
        loss = f", validation loss {line['val_loss']:.4f}" if line.get("val_loss") is not None else ""
        shown.append(f"<figure style='margin:0'><figcaption>after step {line['step']:,}{loss}</figcaption>")
        shown.append(_code(line["sample"]) + "</figure>")
    return "".join(shown)


def _metrics(about, evaluations):
    if not evaluations:
        return ""
    last = evaluations[-1]
    rows = [("training loss", last["train_loss"])] if last["train_loss"] is not None else []
    for key, value in last.items():
        if key.startswith("val_") and value is not None:
            rows.append((key.replace("val_", "validation ").replace("_", " "), value))
    if about.get("unigram_loss") is not None:
        rows.append(("unigram level, to compare with", about["unigram_loss"]))
    return f'<p class="dim">after step {last["step"]:,}</p>' + _table(rows)


def _data(about):
    parts = about.get("data", {})
    if not parts:
        return ""
    named = {
        part: counts | {"sources": "\n".join(one["name"] for one in counts["sources"])}
        for part, counts in parts.items()
    }
    keys = dict.fromkeys(key for counts in named.values() for key in ("sources", *counts))
    rows = [(key.replace("_", " "), *(counts.get(key, "") for counts in named.values())) for key in keys]
    if about.get("labels"):
        rows.append(("labels", ", ".join(map(printable, about["labels"]))))
    return _table(rows, ("", *named))


def _launches(about):
    rows = []
    for one in about.get("launches", []):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one["time"]))
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        where = f"{one['processes']} x {one['device']}, precision {one['precision']}, {one['system']}"
        rows.append((one["step"], when, where, versions))
    return _table(rows, ("from step", "at", "on", "with")) if rows else ""


def _commands(folder):
    name = shlex.quote(str(folder))
    return _code(
        f"accelerate launch -m hf_myllm.train {name}/recipe.yaml --save_model ANOTHER\n"
        f"python -m hf_myllm.plot {name}\n"
        f"python -m hf_myllm.hub push {name} USER/NAME"
    )


@exit_on_input_error
def main(argv):
    parser = Parser(prog="python -m hf_myllm.page", description="make a run's report.html and loss.png")
    parser.add_argument("run", help="folder of a run")
    folder = Path(parser.parse_args(argv).run)
    try:
        plot.make(folder)
        make(folder)
    except OSError as error:
        raise InputError(f"{folder}/report.html cannot be written: {error}") from None
    print(folder / "report.html")


if __name__ == "__main__":
    sys.exit(main())
