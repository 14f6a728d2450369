"""pipeline.inspect: what it says is what the store holds, and a store that is not whole is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.errors import DataError, UserError
from pipeline.inspect import main
from pipeline.store.reader import Store


def test_metadata_alone_say_what_is_there(
    published_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--store={published_store}", f"--json={tmp_path / 'all.json'}"]) == 0
    out = capsys.readouterr().out
    contents = json.loads((tmp_path / "all.json").read_text())
    store = Store(published_store)
    assert (contents["epochs"], contents["views"], contents["shards"]) == (3, 51, 4)
    files = list(published_store.rglob("*.array_record-*"))
    assert contents["bytes"] == sum(path.stat().st_size for path in files)
    assert [(s["name"], s["of"], s["views"], s["shards"]) for s in contents["splits"]] == [
        ("views", "train", 51, 3),
        ("test", "test", 7, 1),
    ]
    assert contents["splits"][0]["mean_kl"] == store.views.manifest.fidelity()["mean_kl"]
    assert contents["spec"]["identity"] == json.loads(json.dumps(store.spec.identity()))
    assert (contents["whole"], contents["problems"], contents["checksums"]) == (True, [], False)
    assert contents["unpublished"] == {"files": 0, "bytes": 0}
    assert "3 epochs, 51 views" in out
    assert "whole: each of 4 shards is there" in out
    assert "unpublished" not in out
    assert not store.views.opener._readers  # a look at the metadata opens nothing


def test_a_store_that_is_not_whole_is_refused_with_all_that_is_wrong(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "views.array_record-00001").unlink()
    (store / "eval/test.array_record-00000").write_bytes(b"cut")
    page = tmp_path / "page.html"
    flags = [f"--store={store}", f"--json={tmp_path / 'all.json'}", f"--html={page}"]
    with pytest.raises(
        DataError, match=r"2 of 4 shards are not as the manifest says, first .*00001: no bytes"
    ):
        main(flags)
    out = capsys.readouterr().out
    assert "not whole: 2 of 4 shards" in out
    assert "test.array_record-00000: 3 bytes here" in out
    contents = json.loads((tmp_path / "all.json").read_text())
    assert (contents["whole"], len(contents["problems"])) == (False, 2)
    assert not page.exists()


def test_a_flipped_byte_is_seen_by_its_checksum_alone(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store / "views.array_record-00002"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main([f"--store={store}"]) == 0
    with pytest.raises(DataError, match="1 of 4 shards"):
        main([f"--store={store}", "--checksums"])
    assert re.search(r"00002: sha256 is [0-9a-f]{16} here", capsys.readouterr().out)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes here"):
        main([f"--store={store}", "--checksums"])


def test_whole_with_checksums(published_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--store={published_store}", "--checksums"]) == 0
    assert "whole: each of 4 shards is as the manifest says, SHA-256 compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--views=0"], "expected 1 or more"),
        (["--views=5000"], "--views=5000: expected 1000 or less"),
        (["--html=no/such/page.html"], "--html: no/such/page.html: no directory no/such"),
        (["--json=no/such/a.json"], "no directory no/such"),
        (["--store=nowhere"], "no spec.json there"),
        (["--htm=x"], "did you mean --html"),
    ],
)
def test_mistakes_are_refused(published_store: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([f"--store={published_store}", *flags])


def test_other_images_are_refused(published_store: Path, other_data_dir: Path, tmp_path: Path) -> None:
    flags = [f"--store={published_store}", f"--data_dir={other_data_dir}", f"--html={tmp_path / 'page.html'}"]
    with pytest.raises(DataError, match="not the data set"):
        main(flags)
    assert not list(tmp_path.iterdir())
