"""tests.benchmarks.accelerator: its small form on a CPU, and the refusal to measure without an accelerator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensorflow as tf

from pipeline.errors import UserError
from tests.benchmarks import accelerator


@pytest.mark.slow  # minutes of CPU time: eight processes that import TensorFlow
@pytest.mark.timeout(1800)
def test_small_form_measures_everything_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "figures.json"
    assert accelerator.main(["--small", f"--output={output}"]) == 0
    result = json.loads(output.read_text())
    assert result["failed"] == {}
    assert result["device"]["kind"] in ("CPU", "GPU")
    assert len(result["parity"]["losses_cpu"]) == 2
    difference = result["parity"]["largest_relative_difference"]
    assert difference.get("cpu, again", 0.0) == 0.0  # deterministic steps
    (arms,) = result["rates"].values()
    rates = arms["offline"]["views_per_second"] | arms["online"]["views_per_second"]
    assert set(rates) == {"offline", "resident", "online"}
    assert min(rates.values()) > 0
    assert arms["offline"]["input"]["cpu_seconds_per_view"] > 0
    text = capsys.readouterr().out
    for row in ("| 32 | replay |", "| 32 | resident |", "| 32 | online |", "views/s per core"):
        assert row in text
    assert json.loads(text[text.index("\n{\n") :]) == result


def test_machine_without_an_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch):
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("there is one")
    monkeypatch.setattr(accelerator, "in_own_process", lambda work, *arguments: work(*arguments))
    with pytest.raises(UserError, match="--small"):
        accelerator.main([])
