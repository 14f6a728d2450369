"""Is the teacher fed what it was trained on? Its top-1 under each value range, on a sample of labeled images.

A wrong `--teacher_value_range` breaks nothing: the store is whole, the logits are finite, and each student learns from
a teacher that sees noise. Labels show it at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from pipeline.cli.choices import VALUE_RANGES
from pipeline.errors import UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import UNLABELED
from pipeline.precomputing.sample import spread
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.render import Window, eval_renderer
from pipeline.views.source import ImageSource

# At most so many images, one of each of as many stretches of the split, which may be sorted by class. A teacher that is
# fed the wrong range is usually near chance, and 64 images are enough; 256 separate 85 % from 70 %.
SAMPLE = 256
# A range is clearly better than another if it leads by 5 points of top-1, and if an exact sign test on the images that
# only one of the two gets right gives less than 1 in 1,000: 10 of 10, 16 of 18, 31 of 40.
LEAD = 0.05
SIGNIFICANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeFigures:
    """What a sample of labeled images says.

    Attributes:
      split: of the data set.
      asked: the value range that was asked for.
      correct: by value range, which images it gets right, bool [n]; a range that fell behind has fewer of them.
    """

    split: str
    asked: str
    correct: dict[str, np.ndarray]

    def better(self) -> str | None:
        """The range that is clearly better than the one asked for, if there is one."""
        rivals = [
            name for name in self.correct if _beats(self.correct[name], self.correct[self.asked], lead=LEAD)
        ]
        return max(rivals, key=lambda name: self.correct[name].mean(), default=None)

    def fallen_behind(self, name: str) -> bool:
        """Whether a range is worse than the one asked for beyond doubt, so that it needs no more images."""
        return name != self.asked and _beats(self.correct[self.asked], self.correct[name], lead=0.0)

    def text(self) -> str:
        """One line for the user."""
        parts = [
            f"{name} {found.mean():.1%}" + (f" (of {len(found)})" if len(found) < self.count else "")
            for name, found in self.correct.items()
        ]
        return f"teacher top-1 on {self.count} images of {self.split}, by value range: {', '.join(parts)}"

    @property
    def count(self) -> int:
        """Images that the range asked for was tried on."""
        return len(self.correct[self.asked])


def _beats(ours: np.ndarray, theirs: np.ndarray, *, lead: float) -> bool:
    """Whether the first is clearly better on the images that both were tried on, bool [n] each."""
    count = min(len(ours), len(theirs))
    ours, theirs = ours[:count], theirs[:count]
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    different = only_ours + only_theirs
    if not different or only_ours - only_theirs < lead * count:
        return False
    tail = sum(math.comb(different, k) for k in range(only_ours, different + 1))
    return tail < SIGNIFICANCE * 2**different


def measure(worker: ShardWorker, datasets: Mapping[str, Dataset]) -> RangeFigures | None:
    """Tries each value range on the same evaluation crops, until those not asked for have fallen behind.

    Args:
      worker: of the precompute.
      datasets: by split of the store; a held-out one is preferred to the one that views are of.

    Returns:
      The figures; None if the sample has no labels.

    Raises:
      UserError: the teacher cannot be run.
      DataError: an image is damaged.
    """
    views = datasets[VIEWS_SPLIT]
    held_out = [dataset for dataset in datasets.values() if not dataset.overlap(views)]
    for dataset in [*held_out, views]:
        examples = spread(range(dataset.num_examples), SAMPLE, seed=0, stream="value range")
        labels = dataset.labels(examples)
        if (labeled := labels != UNLABELED).any():
            return _measure(worker, dataset, examples[labeled], labels[labeled])
    return None


def _measure(worker: ShardWorker, dataset: Dataset, examples: np.ndarray, labels: np.ndarray) -> RangeFigures:
    size, crop, image_size = worker.batch_size, worker.spec.eval_crop, worker.spec.policy.image_size
    asked = worker.teacher.value_range
    figures = RangeFigures(
        split=dataset.split,
        asked=asked,
        correct={name: np.zeros(0, bool) for name in sorted(VALUE_RANGES, key=lambda name: name != asked)},
    )
    for start in range(0, len(examples), size):
        crops = eval_crops(dataset, crop, image_size=image_size, examples=examples[start : start + size])
        count = len(crops)
        padded = np.concatenate([crops, np.repeat(crops[-1:], size - count, axis=0)])
        rivals = [name for name in figures.correct if not figures.fallen_behind(name)]
        for name in rivals:
            choice = worker.teacher.run_in_range(padded, name)[:count].argmax(axis=1)
            found = choice == labels[start : start + size]
            figures.correct[name] = np.concatenate([figures.correct[name], found])
        if figures.better() or all(figures.fallen_behind(name) for name in figures.correct if name != asked):
            break
    return figures


def eval_crops(dataset: Dataset, crop: EvalCrop, *, image_size: int, examples: np.ndarray) -> np.ndarray:
    """Evaluation crops of examples int64 [n], by the one renderer: uint8 [n, S, S, 3].

    Raises:
      DataError: an image is damaged.
    """
    renderer = eval_renderer(crop, image_size)
    source = ImageSource(dataset, renderer)
    loaded = source.load(examples)
    boxes = crop.boxes(loaded.sizes(), image_size)
    out = np.empty((len(examples), image_size, image_size, 3), np.uint8)
    try:
        for row, (encoded, box) in enumerate(zip(loaded.encoded or (), boxes, strict=True)):
            out[row] = renderer.finish(renderer.cut(tf.constant(encoded), Window.of(box))).numpy()
    except tf.errors.OpError as error:
        raise source.explain(examples, error) from error
    return out


def check_value_range(figures: RangeFigures, *, assumed: bool) -> None:
    """Refuses a value range that another one beats clearly.

    Args:
      figures: of `measure`.
      assumed: the user says that it is right all the same.

    Raises:
      UserError: another one is clearly better.
    """
    better = figures.better()
    if better is None or assumed:
        return
    ours, theirs = figures.correct[figures.asked], figures.correct[better]
    raise UserError(
        f"--teacher_value_range={figures.asked}: the teacher's top-1 on {figures.count} images of {figures.split} is "
        f"{ours.mean():.1%}, and {theirs.mean():.1%} with {better}; pass --teacher_value_range={better}, or "
        "--assume_value_range to go on"
    )
