"""Several `--store`: one run on the mean logits of several teachers, each view compared with every store."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline import open_store
from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.locate import load_teacher
from pipeline.precomputing.worker import ShardWorker
from pipeline.storage.files import write_json
from pipeline.store.classes import Classes
from pipeline.store.combination import average, average_in_graph, combine
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.mix import mix
from pipeline.views.policies.inception import Inception
from tests import runs, stores
from tests.runs import arguments, fail, numpy_batches, start_run
from tests.stores import DATASET, SIZE
from trainer.compare import main as compare
from trainer.run.evaluation import Evaluator
from trainer.run.following import Following
from trainer.step.distiller import shown_to_teacher
from trainer.targets.batches import Targets
from trainer.targets.online_teacher import OnlineTeacher, OnlineTeachers
from trainer.train import main

LARGE = 32
B = 5


@pytest.fixture(scope="module")
def dataset(data_dir: Path) -> Dataset:
    return Dataset(DATASET, "train", data_dir=data_dir)


@pytest.fixture(scope="module")
def large_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another teacher, at 32 pixels; read only."""
    module = stores.PlainTeacher()
    for weight in module.weights:
        weight.assign(-0.7 * weight)
    inputs = {"image": tf.TensorSpec([None, LARGE, LARGE, 3], tf.float32)}
    return stores.save_teacher(tmp_path_factory.mktemp("large") / "teacher", module=module, inputs=inputs)


@pytest.fixture(scope="module")
def large_spec(data_dir: Path, large_teacher: Path) -> Spec:
    return stores.make_spec(
        data_dir, large_teacher, batch_size=3, policy=Inception(image_size=LARGE), codec="int8"
    )


def write(path: Path, spec: Spec, data_dir: Path, teacher: Path, *, epochs: int = 2) -> Path:
    worker = ShardWorker(stores.job_for(path, spec, data_dir, teacher))
    stores.write_store(worker, epochs=epochs, eval_splits=("train", "test"))
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory, large_spec: Spec, data_dir: Path, large_teacher: Path) -> Path:
    """Two epochs on the view axis of `published_store`, with other logits in another codec; read only."""
    return write(tmp_path_factory.mktemp("large") / "store", large_spec, data_dir, large_teacher)


def pair(published_store: Path, large: Path, **combination):
    return combine([StoreReader(published_store), StoreReader(large)], **combination)


def flags(*paths: Path) -> list[str]:
    """`--store` for all but the first, which `arguments` gives."""
    return [f"--store={path}" for path in paths]


# The mean.


def test_mean_is_the_same_in_numpy_graph_and_xla():
    generator = np.random.default_rng(0)
    logits = [generator.normal(0, 20, (64, 9)).astype(np.float32) for _ in range(3)]
    weights = [float(np.float32(1 / 3))] * 3
    expected = average(logits, weights)
    np.testing.assert_allclose(expected, np.mean(logits, axis=0), rtol=1e-5, atol=1e-6)
    for jit in (False, True):
        found = tf.function(lambda *parts: average_in_graph(parts, weights), jit_compile=jit)(*logits)
        np.testing.assert_array_equal(found, expected)


def test_weights_are_shares(published_store: Path, large: Path):
    assert pair(published_store, large).weights == (0.5, 0.5)
    assert pair(published_store, large, weights=[3, 1]).weights == (0.75, 0.25)


# Views.


