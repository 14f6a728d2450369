"""Arithmetic of steps: views of a run, its change to the online teacher, and its calls of `fit`."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator

import numpy as np

from pipeline.cli.units import counted
from pipeline.errors import UserError

# Intervals per call of `fit` of an endless run: Keras keeps a line of history for each, and another call takes a second to
# trace the input.
_ENDLESS_INTERVALS = 1000
MAX_VIEWS = 2**60  # view indices are int64, with room for arithmetic


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunLength:
    """Length of a run.

    Attributes:
      steps: number of steps; step `t` trains on views `[t * B, (t + 1) * B)`; `math.inf` for an endless run.
      online_from: first step with a view that is not stored; `steps` if there is none.
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
        """The length of a run of E epochs, which is `floor(E * N / B)` steps, or of a number of steps.

        Args:
          epochs: number of epochs, or `math.inf`; None if and only if `steps` is given.

        Raises:
          UserError: the epochs do not fill a batch, or a view index is too large.
        """
        count: int | float = steps or 0
        if epochs == math.inf:
            count = math.inf
        elif epochs is not None:
            count = int(epochs) * num_examples // batch_size
            if count < 1:
                raise UserError(
                    f"--batch_size={batch_size}: {counted(epochs, 'epoch')} of {num_examples} examples do not fill one batch; "
                    "use a smaller batch, or train longer"
                )
        if count != math.inf and count * batch_size > MAX_VIEWS:
            raise UserError(
                f"{count:,} steps of {batch_size:,} views exceed the limit of 2**60 views; train shorter, or endlessly with "
                "--epochs=inf"
            )
        return cls(
            steps=count,
            batch_size=batch_size,
            num_examples=num_examples,
            online_from=int(min(count, stored_views // batch_size)),
        )

    @property
    def endless(self) -> bool:
        """Whether the run ends only with a signal."""
        return self.steps == math.inf

    @property
    def epochs(self) -> float:
        """Number of epochs, a fraction if the last batch ends inside an epoch."""
        return self.steps * self.batch_size / self.num_examples

    def left_over(self, epochs: int) -> int:
        """Views at the end of `epochs` epochs that do not fill a batch. An extended run trains on them first."""
        return epochs * self.num_examples - int(self.steps) * self.batch_size


def replica_batch_size(batch_size: int, replicas: int) -> int:
    """Views per replica and step, b = B / R."""
    if batch_size % replicas:
        raise UserError(
            f"--batch_size={batch_size}: expected a multiple of the {replicas} replicas, so that a step trains on the same "
            "views with any number of replicas"
        )
    return batch_size // replicas


def check_warmup(warmup_steps: int, *, steps: int | float, allow_short_run: bool) -> None:
    """Refuses a warm-up that is as long as the run."""
    if warmup_steps >= steps and not allow_short_run:
        raise UserError(
            f"--warmup_steps={warmup_steps}: the run has only {steps} steps, so the learning rate never reaches its peak; train "
            "longer, use a shorter warm-up, or pass --allow_short_run"
        )


def count_text(number: float) -> str:
    """A count as text: `endlessly many` for infinity, without decimals for whole numbers."""
    if number == math.inf:
        return "endlessly many"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"


def name_views(views: np.ndarray) -> dict[str, int | str]:
    """The entries of metrics.jsonl that identify the views of a step.

    To check step `t`, counted from 1, against the invariants of docs/design.md: the first view is `(t - 1) * B`, and the digest
    is `hashlib.blake2b(numpy.arange(first, first + B, dtype="<i8").tobytes(), digest_size=8).hexdigest()`.

    Args:
      views: view indices of the step, int64 [B], in any order.

    Returns:
      `first_view`, and `views_digest`: BLAKE2b of the sorted indices, 16 hex digits.
    """
    ordered = np.sort(views).astype("<i8")
    digest = hashlib.blake2b(ordered.tobytes(), digest_size=8).hexdigest()
    return {"first_view": int(ordered[0]), "views_digest": digest}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """One call of `fit`: steps `start .. stop - 1`, in intervals of `interval` steps.

    An interval lies between two evaluations; Keras calls it an epoch.
    """

    start: int
    stop: int
    interval: int
    online: bool

    @property
    def intervals(self) -> int:
        """Number of intervals, which fill the segment."""
        return (self.stop - self.start) // self.interval


def segments(start: int, stop: int | float, *, interval: int, online_from: int) -> Iterator[Segment]:
    """Divides a run so that intervals end at multiples of `interval`, and each is either offline or online.

    Args:
      stop: one past the last step; `math.inf` for an endless run, which yields segments without end.
      interval: steps between evaluations, 1 or more.
    """
    if stop == math.inf:
        # From a multiple of the interval after `online_from` on, all segments are alike.
        first = -(-max(start, online_from) // interval) * interval
        yield from _segments(start, first, interval=interval, online_from=online_from)
        for begin in itertools.count(first, _ENDLESS_INTERVALS * interval):
            yield Segment(
                start=begin, stop=begin + _ENDLESS_INTERVALS * interval, interval=interval, online=True
            )
    yield from _segments(start, int(stop), interval=interval, online_from=online_from)


def _segments(start: int, stop: int, *, interval: int, online_from: int) -> Iterator[Segment]:
    cuts = {start, stop, min(max(online_from, start), stop)}
    for border in sorted(cuts):
        # The multiples of the interval that are nearest to each border.
        cuts.add(min(-(-border // interval) * interval, stop))
        cuts.add(max(border // interval * interval, start))
    for first, last in itertools.pairwise(sorted(cuts)):
        yield Segment(
            start=first,
            stop=last,
            interval=interval if (last - first) % interval == 0 else last - first,
            online=first >= online_from,
        )
