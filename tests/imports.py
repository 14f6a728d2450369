"""Counts the imports inside `pipeline/` and `trainer/`, and their circles, from the source alone.

    python -m tests.imports          # the working tree
    python -m tests.imports main~20  # a revision

Every import statement counts: at module level, in a function, under TYPE_CHECKING. A room is a direct child of a package, a module
or a sub-package. A room that imports no other is on floor 1, any other one above the highest that it imports. A circle is a set of
rooms, or of modules, each of which imports every other, directly or not.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES, TESTS = ("pipeline", "trainer"), "tests"
Graph = dict[str, set[str]]


def sources(revision: str | None) -> dict[str, str]:
    """Text of each Python file of the packages and tests by path, of a revision or of the working tree."""
    if revision is None:
        paths = [path for top in (*PACKAGES, TESTS) for path in Path(top).rglob("*.py")]
        return {path.as_posix(): path.read_text() for path in paths}
    done = subprocess.run(["git", "archive", revision, *PACKAGES, TESTS], stdout=subprocess.PIPE, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return {name: file.read().decode() for name, file in files.items() if file and name.endswith(".py")}


def imported(text: str, modules: set[str]) -> Iterator[str]:
    """The modules that a source text imports; of `from package import name` the submodule, if there is one."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:  # relative imports are banned
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in names)


def module_graph(files: dict[str, str], package: str) -> Graph:
    """The modules of a package that each of its modules imports."""
    paths = {path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files}
    texts = {name: files[path] for path, name in paths.items() if path.startswith(f"{package}/")}
    return {name: set(imported(text, set(texts))) & texts.keys() - {name} for name, text in texts.items()}


def room_graph(graph: Graph) -> Graph:
    """The same between rooms; a package's own `__init__` is no room."""
    rooms: Graph = {}
    for name, targets in graph.items():
        if "." in name:
            found = {".".join(target.split(".")[:2]) for target in targets if "." in target}
            rooms.setdefault(".".join(name.split(".")[:2]), set()).update(found)
    return {room: targets - {room} for room, targets in rooms.items()}


def reachable(graph: Graph, start: str) -> set[str]:
    """What `start` imports, directly or not; itself only if it is in a circle."""
    found = list(graph[start])
    for name in found:  # which grows
        found += graph[name] - set(found)
    return set(found)


def circles(graph: Graph) -> list[list[str]]:
    """Strongly connected components of two members or more."""
    reach = {name: reachable(graph, name) for name in graph}
    found = {frozenset(other for other in reach[name] if name in reach[other]) for name in graph}
    return sorted(sorted(circle) for circle in found if circle)


def floors(graph: Graph) -> int:
    """Number of floors; the members of a circle share one."""
    reach, floor = {name: reachable(graph, name) for name in graph}, dict[str, int]()
    for name in sorted(graph, key=lambda name: len(reach[name] | {name})):  # from the ground up
        below = [floor[other] for other in reach[name] if name not in reach[other]]
        floor[name] = max(below, default=0) + 1
    return max(floor.values(), default=0)


def main(revision: str | None = None) -> None:
    """Prints the table and the circles."""
    files = sources(revision)
    lines = {
        top: sum(text.count("\n") for path, text in files.items() if path.startswith(f"{top}/"))
        for top in (*PACKAGES, TESTS)
    }
    modules = {package: module_graph(files, package) for package in PACKAGES}
    rooms = {package: room_graph(graph) for package, graph in modules.items()}
    rows = {
        "lines of code": lines.__getitem__,
        "modules": lambda p: len(modules[p]),
        "imports between modules": lambda p: sum(map(len, modules[p].values())),
        "circles of modules": lambda p: len(circles(modules[p])),
        "rooms": lambda p: len(rooms[p]),
        "  of them packages": lambda p: len(
            {name.split(".")[1] for name in modules[p] if name.count(".") > 1}
        ),
        "imports between rooms": lambda p: sum(map(len, rooms[p].values())),
        "circles of rooms": lambda p: len(circles(rooms[p])),
        "floors of rooms": lambda p: floors(rooms[p]),
    }
    print(" " * 24 + "".join(f"{package:>10}" for package in PACKAGES))
    for label, count in rows.items():
        print(f"{label:24}" + "".join(f"{count(package):10,}" for package in PACKAGES))
    print(f"{'lines of tests':24}{lines[TESTS]:10,}")
    for kind, graphs in (("modules", modules), ("rooms", rooms)):
        for circle in (circle for graph in graphs.values() for circle in circles(graph)):
            print(f"circle of {len(circle)} {kind}: {', '.join(circle)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
