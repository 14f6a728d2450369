"""trainer.run.describe: the lines that describe a run before it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.store.reader import StoreReader
from tests.runs import arguments, options
from trainer.models import size_notice
from trainer.run.describe import describe, describe_missing_split
from trainer.targets.arms import ARMS


def described(store: Path, *extra: str) -> str:
    opened = StoreReader(store)
    return describe(options(arguments(store, Path("run"), None, *extra), opened), opened)


def test_left_over_views_and_first_online_step_are_reported(three_epochs: Path) -> None:
    """The store has 51 views of 17 examples; a step has 5."""
    text = described(three_epochs, "--epochs=3")
    assert "the last 1 view" in text
    assert "online" not in text
    text = described(three_epochs, "--epochs=5", "--teacher=somewhere")
    assert "from step 10 on" in text


def test_evaluation_split_with_training_examples_is_reported(published_store: Path) -> None:
    opened = StoreReader(published_store)
    asked = options(arguments(published_store, Path("run"), None, "--eval_split=test"), opened)
    assert "not held out" not in describe(asked, opened)
    dataset = dataclasses.replace(opened.spec.dataset, split="train+test[:5]")
    opened.spec = dataclasses.replace(opened.spec, dataset=dataset)
    assert "--eval_split=test is not held out" in describe(asked, opened)


def test_missing_held_out_split_is_reported_with_a_remedy(three_epochs: Path) -> None:
    store = StoreReader(three_epochs)
    assert "--eval_splits=test,validation" in describe_missing_split(store, ["train", "test", "validation"])
    text = describe_missing_split(store, ["train"])
    assert "--split=train[:13]" in text
    assert "--eval_splits=train[13:]" in text


def test_student_that_is_slow_at_the_image_size_is_reported() -> None:
    assert size_notice("tiny", 32) is None
    assert size_notice("small", 128) is None
    assert "--student=small" in (size_notice("tiny", 128) or "")


def test_end_of_an_endless_run_is_reported(three_epochs: Path) -> None:
    text = described(three_epochs, "--epochs=inf", "--teacher=somewhere")
    assert "endlessly many" in text
    assert "SIGTERM" in text


def test_arm_is_reported_with_its_summary(three_epochs: Path) -> None:
    text = described(three_epochs, "--arm=consistent")
    assert "consistent" in text
    assert ARMS["consistent"].summary in text


def test_warm_up_longer_than_the_run_is_in_the_first_line(three_epochs: Path) -> None:
    text = described(three_epochs, "--warmup_steps=99", "--allow_short_run")
    first = text.splitlines()[0]
    assert "99 steps" in first
    assert "10 steps" in first
