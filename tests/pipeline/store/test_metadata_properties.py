"""Whatever a store's metadata hold, opening it is a DataError or a correct read: no other exception, no hang, little memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import inspect
from pipeline.errors import DataError, UnpublishedError, UserError
from pipeline.inputs.locate import find_teacher, open_dataset
from pipeline.store.layout import PENDING
from pipeline.store.metadata import INFO_FILE, MANIFEST_FILE
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardInfo, ShardTask, adopt_shard, note_text
from pipeline.store.spec import SPEC_FILE, Spec
from pipeline.views.records import ViewRecords
from tests import mutations
from tests.mutations import FAST, THOROUGH, bounded_memory, dumps, every_mutation, printable_output

# Not features.json, which nothing of ours reads: TFDS does.
FILES = (SPEC_FILE, MANIFEST_FILE, INFO_FILE, f"eval/{MANIFEST_FILE}", f"eval/{INFO_FILE}")
# A store of three epochs: what `read` returns of it, whatever else its metadata say.
VIEWS = np.array([0, 19, 20, 50])


class Victim:
    """A store whose metadata are replaced, and put back."""

    def __init__(self, store: Path, data_dir: Path) -> None:
        self.store, self.data_dir = store, data_dir
        self.trees = {name: json.loads((store / name).read_text()) for name in FILES}
        self.records = StoreReader(store).views.read(VIEWS)

    def write(self, trees: dict[str, Any], *, consistent: bool) -> None:
        """Writes all files; consistent ones state the digest of the identity as it is now."""
        trees = {**self.trees, **trees}
        if consistent:
            trees = with_fitting_digests(trees)
        for name, tree in trees.items():
            (self.store / name).write_bytes(dumps(tree))

    def check(self) -> str:
        """Opens the store as every command does; `refused` or `read`."""
        with bounded_memory(), printable_output():
            try:
                store = StoreReader(self.store)
                _read_like(store, self.records)
                assert inspect.main([f"--store={self.store}"]) == 0
                print(store.held_out_splits)
                for split in ("views", *store.eval_splits):
                    _in_the_users_words(lambda split=split: open_dataset(store, split, data_dir=None))
                _in_the_users_words(lambda: find_teacher(store.spec, None, store=str(self.store)))
            except (
                DataError,
                UnpublishedError,
            ) as error:  # a forged number of examples leaves no whole epoch
                print(error)
                return "refused"
        return "read"


def with_fitting_digests(trees: dict[str, Any]) -> dict[str, Any]:
    try:
        digest = hashlib.sha256(dumps_sorted(trees[SPEC_FILE]["identity"])).hexdigest()
        out = {**trees, SPEC_FILE: {**trees[SPEC_FILE], "digest": digest}}
        for name in (MANIFEST_FILE, f"eval/{MANIFEST_FILE}"):
            out[name] = {**trees[name], "spec": digest}
    except (KeyError, TypeError, ValueError):  # no digest fits
        return trees
    return out


def dumps_sorted(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True).encode()


def _in_the_users_words(call: Any) -> None:
    """What a store says of the user's own paths may be wrong: exit 2, in one line."""
    try:
        call()
    except UserError as error:
        print(error)


def _read_like(store: StoreReader, expected: ViewRecords) -> None:
    """Records are the ones that were written, or refused."""
    found = store.views.read(VIEWS[store.views.num_records > VIEWS])
    for name in ("example", "box", "crop_hash"):
        np.testing.assert_array_equal(
            getattr(found, name), getattr(expected, name)[store.views.num_records > VIEWS]
        )
    for split in store.eval_splits:
        store.eval_reader(split).read(np.array([0]))


@pytest.fixture(scope="module")
def victim(
    published_store: Path, data_dir: Path, teacher_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Victim:
    store = Path(shutil.copytree(published_store, tmp_path_factory.mktemp("victim") / "store"))
    whole = json.loads((store / SPEC_FILE).read_text())
    whole["provenance"] = {
        "command": "python -m pipeline.precompute",
        "directory": "/",
        "data_dir": str(data_dir),
        "teacher": str(teacher_path),
        "embedded_default": False,
        "recipe": None,
        "versions": {"tensorflow": "2.15.1"},
        "processor": "a test's",
    }
    (store / SPEC_FILE).write_text(json.dumps(whole))
    victim = Victim(store, data_dir)
    victim.write({}, consistent=False)
    assert victim.check() == "read"
    return victim


def check(victim: Victim, data: st.DataObject) -> None:
    trees = data.draw(mutations.mutations(victim.trees))
    victim.write(trees, consistent=data.draw(st.booleans()))
    victim.check()


@FAST
@given(st.data())
def test_any_metadata_are_refused_or_read(victim: Victim, data: st.DataObject) -> None:
    check(victim, data)


@pytest.mark.slow
@THOROUGH
@given(st.data())
def test_any_metadata_are_refused_or_read_thoroughly(victim: Victim, data: st.DataObject) -> None:
    check(victim, data)


@pytest.mark.slow
@pytest.mark.parametrize("consistent", [False, True])
def test_every_change_of_every_field_is_refused_or_read(victim: Victim, *, consistent: bool) -> None:
    """Removed, retyped, nested, blown up; and how many of them were read, which is information alone."""
    outcomes: dict[str, int] = {"refused": 0, "read": 0}
    for what, trees in every_mutation(victim.trees):
        victim.write(trees, consistent=consistent)
        try:
            outcomes[victim.check()] += 1
        except BaseException as error:
            error.add_note(what)
            raise
    assert outcomes["refused"] > outcomes["read"] > 0


@FAST
@given(st.data())
def test_any_note_on_a_pending_shard_is_dropped_or_adopted(
    victim: Victim, spec: Spec, data: st.DataObject
) -> None:
    """The file that the note is on is compared with it, so that a wrong one costs a computation and nothing else."""
    task = ShardTask(split="views", number=2, first=40, records=11)
    written = json.loads(json.dumps(victim.trees[MANIFEST_FILE]["splits"]["views"]["shards"][2]))
    info = ShardInfo(**written)
    tree = json.loads(note_text(task, info, digest=spec.digest()))
    (victim.store / PENDING).mkdir(exist_ok=True)
    note = victim.store / PENDING / f"{task.name}.json"
    note.write_bytes(dumps(data.draw(mutations.mutations({"note": tree}))["note"]))
    found = adopt_shard(victim.store, task, digest=spec.digest())
    assert found is None or (found.bytes, found.sha256) == (info.bytes, info.sha256)
