"""A flag that would change nothing is refused, by every command of the pipeline."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest

from pipeline.cli.parser import Parser
from pipeline.errors import UserError
from pipeline.flags import beam, dataset, plan, precompute, verify
from pipeline.flags import inspect as inspect_flags
from pipeline.views.policies.inception import Inception
from trainer.config.recipes import TrainRecipe

OWN = ("--dataset=d", "--teacher=teacher", "--store=s")
KERAS = ("--dataset=d", "--teacher=teacher.keras", "--store=s")
RATES = ("--teacher_rate=5", "--num_examples=9", "--num_classes=3")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with the outside of a store, a teacher and a data directory."""
    for name in ("store", "teacher", "data", "data/d", "images"):
        (tmp_path / name).mkdir()
    for name in ("store/spec.json", "teacher.keras", "teacher/saved_model.pb"):
        (tmp_path / name).touch()
    (tmp_path / "map.csv").write_text("0,0\n")
    (tmp_path / "names.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "others", "idle"),
    [
        ("precompute", (*OWN, "--policy=light"), "--area_range=0.1,1"),
        ("precompute", (*OWN, "--recipe=keras_example"), "--area_range=0.1,1"),
        ("precompute", (*OWN, "--mixup=off"), "--mixup_block=2"),
        ("precompute", (*OWN, "--mixup=off"), "--mixup_fold"),
        ("precompute", (*OWN, "--mixup=off"), "--no-mixup_fold"),
        ("precompute", KERAS, "--teacher_signature=serving_default"),
        ("precompute", ("--dataset=d", "--teacher=gs://b/t.keras", "--store=s"), "--teacher_signature=a"),
        ("precompute", (*OWN, "--data_dir=data"), "--data_cache_bytes=5"),
        ("precompute", OWN, "--data_cache_bytes=5"),
        ("precompute", (), "--data_dir=data"),
        ("precompute", (), "--teacher_signature=a"),
        ("precompute", (), "--teacher_value_range=0..1"),
        ("precompute", (), "--teacher_output=a"),
        ("precompute", (), "--image_feature=a"),
        ("precompute", (), "--label_feature=none"),
        ("precompute", (*OWN, "--label_feature=none"), "--class_map=map.csv"),
        ("plan", OWN[:2], "--class_map=map.csv"),
        ("plan", OWN[:2], "--class_names=names.txt"),
        ("plan", RATES, "--label_feature=a"),
        ("precompute", OWN, "--shared_filesystem"),
        ("plan", RATES, "--calibrate_seconds=3"),
        ("plan", RATES, "--teacher=teacher"),
        ("plan", RATES, "--teacher_batch_size=3"),
        ("plan", RATES, "--image_size=96"),
        ("plan", RATES, "--data_dir=data"),
        ("plan", RATES, "--eval_splits=none"),
        ("plan", (), "--precompute_rate=3"),
        ("plan", (), "--store=s"),
        ("plan", (), "--repair"),
        ("plan", (), "--assume_value_range"),
        ("plan", RATES, "--assume_value_range"),
        ("plan", RATES, "--data_cache_bytes=5"),
        ("plan", ("--dataset=d", "--teacher=teacher.keras"), "--teacher_signature=a"),
        ("verify", ("--store=store",), "--shard_cache_bytes=5"),
        ("verify", ("--store=gs://b/s", "--data_dir=data"), "--data_cache_bytes=5"),
        ("inspect", ("--store=store",), "--shard_cache_bytes=5"),
        ("inspect", ("--store=store",), "--views=3"),
        ("inspect", ("--store=store",), "--seed=3"),
        ("inspect", ("--store=store",), "--data_dir=data"),
        ("dataset", ("import", "--folder=images", "--name=n", "--data_dir=d"), "--from_data_dir=data"),
        ("dataset", ("import", "--from_tfds=n", "--data_dir=d"), "--name=n"),
        *(
            ("dataset", ("import", "--from_tfds=n", "--data_dir=d"), idle)
            for idle in ("--flatten_alpha", "--unlabeled", "--holdout=0.1", "--quality=90", "--seed=1")
        ),
        ("dataset", ("import", "--folder=images", "--name=n", "--data_dir=d"), "--image_feature=x"),
    ],
)
def test_a_flag_without_effect_is_refused(command: str, others: tuple[str, ...], idle: str) -> None:
    parse = importlib.import_module(f"pipeline.flags.{command}").parse
    parse(list(others))
    with pytest.raises(UserError, match="no effect") as caught:
        parse([*others, idle])
    assert idle.split("=", maxsplit=1)[0].replace("--no-", "--") in str(caught.value)


