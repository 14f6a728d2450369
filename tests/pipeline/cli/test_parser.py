"""pipeline.cli.parser: mistakes in flags are one line that names the nearest flag."""

from __future__ import annotations

import argparse
import os
import re
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


def test_valid_flags_are_parsed(parser: Parser) -> None:
    flags = parser.parse_strictly(["--epochs=2", "--seed", "0", "--kind=b", "--rate=0", "--temperature=1e-1"])
    assert vars(flags) == {"epochs": 2, "seed": 0, "kind": "b", "rate": 0.0, "temperature": 0.1}


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--epoch=3", "--epoch=3|--epochs"),
        ("--epo=3", "--epo=3|--epochs"),  # never an abbreviation
        ("--zzz", "--zzz|--help"),
        ("stray", "stray|--help"),
        ("--epochs=0", "--epochs: 0|1 or more"),
        ("--epochs=2.5", "--epochs: 2.5|whole number"),
        ("--seed=-1", "--seed: -1|0 or more"),
        ("--rate=fast", "--rate: fast|number"),
        ("--rate=-1", "--rate: -1|0 or more"),
        ("--temperature=0", "--temperature: 0|above 0"),
        ("--kind=c", "--kind|'c'|'a', 'b'"),
        ("--seed", "--seed|--help"),
    ],
)
def test_a_mistake_is_one_line(parser: Parser, argument: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        parser.parse_strictly([argument])
    for text in named.split("|"):
        assert text in str(caught.value)


def test_the_suggested_flag_may_be_one_of_beam(parser: Parser) -> None:
    flags = ["--epochs", "--seed", "--rate", "--temperature", "--kind"]
    assert parser.flag_names() == ["-h", "--help", "--debug", *flags]
    parser.refuse([])
    with pytest.raises(UserError, match=r"--runer=x.*--runner"):
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
def test_numbers_that_are_not_finite_are_refused(kind: object, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(text)}: "):
        kind(text)  # type: ignore[operator]


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells do not expand the tilde of `--store=~/store`."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert file_path("~/store") == "/home/somebody/store"
    assert [file_path(text) for text in ("a/~b", "a:b", ".")] == ["a/~b", "a:b", "."]
    with pytest.raises(argparse.ArgumentTypeError, match="path"):
        file_path("")


# --- directories of flags


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        make_directory(path, flag="--workdir")
    return str(caught.value)


def test_a_path_that_is_not_utf8_is_refused_with_printable_text() -> None:
    parser = Parser(prog="test")
    parser.add_argument("--folder", type=file_path)
    with pytest.raises(UserError, match=r"--folder.*UTF-8") as caught:
        parser.parse_strictly([os.fsdecode(b"--folder=caf\xe9")])
    assert str(caught.value).isascii()


def test_a_directory_is_created_with_its_parents_and_left_empty(tmp_path: Path) -> None:
    for _ in range(2):
        assert make_directory(tmp_path / "a" / "b", flag="--workdir") == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("below", ["", "b", "b/c"])
def test_a_file_instead_of_a_directory_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / below
    assert f"--workdir={path}" in refusal(path)


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / ("a" * 300))
    assert "File name too long: " in message


@pytest.fixture
def readonly(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size=1 << 20, readonly=True) as disk:
        yield disk


def test_a_read_only_file_system_is_refused(readonly: Path) -> None:
    for path in (readonly, readonly / "a"):
        assert f"--workdir={path}" in refusal(path)
        assert "Read-only file system" in refusal(path)


def test_an_output_file_is_checked_before_the_work(tmp_path: Path, readonly: Path) -> None:
    assert output_path(str(tmp_path / "new.json")) == tmp_path / "new.json"
    (tmp_path / "old.json").touch()
    assert output_path(str(tmp_path / "old.json")) == tmp_path / "old.json"
    for path, words in (
        (tmp_path / "no" / "a.json", str(tmp_path / "no")),
        (tmp_path, "regular file"),
        (Path("/dev/null"), "regular file"),
        (readonly / "a.json", "Read-only file system"),
        (tmp_path / ("a" * 300), "File name too long"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            output_path(str(path))
        assert str(path) in str(caught.value)
        assert words in str(caught.value)


@pytest.mark.parametrize("marker", ["spec.json", "saved_model.pb", "dataset_info.json"])
def test_outputs_inside_stores_models_and_data_sets_are_refused(tmp_path: Path, marker: str) -> None:
    (tmp_path / "whole" / "eval").mkdir(parents=True)
    (tmp_path / "whole" / marker).touch()
    (tmp_path / "link").symlink_to(tmp_path / "whole" / "eval")
    before = sorted(tmp_path.rglob("*"))
    for place in (tmp_path / "whole", tmp_path / "whole" / "eval", tmp_path / "link"):
        with pytest.raises(UserError, match=f"--workdir={place}/run: .*{tmp_path}/whole"):
            make_directory(place / "run", flag="--workdir")
        for name in ("a.json", marker):
            with pytest.raises(argparse.ArgumentTypeError, match=f"{tmp_path}/whole"):
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
    with pytest.raises(UserError, match=f"--store.*{url}"):
        parser.parse_strictly([f"--store={url}"])


def test_a_published_store_may_be_written_again(tmp_path: Path) -> None:
    """It is a prepared data set, too."""
    for name in ("spec.json", "dataset_info.json"):
        (tmp_path / name).touch()
    assert make_directory(tmp_path, flag="--store", replaceable="spec.json") == tmp_path
    with pytest.raises(UserError, match="--store"):
        make_directory(tmp_path / "below", flag="--store", replaceable="spec.json")