@pytest.mark.parametrize("size", [SIZE, LARGE, 40])
def test_views_are_those_of_each_store_with_the_mean_logits(
    published_store: Path, large: Path, dataset: Dataset, size: int
):
    store = pair(published_store, large, image_size=size)
    assert store.epochs == 2  # the shortest
    own = Targets(combine([StoreReader(large)], image_size=size), dataset, batch_size=B)
    batches = numpy_batches(Targets(store, dataset, batch_size=B), 0, 6)
    both = [StoreReader(path).views.read(np.arange(30)).logits for path in (published_store, large)]
    for step, (batch, expected) in enumerate(zip(batches, numpy_batches(own, 0, 6), strict=True)):
        for name in ("views", "crops", "partner", "ratio"):
            np.testing.assert_array_equal(batch[name], expected[name])
        rows = slice(step * B, step * B + B)
        np.testing.assert_array_equal(batch["logits"], average([logits[rows] for logits in both], [0.5, 0.5]))


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("flip", lambda value: not value),
        ("box", lambda value: value - [0, 0, 1, 0]),
        ("source_hash", lambda value: value ^ 1),
    ],
)
def test_a_view_that_differs_between_the_stores_is_refused_with_both_sides(
    store: Path, large: Path, column: str, change
):
    value = getattr(StoreReader(store).views.read(np.array([7])), column)[0]
    runs.forge_records(store, 7, **{column: change(value)})
    with pytest.raises(DataError) as caught:
        pair(store, large).views.read(np.arange(10))
    for part in ("view 7", column, str(store), str(large)):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("size", "found"), [(SIZE, True), (LARGE, False)], ids=["every view", "one batch of 32"]
)
def test_crops_are_compared_with_the_store_of_the_rendered_size(
    store: Path, large: Path, data_dir: Path, size: int, found: bool
):
    """A wrong fingerprint outside of the first batch."""
    right = StoreReader(store).views.read(np.array([12])).crop_hash[0]
    runs.forge_records(store, 12, crop_hash=int(right) ^ 1)
    batches = open_store([store, large], data_dir=data_dir).as_numpy(B, image_size=size)
    if found:
        with pytest.raises(DataError, match=r"view 12 .*crop fingerprint"):
            list(batches)
    else:
        assert len(list(batches)) == 6
    runs.forge_records(store, 2, crop_hash=0)
    with pytest.raises(DataError, match=r"view 2 .*crop fingerprint"):
        next(iter(open_store([store, large], data_dir=data_dir).as_numpy(B, image_size=size)))


def test_python_api(published_store: Path, large: Path, data_dir: Path):
    both = open_store([published_store, large], weights=[1, 3], data_dir=data_dir)
    one, other = (open_store(path, data_dir=data_dir) for path in (published_store, large))
    assert (len(both), both.epochs) == (34, 2)
    assert str(large) in repr(both)
    np.testing.assert_array_equal(both[3].logits, average([one[3].logits, other[3].logits], [0.25, 0.75]))
    np.testing.assert_array_equal(both[3].mixed, one[3].mixed)
    with pytest.raises(UserError, match="weights"):
        open_store([published_store, large], weights=[1], data_dir=data_dir)


# Refusals.


def test_stores_that_do_not_fit_are_refused_with_both_sides(
    published_store: Path, large_spec: Spec, data_dir: Path, large_teacher: Path, tmp_path: Path, capsys
):
    central = EvalCrop(kind="central", scale=0.875)
    for name, change, parts in (
        ("seed", {"seed": 5}, ("seed: 0 in", "5 in")),
        ("crop", {"eval_crop": central}, ("resize_small in", "central in")),
    ):
        other = write(
            tmp_path / name, dataclasses.replace(large_spec, **change), data_dir, large_teacher, epochs=1
        )
        code, line = fail(arguments(published_store, tmp_path / "run", data_dir, *flags(other)), capsys)
        assert code == 2
        assert all(part in line for part in (*parts, str(published_store), str(other)))
    assert not (tmp_path / "run").exists()


def test_the_same_store_twice_is_refused(published_store: Path, store: Path, tmp_path: Path, capsys):
    for again in (published_store, store):  # the directory itself, and a copy
        code, line = fail(arguments(published_store, tmp_path / "run", None, *flags(again)), capsys)
        assert code == 2
        assert str(again) in line


def test_codecs_of_other_temperatures_are_refused(published_store: Path, large: Path):
    one, other = StoreReader(published_store), StoreReader(large)
    one.spec = dataclasses.replace(one.spec, codec="topk:3", temperature=2.0)
    other.spec = dataclasses.replace(other.spec, codec="topk:3", temperature=10.0)
    with pytest.raises(UserError, match=r"2 in .*10 in"):
        combine([one, other])


def test_other_numbers_of_classes_are_refused(published_store: Path, large: Path):
    other = StoreReader(large)
    other.spec = dataclasses.replace(other.spec, num_classes=9)
    with pytest.raises(UserError, match=r"classes: 5 in .*9 in"):
        combine([StoreReader(published_store), other])


