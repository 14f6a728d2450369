"""Results of comparisons: read, merged, summarised over seeds, and what they amount to."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.cli.units import counted
from pipeline.errors import DataError, UserError
from pipeline.storage.checked_json import build, read_json
from pipeline.store.spec import differences
from trainer.comparison.result_schema import ResultFile

RESULT_FILE = "result.json"
FORMAT = 1
RESULT_LIMIT = 256 << 20  # of the file; its curves are thinned
# Of a result's recipe, what differs with the length of runs, and what older results have beside it.
_OF_LENGTHS = ("warmup_steps", "epochs", "views", "source")

Run = dict[str, Any]
Result = dict[str, Any]


def load_result(workdir: Path) -> Result:
    """Reads a comparison's result.json.

    Raises:
      UserError: there is none, or it is of something else.
      DataError: it is damaged or of another format.
    """
    path = workdir / RESULT_FILE
    try:
        result: Result = read_json(path, limit=RESULT_LIMIT)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{workdir}: no {RESULT_FILE} there; finish the comparison with `python -m trainer.compare`"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not JSON ({error}); run the comparison again: what is trained is not trained again"
        ) from error
    if not isinstance(result, dict) or not isinstance(result.get("runs"), list) or not result["runs"]:
        raise UserError(
            f"{path}: not the result of a comparison; name a directory that `trainer.compare` wrote"
        )
    if result.get("format") != FORMAT:
        raise DataError(f"{path}: format {result.get('format')}, this version reads {FORMAT}; compare again")
    try:
        build(ResultFile, result)
    except ValueError as error:
        raise DataError(
            f"{path}: damaged ({error}); run the comparison again: what is trained is not trained again"
        ) from error
    return result


def merge_results(results: Sequence[Result]) -> Result:
    """One result of several comparisons: all runs and pairs; the cost is the first that was measured.

    Raises:
      UserError: they are of different stores, students or evaluations, or have one run with different figures.
    """
    first = results[0]
    for other in results[1:]:
        if lines := differences(_identity(first), _identity(other), sides=("in the first", "in another")):
            raise UserError(f"--from: not runs of one comparison: {'; '.join(lines)}; report them apart")
    runs: dict[tuple[Any, ...], Run] = {}
    for run in (run for result in results for run in result["runs"]):
        if (known := runs.setdefault(_key(run), run)) != run:
            raise UserError(
                f"--from: {run['arm']}, {counted(run['epochs'], 'epoch')}, seed {run['seed']} is in {known.get('directory')} and "
                f"in {run.get('directory')}, with different figures; name one of them"
            )
    pairs = {
        (pair["a"], pair["b"], pair["epochs"], pair["seed"]): pair
        for result in results
        for pair in result.get("pairs") or []
    }
    costs = [result["cost"] for result in results if (result.get("cost") or {}).get("seconds_a_step")]
    return {
        **first,
        "created": max(str(result.get("created")) for result in results),
        "command": "\n".join(dict.fromkeys(str(result.get("command")) for result in results)),
        "runs": list(runs.values()),
        "pairs": list(pairs.values()),
        "arms": summarise(list(runs.values())),
        "cost": costs[0] if costs else first.get("cost"),
    }


def _identity(result: Result) -> dict[str, Any]:
    """What results of one comparison have in common."""
    names = ("student", "eval_split", "eval_images", "classes")
    recipe = {name: value for name, value in (result.get("recipe") or {}).items() if name not in _OF_LENGTHS}
    return {
        "store": {"digest": (result.get("store") or {}).get("digest")},
        "recipe": recipe,
        **{name: result.get(name) for name in names},
    }


def _key(run: Run) -> tuple[Any, ...]:
    return run["arm"], run["epochs"], run["seed"]


def summarise(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """`arms` of a result: mean over seeds by arm and length, and the standard deviation where there are two or more."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["arm"], run["epochs"]), []).append(run)
    rows = []
    for (arm, epochs), members in groups.items():
        row: dict[str, Any] = {"arm": arm, "epochs": epochs, "seeds": [run["seed"] for run in members]}
        for name in ("top1", "agreement"):
            values = _values(members, name)
            row[f"{name}_mean"] = statistics.fmean(values) if values else None
            row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        losses = _values(members, "distillation_loss")
        row["loss_mean"] = statistics.fmean(losses) if losses else None
        rows.append(row)
    return rows


def _values(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name) is not None]


def evidence(result: Result) -> list[int]:
    """Positions in `pairs` of those of offline and online; the others compare how targets are made."""
    pairs = result.get("pairs") or []
    return [number for number, pair in enumerate(pairs) if (pair["a"], pair["b"]) == ("offline", "online")]


def paired_runs(result: Result, pairs: Sequence[int]) -> list[tuple[Run, Run]]:
    """The two runs of each of the pairs, given by position, where both are in the result."""
    runs = {_key(run): run for run in result["runs"]}
    chosen = [result["pairs"][number] for number in pairs]
    keys = [[(pair[side], pair["epochs"], pair["seed"]) for side in ("a", "b")] for pair in chosen]
    return [(runs[a], runs[b]) for a, b in keys if a in runs and b in runs]


def main_epochs(runs: Sequence[Run]) -> float:
    """The length at which most arms were run; the longest of several."""
    arms: dict[float, set[str]] = {}
    for run in runs:
        arms.setdefault(run["epochs"], set()).add(run["arm"])
    return max(arms, key=lambda epochs: (len(arms[epochs]), epochs))


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the pairs of offline and online in a result say; numbers of pairs are positions in `pairs`.

    Attributes:
      state: `same`, bit for bit; `match`, no accuracy difference beyond chance in any pair; `differ`; `unknown`,
        where no pair says.
      largest: pair with the largest accuracy difference, by size.
      bound: pair, and end of its interval, that is furthest from 0.
      beyond: pairs whose interval leaves out 0.
      compared: pairs that have an interval.
      agreement: pair whose students agree least.
      loss: pair with the largest loss difference.
    """

    state: Literal["same", "match", "differ", "unknown"]
    largest: int | None = None
    bound: tuple[int, int] | None = None
    beyond: int = 0
    compared: int = 0
    agreement: int | None = None
    loss: int | None = None


def find(result: Result) -> Findings:
    """The findings of a result."""
    pairs = {number: result["pairs"][number] for number in evidence(result)}
    intervals = {
        number: pair["top1_interval"]
        for number, pair in pairs.items()
        if isinstance(pair.get("top1_interval"), list) and None not in pair["top1_interval"]
    }

    def most(name: str, size: Any = abs) -> int | None:
        values = {number: pair[name] for number, pair in pairs.items() if pair.get(name) is not None}
        return max(values, key=lambda number: size(values[number])) if values else None

    beyond = sum(low > 0 or high < 0 for low, high in intervals.values())
    same = bool(pairs) and all(
        pair.get("largest_loss_difference") == 0 and pair.get("weights_largest_difference") == 0
        for pair in pairs.values()
    )
    ends = {(number, end): abs(interval[end]) for number, interval in intervals.items() for end in (0, 1)}
    return Findings(
        state="same" if same else "unknown" if not intervals else "differ" if beyond else "match",
        largest=most("top1_difference"),
        bound=max(ends, key=lambda end: ends[end]) if ends else None,
        beyond=beyond,
        compared=len(intervals),
        agreement=most("agreement", lambda value: -value),
        loss=most("largest_loss_difference"),
    )
