"""pipeline.views.policies: boxes as TensorFlow draws them, and every draw a function of its view alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from pipeline.errors import UserError
from pipeline.views.policies import ViewPolicy, draw_boxes, draw_flips, draw_ratios

VIEWS = np.array([0, 1, 2, 1000, 10**9])
SIZES = np.array([[500, 600], [375, 500], [1, 50], [40, 3], [1200, 900]])


def test_golden_boxes_of_inception() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION."""
    assert draw_boxes(ViewPolicy(), VIEWS, seed=0, sizes=SIZES).tolist() == [
        [83, 270, 254, 240],
        [4, 276, 129, 133],
        [0, 0, 1, 50],
        [9, 0, 4, 3],
        [626, 193, 287, 319],
    ]


def test_golden_boxes_of_light() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION."""
    corners = [[26, 28], [30, 17], [25, 4], [23, 9], [32, 7]]
    boxes = draw_boxes(ViewPolicy(name="light"), VIEWS, seed=0, sizes=SIZES)
    assert boxes.tolist() == [[*corner, 128, 128] for corner in corners]


def test_golden_flips() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION."""
    flips = draw_flips(ViewPolicy(), np.arange(16), seed=0)
    assert flips.astype(int).tolist() == [1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0]


def test_golden_ratios() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION."""
    assert draw_ratios(ViewPolicy(), VIEWS, seed=0).tolist() == [
        0.4261741042137146,
        0.5980732440948486,
        0.7981910109519958,
        0.13706135749816895,
        0.3433416485786438,
    ]


def tf_boxes(height: int, width: int, count: int) -> np.ndarray:
    """tf.image's own boxes: int [count, 4] y, x, height, width."""

    @tf.function
    def draw(seeds: tf.Tensor) -> tf.Tensor:
        def one(seed: tf.Tensor) -> tf.Tensor:
            begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
                [height, width, 3],
                tf.zeros([1, 0, 4]),
                seed=tf.stack([seed, 1]),
                min_object_covered=0.0,
                aspect_ratio_range=[3 / 4, 4 / 3],
                area_range=[0.05, 1.0],
                max_attempts=100,
                use_image_if_no_bounding_boxes=True,
            )
            return tf.concat([begin[:2], size[:2]], 0)

        return tf.map_fn(one, seeds)

    return draw(tf.range(count)).numpy()


