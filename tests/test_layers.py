"""The house keeps its layers: what may import what."""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "hf_myllm"
ALLOWED = {  # room -> the rooms of the package that it may import
    "errors": set(),
    "files": set(),
    "recipe": {"errors"},
    "models": {"errors"},
    "data": {"errors", "files", "models"},
    "tasks": {"errors", "models", "data", "generate"},
    "optim": {"models"},
    "checkpoint": {"errors", "files", "models"},
    "distributed": {"errors"},
    "evaluation": {"errors", "models", "data", "tasks", "distributed"},
    "reporting": {"errors", "files", "models", "data", "tasks", "optim", "evaluation", "recipe", "__version__"},
    "reference": {"errors", "models", "recipe"},
    "hub": {"errors", "files", "models", "checkpoint", "distributed", "reporting"},
    "generate": {"errors", "models", "checkpoint"},
    "build": {"errors", "models", "recipe", "data", "tasks", "checkpoint", "evaluation", "generate", "distributed"},
    "predict": {"errors", "files", "models", "data", "tasks", "checkpoint", "generate", "distributed"},
    "train": {
        *("errors", "models", "recipe", "data", "tasks", "checkpoint", "evaluation", "reporting", "generate", "optim"),
        *("build", "hub", "distributed", "files"),
    },
    # entry points
    "plot": {"reporting"},
    "page": {"reporting"},
    "prepare": {"build"},
}


def imports(path):
    """The modules that a file imports, by full name; a relative one resolved."""
    package = ["hf_myllm", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{full}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_file_imports_only_what_its_room_may(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        assert not list(imports(path))
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "hf_myllm":
            assert parts[1] in ALLOWED[room] | {room}, f"{room} imports {name}"


@pytest.mark.parametrize("family", sorted(path.name for path in (PACKAGE / "models").iterdir() if path.is_dir()))
def test_a_family_is_self_contained(family):
    if family.startswith("__"):
        return
    allowed = {"torch", "transformers", "math", "dataclasses", "huggingface_hub"}
    for path in (PACKAGE / "models" / family).glob("*.py"):
        for name in imports(path):
            is_shared = name.startswith(("hf_myllm.models.stock.", "hf_myllm.models.decoder."))
            is_own = name.startswith(f"hf_myllm.models.{family}.")
            assert name.split(".")[0] in allowed or is_shared or is_own, f"{path} imports {name}"
