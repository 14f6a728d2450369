"""What the student looked at: replayed views as a picture, a row of crop, partner's crop and mixed view each.

The picture holds the tiles alone; what is to be said of each stands in the file's text, under `views`.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset import Dataset
from pipeline.errors import DataError
from pipeline.store.files import publish
from pipeline.store.reader import Store

VIEWS_FILE = "views.png"
_TEXT = "views"  # key in the file
_TILES = 3  # crop, partner's crop, mixed view


@dataclasses.dataclass(frozen=True)
class ShownView:
    """One view of the grid.

    Attributes:
      png: its three tiles, side by side.
      size: S of a tile, in pixels.
      facts: `view`, `example`, `partner_example`, `ratio`, `teacher` (class name and probability).
    """

    png: bytes
    size: int
    facts: dict[str, Any]


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum())


def save_views(store: Store, dataset: Dataset, path: Path, *, views: int = 9) -> Path:
    """Replays views from all over a store and draws them; both fingerprints of every crop are checked.

    Args:
      store: with the views.
      dataset: that the store was made from.
      path: of the PNG file to write.
      views: how many; all of them if the store has fewer.

    Raises:
      DataError: a fingerprint differs.
    """
    from PIL import Image, PngImagePlugin

    from pipeline.views.mix import mix
    from trainer.replay import replay_input

    replay = replay_input(store, dataset, batch_size=1, image_cache_bytes=0)
    wanted = np.unique(np.linspace(0, store.views.num_records - 1, views).round().astype(np.int64))
    rows, facts = [], []
    for batch in replay.batches(wanted, threads=1):
        partner = int(batch["partner"][0])
        mixed = mix(batch["crops"], batch["partner"], batch["ratio"][:1]).numpy()[0]
        crops = batch["crops"].numpy()
        # [S, 3 * S, 3] uint8
        tiles = [crops[0], crops[partner], np.clip(mixed.round(), 0, 255).astype(np.uint8)]
        rows.append(np.concatenate(tiles, axis=1))
        probability = _softmax(batch["logits"].numpy()[0].astype(np.float64))
        likely = int(probability.argmax())
        facts.append(
            {
                "view": int(batch["views"][0]),
                "example": int(batch["example"][0]),
                "partner_example": int(batch["example"][partner]),
                "ratio": float(batch["ratio"][0]),
                "teacher": {"class": dataset.class_names[likely], "probability": float(probability[likely])},
            }
        )
    text = PngImagePlugin.PngInfo()
    text.add_itxt(_TEXT, json.dumps(facts))
    with publish(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG", pnginfo=text, optimize=True)
    return path


def read_views(path: Path) -> list[ShownView]:
    """The rows of a file that `save_views` wrote.

    Raises:
      DataError: it is no such file.
    """
    from PIL import Image

    shown = []
    try:
        with Image.open(path) as image:
            facts = json.loads(image.text[_TEXT])  # type: ignore[attr-defined]
            size = image.width // _TILES
            if image.size != (_TILES * size, len(facts) * size):
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels for {len(facts)} views")
            for row, fact in enumerate(facts):
                with io.BytesIO() as file:
                    image.crop((0, row * size, image.width, (row + 1) * size)).save(file, format="PNG")
                    shown.append(ShownView(file.getvalue(), size, dict(fact)))
    except (OSError, KeyError, ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise DataError(
            f"{path}: not a grid of views that `trainer.compare` wrote ({error}); remove it and compare again"
        ) from error
    return shown
