"""pipeline.pages.figures: formatted numbers, and their paths in the JSON tree."""

from __future__ import annotations

import math

import pytest

from pipeline.cli.units import bytes_text
from pipeline.errors.text import is_printable
from pipeline.pages.figures import (
    KINDS,
    duration_text,
    join,
    leaves,
    look_up,
    number_text,
    show,
)
from pipeline.precomputing.reports import codec_error_text

TREE = {"runs": [{"top1": 0.5, "a.b": {"c": None, "d": {}}}], "name": '<b>"x"</b>', "ok": True}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12_345, "12,345"),
        (1234.5, "1,234"),
        (0.5, "0.5"),
        (-0.25, "\N{MINUS SIGN}0.25"),
        (1.2e-10, "1.20\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}10⁻¹⁰"),
        (3e7, "3.00\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}\N{NO-BREAK SPACE}10⁷"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number_text(value) == text


def test_durations_and_bytes() -> None:
    assert [duration_text(s) for s in (0, 0.25, 90, 600, 9000)] == [
        "0 s",
        "250 ms",
        "90 s",
        "10 min",
        "2.5 h",
    ]
    assert [bytes_text(n) for n in (0, 999, 1e3, 22.7e6, 4e12)] == ["0 B", "999 B", "1 kB", "22.7 MB", "4 TB"]


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("percent", 0.32774, "32.77%"),
        ("points", -0.00001, "0.00"),
        ("points", -0.012, "\N{MINUS SIGN}1.20"),
        ("date", "2026-01-02T03:04:00+00:00", "2 January 2026, 03:04 UTC"),
        ("date", "one day", "one day"),
        ("seeds", [0], "1 (seed 0)"),
        ("seeds", [0, 2], "2 (seeds 0, 2)"),
        ("milliseconds", 1.6534, "1,653"),
        ("number", 999.9, "1,000"),
        ("seconds", 0.9996, "1,000 ms"),
        ("count", 1234.5, "1,234"),
        ("kl", -1.8e-16, "0"),
        ("kl", 1.8e-16, "0"),
        ("kl", 0.25, "0.25"),
        ("text", [1, 2], "[1, 2]"),
        ("command", "run --a=1 --b", "run \\\n    --a=1 \\\n    --b"),
    ],
)
def test_kinds(kind: str, value: object, text: str) -> None:
    assert KINDS[kind](value) == text


def test_paths_in_a_tree() -> None:
    assert look_up(TREE, "runs.0.top1") == 0.5
    assert look_up(TREE, "runs.7.top1") is None
    assert look_up(TREE, "name.first") is None
    found = dict(leaves(TREE["runs"][0], join("a.b")))
    assert found == {"a\\.b.c": "c", "a\\.b.d": "d"}
    assert look_up(TREE, join("runs", 0, "a.b", "d")) == {}
    assert not list(leaves(TREE, "runs"))


def test_a_number_has_its_path_and_is_escaped() -> None:
    assert show(TREE, "runs.0.top1", "percent") == (
        '<span class="number" data-figure="runs.0.top1" data-value="0.5">50.00%</span>'
    )
    assert "<b>" not in show(TREE, "name")
    assert ">true<" in show(TREE, "ok")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e308])
def test_any_number_of_a_foreign_file_has_a_text(kind: str, value: float) -> None:
    assert show({"a": value}, "a", kind)


@pytest.mark.parametrize(
    "name", ["\x1b[2J", "a.b", "\\", "\\.", "\\n", "\n\r\t", "\u2028\ud800\U000e0001", "\\x41", "x", ""]
)
def test_any_name_of_a_foreign_file_has_a_printable_path(name: str) -> None:
    path = join("a", name, "b")
    assert is_printable(path)
    assert look_up({"a": {name: {"b": 7}}}, path) == 7
    assert is_printable(show({"a": {name: {"b": 7}}}, path))


def test_missing_values_are_named() -> None:
    assert ">not measured<" in show(TREE, "runs.0.seconds", "seconds")
    assert ">not known<" in show(TREE, "nowhere")
    assert ">none<" in show(TREE, "nowhere", absent="none")
    assert ">not measured<" in show(TREE, "ok", "number")


def test_the_error_of_topk_is_its_kl() -> None:
    plain = codec_error_text("float16", mean_kl=1.11e-10, max_logit_error=0.00195, temperature=10.0)
    assert plain.startswith("float16: mean KL 1.1e-10 nats at T = 10")
    assert "largest logit error 0.00195" in plain
    kept = codec_error_text("topk:10", mean_kl=-1.8e-16, max_logit_error=8.48, temperature=1.0)
    assert kept.startswith("topk:10: mean KL 0 nats at T = 1")
    assert "error" not in kept
