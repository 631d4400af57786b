"""The house of the code: who imports whom, and how large a room may be."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = [ROOT / name for name in ("train.py", "eval.py", "prepare_data.py")]
FILES = [*SCRIPTS, *sorted((ROOT / "atlas").rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
WINGS = ("methods", "prepare", "report")
MAY = {"methods": (), "prepare": (), "report": ("prepare", "methods")}  # wings that a wing may use


def name_of(path):
    """atlas/report/table.py -> atlas.report.table"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """The modules of this project that a file imports, anywhere in it."""
    names = {name_of(other) for other in FILES}
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("atlas"):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & names or {node.module}
    return found


def wing_of(module):
    part = module.split(".")[1:2]
    return part[0] if part and part[0] in WINGS else None


def test_the_core_imports_no_wing_and_a_wing_only_what_lies_below_it():
    for path in FILES[len(SCRIPTS) :]:
        own = wing_of(name_of(path))
        for module in imports(path):
            wing = wing_of(module)
            allowed = {None, own, *(MAY[own] if own else ())}
            assert wing in allowed or module == "atlas.methods", f"{path} imports {module}"


def test_imports_form_no_circle():
    below = {name_of(path): imports(path) for path in FILES}
    while below:
        free = [module for module, needs in below.items() if not needs & below.keys()]
        assert free, f"a circle among {sorted(below)}"
        for module in free:
            del below[module]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_room_is_too_large(path):
    text = path.read_text(encoding="utf-8")
    limit = 200 if path.name == "train.py" else 400
    assert len(text.splitlines()) <= limit
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_the_top_level_holds_what_was_asked_for():
    found = {path.name for path in Path(ROOT).iterdir() if not path.name.startswith(".")}
    asked = {"atlas", "configs", "docs", "tests", "requirements.txt", "README.md"}
    asked |= {path.name for path in SCRIPTS}
    made = {"data", "cache", "runs", "venv", "stock", "__pycache__"}  # by the README's commands
    assert asked <= found <= asked | made
