"""The order of the layers and who may import what (prism_megatron/README.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "prism_megatron"
ORDER = (
    *(
        "errors",
        "ranges",
        "overrides",
        "sections",
        "config",
        "types",
        "files",
        "upstream",
        "observe",
        "parallel",
        "data",
        "model",
        "convert",
        "rollout",
        "reward",
        "advantage",
        "loss",
        "reference",
        "method",
    ),
    *("optim", "checkpoint", "stages", "train"),
)
ONLY_IN = {
    "megatron": {"upstream", "parallel", "model", "convert", "optim", "checkpoint"},
    "transformer_engine": {"model"},
    "vllm": {"upstream", "rollout"},
    "nemo_run": set(),
}
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts != ("__init__.py",))
PACKAGES = ("prism_megatron", "recipes", "tools")  # a package imports from those before it only
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """Every imported module, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "prism_megatron":
                yield from (f"prism_megatron.{alias.name}" for alias in node.names)


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_the_left(path: Path) -> None:
    own = ORDER.index(layer(path))
    for module in imports(path):
        top, _, rest = module.partition(".")
        if top == "prism_megatron" and rest:
            assert ORDER.index(rest.split(".")[0]) <= own, f"{path.name} imports {module}"
        if module.startswith("prism_megatron.upstream."):  # what a list holds is used where its library may be
            top = module.rpartition(".")[2]
        allowed = ONLY_IN.get(top)
        assert allowed is None or layer(path) in allowed, f"{path.name} may not import {top}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_from_those_before(package: str) -> None:
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    users = {
        str(path.relative_to(ROOT))
        for path in (ROOT / package).rglob("*.py")
        if any(module.split(".")[0] in later for module in imports(path))
    }
    assert not users


def test_no_module_imports_itself_through_others() -> None:
    graph = {name: neighbours(path) - {name} for name, path in MODULES.items()}
    sorter = TopologicalSorter(graph)
    sorter.prepare()  # raises CycleError with the modules of a cycle


def neighbours(path: Path) -> set[str]:
    """Modules of this repository that a module imports, submodules imported from a package included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules if len(submodules) == len(node.names) else submodules | {node.module}
    return found & MODULES.keys()


def test_files_stay_small() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for folder in ("prism_megatron", "recipes", "tools", "tests")
        for p in (ROOT / folder).rglob("*.py")
        for n in [len(p.read_text().splitlines())]
        if n > 500
    }
    assert not long
