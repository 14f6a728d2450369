"""Makes a teacher: `python -m trainer.teacher convert|finetune`.

`convert` turns a published BiT checkpoint (`.npz`) into a SavedModel; `finetune` trains a network, a checkpoint or
the new head of a Keras SavedModel on a data set's labels. Both write what `pipeline.precompute --teacher` takes:
signature `serving_default`, `image` float32 [B, S, S, 3] in 0..255 to `logits` float32 [B, C].

    python -m trainer.teacher convert --npz=BiT-M-R101x3.npz --model=bit_r101x3 --output=runs/bit      # a minute
    python -m trainer.teacher finetune --model=small --batch_size=64 --learning_rate=0.4 --steps=600 \
        --output=runs/mnist_5k/teacher --workdir=runs/mnist_5k/finetune      # embedded default: 95 % in 35 s
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.errors import run_module

    run_module("trainer.teacher")

import argparse
import dataclasses
import re
from pathlib import Path

import tensorflow as tf

from pipeline import demo
from pipeline.cache import add_input_buffer_flag
from pipeline.dataset import Dataset
from pipeline.errors import UserError
from pipeline.flags import Parser, batch_size, file_path, make_directory, number, positive, seed, whole
from pipeline.store.files import remove_temporaries, replace_directory, write_json
from pipeline.store.lock import writer_lock
from pipeline.teacher import DEFAULT_SIGNATURE, VALUE_RANGES
from pipeline.views.policies import POLICIES, ViewPolicy
from pipeline.views.recipes import VIEW_RECIPES, view_recipe
from pipeline.views.render import EvalCrop
from trainer import models
from trainer.evaluate import accuracy_text
from trainer.finetune import Finetune, FinetuneOptions, evaluate_top1
from trainer.hyperrule import BASE_BATCH_SIZE, rule_steps
from trainer.models.bit import BIT_MODELS, PublishedWeights
from trainer.preemption import Preemption
from trainer.pretrained import build_network
from trainer.workdir import open_workdir

_EVAL_SPLITS = ("validation", "test")
_EVAL_BATCH_SIZE = 256
_IMAGE_SIZE = 128


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The command's parser, and those of its two subcommands by name."""
    parser = Parser(
        prog="python -m trainer.teacher",
        description="Makes a teacher for pipeline.precompute: from a published BiT checkpoint, or by fine-tuning "
        "on a data set's labels. `convert --help` and `finetune --help` list the flags of each.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert|finetune")
    convert = commands.add_parser(
        "convert",
        help="published BiT .npz to SavedModel",
        description="Converts a published BiT .npz (the paper's names or big_vision's) into a SavedModel. Example: "
        "python -m trainer.teacher convert --npz=BiT-M-R101x3.npz --model=bit_r101x3 --output=runs/teacher",
    )
    add = convert.add_argument
    add("--npz", type=file_path, required=True, help="the checkpoint")
    add("--model", required=True, help=f"what it is a checkpoint of: {', '.join(BIT_MODELS)}")
    add("--num_classes", type=positive, help="by default those of the checkpoint's head")
    add("--new_head", action="store_true", help="begin with a zero head of --num_classes")
    add("--image_size", type=positive, default=_IMAGE_SIZE, help="side of the input in pixels")
    add("--output", type=file_path, required=True, help="directory of the SavedModel")
    finetune = commands.add_parser(
        "finetune",
        help="supervised fine-tuning to SavedModel",
        description="Fine-tunes on a data set's labels by BiT's rule. Without --dataset: 5,000 MNIST digits. Example: "
        "python -m trainer.teacher finetune --dataset=oxford_flowers102 --data_dir=DATA --model=bit_r50x1 "
        "--init=BiT-M-R50x1.npz --output=runs/teacher --workdir=runs/finetune",
    )
    _add_finetune_flags(finetune)
    return parser, {"convert": convert, "finetune": finetune}


