"""README and docs: commands are read by their own parsers, links and anchors resolve, and the examples compile."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.flags import beam
from pipeline.flags import precompute as precompute_flags
from tests import messages, recipes
from tests.documents import PAGES, ROOT, anchors, blocks, command_lines, links, python_commands

# Module of each command to the one that has its parser.
PARSERS = {
    "pipeline.precompute": "pipeline.flags.precompute",
    "pipeline.verify": "pipeline.flags.verify",
    "pipeline.inspect": "pipeline.flags.inspect",
    "pipeline.plan": "pipeline.flags.plan",
    "pipeline.dataset": "pipeline.flags.dataset",
    "trainer.train": "trainer.flags.train",
    "trainer.compare": "trainer.flags.compare",
    "trainer.evaluate": "trainer.flags.evaluate",
    "trainer.teacher": "trainer.flags.teacher",
}
# Programs of others whose command lines nothing here can parse.
OTHERS = {".", "cd", "docker", "gcloud", "git", "helm", "kubectl", "pip", "tensorboard", "tfds"}
ids = {"ids": [str(page.relative_to(ROOT)) for page in PAGES]}


def parse(module: str, argv: list[str]) -> argparse.Namespace:
    """Parses as the command does, but looks for no path."""
    if module == "trainer.launch":
        parser = importlib.import_module(module).make_parser()
        return parser.parse_strictly(argv[: argv.index("--")] if "--" in argv else argv)
    made = importlib.import_module(PARSERS[module]).make_parser()
    parser = made[0] if isinstance(made, tuple) else made
    if module != "pipeline.precompute":
        return parser.parse_strictly(argv)
    flags, rest = parser.parse_known_args(argv)
    beam.check(rest, parser)
    precompute_flags.check_flags(flags)
    return flags


@pytest.mark.parametrize("page", PAGES, **ids)
def test_commands_are_taken_by_their_parsers(page: Path) -> None:
    for module, *argv in python_commands(page):
        if module in PARSERS or module == "trainer.launch":
            if any(word.startswith("--") for word in argv):
                parse(module, argv)
        elif module == "trainer.demo":
            assert all(word.startswith("--workdir=") for word in argv)
        elif module != "pytest":
            assert importlib.util.find_spec(module) is not None, module
    launched = [
        argv for module, *argv in python_commands(page) if module == "trainer.launch" and "--" in argv
    ]
    for argv in launched:
        parse("trainer.train", ["--store=s", "--workdir=w", *argv[argv.index("--") + 1 :]])


@pytest.mark.parametrize("page", PAGES, **ids)
def test_a_misspelled_flag_of_a_page_would_be_seen(page: Path) -> None:
    for module, *argv in python_commands(page)[:1]:
        if module in PARSERS and argv:
            with pytest.raises(UserError, match="--epoch_s"):
                parse(module, [*argv, "--epoch_s=1"])


@pytest.mark.parametrize("page", PAGES, **ids)
def test_other_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in command_lines(page):
        program, *words = shlex.split(line)
        if program == "make":
            assert {word for word in words if "=" not in word} <= targets, line
        elif program == "python" and words[0] != "-m":
            assert (ROOT / words[0]).is_file(), line
        elif program.startswith(".venv/bin/"):  # of the default environment, whichever this one is
            assert f"\n{Path(program).name}==" in (ROOT / "requirements.lock").read_text(), line
        elif program not in ("python", *OTHERS):
            assert (ROOT / program).is_file(), line


@pytest.mark.parametrize("page", PAGES, **ids)
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, **ids)
def test_files_that_are_named_exist(page: Path) -> None:
    if page.name in ("CHANGELOG.md", "errors.md"):  # the one names what was, the other what may be
        return
    named = re.findall(r"`((?:pipeline|trainer|tests|docker|docs)/[\w./-]+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, **ids)
def test_python_of_a_page_names_what_is_public(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module in ("pipeline", "trainer"):
                package = importlib.import_module(node.module)
                assert {alias.name for alias in node.names} <= set(package.__all__)


@pytest.mark.slow
@pytest.mark.usefixtures("beam")
def test_python_of_the_first_pages_runs(tmp_path: Path) -> None:
    """On the store of the quickstart, with fewer epochs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    codes = ["print('begin')"]
    for page in ("README.md", "docs/guide.md", "docs/training.md"):
        codes.append(blocks(ROOT / page, "python")[0])
    quickstart = ["-m", "pipeline.precompute", "--runner=FnApiRunner", "--epochs=1"]
    for arguments in (quickstart, ["-c", "\n".join(codes)]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "views.png").is_file()


def test_readme_is_for_the_first_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_fields_of_a_message_have_names() -> None:
    source = """
class NoRoomError(UserError):
    pass

def check(path, sizes):
    raise NoRoomError(f"`store`={path}: {len(sizes)} files, "
        f"{', '.join(sizes)}" + "; expected fewer")
    raise DataError(problem)
"""
    tree = ast.parse(source)
    codes = messages.error_classes({"m": tree})
    assert codes["NoRoomError"] == 2
    assert list(messages.messages(tree, codes)) == [
        (2, "`store`={path}: {sizes} files, {sizes}; expected fewer")
    ]


def test_errors_page_is_current() -> None:
    current = (ROOT / "docs" / "errors.md").read_text()
    assert current == messages.page(), "run `python -m tests.messages > docs/errors.md`"


def test_recipes_page_is_current() -> None:
    current = (ROOT / "docs" / "recipes.md").read_text()
    assert current == recipes.page(), "run `python -m tests.recipes > docs/recipes.md`"
