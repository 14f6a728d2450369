"""pipeline.views.records: parameters of drawn and evaluation views."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.views.eval_crop import EvalCrop
from pipeline.views.order import example_of_view
from pipeline.views.policies import POLICIES
from pipeline.views.policies.inception import Inception
from pipeline.views.records import EvalViews, SampledViews, eval_planner
from pipeline.views.render import eval_renderer
from pipeline.views.source import ImageSource
from tests.images import TEST_IMAGES, TRAIN_IMAGES, ImageList, encoded_images

SIZES = np.array([size for _, *size in TRAIN_IMAGES])
N = len(SIZES)
VIEWS = np.array([0, 40, 3, 40, 16, 17])


@pytest.mark.parametrize("name", ["inception", "light"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_sampled_views_are_drawn_for_their_own_example(name: str, cache_bytes: int) -> None:
    policy = POLICIES[name](image_size=24)
    source = ImageSource(ImageList(encoded_images(TRAIN_IMAGES)), policy.renderer(), cache_bytes=cache_bytes)
    sampled = SampledViews(policy=policy, seed=3, num_examples=N, num_classes=5)
    records, loaded = sampled.fetch(VIEWS, source)
    examples = example_of_view(VIEWS, num_examples=N, seed=3)
    np.testing.assert_array_equal(records.example, examples)
    np.testing.assert_array_equal(loaded.examples, examples)
    boxes = policy.draw_boxes(VIEWS, seed=3, sizes=SIZES[examples])
    np.testing.assert_array_equal(records.box, boxes)
    np.testing.assert_array_equal(records.flip, policy.draw_flips(VIEWS, seed=3))
    np.testing.assert_array_equal(records.ratio, policy.draw_ratios(VIEWS, seed=3))
    assert not records.stored.any()


def test_take_selects_rows_of_every_column() -> None:
    sampled = SampledViews(policy=Inception(), seed=0, num_examples=N, num_classes=5)
    source = ImageSource(ImageList(encoded_images(TRAIN_IMAGES)), Inception().renderer())
    records, _ = sampled.fetch(np.arange(6), source)
    rows = np.array([5, 0, 0])
    taken, _ = sampled.fetch(rows, source)
    for name in ("example", "box", "flip", "ratio", "crop_hash", "source_hash", "stored", "logits"):
        np.testing.assert_array_equal(getattr(records.take(rows), name), getattr(taken, name), err_msg=name)


def test_evaluation_views_are_the_examples_in_order() -> None:
    crop = EvalCrop()
    views = EvalViews(eval_crop=crop, image_size=24, num_examples=len(TEST_IMAGES), num_classes=5)
    source = ImageSource(ImageList(encoded_images(TEST_IMAGES)), eval_renderer(crop, 24))
    records, _ = views.fetch(np.array([2, 0, 6]), source)
    assert records.example.tolist() == [2, 0, 6]
    assert not records.flip.any()
    assert (records.ratio == 1).all()
    sizes = np.array([size for _, *size in TEST_IMAGES])
    np.testing.assert_array_equal(records.box, crop.boxes(sizes[[2, 0, 6]], 24))


def test_evaluation_batches_cover_the_split_once_and_mix_nothing() -> None:
    plan = eval_planner(4, num_examples=7)
    views, partner = plan(4)
    assert views.tolist() == [4, 5, 6, 6, 6, 6]
    assert partner.tolist() == [0, 1, 2, 3]
    views, _ = plan(0)
    assert views[:4].tolist() == [0, 1, 2, 3]
    assert len(set(views.tolist())) == 4
