"""Arithmetic of steps: which views a run trains on, where it goes online, and how `fit` is called for it."""

from __future__ import annotations

import dataclasses
import itertools

from pipeline.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLength:
    """How long a run is.

    Attributes:
      steps: T; step `t` trains on views `[t * B, (t + 1) * B)`.
      batch_size: B.
      num_examples: N.
      online_from: first step that needs a view that is not stored; T where none does.
    """

    steps: int
    batch_size: int
    num_examples: int
    online_from: int

    @classmethod
    def of(
        cls,
        *,
        epochs: int | None,
        steps: int | None,
        batch_size: int,
        num_examples: int,
        stored_views: int,
    ) -> RunLength:
        """The length of a run of so many epochs, `floor(E * N / B)` steps, or of so many steps.

        Raises:
          UserError: both or neither are given, or not a single batch fits.
        """
        if (epochs is None) == (steps is None):
            raise UserError("give either --epochs or --steps")
        if steps is None:
            steps = (epochs or 0) * num_examples // batch_size
            if steps < 1:
                raise UserError(
                    f"--batch_size={batch_size}: {epochs} epochs of {num_examples} examples do not fill one batch"
                )
        return cls(
            steps=steps,
            batch_size=batch_size,
            num_examples=num_examples,
            online_from=min(steps, stored_views // batch_size),
        )

    @property
    def epochs(self) -> float:
        """Epochs trained on, a fraction where a batch ends inside one."""
        return self.steps * self.batch_size / self.num_examples

    def left_over(self, epochs: int) -> int:
        """Views of `epochs` epochs that fill no batch; the first ones to be trained on if the run is extended."""
        return epochs * self.num_examples - self.steps * self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """One call of `fit`: steps `start .. stop - 1`, in intervals of `interval` steps.

    What Keras calls an epoch is an interval, between two evaluations.
    """

    start: int
    stop: int
    interval: int
    online: bool

    @property
    def intervals(self) -> int:
        """How many of them; they fill the segment."""
        return (self.stop - self.start) // self.interval


def cut_segments(start: int, stop: int, *, interval: int, online_from: int) -> list[Segment]:
    """Cuts a run so that intervals end at multiples of `interval`, and none is offline and online.

    Args:
      start: first step to do.
      stop: one past the last.
      interval: steps between evaluations, 1 or more.
      online_from: first step with the online teacher.
    """
    cuts = {start, stop, min(max(online_from, start), stop)}
    for border in sorted(cuts):
        # The first multiple at or after each border, and the last one before the next.
        cuts.add(min(-(-border // interval) * interval, stop))
        cuts.add(max(border // interval * interval, start))
    borders = sorted(cuts)
    return [
        Segment(
            start=first,
            stop=last,
            interval=interval if (last - first) % interval == 0 else last - first,
            online=first >= online_from,
        )
        for first, last in itertools.pairwise(borders)
    ]
