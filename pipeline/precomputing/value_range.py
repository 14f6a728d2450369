"""Checks the teacher's value range by its top-1 under each value range, on a sample of labeled images.

A wrong `--teacher_value_range` causes no error: the store is complete and the logits are finite, but students learn from a
teacher that sees noise. Labels reveal it.
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
from pipeline.inputs.labels import UNLABELED, ClassMatch
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.render import Window, eval_renderer
from pipeline.views.source import ImageSource
from pipeline.views.stratified import stratified_sample

# Largest number of images, spread over the split, which may be sorted by class. With a wrong range, a teacher is usually near
# chance, and 64 images are enough; 256 distinguish 85 % from 70 %.
SAMPLE = 256
# A range is clearly better than another if its top-1 is higher by 5 points, and if an exact sign test on the images that
# only one of the two classifies correctly gives less than 1 in 1,000: 10 of 10, 16 of 18, 31 of 40.
LEAD = 0.05
SIGNIFICANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeFigures:
    """Results on a sample of labeled images.

    Attributes:
      split: split of the data set.
      requested: requested value range.
      correct: for each value range, whether each image is classified correctly, bool [n]; n is smaller for ranges that are
        clearly worse than the requested one.
    """

    split: str
    requested: str
    correct: dict[str, np.ndarray]

    def better(self) -> str | None:
        """The best range that is clearly better than the requested one, or None."""
        requested = self.correct[self.requested]
        better = [name for name, correct in self.correct.items() if _is_better(correct, requested, lead=LEAD)]
        return max(better, key=lambda name: self.correct[name].mean(), default=None)

    def is_worse(self, name: str) -> bool:
        """Whether a range is clearly worse than the requested one, so that it needs no more images."""
        requested = self.correct[self.requested]
        return name != self.requested and _is_better(requested, self.correct[name], lead=0.0)

    def text(self) -> str:
        """One line for the terminal."""
        parts = [
            f"{name} {found.mean():.1%}" + (f" (of {len(found)})" if len(found) < self.count else "")
            for name, found in self.correct.items()
        ]
        return f"teacher top-1 on {self.count} images of {self.split}, by value range: {', '.join(parts)}"

    @property
    def count(self) -> int:
        """Number of images for the requested range."""
        return len(self.correct[self.requested])


def _is_better(ours: np.ndarray, theirs: np.ndarray, *, lead: float) -> bool:
    """Whether `ours` is clearly better than `theirs`, bool [n] and [m], on their common images."""
    count = min(len(ours), len(theirs))
    ours, theirs = ours[:count], theirs[:count]
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    different = only_ours + only_theirs
    if not different or only_ours - only_theirs < lead * count:
        return False
    tail = sum(math.comb(different, k) for k in range(only_ours, different + 1))
    return tail < SIGNIFICANCE * 2**different


def measure(worker: ShardWorker, datasets: Mapping[str, Dataset], match: ClassMatch) -> RangeFigures | None:
    """Tries each value range on the same evaluation crops, until the others are clearly worse than the requested one.

    Args:
      worker: worker of the precompute.
      datasets: data set of each split of the store; a held-out split is preferred to the training split.
      match: how the teacher's classes match the labels.

    Returns:
      The results, or None if the sample has no labels that the outputs can be compared with.

    Raises:
      UserError: the teacher fails.
      DataError: an image is damaged.
    """
    views = datasets[VIEWS_SPLIT]
    held_out = [dataset for dataset in datasets.values() if not dataset.overlap(views)]
    for dataset in [*held_out, views]:
        examples = stratified_sample(range(dataset.num_examples), SAMPLE, seed=0, stream="value range")
        labels = match.labels(dataset, examples)
        if (labeled := labels != UNLABELED).any():
            return _measure(worker, dataset, match, examples[labeled], labels[labeled])
    return None


def _measure(
    worker: ShardWorker, dataset: Dataset, match: ClassMatch, examples: np.ndarray, labels: np.ndarray
) -> RangeFigures:
    size, crop, image_size = worker.batch_size, worker.spec.eval_crop, worker.spec.policy.image_size
    requested = worker.teacher.value_range
    figures = RangeFigures(
        split=dataset.split,
        requested=requested,
        correct={
            name: np.zeros(0, bool) for name in sorted(VALUE_RANGES, key=lambda name: name != requested)
        },
    )
    for start in range(0, len(examples), size):
        crops = eval_crops(dataset, crop, image_size=image_size, examples=examples[start : start + size])
        count = len(crops)
        padded = np.concatenate([crops, np.repeat(crops[-1:], size - count, axis=0)])
        for name in [name for name in figures.correct if not figures.is_worse(name)]:
            choice = match.predict(worker.teacher.run_in_range(padded, name)[:count])
            found = choice == labels[start : start + size]
            figures.correct[name] = np.concatenate([figures.correct[name], found])
        if figures.better() or all(figures.is_worse(name) for name in figures.correct if name != requested):
            break
    return figures


def eval_crops(dataset: Dataset, crop: EvalCrop, *, image_size: int, examples: np.ndarray) -> np.ndarray:
    """Renders the evaluation crops of examples, int64 [n] to uint8 [n, S, S, 3].

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
    """Refuses a value range if another one is clearly better.

    Args:
      figures: results of `measure`.
      assumed: whether the user states that the range is right.

    Raises:
      UserError: another one is clearly better.
    """
    better = figures.better()
    if better is None or assumed:
        return
    ours, theirs = figures.correct[figures.requested], figures.correct[better]
    raise UserError(
        f"`teacher_value_range`={figures.requested}: the teacher's top-1 on {figures.count} images of {figures.split} is "
        f"{ours.mean():.1%}, but {theirs.mean():.1%} with {better}; pass `teacher_value_range`={better}, or "
        "`assume_value_range` if the range is right"
    )
