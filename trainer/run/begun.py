"""The length of a run that has begun: decided at its start, in config.json, and changed by an explicit flag alone.

The default length is what the store holds. A store grows; a run whose length grew with it would train on after its
end, at a learning rate that jumps from the end of one schedule into the middle of another.
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
    """The length of a run, and what determines its learning rate by step, but for the peak.

    Attributes:
      steps: of the run; `math.inf` where it has no end.
      batch_size: views per step.
      warmup_steps: of its linear warm-up.
    """

    steps: int | float
    batch_size: int
    warmup_steps: int

    def multiplier(self) -> Multiplier:
        """Step to multiplier of the learning rate."""
        if self.steps == math.inf:
            return WarmupConstant(self.warmup_steps)
        return WarmupCosine(int(self.steps), self.warmup_steps)


def begun_schedule(workdir: Path, *, needed: bool) -> Schedule | None:
    """The schedule of the run in a directory; None where no checkpoint is, so that a run would start at step 0.

    Args:
      workdir: of the run.
      needed: whether a missing or damaged config.json is an error; None is returned otherwise.

    Raises:
      UserError: config.json is missing or damaged.
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
            f"{path}: the length of the run there cannot be read ({error!r}); pass --epochs or --steps, or use another "
            "--workdir"
        ) from error
    return Schedule(
        steps=math.inf if steps == "inf" else steps,
        batch_size=batch_size,
        warmup_steps=config["warmup_steps"],
    )


def describe_change(before: Schedule, now: Schedule, *, step: int, learning_rate: float) -> str | None:
    """The line for a run that goes on after `step` steps under another schedule; None if it is the same.

    Args:
      before: the schedule up to here.
      now: the schedule from here on.
      step: finished steps, 1 or more.
      learning_rate: at the peak.
    """
    if before == now:
        return None
    was = float(Scaled(learning_rate, before.multiplier()).numpy(step - 1))
    will = float(Scaled(learning_rate, now.multiplier()).numpy(step))
    what = "extended" if now.steps > before.steps else "shortened" if now.steps < before.steps else "changed"
    return (
        f"the run is {what}: from {count_text(before.steps)} to {count_text(now.steps)} steps, warm-up from "
        f"{before.warmup_steps:,} to {now.warmup_steps:,}; the learning rate was {was:.3g} at step {step:,} and is "
        f"{will:.3g} at step {step + 1:,}"
    )
