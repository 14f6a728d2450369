"""trainer.run.describe: the lines that describe a run before it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.store.reader import Store
from tests.runs import arguments, options
from trainer.models import size_notice
from trainer.run.describe import describe, describe_missing_split


def described(store: Path, *extra: str) -> str:
    opened = Store(store)
    return describe(options(arguments(store, Path("run"), None, *extra), opened), opened)


def test_what_is_left_over_and_where_the_teacher_comes_in_is_told(three_epochs: Path) -> None:
    """51 views of 17 examples, 5 a step."""
    text = described(three_epochs, "--epochs=3")
    assert "1 views of the last epoch fill no batch" in text
    assert "online" not in text
    text = described(three_epochs, "--epochs=5", "--teacher=somewhere")
    assert "online teacher from step 10 on, with the continuing views" in text


def test_an_evaluation_split_that_is_trained_on_is_named(published_store: Path) -> None:
    opened = Store(published_store)
    asked = options(arguments(published_store, Path("run"), None, "--eval_split=test"), opened)
    assert "not held out" not in describe(asked, opened)
    dataset = dataclasses.replace(opened.spec.dataset, split="train+test[:5]")
    opened.spec = dataclasses.replace(opened.spec, dataset=dataset)
    assert "--eval_split=test is not held out" in describe(asked, opened)


def test_remedies_for_a_missing_held_out_split_are_named(three_epochs: Path) -> None:
    store = Store(three_epochs)
    assert "--eval_splits=test,validation" in describe_missing_split(store, ["train", "test", "validation"])
    text = describe_missing_split(store, ["train"])
    assert "--split=train[:13]" in text
    assert "--eval_splits=train[13:]" in text


def test_a_student_that_is_slow_at_the_image_size_is_named() -> None:
    assert size_notice("tiny", 32) is None
    assert size_notice("small", 128) is None
    assert "--student=small" in (size_notice("tiny", 128) or "")


def test_a_run_without_an_end_says_how_it_ends(three_epochs: Path) -> None:
    text = described(three_epochs, "--epochs=inf", "--teacher=somewhere")
    assert "endlessly many" in text
    assert "then a constant rate until SIGTERM" in text


def test_an_arm_says_what_it_is_trained_on(three_epochs: Path) -> None:
    text = described(three_epochs, "--arm=consistent")
    assert "arm consistent: a live teacher on the same crop, without mixup" in text


def test_a_warm_up_longer_than_the_run_is_the_first_line(three_epochs: Path) -> None:
    text = described(three_epochs, "--warmup_steps=99", "--allow_short_run")
    assert text.startswith("warm-up of 99 steps is longer than this run of 10")
