"""Runs the same commands in this tree and in another revision, and compares what they write.

    python -m tests.campaigns.same_results --against=main     # three minutes on 2 cores

For a change that must change no byte of a store and no loss: a move of modules, another text, another structure. Both trees
run side by side with this interpreter, each in a directory of its own with the same relative paths, on the images and the teacher of
`tests/golden`. Shards, specs, manifests, losses, evaluations and exported weights must be equal, bit for bit; rates and times are
left out. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

ROOT = Path(__file__).resolve().parents[2]

DATA = "--dataset=photos --data_dir=data --image_size=24"
PRECOMPUTE = f"pipeline.precompute --runner=FnApiRunner {DATA} --teacher=golden/teacher --teacher_batch_size=4 --epochs=10"
TRAIN = "--student=tiny --batch_size=5 --warmup_steps=2 --log_every=1 --eval_every=10 --deterministic"
COMMANDS = f"""
pipeline.dataset import --folder=golden/images --name=photos --data_dir=data
{PRECOMPUTE} --store=inception --mixup_fold --mixup_block=4 --codec=int8 --temperature=2 --views_per_shard=40 --seed=7
{PRECOMPUTE} --store=light --policy=light --codec=topk:2 --eval_splits=test,train[:4] --direct_num_workers=2
pipeline.verify --store=inception --fraction=1
trainer.train --store=light --workdir=light_run --recipe=keras_example --allow_recipe_mismatch {TRAIN} --steps=20
trainer.compare --store=inception --workdir=compared --no-measure {TRAIN} --epochs=10
trainer.teacher finetune {DATA} --model=tiny --batch_size=5 --steps=6 --log_every=1 --output=teacher --workdir=teacher_run
"""
# Parts of keys: what a command measures, and where, when, with which flags and by which module of ours it ran.
MEASURED = ("seconds", "per_second", "provenance", "flags", "moduleName", "created")


def run_commands(tree: Path, directory: Path) -> Path:
    """Runs `COMMANDS` of a tree in a new directory.

    Raises:
      RuntimeError: a command fails, or is not that tree's.
    """
    shutil.copytree(ROOT / "tests/golden", directory / "golden")
    environment = {**os.environ, "PYTHONPATH": str(tree), "TF_DETERMINISTIC_OPS": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"{tree}: {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr[-3000:]}"
            )
        return done.stdout

    found = run("-c", "import pipeline, trainer; print(pipeline.__file__, trainer.__file__)")
    if found.count(f"{tree}{os.sep}") != 2:
        raise RuntimeError(f"expected the packages of {tree}, found {found}")
    for command in COMMANDS.strip().splitlines():
        begun = time.monotonic()
        run("-m", *command.split())
        print(f"{time.monotonic() - begun:5.1f} s  {tree.name}: {command[:90]}", flush=True)
    return directory


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested JSON by dotted key."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: leaf for name, part in items for key, leaf in leaves(part, f"{prefix}.{name}").items()}


def facts(path: Path) -> dict[str, Any]:
    """What is compared of a file, by key; nothing but its presence of texts, pages and graphs."""
    if ".array_record" in path.name:
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if path.suffix == ".index":  # of a checkpoint or an exported student
        reader = tf.train.load_checkpoint(str(path.with_suffix("")))
        names = set(reader.get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}
        arrays = {name: np.asarray(reader.get_tensor(name)) for name in names}
    elif path.suffix == ".npz":
        arrays = dict(np.load(path))
    elif path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        found = leaves([json.loads(line) for line in lines])
        return {key: value for key, value in found.items() if not any(part in key for part in MEASURED)}
    else:
        return {}
    return {
        name: (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        for name, array in arrays.items()
    }


def files_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Facts of the files that the commands wrote, by name; without TensorBoard's, whose names have the time."""
    shutil.rmtree(directory / "golden")
    paths = [path for path in directory.rglob("*") if path.is_file() and "tfevents" not in path.name]
    return {path.relative_to(directory).as_posix(): facts(path) for path in paths}


def compare(ours: Path, theirs: Path) -> int:
    """Prints a line for each file, and the first values that differ; how many files differ."""
    here, there = files_of(ours), files_of(theirs)
    wrong = 0
    for name in sorted(here | there):
        left, right = ({"file": "present", **side[name]} if name in side else {} for side in (here, there))
        values = [(key, left.get(key, "absent"), right.get(key, "absent")) for key in sorted(left | right)]
        lines = [f"    {key}: {ours} here, {theirs} there" for key, ours, theirs in values if ours != theirs]
        print(
            "\n".join([f"{'DIFFERENT' if lines else 'same'} {name} ({len(values) - 1} values)", *lines[:5]])
        )
        wrong += bool(lines)
    return wrong


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Compares what two revisions write.")
    parser.add_argument("--against", metavar="REV", required=True, help="Git revision to compare with.")
    revision = parser.parse_args().against
    with tempfile.TemporaryDirectory() as temporary, concurrent.futures.ThreadPoolExecutor() as pool:
        root = Path(temporary)
        git = ["git", "-C", str(ROOT), "worktree"]
        there = root / "there"
        if subprocess.run([*git, "add", "--quiet", "--detach", str(there), revision]).returncode:
            return 2  # git has printed the reason
        try:
            ours, theirs = pool.map(run_commands, [ROOT, there], [root / "ours", root / "theirs"])
        finally:
            subprocess.run([*git, "remove", "--force", str(there)], check=True)
        wrong = compare(ours, theirs)
    print(f"{wrong} files differ from {revision}" if wrong else f"everything is as in {revision}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
