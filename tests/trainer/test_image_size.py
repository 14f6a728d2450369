"""`--image_size`: a store is replayed at another size than the teacher's, with the same views and the same guarantees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline import open_store
from pipeline.errors import DataError, UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.locate import load_teacher
from pipeline.precomputing.worker import ShardWorker
from pipeline.storage.files import write_json
from pipeline.store.combination import combine
from pipeline.store.reader import StoreReader
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.headers import image_sizes
from pipeline.views.input import CHECK_EVERY
from pipeline.views.mix import mix
from pipeline.views.policies.light import Light
from pipeline.views.render import Window, decode, eval_renderer, resize_bilinear
from tests import runs, stores
from tests.runs import arguments, fail, numpy_batches, start_run
from tests.stores import DATASET, SIZE
from trainer.compare import main as compare
from trainer.run.evaluation import Evaluator
from trainer.step.distiller import shown_to_teacher
from trainer.targets.batches import Targets
from trainer.targets.online_teacher import OnlineTeacher, OnlineTeachers
from trainer.train import main

SMALLER, LARGER = 16, 40
B = 5


@pytest.fixture(scope="module")
def dataset(data_dir: Path) -> Dataset:
    return Dataset(DATASET, "train", data_dir=data_dir)


def at(store: Path, size: int):
    return combine([StoreReader(store)], image_size=size)


def direct(dataset: Dataset, example: int, box: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """The crop by its definition: whole decode, slice, resize, flip."""
    (encoded,) = dataset.read(np.array([example]))
    y, x, height, width = box.tolist()
    region = decode(tf.constant(encoded))[y : y + height, x : x + width]
    crop = resize_bilinear(region, size).numpy()
    return crop[:, ::-1] if flip else crop


@pytest.mark.parametrize("size", [SMALLER, LARGER])
@pytest.mark.parametrize("cache", [0, 1 << 30], ids=["encoded", "cached"])
def test_crops_are_a_direct_rendering_of_the_records_boxes(
    published_store: Path, dataset: Dataset, size: int, cache: int
):
    own = numpy_batches(Targets(StoreReader(published_store), dataset, batch_size=B), 0, 10)
    targets = Targets(at(published_store, size), dataset, batch_size=B, image_cache_bytes=cache)
    records = StoreReader(published_store).views.read(np.arange(51))
    batches = numpy_batches(targets, 0, 10)
    for step, (batch, expected) in enumerate(zip(batches, own, strict=True)):
        assert batch["crops"].shape == (B + 2, size, size, 3)
        for name in ("views", "partner", "ratio", "logits"):
            np.testing.assert_array_equal(batch[name], expected[name])
        for row in range(B):
            view = step * B + row
            np.testing.assert_array_equal(
                batch["crops"][row],
                direct(dataset, records.example[view], records.box[view], records.flip[view], size),
            )


def test_at_the_stores_size_nothing_changes(published_store: Path, dataset: Dataset):
    same = at(published_store, SIZE)
    assert isinstance(same, StoreReader)
    assert Targets(same, dataset, batch_size=B).input.others == ()


def test_a_batch_does_not_depend_on_where_the_input_starts(published_store: Path, dataset: Dataset):
    targets = Targets(at(published_store, LARGER), dataset, batch_size=1)
    whole = numpy_batches(targets, 0, 51)
    for start in (1, CHECK_EVERY, 40):
        runs.assert_same_batches(numpy_batches(targets, start, 51), whole[start:])
    assert targets.batches(3, 51).cardinality().numpy() == 48


def test_a_changed_image_is_found_at_once(published_store: Path, forged_data_dir: Path):
    """Also in a batch whose crops are not compared at the store's size."""
    forged = Dataset(DATASET, "train", data_dir=forged_data_dir)
    store = open_store(published_store, data_dir=forged_data_dir, verify=False)
    for first in (0, 1):
        with pytest.raises(DataError, match="source fingerprint"):
            list(store.as_numpy(B, first_step=first, image_size=SMALLER))
    with pytest.raises(tf.errors.OpError, match="source fingerprint"):
        numpy_batches(Targets(at(published_store, SMALLER), forged, batch_size=B), 0, 1)


@pytest.mark.parametrize("view", [0, CHECK_EVERY + 1])
def test_a_crop_that_renders_differently_is_found_in_the_compared_batch(
    store: Path, data_dir: Path, view: int
):
    right = StoreReader(store).views.read(np.array([view])).crop_hash[0]
    runs.forge_records(store, view, crop_hash=int(right) ^ 1)
    opened = open_store(store, data_dir=data_dir)
    batches, passed = iter(opened.as_numpy(1, image_size=SMALLER)), CHECK_EVERY if view else 0
    # View 33 is a crop of the batches 32, as a partner, and 33; of these, batch 32 is compared.
    assert len([next(batches) for _ in range(passed)]) == passed
    with pytest.raises(DataError, match=f"view {view} .*crop fingerprint"):
        next(batches)


