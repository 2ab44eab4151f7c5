"""Imports go down the floors only: never up, never sideways between packages of one floor."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    {"units", "errors", "records", "priority"},
    {"catalog"},
    {"config"},
    {"workload", "load", "telemetry", "roofline", "store", "provenance"},
    {"sim"},
    {"engines"},
    {"runner", "quality"},
    {"analysis"},
    {"decide"},
    {"report", "interop"},
    {"cli"},
]
FLOOR_OF = {name: level for level, names in enumerate(FLOORS) for name in names}
# The package itself holds only the version.
FLOOR_OF["__init__"] = -1
FLOOR_OF["__main__"] = len(FLOORS)


def unit_of(path: Path) -> str:
    """The package or module directly inside bench/ that a file belongs to."""
    return path.relative_to(ROOT / "bench").with_suffix("").parts[0]


def imports_of(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, second part of a `bench.x` import) of every import in the tree, local ones included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name.split(".")[0] in ("bench", "kernels")]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "bench":
                found += [(node.lineno, f"bench.{a.name}") for a in node.names]
            elif node.module.split(".")[0] in ("bench", "kernels"):
                found.append((node.lineno, node.module))
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((node.lineno, "relative"))
    return found


def violations(path: Path, source: str) -> list[str]:
    unit = unit_of(path)
    out = []
    for line, name in imports_of(ast.parse(source)):
        place = f"{path.relative_to(ROOT)}:{line}"
        if name == "relative":
            out.append(f"{place}: relative import; write the full name")
            continue
        if name.startswith("kernels"):
            if unit != "cli":
                out.append(f"{place}: only cli/ may import kernels")
            continue
        parts = name.split(".")
        target = parts[1] if len(parts) > 1 else "__init__"
        if target in ("__version__", "__file__"):
            continue
        if target not in FLOOR_OF:
            out.append(f"{place}: bench.{target} is on no floor")
        elif target != unit and FLOOR_OF[target] >= FLOOR_OF[unit]:
            out.append(f"{place}: {unit} (floor {FLOOR_OF[unit]}) imports {target} (floor {FLOOR_OF[target]})")
    return out


@pytest.mark.parametrize("path", sorted((ROOT / "bench").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


def test_a_wrong_import_is_caught() -> None:
    path = ROOT / "bench" / "load" / "x.py"
    assert violations(path, "def f():\n    from bench.report import html\n") != []
    assert violations(path, "import bench.workload.synthetic\n") != []
    assert violations(path, "from bench import runner\n") != []
    assert violations(path, "from bench.records import Request\n") == []


def test_kernels_use_only_the_ground_floors() -> None:
    wrong = []
    for path in (ROOT / "kernels").rglob("*.py"):
        for line, name in imports_of(ast.parse(path.read_text(encoding="utf-8"))):
            parts = name.split(".")
            if parts[0] == "bench" and len(parts) > 1 and FLOOR_OF.get(parts[1], 0) > 3:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert wrong == []
