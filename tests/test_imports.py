"""Law 2: imports point in one direction, config answers without torch, and only the package rmega
is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

from tests.conftest import ROOT

PACKAGE = ROOT / "rmega"
# A module or package may import, directly or through others, only from layers above its own in this
# list.
LAYERS = [
    {"config", "cli", "io", "hub", "metrics", "ops"},
    {"precision", "megatron"},
    {"distributed", "data"},
    {"preferences"},
    {"models", "checkpointing"},
    {"evaluation", "scoring"},
    {"report", "export", "training"},
    {"commands"},
]
FOUNDATIONS = {"config", "cli", "io", "hub"}  # import nothing of ours but each other
# Within a layer: who may import whom.
WITHIN = {
    ("hub", "io"),
    ("data", "distributed"),
    ("checkpointing", "models"),
    ("evaluation", "scoring"),
}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything in the package."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(path: Path, name: str) -> set[str]:
    """Dotted names that a file imports, anywhere in it, but for those that only a type checker
    reads."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                head = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*head, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


MODULES = modules()
IMPORTS = {name: imports(path, name) for name, path in MODULES.items()}


def unit(name: str) -> str | None:
    """``rmega.data.batching`` -> ``data``; None for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def ours(name: str) -> set[str]:
    """The modules and packages directly in rmega/ that a file imports from, without ``__version__``
    and ``_C``."""
    units = {unit(target) for target in IMPORTS[name] if target.split(".")[0] == "rmega"}
    return {u for u in units if u and not u.startswith("_")}


EDGES: dict[str, set[str]] = {}
for _name in MODULES:
    if unit(_name):
        EDGES.setdefault(unit(_name), set()).update(ours(_name) - {unit(_name)})


def test_every_module_and_package_has_its_layer() -> None:
    named = [name for layer in LAYERS for name in layer]
    assert sorted(named) == sorted(EDGES), set(named) ^ set(EDGES)


@pytest.mark.parametrize("name", sorted(EDGES))
def test_imports_point_down(name: str) -> None:
    level = next(i for i, layer in enumerate(LAYERS) if name in layer)
    below = set().union(*LAYERS[:level]) | {other for one, other in WITHIN if one == name}
    assert EDGES[name] <= below, (
        f"rmega/{name} imports {sorted(EDGES[name] - below)}, which are not below it"
    )


def test_foundations_import_nothing_of_ours() -> None:
    for name in FOUNDATIONS:
        assert ours(f"rmega.{name}") <= FOUNDATIONS, name


def test_no_circles_between_files() -> None:
    """Also within a package: a file never imports itself through others (imports inside functions
    count, too)."""
    edges = {
        name: (
            {
                m
                for t in IMPORTS[name]
                for m in (t, t.rpartition(".")[0])
                if m in MODULES and m != "rmega"
            }
            - {name}
        )
        for name in MODULES
    }
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        state[name] = 1
        for other in sorted(edges[name]):
            assert state.get(other) != 1, " -> ".join(
                [*path[path.index(other) :], other] if other in path else [name, other]
            )
            if other not in state:
                visit(other, (*path, other))
        state[name] = 2

    for name in MODULES:
        if name not in state:
            visit(name, (name,))


def test_ops_import_torch_and_the_extension_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "rmega"}
    for name in (name for name in MODULES if unit(name) == "ops"):
        assert {target.split(".")[0] for target in IMPORTS[name]} <= allowed, name
        assert ours(name) <= {"ops"}, name


def test_what_a_login_node_runs_is_free_of_torch() -> None:
    for name in ("rmega", "rmega.config", "rmega.cli", "rmega.models.geometry", "rmega.metrics"):
        roots = {target.split(".")[0] for target in IMPORTS[name]}
        assert not roots & {"torch", "megatron", "transformers", "datasets"}, name


def test_nothing_in_the_package_imports_what_is_not_installed() -> None:
    for name, targets in IMPORTS.items():
        assert not {t.split(".")[0] for t in targets} & {
            "tests",
            "tools",
            "examples",
            "benchmarks",
        }, name


def test_only_the_cpu_module_replaces_parts_of_torch() -> None:
    """No other file assigns to an attribute of torch or of Megatron-Core's modules."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in getattr(node, "targets", []) if isinstance(node, ast.Assign) else []:
                for leaf in target.elts if isinstance(target, ast.Tuple) else [target]:
                    text = ast.unparse(leaf)
                    if text == "torch.utils.deterministic.fill_uninitialized_memory":
                        continue  # a documented setting, which has no function
                    if text.startswith(("torch.", "megatron.", "parallel_state.")):
                        assert name == "rmega.megatron.cpu", f"{name} assigns {text}"


def test_help_answers_without_torch() -> None:
    """What ``--help`` of the training program needs, in a fresh interpreter."""
    code = (
        "import sys\n"
        "from examples.pretrain_reward import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code in (0, None)\n"
        "print('HEAVY', sorted({'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (
        "--global-batch-size" in done.stdout and "--tp" in done.stdout and "HEAVY []" in done.stdout
    )


def test_only_the_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'include = ["rmega", "rmega.*"]' in text
    packages = find_packages(str(ROOT), include=["rmega", "rmega.*"])
    assert {name.split(".")[0] for name in packages} == {"rmega"}
    # Every folder with sources is a package, else a wheel would lack it.
    assert {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("*.py")} == set(
        packages
    )
