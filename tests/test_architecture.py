"""Import rules of docs/design.md, by the import graph and by what is really loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import imports

ROOT = Path(__file__).resolve().parents[1]

# Imports every module of a package, except those named after it; exits at the first that loads Beam.
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
modules = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
for name in [package.__name__, *(m.name for m in modules)]:
    if name in sys.argv[2:] or name.endswith(".__main__"):
        continue
    importlib.import_module(name)
    if "apache_beam" in sys.modules:
        sys.exit(f"{name} loads apache_beam")
    print(name)
"""


def test_import_contracts_are_kept():
    lint_imports = Path(sys.executable).parent / "lint-imports"
    if not lint_imports.exists():
        pytest.skip("needs the extra lint")
    done = subprocess.run(
        [lint_imports, "--config", "pyproject.toml", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("package", "exceptions"),
    [("trainer", []), ("pipeline", ["pipeline.precompute"])],
    ids=["trainer", "pipeline"],
)
def test_importing_every_module_leaves_beam_out(package, exceptions):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package, *exceptions], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert package in done.stdout.split()


@pytest.mark.parametrize("package", imports.PACKAGES)
def test_neither_modules_nor_packages_import_each_other_in_a_circle(package):
    graph = imports.module_graph(imports.sources(None), package)
    assert imports.circles(graph) == []
    assert imports.circles(imports.room_graph(graph)) == []
