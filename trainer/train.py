"""Trains a student on a store: `python -m trainer.train --store=DIR --workdir=DIR`.

Replays the stored views with their teacher logits, without loading the teacher, and checks both fingerprints of every view.
With `--teacher`, training continues online past the last stored view. The same command continues an interrupted run from its
latest checkpoint.

    python -m trainer.train --store=runs/mnist_5k/store --workdir=runs/mnist_5k/student     # less than a minute
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("trainer.train", flags="trainer.flags.train")

import argparse
import contextlib
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.errors import Interrupted
from pipeline.inputs.device_memory import naming_memory
from pipeline.inputs.labels import match_classes
from pipeline.inputs.locate import open_dataset
from pipeline.storage.files import remove_temporaries
from pipeline.storage.lock import writer_lock
from pipeline.store.view_store import ViewStore
from trainer.config.run_files import RESULT_FILE, STUDENT_DIRECTORY
from trainer.distribution.strategy import make_strategy
from trainer.distribution.workers import SAME_WORKERS, Workers
from trainer.flags.train import parse
from trainer.run.builder import build_run
from trainer.run.describe import describe, describe_missing_split
from trainer.run.evaluation import evaluation_text
from trainer.run.options import TrainOptions, resolve
from trainer.run.preemption import Preemption
from trainer.run.results import NOT_EVALUATED
from trainer.run.run_schedule import previous_schedule
from trainer.run.training import Run
from trainer.run.workdir import open_workdir
from trainer.run.write_back import opened_store


def main(argv: list[str]) -> int:
    """Runs the command; see the module's docstring."""
    flags = parse(argv)
    strategy = make_strategy(flags.strategy, replicas=flags.replicas, tpu=flags.tpu)  # before any device
    with opened_store(
        flags.store,
        weights=flags.store_weights,
        image_size=flags.image_size,
        write_back=flags.write_back,
        follow=flags.follow,
        shard_cache_bytes=flags.shard_cache_bytes,
    ) as store:
        _train_on(store, flags, strategy)
    return 0


def _train_on(store: ViewStore, flags: argparse.Namespace, strategy: tf.distribute.Strategy) -> None:
    """Checks the store, resolves the options, and trains."""
    store.check_files()
    store.check_renderer()
    previous = previous_schedule(Path(flags.workdir), needed=flags.epochs is None and flags.steps is None)
    options = resolve(flags, store, previous=previous)
    if previous is None:
        options.check_teacher()
    dataset = open_dataset(store, "views", data_dir=flags.data_dir, data_cache_bytes=flags.data_cache_bytes)
    workdir = open_workdir(flags.workdir, stores=flags.store)
    if flags.deterministic:
        tf.config.experimental.enable_op_determinism()
    tf.keras.utils.set_random_seed(flags.seed)
    match = match_classes(dataset, store.spec.num_classes, store.classes)
    if match.note is not None:
        print(match.note, flush=True)
    print(describe(options, store, previous=previous), flush=True)
    # Keras and TensorFlow warn about retracing and slow callbacks in short runs, which are harmless.
    tf.get_logger().setLevel("ERROR")
    workers = Workers(strategy)
    # Before variables are created, which is collective and fails if students differ.
    workers.check_same(options.shared(store.identity()), remedy=SAME_WORKERS)
    lock = writer_lock(workdir, flag="--workdir") if workers.chief else contextlib.nullcontext()
    recipe = options.recipe
    remedy = f"choose a smaller --student ({recipe.student}) or --batch_size ({recipe.batch_size})"
    with naming_memory(remedy), workers.watch(), lock, Preemption() as preemption:
        if workers.chief:
            remove_temporaries(workdir)
        run = build_run(options, store, dataset=dataset, strategy=strategy, preemption=preemption)
        result = _complete(run, options, store)
    if workers.chief:
        _print_result(result, workdir)


def _complete(run: Run, options: TrainOptions, store: ViewStore) -> dict[str, Any]:
    """Trains and evaluates unless the run is finished; returns the content of result.json."""
    try:
        result = run.finished_result()
        run.check_workers(finished=result is not None)
        if result is None:
            if not store.held_out_splits:
                print(describe_missing_split(store, run.dataset.split_names), flush=True)
            result = run.finish(run.train())
        run.workers.wait()  # until the chief has evaluated and exported
    except Interrupted:
        if options.length.endless:  # a signal is how such a run ends
            run.preemption.defer()
            run.export_saved()
        raise
    return result


def _print_result(result: dict[str, Any], workdir: Path) -> None:
    for name, figures in result["evaluation"].items():
        print(evaluation_text(name, figures))
    if skipped := result.get("skipped_steps"):
        print(
            f"{skipped:,} of {result['steps']:,} steps were skipped, because their float16 gradients overflowed; the loss scale is "
            f"{result['loss_scale']:g}"
        )
    if not result["evaluation"]:
        print(f"not evaluated: {result.get('not_evaluated', NOT_EVALUATED)}")
    print(f"student: {workdir / STUDENT_DIRECTORY}; figures: {workdir / RESULT_FILE}")
