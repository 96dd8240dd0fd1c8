"""The documentation: links exist, and the examples run."""

import re

import nbclient
import nbformat
import pytest
from conftest import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE_NAME = re.compile(
    r"\b(?:hf_myllm|tests|benchmarks|recipes|accelerate_configs|examples)/[\w/]+(?:\.\w+)?(?![\w/<])"
)
TESTED_BLOCK = re.compile(r"<!-- test -->\n```python\n(.*?)```", re.S)
EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, block in enumerate(TESTED_BLOCK.findall(page.read_text(encoding="utf-8")))
]


def anchors(page):
    """Return the anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert target.is_relative_to(ROOT.resolve())
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_named_files_exist(page):
    made = tuple((ROOT / ".gitignore").read_text().split())  # folders that a command on the page makes
    for name in FILE_NAME.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or f"/{name}/".startswith(made), f"{page.name} names {name}"


def test_the_readme_links_to_every_page():
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))}
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f"docs/{page.name}" in linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_short(page):
    limit = 180 if page.name == "README.md" else 200
    assert len(page.read_text(encoding="utf-8").splitlines()) <= limit


def test_the_architecture_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in [*(ROOT / "hf_myllm").glob("*.py"), *(ROOT / "hf_myllm" / "models").glob("*.py")]:
        assert re.search(rf"\b{path.stem}\b", page), f"docs/architecture.md does not name {path.name}"


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("block", EXAMPLES)
def test_examples_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "the example", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "examples" / "train_in_a_notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert outputs[-1]["data"]["text/plain"] == "'GPT2LMHeadModel'"