@pytest.mark.parametrize(
    ("command", "others", "idle"),
    [
        (("finetune", "--model=tiny", "--output=o", "--workdir=w"), (), "--teacher_value_range=0..1"),
        (("finetune", "--model=tiny", "--output=o", "--workdir=w"), (), "--data_dir=data"),
    ],
)
def test_a_flag_without_effect_is_refused_by_the_teachers_command(
    command: tuple[str, ...], others: tuple[str, ...], idle: str
) -> None:
    from trainer.flags.teacher import parse

    parse([*command, *others])
    with pytest.raises(UserError, match="no effect"):
        parse([*command, *others, idle])


def test_the_same_flags_are_taken_where_they_have_an_effect() -> None:
    precompute.parse([*OWN, "--policy=inception", "--area_range=0.1,1", "--mixup_block=2", "--no-mixup_fold"])
    precompute.parse([*OWN, "--teacher_signature=a", "--data_dir=gs://b/d", "--data_cache_bytes=5"])
    plan.parse(["--calibrate_seconds=1", "--image_size=32"])
    plan.parse(["--teacher_rate=5", "--dataset=d", "--data_dir=data", "--eval_splits=none", "--codec=int8"])
    verify.parse(["--store=gs://b/s", "--shard_cache_bytes=5", "--data_cache_bytes=5"])
    inspect_flags.parse(["--store=store", "--html=page.html", "--views=3", "--seed=1", "--data_dir=data"])


# Flags whose effect never depends on other flags.
ALWAYS = {
    "precompute": "dataset split teacher teacher_batch_size assume_logits assume_value_range store epochs seed recipe policy "
    "image_size mixup codec temperature views_per_shard repair eval_splits image_cache_bytes input_buffer_bytes "
    "class_names shared_filesystem",  # which `runners.check` judges
    "plan": "students workers teacher_rate calibrate_seconds json",
    "verify": "store teacher data_dir fraction seed",
    "inspect": "store checksums json html card",
    "dataset": "folder from_tfds short_side data_dir",
}


def test_every_flag_is_classified() -> None:
    """A new flag goes into a table of conditions, or here."""
    always = {name: set(flags.split()) for name, flags in ALWAYS.items()}
    always["plan"] |= always["precompute"]
    for name, conditions in (
        ("precompute", precompute.CONDITIONS),
        ("plan", plan.MEASURED_CONDITIONS),
        ("verify", verify.CONDITIONS),
        ("inspect", inspect_flags.CONDITIONS),
        ("dataset", dataset.CONDITIONS),
    ):
        flags = {action.dest for action in make_parser(name)._actions} - {"help", "debug"}
        assert flags - set(conditions) - always[name] == set(), name
        assert set(conditions) <= flags


@pytest.mark.parametrize("name", ALWAYS)
def test_examples_of_help_can_be_parsed(name: str) -> None:
    parser = make_parser(name)
    lines = (parser.epilog or "").replace("\\\n", "").splitlines()[1:]
    assert len(lines) == 2
    for line in lines:
        _, _, command, *arguments = shlex.split(line)
        assert command == f"pipeline.{name}"
        _, rest = parser.parse_known_args([word for word in arguments if word != "import"])
        beam.check(rest, parser)
        assert name == "precompute" or not rest


def make_parser(name: str) -> Parser:
    made = importlib.import_module(f"pipeline.flags.{name}").make_parser()
    return made[1] if isinstance(made, tuple) else made


def test_two_outputs_in_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError) as caught:
        inspect_flags.parse(["--store=store", "--json=page", f"--html={tmp_path}/link/page"])
    assert "--json=page" in str(caught.value)
    assert f"--html={tmp_path}/link/page" in str(caught.value)


def test_a_data_directory_inside_the_images_is_refused() -> None:
    for place in ("images", "images/data"):
        with pytest.raises(UserError) as caught:
            dataset.parse(["import", "--folder=images", "--name=n", f"--data_dir={place}"])
        assert f"--data_dir={place}" in str(caught.value)


def test_help_says_where_a_recipe_decides() -> None:
    from trainer.flags.train import make_parser as train_parser

    views = {"policy", "mixup", *Inception.__dataclass_fields__} - {"name"}
    training = {*TrainRecipe.__dataclass_fields__} - {"views", "source", "allow_short_run"}
    for parser, names in ((precompute.make_parser(), views), (train_parser(), training)):
        for action in parser._actions:
            if action.dest in names:
                assert "default" in (action.help or ""), action.dest
