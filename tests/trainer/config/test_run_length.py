"""trainer.config.run_length: the arithmetic of a run is compared with counting."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.views.batches import plan_batch
from trainer.config.run_length import RunLength, name_views, segments

LENGTHS = list(itertools.product([1, 2, 3], [1, 4, 7], [1, 2, 5, 9], [1, 2, 3]))  # E, N, B, stored epochs


def length_of(epochs: int, num_examples: int, batch_size: int, stored: int) -> RunLength:
    return RunLength.of(
        epochs=epochs,
        steps=None,
        batch_size=batch_size,
        num_examples=num_examples,
        stored_views=stored * num_examples,
    )


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (0, 1), (0, 12), (0, 13), (3, 3), (3, 4), (5, 13), (6, 12), (7, 14)]
)
def test_intervals_end_at_multiples_at_the_first_online_step_and_at_the_end(start: int, stop: int):
    for interval, online_from in itertools.product(range(1, 16), range(17)):
        found = list(segments(start, stop, interval=interval, online_from=online_from))
        steps, ends = [], []
        for segment in found:
            assert (segment.stop - segment.start) == segment.intervals * segment.interval > 0
            span = range(segment.start, segment.stop)
            assert {step >= online_from for step in span} == {segment.online}
            steps += span
            ends += range(segment.start + segment.interval, segment.stop + 1, segment.interval)
        assert steps == list(range(start, stop)), (interval, online_from)
        cuts = {step for step in range(start + 1, stop) if step % interval == 0 or step == online_from}
        assert ends == sorted(cuts | ({stop} if stop > start else set())), (interval, online_from)


def test_a_run_needs_few_calls_of_fit():
    # Intervals before the first online step, the two parts of the one around it, and the rest.
    assert len(list(segments(0, 1000, interval=10, online_from=505))) == 4
    assert len(list(segments(0, 1000, interval=10, online_from=1000))) == 1


@pytest.mark.parametrize(
    ("start", "online_from"), [(0, 0), (0, 5), (3, 5), (5, 5), (7, 5), (8, 5), (0, 8), (9, 8)]
)
def test_endless_run_has_the_segments_of_a_long_one(start: int, online_from: int):
    stop = 20_000  # more than one call of `fit`
    endless = segments(start, math.inf, interval=4, online_from=online_from)
    steps: dict[int, bool] = {}
    ends: list[int] = []
    while not ends or ends[-1] < stop:
        segment = next(endless)
        assert (segment.stop - segment.start) == segment.intervals * segment.interval > 0
        assert segment.start == (ends[-1] if ends else start)
        steps |= dict.fromkeys(range(segment.start, segment.stop), segment.online)
        ends += range(segment.start + segment.interval, segment.stop + 1, segment.interval)
    assert all(online == (step >= online_from) for step, online in steps.items())
    cuts = {step for step in range(start + 1, stop) if step % 4 == 0 or step == online_from}
    assert [end for end in ends if end < stop] == sorted(cuts)


@pytest.mark.parametrize(("epochs", "num_examples", "batch_size", "stored"), LENGTHS)
def test_run_length_counts_whole_batches(epochs: int, num_examples: int, batch_size: int, stored: int):
    views = list(range(epochs * num_examples))
    batches = [views[i : i + batch_size] for i in range(0, len(views), batch_size)]
    whole = [batch for batch in batches if len(batch) == batch_size]
    if not whole:
        with pytest.raises(UserError, match="--batch_size"):
            length_of(epochs, num_examples, batch_size, stored)
        return
    length = length_of(epochs, num_examples, batch_size, stored)
    assert length.steps == len(whole)
    assert length.left_over(epochs) == len(views) - len(whole) * batch_size
    assert length.epochs == pytest.approx(len(whole) * batch_size / num_examples)


@pytest.mark.parametrize(("epochs", "num_examples", "batch_size", "stored"), LENGTHS)
def test_a_run_is_online_from_the_first_step_that_needs_a_view_that_is_not_stored(
    epochs: int, num_examples: int, batch_size: int, stored: int
):
    if epochs * num_examples < batch_size:
        return
    length = length_of(epochs, num_examples, batch_size, stored)
    end = stored * num_examples
    needs = [  # including partners
        max(plan_batch(step * batch_size, batch_size, num_examples=num_examples)[0]) >= end
        for step in range(length.steps)
    ]
    assert length.online_from == next((step for step, online in enumerate(needs) if online), length.steps)


def test_steps_may_be_given_instead_of_epochs():
    length = RunLength.of(epochs=None, steps=7, batch_size=4, num_examples=10, stored_views=20)
    assert (length.steps, length.online_from, length.epochs) == (7, 5, 2.8)


def test_endless_run_goes_online_at_the_end_of_the_store():
    length = RunLength.of(epochs=math.inf, steps=None, batch_size=4, num_examples=10, stored_views=20)
    assert length.endless
    assert (length.steps, length.online_from, length.epochs) == (math.inf, 5, math.inf)
    finite = RunLength.of(epochs=3, steps=None, batch_size=4, num_examples=10, stored_views=20)
    assert not finite.endless
    assert isinstance(finite.steps, int)


def test_name_of_views_does_not_depend_on_their_order():
    named = name_views(np.array([5, 4, 7, 6]))
    # Golden value; must not change, because logs are compared across versions with NumPy alone.
    assert named == {"first_view": 4, "views_digest": "03e8a75985d321ec"}
    assert (
        named["views_digest"]
        == hashlib.blake2b(np.arange(4, 8, dtype="<i8").tobytes(), digest_size=8).hexdigest()
    )
    digests = {
        name_views(np.array(views))["views_digest"] for views in ([4, 5, 6, 7], [4, 5, 6], [4, 5, 6, 6])
    }
    assert len(digests) == 3


def test_a_run_beyond_the_last_index_is_refused():
    whole = {"epochs": None, "batch_size": 2**10, "num_examples": 5, "stored_views": 5}
    assert RunLength.of(steps=2**50, **whole).steps == 2**50
    with pytest.raises(UserError, match=r"1,024 views.*2\*\*60"):
        RunLength.of(steps=2**50 + 1, **whole)
