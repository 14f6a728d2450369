"""A picture of replayed views, with crop, partner's crop and mixed view in each row.

The picture contains only the tiles. Facts about each view are in the text of the PNG file under `views`.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import match_classes
from pipeline.pages.views import replay_views
from pipeline.storage.checked_json import build, parse_json
from pipeline.storage.files import atomic_file
from pipeline.store.softmax import log_softmax
from pipeline.store.view_store import ViewStore
from trainer.comparison.result_file import ShownFacts

VIEWS_FILE = "views.png"
_TEXT = "views"  # key in the file
_TILES = 3  # crop, partner's crop, mixed view


@dataclasses.dataclass(frozen=True)
class ShownView:
    """One view of the grid.

    Attributes:
      facts: `view`, `example`, `partner_example`, `ratio`, `teacher` (class name and probability).
    """

    png: bytes
    size: int
    facts: dict[str, Any]


def save_views(store: ViewStore, dataset: Dataset, path: Path, *, views: int = 9) -> Path:
    """Replays evenly spaced views of a store, with both fingerprints checked, and draws them.

    Raises:
      DataError: a fingerprint differs.
    """
    from PIL import Image, PngImagePlugin

    wanted = np.unique(np.linspace(0, store.views.num_records - 1, views).round().astype(np.int64))
    names = match_classes(dataset, store.spec.num_classes, store.classes).names
    rows, facts = [], []
    for own, partner in replay_views(store, dataset, wanted):
        rows.append(np.concatenate([own.crop, own.partner_crop, own.mixed.round().astype(np.uint8)], axis=1))
        probability = np.exp(log_softmax(np.asarray(own.logits), 1.0))
        likely = int(probability.argmax())
        facts.append(
            {
                "view": own.index,
                "example": own.example,
                "partner_example": partner.example,
                "ratio": own.ratio,
                "teacher": {"class": names[likely], "probability": float(probability[likely])},
            }
        )
    text = PngImagePlugin.PngInfo()
    text.add_itxt(_TEXT, json.dumps(facts))
    with atomic_file(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG", pnginfo=text, optimize=True)
    return path


def read_views(path: Path) -> list[ShownView]:
    """Reads the rows of a file written by `save_views`."""
    from PIL import Image

    shown = []
    try:
        with Image.open(path) as image:
            facts = build(list[ShownFacts], parse_json(image.text[_TEXT]))  # type: ignore[attr-defined]
            size = image.width // _TILES
            if image.size != (_TILES * size, len(facts) * size):
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels for {len(facts)} views")
            for row, fact in enumerate(facts):
                with io.BytesIO() as file:
                    image.crop((0, row * size, image.width, (row + 1) * size)).save(file, format="PNG")
                    shown.append(ShownView(file.getvalue(), size, dict(fact)))
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(
            f"{path}: damaged, expected a grid of views written by `trainer.compare` ({error}); delete it and rerun the "
            "comparison"
        ) from error
    return shown
