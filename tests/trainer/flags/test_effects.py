"""trainer.flags.effects: every training command refuses flags without effect."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli.effects import parse_effective
from pipeline.errors import UserError
from pipeline.store.reader import StoreReader
from tests.runs import arguments, options
from trainer.cloud.preflight import check_trainer_flags
from trainer.flags import compare, effects, evaluate, teacher, train
from trainer.launch import read_flags

LOCAL = ["--store=s", "--workdir=w"]
EVALUATE = ["--student=m.keras"]
FINETUNE = ["finetune", "--output=o", "--workdir=w", "--model=tiny", "--dataset=d"]
PLACE = ["--tpu=t", "--zone=z", "--project=p"]
LAUNCH = ["launch", *PLACE, "--type=v3-8", "--image=i", "--store=/s", "--data_dir=/d", "--workdir=gs://b/w"]

# Flags that always have an effect, or that allow something.
ALWAYS = {
    "train": "sync_batch_norm replicas tpu debug help store workdir arm epochs steps write_back follow seed data_dir data_cache_bytes recipe "
    "allow_recipe_mismatch allow_short_run student batch_size temperature temperature_squared learning_rate weight_decay "
    "clip epsilon warmup_steps strategy steps_per_execution jit_compile precision deterministic eval_split eval_every "
    "eval_batch_size log_every checkpoint_every image_cache_bytes input_buffer_bytes init student_image_size image_size",
    "compare": "arms seeds parallel earlier",
    "evaluate": "debug help student student_output student_value_range image_size assume_logits store dataset split data_dir json html "
    "eval_batch_size input_buffer_bytes",
    "finetune": "debug help dataset split model init teacher head_only output workdir steps batch_size learning_rate image_size "
    "recipe policy flip seed log_every checkpoint_every image_cache_bytes input_buffer_bytes",
}


@pytest.mark.parametrize(
    ("parse", "argv", "needs"),
    [
        (train.parse, [*LOCAL, "--clip=none", "--clip_norm=1"], "--clip"),
        (train.parse, [*LOCAL, "--weight_decay=0", "--decay_mode=scaled"], "--weight_decay"),
        (train.parse, [*LOCAL, "--weight_decay=0", "--no-decay_kernels_only"], "--weight_decay"),
        (train.parse, [*LOCAL, "--views_per_shard=16384"], "--write_back"),
        (train.parse, [*LOCAL, "--shard_cache_bytes=1"], "bucket"),
        (train.parse, [*LOCAL, "--replicas=2"], "--strategy=mirrored"),
        (train.parse, [*LOCAL, "--tpu=local"], "--strategy=tpu"),
        (train.parse, [*LOCAL, "--strategy=mirrored", "--tpu=local"], "--strategy=tpu"),
        (train.parse, [*LOCAL, "--arm=fixed", "--teacher=t"], "--arm"),
        (compare.parse, [*LOCAL, "--clip=none", "--clip_norm=1"], "--clip"),
        (compare.parse, [*LOCAL, "--arms=offline,fixed", "--teacher=t"], "--arms"),
        (compare.parse, [*LOCAL, "--arms=offline,fixed", "--measure"], "--arms=online"),
        (compare.parse, ["--workdir=w", "--from=a,b", "--seeds=0"], "--from"),
        (compare.parse, ["--workdir=w", "--from=a,b", "--batch_size=3"], "--from"),
        (compare.parse, ["--workdir=w", "--from=a,b", "--no-measure"], "--from"),
        (teacher.parse, [*FINETUNE, "--teacher_value_range=0..255"], "--teacher"),
        (teacher.parse, [*FINETUNE[:-1], "--data_dir=d"], "--dataset"),
        (teacher.parse, [*FINETUNE[:-1], "--label_feature=a"], "--dataset"),
        (evaluate.parse, [*EVALUATE, "--store=s", "--label_feature=a"], "--dataset"),
        (evaluate.parse, [*EVALUATE, "--dataset=d", "--no-temperature_squared"], "--store"),
        (evaluate.parse, [*EVALUATE, "--store=s", "--student_signature=a"], ".keras"),
        (evaluate.parse, [*EVALUATE, "--store=s", "--store_weights=1"], "--store"),
        (read_flags, [*LAUNCH, "--detach", "--delete"], "--detach"),
        (read_flags, ["logs", *PLACE, "--follow", "--lines=100"], "--follow"),
        (
            lambda argv: check_trainer_flags(LOCAL, argv, node_type="v3-8"),
            ["--clip=none", "--clip_norm=1"],
            "--clip",
        ),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_flag_without_effect_is_refused(parse: Callable[[list[str]], object], argv: list[str], needs: str):
    with pytest.raises(UserError) as error:
        parse(argv)
    message = str(error.value)
    assert needs in message
    assert any(message.startswith(flag.split("=")[0].replace("--no-", "--")) for flag in argv[-2:])


def test_every_flag_of_training_commands_is_classified():
    """A new flag goes into a table of `trainer.flags.effects`, or here."""
    shared = set(ALWAYS["train"].split())
    for parser, conditions, always in (
        (train.make_parser(), effects.TRAIN, shared),
        (compare.make_parser(), effects.COMPARE, shared | set(ALWAYS["compare"].split())),
        (evaluate.make_parser(), effects.EVALUATE, set(ALWAYS["evaluate"].split())),
        (teacher.make_parser()[1]["finetune"], effects.FINETUNE, set(ALWAYS["finetune"].split())),
    ):
        names = {action.dest for action in parser._actions}
        assert names - set(conditions) - always == set()
        assert set(conditions) <= names


@pytest.mark.parametrize("name", ["train", "compare", "evaluate", "convert", "finetune"])
def test_examples_of_help_can_be_parsed(name: str) -> None:
    modules = {"train": train, "compare": compare, "evaluate": evaluate}
    parsers = {name: module.make_parser() for name, module in modules.items()} | teacher.make_parser()[1]
    lines = (parsers[name].epilog or "").replace("\\\n", "").splitlines()[1:]
    assert len(lines) == 2
    for line in lines:
        parsers[name].parse_strictly([word for word in shlex.split(line)[3:] if word != name])


def test_fields_of_parsed_flags_are_those_of_the_parser() -> None:
    names = {action.dest for action in train.make_parser()._actions} - {"help", "debug"}
    assert names == {field.name for field in dataclasses.fields(train.TrainFlags)}


def test_flags_that_have_an_effect_are_accepted():
    for argv in (
        ["--clip=global", "--clip_norm=1", "--weight_decay=1e-4", "--decay_mode=scaled"],
        ["--clip_norm=1", "--decay_kernels_only"],
        ["--write_back", "--teacher=t", "--views_per_shard=9"],
        ["--strategy=mirrored", "--replicas=2", "--sync_batch_norm"],
    ):
        parse_effective(train.make_parser(), [*LOCAL, *argv], effects.TRAIN)
    bucket = ["--store=gs://b/s", "--workdir=w", "--shard_cache_bytes=1"]
    parse_effective(train.make_parser(), bucket, effects.TRAIN)


@pytest.mark.parametrize(
    "flag", ["--teacher=t", "--data_cache_bytes=1", "--eval_batch_size=3"], ids=lambda flag: flag[2:9]
)
def test_flag_without_effect_on_this_store_is_refused(three_epochs: Path, flag: str):
    store = StoreReader(three_epochs)
    with pytest.raises(UserError) as error:
        options(arguments(three_epochs, Path("w"), None, flag), store).check_teacher()
    assert str(error.value).startswith(flag)
