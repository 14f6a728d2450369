"""pipeline.flags: a mistaken flag is one line that names the nearest."""

from __future__ import annotations

import argparse

import pytest

from pipeline.errors import UserError
from pipeline.flags import Parser, positive, whole


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="p")
    parser.add_argument("--epochs", type=positive, default=3, help="of views")
    parser.add_argument("--seed", type=whole)
    parser.add_argument("--kind", choices=("a", "b"))
    return parser


def test_what_is_right_is_parsed(parser: Parser) -> None:
    flags = parser.parse_strictly(["--epochs=2", "--seed", "0", "--kind=b"])
    assert vars(flags) == {"epochs": 2, "seed": 0, "kind": "b"}


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
        ("--kind=c", "argument --kind: invalid choice: 'c' (choose from 'a', 'b') (--help lists the flags)"),
        ("--seed", "argument --seed: expected one argument (--help lists the flags)"),
    ],
)
def test_a_mistake_is_one_line(parser: Parser, argument: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parser.parse_strictly([argument])
    assert str(caught.value) == message


def test_the_nearest_flag_may_be_somebody_elses(parser: Parser) -> None:
    assert parser.flag_names() == ["-h", "--help", "--epochs", "--seed", "--kind"]
    parser.refuse([])
    with pytest.raises(UserError, match=r"unknown flag --runer=x; did you mean --runner\?"):
        parser.refuse(["--runer=x", "--other"], also=["--runner"])
    assert "--runner" not in parser.flag_names()


def test_help_shows_defaults_and_is_not_an_error(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_strictly(["--help"])
    assert caught.value.code == 0
    assert "of views (default: 3)" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "least"), [(positive, 1), (whole, 0)])
def test_bounds(kind: object, least: int) -> None:
    assert kind(str(least)) == least  # type: ignore[operator]
    assert kind(" 7 ") == 7  # type: ignore[operator]
    for text in (str(least - 1), "", "1e3", "nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)  # type: ignore[operator]
