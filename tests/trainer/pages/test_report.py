from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, UserError
from pipeline.errors.text import printable
from pipeline.inputs.locate import open_dataset
from pipeline.pages.figures import look_up
from pipeline.store.reader import StoreReader
from tests import results
from tests.browser import CUT, find_chromium, open_browser
from tests.pages import Reader
from trainer.pages.report import render, write_report
from trainer.pages.view_grid import VIEWS_FILE, read_views, save_views

RESULTS = {
    "full": results.full_result,
    "one_arm": results.one_arm_result,
    "unlabeled": results.unlabeled_result,
    "sparse": results.sparse_result,
    "hostile": results.hostile_result,
}


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory, three_epochs: Path, data_dir: Path) -> Path:
    """A grid of views of a small store; read only."""
    store = StoreReader(three_epochs)
    path = tmp_path_factory.mktemp("views") / VIEWS_FILE
    return save_views(store, open_dataset(store, "views", data_dir=str(data_dir)), path, views=3)


@pytest.fixture(scope="module")
def pages(views: Path) -> dict[str, str]:
    """The pages of all results, two of them with views."""
    shown = read_views(views)
    spoilt = [dataclasses.replace(view, facts=results.spoil(view.facts)) for view in shown]
    given = {"full": shown, "hostile": spoilt}
    return {name: render(make(), views=given.get(name, [])) for name, make in RESULTS.items()}


@pytest.mark.parametrize("name", RESULTS)
def test_figures_are_those_of_the_result(name: str, pages: dict[str, str]) -> None:
    result = RESULTS[name]()
    page = Reader(pages[name])
    assert len(page.figures) > 40
    for path, value, shown in page.figures:
        assert value == look_up(result, path), path
        assert (shown in ("not measured", "not known", "none", "one seed")) == (value is None), path
    assert len(set(page.ids)) == len(page.ids)
    assert "http" not in page.words


def test_all_measurements_are_shown(pages: dict[str, str]) -> None:
    result = results.full_result()
    shown = {path for path, _, _ in Reader(pages["full"]).figures}
    not_shown = {"history", "losses", "learning_rates"}  # drawn
    for number, run in enumerate(result["runs"]):
        assert {f"runs.{number}.{name}" for name in run.keys() - not_shown} <= shown
    between_arms = {"largest_loss_difference", "largest_loss_difference_step", "mean_loss"}
    between_arms |= {"weights_distance", "weights_largest_difference"}
    for number, pair in enumerate(result["pairs"]):
        unsaid = {"a", "b"} if pair["a"] == "offline" else between_arms
        names = pair.keys() - unsaid - {"top1_interval"} | {"top1_interval.0", "top1_interval.1"}
        assert {f"pairs.{number}.{name}" for name in names} <= shown
    for number, arm in enumerate(result["arms"]):
        assert {f"arms.{number}.{name}" for name in arm} <= shown
    assert {f"recipe.{name}" for name in result["recipe"]} <= shown
    assert {f"cost.seconds_a_step.{name}" for name in result["cost"]["seconds_a_step"]} <= shown


def test_verdict_of_a_match_has_the_bound_of_the_intervals(pages: dict[str, str]) -> None:
    assert 'class="verdict match"' in pages["full"]
    assert "no more than 0.60 points" in " ".join(Reader(pages["full"]).words.split())


def test_unlabeled_images_are_counted_and_have_no_accuracy(pages: dict[str, str]) -> None:
    page = Reader(pages["unlabeled"])
    assert "eval_unlabeled" in {path for path, _, _ in page.figures}
    assert 'class="verdict unknown"' in pages["unlabeled"]
    assert "eval_unlabeled" not in {path for path, _, _ in Reader(pages["full"]).figures}


def test_verdict_of_a_difference() -> None:
    result = results.sparse_result()
    result["pairs"] = [results.make_pair(seed=seed) for seed in range(3)]
    result["pairs"][1] |= {"top1_difference": -0.021, "top1_interval": [-0.033, -0.009]}
    page = render(result)
    assert 'class="verdict differ"' in page
    assert "1 of 3 pairs, in accuracy by \N{MINUS SIGN}2.10 points" in " ".join(Reader(page).words.split())


