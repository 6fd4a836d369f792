"""The house as CONTRIBUTING draws it: no import leads up or round, no room is crowded, no name means two things.

The contracts between rooms are import-linter's, in pyproject.toml; here is what it does not check.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grok_local"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "tiny" not in path.parts)
USERS = [
    path
    for folder in ("grok_local", "tests", "benchmarks", "training", "samples")
    for path in (ROOT / folder).rglob("*.py")
]

MOST_LINES = 400  # of a file
MOST_MODULES = 9  # of a folder
MOST_FUNCTION_LINES = 50
# The facts about a release, and how its files are read: both are about that release.
SAME_THING_TWICE = {"grok1.py", "grok2.py", "__init__.py", "__main__.py"}


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def test_no_import_leads_round_not_even_a_late_one() -> None:
    graph = grimp.build_graph("grok_local", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules


def test_packages_have_no_logic_of_their_own() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent != PACKAGE:
            (only,) = _parsed(path).body
            assert isinstance(only, ast.Expr), path


def test_no_two_files_have_one_name() -> None:
    places = defaultdict(list)
    for path in MODULES:
        places[path.name].append(path)
    twice = {name: found for name, found in places.items() if len(found) > 1 and name not in SAME_THING_TWICE}
    assert not twice


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for path in MODULES:
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    assert not {name: found for name, found in places.items() if len(found) > 1 and not name.startswith("_")}


def test_no_room_is_crowded() -> None:
    for folder in {path.parent for path in MODULES}:
        modules = [path for path in folder.glob("*.py") if not path.stem.startswith("__")]
        assert len(modules) <= MOST_MODULES, folder


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in MODULES}
    assert not {path: length for path, length in lengths.items() if length > MOST_LINES}


def test_no_function_is_long() -> None:
    lengths = {
        (path, node.name): (node.end_lineno or 0) - node.body[0].lineno + 1
        for path in MODULES
        for node in ast.walk(_parsed(path))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > MOST_FUNCTION_LINES}


def test_what_is_exported_is_imported_by_somebody() -> None:
    used = {name for path in USERS for name in _names_used(path)}
    unused = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in MODULES
        if path != PACKAGE / "__init__.py"
        for name in _exported(path)
        if (_module(path), name) not in used
    }
    assert not unused


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def _exported(path: Path) -> list[str]:
    for node in _parsed(path).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def _names_used(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) for `from module import name`, and for `module.name` after `from package import module`."""
    tree, modules = _parsed(path), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.module, alias.name
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield modules[node.value.id], node.attr
