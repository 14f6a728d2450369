"""Stores that somebody made to do harm, or that a disk has damaged: refused in one line, or read as they were."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError, UserError
from pipeline.inputs.locate import find_teacher
from pipeline.precomputing.store_session import open_session
from pipeline.storage.lock import LOCK_FILE, writer_lock
from pipeline.store.layout import PENDING, SPEC_LIMIT
from pipeline.store.metadata import INFO_FILE, MANIFEST_FILE
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardTask, adopt_shard
from pipeline.store.spec import SPEC_FILE, Spec
from tests import stores

ROOT = Path(__file__).resolve().parents[3]
Change = Callable[[Any], Any]


def rewrite(path: Path, change: Change) -> None:
    """Changes a JSON file; `change` works in place or gives the new tree."""
    tree = json.loads(path.read_text())
    changed = change(tree)
    path.write_text(json.dumps(tree if changed is None else changed))


def rewrite_spec(store: Path, change: Change) -> None:
    """Changes a spec's identity, with a digest that fits, in manifests too: nothing but the values is wrong."""

    def spec(whole: Any) -> None:
        change(whole["identity"])
        whole["digest"] = hashlib.sha256(json.dumps(whole["identity"], sort_keys=True).encode()).hexdigest()

    rewrite(store / SPEC_FILE, spec)
    digest = json.loads((store / SPEC_FILE).read_text())["digest"]
    for directory in (store, store / "eval"):
        rewrite(directory / MANIFEST_FILE, lambda whole: whole.update(spec=digest))


def read_everything(store: Path) -> None:
    opened = StoreReader(store)
    opened.check_files()
    for reader in (opened.views, *map(opened.eval_reader, opened.eval_splits)):
        reader.read(np.array([0]))


@pytest.fixture
def little_memory() -> Any:
    """None of these may take memory for what a file claims."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6


# Code.


def test_nothing_in_a_store_is_unpickled_or_run() -> None:
    """No module that makes objects or code of bytes is imported, nor such a function called, in either package."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("trainer/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    {alias.name.split(".")[0] for alias in node.names}
                    if isinstance(node, ast.Import)
                    else set()
                )
                names |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
                assert not names & forbidden, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}, path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


def test_a_teacher_that_came_with_the_store_is_not_loaded(store: Path, spec: Spec) -> None:
    (store / "evil").mkdir()
    for provenance in (
        {"teacher": str(store / "evil")},
        {"teacher": "evil", "directory": str(store)},
        {"teacher": f"{store}/../{store.name}/evil"},
    ):
        hostile = dataclasses.replace(spec, provenance=provenance)
        with pytest.raises(UserError, match="`teacher`"):
            find_teacher(hostile, None, store=store)
    assert find_teacher(spec, str(store / "evil"), store=store) == str(store / "evil")


# Paths.


@pytest.mark.parametrize(
    "name", ["../views", "/etc/views", "..", ".", "a/b", "", "x" * 200, "a\0b", "views\n", 5, None]
)
def test_a_split_name_that_could_be_a_path_is_refused(store: Path, name: Any) -> None:
    rewrite(store / "eval" / INFO_FILE, lambda info: info["splits"][0].update(name=name))
    rewrite(
        store / "eval" / MANIFEST_FILE, lambda whole: whole.update(splits={name: whole["splits"].pop("test")})
    )
    with pytest.raises(DataError, match=r"eval/dataset_info\.json: "):
        StoreReader(store)


@pytest.mark.parametrize(
    "template", ["../{SPLIT}-{SHARD_INDEX}", "/etc/{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}", 7]
)
def test_a_template_that_leads_elsewhere_is_refused(store: Path, template: Any) -> None:
    rewrite(store / INFO_FILE, lambda info: info["splits"][0].update(filepathTemplate=template))
    with pytest.raises(DataError, match=r"dataset_info\.json: .*(file names|filepathTemplate)"):
        StoreReader(store)


@pytest.mark.parametrize(
    "name",
    [
        SPEC_FILE,
        MANIFEST_FILE,
        INFO_FILE,
        "views.array_record-00001",
        "eval",
        "eval/test.array_record-00000",
        PENDING,
    ],
)
def test_a_link_out_of_the_store_is_refused_by_readers_and_writers(
    store: Path, spec: Spec, tmp_path: Path, name: str
) -> None:
    outside, path = tmp_path / "outside", store / name
    if path.exists():
        path.rename(outside)
    else:
        outside.mkdir()
    path.symlink_to(outside)
    expected = rf"{path}: .*{outside}"
    with pytest.raises(DataError, match=expected):
        StoreReader(store)
    with pytest.raises(DataError, match=expected), open_session(str(store)) as session:
        session.check(spec)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")  # to be made by a writer
    with pytest.raises(DataError, match="symbolic link"), open_session(str(store)) as session:
        session.check(spec)


