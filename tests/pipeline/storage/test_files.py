"""pipeline.storage.files: files and directories appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import threading
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.storage.files import (
    TEMPORARY,
    atomic_directory,
    atomic_file,
    check_links,
    remove_temporaries,
    sha256_of,
    write_text,
)


def test_atomic_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(TEMPORARY)
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no_links"])
def test_atomic_file_without_replace_keeps_an_existing_file(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a file system without hard links."""
    if not links:

        def refuse(path: Path, target: Path) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    path = tmp_path / "file"
    with atomic_file(path, replace=False) as temporary:
        temporary.write_text("first")
    with pytest.raises(FileExistsError), atomic_file(path, replace=False) as temporary:
        temporary.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_one_of_several_writers_succeeds_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them reach the rename at the same moment if they can."""

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    together, rename = threading.Barrier(4), Path.replace

    def replace(temporary: Path, path: Path) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(timeout=0.5)
        rename(temporary, path)

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    monkeypatch.setattr(Path, "replace", replace)
    path, refused = tmp_path / "file", []

    def write(number: int) -> None:
        try:
            with atomic_file(path, replace=False) as temporary:
                temporary.write_text(str(number))
        except FileExistsError:
            refused.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted([*refused, int(path.read_text())]) == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def publish_half(path: Path, error: BaseException) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt("no")], ids=repr)
def test_atomic_file_leaves_nothing_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error), match="no"):
        publish_half(tmp_path / "file", error)
    assert list(tmp_path.iterdir()) == []


def test_atomic_file_leaves_the_old_file_after_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ValueError, match="no"):
        publish_half(path, ValueError("no"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_file_that_is_not_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file") as first, atomic_file(tmp_path / "file") as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first"


def test_remove_temporaries_removes_nothing_else(tmp_path: Path) -> None:
    (tmp_path / f"{TEMPORARY}views.array_record-00001-77-ab").touch()
    (tmp_path / "views.array_record-00000").touch()
    (tmp_path / f"{TEMPORARY}student" / "variables").mkdir(parents=True)
    remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["views.array_record-00000"]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def write_version(path: Path, number: int, *, replace: bool, error: BaseException | None = None) -> None:
    with atomic_directory(path, replace=replace) as fresh:
        (fresh / "below").mkdir(parents=True)
        (fresh / "below" / "file").write_text(f"version {number}")
        if error is not None:
            raise error


def test_atomic_directory_replaces_another_and_leaves_nothing_else(tmp_path: Path) -> None:
    for leftover in (".old-student", ".tmp-student"):  # from a killed process
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").touch()
    for number in (1, 2):
        write_version(tmp_path / "student", number, replace=True)
        assert (tmp_path / "student" / "below" / "file").read_text() == f"version {number}"
        assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("replace", [False, True])
def test_atomic_directory_leaves_the_old_one_after_an_exception(tmp_path: Path, replace: bool) -> None:
    write_version(tmp_path / "student", 1, replace=False)
    with pytest.raises(KeyboardInterrupt):
        write_version(tmp_path / "student", 2, replace=replace, error=KeyboardInterrupt())
    assert (tmp_path / "student" / "below" / "file").read_text() == "version 1"
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_atomic_directory_replaces_only_if_asked_to(tmp_path: Path) -> None:
    write_version(tmp_path / "student", 1, replace=False)
    with pytest.raises(OSError, match="not empty"):
        write_version(tmp_path / "student", 2, replace=False)
    assert (tmp_path / "student" / "below" / "file").read_text() == "version 1"


def test_links_inside_a_store_are_allowed_and_others_refused(tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "eval").mkdir(parents=True)
    (store / "file").touch()
    (store / "eval" / "inside").symlink_to(store / "file")
    check_links(store, "eval", "absent")
    (store / "eval" / "outside").symlink_to(tmp_path)
    with pytest.raises(DataError) as caught:
        check_links(store, "eval")
    assert "eval/outside" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    check_links(store)  # nothing is read there
