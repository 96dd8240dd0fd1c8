"""The layers of the package: what may import what."""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "hf_myllm"
ENTRY_POINTS = ("plot", "page", "reference", "hub/__main__")
LAYERS = (  # a module or subpackage imports from the layers above its own line only
    {"errors", "__version__"},
    {"files", "seeds", "terminal"},
    {"recipe"},
    {"precision", "launcher", "peers"},
    {"sharding"},
    {"models", "optim", "distributed"},
    {"data", "checkpoint", "ema"},
    {"generate"},
    {"tasks"},
    {"evaluation"},
    {"reporting"},
    {"hub"},
    {"run_state", "run_folder", "saver"},
    {"build_data", "resume"},
    {"build"},
    {"train", "predict", "prepare"},
    {"average"},
    {"cli"},
    set(ENTRY_POINTS),
)
FAMILIES = ("gpt", "llama", "qwen3", "bert", "bart", "t5")
SHARED_BY_FAMILIES = ("stock", "loss", "decoder", "encoder_decoder")
PLAIN_ARGUMENTS = {
    "precision",
    "sharding",
    "models",
    "optim",
    "distributed",
    "ema",
    "data",
    "checkpoint",
    "generate",
    "tasks",
    "evaluation",
}


def imports(path):
    """Yield the full names of the modules that a file imports, except in its `if __name__ == "__main__"` block."""
    package = ["hf_myllm", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if "__main__" not in ast.unparse(node).split(":")[0]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{full}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_lower_layers(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if name == "__init__":
        return
    if path.parent.name == "hub" and path.stem == "__main__":
        name = "hub/__main__"
    level = next(level for level, names in enumerate(LAYERS) if name in names)
    allowed = {name}.union(*LAYERS[:level]) - ({"recipe"} if name in PLAIN_ARGUMENTS else set())
    if name == "optim":
        allowed |= {"models"}
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] == "hf_myllm":
            assert parts[1] in allowed, f"{name} imports {imported}"


@pytest.mark.parametrize("module", FAMILIES)
def test_a_family_is_self_contained(module):
    allowed = {"torch", "transformers", "math", "dataclasses", "huggingface_hub"}
    for name in imports(PACKAGE / "models" / f"{module}.py"):
        imported = name.removeprefix("hf_myllm.models.").split(".")[0]
        assert name.split(".")[0] in allowed or imported in SHARED_BY_FAMILIES, f"{module} imports {name}"


def test_files_and_functions_stay_small():
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in PACKAGE.rglob("*.py")}
    assert lines[PACKAGE / "train.py"] <= 300
    assert not [f"{path} has {count} lines" for path, count in lines.items() if count > 450]
    for path in lines:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name != "forward":
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