def _add_finetune_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--dataset", help="TFDS data set, NAME[/CONFIG][:VERSION], prepared as ArrayRecord")
    add("--data_dir", type=file_path, help="TFDS data directory")
    add("--split", default="train", help="split to train on")
    add("--model", help=f"network to train: {', '.join(sorted(models.STUDENTS))}")
    add(
        "--init",
        type=file_path,
        help="weights for --model, but its head: BiT .npz, or Keras SavedModel or .keras of --model",
    )
    add(
        "--teacher",
        type=file_path,
        help="instead of --model: Keras SavedModel or .keras file whose head is replaced",
    )
    add("--teacher_value_range", default="0..255", help=f"of its input: {', '.join(VALUE_RANGES)}")
    add("--head_only", action="store_true", help="train the head alone")
    add("--output", type=file_path, required=True, help="directory of the SavedModel")
    add(
        "--workdir",
        type=file_path,
        required=True,
        help="directory for checkpoints and metrics; the run continues from there",
    )
    add("--steps", type=positive, help="by default 500, 10,000 or 20,000 (20,000 examples or more, 500,000)")
    add("--batch_size", type=batch_size, default=BASE_BATCH_SIZE, help="views a step")
    add("--learning_rate", type=number, default=0.003, help="for 512 views a step; scaled with the batch")
    add("--image_size", type=positive, help="side of a view in pixels; by default 128, the recipe's with one")
    add("--recipe", help=f"views and evaluation crop of: {', '.join(VIEW_RECIPES)} (mixup apart)")
    add("--policy", help=f"how views are drawn: {', '.join(POLICIES)}; by default light, BiT's own")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the views")
    add("--seed", type=seed, default=0, help="of fresh weights and of the views")
    add("--log_every", type=positive, default=20, help="steps between lines of metrics.jsonl")
    add("--checkpoint_every", type=positive, default=100, help="steps")
    add("--image_cache_bytes", type=whole, default=2 << 30, help="for decoded images, if all of them fit")
    add_input_buffer_flag(parser)


def convert(flags: argparse.Namespace) -> int:
    """The `convert` command."""
    output = _check_output(flags.output)
    if flags.model not in BIT_MODELS:
        raise UserError(f"--model={flags.model}: expected one of {', '.join(BIT_MODELS)}")
    weights = PublishedWeights(flags.npz)
    found = weights.num_classes
    num_classes = flags.num_classes or (None if flags.new_head else found)
    if num_classes is None:
        raise UserError(
            f"--num_classes is missing: {flags.npz} has no head to take it from"
            if found is None
            else "--num_classes is missing: --new_head needs it"
        )
    if not flags.new_head and found != num_classes:
        there = "no head" if found is None else f"a head of {found} classes"
        raise UserError(
            f"--num_classes={num_classes}: {flags.npz} has {there}; pass --new_head to begin with a zero head"
        )
    make_directory(output.parent, flag="--output")
    model = models.build(flags.model, num_classes=num_classes, image_size=flags.image_size)
    weights.load_into(model, new_head=flags.new_head)
    export(model, output, image_size=flags.image_size)
    print(f"{flags.model}, {model.count_params():,} parameters, {num_classes} classes: {output}")
    return 0


