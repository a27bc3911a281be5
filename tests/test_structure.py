"""The shape of the source tree: no import cycles, no name twice, files and functions of readable size, plain names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "duoka"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TEST_NAME = 400, 60, 70
ROLES = {"__init__", "base", "baselines", "config", "plots", "results", "training"}
"""File names whose folder gives the difference: ``base`` is a package's interface, the others are parts of a recipe."""
PRIVATE_WORDS = re.compile(r"\b(crew|glimpse|teller|tally|sober|seats?|told|whoever|nobody|somebody)\b", re.IGNORECASE)
QUESTION = re.compile(r"(What|How|Whether|Which|Where|Who|When|Why)\b")


@cache
def trees() -> dict[str, ast.Module]:
    """Every file of the package by its module's name."""
    return {module_name(path): ast.parse(path.read_text("utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(module: str, tree: ast.Module) -> Iterator[str]:
    """The files that a file imports anywhere, for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in trees() else node.module or ""


def import_graph() -> dict[str, set[str]]:
    """Edges between files; ``duoka/__init__.py`` imports lazily and is left out."""
    graph = {}
    for module, tree in trees().items():
        if module != "duoka":
            graph[module] = {name for name in imports_of(module, tree) if name in trees()} - {"duoka", module}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one file (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_the_search_finds_a_cycle_and_no_other():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_file_imports_itself_through_others():
    assert cycles(import_graph()) == []


def test_no_class_name_stands_twice():
    places = defaultdict(list)
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_file_name_stands_twice():
    places = defaultdict(list)
    for path in SOURCE.rglob("*.py"):
        if path.stem not in ROLES and path.parent.name != "cli":  # commands have the names that users type
            places[path.stem].append(str(path.relative_to(SOURCE)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_files_and_functions_have_a_readable_size():
    lengths = {path.relative_to(SOURCE): len(path.read_text("utf-8").splitlines()) for path in SOURCE.rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}
    functions = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in functions.items() if length > MAX_FUNCTION_LINES} == {}


def test_a_modules_docstring_begins_with_what_the_module_is():
    first = {module: (ast.get_docstring(tree) or "").partition("\n")[0] for module, tree in trees().items()}
    assert {module: line for module, line in first.items() if not line or QUESTION.match(line)} == {}


@pytest.mark.parametrize("folder", ["src", "docs", "README.md", "benchmarks"])
def test_no_word_of_the_private_dialect_is_left(folder: str):
    top = ROOT / folder
    files = [top] if top.is_file() else [path for path in top.rglob("*") if path.suffix in (".py", ".md")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if PRIVATE_WORDS.search(line)
    ]
    assert found == []


def test_tests_have_short_names():
    names = [
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert [name for name in names if len(name) > MAX_TEST_NAME] == []


PRIVATE_TORCH = re.compile(
    r"torch\._(?!_|dynamo)|_execution_engine|_compiled_call_impl|_call_impl|\._cdata|_shutdown_workers"
    r"|ProcessGroup(Gloo|NCCL)\(|_broadcast_coalesced|distributed_c10d|parametrize\._"
    r"|_replicate_for_data_parallel|nn\.parallel\._"
)


def test_private_interfaces_of_torch_stand_in_one_file():
    found = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in SOURCE.rglob("*.py")
        if path.name != "torch_private.py"
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if PRIVATE_TORCH.search(line)
    ]
    assert found == []
