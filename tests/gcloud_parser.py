"""gcloud's own command parser, which works offline: `gcloud meta lint-gcloud-commands`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest


def refused_by_gcloud(commands: list[str], directory: Path) -> dict[str, str]:
    """Finds the command lines that gcloud would refuse; skips the test where gcloud is not installed.

    Args:
      commands: Command lines. A single process parses all of them, because each start takes seconds.
      directory: Directory for the file of commands.

    Returns:
      gcloud's message by command line.
    """
    program = shutil.which("gcloud")
    if program is None:
        pytest.skip("needs the Google Cloud SDK, whose parser checks the commands")
    file = directory / "commands.json"
    file.write_text(json.dumps([{"command_string": command} for command in dict.fromkeys(commands)]))
    done = subprocess.run(
        [program, "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert len(answers) == len(dict.fromkeys(commands))
    return {a["command_string"]: a["error_message"] for a in answers if not a["success"]}
