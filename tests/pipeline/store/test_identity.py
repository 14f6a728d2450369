"""pipeline.store.identity: what is digested, and that nothing impossible can be one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.store.identity import DatasetIdentity, TeacherIdentity, ViewAxis
from pipeline.views.policies.inception import Inception
from pipeline.views.policies.light import Light

DATASET = DatasetIdentity(name="d:1.0.0", split="train", num_examples=10, fingerprint="f")
TEACHER = TeacherIdentity(fingerprint="t", value_range="0..1", signature="serving_default", batch_size=64)
AXIS = ViewAxis(dataset=DATASET, seed=0, policy=Inception())


def test_golden_digest_of_a_view_axis() -> None:
    """May change only with FORMAT_VERSION: stores with the same one can be used together."""
    assert AXIS.digest() == "e2121e6083ad3817f26dbb81bbc81a24699ee4d5fa3500127f006f55f29e24b7"


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"dataset": dataclasses.replace(DATASET, split="test")},
        {"dataset": dataclasses.replace(DATASET, fingerprint="g")},
        {"dataset": dataclasses.replace(DATASET, image_feature="second")},
        {"policy": Inception(mixup=False)},
        {"policy": Inception(area_range=(0.06, 1.0))},
        {"policy": Light()},
    ],
    ids=str,
)
def test_whatever_determines_views_counts(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(AXIS, **changes).digest() != AXIS.digest()


def test_views_do_not_depend_on_the_resolution_but_for_light() -> None:
    """Boxes of `inception` are in source pixels; those of `light` in pixels of the resized image."""
    other = dataclasses.replace(AXIS, policy=Inception(image_size=224))
    assert other.digest() == AXIS.digest()
    small, large = (Light(image_size=size) for size in (128, 224))
    assert (
        dataclasses.replace(AXIS, policy=small).digest() != dataclasses.replace(AXIS, policy=large).digest()
    )


@pytest.mark.parametrize(
    ("identity", "changes"),
    [
        (DATASET, {"name": ""}),
        (DATASET, {"name": "a\x1b[2Jb"}),
        (DATASET, {"name": "x" * 1001}),
        (DATASET, {"split": "train\nerror: all is well"}),
        (DATASET, {"fingerprint": "\u202eabc"}),
        (DATASET, {"fingerprint": 5}),
        (DATASET, {"fingerprint": None}),
        (DATASET, {"image_feature": ""}),
        (TEACHER, {"signature": None}),
        (TEACHER, {"output": "a\x1b[2Jb"}),
        (DATASET, {"num_examples": 0}),
        (DATASET, {"num_examples": 10**13}),
        (DATASET, {"num_examples": True}),
        (TEACHER, {"value_range": "0..2"}),
        (TEACHER, {"batch_size": 0}),
        (TEACHER, {"batch_size": 65_537}),
        (TEACHER, {"batch_size": 1.0}),
        (TEACHER, {"signature": "a\rb"}),
        (TEACHER, {"fingerprint": None}),
    ],
    ids=str,
)
def test_an_impossible_identity_cannot_be_made(identity: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected"):
        dataclasses.replace(identity, **changes)


def test_an_optional_field_is_left_out_where_it_is_the_default() -> None:
    """Otherwise the digests of existing stores would change."""
    assert "image_feature" not in DATASET.to_json()
    assert "output" not in TEACHER.to_json()
    assert dataclasses.replace(DATASET, image_feature="b").to_json()["image_feature"] == "b"
    assert dataclasses.replace(TEACHER, output="b").to_json()["output"] == "b"
