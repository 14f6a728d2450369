"""pipeline.api: a store in a notebook."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline import DataError, Inception, Store, Teacher, UserError, open_store, sample_views
from pipeline.pages.views import replay_views
from tests import stores
from tests.buckets import BUCKET, upload_tree


@pytest.fixture(scope="module")
def opened(published_store: Path, data_dir: Path) -> Store:
    """51 views of 17 examples."""
    return open_store(published_store, data_dir=data_dir)


def test_a_store_prints_what_it_holds(opened: Store):
    text = str(opened)
    for fact in (
        "51",
        "3 epochs",
        "17 examples",
        "small_photos:1.0.0",
        "inception",
        "24 x 24",
        "5 classes",
        "float16",
    ):
        assert fact in text
    assert text.splitlines()[-2].split() == ["temperature", "2"]
    assert repr(opened) == text
    assert opened.temperature == 2
    assert opened.epochs == 3
    assert len(opened.class_names) == stores.CLASSES


def test_a_store_is_a_sequence_of_views(opened: Store):
    assert len(opened) == len(list(opened)) == 51
    assert [view.index for view in opened[10:17:3]] == [10, 13, 16]
    assert [view.index for view in opened[-2:]] == [49, 50]
    assert opened[51:] == opened[5:5] == []
    assert opened[-1].index == opened[np.int64(50)].index == 50
    for outside in (51, -52):
        with pytest.raises(IndexError, match=str(outside)):
            opened[outside]
    with pytest.raises(TypeError):
        opened["0"]  # type: ignore[call-overload]


def test_a_view_is_its_record(opened: Store):
    records = opened.reader.views.read(np.arange(51))
    for view in opened[14:20]:
        row = view.index
        assert view.example == records.example[row]
        assert view.box == tuple(records.box[row])
        assert view.flip == records.flip[row]
        assert view.ratio == records.ratio[row]
        assert view.label == view.example % stores.CLASSES
        assert view.logits is not None
        np.testing.assert_array_equal(view.logits, records.logits[row])
    assert [view.partner for view in opened[15:18]] == [16, 0, 18]  # the last of an epoch: its first
    assert "logits" in repr(opened[0])


def test_pixels_of_a_view_are_what_the_student_is_shown(opened: Store):
    ((shown, partner),) = replay_views(opened.reader, opened.dataset, np.array([16]))
    view = opened[16]
    np.testing.assert_array_equal(view.crop, shown.crop)
    np.testing.assert_array_equal(view.partner_crop, partner.crop)
    assert (view.mixed.dtype, view.mixed.shape) == (np.float32, (stores.SIZE, stores.SIZE, 3))
    np.testing.assert_array_equal(view.mixed, shown.mixed)
    assert view.source.ndim == 3


def test_a_data_set_for_fit_has_static_shapes_and_its_length(opened: Store):
    data = opened.as_dataset(5, epochs=2)
    size = stores.SIZE
    views, logits = data.element_spec
    assert (views.shape, views.dtype) == ([5, size, size, 3], tf.float32)
    assert (logits.shape, logits.dtype) == ([5, stores.CLASSES], tf.float32)
    assert len(data) == 2 * 17 // 5
    assert len(opened.as_dataset(batch_size=5)) == 51 // 5
    batches = list(data.as_numpy_iterator())
    assert len(batches) == len(data)
    for step, (views, logits) in enumerate(batches):
        for row, view in enumerate(opened[5 * step : 5 * step + 5]):
            np.testing.assert_array_equal(views[row], view.mixed)
            np.testing.assert_array_equal(logits[row], view.logits)


def test_a_data_set_resumes_at_any_step(opened: Store):
    whole = list(opened.as_dataset(4).as_numpy_iterator())
    for step in range(len(whole)):
        data = opened.as_dataset(4, first_step=step, image_cache_bytes=step % 2 * 10**7)
        assert len(data) == len(whole) - step
        for found, expected in zip(next(data.as_numpy_iterator()), whole[step], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_numpy_batches_are_those_of_the_data_set(opened: Store):
    batches = opened.as_numpy(batch_size=6, epochs=1)
    assert len(batches) == 2
    expected = list(opened.as_dataset(6, epochs=1).as_numpy_iterator())
    for _ in range(2):  # can be iterated again
        for found, wanted in zip(batches, expected, strict=True):
            for ours, theirs in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(ours, theirs)
                assert ours.flags.writeable


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"batch_size": 0}, "`batch_size`=0"),
        ({"batch_size": 52}, "51"),
        ({"batch_size": 5, "epochs": 4}, "`epochs`=4"),
        ({"batch_size": 5, "epochs": 0}, "`epochs`=0"),
        ({"batch_size": 5, "first_step": 10}, "`first_step`=10"),
        ({"batch_size": 5, "first_step": -1}, "`first_step`=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(opened: Store, arguments: dict[str, int], shown: str):
    for batches in (opened.as_dataset, opened.as_numpy):
        with pytest.raises(UserError) as refused:
            batches(**arguments)
        assert shown in str(refused.value)
        assert "--" not in str(refused.value)


def test_a_figure_shows_the_views(opened: Store, tmp_path: Path):
    figure = opened.show([0, 50])
    assert len(figure.axes) == 10
    titles = [axes.get_title() for axes in figure.axes]
    view = opened[50]
    assert titles[5] == f"view 50: {opened.class_names[view.example % stores.CLASSES]}"
    (box,) = figure.axes[5].patches
    assert (box.get_height(), box.get_width()) == view.box[2:]
    np.testing.assert_array_equal(figure.axes[6].images[0].get_array(), view.crop)
    np.testing.assert_allclose(figure.axes[8].images[0].get_array(), view.mixed / 255)
    assert view.logits is not None
    names = [text.get_text() for text in figure.axes[9].texts]
    assert names == [opened.class_names[number] for number in np.argsort(-view.logits)]
    assert figure._repr_png_().startswith(b"\x89PNG")
    opened.show(3).savefig(tmp_path / "view.png")
    with pytest.raises(IndexError):
        opened.show([0, 51])


def test_what_does_not_match_is_refused_at_once(
    store: Path, data_dir: Path, other_data_dir: Path, forged_data_dir: Path
):
    with pytest.raises(DataError):
        open_store(store, data_dir=other_data_dir)
    forged = open_store(store, data_dir=forged_data_dir)  # by its metadata, the same data set
    with pytest.raises(DataError, match="view 0"):
        forged[0].crop  # noqa: B018
    with pytest.raises(DataError, match="view 5"):
        list(forged.as_numpy(5, first_step=1))
    with pytest.raises(tf.errors.OpError, match="view 0"):
        list(forged.as_dataset(5))
    shard = store / "views.array_record-00001"
    shard.rename(store / "lost")
    with pytest.raises(DataError, match=shard.name):
        open_store(store, data_dir=data_dir)
    assert len(open_store(store, data_dir=data_dir, verify=False)) == 51
    with pytest.raises(UserError, match="nowhere"):
        open_store(store.parent / "nowhere", data_dir=data_dir)


def test_a_machine_that_renders_differently_is_refused(
    store: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.store.spec.render_probe", lambda: "0123456789abcdef")
    with pytest.raises(DataError, match="0123456789abcdef"):
        open_store(store, data_dir=data_dir)
    assert open_store(store, data_dir=data_dir, verify=False)[0].crop.shape == (stores.SIZE, stores.SIZE, 3)


def test_sampled_views_are_those_of_the_store(opened: Store, data_dir: Path):
    drawn = sample_views(
        [0, 16, 50, 51],
        dataset=stores.DATASET,
        data_dir=data_dir,
        policy=Inception(image_size=stores.SIZE),
    )
    for found, stored in zip(drawn, [opened[0], opened[16], opened[50]], strict=False):
        for name in ("index", "example", "box", "flip", "ratio", "partner", "label"):
            assert getattr(found, name) == getattr(stored, name)
        np.testing.assert_array_equal(found.mixed, stored.mixed)
        assert found.logits is None
    assert drawn[3].index == 51  # past the end of the store
    (other,) = sample_views([0], dataset=stores.DATASET, data_dir=data_dir, seed=1)
    assert other.crop.shape == (128, 128, 3)
    assert other.box != drawn[0].box
    with pytest.raises(UserError, match="-1"):
        sample_views([3, -1], dataset=stores.DATASET, data_dir=data_dir)


def test_a_teacher_is_called_on_views(opened: Store, teacher_path: Path):
    teacher = Teacher(teacher_path, image_size=stores.SIZE, num_classes=stores.CLASSES)
    views = opened[:4]
    logits = teacher(np.stack([view.mixed for view in views])).numpy()
    stored = np.stack([view.logits for view in views])
    np.testing.assert_allclose(logits, stored, atol=0.01)  # of the codec


def test_a_store_in_a_bucket_is_the_same(
    opened: Store, published_store: Path, data_dir: Path, s3_port: int, s3: str
):
    upload_tree(s3_port, published_store, s3.removeprefix(f"s3://{BUCKET}/"))
    remote = open_store(s3, data_dir=data_dir)
    assert len(remote) == len(opened)
    assert s3 in str(remote)
    assert remote[16].box == opened[16].box
    for found, expected in zip(remote.as_numpy(17), opened.as_numpy(17), strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_numpy_batches_feed_pytorch(opened: Store):
    torch = pytest.importorskip("torch")
    student = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 6, stores.CLASSES)
    )
    loss = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    for views, logits in opened.as_numpy(batch_size=17, epochs=1):
        images = torch.from_numpy(views).permute(0, 3, 1, 2) / 255
        teacher = torch.log_softmax(torch.from_numpy(logits) / opened.temperature, -1)
        found = loss(torch.log_softmax(student(images) / opened.temperature, -1), teacher)
        found.backward()
        assert float(found.detach()) >= 0


def test_a_location_may_begin_with_the_home_directory(
    published_store: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(published_store, tmp_path / "store")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_store("~/store", data_dir=data_dir)) == 51
