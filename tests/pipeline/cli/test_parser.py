"""pipeline.cli.parser: a mistaken flag is one line that names the nearest."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli.parser import (
    Parser,
    batch_size,
    file_path,
    make_directory,
    number,
    output_path,
    positive,
    positive_number,
    seed,
    whole,
)
from pipeline.errors import UserError
from tests.small_disk import small_disk


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="p")
    parser.add_argument("--epochs", type=positive, default=3, help="of views")
    parser.add_argument("--seed", type=whole)
    parser.add_argument("--rate", type=number)
    parser.add_argument("--temperature", type=positive_number)
    parser.add_argument("--kind", choices=("a", "b"))
    return parser


def test_what_is_right_is_parsed(parser: Parser) -> None:
    flags = parser.parse_strictly(["--epochs=2", "--seed", "0", "--kind=b", "--rate=0", "--temperature=1e-1"])
    assert vars(flags) == {"epochs": 2, "seed": 0, "kind": "b", "rate": 0.0, "temperature": 0.1}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--epoch=3", "unknown flag --epoch=3; did you mean --epochs?"),
        ("--epo=3", "unknown flag --epo=3; did you mean --epochs?"),  # never an abbreviation
        ("--zzz", "unknown flag --zzz (--help lists the flags)"),
        ("stray", "unknown flag stray (--help lists the flags)"),
        ("--epochs=0", "argument --epochs: 0: expected 1 or more (--help lists the flags)"),
        ("--epochs=2.5", "argument --epochs: 2.5: expected a whole number (--help lists the flags)"),
        ("--seed=-1", "argument --seed: -1: expected 0 or more (--help lists the flags)"),
        ("--rate=fast", "argument --rate: fast: expected a number (--help lists the flags)"),
        (
            "--rate=-1",
            "argument --rate: -1: expected a finite number, 0 or more (--help lists the flags)",
        ),
        (
            "--temperature=0",
            "argument --temperature: 0: expected a finite number above 0 (--help lists the flags)",
        ),
        ("--kind=c", "argument --kind: invalid choice: 'c' (choose from 'a', 'b') (--help lists the flags)"),
        ("--seed", "argument --seed: expected one argument (--help lists the flags)"),
    ],
)
def test_a_mistake_is_one_line(parser: Parser, argument: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parser.parse_strictly([argument])
    assert str(caught.value) == message


def test_the_nearest_flag_may_be_somebody_elses(parser: Parser) -> None:
    flags = ["--epochs", "--seed", "--rate", "--temperature", "--kind"]
    assert parser.flag_names() == ["-h", "--help", "--debug", *flags]
    parser.refuse([])
    with pytest.raises(UserError, match=r"unknown flag --runer=x; did you mean --runner\?"):
        parser.refuse(["--runer=x", "--other"], also=["--runner"])
    assert "--runner" not in parser.flag_names()


def test_help_shows_defaults_and_is_not_an_error(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_strictly(["--help"])
    assert caught.value.code == 0
    assert "of views (default: 3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [(positive, 1, 2**31 - 1), (whole, 0, 2**63 - 1), (seed, 0, 2**32 - 1), (batch_size, 1, 65536)],
)
def test_bounds(kind: object, least: int, most: int) -> None:
    assert (kind(str(least)), kind(str(most))) == (least, most)  # type: ignore[operator]
    assert kind(" 7 ") == 7  # type: ignore[operator]
    for text in (str(least - 1), str(most + 1), "", "1e3", "nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)  # type: ignore[operator]


@pytest.mark.parametrize("kind", [number, positive_number])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "", "1,5", "-0.1"])
def test_what_is_no_finite_number_is_refused(kind: object, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text}: expected a "):
        kind(text)  # type: ignore[operator]


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the tilde of `--store=~/store` alone."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert file_path("~/store") == "/home/somebody/store"
    assert [file_path(text) for text in ("a/~b", "a:b", ".")] == ["a/~b", "a:b", "."]
    with pytest.raises(argparse.ArgumentTypeError, match="expected a path, got nothing"):
        file_path("")


# --- directories that flags name


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        make_directory(path, flag="--workdir")
    return str(caught.value)


def test_a_path_that_is_not_utf8_is_refused_in_characters_that_print() -> None:
    parser = Parser(prog="test")
    parser.add_argument("--folder", type=file_path)
    with pytest.raises(UserError, match=r"--folder.*UTF-8") as caught:
        parser.parse_strictly([os.fsdecode(b"--folder=caf\xe9")])
    assert str(caught.value).isascii()


def test_a_directory_is_made_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    for _ in range(2):
        assert make_directory(tmp_path / "a" / "b", flag="--workdir") == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("below", ["", "b", "b/c"])
def test_a_file_in_the_way_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / below
    assert refusal(path) == f"--workdir={path}: a file is in the way; name a directory"


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / ("a" * 300))
    assert "cannot be made (File name too long: " in message
    assert message.endswith("; name a shorter path")


@pytest.fixture
def readonly(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size=1 << 20, readonly=True) as disk:
        yield disk


def test_a_read_only_file_system_is_refused(readonly: Path) -> None:
    reason = "(Read-only file system); name a directory that can be written"
    assert refusal(readonly) == f"--workdir={readonly}: cannot be written {reason}"
    assert "cannot be made (Read-only file system: " in refusal(readonly / "a")


def test_a_file_to_be_written_is_tried_before_the_work(tmp_path: Path, readonly: Path) -> None:
    assert output_path(str(tmp_path / "new.json")) == tmp_path / "new.json"
    (tmp_path / "old.json").touch()
    assert output_path(str(tmp_path / "old.json")) == tmp_path / "old.json"
    for path, words in (
        (tmp_path / "no" / "a.json", f"no directory {tmp_path / 'no'}; make it"),
        (tmp_path, "is there, and not a file"),
        (Path("/dev/null"), "is there, and not a file"),
        (readonly / "a.json", "cannot be written (Read-only file system); name a directory"),
        (tmp_path / ("a" * 300), "cannot be written (File name too long); name a shorter path"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            output_path(str(path))
        assert str(caught.value).startswith(f"{path}: {words}")


@pytest.mark.parametrize("marker", ["spec.json", "saved_model.pb", "dataset_info.json"])
def test_outputs_inside_what_counts_all_its_files_are_refused(tmp_path: Path, marker: str) -> None:
    (tmp_path / "whole" / "eval").mkdir(parents=True)
    (tmp_path / "whole" / marker).touch()
    (tmp_path / "link").symlink_to(tmp_path / "whole" / "eval")
    before = sorted(tmp_path.rglob("*"))
    for place in (tmp_path / "whole", tmp_path / "whole" / "eval", tmp_path / "link"):
        with pytest.raises(UserError, match=rf"^--workdir={place}/run: is inside .*, {tmp_path}/whole;"):
            make_directory(place / "run", flag="--workdir")
        for name in ("a.json", marker):
            with pytest.raises(argparse.ArgumentTypeError, match=rf"is inside .*, {tmp_path}/whole;"):
                output_path(str(place / name))
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError) as caught:
        make_directory(tmp_path / "whole", flag="--workdir")
    assert str(caught.value).startswith(f"--workdir={tmp_path}/whole: ")
    assert make_directory(tmp_path / "whole", flag="--store", replaceable=marker) == tmp_path / "whole"


@pytest.mark.parametrize("url", ["gs://bucket/store", "s3://bucket/store"])
def test_url_is_not_taken_for_a_directory(url: str) -> None:
    parser = Parser(prog="command")
    parser.add_argument("--store", type=file_path)
    with pytest.raises(UserError, match=rf"--store: {url} is a URL"):
        parser.parse_strictly([f"--store={url}"])


def test_a_published_store_may_be_written_again(tmp_path: Path) -> None:
    """It is a prepared data set, too."""
    for name in ("spec.json", "dataset_info.json"):
        (tmp_path / name).touch()
    assert make_directory(tmp_path, flag="--store", replaceable="spec.json") == tmp_path
    with pytest.raises(UserError, match="--store"):
        make_directory(tmp_path / "below", flag="--store", replaceable="spec.json")
