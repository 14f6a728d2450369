"""pipeline.inspect: the summary of a store, and damaged stores."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.errors import DataError, UserError
from pipeline.inspect import main
from pipeline.store.reader import StoreReader


def test_the_summary_needs_only_metadata(
    published_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--store={published_store}", f"--json={tmp_path / 'all.json'}"]) == 0
    out = capsys.readouterr().out
    contents = json.loads((tmp_path / "all.json").read_text())
    store = StoreReader(published_store)
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
    assert "complete: each of 4 shards" in out
    assert "unpublished" not in out
    assert not store.views.opener._readers  # no shard was opened


def test_all_damaged_shards_are_listed(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "views.array_record-00001").unlink()
    (store / "eval/test.array_record-00000").write_bytes(b"cut")
    page = tmp_path / "page.html"
    flags = [f"--store={store}", f"--json={tmp_path / 'all.json'}", f"--html={page}"]
    with pytest.raises(DataError, match=r"2 of 4 shards .*00001"):
        main(flags)
    out = capsys.readouterr().out
    assert "2 of 4 shards" in out
    assert "test.array_record-00000: 3 bytes here" in out
    contents = json.loads((tmp_path / "all.json").read_text())
    assert (contents["whole"], len(contents["problems"])) == (False, 2)
    assert not page.exists()


def test_only_checksums_find_a_flipped_byte(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store / "views.array_record-00002"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main([f"--store={store}"]) == 0
    with pytest.raises(DataError, match="1 of 4 shards"):
        main([f"--store={store}", "--checksums"])
    assert re.search(r"00002: sha256 .*[0-9a-f]{16}", capsys.readouterr().out)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="00002: 0 bytes"):
        main([f"--store={store}", "--checksums"])


def test_a_complete_store_with_checksums(published_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--store={published_store}", "--checksums"]) == 0
    assert "complete: each of 4 shards matches the manifest, SHA-256 compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--views=0", "--views"),
        ("--views=5000", "--views"),
        ("--html=no/such/page.html", "no/such"),
        ("--json=no/such/a.json", "no/such"),
        ("--store=nowhere", "nowhere"),
        ("--htm=x", "--html"),
    ],
)
def test_mistakes_are_refused(published_store: Path, flag: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        main([f"--store={published_store}", flag])


def test_other_images_are_refused(published_store: Path, other_data_dir: Path, tmp_path: Path) -> None:
    flags = [f"--store={published_store}", f"--data_dir={other_data_dir}", f"--html={tmp_path / 'page.html'}"]
    with pytest.raises(DataError, match=re.escape(str(published_store))):
        main(flags)
    assert not list(tmp_path.iterdir())
