"""The page of a store: what it holds, a gallery of replayed views, and histograms over a sample."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import UNLABELED
from pipeline.pages.figures import kept_logits, leaves, look_up, show
from pipeline.pages.template import breakable, render_page, trusted
from pipeline.pages.views import ReplayedView, ShownCrop, replay_views
from pipeline.store.codecs import log_softmax
from pipeline.store.reader import Store
from pipeline.views.render import Renderer

_TEMPLATE = Path(__file__).parent / "templates" / "store.html"
_SOURCE_SIDE = 360  # pixels of a source's longer side, at most
_LIKELY = 5  # classes

Facts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image for a page.

    Attributes:
      address: a `data:` URL.
      height, width: that the box counts in.
    """

    address: str
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class GalleryView:
    """A replayed view for the page.

    Attributes:
      facts: for JSON; see `_facts`.
      own, partner, mixed: crops.
      own_source, partner_source: images that the boxes are drawn on.
    """

    facts: Facts
    own: Picture
    partner: Picture
    mixed: Picture
    own_source: Picture
    partner_source: Picture


def _picture(pixels: np.ndarray, *, most: int | None = None) -> Picture:
    """uint8 [H, W, 3] as it is, in PNG; or with a longer side of at most `most` pixels, in JPEG."""
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


def _crop_facts(crop: ShownCrop, dataset: Dataset, label: int, *, num_examples: int) -> Facts:
    return {
        "view": crop.view,
        "epoch": crop.view // num_examples + 1,  # as people count
        "example": crop.example,
        "label": "no label" if label == UNLABELED else dataset.class_names[label],
        "box": crop.box.tolist(),
        "flip": crop.flipped,
    }


def _facts(view: ReplayedView, dataset: Dataset, *, num_examples: int, temperature: float) -> Facts:
    """What JSON has of a view: `own` and `partner` (view, epoch, example, label, box, flip), `ratio`, `teacher`
    (the likeliest classes, with probabilities at T = 1 and at the store's) and both entropies.
    """
    labels = dataset.labels(np.array([view.own.example, view.partner.example]))
    cold, warm = (log_softmax(view.logits, at) for at in (1.0, temperature))
    likely = np.argsort(-view.logits, kind="stable")[:_LIKELY]
    return {
        "own": _crop_facts(view.own, dataset, int(labels[0]), num_examples=num_examples),
        "partner": _crop_facts(view.partner, dataset, int(labels[1]), num_examples=num_examples),
        "ratio": view.ratio,
        "teacher": [
            {
                "class": dataset.class_names[number],
                "probability": float(np.exp(cold[number])),
                "probability_at_temperature": float(np.exp(warm[number])),
            }
            for number in likely.tolist()
        ],
        "entropy": float(-(np.exp(cold) * cold).sum()),
        "entropy_at_temperature": float(-(np.exp(warm) * warm).sum()),
    }


def make_gallery(
    store: Store, dataset: Dataset, views: np.ndarray, *, on_views: Callable[[int], Any]
) -> list[GalleryView]:
    """Replays views, int64 [n], fingerprints checked, with the images that they are cut from.

    Args:
      store: the store.
      dataset: that it was made from.
      views: to be shown.
      on_views: called with numbers of views done.

    Raises:
      DataError: a fingerprint differs, or a shard is damaged.
    """
    renderer, spec, out = store.spec.policy.renderer(), store.spec, []
    for view in replay_views(store, dataset, views):
        out.append(
            GalleryView(
                _facts(view, dataset, num_examples=spec.num_examples, temperature=spec.temperature),
                own=_picture(view.own.pixels),
                partner=_picture(view.partner.pixels),
                mixed=_picture(view.mixed),
                own_source=_source(dataset, renderer, view.own.example),
                partner_source=_source(dataset, renderer, view.partner.example),
            )
        )
        on_views(1)
    return out


def _source(dataset: Dataset, renderer: Renderer, example: int) -> Picture:
    """The image that an example's boxes refer to."""
    (encoded,) = dataset.read(np.array([example]))
    return _picture(renderer.prepare(tf.constant(encoded)).numpy(), most=_SOURCE_SIDE)


def _draw_charts(contents: Facts) -> dict[str, str]:
    from pipeline.pages.charts import histogram
    from pipeline.pages.svg import inline_svg

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
                colour="orange" if name == "entropy_at_temperature" else "blue",
            ),
            name,
            title=f"Histogram: {xlabel}",
        )
        for name, xlabel in axes.items()
    }


def render_store(contents: Facts, gallery: list[GalleryView]) -> str:
    """The page of a whole store.

    Args:
      contents: of `pipeline.pages.summary`, with `sample` and `gallery` (the facts of the views that are shown).
      gallery: those views.
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
