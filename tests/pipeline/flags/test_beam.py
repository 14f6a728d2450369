"""pipeline.flags.beam: what is read from Beam's source is what Beam has."""

from __future__ import annotations

import argparse

import apache_beam.runners.dask.dask_runner  # noqa: F401  # options of its own
import pytest
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.runners.runner import create_runner

from pipeline.errors import UserError
from pipeline.flags import beam as beam_flags
from pipeline.flags.precompute import make_parser

DASK = "apache_beam.runners.dask.dask_runner.DaskRunner"


def flags_of(parser: argparse.ArgumentParser) -> dict[str, tuple[object, object]]:
    """Flag -> how many values it takes, and whether any will do."""
    return {
        name: (action.nargs, action.choices) for action in parser._actions for name in action.option_strings
    }


def theirs() -> argparse.ArgumentParser:
    parser = beam_flags.Parser(add_help=False, conflict_handler="resolve")
    options = [PipelineOptions]
    for cls in options:
        options += cls.__subclasses__()
        if "_add_argparse_args" in cls.__dict__ and cls.__module__.startswith("apache_beam."):
            cls._add_argparse_args(parser)
    return parser


def test_flags_are_those_of_the_installed_beam() -> None:
    found, expected = flags_of(beam_flags.make_parser(DASK)), flags_of(theirs())
    assert {*found} == {*expected}
    assert {name: nargs for name, (nargs, _) in found.items()} == {
        name: nargs for name, (nargs, _) in expected.items()
    }
    for name, (_, choices) in found.items():
        if choices is not None:
            assert list(choices) == list(expected[name][1])  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["DirectRunner", "direct", "FnApiRunner", "flink", "DataflowRunner", DASK])
def test_runners_are_found_as_beam_finds_them(name: str) -> None:
    assert type(create_runner(name)) is type(create_runner(beam_flags.runner_path(name)))


def test_every_known_runner_is_known() -> None:
    for path in StandardOptions.ALL_KNOWN_RUNNERS:
        if ".test." not in path:
            assert beam_flags.runner_path(path.rsplit(".", 1)[-1]) == path
    assert {*beam_flags.LOCAL_RUNNERS} == {*StandardOptions.LOCAL_RUNNERS} - {"TestDirectRunner"}


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--runner=DirctRunner", "DirectRunner"),
        ("--runner=apache_beam.runners.dusk.DuskRunner", "DuskRunner"),
        ("--direct_num_worker=2", "--direct_num_workers"),
        ("--direct_num_workers=two", "two"),
        ("--direct_running_mode=alone", "multi_processing"),
        ("--epoch=3", "--epochs"),
        ("stray", "stray"),
    ],
)
def test_mistakes_are_refused_without_beam(argument: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        beam_flags.check([argument], make_parser())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--runner", "DirectRunner", "--direct_num_workers", "2"],
        ["--runner=somebody.elses.Runner", "--with_a_flag=1"],
        [f"--runner={DASK}", "--dask_partition_size=1"],
        ["--runner=DataflowRunner", "--no_auth", "--experiments=a", "--experiments=b"],
    ],
)
def test_what_beam_takes_is_taken(arguments: list[str]) -> None:
    beam_flags.check(arguments, make_parser())