def test_verdict_of_bit_equal_runs() -> None:
    result = results.make_result(
        [results.make_run("offline"), results.make_run("online")], [results.make_pair()]
    )
    for pair in result["pairs"]:
        pair |= {
            "largest_loss_difference": 0.0,
            "weights_largest_difference": 0.0,
            "weights_distance": 0.0,
            "top1_difference": 0.0,
            "top1_interval": [0.0, 0.0],
            "agreement": 1.0,
        }
    for run in result["runs"]:
        run["losses"] = [[step, 1.0] for step, _ in run["losses"]]
    page = render(result)
    assert 'class="verdict same"' in page


@pytest.mark.parametrize("name", ["one_arm", "sparse"])
def test_verdict_without_a_comparison_is_unknown(name: str, pages: dict[str, str]) -> None:
    assert 'class="verdict unknown"' in pages[name]
    assert "<img " not in pages[name]


def test_hostile_text_stays_text(pages: dict[str, str]) -> None:
    page, calm = Reader(pages["hostile"]), Reader(pages["full"])
    assert sorted(set(page.tags)) == sorted(set(calm.tags))
    assert page.tags.count("script") == 1
    assert page.tags.count("img") == 3
    assert printable(results.HOSTILE) in page.words
    assert not set(page.words) & set("\x1b\u2028\u202e")


def test_report_of_a_directory(views: Path, pages: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(results.one_arm_result()))
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text() == pages["one_arm"]
    shutil.copy(views, tmp_path / VIEWS_FILE)
    write_report(tmp_path)
    assert (tmp_path / "report.html").read_text().count("<img ") == 3


def test_missing_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", DataError),
        ("[]", UserError),
        ('{"steps": 3}', UserError),
        ('{"format": 2, "runs": [{}]}', DataError),
    ],
)
def test_file_that_is_no_result_is_refused(text: str, error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(error, match=re.escape(str(tmp_path / "result.json"))):
        write_report(tmp_path)


CHROMIUM = find_chromium()


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: the report is not opened in a browser"
)
def test_in_a_browser(pages: dict[str, str], tmp_path: Path) -> None:
    """Shown figures, silent console, no requests, sorting, and the width of a phone."""
    assert CHROMIUM is not None
    read = "[...document.querySelectorAll('[data-figure]')].map(e => [e.dataset.figure, e.dataset.value, e.innerText])"
    with open_browser(CHROMIUM, tmp_path / "profile") as page:
        for name, make in RESULTS.items():
            result, path = make(), tmp_path / f"{name}.html"
            path.write_text(pages[name])
            for width, theme in ((1280, "light"), (390, "dark")):
                page.open(path, width=width, theme=theme)
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{name} at {width}"
                # No column is cut off.
                assert page.evaluate(CUT) == [], f"{name} at {width}"
            for figure, value, shown in page.evaluate(read):
                assert json.loads(value) == look_up(result, figure), figure
                assert shown
            assert (
                page.evaluate("window.getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
            )
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.problems == []
        assert {url.split(":")[0] for url in page.requests} <= {"file", "data"}
        check_sorting(page, tmp_path / "full.html")


def check_sorting(page: Any, path: Path) -> None:
    """By mouse and keyboard, ascending and descending, with missing figures last."""
    page.open(path)
    table = (
        "[...document.querySelectorAll('table.sortable')].find(t => t.caption.innerText.startsWith('Arms'))"
    )
    page.evaluate(f"window.table = {table}; window.heads = [...table.tHead.rows[0].cells]")
    column = "[...table.tBodies[0].rows].map(r => JSON.parse(r.cells[%d].querySelector('[data-value]').dataset.value))"
    page.evaluate("heads[3].querySelector('button').click()")
    accuracies = page.evaluate(column % 3)
    assert accuracies == sorted(accuracies)
    assert page.evaluate("heads[3].getAttribute('aria-sort')") == "ascending"
    page.evaluate("heads[3].querySelector('button').focus()")
    page.press("Enter")
    assert page.evaluate(column % 3) == sorted(accuracies, reverse=True)
    assert page.evaluate("heads.map(h => h.getAttribute('aria-sort'))").count("descending") == 1
    for _ in range(2):
        page.evaluate("heads[4].querySelector('button').click()")
        deviations = page.evaluate(column % 4)
        known = [value for value in deviations if value is not None]
        assert deviations[len(known) :] == [None] * (len(deviations) - len(known))
        assert known in (sorted(known), sorted(known, reverse=True))
    page.evaluate("heads[0].querySelector('button').click()")
    names = page.evaluate(column % 0)
    assert names == sorted(names)
