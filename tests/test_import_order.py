"""Imports run one way (DESIGN.md, "The house"), checked on the sources themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pyppo"

# A module may import from the layers above its own, and from no sibling but those in SIBLINGS.
LAYERS = [
    {
        "autograd",
        "config",
        "config_rules",
        "contract",
        "cores",
        "episodes",
        "finite",
        "library",
        "masks",
        "ops",
        "presets",
        "reference",
        "results",
        "spaces",
        "transfer",
    },
    {
        "actions",
        "envpool_envs",
        "envs",
        "estimate",
        "features",
        "gymnasium_envs",
        "normalize",
        "own_envs",
        "policy",
        "rollout",
        "report",
        "storage",
        "warmup",
    },
    {"catalog", "engines", "checkpoint", "parts", "stepping"},
    {"evaluation", "plot", "schedules", "trained"},
    {"trainer"},
    {"cli"},
    {"__main__"},
]
SIBLINGS = {
    "config": {"config_rules", "presets"},
    "cores": {"ops"},  # the kernels' threads
    "envs": {"gymnasium_envs"},  # a group reads what Gymnasium's own environments give
    "masks": {"spaces"},
    "ops": {"autograd", "library", "results"},  # in eager calls; where torch.compile traces; the types of results
    "own_envs": {"envs", "gymnasium_envs"},  # groups, of vector environments or of names of Gymnasium
    "rollout": {"storage"},  # the loop fills it
    "trained": {"plot"},  # a result draws its curve
    "warmup": {"rollout"},  # what it asks of a group
    "policy": {"actions", "features", "normalize"},  # it owns its action distribution and its observation statistics
}
ONLY_IMPORTER = {
    "_C": {"autograd", "library", "ops"},
    "autograd": {"ops"},
    "library": {"ops"},
    "reference": set(),
    "envpool": {"envpool_envs"},
    "tyro": {"cli"},
}

MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def top(path: Path) -> str:
    """Name of a file's module directly under pyppo: a package counts as one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports when it runs, at the top or within a function; relative ones made absolute."""
    package = ["pyppo", *path.relative_to(PACKAGE).parts[:-1]]
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.stmt) and is_type_checking(node):
            stack.extend(node.orelse)
            continue
        stack.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def internal(path: Path) -> set[str]:
    """Modules of pyppo that a file imports, by their first name; pyppo's lazy public names do not count."""
    known = {name for layer in LAYERS for name in layer} | {"_C"}
    parts = [name.split(".") for name in imports(path)]
    return {p[1] for p in parts if p[0] == "pyppo" and len(p) > 1 and p[1] in known} - {top(path)}


def layer_of(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    name = top(path)
    assert any(name in layer for layer in LAYERS), f"{name} has no place yet: give it one in LAYERS, and in DESIGN.md"
    for other in internal(path) - {"_C"} - SIBLINGS.get(name, set()):
        assert layer_of(other) < layer_of(name), f"{name} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_some_modules_have_one_importer(path: Path) -> None:
    for name in {n.split(".")[1] if n.startswith("pyppo.") else n.split(".")[0] for n in imports(path)}:
        assert top(path) in ONLY_IMPORTER.get(name, {top(path)}), f"{top(path)} imports {name}"


def test_siblings_have_no_cycle() -> None:
    for name, others in SIBLINGS.items():
        assert all(name not in SIBLINGS.get(other, set()) for other in others)


@pytest.mark.parametrize("use", ["gae", "ops", "ppo_loss", "surrogate_loss"])
def test_the_kernels_alone_load_no_environment_and_no_command_line(use: str) -> None:
    code = (
        f"import sys, pyppo; pyppo.{use}; "
        "heavy = ('envpool', 'gymnasium', 'tyro', 'rich', 'matplotlib', 'pyppo.reference'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_training_in_c_loads_no_symbolic_algebra() -> None:
    """torch imports SymPy (0.8 s) for modules that are made on the meta device, and for a backward pass of its own."""
    code = (
        "import sys, pyppo; "
        "pyppo.train('CartPole-v1', quiet=True, run_dir=None, total_timesteps=64, num_envs=4, num_steps=16, "
        "engine='native'); "
        "print('sympy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# ---- the C++ side --------------------------------------------------------------------------------------------------

STANDARD = r"<[a-z_]+(\.h)?>"  # of C++, C and POSIX; a library's has a folder or capitals
SIMD = r"<(imm|emm|arm_neon)\w*\.h>|<arm_neon\.h>"
SHARED = r'"\.\./(kernels|loss_options|math/\w+)\.h"'  # what both the CPU's and the GPU's kernels see
INCLUDES = {  # folder or file: what it may include
    "csrc/math": rf'{STANDARD}|"\w+\.h"',
    "csrc/kernels.h": STANDARD,
    "csrc/loss_options.h": rf'{STANDARD}|"kernels\.h"|"math/\w+\.h"',
    "csrc/cpu": rf'{STANDARD}|{SIMD}|"\w+\.h"|{SHARED}',
    "csrc/cuda": rf'{STANDARD}|<cu\w+\.h>|<cub/[\w/]+\.cuh>|"\w+\.cuh?"|{SHARED}',
    "csrc/no_cuda.cpp": rf'{STANDARD}|"kernels\.h"',
    "csrc/dlpack_abi.h": STANDARD,
    "csrc/tensor.h": rf'{STANDARD}|<Python\.h>|"dlpack_abi\.h"',
    "csrc/output.h": rf'{STANDARD}|"tensor\.h"',
    "csrc/bindings": rf'{STANDARD}|<pybind11/\w+\.h>|"\w+\.h"|"\.\./(kernels|tensor|output|math/\w+)\.h"',
}


def includes(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s+(\S+)", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("place", INCLUDES)
def test_includes_run_one_way(place: str) -> None:
    where = ROOT / place
    files = [p for p in where.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}] if where.is_dir() else [where]
    assert files
    for file in files:
        wrong = [name for name in includes(file) if not re.fullmatch(INCLUDES[place], name)]
        assert not wrong, f"{file.relative_to(ROOT)} includes {wrong}"


def test_every_source_has_rules() -> None:
    sources = {p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}}
    ruled = {p for place in INCLUDES for p in [ROOT / place, *(ROOT / place).rglob("*")]}
    assert sources <= ruled
