"""Results and runs from elsewhere: `trainer.compare --from` reads them correctly or raises DataError."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError, UserError
from tests.mutations import FAST, THOROUGH, dumps, every_mutation, mutations, printable_output
from tests.results import full_result, sparse_result
from tests.runs import arguments
from trainer.comparison.findings import Findings, main_epochs, offline_online_pairs, paired_runs
from trainer.comparison.finished import FinishedRun, is_finished
from trainer.comparison.result_file import load_result
from trainer.comparison.summary import compare_runs, merge_results
from trainer.comparison.table import comparison_table
from trainer.config.run_files import RESULT_FILE
from trainer.pages.report import render
from trainer.run.results import PREDICTIONS_FILE
from trainer.train import main


def shortened(tree: Any) -> Any:
    """A result with two points per curve, so that each of them can be changed."""
    if isinstance(tree, dict):
        return {name: shortened(branch) for name, branch in tree.items()}
    if isinstance(tree, list) and len(tree) > 4 and isinstance(tree[0], list | dict):
        return [shortened(branch) for branch in tree[:2]]
    return [shortened(branch) for branch in tree] if isinstance(tree, list) else tree


RESULTS = {"full": shortened(full_result()), "sparse": sparse_result()}


def read_result_like(directory: Path, tree: Any, *, page: bool) -> None:
    """Reads a result in the same way as `--from`, with or without the page."""
    (directory / RESULT_FILE).write_bytes(dumps(tree))
    with printable_output():
        try:
            result = merge_results([load_result(directory)])
            print(comparison_table(result))
            Findings.of(result)
            paired_runs(result, offline_online_pairs(result))
            main_epochs(result["runs"])
            if page:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Matplotlib's, for empty or infinite axes
                    assert "\x1b" not in render(result)
        except (DataError, UserError) as error:
            print(error)


@FAST
@given(st.data())
def test_any_result_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tree = next(iter(data.draw(mutations(RESULTS)).values()))
    read_result_like(tmp_path_factory.getbasetemp(), tree, page=False)


def test_every_change_of_every_field_of_a_sparse_result(tmp_path: Path) -> None:
    for what, trees in every_mutation({"sparse": RESULTS["sparse"]}):
        try:
            read_result_like(tmp_path, trees["sparse"], page=False)
        except BaseException as error:
            error.add_note(what)
            raise


@pytest.mark.slow
@THOROUGH
@given(st.data())
def test_any_result_is_refused_or_shown(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tree = next(iter(data.draw(mutations(RESULTS)).values()))
    read_result_like(tmp_path_factory.getbasetemp(), tree, page=data.draw(st.integers(0, 19)) == 0)


@pytest.fixture(scope="module")
def finished(published_store: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("properties") / "run"
    extra = ("--steps=4", "--log_every=2", "--eval_every=4")
    assert main(arguments(published_store, workdir, data_dir, *extra)) == 0
    return workdir


def read_run_like(directory: Path, whole: FinishedRun) -> None:
    with printable_output():
        try:
            if not is_finished(directory):
                return
            run = FinishedRun.load(directory)
            run.to_json(relative_to=directory)
            assert compare_runs(run, whole)["agreement"] == 1
        except (DataError, UserError) as error:
            print(error)


def check_run(finished: Path, trees: dict[str, Any], lines: Any) -> None:
    whole = FinishedRun.load(finished)
    copy = finished.with_name("copy")
    if not copy.exists():
        shutil.copytree(finished, copy)
    for name in ("config.json", "result.json"):
        tree = trees.get(name)
        (copy / name).write_bytes((finished / name).read_bytes() if tree is None else dumps(tree))
    lines = lines if isinstance(lines, list) else [lines]
    (copy / "metrics.jsonl").write_bytes(b"".join(dumps(line) + b"\n" for line in lines))
    read_run_like(copy, whole)


@FAST
@given(st.data())
def test_any_run_is_refused_or_read(finished: Path, data: st.DataObject) -> None:
    trees: dict[str, Any] = {
        name: json.loads((finished / name).read_text()) for name in ("config.json", "result.json")
    }
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    changed = data.draw(mutations({**trees, "lines": lines}))
    check_run(finished, changed, changed.get("lines", lines))


@pytest.mark.slow
def test_every_change_of_every_field_of_a_run(finished: Path) -> None:
    trees: dict[str, Any] = {
        name: json.loads((finished / name).read_text()) for name in ("config.json", "result.json")
    }
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for what, changed in every_mutation({**trees, "lines": lines}):
        try:
            check_run(finished, changed, changed.get("lines", lines))
        except BaseException as error:
            error.add_note(what)
            raise


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"top1": np.zeros(7, np.int32)},
        {"top1": np.zeros(7, np.int32), "labels": np.zeros(6, np.int32)},
        {"top1": np.zeros((7, 2), np.int32), "labels": np.zeros((7, 2), np.int32)},
        {"top1": np.zeros(7, np.float32), "labels": np.zeros(7, np.int32)},
        {"top1": np.array([print] * 7), "labels": np.zeros(7, np.int32)},  # pickled
    ],
    ids=lambda arrays: ",".join(f"{name}{array.shape}{array.dtype}" for name, array in arrays.items()),
)
def test_foreign_predictions_are_refused(finished: Path, tmp_path: Path, arrays: dict[str, Any]) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    np.savez(copy / PREDICTIONS_FILE, **arrays)
    with pytest.raises(DataError, match=PREDICTIONS_FILE):
        FinishedRun.load(copy).predictions()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"\x93NUMPY\x01\x00"])
def test_predictions_that_are_no_archive_are_refused(finished: Path, tmp_path: Path, content: bytes) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / PREDICTIONS_FILE).write_bytes(content)
    with pytest.raises(DataError, match=PREDICTIONS_FILE):
        FinishedRun.load(copy).predictions()
