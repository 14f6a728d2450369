"""Arithmetic of steps: which views a run trains on, where it goes online, and how `fit` is called for it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator

import numpy as np

from pipeline.cli.units import counted
from pipeline.errors import UserError

# Intervals that one call of `fit` makes of a run without an end: Keras keeps a line of history for each, and
# beginning anew costs a second of tracing the input.
_ENDLESS_INTERVALS = 1000
MAX_VIEWS = 2**60  # indices are int64, and have room to be reckoned with


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLength:
    """How long a run is.

    Attributes:
      steps: T; step `t` trains on views `[t * B, (t + 1) * B)`; `math.inf` where the run has no end.
      batch_size: B.
      num_examples: N.
      online_from: first step that needs a view that is not stored; T where none does.
    """

    steps: int | float
    batch_size: int
    num_examples: int
    online_from: int

    @classmethod
    def of(
        cls,
        *,
        epochs: int | float | None,
        steps: int | None,
        batch_size: int,
        num_examples: int,
        stored_views: int,
    ) -> RunLength:
        """The length of a run of so many epochs, `floor(E * N / B)` steps, or of so many steps.

        `epochs` may be `math.inf`.

        Raises:
          UserError: both or neither are given, not a single batch fits, or the last views have no index.
        """
        if (epochs is None) == (steps is None):
            raise UserError("give either --epochs or --steps")
        count: int | float = steps or 0
        if epochs == math.inf:
            count = math.inf
        elif epochs is not None:
            count = int(epochs) * num_examples // batch_size
            if count < 1:
                raise UserError(
                    f"--batch_size={batch_size}: {counted(epochs, 'epoch')} of {num_examples} examples do not fill one batch"
                )
        if count != math.inf and count * batch_size > MAX_VIEWS:
            raise UserError(
                f"{count:,} steps of {batch_size:,} views: at most 2**60 views have an index; --epochs=inf has no end"
            )
        return cls(
            steps=count,
            batch_size=batch_size,
            num_examples=num_examples,
            online_from=int(min(count, stored_views // batch_size)),
        )

    @property
    def endless(self) -> bool:
        """Whether the run goes on until it is told to stop."""
        return self.steps == math.inf

    @property
    def epochs(self) -> float:
        """Epochs trained on, a fraction where a batch ends inside one."""
        return self.steps * self.batch_size / self.num_examples

    def left_over(self, epochs: int) -> int:
        """Views of `epochs` epochs that fill no batch; the first ones to be trained on if the run is extended."""
        return epochs * self.num_examples - int(self.steps) * self.batch_size


def count_text(number: float) -> str:
    """A count for a reader: `endlessly many` without an end, no fraction where there is none."""
    if number == math.inf:
        return "endlessly many"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"


def name_views(views: np.ndarray) -> dict[str, int | str]:
    """How metrics.jsonl says which views a step trained on: the same with any number of replicas.

    To check a line of step `t`, counted from 1, against law 5 of the design: the first view is `(t - 1) * B`, and
    the digest `hashlib.blake2b(numpy.arange(first, first + B, dtype="<i8").tobytes(), digest_size=8).hexdigest()`.

    Args:
      views: int64 [B], the indices that came with the batches, in any order.

    Returns:
      `first_view`, and `views_digest`: BLAKE2b of the sorted indices, 16 hex digits.
    """
    ordered = np.sort(views).astype("<i8")
    digest = hashlib.blake2b(ordered.tobytes(), digest_size=8).hexdigest()
    return {"first_view": int(ordered[0]), "views_digest": digest}


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


def cut_segments(start: int, stop: int | float, *, interval: int, online_from: int) -> Iterator[Segment]:
    """Cuts a run so that intervals end at multiples of `interval`, and none is offline and online.

    Args:
      start: first step to do.
      stop: one past the last; `math.inf` gives segments for ever.
      interval: steps between evaluations, 1 or more.
      online_from: first step with the online teacher.
    """
    if stop == math.inf:
        # Up to a multiple of the interval, online; from there on all segments are alike.
        first = -(-max(start, online_from) // interval) * interval
        yield from _cut(start, first, interval=interval, online_from=online_from)
        for begin in itertools.count(first, _ENDLESS_INTERVALS * interval):
            yield Segment(
                start=begin, stop=begin + _ENDLESS_INTERVALS * interval, interval=interval, online=True
            )
    yield from _cut(start, int(stop), interval=interval, online_from=online_from)


def _cut(start: int, stop: int, *, interval: int, online_from: int) -> Iterator[Segment]:
    cuts = {start, stop, min(max(online_from, start), stop)}
    for border in sorted(cuts):
        # The first multiple at or after each border, and the last one before the next.
        cuts.add(min(-(-border // interval) * interval, stop))
        cuts.add(max(border // interval * interval, start))
    for first, last in itertools.pairwise(sorted(cuts)):
        yield Segment(
            start=first,
            stop=last,
            interval=interval if (last - first) % interval == 0 else last - first,
            online=first >= online_from,
        )
