"""pipeline.inspect: what it says is what the store holds, and a store that is not whole is refused."""

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

from pipeline.contents import contents_text
from pipeline.errors import DataError, UserError
from pipeline.inspect import main
from pipeline.pages.figures import look_up
from pipeline.pages.store_page import GalleryView, Picture, render_store
from pipeline.provenance import open_dataset
from pipeline.store.codecs import log_softmax
from pipeline.store.reader import Store
from pipeline.views.policies import ViewPolicy
from pipeline.views.render import training_renderer
from pipeline.worker import ShardWorker
from tests import results, stores
from tests.browser import find_chromium, open_browser
from tests.pages import Reader


@dataclasses.dataclass(frozen=True)
class Page:
    """A page and the JSON that was written with it."""

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
    """Of the published store, and of one of everything else: `light`, unmixed, `topk`, T = 1, no evaluation."""
    policy = ViewPolicy(name="light", image_size=stores.SIZE, mixup=False)
    spec = stores.make_spec(data_dir, teacher_path, policy=policy, codec="topk:3", temperature=1.0)
    other = tmp_path_factory.mktemp("light") / "store"
    worker = ShardWorker(stores.job_for(other, spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=1, eval_splits=())
    return {
        name: make_page(store, data_dir, tmp_path_factory.mktemp(name), "--views=5", "--seed=2")
        for name, store in (("published", published_store), ("light", other))
    }


def test_metadata_alone_say_what_is_there(
    published_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--store={published_store}", f"--json={tmp_path / 'all.json'}"]) == 0
    out = capsys.readouterr().out
    contents = json.loads((tmp_path / "all.json").read_text())
    store = Store(published_store)
    assert (contents["epochs"], contents["views"], contents["shards"]) == (3, 51, 4)
    files = list(published_store.rglob("*.array_record-*"))
    assert contents["bytes"] == sum(path.stat().st_size for path in files)
    assert [(s["name"], s["of"], s["views"], s["shards"]) for s in contents["splits"]] == [
        ("views", "train", 51, 3),
        ("test", "test", 7, 1),
    ]
    assert contents["splits"][0]["mean_kl"] == store.views.manifest.fidelity()["mean_kl"]
    assert contents["spec"]["identity"] == json.loads(json.dumps(store.spec.identity()))
    assert (contents["whole"], contents["problems"], contents["checksums"]) == (True, [], False)
    assert contents["unpublished"] == {"files": 0, "bytes": 0}
    assert "3 epochs, 51 views" in out
    assert "whole: each of 4 shards is there" in out
    assert "unpublished" not in out
    assert not store.views._readers  # a look at the metadata opens nothing


def test_shards_that_are_not_published_yet_are_told_apart(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("views.array_record-00003", ".tmp-views.array_record-00004-7-aa", "eval/.tmp-notes"):
        (store / name).write_bytes(b"12345")
    assert main([f"--store={store}", f"--json={tmp_path / 'all.json'}"]) == 0
    contents = json.loads((tmp_path / "all.json").read_text())
    assert contents["unpublished"] == {"files": 2, "bytes": 10}
    assert contents["shards"] == 4
    assert "2 more shard files, 10 B: a run is writing them" in capsys.readouterr().out


def test_a_store_that_is_not_whole_is_refused_with_all_that_is_wrong(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "views.array_record-00001").unlink()
    (store / "eval/test.array_record-00000").write_bytes(b"cut")
    page = tmp_path / "page.html"
    flags = [f"--store={store}", f"--json={tmp_path / 'all.json'}", f"--html={page}"]
    with pytest.raises(
        DataError, match=r"2 of 4 shards are not as the manifest says, first .*00001: no bytes"
    ):
        main(flags)
    out = capsys.readouterr().out
    assert "not whole: 2 of 4 shards" in out
    assert "test.array_record-00000: 3 bytes here" in out
    contents = json.loads((tmp_path / "all.json").read_text())
    assert (contents["whole"], len(contents["problems"])) == (False, 2)
    assert not page.exists()


def test_a_flipped_byte_is_seen_by_its_checksum_alone(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store / "views.array_record-00002"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main([f"--store={store}"]) == 0
    with pytest.raises(DataError, match="1 of 4 shards"):
        main([f"--store={store}", "--checksums"])
    assert re.search(r"00002: sha256 is [0-9a-f]{16} here", capsys.readouterr().out)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes here"):
        main([f"--store={store}", "--checksums"])


def test_whole_with_checksums(published_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--store={published_store}", "--checksums"]) == 0
    assert "whole: each of 4 shards is as the manifest says, SHA-256 compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--views=0"], "expected 1 or more"),
        (["--views=5000"], "--views=5000: expected 1000 or less"),
        (["--html=no/such/page.html"], "--html=no/such/page.html: no directory no/such"),
        (["--json=no/such/a.json"], "no directory no/such"),
        (["--store=nowhere"], "no spec.json there"),
        (["--htm=x"], "did you mean --html"),
    ],
)
def test_mistakes_are_refused(published_store: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([f"--store={published_store}", *flags])


def test_other_images_are_refused(published_store: Path, other_data_dir: Path, tmp_path: Path) -> None:
    flags = [f"--store={published_store}", f"--data_dir={other_data_dir}", f"--html={tmp_path / 'page.html'}"]
    with pytest.raises(DataError, match="not the data set"):
        main(flags)
    assert not list(tmp_path.iterdir())


# --- the page


@pytest.mark.parametrize("name", ["published", "light"])
def test_every_figure_of_the_page_is_in_json(name: str, pages: dict[str, Page]) -> None:
    page = Reader(pages[name].text)
    assert len(page.figures) > 80
    for path, value, _ in page.figures:
        assert value == look_up(pages[name].contents, path), path
    assert "http" not in page.words
    assert page.tags.count("article") == len(pages[name].contents["gallery"]) == 5
    assert "script" not in page.tags


def test_gallery_is_of_the_store(pages: dict[str, Page], published_store: Path, data_dir: Path) -> None:
    store = Store(published_store)
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


def pixels_of(tile: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(tile))) as image:
        return np.asarray(image).astype(np.float32)


def test_boxes_of_light_are_drawn_on_the_resized_image(pages: dict[str, Page]) -> None:
    page = pages["light"]
    canvas = training_renderer(ViewPolicy(name="light", image_size=stores.SIZE)).prepared_shapes(
        np.array([[50, 70]])
    )
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
    assert results.HOSTILE in page.words


def test_control_codes_do_not_reach_the_terminal(pages: dict[str, Page]) -> None:
    contents = json.loads(json.dumps(pages["published"].contents))
    contents["spec"]["provenance"] |= {"command": "\x1b[2Jclear", "versions": "none"}
    contents["spec"]["identity"]["dataset"]["name"] = "one\ntwo"
    text = contents_text(contents)
    assert "\\x1b[2Jclear" in text
    assert "one\\ntwo" in text
    assert "\x1b" not in text


CHROMIUM = find_chromium()


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: the page is not opened in a browser"
)
def test_in_a_browser(pages: dict[str, Page], tmp_path: Path) -> None:
    """Figures as the page shows them, pictures whole, no word on the console, no request, and a phone's width."""
    assert CHROMIUM is not None
    read = "[...document.querySelectorAll('[data-figure]')].map(e => [e.dataset.figure, e.dataset.value, e.innerText])"
    with open_browser(CHROMIUM, tmp_path / "profile") as page:
        for made in pages.values():
            for width, theme in ((1280, "light"), (390, "dark")):
                page.open(made.path, width=width, theme=theme)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
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
