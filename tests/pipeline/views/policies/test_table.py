"""pipeline.views.policies: the table, JSON, and changes of parameters."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.storage.checked_json import ShapeError
from pipeline.views.policies import POLICIES, change_policy, policy_from_json
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.policies.inception import Inception
from pipeline.views.policies.light import Light

SOME = [
    Inception(area_range=(0.3, 0.9), mixup_fold=True, mixup_block=7),
    Light(light_scale=1.5, image_size=96),
    Inception(mixup=False),
]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "inception", "image_size": 0}, ("image_size", "0")),
        ({"name": "light", "image_size": 5000}, ("image_size", "5000")),
        ({"name": "light", "image_size": 96.5}, ("image_size", "96.5")),
        ({"name": "inception", "area_range": (0.0, 1.0)}, ("area_range", "0.0,1.0")),
        ({"name": "inception", "area_range": (0.5, 0.4)}, ("area_range", "0.5,0.4")),
        ({"name": "inception", "area_range": (0.5, 1.5)}, ("area_range", "0.5,1.5")),
        ({"name": "inception", "area_range": (float("nan"), 1.0)}, ("area_range", "nan")),
        ({"name": "inception", "aspect_range": (0.0, 1.0)}, ("aspect_range", "0.0")),
        ({"name": "inception", "aspect_range": (1.0, float("inf"))}, ("aspect_range", "inf")),
        ({"name": "light", "light_scale": 0.5}, ("light_scale", "0.5")),
        ({"name": "inception", "flip_probability": 1.5}, ("flip_probability", "1.5")),
        ({"name": "light", "mixup_block": 0}, ("mixup_block", "0")),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(fields: dict[str, Any], named: tuple[str, str]) -> None:
    values = dict(fields)
    kind = POLICIES[values.pop("name")]
    with pytest.raises(UserError) as caught:
        kind(**values)
    for text in named:
        assert text in str(caught.value)


@pytest.mark.parametrize("policy", SOME)
def test_json_round_trip(policy: ViewPolicy) -> None:
    assert policy_from_json(json.loads(json.dumps(policy.to_json()))) == policy


def test_golden_json() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION: digests of stores are over it."""
    assert Inception(mixup_block=4).to_json() == {
        "name": "inception",
        "image_size": 128,
        "flip_probability": 0.5,
        "mixup": True,
        "mixup_fold": False,
        "mixup_block": 4,
        "area_range": [0.05, 1.0],
        "aspect_range": [0.75, 4 / 3],
    }
    assert Light(mixup=False, image_size=96).to_json() == {
        "name": "light",
        "image_size": 96,
        "flip_probability": 0.5,
        "mixup": False,
        "light_scale": 1.25,
    }


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        (None, "p"),
        ({}, "p.name"),
        ({"name": ["light"]}, "p.name"),
        ({"name": "autoaugment"}, "p.name"),
        ({"name": "light", "area_range": [0.1, 1.0]}, "p.area_range"),
        ({"name": "inception", "image_size": "96"}, "p.image_size"),
        ({"name": "inception", "image_size": 0}, "p"),
    ],
    ids=str,
)
def test_other_json_is_refused_with_its_place(tree: Any, place: str) -> None:
    with pytest.raises(ShapeError) as caught:
        policy_from_json(tree, path="p")
    assert str(caught.value).startswith(f"{place}: ")


def test_parameters_without_effect_are_not_identity() -> None:
    assert Inception(mixup=False, mixup_block=9).to_json() == Inception(mixup=False).to_json()
    assert Inception(mixup_fold=True).to_json() != Inception().to_json()


def test_image_size_is_on_the_view_axis_only_where_boxes_depend_on_it() -> None:
    for kind in POLICIES.values():
        small, large = kind(image_size=24), kind(image_size=48)
        sizes = np.array([[61, 83]])
        boxes = [policy.draw_boxes(np.arange(1), seed=0, sizes=sizes).tolist() for policy in (small, large)]
        assert (boxes[0] == boxes[1]) == kind.any_size == (small.axis_json() == large.axis_json())


def test_a_change_keeps_what_both_policies_have() -> None:
    policy = Inception(image_size=96, mixup_fold=True, area_range=(0.3, 0.9))
    assert change_policy(policy, image_size=None) == policy
    assert change_policy(policy, area_range=(0.1, 1.0)).to_json()["area_range"] == [0.1, 1.0]
    light = change_policy(policy, name="light", area_range=(0.1, 1.0), mixup_block=3)
    assert light == Light(image_size=96, mixup_fold=True, mixup_block=3)
    with pytest.raises(UserError) as caught:
        change_policy(policy, name="autoaugment")
    for text in ("autoaugment", *POLICIES):
        assert text in str(caught.value)
