"""Trains a student on a store: `python -m trainer.train --store=DIR --workdir=DIR`.

Replays the stored views with their teacher logits, with no teacher in memory; every view's two fingerprints are
checked. With `--teacher`, training goes on online past the last stored view. Run the same command again after
an interruption and it continues from its latest checkpoint.

    python -m trainer.train --store=runs/mnist_5k/store --workdir=runs/mnist_5k/student     # under a minute
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("trainer.train", flags="trainer.flags.train")

import argparse
import contextlib
from pathlib import Path

import tensorflow as tf

from pipeline.errors import Interrupted
from pipeline.inputs.device_memory import naming_memory
from pipeline.storage.files import remove_temporaries
from pipeline.storage.lock import writer_lock
from pipeline.store.reader import Store
from trainer.config.run_files import RESULT_FILE
from trainer.distribution.strategy import make_strategy
from trainer.distribution.workers import SAME_WORKERS, Workers
from trainer.flags.train import parse
from trainer.run.begun import begun_schedule
from trainer.run.describe import describe, describe_missing_split
from trainer.run.evaluation import accuracy_text, unlabeled_text
from trainer.run.options import resolve
from trainer.run.preemption import Preemption
from trainer.run.results import NOT_EVALUATED, STUDENT_DIRECTORY, finish, finished_result
from trainer.run.training import Run
from trainer.run.workdir import open_workdir
from trainer.run.write_back import opened_store


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    flags = parse(argv)
    strategy = make_strategy(flags.strategy, replicas=flags.replicas, tpu=flags.tpu)  # before any device
    with opened_store(
        flags.store,
        write_back=flags.write_back,
        follow=flags.follow,
        shard_cache_bytes=flags.shard_cache_bytes,
    ) as store:
        return _train_on(store, flags, strategy)


def _train_on(store: Store, flags: argparse.Namespace, strategy: tf.distribute.Strategy) -> int:
    """The command, once the store is open."""
    store.check_files()
    store.spec.check_renderer()
    begun = begun_schedule(Path(flags.workdir), needed=flags.epochs is None and flags.steps is None)
    options = resolve(flags, store, begun=begun)
    if begun is None:
        options.check_teacher()
    workdir = open_workdir(flags.workdir, store=flags.store)
    if flags.deterministic:
        tf.config.experimental.enable_op_determinism()
    tf.keras.utils.set_random_seed(flags.seed)
    print(describe(options, store, begun=begun), flush=True)
    # Keras and TensorFlow warn of short runs' retracing and of what callbacks take; nothing is wrong then.
    tf.get_logger().setLevel("ERROR")
    workers = Workers(strategy)
    workers.check_same(
        options.shared(store.spec.digest()), remedy=SAME_WORKERS
    )  # before variables are made together
    lock = writer_lock(workdir, flag="--workdir") if workers.chief else contextlib.nullcontext()
    memory = (
        f"choose a smaller --student ({options.recipe.student}) or --batch_size ({options.recipe.batch_size})"
    )
    with naming_memory(memory), workers.watch(), lock, Preemption() as preemption:
        if workers.chief:
            remove_temporaries(workdir)
        run = Run(options, store, strategy=strategy, preemption=preemption)
        try:
            result = finished_result(run)
            run.check_workers(finished=result is not None)
            if result is None and not store.held_out_splits:
                print(describe_missing_split(store, run.dataset.split_names), flush=True)
            result = result or finish(run, run.train())
            workers.wait()  # for the chief, which has more to do
        except Interrupted:
            if options.length.endless:  # which ends in no other way
                preemption.defer()
                run.export_saved()
            raise
    if not workers.chief:
        return 0
    for name, figures in result["evaluation"].items():
        print(
            f"{name}: student {accuracy_text(figures['student_top1'])}, teacher {accuracy_text(figures['teacher_top1'])}, "
            f"agreement {figures['agreement']:.2%}, distillation loss {figures['distillation_loss']:.4f}"
            f"{unlabeled_text(figures)}"
        )
    if not result["evaluation"]:
        print(f"not evaluated: {result.get('not_evaluated', NOT_EVALUATED)}")
    print(f"student: {workdir / STUDENT_DIRECTORY}; figures: {workdir / RESULT_FILE}")
    return 0