def test_other_class_names_are_refused(published_store: Path, large: Path):
    one, other = StoreReader(published_store), StoreReader(large)
    one.classes = Classes(names=("a", "b", "c", "d", "e"))
    assert combine([one, other]).classes == one.classes
    other.classes = Classes(names=("a", "b", "x", "d", "e"))
    with pytest.raises(UserError, match=r"2: c in .*x in"):
        combine([one, other])


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--store_weights=1,2,3"], "--store_weights=1,2,3"),
        (["--store_weights=1,0"], "--store_weights"),
        (["--teacher=TEACHER"], "--teacher="),
        (["--write_back", "--teacher=TEACHER", "--teacher=TEACHER"], "--write_back"),
    ],
    ids=["weights", "zero", "teachers", "write_back"],
)
def test_mistakes_in_flags_are_refused(
    published_store: Path, large: Path, teacher_path: Path, tmp_path: Path, capsys, extra, named
):
    given = [flag.replace("TEACHER", str(teacher_path)) for flag in extra]
    code, line = fail(arguments(published_store, tmp_path / "run", None, *flags(large), *given), capsys)
    assert code == 2
    assert named in line


def test_weights_of_a_single_store_have_no_effect(published_store: Path, tmp_path: Path, capsys):
    code, line = fail(arguments(published_store, tmp_path / "run", None, "--store_weights=1"), capsys)
    assert (code, "--store_weights=1" in line) == (2, True)


# Training.


