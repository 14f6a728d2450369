"""trainer.run.options: resolved flags, and flags that are refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store.reader import StoreReader
from tests import stores
from tests.runs import arguments, options
from trainer.config.recipes import train_recipe
from trainer.flags.shared import ENDLESS_EVAL_EVERY, ENDLESS_WARMUP_STEPS
from trainer.flags.train import make_parser
from trainer.run.options import TrainOptions

WORKDIR = Path("work")


@pytest.fixture(scope="module")
def opened(published_store: Path) -> StoreReader:
    """51 views of 17 examples."""
    return StoreReader(published_store)


def ask(store: StoreReader, *extra: str) -> TrainOptions:
    return options(arguments(store.path, WORKDIR, None, *extra), store)


def test_default_length_is_that_of_the_store(opened: StoreReader):
    asked = ask(opened)
    assert asked.length.steps == 3 * stores.N // 5
    assert asked.length.online_from == asked.length.steps
    assert asked.temperature == opened.spec.temperature
    assert asked.warmup_steps == asked.length.steps // 20
    assert asked.eval_every == -(-asked.length.steps // 10)
    assert asked.eval_split == "test"


def test_flags_override_the_recipe_also_with_zeros_and_negations(opened: StoreReader):
    asked = ask(
        opened, "--weight_decay=0", "--no-temperature_squared", "--no-decay_kernels_only", "--warmup_steps=0"
    )
    recipe = train_recipe("default")
    assert asked.recipe == dataclasses.replace(
        recipe,
        student="tiny",
        batch_size=5,
        weight_decay=0.0,
        temperature_squared=False,
        decay_kernels_only=False,
        warmup_steps=0,
    )
    assert asked.warmup_steps == 0


def test_config_is_json_with_flags_and_resolved_values(opened: StoreReader):
    config = json.loads(json.dumps(ask(opened, "--steps=7", "--seed=3").to_json()))
    assert config["flags"]["steps"] == 7
    assert config["flags"]["seed"] == 3
    assert config["length"]["steps"] == 7
    assert config["recipe"]["student"] == "tiny"


def test_more_epochs_than_stored_need_a_teacher(opened: StoreReader):
    with pytest.raises(UserError) as error:
        ask(opened, "--epochs=4")
    message = str(error.value)
    assert "65 views" in message
    assert "51 (3 epochs)" in message
    assert "--teacher" in message
    assert "--epochs=3" in message
    asked = ask(opened, "--epochs=4", "--teacher=somewhere")
    assert (asked.length.steps, asked.length.online_from) == (13, 10)


def test_steps_past_the_store_need_a_teacher(opened: StoreReader):
    assert ask(opened, "--steps=10").length.online_from == 10
    with pytest.raises(UserError, match="55 views"):
        ask(opened, "--steps=11")


def test_endless_run_needs_a_teacher(opened: StoreReader):
    with pytest.raises(UserError, match=r"--epochs=inf.*3 epochs"):
        ask(opened, "--epochs=inf")
    with pytest.raises(UserError, match=r"--epochs.*--steps"):
        ask(opened, "--epochs=inf", "--steps=3", "--teacher=somewhere")


def test_endless_run_has_its_own_defaults(opened: StoreReader):
    asked = ask(opened, "--epochs=inf", "--teacher=somewhere")
    assert (asked.length.steps, asked.length.online_from) == (math.inf, 10)
    assert (asked.warmup_steps, asked.eval_every) == (ENDLESS_WARMUP_STEPS, ENDLESS_EVAL_EVERY)
    asked = ask(opened, "--epochs=inf", "--teacher=somewhere", "--warmup_steps=7", "--eval_every=9")
    assert (asked.warmup_steps, asked.eval_every) == (7, 9)


def test_config_of_an_endless_run_is_json(opened: StoreReader):
    config = json.loads(json.dumps(ask(opened, "--epochs=inf", "--teacher=t").to_json(), allow_nan=False))
    assert config["flags"]["epochs"] == config["recipe"]["epochs"] == config["length"]["steps"] == "inf"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "Inf", "infinity", "nan"])
def test_invalid_numbers_of_epochs_are_refused(text: str):
    with pytest.raises(UserError, match=rf"--epochs.*{re.escape(text)}.*inf"):
        make_parser().parse_strictly(["--store=s", "--workdir=w", f"--epochs={text}"])


def test_epochs_and_steps_together_are_refused(opened: StoreReader):
    with pytest.raises(UserError, match=r"--epochs.*--steps"):
        ask(opened, "--epochs=1", "--steps=1")


def test_batch_larger_than_the_run_is_refused(opened: StoreReader):
    with pytest.raises(UserError, match=r"--batch_size=52.*3 epochs of 17"):
        ask(opened, "--batch_size=52")


@pytest.mark.parametrize("warmup", [10, 11])
def test_warm_up_as_long_as_the_run_needs_to_be_allowed(opened: StoreReader, warmup: int):
    with pytest.raises(UserError, match=rf"--warmup_steps={warmup}.*10 steps"):
        ask(opened, f"--warmup_steps={warmup}")
    assert ask(opened, f"--warmup_steps={warmup}", "--allow_short_run").warmup_steps == warmup
    assert ask(opened, "--warmup_steps=9").warmup_steps == 9


def test_recipe_mismatch_needs_to_be_allowed(opened: StoreReader):
    with pytest.raises(UserError, match=r"policy\.image_size: 32 in the recipe, 24 in the store"):
        ask(opened, "--recipe=demo")
    assert ask(opened, "--recipe=demo", "--allow_recipe_mismatch").recipe_name == "demo"


def test_temperature_that_a_topk_store_does_not_support_is_refused(make_store: Callable[..., Path]):
    store = StoreReader(make_store("topk3", epochs=1, codec="topk:3"))
    assert ask(store).temperature == ask(store, "--temperature=2").temperature == 2.0
    expected = r"--temperature=1:.*topk:3.*--temperature=2"
    with pytest.raises(UserError, match=expected):
        ask(store, "--temperature=1")
    with pytest.raises(UserError, match=r"--temperature=10:.*topk:3"):
        ask(store, "--recipe=keras_example", "--allow_recipe_mismatch")


def test_unknown_student_is_refused_with_the_choices(opened: StoreReader):
    with pytest.raises(UserError, match=r"`student`=resnet:.*resnet50v2.*tiny"):
        ask(opened, "--student=resnet")


def test_evaluation_split_that_is_not_in_the_store_is_refused(opened: StoreReader):
    with pytest.raises(UserError, match=r"`eval_split`=train: .*test"):
        ask(opened, "--eval_split=train")


@pytest.mark.parametrize(
    ("trained_on", "expected"), [("train", "test"), ("train+test", None), ("train[:90%]+test[3:]", None)]
)
def test_training_examples_are_evaluated_only_if_asked_for(
    published_store: Path, trained_on: str, expected: str | None
):
    store = StoreReader(published_store)
    store.spec = dataclasses.replace(
        store.spec, dataset=dataclasses.replace(store.spec.dataset, split=trained_on)
    )
    assert store.held_out_splits == ([] if expected is None else [expected])
    assert ask(store).eval_split == expected
    assert ask(store, "--eval_split=test").eval_split == "test"


def test_store_without_evaluation_logits_is_trained_on_without_evaluation(three_epochs: Path):
    assert ask(StoreReader(three_epochs)).eval_split is None


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--epoch=3", "did you mean --epochs?"),
        ("--batchsize=3", "did you mean --batch_size?"),
        ("--xyzzy", "--help lists the flags"),
    ],
)
def test_unknown_flag_is_refused_with_the_nearest(flag: str, hint: str):
    with pytest.raises(UserError) as error:
        make_parser().parse_strictly(["--store=a", "--workdir=b", flag])
    assert flag in str(error.value)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    "flag",
    [
        "--epochs=-1",
        "--epochs=0",
        "--epochs=ten",
        "--steps=0",
        "--batch_size=0",
        "--seed=-1",
        "--learning_rate=fast",
        "--clip=hard",
        "--log_every=0",
        "--checkpoint_every=0",
    ],
)
def test_value_out_of_range_is_refused_with_the_flag_and_the_value(flag: str):
    with pytest.raises(UserError) as error:
        make_parser().parse_strictly(["--store=a", "--workdir=b", flag])
    name, value = flag.split("=")
    assert name in str(error.value)
    assert value in str(error.value)


@pytest.mark.parametrize("missing", ["--store", "--workdir"])
def test_missing_flag_is_named(missing: str):
    given = [flag for flag in ("--store=a", "--workdir=b") if not flag.startswith(missing)]
    with pytest.raises(UserError, match=missing):
        make_parser().parse_strictly(given)


@pytest.mark.parametrize(
    "change",
    ["--batch_size=4", "--seed=1", "--temperature=3", "--learning_rate=0.1", "--sync_batch_norm"],
)
def test_identity_of_a_run_includes_what_a_checkpoint_depends_on(opened: StoreReader, change: str):
    assert ask(opened, change).identity({"spec": "digest"}) != ask(opened).identity({"spec": "digest"})


@pytest.mark.parametrize(
    "change", ["--steps=3", "--epochs=1", "--epochs=inf", "--log_every=1", "--warmup_steps=2"]
)
def test_identity_of_an_extended_run_is_the_same(opened: StoreReader, change: str):
    asked = ask(opened, change, *(["--teacher=somewhere"] if change == "--epochs=inf" else []))
    assert asked.identity({"spec": "digest"}) == ask(opened).identity({"spec": "digest"})


@pytest.mark.parametrize(
    "change",
    [
        *(
            "--warmup_steps=2",
            "--steps=3",
            "--follow",
            "--deterministic",
            "--jit_compile",
            "--sync_batch_norm",
        ),
        *(
            "--log_every=3",
            "--checkpoint_every=3",
            "--eval_every=3",
            "--steps_per_execution=2",
            "--student=small",
        ),
    ],
)
def test_workers_must_share_what_a_step_depends_on(opened: StoreReader, change: str):
    length = [] if change == "--steps=3" else ["--epochs=3"]
    assert ask(opened, *length, change).shared({"spec": "digest"}) != ask(opened, *length).shared(
        {"spec": "digest"}
    )


def test_workers_may_have_paths_and_memory_of_their_own(opened: StoreReader):
    own = (
        "--data_dir=elsewhere",
        "--image_cache_bytes=0",
        "--input_buffer_bytes=1000",
        "--eval_batch_size=3",
    )
    assert ask(opened, *own).shared({"spec": "digest"}) == ask(opened).shared({"spec": "digest"})
