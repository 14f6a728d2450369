"""trainer.run.run_schedule: a run keeps its length when the store grows; only flags change it."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest

from pipeline.cli.main import run_command
from pipeline.errors import UserError
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from tests import stores
from tests.runs import arguments, fail, losses
from trainer.run.callbacks import MetricsLog
from trainer.run.run_schedule import Schedule, describe_change, previous_schedule
from trainer.train import main

COSINE = Schedule(steps=100, batch_size=5, warmup_steps=10)


def grow(store: Path, spec: Spec, data_dir: Path, teacher_path: Path, *, epochs: int) -> None:
    worker = ShardWorker(stores.job_for(store, spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=epochs, eval_splits=())
    assert StoreReader(store).epochs == epochs


def begin(workdir: Path, config: str) -> None:
    (workdir / "checkpoints").mkdir()
    (workdir / "checkpoints" / "checkpoint").write_text('model_checkpoint_path: "ckpt-3"\n')
    (workdir / "config.json").write_text(config)


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_finished_run_stays_finished_on_a_larger_store_and_is_extended_by_a_flag(
    grown: Path,
    spec: Spec,
    data_dir: Path,
    teacher_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    workdir = tmp_path / "run"
    argv = arguments(grown, workdir, data_dir, "--log_every=1", "--learning_rate=0.5")
    assert main(argv) == 0
    out = capsys.readouterr().out
    # One epoch without a held-out split, which is reported before the first step and at the end.
    assert "--eval_splits=test" in out.split("not evaluated:")[0]
    result = json.loads((workdir / "result.json").read_text())
    assert (result["steps"], result["evaluation"]) == (3, {})
    assert result["not_evaluated"] in out.split("not evaluated:")[1]
    before = files(workdir)
    grow(grown, spec, data_dir, teacher_path, epochs=3)
    assert main(argv) == 0
    assert files(workdir) == before
    out = capsys.readouterr().out
    assert "3 steps" in out
    assert "--epochs=3" in out
    assert "not evaluated:" in out
    # 10 steps of a cosine without warm-up: the rate jumps from the end of one curve into the middle of another.
    assert main([*argv, "--epochs=3"]) == 0
    out = capsys.readouterr().out
    assert "from 3 to 10 steps" in out
    assert f"{0.5 * math.cos(math.pi / 2 * 2 / 3) ** 2:.3g} at step 3" in out
    assert f"{0.5 * math.cos(math.pi / 2 * 3 / 10) ** 2:.3g} at step 4" in out
    assert list(losses(workdir)) == list(range(1, 11))
    assert json.loads((workdir / "config.json").read_text())["length"]["steps"] == 10


def test_unfinished_run_keeps_its_length_on_a_larger_store(
    grown: Path,
    spec: Spec,
    data_dir: Path,
    teacher_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    workdir = tmp_path / "run"
    argv = arguments(grown, workdir, data_dir, "--log_every=1", "--eval_every=9")
    original = MetricsLog.write

    def write(self: MetricsLog, step: int, *args: object, **kwargs: object) -> None:
        original(self, step, *args, **kwargs)  # type: ignore[arg-type]
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write)
        with pytest.raises(SystemExit) as stop:
            run_command(main, argv)
    assert stop.value.code == 143
    grow(grown, spec, data_dir, teacher_path, epochs=2)
    assert main(argv) == 0
    assert list(losses(workdir)) == [1, 2, 3]
    # Without its config.json, the length is not known.
    (workdir / "config.json").write_text("{")
    code, message = fail(argv, capsys)
    assert code == 2
    assert "--epochs or --steps" in message
    assert main([*argv, "--steps=3"]) == 0


def test_directory_without_a_checkpoint_has_no_schedule(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"length": {"steps": 7}, "warmup_steps": 1}')
    assert previous_schedule(tmp_path, needed=True) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"length": {"steps": "many", "batch_size": 5}, "warmup_steps": 1}']
)
def test_damaged_config_is_an_error_only_if_needed(tmp_path: Path, text: str):
    begin(tmp_path, text)
    assert previous_schedule(tmp_path, needed=False) is None
    with pytest.raises(UserError, match=r"config\.json"):
        previous_schedule(tmp_path, needed=True)


def test_endless_length_is_read_back(tmp_path: Path):
    config = {
        "flags": {"seed": 0, "precision": "float32", "epochs": "inf", "store": "s"},
        "recipe": {"batch_size": 5},
        "recipe_name": "default",
        "temperature": 1.0,
        "warmup_steps": 4,
        "length": {"steps": "inf", "batch_size": 5, "num_examples": 17, "online_from": 3},
    }
    begin(tmp_path, json.dumps(config))
    assert previous_schedule(tmp_path, needed=True) == Schedule(steps=math.inf, batch_size=5, warmup_steps=4)


def test_change_of_the_schedule_shows_both_learning_rates():
    assert describe_change(COSINE, COSINE, step=100, learning_rate=2.0) is None
    longer = describe_change(
        COSINE, Schedule(steps=1000, batch_size=5, warmup_steps=10), step=100, learning_rate=2.0
    )
    assert longer is not None
    for words in ("extended", "100", "1,000", f"{2 * math.sin(math.pi / 2 / 90) ** 2:.3g}", "1.96"):
        assert words in longer
    shorter = describe_change(
        Schedule(steps=math.inf, batch_size=5, warmup_steps=4),
        Schedule(steps=8, batch_size=5, warmup_steps=4),
        step=6,
        learning_rate=2.0,
    )
    assert shorter is not None
    for words in ("shortened", "2 at step 6", "1 at step 7"):
        assert words in shorter