def test_python_api_renders_any_size(published_store: Path, data_dir: Path, dataset: Dataset):
    opened = open_store(published_store, data_dir=data_dir)
    batches = opened.as_dataset(B, image_size=LARGER)
    assert batches.element_spec[0].shape == (B, LARGER, LARGER, 3)
    assert batches.cardinality().numpy() == len(list(opened.as_numpy(B, image_size=LARGER))) == 10
    expected = next(iter(Targets(at(published_store, LARGER), dataset, batch_size=B).batches(0, 1)))
    mixed = mix(expected["crops"], expected["partner"], expected["ratio"])
    np.testing.assert_array_equal(next(iter(batches))[0], mixed)


def light_store(path: Path, data_dir: Path, teacher_path: Path) -> Path:
    spec = stores.make_spec(data_dir, teacher_path, policy=Light(image_size=SIZE))
    stores.write_store(ShardWorker(stores.job_for(path, spec, data_dir, teacher_path)), epochs=1)
    return path


def test_light_is_refused_with_the_reason(
    tmp_path: Path, data_dir: Path, teacher_path: Path, capsys: pytest.CaptureFixture[str]
):
    store = light_store(tmp_path / "light", data_dir, teacher_path)
    code, line = fail(arguments(store, tmp_path / "run", data_dir, "--image_size=40"), capsys)
    assert code == 2
    assert all(part in line for part in ("--image_size=40", "light", "24"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="light"):
        open_store(store, data_dir=data_dir).as_dataset(B, image_size=40)


def test_size_out_of_range_is_refused(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, line = fail(arguments(published_store, tmp_path, data_dir, "--image_size=5000"), capsys)
    assert code == 2
    assert "--image_size=5000" in line
    assert "4096" in line


# Evaluation crops.


@pytest.mark.parametrize("crop", [EvalCrop(), EvalCrop(kind="central", scale=0.875)], ids=lambda c: c.kind)
def test_evaluation_crops_are_those_of_a_store_of_that_size(
    tmp_path: Path, data_dir: Path, teacher_path: Path, crop: EvalCrop
):
    spec = stores.make_spec(data_dir, teacher_path, eval_crop=crop)
    path = tmp_path / "store"
    stores.write_store(ShardWorker(stores.job_for(path, spec, data_dir, teacher_path)), epochs=1)
    test = Dataset(DATASET, "test", data_dir=data_dir)
    evaluator = Evaluator(
        at(path, LARGER), test, batch_size=4, temperature=2.0, temperature_squared=False, cache_bytes=0
    )
    crops = np.concatenate([batch.numpy() for batch, _ in evaluator._batches()])[: test.num_examples]
    renderer = eval_renderer(crop, LARGER)
    for example, encoded in enumerate(test.read(np.arange(test.num_examples))):
        (box,) = crop.boxes(image_sizes([encoded]), LARGER)
        expected = renderer.finish(renderer.cut(tf.constant(encoded), Window.of(box)))
        np.testing.assert_array_equal(crops[example], expected)


# Training.


@pytest.mark.slow
def test_a_run_trains_evaluates_and_resumes_bit_equal(
    published_store: Path, data_dir: Path, tmp_path: Path, deterministic: None, capsys
):
    flags = [f"--image_size={LARGER}", "--deterministic", "--log_every=1", "--eval_every=5", "--steps=10"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(arguments(published_store, whole, data_dir, *flags))
    assert f"{SIZE} pixels in one batch of {CHECK_EVERY}" in capsys.readouterr().out
    begun = start_run(arguments(published_store, parts, data_dir, *flags))
    begun.distiller.fit(begun.targets.batches(0, 3), verbose=0)
    begun.checkpoints.save(3)
    write_json(parts / "config.json", begun.options.to_json())
    main(arguments(published_store, parts, data_dir, *flags))
    assert runs.losses(parts) == {k: v for k, v in runs.losses(whole).items() if k > 3}
    result = json.loads((whole / "result.json").read_text())
    assert result["image_size"] == LARGER
    assert result["spec"] == StoreReader(published_store).spec.digest()
    assert result["evaluation"]["test"]["examples"] == 7
    student = tf.keras.models.load_model(whole / "student")
    assert student.input_shape[1:] == (LARGER, LARGER, 3)


def test_a_checkpoint_of_another_size_is_refused(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = start_run(arguments(published_store, tmp_path / "run", data_dir, "--image_size=40", "--steps=3"))
    run.checkpoints.save(0)
    write_json(tmp_path / "run" / "config.json", run.options.to_json())
    code, line = fail(
        arguments(published_store, tmp_path / "run", data_dir, "--image_size=32", "--steps=3"), capsys
    )
    assert code == 2
    assert "image_size: 32 asked for, 40 in the checkpoint" in line
    code, line = fail(arguments(published_store, tmp_path / "run", data_dir, "--steps=3"), capsys)
    assert (code, "image_size" in line) == (2, True)


# The live teacher sees its own size.


def teachers_of(store: Path, teacher_path: Path) -> OnlineTeachers:
    spec = StoreReader(store).spec
    teacher = load_teacher(spec, str(teacher_path))
    return OnlineTeachers((OnlineTeacher(teacher, str(teacher_path), spec),))


def test_online_teacher_sees_the_views_of_the_precompute(
    published_store: Path, float32_store: Path, dataset: Dataset, teacher_path: Path
):
    """Its logits for views 0 to 49, drawn, are the stored ones."""
    store, teachers = at(float32_store, LARGER), teachers_of(float32_store, teacher_path)
    targets = Targets(store, dataset, batch_size=B, continued_from=0, with_record=True)
    stored = StoreReader(float32_store).views.read(np.arange(50))
    for step, batch in enumerate(targets.batches(0, 10)):
        assert batch["crops"].shape == (B + 2, LARGER, LARGER, 3)
        views = shown_to_teacher(batch, mix(batch["crops"], batch["partner"], batch["ratio"]))
        assert views.shape == (B, SIZE, SIZE, 3)
        rows = slice(step * B, step * B + B)
        np.testing.assert_array_equal(teachers.round_trip(teachers(views)), stored.logits[rows])
        for name in ("example", "box", "flip", "crop_hash", "source_hash"):
            np.testing.assert_array_equal(batch["record"][name], getattr(stored, name)[rows], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_offline_then_online_is_online_from_the_start(
    one_epoch: Path, three_epochs: Path, data_dir: Path, teacher_path: Path, tmp_path: Path, jit: bool
):
    flags = [f"--image_size={SMALLER}", "--steps=8", "--log_every=1", "--learning_rate=0.01"]
    flags += ["--jit_compile", "--steps_per_execution=2"] * jit
    losses = []
    for store, more in ((one_epoch, []), (three_epochs, ["--arm=online"])):
        workdir = tmp_path / store.parent.name
        main(arguments(store, workdir, data_dir, *flags, f"--teacher={teacher_path}", *more))
        losses.append(runs.losses(workdir))
    assert losses[0].keys() == losses[1].keys()
    np.testing.assert_allclose(
        list(losses[0].values()), list(losses[1].values()), rtol=0 if not jit else 1e-6
    )


def test_written_back_records_are_those_of_the_precompute(
    one_epoch: Path, precompute, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    store = Path(shutil.copytree(one_epoch, tmp_path / "store"))
    flags = [f"--image_size={SMALLER}", "--write_back", "--epochs=2", f"--teacher={teacher_path}"]
    main(arguments(store, tmp_path / "run", data_dir, *flags, "--views_per_shard=17"))
    stores.assert_same_store(store, precompute(2, views_per_shard=17))


@pytest.mark.parametrize(
    "arm",
    [
        pytest.param("fixed", marks=pytest.mark.slow),
        "independent",
        pytest.param("consistent", marks=pytest.mark.slow),
    ],
)
def test_arms_train_at_another_size(
    published_store: Path, data_dir: Path, teacher_path: Path, tmp_path: Path, arm: str, spec
):
    store = published_store
    if arm == "fixed":
        store = tmp_path / "store"
        worker = ShardWorker(stores.job_for(store, spec, data_dir, teacher_path))
        stores.write_store(worker, epochs=1, eval_splits=("train", "test"))
    teacher = [] if arm == "fixed" else [f"--teacher={teacher_path}"]
    run = start_run(
        arguments(store, tmp_path / "run", data_dir, "--image_size=40", "--steps=2", f"--arm={arm}", *teacher)
    )
    assert run.train()["steps"] == 2


@pytest.mark.slow
def test_compare_trains_both_arms_at_another_size(
    published_store: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    flags = ["--image_size=40", "--student=tiny", "--batch_size=5", "--epochs=1", "--deterministic"]
    flags += ["--log_every=1", "--no-measure", f"--teacher={teacher_path}", f"--data_dir={data_dir}"]
    compare([f"--store={published_store}", f"--workdir={tmp_path / 'both'}", *flags])
    result = json.loads((tmp_path / "both" / "result.json").read_text())
    assert result["recipe"]["image_size"] == 40
    assert result["pairs"][0]["largest_loss_difference"] == 0
