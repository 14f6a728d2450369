"""pipeline.pages.card: a data set card whose code runs, whose checksums hold, and which names no path of the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import DataError, UserError
from pipeline.inspect import main
from pipeline.pages.card import TODO, _size_category, card_text
from pipeline.pages.summary import find_contents
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from tests.documents import ROOT, blocks
from tests.stores import N, job_for, write_store
from tests.test_docs import parse


@pytest.fixture(scope="module")
def card(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("card") / "card.md"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([f"--store={published_store}", f"--card={path}"]) == 0
    assert f"card: {path}" in out.getvalue()
    return path


def header(text: str) -> dict[str, Any]:
    _, block, _ = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    return dict(yaml.safe_load(block))


def test_the_header_is_what_hubs_read(card: Path) -> None:
    found = header(card.read_text())
    assert found["task_categories"] == ["image-classification"]
    assert found["size_categories"] == ["n<1K"]
    assert (found["license"], found["viewer"]) == ("other", False)
    assert "small_photos" in found["pretty_name"]


def test_the_card_says_which_images_teacher_views_and_codec(card: Path, published_store: Path) -> None:
    text, spec = card.read_text(), StoreReader(published_store).spec
    facts = (
        spec.dataset.name,
        spec.dataset.fingerprint,
        spec.teacher.fingerprint,
        spec.digest(),
        spec.render_probe,
    )
    for fact in (*facts, "float16", "inception", "3 epochs", f"{3 * N} augmented views"):
        assert fact in text
    assert text.count(TODO) > 8  # licenses, the source of images and teacher


def test_code_of_the_card_runs(card: Path, published_store: Path, data_dir: Path) -> None:
    own, torch, records = (
        code.replace("STORE", str(published_store)).replace("DATA", str(data_dir))
        for code in blocks(card, "python")
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(own, {})
        exec(records, {})
    assert out.getvalue().splitlines()[1].startswith(f"{3 * N} ")
    compile(torch, "torch", "exec")
    for line in blocks(card, "sh")[0].splitlines():
        _, _, module, *argv = line.split()
        parse(module, argv)


def test_checksums_of_the_card_are_those_of_the_files(card: Path, store: Path) -> None:
    def run(command: str, text: str | None = None) -> str:
        done = subprocess.run(
            command, shell=True, cwd=store, input=text, capture_output=True, text=True, check=True
        )
        return done.stdout

    (metadata,) = blocks(card, "text")
    assert run("sha256sum --check", metadata).count(": OK") == 6
    rows = re.findall(r"^\| `(sha256sum .*)` \| `(\w+)` \|$", card.read_text(), re.MULTILINE)
    assert len(rows) == 2
    for command, digest in rows:
        assert run(command.replace("\\|", "|")).split()[0] == digest
    shard = next(store.glob("views.array_record-*"))
    shard.write_bytes(b"other")
    assert run(rows[0][0].replace("\\|", "|")).split()[0] != rows[0][1]


def test_nothing_of_the_machine_is_in_the_card(store: Path) -> None:
    secrets = {
        "command": "python -m pipeline.precompute --store=/home/someone/private",
        "directory": "/home/someone",
        "data_dir": "/mnt/secret_data",
        "teacher": "/home/someone/teachers/unpublished",
        "processor": "x86",
    }
    path = store / "spec.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "provenance": secrets}))
    reader = StoreReader(store)
    text = card_text(reader, find_contents(reader))
    for part in ("someone", "secret", "unpublished", "private", str(store), str(store.parent)):
        assert part not in text


def test_the_guide_removes_the_machine_from_the_spec(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = StoreReader(store).spec
    assert before.provenance["command"]
    (code,) = (code for code in blocks(ROOT / "docs" / "guide.md", "python") if "provenance" in code)
    exec(code.replace("STORE", str(store)), {})
    assert before.provenance["command"] in capsys.readouterr().out
    after = StoreReader(store).spec
    assert (after.digest(), after.provenance) == (before.digest(), {})


def test_a_hostile_name_stays_a_name(store: Path) -> None:
    reader = StoreReader(store)
    name = 'x`</code>[link](javascript:a)|": {a: b} # c:1.0.0'
    reader.spec = dataclasses.replace(
        reader.spec, dataset=dataclasses.replace(reader.spec.dataset, name=name)
    )
    text = card_text(reader, find_contents(reader))
    assert name in header(text)["pretty_name"]
    assert "x`</code>" not in text.split("---", 2)[2]


@pytest.mark.parametrize("codec", ["int8", "topk:3"])
def test_the_card_explains_the_fields_of_each_codec(
    codec: str, spec: Spec, data_dir: Path, teacher_path: Path, tmp_path: Path
) -> None:
    worker = ShardWorker(
        job_for(tmp_path / "s", dataclasses.replace(spec, codec=codec), data_dir, teacher_path)
    )
    write_store(worker, epochs=1, eval_splits=())
    reader = StoreReader(tmp_path / "s")
    text = card_text(reader, find_contents(reader))
    features = json.loads((tmp_path / "s" / "features.json").read_text())["featuresDict"]["features"]
    assert all(f"| `{name}` |" in text for name in features)


def test_a_store_that_is_not_finished_has_no_card(store: Path, tmp_path: Path) -> None:
    (store / "views.array_record-00003").write_bytes(b"finished, not published")
    with pytest.raises(UserError, match="not published"):
        main([f"--store={store}", f"--card={tmp_path / 'card.md'}"])
    (store / "views.array_record-00001").write_bytes(b"damaged")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "card.md"))):
        main([f"--store={store}", f"--card={tmp_path / 'card.md'}"])
    assert not (tmp_path / "card.md").exists()


def test_two_outputs_in_one_file_are_refused(published_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--json"):
        main([f"--store={published_store}", f"--json={tmp_path / 'x'}", f"--card={tmp_path / 'x'}"])


@pytest.mark.parametrize(
    ("views", "category"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (384 * 10**6, "100M<n<1B"), (10**12, "n>1T")],
)
def test_size_categories_are_those_of_hubs(views: int, category: str) -> None:
    assert _size_category(views) == category
