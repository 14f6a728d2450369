"""Creates a teacher: `python -m trainer.teacher convert|finetune`.

`convert` converts a published BiT checkpoint (`.npz`) to a SavedModel. `finetune` trains a network, a checkpoint, or a
Keras SavedModel with a new head on the labels of a data set. Both write a SavedModel for `pipeline.precompute --teacher`:
signature `serving_default`, `image` float32 [B, S, S, 3] in 0..255 to `logits` float32 [B, C].

    python -m trainer.teacher convert --npz=BiT-M-R101x3.npz --model=bit_r101x3 --output=runs/bit      # a minute
    python -m trainer.teacher finetune --model=small --batch_size=64 --learning_rate=0.4 --steps=600 \
        --output=runs/mnist_5k/teacher --workdir=runs/mnist_5k/finetune      # embedded default: 95 % in 35 s
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("trainer.teacher", flags="trainer.flags.teacher")

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.cli.choices import DEFAULT_SIGNATURE, check_num_classes
from pipeline.cli.parser import make_directory
from pipeline.errors import UserError
from pipeline.inputs import embedded
from pipeline.inputs.dataset import Dataset
from pipeline.storage.files import atomic_directory, remove_temporaries, write_json
from pipeline.storage.lock import writer_lock
from pipeline.store.splits import may_overlap
from trainer import models
from trainer.config.run_files import RESULT_FILE
from trainer.finetuning.bit_hyperrule import rule_steps
from trainer.finetuning.finetune import Finetune, FinetuneOptions, evaluate_top1
from trainer.finetuning.pretrained import build_network
from trainer.flags.teacher import parse, views_of
from trainer.models.bit import PublishedWeights
from trainer.run.evaluation import accuracy_text
from trainer.run.preemption import Preemption
from trainer.run.workdir import open_workdir

_EVAL_SPLITS = ("validation", "test")
_EVAL_BATCH_SIZE = 256


def convert(flags: argparse.Namespace) -> int:
    """The `convert` command; returns the exit code."""
    output = Path(flags.output)
    weights = PublishedWeights(flags.npz)
    found = weights.num_classes
    num_classes = flags.num_classes or (None if flags.new_head else found)
    if num_classes is None:
        raise UserError(
            f"--num_classes is required, because --npz={flags.npz} has no head"
            if found is None
            else "--num_classes is required with --new_head"
        )
    if not flags.new_head and found != num_classes:
        there = "no head" if found is None else f"a head of {found} classes"
        raise UserError(
            f"--num_classes={num_classes}: {flags.npz} has {there}; pass --new_head to start with a zero head"
        )
    check_num_classes(num_classes, of=f"--num_classes={num_classes}")
    make_directory(output.parent, flag="--output")
    model = models.build_student(flags.model, num_classes=num_classes, image_size=flags.image_size)
    weights.load_into(model, new_head=flags.new_head)
    export(model, output, image_size=flags.image_size)
    print(f"{flags.model}, {model.count_params():,} parameters, {num_classes} classes: {output}")
    return 0


def export(model: tf.keras.Model, path: Path, *, image_size: int) -> None:
    """Writes a teacher as a SavedModel, atomically; an existing one is replaced.

    Keras can load it again in a process that has imported `trainer.models`.

    Args:
      model: Model from float32 [B, S, S, 3] in 0..255 to logits [B, C].
    """

    @tf.function(input_signature=[tf.TensorSpec([None, image_size, image_size, 3], tf.float32, name="image")])
    def serve(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": tf.cast(model(image, training=False), tf.float32)}

    # Only layers without a config need their own traces, which take minutes for a BiT.
    traces = any(type(layer).__module__.endswith("saved_model.load") for layer in model.submodules)
    signatures = {DEFAULT_SIGNATURE: serve}
    logger, level = tf.get_logger(), tf.get_logger().level
    logger.setLevel("ERROR")  # Keras warns that a model without metrics has none
    try:
        with atomic_directory(path, replace=True) as fresh:
            model.save(fresh, include_optimizer=False, save_traces=traces, signatures=signatures)
    finally:
        logger.setLevel(level)


def finetune(flags: argparse.Namespace) -> int:
    """The `finetune` command; returns the exit code."""
    output = Path(flags.output)
    dataset, options = _options(flags)
    if not dataset.num_classes:
        raise UserError(
            f"--dataset={dataset.name}: has no ClassLabel feature, but fine-tuning needs labels; name a labeled data set"
        )
    check_num_classes(dataset.num_classes, of=f"--dataset={dataset.name}")
    image_size = options.policy.image_size
    tf.keras.utils.set_random_seed(flags.seed)
    network, origin = build_network(flags, num_classes=dataset.num_classes, image_size=image_size)
    if flags.label_feature is not None:
        origin["label_feature"] = flags.label_feature
    make_directory(output.parent, flag="--output")
    workdir = open_workdir(flags.workdir)
    with writer_lock(workdir, flag="--workdir"), Preemption() as preemption:
        remove_temporaries(workdir)
        run = Finetune(
            network, dataset, options=options, workdir=workdir, origin=origin, preemption=preemption
        )
        if (
            result := _finished_result(workdir, options.steps, output)
        ) and run.latest_step() == options.steps:
            print(f"nothing to do: the run in --workdir={workdir} is finished", flush=True)
            _print_result(result, dataset, workdir)
            return 0
        first = run.restore()
        # Only now, so that a refused command leaves the config.json of the existing run.
        write_json(workdir / "config.json", vars(flags))
        epochs = options.steps * options.batch_size / dataset.num_examples
        length = f"{options.steps:,} steps of {options.batch_size} views, {epochs:.1f} epochs"
        print(f"{network.name} on {dataset.name} ({dataset.split}): {length}", flush=True)
        if not _held_out(dataset):
            print(f"no accuracy will be reported: {_no_split(dataset)}", flush=True)
        training = run.train(first)
        evaluated = _evaluate(network, dataset, options)
        export(network, output, image_size=image_size)
        accuracy = {split: value for split, (value, _) in evaluated.items()}
        unlabeled = {split: count for split, (_, count) in evaluated.items()}
        result = {
            **training,
            "parameters": network.count_params(),
            "top1": accuracy,
            "unlabeled": unlabeled,
            "teacher": str(output),
        }
        write_json(workdir / RESULT_FILE, result)
    _print_result(result, dataset, workdir)
    return 0


def _finished_result(workdir: Path, steps: int, output: Path) -> dict[str, Any] | None:
    """The contents of result.json if it belongs to a run of this length whose teacher exists, else None."""
    try:
        result: dict[str, Any] = json.loads((workdir / RESULT_FILE).read_text())
        same = (result["steps"], result["teacher"]) == (steps, str(output)) and isinstance(
            result["top1"], dict
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if same and (output / "saved_model.pb").is_file() else None


def _print_result(result: dict[str, Any], dataset: Dataset, workdir: Path) -> None:
    for split, value in result["top1"].items():
        unlabeled = result.get("unlabeled", {}).get(split, 0)
        left_out = f" (without {unlabeled:,} unlabeled images)" if unlabeled else ""
        print(f"{split}: top-1 {accuracy_text(value)}{left_out}")
    if not result["top1"]:
        print(f"not evaluated: {_no_split(dataset)}")
    print(f"teacher: {result['teacher']}; figures: {workdir / RESULT_FILE}")


def _no_split(dataset: Dataset) -> str:
    return f"{dataset.name} has no split {' or '.join(_EVAL_SPLITS)} that does not overlap {dataset.split}"


def _options(flags: argparse.Namespace) -> tuple[Dataset, FinetuneOptions]:
    """The data set to train on (the embedded default if no flag names one) and the options of the run."""
    policy, eval_crop = views_of(flags)
    name, data_dir = flags.dataset, flags.data_dir
    if name is None:
        print(
            "Training on the embedded default, 5,000 MNIST digits; pass --dataset=NAME --data_dir=DIR for other data",
            flush=True,
        )
        name, data_dir = embedded.DATASET, str(embedded.prepare_dataset())
    dataset = Dataset(
        name,
        flags.split,
        data_dir=data_dir,
        image_feature=flags.image_feature,
        label_feature=flags.label_feature,
    )
    steps = flags.steps or rule_steps(dataset.num_examples)
    as_given = {field.name: getattr(flags, field.name, None) for field in dataclasses.fields(FinetuneOptions)}
    return dataset, FinetuneOptions(**as_given | {"policy": policy, "eval_crop": eval_crop, "steps": steps})


def _evaluate(
    network: tf.keras.Model, dataset: Dataset, options: FinetuneOptions
) -> dict[str, tuple[float | None, int]]:
    """Top-1 accuracy and number of unlabeled images of each held-out split."""
    return {
        split: evaluate_top1(
            network,
            dataset.select(split),
            eval_crop=options.eval_crop,
            image_size=options.policy.image_size,
            batch_size=min(_EVAL_BATCH_SIZE, options.batch_size),
        )
        for split in _held_out(dataset)
    }


def _held_out(dataset: Dataset) -> list[str]:
    """Splits to evaluate on: those that share no examples with the training split."""
    return [
        split
        for split in _EVAL_SPLITS
        if split in dataset.split_names and not may_overlap(split, dataset.split)
    ]


def main(argv: list[str]) -> int:
    """Runs the command; see the module's docstring."""
    flags = parse(argv)
    return {"convert": convert, "finetune": finetune}[flags.command](flags)
