"""pipeline.pages.summary: the summary of a store and its unpublished files."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.pages.summary import contents_text, find_contents
from pipeline.store.reader import StoreReader


def test_unpublished_shards_are_those_beyond_the_metadata(store: Path) -> None:
    assert find_contents(StoreReader(store))["unpublished"] == {"files": 0, "bytes": 0}
    for name in ("views.array_record-00003", ".tmp-views.array_record-00004-7-aa", "eval/.tmp-notes"):
        (store / name).write_bytes(b"12345")
    contents = find_contents(StoreReader(store))
    assert contents["unpublished"] == {"files": 2, "bytes": 10}
    assert contents["shards"] == 4
    text = contents_text(contents | {"whole": True, "checksums": False, "problems": []})
    assert "2 shard files, 10 B" in text


def test_at_most_ten_problems_are_shown(published_store: Path) -> None:
    contents = find_contents(StoreReader(published_store))
    text = contents_text(
        contents | {"whole": False, "checksums": False, "problems": [f"shard {n}" for n in range(12)]}
    )
    assert "12 of 4 shards" in text
    assert "  shard 9\n  and 2 more" in text


def test_control_codes_do_not_reach_the_terminal(published_store: Path) -> None:
    contents = json.loads(json.dumps(find_contents(StoreReader(published_store))))
    contents |= {"whole": True, "checksums": False, "problems": []}
    contents["spec"]["provenance"] |= {"command": "\x1b[2Jclear"}
    contents["spec"]["identity"]["dataset"]["name"] = "one\ntwo"
    text = contents_text(contents)
    assert "\\x1b[2Jclear" in text
    assert "one\\ntwo" in text
    assert "\x1b" not in text
