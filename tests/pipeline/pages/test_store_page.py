"""pipeline.pages.store_page: numbers, pictures and boxes match the store, also in a browser."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors.text import printable
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.locate import open_dataset
from pipeline.inspect import main
from pipeline.pages.figures import look_up
from pipeline.pages.store_page import GalleryView, Picture, make_gallery, render_store
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.reader import StoreReader
from pipeline.store.softmax import log_softmax
from pipeline.views.policies.light import Light
from tests import results, stores
from tests.browser import CUT, find_chromium, open_browser
from tests.images import TRAIN_IMAGES, encoded_images
from tests.pages import Reader


@dataclasses.dataclass(frozen=True)
class Page:
    """A page and its JSON."""

    path: Path
    text: str
    contents: dict[str, Any]


def make_page(store: Path, data_dir: Path, root: Path, *flags: str) -> Page:
    path, tree = root / "store.html", root / "store.json"
    asked = [f"--store={store}", f"--data_dir={data_dir}", f"--html={path}", f"--json={tree}", *flags]
    assert main(asked) == 0
    return Page(path, path.read_text(), json.loads(tree.read_text()))


@pytest.fixture(scope="module")
def pages(
    tmp_path_factory: pytest.TempPathFactory,
    published_store: Path,
    data_dir: Path,
    teacher_path: Path,
) -> dict[str, Page]:
    """Pages of the published store and of one with other options: `light`, no mixup, `topk`, T = 1, no evaluation."""
    policy = Light(image_size=stores.SIZE, mixup=False)
    spec = stores.make_spec(data_dir, teacher_path, policy=policy, codec="topk:3", temperature=1.0)
    other = tmp_path_factory.mktemp("light") / "store"
    worker = ShardWorker(stores.job_for(other, spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=1, eval_splits=())
    return {
        name: make_page(store, data_dir, tmp_path_factory.mktemp(name), "--views=5", "--seed=2")
        for name, store in (("published", published_store), ("light", other))
    }


@pytest.mark.parametrize("name", ["published", "light"])
def test_every_figure_of_the_page_is_in_json(name: str, pages: dict[str, Page]) -> None:
    page = Reader(pages[name].text)
    assert len(page.figures) > 80
    for path, value, _ in page.figures:
        assert value == look_up(pages[name].contents, path), path
    assert "http" not in page.words
    assert page.tags.count("article") == len(pages[name].contents["gallery"]) == 5
    assert "script" not in page.tags


def test_the_gallery_matches_the_store(pages: dict[str, Page], published_store: Path, data_dir: Path) -> None:
    store = StoreReader(published_store)
    dataset = open_dataset(store, "views", data_dir=str(data_dir))
    gallery = pages["published"].contents["gallery"]
    views = np.array([facts["own"]["view"] for facts in gallery])
    records = store.views.read(views)
    images = np.array(re.findall(r'src="data:image/png;base64,([^"]+)"', pages["published"].text))
    tiles = images.reshape(len(gallery), 3)  # own crop, partner's crop, mixed
    for row, facts in enumerate(gallery):
        assert facts["own"]["example"] == records.example[row]
        assert facts["own"]["box"] == records.box[row].tolist()
        assert facts["own"]["label"] == dataset.class_names[records.example[row] % stores.CLASSES]
        assert facts["ratio"] == records.ratio[row]
        last = views[row] % stores.N == stores.N - 1
        assert facts["partner"]["view"] == (views[row] - stores.N + 1 if last else views[row] + 1)
        for name, temperature in (("probability", 1.0), ("probability_at_temperature", 2.0)):
            shares = np.exp(log_softmax(records.logits[row], temperature))
            assert [one[name] for one in facts["teacher"]] == pytest.approx(np.sort(shares)[::-1])
        own, partner, mixed = (pixels_of(tile) for tile in tiles[row])
        assert np.abs(facts["ratio"] * own + (1 - facts["ratio"]) * partner - mixed).max() <= 0.51


def test_an_example_without_a_label_has_none_on_the_page(published_store: Path, tmp_path: Path) -> None:
    images = {"train": encoded_images(TRAIN_IMAGES)}
    stores.prepare_dataset(tmp_path, images, unlabeled=range(stores.N))
    dataset = Dataset(stores.DATASET, "train", data_dir=tmp_path)
    (shown,) = make_gallery(StoreReader(published_store), dataset, np.array([3]), on_views=int)
    assert shown.facts["own"]["label"] == shown.facts["partner"]["label"] == "no label"


def pixels_of(tile: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(tile))) as image:
        return np.asarray(image).astype(np.float32)


def test_boxes_of_light_are_drawn_on_the_resized_image(pages: dict[str, Page]) -> None:
    page = pages["light"]
    canvas = Light(image_size=stores.SIZE).renderer().prepared_shapes(np.array([[50, 70]]))
    assert page.text.count(f'viewBox="0 0 {canvas[0, 1]} {canvas[0, 0]}"') == 5
    assert page.contents["sample"]["area"]["mean"] == pytest.approx((stores.SIZE / canvas[0, 0]) ** 2)
    words = " ".join(Reader(page.text).words.split())
    assert "The policy resizes an image to a square" in words
    assert "The codec keeps the largest logits" in words
    assert "Views are not mixed" in words


def test_hostile_text_stays_text(pages: dict[str, Page]) -> None:
    contents = results.spoil(pages["published"].contents)
    contents["spec"]["provenance"]["a.b " + results.HOSTILE] = results.HOSTILE
    picture = Picture("data:image/png;base64,", 1, 1)
    gallery = [GalleryView(facts, *[picture] * 5) for facts in contents["gallery"]]
    page, calm = Reader(render_store(contents, gallery)), Reader(pages["published"].text)
    assert set(page.tags) == set(calm.tags)
    assert page.tags.count("img") == calm.tags.count("img") == 15
    assert printable(results.HOSTILE) in page.words
    assert not set(page.words) & set("\x1b\u2028\u202e")


CHROMIUM = find_chromium()


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: the page is not opened in a browser"
)
def test_in_a_browser(pages: dict[str, Page], tmp_path: Path) -> None:
    """Complete numbers and pictures, no console messages, no requests, also at the width of a phone."""
    assert CHROMIUM is not None
    read = "[...document.querySelectorAll('[data-figure]')].map(e => [e.dataset.figure, e.dataset.value, e.innerText])"
    with open_browser(CHROMIUM, tmp_path / "profile") as page:
        for made in pages.values():
            for width, theme in ((1280, "light"), (390, "dark")):
                page.open(made.path, width=width, theme=theme)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.evaluate(CUT) == []  # no column is out of sight
            for figure, value, shown in page.evaluate(read):
                assert json.loads(value) == look_up(made.contents, figure), figure
                assert shown
            body = "window.getComputedStyle(document.body).backgroundColor"
            assert page.evaluate(body) == "rgb(20, 23, 26)"
            assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            boxes = page.evaluate(
                "[...document.querySelectorAll('.box')].map(b => {const r = b.getBoundingClientRect(), "
                "s = b.ownerSVGElement.getBoundingClientRect(); "
                "return r.width > 0 && r.left >= s.left - 2 && r.right <= s.right + 2 && r.bottom <= s.bottom + 2})"
            )
            assert boxes
            assert all(boxes)
        assert page.problems == []
        assert {url.split(":")[0] for url in page.requests} <= {"file", "data"}
