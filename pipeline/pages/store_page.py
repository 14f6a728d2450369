"""The page of a store: its contents, a gallery of replayed views, and histograms over a sample of views.

The page needs no network: pictures, styles and charts are inline.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import ClassMatch, match_classes
from pipeline.pages.charts import histogram
from pipeline.pages.figures import leaves, look_up, show
from pipeline.pages.statistics import IMAGES, area_statistics, record_statistics, sample_views
from pipeline.pages.svg import inline_svg
from pipeline.pages.template import breakable, render_page, trusted
from pipeline.pages.views import View, replay_views
from pipeline.precomputing.reports import kept_logits
from pipeline.storage.files import write_text
from pipeline.store.reader import StoreReader
from pipeline.store.softmax import log_softmax
from pipeline.views.stratified import stratified_sample

_TEMPLATE = Path(__file__).parent / "templates" / "store.html"
_SOURCE_SIDE = 360  # longest side of a source image in pixels
_TOP_CLASSES = 5

Facts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of the page.

    Attributes:
      address: `data:` URL.
      height: height in the pixels of boxes.
      width: width in the pixels of boxes.
    """

    address: str
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class GalleryView:
    """A replayed view of the page.

    Attributes:
      facts: text and numbers, as in JSON; see `_facts`.
      own: crop of the view.
      partner: crop of the partner.
      mixed: mixed view.
      own_source: source image of the view.
      partner_source: source image of the partner.
    """

    facts: Facts
    own: Picture
    partner: Picture
    mixed: Picture
    own_source: Picture
    partner_source: Picture


def _picture(pixels: np.ndarray, *, most: int | None = None) -> Picture:
    """Encodes uint8 [H, W, 3] as PNG, or reduced to a longest side of `most` pixels as JPEG."""
    from PIL import Image

    image, kind = Image.fromarray(pixels), "png"
    with io.BytesIO() as file:
        if most is None:
            image.save(file, format="PNG", optimize=True)
        else:
            kind = "jpeg"
            image.thumbnail((most, most))
            image.save(file, format="JPEG", quality=82)
        data = base64.b64encode(file.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{data}", *pixels.shape[:2])


def _crop_facts(view: View, dataset: Dataset) -> Facts:
    return {
        "view": view.index,
        "epoch": view.index // dataset.num_examples + 1,  # counted from 1
        "example": view.example,
        "label": "no label" if view.label is None else dataset.class_names[view.label],
        "box": list(view.box),
        "flip": view.flip,
    }


def _facts(own: View, partner: View, dataset: Dataset, match: ClassMatch, *, temperature: float) -> Facts:
    """Facts of a view: `own` and `partner` (view, epoch, example, label, box, flip), `ratio`, `teacher` (the top classes, the
    labels that they stand for, and their probabilities at T = 1 and at the store's temperature), and both entropies.
    """
    logits = np.asarray(own.logits)
    at_one, at_temperature = (log_softmax(logits, at) for at in (1.0, temperature))
    top = np.argsort(-logits, kind="stable")[:_TOP_CLASSES]
    return {
        "own": _crop_facts(own, dataset),
        "partner": _crop_facts(partner, dataset),
        "ratio": own.ratio,
        "teacher": [
            {
                "class": match.names[number],
                "label": None if (label := match.label_of(number)) is None else dataset.class_names[label],
                "probability": float(np.exp(at_one[number])),
                "probability_at_temperature": float(np.exp(at_temperature[number])),
            }
            for number in top.tolist()
        ],
        "entropy": float(-(np.exp(at_one) * at_one).sum()),
        "entropy_at_temperature": float(-(np.exp(at_temperature) * at_temperature).sum()),
    }


def make_gallery(
    store: StoreReader, dataset: Dataset, views: np.ndarray, *, on_views: Callable[[int], Any]
) -> list[GalleryView]:
    """Replays views and checks their fingerprints.

    Args:
      views: view indices, int64 [n].
      on_views: called with 1 after each view.

    Raises:
      DataError: a fingerprint differs, or a shard is damaged.
    """
    match, gallery = match_classes(dataset, store.spec.num_classes, store.classes), []
    for own, partner in replay_views(store, dataset, views):
        gallery.append(
            GalleryView(
                _facts(own, partner, dataset, match, temperature=store.spec.temperature),
                own=_picture(own.crop),
                partner=_picture(own.partner_crop),
                mixed=_picture(own.mixed.round().astype(np.uint8)),
                own_source=_picture(own.source, most=_SOURCE_SIDE),
                partner_source=_picture(partner.source, most=_SOURCE_SIDE),
            )
        )
        on_views(1)
    return gallery


def _draw_charts(contents: Facts) -> dict[str, str]:
    sample, temperature = contents["sample"], contents["spec"]["identity"]["temperature"]
    axes = {
        "ratio": "mixup ratio",
        "area": "share of the image that the box covers",
        "entropy": "entropy of the teacher at T = 1 (nats)",
    }
    if temperature != 1:
        axes["entropy_at_temperature"] = f"entropy of the teacher at T = {temperature:g} (nats)"
    return {
        name: inline_svg(
            histogram(
                sample[name]["edges"],
                sample[name]["counts"],
                xlabel=xlabel,
                percent=name == "area",
                color="orange" if name == "entropy_at_temperature" else "blue",
            ),
            name,
            title=f"Histogram: {xlabel}",
        )
        for name, xlabel in axes.items()
    }


def render_store(contents: Facts, gallery: list[GalleryView]) -> str:
    """HTML of the page.

    Args:
      contents: contents from `pipeline.pages.summary`, with `sample` and `gallery` (facts of the views of the gallery).
      gallery: views of the gallery.
    """
    return render_page(
        _TEMPLATE,
        at=functools.partial(look_up, contents),
        show=functools.partial(show, contents),
        leaves=functools.partial(leaves, contents),
        breakable=breakable,
        kept=kept_logits(contents["spec"]["identity"]["codec"]),
        charts={name: trusted(chart) for name, chart in _draw_charts(contents).items()},
        gallery=gallery,
    )


def write_store_page(
    store: StoreReader, dataset: Dataset, contents: Facts, path: Path, *, views: int, seed: int
) -> None:
    """Samples and replays views, adds `sample` and `gallery` to `contents`, and writes the page.

    Args:
      contents: contents from `pipeline.pages.summary`.
      views: number of views in the gallery.

    Raises:
      DataError: a shard is damaged, or a fingerprint differs.
    """
    store.spec.check_renderer()
    sampled = sample_views(store.views, seed=seed)
    shown = stratified_sample(np.concatenate(sampled), views, seed=seed, stream="gallery")
    total = sum(map(len, sampled))
    with tqdm(
        total=total + min(total, IMAGES) + len(shown), unit=" views", desc="sample", dynamic_ncols=True
    ) as bar:
        contents["sample"] = {
            "seed": seed,
            **record_statistics(store, sampled, on_views=bar.update),
            "area": area_statistics(store, dataset, sampled, seed=seed, on_views=bar.update),
        }
        gallery = make_gallery(store, dataset, shown, on_views=bar.update)
    contents["gallery"] = [view.facts for view in gallery]
    write_text(path, render_store(contents, gallery))
