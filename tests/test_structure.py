"""The package's structure: file lengths, no circular imports, and allowed imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500
#: Modules that must not load torch on import, so that the command line's help is fast.
LIGHT = (
    "lsq_core",
    "lsq_core.planning.make",
    "lsq_core.planning.methods",
    "lsq_core.profiling.metrics",
    "lsq_core.profiling.profile",
    "lsq_core.quantization.registry",
    "lsq_core.results.compare",
    "lsq_core.store.store",
    "lsq_core.cli.parser",
    "lsq_core.exports.registry",
)
#: Packages that each package must not import, not even for type checking.
FORBIDDEN = {
    "planning": ("profiling", "store", "stages", "session", "jobs", "cli", "ui"),
    "profiling": ("store", "stages", "session", "jobs", "cli", "charts", "ui"),
    "quantization": ("planning", "store", "stages", "session", "jobs", "cli", "charts", "ui"),
    "store": ("stages", "session", "jobs", "cli", "charts", "ui"),
    "stages": ("session", "jobs", "cli", "charts", "ui"),
    "charts": ("stages", "session", "jobs", "cli", "ui"),
    "exports": ("store", "stages", "session", "jobs", "cli", "charts", "ui"),
    "cli": ("ui",),
}


def source_files() -> list[Path]:
    """Return the Python and JavaScript files of the app and the package."""
    files = [ROOT / "app.py", *(ROOT / "pages").rglob("*.py")]
    for pattern in ("*.py", "*.js"):
        files += (ROOT / "lsq_core").rglob(pattern)
    return sorted(files)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in (ROOT / "lsq_core").rglob("*.py")}

#: Packages whose ``__init__.py`` contains more than a docstring; the root is left out.
PACKAGES_WITH_CODE = {
    name
    for name, path in MODULES.items()
    if path.name == "__init__.py"
    and name != "lsq_core"
    and len(ast.parse(path.read_text("utf8")).body) > 1
}


def base_module(name: str, path: Path, node: ast.ImportFrom) -> str:
    """Return the absolute name of the module in a ``from … import``."""
    if not node.level:
        return node.module or ""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    parents = package[: len(package) - node.level + 1]
    return ".".join([*parents, *filter(None, [node.module])])


def imports(name: str, path: Path) -> set[str]:
    """Return the package's modules imported anywhere in a module, including in functions.

    ``from package import module`` also counts as an import of the package if its ``__init__.py``
    has code, which runs first. The root is exempt because it imports its names lazily.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = base_module(name, path, node)
            members = {f"{base}.{alias.name}" for alias in node.names}
            found |= members & MODULES.keys()
            if members - MODULES.keys() or base in PACKAGES_WITH_CODE:
                found.add(base)
    return (found & MODULES.keys()) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            position = stack.index(module)
            components.append(stack[position:])
            del stack[position:]

    for module in graph:
        if module not in index:
            visit(module)
    return [sorted(members) for members in components if len(members) > 1]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {name: imports(name, path) for name, path in MODULES.items()}


def test_no_file_is_too_long():
    lengths = {str(p.relative_to(ROOT)): p.read_text("utf8").count("\n") for p in source_files()}
    assert len(lengths) > 150, "the files were not found"
    assert {path: count for path, count in lengths.items() if count > MAX_LINES} == {}


def test_circles_are_detected():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]


def test_no_import_circle(graph):
    assert "lsq_core.errors" in graph["lsq_core.planning.methods"], "imports are not read"
    assert circles(graph) == []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_import_direction(graph, package):
    own = {m: graph[m] for m in graph if f"{m}.".startswith(f"lsq_core.{package}.")}
    assert own
    wrong = [
        f"{module} imports {other}"
        for module, others in own.items()
        for other in others
        if other.split(".")[1:2] and other.split(".")[1] in FORBIDDEN[package]
    ]
    assert wrong == []


def test_only_the_ui_imports_the_ui(graph):
    wrong = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if f"{other}.".startswith("lsq_core.ui.") and not f"{module}.".startswith("lsq_core.ui.")
    ]
    assert wrong == []


def test_light_modules_import_without_torch():
    script = (
        "import importlib, sys\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
