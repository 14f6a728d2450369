"""pipeline.store.spec: identity is digested and compared, provenance is not, nonsense is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, UserError
from pipeline.store.identity import TeacherIdentity
from pipeline.store.spec import FORMAT_VERSION, SPEC_FILE, Spec, differences, flatten
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.policies.inception import Inception
from pipeline.views.render import render_probe
from tests.stores import ANY_DATASET

SPEC = Spec(
    dataset=ANY_DATASET,
    seed=0,
    policy=Inception(),
    eval_crop=EvalCrop(),
    teacher=TeacherIdentity(fingerprint="t", value_range="0..1", signature="serving_default", batch_size=64),
    num_classes=3,
    codec="float16",
    temperature=10.0,
    render_probe="p",
    provenance={"command": "made by hand"},
)


def test_golden_digest() -> None:
    """May change only with FORMAT_VERSION: every manifest names the digest of its store's spec."""
    assert FORMAT_VERSION == 1
    assert SPEC.digest() == "769a3ff68c1649f8c27b0ffe0ba0aa438db2a24c246bd447ce9be447e653f835"


def test_json_round_trip() -> None:
    again = Spec.from_json(SPEC.to_json(), where="here")
    assert again == SPEC
    assert again.digest() == SPEC.digest()
    assert again.provenance == SPEC.provenance
    assert again.to_json() == SPEC.to_json()


IDENTITY_CHANGES: list[dict[str, Any]] = [
    {"seed": 1},
    {"policy": Inception(image_size=96)},
    {"policy": Inception(mixup_fold=True)},
    {"policy": Inception(mixup_block=2)},
    {"policy": Inception(area_range=(0.06, 1.0))},
    {"policy": Inception(flip_probability=0.4)},
    {"eval_crop": EvalCrop(scale=1.2)},
    {"codec": "float32"},
    {"temperature": 9.0},
    {"num_classes": 4},
    {"render_probe": "q"},
    {"dataset": dataclasses.replace(SPEC.dataset, fingerprint="g")},
    {"dataset": dataclasses.replace(SPEC.dataset, split="test")},
    {"teacher": dataclasses.replace(SPEC.teacher, fingerprint="u")},
    {"teacher": dataclasses.replace(SPEC.teacher, batch_size=32)},
    {"teacher": dataclasses.replace(SPEC.teacher, value_range="-1..1")},
]


@pytest.mark.parametrize("changes", IDENTITY_CHANGES, ids=str)
def test_every_part_of_the_identity_counts_and_is_shown_from_both_sides(changes: dict[str, Any]) -> None:
    other = dataclasses.replace(SPEC, **changes)
    assert other.digest() != SPEC.digest()
    with pytest.raises(DataError) as caught:
        other.check_same(SPEC, store="the/store")
    here, there = flatten(other.identity()), flatten(SPEC.identity())
    (key,) = (k for k in here if here[k] != there[k])
    assert f"{key}: {here[key]} asked for, {there[key]} in the/store" in str(caught.value)


def test_provenance_does_not_count() -> None:
    other = dataclasses.replace(SPEC, provenance={"command": "another"})
    assert other.digest() == SPEC.digest()
    other.check_same(SPEC, store="s")


def test_differences_show_what_one_side_lacks() -> None:
    lines = differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": [3]}}, sides=("here", "there"))
    assert lines == ["a.c: 2 here, absent there", "a.d: absent here, [3] there"]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_an_impossible_seed_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=f"`seed`={seed}: "):
        dataclasses.replace(SPEC, seed=seed)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=f"`temperature`={temperature}: "):
        dataclasses.replace(SPEC, temperature=temperature)


def test_a_spec_that_was_edited_is_refused_with_both_digests() -> None:
    edited = dataclasses.replace(SPEC, seed=5)
    text = SPEC.to_json().replace('"seed": 0', '"seed": 5')
    with pytest.raises(DataError) as caught:
        Spec.from_json(text, where="spec.json")
    assert edited.digest()[:16] in str(caught.value)
    assert SPEC.digest()[:16] in str(caught.value)


def test_another_format_is_refused_with_both_versions() -> None:
    text = SPEC.to_json().replace('"format": 1', '"format": 2')
    with pytest.raises(DataError, match=r"\b2\b.*\b1\b"):
        Spec.from_json(text, where="spec.json")


def _without(*keys: str) -> str:
    whole = json.loads(SPEC.to_json())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return json.dumps(whole)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "null",
        "3",
        '{"identity": null}',
        '{"identity": {}}',
        _without("digest"),
        _without("identity", "policy"),
        _without("identity", "policy", "name").replace('"image_size": 128', '"image_size": "x"'),
        _without("identity", "teacher"),
        SPEC.to_json().replace("float16", "float8"),
        SPEC.to_json().replace('"seed": 0', '"seed": 0, "unheard_of": 1'),
        SPEC.to_json().replace('"seed": 0', '"seed": "0"'),
        SPEC.to_json().replace('"temperature": 10.0', '"temperature": null'),
        SPEC.to_json().replace('"num_classes": 3', '"num_classes": "three"'),
        SPEC.to_json().replace('"area_range"', '"area"'),
    ],
)
def test_garbage_is_refused_and_the_file_named(text: str) -> None:
    with pytest.raises(DataError, match=r"^some/spec.json: "):
        Spec.from_json(text, where="some/spec.json")


def test_no_store_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"`store`={tmp_path}: .*spec.json"):
        Spec.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"spec\.json"):
        Spec.load(tmp_path / "file")


def test_an_unreadable_spec_is_refused(tmp_path: Path) -> None:
    (tmp_path / SPEC_FILE).mkdir()
    with pytest.raises(UserError, match=r"`store`=.*spec\.json"):
        Spec.load(tmp_path)
    (tmp_path / SPEC_FILE).rmdir()
    (tmp_path / SPEC_FILE).write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match=r"spec\.json: not a store's spec"):
        Spec.load(tmp_path)


def test_a_machine_that_renders_differently_is_refused_with_both_probes() -> None:
    here = render_probe()
    dataclasses.replace(SPEC, render_probe=here).check_renderer()
    with pytest.raises(DataError, match=f"{here} here, p in the spec"):
        SPEC.check_renderer()