def test_links_inside_the_store_and_to_the_store_are_followed(store: Path, tmp_path: Path) -> None:
    path = store / "views.array_record-00001"
    path.rename(store / "kept")
    path.symlink_to("kept")
    (tmp_path / "link").symlink_to(store)
    read_everything(tmp_path / "link")


def test_a_lock_that_is_a_link_does_not_empty_another_file(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    (store / LOCK_FILE).symlink_to(other)
    with pytest.raises(UserError, match="cannot be written"), writer_lock(store):
        pass
    assert other.read_text() == "precious"


@pytest.mark.parametrize("name", [SPEC_FILE, MANIFEST_FILE, INFO_FILE, "views.array_record-00000"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(store: Path, name: str) -> None:
    (store / name).unlink()
    os.mkfifo(store / name)
    with pytest.raises((DataError, UserError)):
        read_everything(store)


# Sizes.


@pytest.mark.usefixtures("little_memory")
def test_a_manifest_of_a_million_million_records_takes_no_memory(store: Path) -> None:
    open_session = stores.N * 10**10
    rewrite(
        store / MANIFEST_FILE, lambda m: m["splits"]["views"]["shards"][2].update(records=open_session - 40)
    )
    rewrite(
        store / INFO_FILE, lambda i: i["splits"][0]["shardLengths"].__setitem__(2, str(open_session - 40))
    )
    opened = StoreReader(store)
    assert opened.epochs == 10**10
    opened.views.read(np.array([0, 39]))  # of the shards that are as they say
    for view in (40, open_session - 1):
        with pytest.raises(DataError, match=f"11 readable records, expected {open_session - 40}"):
            opened.views.read(np.array([view]))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 10**9},
        {"num_classes": 0},
        {"num_classes": -5},
        {"num_classes": 5.0},
        {"num_classes": "5"},
        {"num_classes": 10**9, "codec": "topk:3"},
        {"codec": "topk:999999"},
        {"codec": "pickle"},
        {"codec": ["float16"]},
        {"seed": 1e30},
        {"seed": True},
        {"temperature": 0},
        {"temperature": "hot"},
        {"policy": {"image_size": 10**9}},
        {"policy": {"image_size": 24.0}},
        {"policy": {"image_size": [24]}},
        {"policy": {"mixup_block": 10**30}},
        {"policy": {"mixup_block": True}},
        {"policy": {"area_range": [0.1, 0.2, 0.3]}},
        {"policy": {"area_range": 5}},
        {"policy": {"__class__": "os"}},
        {"eval_crop": {"scale": 1e12}},
        {"eval_crop": {"kind": "../x"}},
        {"teacher": {"batch_size": 10**9}},
        {"teacher": {"batch_size": "4"}},
        {"teacher": {"batch_size": None}},
        {"teacher": {"deep": {"er": {}}}},
        {"teacher": {"value_range": "0..2"}},
        {"teacher": {"fingerprint": "\x1b[2J"}},
        {"provenance": None},
        {"dataset": {"num_examples": 10**15}},
        {"dataset": {"num_examples": 0}},
        {"dataset": {"num_examples": "17"}},
        {"dataset": {"name": ["a"]}},
        {"format": 10**9},
        {"unknown": 1},
    ],
    ids=str,
)
def test_a_spec_with_impossible_numbers_is_refused(store: Path, change: dict[str, Any]) -> None:
    def merge(identity: dict[str, Any]) -> None:
        for key, value in change.items():
            if isinstance(value, dict):
                identity[key].update(value)
            else:
                identity[key] = value

    rewrite_spec(store, merge)
    with pytest.raises(DataError, match=r"spec\.json: "):
        StoreReader(store)


@pytest.mark.parametrize("name", ["dataset", "teacher", "policy", "eval_crop", "num_classes", "codec"])
def test_a_spec_that_lacks_something_or_has_another_type_is_refused(store: Path, name: str) -> None:
    for change in (lambda identity: identity.pop(name), lambda identity: identity.update({name: []})):
        rewrite_spec(store, lambda identity, change=change: (change(identity), None)[1])
        with pytest.raises(DataError, match=r"spec\.json: not a store's spec"):
            StoreReader(store)