def box_measures(boxes: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    y, x, h, w = boxes.T.astype(float)
    return {
        "area": h * w / (height * width),
        "aspect": w / h,
        "center_y": (y + h / 2) / height,
        "center_x": (x + w / 2) / width,
    }


@pytest.mark.parametrize(("height", "width"), [(300, 400), (538, 624), (500, 120), (31, 47)])
def test_boxes_are_distributed_as_tensorflows(height: int, width: int) -> None:
    count = 3000
    sizes = np.tile([height, width], (count, 1))
    ours = box_measures(draw_boxes(ViewPolicy(), np.arange(count), seed=1, sizes=sizes), height, width)
    theirs = box_measures(tf_boxes(height, width, count), height, width)
    for name in ours:
        # The last row and column that TensorFlow never draws shift a small image's centres by half a pixel.
        if min(height, width) > 100 or not name.startswith("center"):
            assert stats.ks_2samp(ours[name], theirs[name]).pvalue > 1e-3, name
    # The same comparison does see a range that is a little off.
    other = draw_boxes(ViewPolicy(area_range=(0.12, 1.0)), np.arange(count), seed=1, sizes=sizes)
    assert stats.ks_2samp(box_measures(other, height, width)["area"], theirs["area"]).pvalue < 1e-3


def test_every_corner_position_is_possible() -> None:
    sizes = np.tile([4, 4], (4000, 1))
    policy = ViewPolicy(area_range=(0.2, 0.3), aspect_range=(1.0, 1.0))
    boxes = draw_boxes(policy, np.arange(4000), seed=0, sizes=sizes)
    assert (boxes[:, 2:] == 2).all()
    counts = np.bincount(boxes[:, 0] * 3 + boxes[:, 1], minlength=9)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_boxes_lie_inside_every_small_image() -> None:
    sizes = np.stack(np.meshgrid(np.arange(1, 41), np.arange(1, 41)), -1).reshape(-1, 2)
    for seed in range(4):
        y, x, h, w = draw_boxes(ViewPolicy(), np.arange(len(sizes)), seed=seed, sizes=sizes).T.astype(int)
        assert (y >= 0).all()
        assert (x >= 0).all()
        assert (h >= 1).all()
        assert (w >= 1).all()
        assert (y + h <= sizes[:, 0]).all()
        assert (x + w <= sizes[:, 1]).all()
        share = h * w / sizes.prod(axis=1)
        assert (share >= 0.05).all()


@pytest.mark.parametrize("size", [(1, 50), (1, 37), (50, 1), (1, 1)])
def test_an_image_without_a_fitting_box_is_taken_whole(size: tuple[int, int]) -> None:
    sizes = np.tile(size, (50, 1))
    boxes = draw_boxes(ViewPolicy(), np.arange(50), seed=0, sizes=sizes)
    assert (boxes == [0, 0, *size]).all()


@pytest.mark.parametrize("name", ["inception", "light"])
def test_a_view_does_not_depend_on_which_others_are_drawn_with_it(name: str) -> None:
    """2,500 views pass the chunk of 1,024 in which boxes are drawn; order and repeats do not matter."""
    policy = ViewPolicy(name=name, mixup_block=3)
    generator = np.random.default_rng(0)
    views = np.arange(5, 2505)
    sizes = generator.integers(1, 700, (len(views), 2))
    whole = (
        draw_boxes(policy, views, seed=4, sizes=sizes),
        draw_flips(policy, views, seed=4),
        draw_ratios(policy, views, seed=4),
    )
    rows = np.concatenate([generator.permutation(len(views))[:1500], [0, 0, 2499]])
    part = (
        draw_boxes(policy, views[rows], seed=4, sizes=sizes[rows]),
        draw_flips(policy, views[rows], seed=4),
        draw_ratios(policy, views[rows], seed=4),
    )
    for all_of_them, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(some, all_of_them[rows])
    for row in (0, 1023, 1024, 2499):
        one = slice(row, row + 1)
        np.testing.assert_array_equal(draw_boxes(policy, views[one], seed=4, sizes=sizes[one]), whole[0][one])


def test_light_windows_are_uniform() -> None:
    policy = ViewPolicy(name="light", image_size=16)  # canvas 20: 5 positions a side
    boxes = draw_boxes(policy, np.arange(5000), seed=0, sizes=np.zeros((5000, 2)))
    counts = np.bincount(boxes[:, 0] * 5 + boxes[:, 1], minlength=25)
    assert len(counts) == 25
    assert stats.chisquare(counts).pvalue > 1e-3


def test_ratios_are_uniform_and_one_a_view() -> None:
    ratios = draw_ratios(ViewPolicy(), np.arange(5000), seed=0)
    assert ratios.dtype == np.float32
    assert stats.kstest(ratios, "uniform").pvalue > 1e-3
    assert len(np.unique(ratios)) > 4990


def test_folded_ratios_are_the_larger_of_r_and_its_complement() -> None:
    views = np.arange(2000)
    ratios = draw_ratios(ViewPolicy(), views, seed=0)
    folded = draw_ratios(ViewPolicy(mixup_fold=True), views, seed=0)
    np.testing.assert_array_equal(folded, np.where(ratios >= 0.5, ratios, np.float32(1) - ratios))
    assert folded.min() >= 0.5


def test_a_block_of_views_shares_its_ratio() -> None:
    views = np.arange(700, 1300)
    blocked = draw_ratios(ViewPolicy(mixup_block=512), views, seed=0)
    single = draw_ratios(ViewPolicy(), np.array([1, 2]), seed=0)
    np.testing.assert_array_equal(blocked, np.where(views < 1024, single[0], single[1]))


def test_mixup_off_is_ratio_one() -> None:
    assert (draw_ratios(ViewPolicy(mixup=False, mixup_fold=True), np.arange(9), seed=0) == 1).all()


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_flip_probability(probability: float, share: float) -> None:
    flips = draw_flips(ViewPolicy(flip_probability=probability), np.arange(8000), seed=0)
    assert abs(flips.mean() - share) < (0.02 if 0 < share < 1 else 1e-12)


def test_seeds_give_other_views() -> None:
    sizes = np.tile([300, 400], (100, 1))
    first = draw_boxes(ViewPolicy(), np.arange(100), seed=0, sizes=sizes)
    second = draw_boxes(ViewPolicy(), np.arange(100), seed=1, sizes=sizes)
    assert (first != second).any(axis=1).mean() > 0.95
    # Nor is a seed a shift of the view axis.
    assert (first[1:] != second[:-1]).any(axis=1).mean() > 0.95


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "autoaugment"}, "--policy=autoaugment"),
        ({"image_size": 0}, "--image_size=0"),
        ({"image_size": 5000}, "--image_size=5000"),
        ({"area_range": (0.0, 1.0)}, "--area_range=0.0,1.0"),
        ({"area_range": (0.5, 0.4)}, "--area_range=0.5,0.4"),
        ({"area_range": (0.5, 1.5)}, "--area_range=0.5,1.5"),
        ({"area_range": (float("nan"), 1.0)}, "--area_range=nan"),
        ({"aspect_range": (0.0, 1.0)}, "aspect range"),
        ({"aspect_range": (1.0, float("inf"))}, "aspect range"),
        ({"light_scale": 0.5}, "light_scale 0.5"),
        ({"flip_probability": 1.5}, "flip_probability 1.5"),
        ({"mixup_block": 0}, "--mixup_block=0"),
    ],
    ids=str,
)
def test_impossible_numbers_are_refused_with_the_value(fields: dict, named: str) -> None:
    with pytest.raises(UserError, match="expected") as caught:
        ViewPolicy(**fields)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "policy",
    [
        ViewPolicy(area_range=(0.3, 0.9), mixup_fold=True, mixup_block=7),
        ViewPolicy(name="light", light_scale=1.5, image_size=96),
        ViewPolicy(mixup=False),
    ],
)
def test_json_round_trip(policy: ViewPolicy) -> None:
    assert ViewPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_numbers_without_effect_are_not_identity() -> None:
    assert ViewPolicy(light_scale=1.5).to_json() == ViewPolicy().to_json()
    assert ViewPolicy(name="light", area_range=(0.2, 1.0)).to_json() == ViewPolicy(name="light").to_json()
    assert ViewPolicy(mixup=False, mixup_block=9).to_json() == ViewPolicy(mixup=False).to_json()
    assert ViewPolicy(mixup_fold=True).to_json() != ViewPolicy().to_json()
