"""pipeline.precomputing.options: strictly parsed flags, and the requested spec."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.flags.precompute import announce_demo, make_parser
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.teacher import fingerprint
from pipeline.precomputing.options import PrecomputeOptions, find_eval_splits, resolve
from pipeline.precomputing.reports import eval_splits_text
from pipeline.views.policies.inception import Inception
from pipeline.views.recipes import view_recipe
from tests.images import TRAIN_IMAGES, encoded_images
from tests.stores import CLASSES, DATASET, SIZE, prepare_dataset


def options(data_dir: Path, teacher: Path, *flags: str) -> PrecomputeOptions:
    argv = [f"--dataset={DATASET}", f"--data_dir={data_dir}", f"--teacher={teacher}", "--store=s"]
    parsed = make_parser().parse_strictly([*argv, f"--image_size={SIZE}", *flags])
    return resolve(parsed, is_demo=announce_demo(parsed))


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--epoch=3", ["--epoch=3", "--epochs"]),
        ("--epochs=-1", ["--epochs", "-1", "1 or more"]),
        ("--epochs=0", ["--epochs", "0", "1 or more"]),
        ("--epochs=2.5", ["--epochs", "2.5"]),
        ("--epochs=", ["--epochs"]),
        ("--seed=-3", ["--seed", "-3", "0 or more"]),
        ("--teacher_batch_size=0", ["--teacher_batch_size", "1 or more"]),
        ("--views_per_shard=0", ["--views_per_shard", "1 or more"]),
        ("--area_range=0.5", ["--area_range", "0.5", "0.05,1"]),
        ("--mixup=maybe", ["--mixup", "maybe"]),
        ("--temperature=hot", ["--temperature", "hot"]),
        ("--zzz", ["--zzz", "--help"]),
        ("stray", ["stray"]),
    ],
)
def test_a_mistaken_flag_is_one_line(flag: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_parser().parse_strictly([flag])
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_are_never_abbreviated() -> None:
    """`--temp=3` is not `--temperature=3`."""
    with pytest.raises(UserError, match="--temp=3"):
        make_parser().parse_strictly(["--temp=3"])


def test_help_is_not_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_strictly(["--help"])
    assert caught.value.code == 0
    assert "--image_cache_bytes" in capsys.readouterr().out


def test_the_spec_has_the_requested_values(data_dir: Path, teacher_path: Path) -> None:
    found = options(
        data_dir,
        teacher_path,
        "--seed=7",
        "--codec=float32",
        "--temperature=3",
        "--teacher_batch_size=8",
        "--teacher_value_range=-1..1",
        "--area_range=0.3,0.9",
        "--mixup_fold",
        "--mixup_block=16",
        "--epochs=4",
        "--views_per_shard=100",
        "--image_cache_bytes=0",
    )
    spec = found.spec
    assert (found.epochs, found.views_per_shard, found.image_cache_bytes) == (4, 100, 0)
    assert (spec.seed, spec.codec, spec.temperature, spec.num_classes) == (7, "float32", 3.0, CLASSES)
    expected = Inception(image_size=SIZE, area_range=(0.3, 0.9), mixup_fold=True, mixup_block=16)
    assert spec.policy == expected
    assert spec.dataset == Dataset(DATASET, "train", data_dir=data_dir).identity()
    assert spec.teacher.to_json() == {
        "fingerprint": fingerprint(teacher_path),
        "value_range": "-1..1",
        "signature": "serving_default",
        "batch_size": 8,
    }
    assert found.eval_splits == ("test", "train")
    assert not found.is_demo


def test_provenance_holds_paths_versions_and_processor(data_dir: Path, teacher_path: Path) -> None:
    provenance = options(data_dir, teacher_path).spec.provenance
    assert provenance["data_dir"] == str(data_dir)
    assert provenance["directory"] == str(Path.cwd())
    assert provenance["teacher"] == str(teacher_path)
    assert provenance["versions"]["tensorflow"] == tf.__version__
    assert provenance["processor"]


def test_a_recipe_and_the_flags_that_override_it(data_dir: Path, teacher_path: Path) -> None:
    spec = options(
        data_dir, teacher_path, "--recipe=keras_example", "--mixup_block=9", "--no-mixup_fold"
    ).spec
    recipe = view_recipe("keras_example")
    assert (spec.policy.name, spec.policy.image_size, spec.policy.mixup_block) == ("light", SIZE, 9)
    assert spec.eval_crop == recipe.eval_crop
    assert spec.temperature == recipe.temperature
    spec = options(data_dir, teacher_path, "--recipe=bit", "--no-mixup_fold", "--temperature=1").spec
    assert (spec.policy.mixup_fold, spec.policy.mixup_block, spec.temperature) == (False, 512, 1.0)
    assert not options(data_dir, teacher_path, "--recipe=bit", "--mixup=off").spec.policy.mixup


@pytest.mark.parametrize(
    ("flags", "splits"),
    [
        ("all", ("test", "train")),
        ("none", ()),
        ("test", ("test",)),
        ("test,test,", ("test",)),
        ("train[3:],all", ("train[3:]", "test", "train")),
    ],
)
def test_evaluation_splits(data_dir: Path, teacher_path: Path, flags: str, splits: tuple[str, ...]) -> None:
    assert options(data_dir, teacher_path, f"--eval_splits={flags}").eval_splits == splits


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--codec=float8", ["float8", "bfloat16", "int8", "topk:"]),
        ("--policy=autoaugment", ["autoaugment", "inception", "light"]),
        ("--recipe=vit", ["vit", "keras_example", "bit"]),
        ("--split=nope", ["nope", DATASET, "test", "train"]),
        ("--split=train[:0]", ["train[:0]"]),
        ("--eval_splits=valid", ["valid", DATASET, "test", "train"]),
        ("--eval_splits=train[99:]", ["train[99:]"]),
        ("--area_range=0,2", ["0.0", "2.0"]),
        ("--image_size=9999", ["9999", "4096"]),
        ("--image_size=32", ["(None, 24, 24, 3)", "32, 32, 3"]),
        ("--temperature=2e6", ["2000000"]),
        ("--seed=9223372036854775808", ["9223372036854775808", "9223372036854775807"]),
        ("--teacher_signature=predict", ["predict"]),
        ("--teacher_value_range=0..2", ["0..2", "0..255", "-1..1"]),
        ("--teacher=nowhere", ["nowhere"]),
        ("--dataset=no_such_photos", ["no_such_photos"]),
    ],
)
def test_an_impossible_value_is_one_line(
    data_dir: Path, teacher_path: Path, flag: str, parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        options(data_dir, teacher_path, flag)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_overlap_of_training_and_evaluation_is_described(data_dir: Path, teacher_path: Path) -> None:
    asked = options(data_dir, teacher_path, "--split=train[:10]", "--eval_splits=test,train[8:],train")
    line = eval_splits_text(asked)
    assert "test (7 examples);" in line
    assert "train[8:] (9 examples, 2 " in line
    assert "train (17 examples, 10 " in line
    assert "held out" not in line
    assert "held out" in eval_splits_text(options(data_dir, teacher_path, "--eval_splits=train"))


def test_splits_with_the_same_file_name_are_refused(tmp_path: Path) -> None:
    images = encoded_images(TRAIN_IMAGES[:3])
    prepare_dataset(tmp_path, {"train": images, "train_to_2": images, "views": images})
    dataset = Dataset(DATASET, "train", data_dir=tmp_path)
    assert list(find_eval_splits("train_to_2,train[:1]", dataset)) == ["train_to_2", "train[:1]"]
    for name in ("train[:2]", "views"):
        with pytest.raises(UserError, match=re.escape(name)):
            find_eval_splits(f"train,{name}", dataset)


def test_the_embedded_default_is_announced_in_the_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert announce_demo(make_parser().parse_strictly(["--epochs=3"]))
    assert capsys.readouterr().out.splitlines()[0].startswith("Embedded default: 5,000 MNIST digits")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset=d"], "--teacher is missing"),
        (["--teacher=t"], "--dataset is missing"),
        (["--dataset=d", "--teacher=t"], "--store is missing"),
    ],
)
def test_half_an_own_data_set_and_teacher_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        announce_demo(make_parser().parse_strictly(flags))


def test_a_mistake_is_seen_before_the_embedded_default_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIEW_DISTILL_CACHE", str(tmp_path / "cache"))
    for flag in ("--codec=float8", "--policy=no", "--recipe=no", "--image_size=0"):
        with pytest.raises(UserError):
            resolve(make_parser().parse_strictly([flag]), is_demo=True)
    assert not (tmp_path / "cache").exists()
