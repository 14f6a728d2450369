"""trainer.targets.arms: the views and targets of each arm, and that nothing else differs between arms."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import EXIT_USER_ERROR, DataError
from pipeline.inputs.locate import load_teacher, open_dataset
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from tests import stores
from tests.runs import (
    Batch,
    arguments,
    assert_same_batches,
    assert_same_weights,
    checkpoint_weights,
    fail,
    losses,
    metrics,
    numpy_batches,
    start_run,
)
from trainer.targets.arms import ARMS, UnmixedViews, other_views, with_targets
from trainer.targets.batches import Targets

BATCH = 5
EPOCHS = 3
STEPS = EPOCHS * stores.N // BATCH


def write(path: Path, spec: Spec, data_dir: Path, teacher: Path) -> Path:
    worker = ShardWorker(stores.job_for(path, spec, data_dir, teacher))
    stores.write_store(worker, epochs=EPOCHS, eval_splits=("test", "train"))
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, spec: Spec, data_dir: Path, teacher_path: Path) -> Path:
    """51 mixed views and the evaluation crops of both splits, with float32 logits."""
    changed = dataclasses.replace(spec, codec="float32")
    return write(tmp_path_factory.mktemp("mixed") / "store", changed, data_dir, teacher_path)


@pytest.fixture(scope="module")
def unmixed(tmp_path_factory: pytest.TempPathFactory, spec: Spec, data_dir: Path, teacher_path: Path) -> Path:
    """The same boxes and flips without mixup."""
    policy = dataclasses.replace(spec.policy, mixup=False)
    changed = dataclasses.replace(spec, codec="float32", policy=policy)
    return write(tmp_path_factory.mktemp("unmixed") / "store", changed, data_dir, teacher_path)


def open_targets(name: str, path: Path, data_dir: Path, *, cache: int = 0) -> Targets:
    """The targets of an arm."""
    store = StoreReader(path)
    dataset = open_dataset(store, "views", data_dir=str(data_dir))
    return Targets(store, dataset, ARMS[name], batch_size=BATCH, image_cache_bytes=cache)


def batches_of(name: str, path: Path, data_dir: Path, *, cache: int = 0, start: int = 0) -> list[Batch]:
    """The batches of an arm from step `start` on."""
    return numpy_batches(open_targets(name, path, data_dir, cache=cache), start, STEPS)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_shows_the_student_the_stored_crops_in_the_store_s_order(
    name: str, mixed: Path, data_dir: Path
):
    replayed = batches_of("offline", mixed, data_dir)
    for ours, theirs in zip(batches_of(name, mixed, data_dir), replayed, strict=True):
        np.testing.assert_array_equal(ours["views"], theirs["views"])
        np.testing.assert_array_equal(ours["crops"][:BATCH], theirs["crops"][:BATCH])
        if name in ("offline", "online"):
            np.testing.assert_array_equal(ours["ratio"], theirs["ratio"])
            np.testing.assert_array_equal(ours["partner"], theirs["partner"])
            np.testing.assert_array_equal(ours["crops"], theirs["crops"])
        else:
            assert (ours["ratio"] == 1).all()
            assert not (theirs["ratio"] == 1).any()
        if ARMS[name].live:
            assert not ours["stored"].any()
        else:
            assert "stored" not in ours


def test_fixed_has_one_logit_vector_per_image_that_of_its_evaluation_crop(mixed: Path, data_dir: Path):
    store = StoreReader(mixed)
    evaluated = store.eval_reader("train").read(np.arange(stores.N)).logits
    seen: dict[int, np.ndarray] = {}
    for batch in batches_of("fixed", mixed, data_dir):
        for example, logits in zip(store.views.read(batch["views"]).example, batch["logits"], strict=True):
            np.testing.assert_array_equal(logits, seen.setdefault(int(example), logits))
            np.testing.assert_array_equal(logits, evaluated[example])
    assert len(seen) == stores.N
    assert len(np.unique(np.stack(list(seen.values())), axis=0)) == stores.N


@pytest.mark.parametrize("cache", [0, 1 << 30], ids=["encoded", "cached"])
def test_independent_shows_the_teacher_another_crop_of_the_same_image(
    mixed: Path, data_dir: Path, cache: int
):
    store = StoreReader(mixed)
    crops = {
        int(view): crop
        for batch in batches_of("offline", mixed, data_dir)
        for view, crop in zip(batch["views"], batch["crops"], strict=False)
    }
    differ = 0
    for batch in batches_of("independent", mixed, data_dir, cache=cache):
        others = other_views(batch["views"], num_examples=stores.N, seed=store.spec.seed)
        np.testing.assert_array_equal(
            store.views.read(others).example, store.views.read(batch["views"]).example
        )
        epochs = batch["views"] // stores.N
        np.testing.assert_array_equal(others // stores.N, np.where(epochs == 0, 1, epochs - 1))
        for row, other in enumerate(others):
            if int(other) in crops:
                np.testing.assert_array_equal(batch["teacher_crops"][row], crops[int(other)])
            differ += not np.array_equal(batch["teacher_crops"][row], batch["crops"][row])
    assert differ >= 0.8 * STEPS * BATCH  # an image of a pixel or of one color has only one crop


@pytest.mark.parametrize("name", ["fixed", "independent"])
def test_resumed_run_sees_the_same_batches(name: str, mixed: Path, data_dir: Path):
    whole = batches_of(name, mixed, data_dir)
    for start in (1, 4, STEPS - 1):
        assert_same_batches(batches_of(name, mixed, data_dir, start=start), whole[start:])


def test_every_arm_s_crops_are_checked(mixed: Path, forged_data_dir: Path):
    for name in ARMS:
        with pytest.raises(tf.errors.OpError, match="source fingerprint"):
            batches_of(name, mixed, forged_data_dir)


def test_evaluation_logits_of_another_image_are_refused(mixed: Path, data_dir: Path, tmp_path: Path):
    store = StoreReader(mixed)
    swapped = UnmixedViews(store.views, functools.partial(with_targets, store.eval_reader("test")))
    source = open_targets("fixed", mixed, data_dir).input.source
    inside = np.flatnonzero(store.views.read(np.arange(stores.N)).example < 7)[:1]
    with pytest.raises(DataError, match=r"eval/ \(test\)"):
        swapped.fetch(inside, source)


# Runs.


def final_weights(workdir: Path) -> list[np.ndarray]:
    """Weights and optimizer state."""
    weights = checkpoint_weights(workdir)
    return [weights[name] for name in sorted(weights)]


def train(name: str, store: Path, data_dir: Path, teacher: Path, workdir: Path, *, steps: int) -> None:
    """Trains an arm, without the evaluation and export after the last step."""
    flags = [f"--arm={name}", "--learning_rate=0.01", "--log_every=1"]
    flags += [f"--teacher={teacher}"] if ARMS[name].live else []
    lengths = [f"--steps={steps}", f"--eval_every={steps}"]
    start_run(arguments(store, workdir, data_dir, *flags, *lengths)).train()


@pytest.mark.usefixtures("deterministic")
def test_without_mixup_offline_online_and_consistent_are_equal_and_the_others_are_not(
    unmixed: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    for name in ARMS:
        train(name, unmixed, data_dir, teacher_path, tmp_path / name, steps=4)
    curves = {name: losses(tmp_path / name) for name in ARMS}
    assert len(curves["offline"]) == 4
    for name in ("online", "consistent"):
        assert curves[name] == curves["offline"]  # bit for bit: the teacher runs in the store's batches
        assert_same_weights(final_weights(tmp_path / name), final_weights(tmp_path / "offline"))
    for name in ("fixed", "independent"):
        assert abs(curves[name][1] - curves["offline"][1]) > 1e-3
    schedules = [[line["learning_rate"] for line in metrics(tmp_path / name, "train")] for name in ARMS]
    assert all(schedule == schedules[0] for schedule in schedules)


@pytest.mark.usefixtures("deterministic")
def test_offline_and_online_loss_curves_are_bit_equal(
    mixed: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    for name in ("offline", "online"):
        train(name, mixed, data_dir, teacher_path, tmp_path / name, steps=STEPS)
    assert losses(tmp_path / "online") == losses(tmp_path / "offline")
    assert len(set(losses(tmp_path / "offline").values())) == STEPS
    assert_same_weights(final_weights(tmp_path / "online"), final_weights(tmp_path / "offline"))


def test_arms_start_from_equal_weights_though_a_keras_teacher_is_built_first(
    spec: Spec, data_dir: Path, tmp_path: Path
):
    teacher = tmp_path / "teacher.keras"
    stores.keras_teacher().save(teacher)
    store = write(tmp_path / "store", stores.make_spec(data_dir, teacher), data_dir, teacher)
    expected = None
    for name in ARMS:
        flags = [f"--arm={name}", *([f"--teacher={teacher}"] if ARMS[name].live else [])]
        run = start_run(arguments(store, tmp_path / name, data_dir, *flags))
        assert (run.teachers is not None) == ARMS[name].live
        expected = expected or run.student.get_weights()
        assert_same_weights(run.student.get_weights(), expected)


def test_logit_that_the_codec_cannot_hold_is_named_by_view(
    mixed: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    run = start_run(
        arguments(
            mixed, tmp_path, data_dir, "--arm=independent", f"--teacher={teacher_path}", "--log_every=1"
        )
    )
    assert run.teachers is not None
    assert run.explain_divergence(2, 3) is None
    store = StoreReader(mixed)
    teacher = load_teacher(store.spec, str(teacher_path))
    (member,) = run.teachers.members
    broken = dataclasses.replace(member, teacher=lambda views: teacher(views) + tf.constant(np.inf))
    run.teachers = dataclasses.replace(run.teachers, members=(broken,))
    assert "view 10" in str(run.explain_divergence(2, 3))


# Refusals.


def test_arm_without_what_it_needs_names_what_to_precompute(
    published_store: Path,
    one_epoch: Path,
    mixed: Path,
    data_dir: Path,
    teacher_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    cases = {
        (published_store, "--arm=fixed"): "--eval_splits=test,train",
        (one_epoch, "--arm=independent"): "--epochs=2",
        (mixed, "--arm=online --epochs=4"): "--epochs=3",
        (mixed, f"--arm=consistent --write_back --teacher={teacher_path}"): "--write_back",
    }
    for (store, flags), remedy in cases.items():
        code, message = fail(arguments(store, tmp_path / "run", data_dir, *flags.split()), capsys)
        assert code == EXIT_USER_ERROR
        assert remedy in message
    assert not (tmp_path / "run").exists()


def test_run_of_another_arm_is_not_continued(
    mixed: Path,
    data_dir: Path,
    teacher_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    train("fixed", mixed, data_dir, teacher_path, tmp_path, steps=2)
    code, message = fail(arguments(mixed, tmp_path, data_dir, "--steps=2"), capsys)
    assert code == EXIT_USER_ERROR
    assert "arm" in message
    assert "fixed" in message


def test_other_views_of_an_epoch_are_all_of_one_other_epoch():
    others = other_views(np.arange(7 * 4), num_examples=7, seed=3).reshape(4, 7)
    assert [sorted(row) for row in others.tolist()] == [
        list(range(7 * epoch, 7 * epoch + 7)) for epoch in (1, 0, 1, 2)
    ]