@pytest.mark.parametrize("part", ["dataset", "teacher"])
def test_a_nested_key_that_is_missing_is_named(store: Path, spec: Spec, part: str) -> None:
    for field in getattr(spec, part).to_json():
        copy = store / SPEC_FILE
        before = copy.read_text()
        rewrite_spec(store, lambda identity, name=field: (identity[part].pop(name), None)[1])
        with pytest.raises(DataError, match=rf"spec\.json: .*identity\.{part}\.{field}: missing"):
            StoreReader(store)
        copy.write_text(before)


def test_a_store_without_provenance_opens(store: Path) -> None:
    for change in (
        lambda whole: whole.pop("provenance") and None,
        lambda whole: whole.update(provenance={"command": None, "of_a_later_version": 1}),
    ):
        rewrite(store / SPEC_FILE, change)
        read_everything(store)


@pytest.mark.parametrize(
    "provenance",
    [[], "text", {"versions": {"a": {"b": 1}}}, {"versions": "2.15"}, {"teacher": ["x"]}, {"directory": 5}],
)
def test_a_provenance_of_another_shape_is_refused(store: Path, provenance: Any) -> None:
    rewrite(store / SPEC_FILE, lambda whole: whole.update(provenance=provenance))
    with pytest.raises(DataError, match=r"spec\.json: not a store's spec"):
        StoreReader(store)


@pytest.mark.parametrize(
    "change",
    [
        {"records": 2**41},
        {"records": -1},
        {"records": 20.0},
        {"records": "20"},
        {"records": True},
        {"bytes": 2**60},
        {"bytes": 0.5},
        {"sha256": "z" * 64},
        {"sha256": 5},
        {"sha256": "../" * 21 + "x"},
        {"kl": float("nan")},
        {"kl": float("inf")},
        {"kl": "0"},
        {"kl": 10**400},
        {"max_error": None},
        {"path": "/etc/passwd"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_manifest_with_impossible_numbers_is_refused(store: Path, change: dict[str, Any]) -> None:
    rewrite(store / MANIFEST_FILE, lambda m: m["splits"]["views"]["shards"][0].update(change))
    with pytest.raises(DataError, match=r"manifest\.json"):
        StoreReader(store)


@pytest.mark.parametrize(
    "lengths",
    [
        [],
        ["0"],
        ["-1"],
        ["2_0", "20", "11"],
        ["20"] * 100_000,
        ["x"],
        [[]],
        None,
        "20",
        {"a": 1},
        ["9" * 5000],
    ],
    ids=lambda x: str(x)[:20],
)
def test_impossible_shard_lengths_are_refused(store: Path, lengths: Any) -> None:
    rewrite(store / INFO_FILE, lambda info: info["splits"][0].update(shardLengths=lengths))
    with pytest.raises(DataError, match=r"dataset_info\.json"):
        StoreReader(store)


@pytest.mark.parametrize("name", [SPEC_FILE, MANIFEST_FILE, INFO_FILE])
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"splits":' * 100_000,
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b"",
        b"\xff\xfe",
        b"{}",
        b"1" * 6000,
    ],
    ids=lambda content: str(content[:12]),
)
def test_json_of_another_shape_is_refused(store: Path, name: str, content: bytes) -> None:
    (store / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        StoreReader(store)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", [SPEC_FILE, MANIFEST_FILE, INFO_FILE])
def test_json_without_end_is_not_read_to_its_end(store: Path, name: str) -> None:
    with (store / name).open("r+b") as file:
        file.truncate(1 << 40)  # takes no room on disk
    with pytest.raises(DataError, match=rf"{name}: .*longer than [\d,]+ bytes"):
        StoreReader(store)
    assert SPEC_LIMIT < 2 << 20


def test_a_note_on_a_pending_shard_is_not_believed(store: Path) -> None:
    task = ShardTask(split="views", number=3, first=51, records=17)
    (store / PENDING).mkdir()
    note = store / PENDING / f"{task.name}.json"
    for content in (b"[" * 200_000, b'{"info": ' * 50_000, b"\xff", b" " * (1 << 20)):
        note.write_bytes(content)
        assert adopt_shard(store, task, digest="d" * 64) is None
