"""Length and learning-rate schedule of a run: set at its start, in config.json, and changed only by explicit flags.

By default, a run is as long as the store. If the length of a run grew with the store, its learning rate would jump from the
end of one schedule into the middle of another.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from pipeline.errors import UserError
from trainer.config.run_files import CONFIG_FILE, read_config
from trainer.config.run_length import count_text
from trainer.run.checkpoints import saved_path
from trainer.step.schedules import Multiplier, Scaled, WarmupConstant, WarmupCosine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate by step, relative to its peak; `steps` is `math.inf` for an endless run."""

    steps: int | float
    batch_size: int
    warmup_steps: int

    def multiplier(self) -> Multiplier:
        """Factor of the peak learning rate, by step."""
        if self.steps == math.inf:
            return WarmupConstant(self.warmup_steps)
        return WarmupCosine(int(self.steps), self.warmup_steps)


def previous_schedule(workdir: Path, *, needed: bool) -> Schedule | None:
    """Reads the schedule of the run in a directory.

    Args:
      needed: if True, a missing or damaged config.json is an error.

    Returns:
      The schedule; None if the directory has no checkpoint, or if config.json is damaged and not needed.

    Raises:
      UserError: config.json is missing or damaged.
      DataError: see `saved_path`.
    """
    if saved_path(workdir / "checkpoints") is None:
        return None
    path = workdir / CONFIG_FILE
    try:
        config = read_config(workdir)
        steps, batch_size = config["length"]["steps"], config["length"]["batch_size"]
    except (OSError, ValueError, KeyError) as error:
        if not needed:
            return None
        raise UserError(
            f"{path}: cannot read the length of this run ({error!r}); pass --epochs or --steps, or use another --workdir"
        ) from error
    return Schedule(
        steps=math.inf if steps == "inf" else steps,
        batch_size=batch_size,
        warmup_steps=config["warmup_steps"],
    )


def describe_change(before: Schedule, now: Schedule, *, step: int, learning_rate: float) -> str | None:
    """Describes how the schedule of a continued run changes; None if it does not.

    Args:
      step: completed steps, 1 or more.
    """
    if before == now:
        return None
    last = float(Scaled(learning_rate, before.multiplier())(step - 1))
    following = float(Scaled(learning_rate, now.multiplier())(step))
    change = (
        "extended" if now.steps > before.steps else "shortened" if now.steps < before.steps else "changed"
    )
    return (
        f"the run is {change}: from {count_text(before.steps)} to {count_text(now.steps)} steps, warm-up from "
        f"{before.warmup_steps:,} to {now.warmup_steps:,} steps; the learning rate was {last:.3g} at step {step:,} and is "
        f"{following:.3g} at step {step + 1:,}"
    )
