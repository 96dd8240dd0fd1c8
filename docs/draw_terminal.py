"""Draw the output of a command as docs/terminal.svg.

script -qec "hf-myllm train recipes/quickstart.yaml" typescript
python docs/draw_terminal.py "hf-myllm train recipes/quickstart.yaml" typescript > docs/terminal.svg
"""

import html
import re
import sys
from pathlib import Path

LINE_HEIGHT, CHARACTER_WIDTH, MARGIN = 19, 7.83, 16


def screen_lines(typescript):
    """Return the lines that remain on the screen, without control sequences and overwritten progress bars."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", typescript)
    text = re.sub(r"^Script (started|done) .*$", "", text, flags=re.M)
    lines = []
    for line in text.split("\n"):  # after a carriage return, the next part overwrites the one before
        parts = [part.rstrip() for part in line.split("\r") if part.strip()]
        lines.append(parts[-1] if parts else "")
    return "\n".join(lines).strip("\n").split("\n")


def fold_samples(lines):
    """Shorten all samples but the last to one line."""
    is_sample = [line.startswith("  |") for line in lines]
    last = max((i for i in range(len(lines)) if is_sample[i]), default=-1)
    while last > 0 and is_sample[last - 1]:
        last -= 1
    folded = []
    for i, line in enumerate(lines):
        if not is_sample[i] or i >= last:
            folded.append(line)
        elif not is_sample[i - 1]:
            folded.append("  | ...")
    return folded


def draw(command, lines):
    """Return the picture of a command and its output as SVG."""
    width = round(max(map(len, [command, *lines])) * CHARACTER_WIDTH + 2 * MARGIN)
    rows = [f'<tspan fill="#7ee787">$ </tspan>{html.escape(command)}']
    for line in lines:
        label = re.match(r"step(?= +\d+:)|[a-z]+( [a-z]+)?(?= {2,}\S)", line)
        head = f'<tspan fill="#79c0ff">{label[0]}</tspan>' if label else ""
        rest = html.escape(line[label.end() if label else 0 :])
        rows.append(head + rest.replace(" ", "&#160;"))  # browsers collapse other spaces
    texts = [f'<text x="{MARGIN}" y="{MARGIN + (i + 1) * LINE_HEIGHT - 5}">{row}</text>' for i, row in enumerate(rows)]
    height = LINE_HEIGHT * len(rows) + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>\n'
        '<g fill="#e6edf3" font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="13">'
        "\n" + "\n".join(texts) + "\n</g>\n</svg>"
    )


if __name__ == "__main__":
    output = screen_lines(Path(sys.argv[2]).read_bytes().decode())
    print(draw(sys.argv[1], fold_samples(output)))
