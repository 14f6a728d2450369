"""Makes the tables and plots of docs/results.md from the results in this directory.

    python tests/benchmarks/results/figures.py                     # writes the plots, prints the table
    python tests/benchmarks/results/figures.py --keep=DIR          # first writes flowers102.json from DIR/result.json

`DIR` is the work directory of `python -m trainer.compare --from=... --workdir=DIR`. The copy has everything except
directories of the machine, so that each figure can be recomputed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser
from pipeline.pages.svg import COLORS, inline_svg
from pipeline.storage.files import write_text
from trainer.comparison.findings import main_epochs
from trainer.comparison.result_file import load_result
from trainer.pages.arm_styles import arm_order
from trainer.pages.charts import accuracy_by_epochs, over_time
from trainer.pages.pair_charts import training_loss

HERE = Path(__file__).parent
RESULT = HERE / "flowers102.json"


def without_paths(tree: Any) -> Any:
    """A result with each absolute path reduced to its last component."""
    if isinstance(tree, dict):
        return {key: without_paths(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_paths(value) for value in tree]
    if isinstance(tree, str) and "/" in tree:
        words = [w if not w.partition("=")[2].startswith("/") else _cut_flag(w) for w in tree.split(" ")]
        return " ".join(Path(word).name if word.startswith("/") else word for word in words)
    return tree


def _cut_flag(word: str) -> str:
    flag, _, value = word.partition("=")
    return f"{flag}={','.join(Path(path).name for path in value.split(','))}"


def percent(mean: float, deviation: float | None) -> str:
    """Formats a mean and its deviation over seeds, such as `15.2 ± 0.3 %`."""
    return f"{mean:.1%}" if deviation is None else f"{100 * mean:.1f} ± {100 * deviation:.1f} %"


def arms_table(result: dict[str, Any]) -> str:
    """Markdown table with one row per arm and length."""
    lines = [
        "| targets | epochs | seeds | top-1 | agreement with the teacher | loss on test |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    order = {name: number for number, name in enumerate(arm_order([arm["arm"] for arm in result["arms"]]))}
    for arm in sorted(result["arms"], key=lambda arm: (arm["epochs"], order[arm["arm"]])):
        top1 = percent(arm["top1_mean"], arm["top1_std"])
        agreement = percent(arm["agreement_mean"], arm["agreement_std"])
        lines.append(
            f"| `{arm['arm']}` | {arm['epochs']:g} | {len(arm['seeds'])} | {top1} | {agreement} | {arm['loss_mean']:.4f} |"
        )
    return "\n".join(lines)


def pairs_table(result: dict[str, Any]) -> str:
    """Markdown table with one row per pair."""
    lines = [
        "| pair | seed | largest loss difference | weights' distance | students agree | top-1 difference, 95 % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for pair in result["pairs"]:
        low, high = pair["top1_interval"]
        lines.append(
            f"| `{pair['a']}`, `{pair['b']}` | {pair['seed']} | {pair['largest_loss_difference']:.2g} | "
            f"{pair['weights_distance_relative']:.2g} of the norm | {pair['agreement']:.1%} | "
            f"{100 * pair['top1_difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}) points |"
        )
    return "\n".join(lines)


def save_svg(figure: Figure, path: Path, *, name: str) -> None:
    """Writes a figure as a file with fixed colors, readable on light and dark pages."""
    element = inline_svg(figure, name, title=name)
    element = re.sub(r"var\(--([\w-]+)\)", lambda found: COLORS[found[1]], element)
    width, height = (72 * inches for inches in figure.get_size_inches())
    ground = '<rect width="100%" height="100%" rx="6" fill="#ffffff"/>'
    head, content = element.split(">", 1)
    head = f'<?xml version="1.0" encoding="utf-8"?>\n{head} width="{width:g}pt" height="{height:g}pt">'
    write_text(path, f"{head}{ground}{content}\n")


def main(argv: list[str]) -> int:
    """Writes the plots and prints the tables."""
    parser = Parser(prog="figures.py")
    parser.add_argument("--keep", help="Work directory of a comparison whose result.json is copied here.")
    flags = parser.parse_strictly(argv)
    if flags.keep:
        kept = without_paths(load_result(Path(flags.keep)))
        write_text(RESULT, json.dumps(kept, separators=(",", ":"), sort_keys=True) + "\n")
    result = json.loads(RESULT.read_text())
    epochs = main_epochs(result["runs"])
    runs = [run for run in result["runs"] if run["epochs"] == epochs]
    pairs = [(a, b) for a in runs for b in runs if (a["arm"], b["arm"]) == ("offline", "online")]
    figures = {
        "accuracy": over_time(runs, "top1", ylabel="accuracy on test", percent=True),
        "patience": accuracy_by_epochs(
            [arm for arm in result["arms"] if arm["arm"] == "offline"], result["runs"]
        ),
        "loss": training_loss([(a, b) for a, b in pairs if a["seed"] == b["seed"]]),
    }
    for name, figure in figures.items():
        if figure is not None:
            save_svg(figure, HERE / f"flowers102-{name}.svg", name=name)
    print(f"{arms_table(result)}\n\n{pairs_table(result)}")
    return 0


if __name__ == "__main__":
    run_command(main)