def export(model: tf.keras.Model, path: Path, *, image_size: int) -> None:
    """Writes a teacher as a SavedModel, whole or not at all, in the place of one that is there.

    Keras loads it again as well, in a process that has imported `trainer.models`.

    Args:
      model: float32 [B, S, S, 3] in 0..255 to logits [B, C].
      path: of the SavedModel directory.
      image_size: S in pixels.
    """

    @tf.function(input_signature=[tf.TensorSpec([None, image_size, image_size, 3], tf.float32, name="image")])
    def serve(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": tf.cast(model(image, training=False), tf.float32)}

    def write(temporary: Path) -> None:
        # A trace of each layer by itself would take minutes for a BiT; layers without a config need them.
        traces = any(type(layer).__module__.endswith("saved_model.load") for layer in model.submodules)
        signatures = {DEFAULT_SIGNATURE: serve}
        model.save(temporary, include_optimizer=False, save_traces=traces, signatures=signatures)

    logger, level = tf.get_logger(), tf.get_logger().level
    logger.setLevel("ERROR")  # Keras warns that a model without metrics has none
    try:
        replace_directory(path, write)
    finally:
        logger.setLevel(level)


def _check_output(text: str) -> Path:
    """The output's path, before any work: only a SavedModel may be replaced."""
    path = Path(text)
    ours = (path / "saved_model.pb").is_file() or (path.is_dir() and not any(path.iterdir()))
    if path.exists() and not ours:
        raise UserError(f"--output={path}: exists and is no SavedModel; name another directory")
    return path


def finetune(flags: argparse.Namespace) -> int:
    """The `finetune` command."""
    output = _check_output(flags.output)
    _check_network_flags(flags)
    dataset, options = _options(flags)
    image_size = options.policy.image_size
    tf.keras.utils.set_random_seed(flags.seed)
    network, origin = build_network(flags, num_classes=dataset.num_classes, image_size=image_size)
    make_directory(output.parent, flag="--output")
    workdir = open_workdir(flags.workdir)
    with writer_lock(workdir, flag="--workdir"), Preemption() as preemption:
        remove_temporaries(workdir)
        run = Finetune(
            network, dataset, options=options, workdir=workdir, origin=origin, preemption=preemption
        )
        first = run.restore()
        # Not before: of a run that is refused here, the directory keeps what was asked of it first.
        write_json(workdir / "config.json", vars(flags))
        epochs = options.steps * options.batch_size / dataset.num_examples
        length = f"{options.steps:,} steps of {options.batch_size} views, {epochs:.1f} epochs"
        print(f"{network.name} on {dataset.name} ({dataset.split}): {length}", flush=True)
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
        write_json(workdir / "result.json", result)
    for split, value in accuracy.items():
        left_out = f" ({unlabeled[split]:,} images without a label are left out)" if unlabeled[split] else ""
        print(f"{split}: top-1 {accuracy_text(value)}{left_out}")
    if not accuracy:
        print(f"not evaluated: {dataset.name} has no split {' or '.join(_EVAL_SPLITS)} besides {flags.split}")
    print(f"teacher: {output}; figures: {workdir / 'result.json'}")
    return 0


def _options(flags: argparse.Namespace) -> tuple[Dataset, FinetuneOptions]:
    """The data set to train on, the embedded default's where none is named, and what is asked of the run."""
    policy, eval_crop = _views(flags)
    name, data_dir = flags.dataset, flags.data_dir
    if name is None:
        print("Embedded default: 5,000 MNIST digits. Your own: --dataset=NAME --data_dir=DIR", flush=True)
        name, data_dir = demo.DATASET, str(demo.prepare_dataset())
    dataset = Dataset(name, flags.split, data_dir=data_dir)
    steps = flags.steps or rule_steps(dataset.num_examples)
    as_given = {field.name: getattr(flags, field.name, None) for field in dataclasses.fields(FinetuneOptions)}
    return dataset, FinetuneOptions(**as_given | {"policy": policy, "eval_crop": eval_crop, "steps": steps})


def _evaluate(
    network: tf.keras.Model, dataset: Dataset, options: FinetuneOptions
) -> dict[str, tuple[float | None, int]]:
    """Top-1 accuracy on each held-out split that the data set has, and how many of its images have no label."""
    held_out = set(_EVAL_SPLITS) - set(re.split(r"\W+", dataset.split))  # `train+validation` is trained on
    return {
        split: evaluate_top1(
            network,
            Dataset(dataset.name, split, data_dir=dataset.data_dir),
            eval_crop=options.eval_crop,
            image_size=options.policy.image_size,
            batch_size=min(_EVAL_BATCH_SIZE, options.batch_size),
        )
        for split in _EVAL_SPLITS
        if split in held_out and split in dataset.split_names
    }


def _views(flags: argparse.Namespace) -> tuple[ViewPolicy, EvalCrop]:
    """Policy and evaluation crop: a recipe's or BiT's own, with the flags that override them."""
    recipe = flags.recipe or ("demo" if flags.dataset is None else None)
    base = ViewPolicy(name="light", image_size=_IMAGE_SIZE) if recipe is None else view_recipe(recipe).policy
    given = {
        "name": flags.policy,
        "image_size": flags.image_size,
        "flip_probability": None if flags.flip is None else 0.5 * flags.flip,
    }
    policy = dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
    return policy, EvalCrop() if recipe is None else view_recipe(recipe).eval_crop


def _check_network_flags(flags: argparse.Namespace) -> None:
    """Refuses what says nothing, or two things, about the network; before anything is loaded."""
    if (flags.model is None) == (flags.teacher is None):
        got = "neither" if flags.model is None else "both"
        raise UserError(f"got {got} of --model and --teacher; name the network to train, or a SavedModel")
    if flags.model is not None and flags.model not in models.STUDENTS:
        raise UserError(f"--model={flags.model}: expected one of {', '.join(sorted(models.STUDENTS))}")
    if flags.init is not None and flags.model is None:
        raise UserError(f"--init={flags.init}: needs --model; --teacher brings its own weights")
    if flags.init is not None and flags.init.endswith(".npz") and flags.model not in BIT_MODELS:
        raise UserError(f"--init={flags.init}: a .npz is of a BiT; --model={flags.model} is none")
    if flags.teacher_value_range not in VALUE_RANGES:
        raise UserError(
            f"--teacher_value_range={flags.teacher_value_range}: expected one of {', '.join(VALUE_RANGES)}"
        )


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    parser, commands = make_parser()
    if not argv or argv[0] not in commands:
        parser.parse_strictly(argv)  # --help, or a mistake
        raise UserError("name a command: convert or finetune")
    flags = commands[argv[0]].parse_strictly(argv[1:])
    return {"convert": convert, "finetune": finetune}[argv[0]](flags)
