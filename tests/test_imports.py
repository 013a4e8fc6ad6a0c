"""Which module imports which: arrows point down, and there is no circle."""

from __future__ import annotations

import ast
import graphlib
import shutil
from pathlib import Path

import pytest
from places import ROOT

# From the ground up. A room, a folder or a module by itself, may import what is in the layers below it, and its own
# modules; never another room of its layer. The layer of "dpo_kernels" is the package's face, which re-exports.
LAYERS = (
    ("lazy", "options", "verdicts", "_native", "_cuda"),
    ("impl",),
    ("dispatch", "measure", "comparisons"),
    ("rows",),
    ("ops",),
    ("parallel", "linear_rows"),
    ("sequence_parallel",),
    ("logps", "losses", "pair_groups"),
    ("listwise",),
    ("grouped_loss",),
    ("linear_dpo",),
    ("linear_reference", "modules"),
    ("testing",),
    ("models",),
    ("dpo_kernels",),
    ("data", "tuning"),
    ("training", "planning", "bench", "trl", "compat"),
    ("env",),
    ("cli",),
    ("__main__",),
)
COMPILED = {"_native", "_cuda"}  # imported by implementations alone
IMPLEMENTATIONS = (
    {"torch"},
    {"native"},
    {
        "triton",
        "triton_dlogits",
        "triton_exponentials",
        "triton_join",
        "triton_linear",
        "triton_math",
        "triton_packed",
        "triton_rows",
        "triton_scale",
        "triton_sequences",
        "triton_shifted",
    },  # fmt: skip
    {"cuda", "cuda_exponentials", "cuda_linear", "cuda_positions"},
)


def arrows(package: Path) -> dict[str, set[str]]:
    """For each module of the package, by its dotted name within it, the modules of the package that it imports,
    wherever in its text: at its top, in a function, or for types alone. Compiled modules are known by their stubs."""
    files = {
        path.relative_to(package).with_suffix(""): path
        for path in package.rglob("*.py*")
        if path.suffix in (".py", ".pyi")
    }
    names = {".".join(path.parts).removesuffix("__init__").rstrip("."): file for path, file in files.items()}

    def resolve(name: str) -> str | None:
        """The module that a name from an import is, or is in."""
        if name.split(".")[0] != package.name:
            return None
        inside = name.removeprefix(package.name).lstrip(".")
        while inside not in names:
            inside = inside.rpartition(".")[0]
        return inside

    found: dict[str, set[str]] = {}
    for module, file in names.items():
        here = module if file.name == "__init__.py" else module.rpartition(".")[0]
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    up = ".".join([package.name, *here.split(".")][: len(here.split(".")) + 2 - node.level])
                    base = f"{up}.{base}".rstrip(".")
                imported |= {f"{base}.{alias.name}" for alias in node.names}
        found[module] = {target for name in imported if (target := resolve(name)) is not None} - {module}
    return found


def room(module: str) -> str:
    return module.split(".")[0] or "dpo_kernels"


def problems(graph: dict[str, set[str]]) -> list[str]:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    found = [f"{module or 'the package'} is in no layer" for module in graph if room(module) not in layer]
    for module, targets in graph.items():
        for target in targets:
            own, other = room(module), room(target)
            if own == other or own not in layer or other not in layer:
                continue
            if layer[other] >= layer[own]:
                found.append(f"{module} imports {target or 'the package'}, which is not below it")
            if target in COMPILED and own != "impl":
                found.append(f"{module} imports the compiled {target}")
    # A package that re-exports its modules is no circle with them: they do not import it.
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' <- '.join(name or 'dpo_kernels' for name in error.args[1])}")
    for one in IMPLEMENTATIONS:
        others = {f"impl.{name}" for names in IMPLEMENTATIONS if names is not one for name in names}
        for name in one:
            found += [f"impl.{name} imports {other}" for other in graph.get(f"impl.{name}", set()) & others]
    return found


def test_arrows_point_down():
    graph = arrows(ROOT / "dpo_kernels")
    assert len(graph) > 60 and "dispatch" in graph["ops"] and "impl.interface" in graph["impl.torch"]
    assert problems(graph) == []


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        ("rows", "from dpo_kernels.ops import load", "rows imports ops, which is not below it"),
        ("logps", "def late():\n    from dpo_kernels import losses", "logps imports losses, which is not below it"),
        ("trl/_head", "import dpo_kernels.training.loop", "trl._head imports training.loop, which is not below it"),
        ("models/head", "from .fused_forward import Preference", "a circle: models."),
        ("impl/cuda", "from . import torch", "impl.cuda imports impl.torch"),
        ("ops", "def late():\n    import dpo_kernels._native", "ops imports the compiled _native"),
        ("elsewhere", "import os", "elsewhere is in no layer"),
        ("models/head", "from dpo_kernels import LMHead", "models.head imports the package, which is not below it"),
    ],
)
def test_arrows_that_do_not_are_noticed(tmp_path, module, line, problem):
    """A copy of the package, in which one import is too many."""
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "dpo_kernels", tmp_path / "dpo_kernels", ignore=skip)
    changed = tmp_path / "dpo_kernels" / f"{module}.py"
    changed.write_text((changed.read_text() if changed.exists() else "") + f"\n{line}\n")
    found = problems(arrows(tmp_path / "dpo_kernels"))
    assert any(problem in each for each in found), found