def test_a_run_shows_each_teacher_and_their_mean_and_resumes_bit_equal(
    published_store: Path, large: Path, data_dir: Path, tmp_path: Path, deterministic: None, capsys
):
    extra = [*flags(large), "--store_weights=1,3", "--steps=6", "--log_every=1", "--deterministic"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(arguments(published_store, whole, data_dir, *extra))
    printed = capsys.readouterr().out
    result = json.loads((whole / "result.json").read_text())
    test = result["evaluation"]["test"]
    readers = [StoreReader(path) for path in (published_store, large)]
    logits = [reader.eval_reader("test").read(np.arange(7)).logits for reader in readers]
    labels = np.arange(7) % stores.CLASSES
    for teacher, path, own in zip(test["teachers"], (published_store, large), logits, strict=True):
        assert teacher["store"] == str(path)
        assert teacher["top1"] == (own.argmax(1) == labels).mean()
        assert f"teacher of {path}" in printed
    mean = average(logits, [0.25, 0.75])
    assert test["teacher_top1"] == (mean.argmax(1) == labels).mean()
    assert result["stores"] == [reader.spec.digest() for reader in readers]
    assert result["store_weights"] == [0.25, 0.75]

    begun = start_run(arguments(published_store, parts, data_dir, *extra))
    begun.distiller.fit(begun.targets.batches(0, 2), verbose=0)
    begun.checkpoints.save(2)
    write_json(parts / "config.json", begun.options.to_json())
    swapped = arguments(large, parts, data_dir, f"--store={published_store}", *extra[1:])
    code, line = fail(swapped, capsys)
    assert code == 3
    assert "stores" in line
    main(arguments(published_store, parts, data_dir, *extra))
    assert runs.losses(parts) == {k: v for k, v in runs.losses(whole).items() if k > 2}


def test_evaluation_crops_are_compared_with_each_store(published_store: Path, large: Path, data_dir: Path):
    """The boxes of `resize_small` differ by size; each is that of its definition."""
    dataset = Dataset(DATASET, "test", data_dir=data_dir)
    arguments = {"batch_size": 4, "temperature": 2.0, "temperature_squared": False, "cache_bytes": 0}
    own = Evaluator(StoreReader(large), dataset, **arguments)
    both = Evaluator(pair(published_store, large, image_size=LARGE), dataset, **arguments)
    for (crops, _), (expected, _) in zip(both._batches(), own._batches(), strict=True):
        np.testing.assert_array_equal(crops, expected)


# Past the end.


def live(*members: tuple[Path, Path]) -> OnlineTeachers:
    found = []
    for path, teacher in members:
        spec = StoreReader(path).spec
        found.append(OnlineTeacher(load_teacher(spec, str(teacher)), str(teacher), spec))
    return OnlineTeachers(tuple(found), (0.5, 0.5))


@pytest.mark.parametrize("size", [SIZE, 40])
def test_live_teachers_give_the_mean_of_the_stored_logits(
    published_store: Path, large: Path, dataset: Dataset, teacher_path: Path, large_teacher: Path, size: int
):
    store = pair(published_store, large, image_size=size)
    teachers = live((published_store, teacher_path), (large, large_teacher))
    stored = store.views.read(np.arange(20)).logits
    for step, batch in enumerate(Targets(store, dataset, batch_size=B, continued_from=0).batches(0, 4)):
        views = shown_to_teacher(batch, mix(batch["crops"], batch["partner"], batch["ratio"]))
        found = teachers.round_trip(teachers(views))
        np.testing.assert_array_equal(found, stored[step * B : step * B + B])


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_offline_then_online_is_online_from_the_start(
    published_store: Path,
    one_epoch: Path,
    large: Path,
    large_spec: Spec,
    data_dir: Path,
    teacher_path: Path,
    large_teacher: Path,
    tmp_path: Path,
    jit: bool,
):
    extra = ["--steps=6", "--log_every=1", "--learning_rate=0.01"]
    extra += ["--jit_compile", "--steps_per_execution=2"] * jit
    extra += [f"--teacher={teacher_path}", f"--teacher={large_teacher}"]
    losses = []
    for name, first, more in (("short", one_epoch, []), ("online", published_store, ["--arm=online"])):
        main(arguments(first, tmp_path / name, data_dir, *flags(large), *extra, *more))
        losses.append(list(runs.losses(tmp_path / name).values()))
    assert len(losses[0]) == 6  # evaluated, and so logged, after each step
    # XLA compiles the teachers and the student as one program, which rounds differently from the student alone.
    np.testing.assert_allclose(*losses, rtol=1e-4 if jit else 0)


@pytest.mark.slow
def test_compare_trains_on_several_stores(
    published_store: Path,
    large: Path,
    data_dir: Path,
    teacher_path: Path,
    large_teacher: Path,
    tmp_path: Path,
    capsys,
):
    extra = ["--student=tiny", "--batch_size=5", "--epochs=1", "--deterministic", "--log_every=1"]
    extra += [f"--teacher={teacher_path}", f"--teacher={large_teacher}", f"--data_dir={data_dir}"]
    workdir = tmp_path / "both"
    compare([f"--store={published_store}", *flags(large), f"--workdir={workdir}", "--no-measure", *extra])
    result = json.loads((workdir / "result.json").read_text())
    assert result["pairs"][0]["largest_loss_difference"] == 0
    assert [teacher["store"] for teacher in result["teachers"]] == [str(published_store), str(large)]
    assert result["cost"]["teacher_passes"]["online"] == 2 * 3 * B
    assert "teachers.1.top1" in (workdir / "report.html").read_text()
    assert "mean of the teachers' logits" in capsys.readouterr().out
    again = tmp_path / "again"
    compare([f"--from={workdir}", f"--workdir={again}"])
    assert json.loads((again / "result.json").read_text())["teachers"] == result["teachers"]


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param("fixed", marks=pytest.mark.slow),
        "independent",
        pytest.param("consistent", marks=pytest.mark.slow),
    ],
)
def test_arms_train_on_several_stores(
    spec: Spec, large: Path, data_dir: Path, teacher_path: Path, large_teacher: Path, tmp_path: Path, arm: str
):
    store = write(tmp_path / "store", spec, data_dir, teacher_path)
    teachers = [] if arm == "fixed" else [f"--teacher={teacher_path}", f"--teacher={large_teacher}"]
    run = start_run(
        arguments(store, tmp_path / "run", data_dir, *flags(large), "--steps=2", f"--arm={arm}", *teachers)
    )
    assert run.train()["teacher_forward_passes"] == (0 if arm == "fixed" else 2 * 2 * B)


def test_following_waits_for_the_shortest_store(one_epoch: Path, large: Path, data_dir: Path, tmp_path: Path):
    short = Path(shutil.copytree(one_epoch, tmp_path / "short"))
    run = start_run(
        arguments(
            short, tmp_path / "run", data_dir, *flags(large), "--follow", "--epochs=2", "--eval_every=1"
        )
    )
    assert isinstance(run.following, Following)
    assert run.following.wait(0, pause=lambda _: None) == 3  # of 6
    with pytest.raises(TryAgainError, match="short"):
        run.following.wait(3, pause=lambda _: None)
