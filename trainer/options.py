"""Flags of the trainer, parsed once and strictly."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any, get_args

from pipeline.cache import add_cache_flags, add_input_buffer_flag
from pipeline.errors import UserError
from pipeline.flags import (
    Parser,
    batch_size,
    file_path,
    number,
    place,
    positive,
    positive_number,
    seed,
    whole,
)
from pipeline.store.reader import Store
from trainer.arms import ARMS, OFFLINE, Arm
from trainer.models import PRECISIONS, STUDENTS
from trainer.optimizers import Clip, DecayMode
from trainer.recipes import TRAIN_RECIPES, TrainRecipe, check_views, default_recipe, train_recipe
from trainer.steps import RunLength, count_text
from trainer.strategy import STRATEGIES
from trainer.workers import TF_CONFIG_EXAMPLE

# Of a run without an end, which has no twentieth and no tenth. Both sources of the recipes warm up for 1,500 steps
# (DESIGN section 8); an evaluation as often as a checkpoint.
ENDLESS_WARMUP_STEPS = 1500
ENDLESS_EVAL_EVERY = 1000


def _epochs(text: str) -> int | float:
    """argparse type: a whole number, 1 or more, or `inf`."""
    if text == "inf":
        return math.inf
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or inf") from error


def make_parser() -> Parser:
    """The command's flags; those that a recipe sets have no default of their own."""
    parser = Parser(
        prog="python -m trainer.train",
        description="Trains a student on the views and teacher logits of a store.",
    )
    add = parser.add_argument
    add("--store", type=place, required=True, help="directory of the store, or its URL in a bucket")
    add(
        "--workdir",
        type=file_path,
        required=True,
        help="directory for checkpoints, metrics and the trained student",
    )
    add("--teacher", type=place, help="SavedModel or .keras file, to go on online where the store ends")
    add(
        "--arm",
        default=OFFLINE.name,
        choices=tuple(ARMS),
        help="what the student is trained on; all but the first are there to be compared with it (`trainer.compare`)",
    )
    add(
        "--epochs",
        type=_epochs,
        help="epochs to train; by default what the store holds; `inf`, with --teacher: a warm-up, then a constant rate "
        "until SIGTERM, which saves and exports; --steps or --epochs with a number finish such a run",
    )
    add(
        "--write_back",
        action="store_true",
        help="append the online teacher's logits to the store, whole epochs only, as the precompute would have",
    )
    add("--views_per_shard", type=positive, default=16384, help="of --write_back; at most")
    add("--steps", type=positive, help="steps to train, instead of --epochs")
    add("--seed", type=seed, default=0, help="of the student's initial weights")
    add_shared_flags(parser)
    return parser


def add_shared_flags(parser: Parser) -> None:
    """Flags that one run and a comparison of several take alike."""
    add = parser.add_argument
    add("--data_dir", type=place, help="TFDS data directory; by default the precompute's")
    add_cache_flags(parser)
    add("--recipe", help=f"training half of a recipe: {', '.join(TRAIN_RECIPES)}; flags override it")
    add("--allow_recipe_mismatch", action="store_true", help="train on other views than the recipe's")
    add("--allow_short_run", action="store_true", default=None, help="allow a warm-up as long as the run")
    add("--student", help=f"one of {', '.join(sorted(STUDENTS))}")
    add("--batch_size", type=batch_size, help="views a step")
    add("--temperature", type=positive_number, help="of the loss; by default the store's")
    add("--temperature_squared", action=argparse.BooleanOptionalAction, help="multiply the loss by T^2")
    add("--learning_rate", type=number, help="at the end of the warm-up")
    add("--weight_decay", type=number, help="a step, at full schedule")
    add("--decay_mode", choices=get_args(DecayMode), help="whether the schedule scales the decay")
    add("--decay_kernels_only", action=argparse.BooleanOptionalAction, help="spare biases and norms")
    add("--clip", choices=get_args(Clip), help="of gradients")
    add("--clip_norm", type=positive_number, help="of gradients")
    add("--epsilon", type=positive_number, help="of AdamW")
    add(
        "--warmup_steps",
        type=whole,
        help=f"linear warm-up; by default a twentieth of the run, or {ENDLESS_WARMUP_STEPS} of one without an end",
    )
    add(
        "--strategy",
        default="default",
        help=f"one of {', '.join(STRATEGIES)}; multiworker: the same command on every machine, with TF_CONFIG such as "
        f"{TF_CONFIG_EXAMPLE}",
    )
    add("--replicas", type=positive, help="of --strategy=mirrored; by default one a GPU")
    add("--tpu", help="of --strategy=tpu: local, on the TPU's own machine, or its name; a slice of one host")
    add(
        "--steps_per_execution",
        type=positive,
        default=1,
        help="steps that are handed to the device at once; what is due in between comes after them",
    )
    add(
        "--jit_compile", action="store_true", help="compile the steps of an execution with XLA; on one device"
    )
    add("--precision", default="float32", choices=tuple(PRECISIONS), help="of the student's convolutions")
    add(
        "--sync_batch_norm",
        action="store_true",
        help="batch normalisation over all replicas' views of a step",
    )
    add("--deterministic", action="store_true", help="TensorFlow's deterministic ops: bit-equal runs")
    add("--eval_split", help="split that intervals are evaluated on; by default validation, else test")
    add(
        "--eval_every",
        type=positive,
        help=f"steps between evaluations; by default a tenth of the run, or {ENDLESS_EVAL_EVERY} of one without an end",
    )
    add("--eval_batch_size", type=batch_size, default=256, help="images at a time")
    add("--log_every", type=positive, default=20, help="steps between lines of metrics.jsonl")
    add("--checkpoint_every", type=positive, default=1000, help="steps; intervals end with one as well")
    add("--image_cache_bytes", type=whole, default=2 << 30, help="for decoded images, if all of them fit")
    add_input_buffer_flag(parser)


def _shared_actions() -> list[argparse.Action]:
    parser = Parser(add_help=False)
    add_shared_flags(parser)
    return parser._actions


def shared_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_shared_flags` among others, by name."""
    return {action.dest: getattr(flags, action.dest) for action in _shared_actions()}


def shared_arguments(flags: argparse.Namespace) -> list[str]:
    """Arguments that give these flags again, those that have their default left out."""
    out = []
    for action in _shared_actions():
        value = getattr(flags, action.dest)
        if value == action.default:
            continue
        name = f"--{action.dest}"
        if isinstance(value, bool):
            out.append(name if value else f"--no-{action.dest}")
        else:
            out.append(f"{name}={value}")
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What was asked of a run, resolved.

    Attributes:
      flags: as given.
      recipe_name, recipe: with the flags that override it.
      temperature: T of the loss.
      length: of the run.
      warmup_steps: of the schedule.
      eval_split: for intervals, or None where the store has no evaluation logits.
      eval_every: steps of an interval.
    """

    flags: dict[str, Any]
    recipe_name: str
    recipe: TrainRecipe
    temperature: float
    length: RunLength
    warmup_steps: int
    eval_split: str | None
    eval_every: int

    @property
    def arm(self) -> Arm:
        """What the run is trained on."""
        return ARMS[self.flags["arm"]]

    def to_json(self) -> dict[str, Any]:
        """The text of config.json: everything that was asked. JSON has no infinity: `inf`, as on the command line."""
        out: dict[str, Any] = _spell_infinity(dataclasses.asdict(self))
        return out

    def identity(self, spec_digest: str) -> dict[str, Any]:
        """What has to be the same for a run to be continued from its checkpoint.

        Length and schedule are left out: a finished run may be extended.
        """
        recipe = {
            k: v
            for k, v in self.recipe.to_json().items()
            if k not in ("source", "warmup_steps", "views", "epochs", "allow_short_run")
        }
        out = {
            "spec": spec_digest,
            "recipe_name": self.recipe_name,
            **recipe,
            "temperature": self.temperature,
            "seed": self.flags["seed"],
            "precision": self.flags["precision"],
        }
        # Checkpoints of an ordinary run do not say so.
        return out if self.arm is OFFLINE else {**out, "arm": self.arm.name}


def _spell_infinity(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _spell_infinity(branch) for name, branch in tree.items()}
    return "inf" if tree == math.inf else tree


def resolve(flags: argparse.Namespace, store: Store) -> TrainOptions:
    """Flags and a store to options.

    Raises:
      UserError: anything that cannot work, or that is surely a mistake, before anything is loaded.
    """
    _check_combinations(flags)
    spec = store.spec
    name = flags.recipe or default_recipe(spec)
    recipe = train_recipe(name)
    if not flags.allow_recipe_mismatch:
        check_views(name, spec)
    given = {f.name: getattr(flags, f.name, None) for f in dataclasses.fields(TrainRecipe)}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})
    if recipe.student not in STUDENTS:
        raise UserError(f"--student={recipe.student}: expected one of {', '.join(sorted(STUDENTS))}")
    epochs = None if flags.steps else recipe.epochs or store.epochs
    length = RunLength.of(
        epochs=epochs,
        steps=flags.steps,
        batch_size=recipe.batch_size,
        num_examples=spec.num_examples,
        stored_views=store.views.num_records,
    )
    temperature = spec.temperature if recipe.temperature is None else recipe.temperature
    if spec.make_codec().only_temperature not in (None, temperature):
        raise UserError(
            f"--temperature={temperature:g}: the store's codec {spec.codec} keeps the softmax of --temperature={spec.temperature:g} "
            "alone; train at that, or precompute with another codec or temperature"
        )
    arm = ARMS[flags.arm]
    if arm is not OFFLINE:
        length = _compared(arm, length, flags, store)
    if flags.teacher is None and not arm.live:
        _check_stored(length, store)
    default = ENDLESS_WARMUP_STEPS if length.endless else int(length.steps // 20)
    warmup_steps = default if recipe.warmup_steps is None else recipe.warmup_steps
    if warmup_steps >= length.steps and not recipe.allow_short_run:
        raise UserError(
            f"--warmup_steps={warmup_steps}: the run has {length.steps} steps and would never leave its warm-up; "
            "train longer, warm up shorter, or pass --allow_short_run"
        )
    return TrainOptions(
        flags=dict(vars(flags)),
        recipe_name=name,
        recipe=recipe,
        temperature=temperature,
        length=length,
        warmup_steps=warmup_steps,
        eval_split=_eval_split(flags.eval_split, store),
        eval_every=flags.eval_every or _eval_every(length),
    )


def _check_combinations(flags: argparse.Namespace) -> None:
    """Refuses flags that exclude each other, or need another.

    Raises:
      UserError: names both.
    """
    if flags.epochs and flags.steps:
        raise UserError("give either --epochs or --steps")
    if flags.jit_compile and flags.strategy != "default":
        raise UserError(
            f"--jit_compile: for one device, --strategy=default; got --strategy={flags.strategy}; leave one of them out (a "
            "TPU's steps are compiled anyway)"
        )
    if flags.write_back and flags.teacher is None:
        raise UserError("--write_back needs --teacher: it appends what an online teacher says to the store")
    if flags.write_back and flags.steps_per_execution > 1:
        raise UserError(
            f"--write_back: with --steps_per_execution={flags.steps_per_execution}, whose outputs are the last step's "
            "alone, and every step's logits are needed; leave one of them out"
        )
    if flags.write_back and flags.jit_compile:
        raise UserError(
            "--write_back: with --jit_compile, under which the teacher's last bits are not those that the precompute "
            "writes; leave one of them out, or precompute the epochs"
        )


def _check_stored(length: RunLength, store: Store) -> None:
    """Refuses a run without a teacher that is longer than the store.

    Raises:
      UserError: says what is missing.
    """
    teacher = f"--teacher={store.spec.provenance.get('teacher', 'PATH')}"
    if length.endless:
        raise UserError(
            f"--epochs=inf needs --teacher: the store holds {store.epochs} epochs, and a run without an end goes on "
            f"online; pass {teacher}, or train for --epochs={store.epochs}"
        )
    if length.online_from < length.steps:
        raise UserError(
            f"{length.steps:,} steps of {length.batch_size} need {length.steps * length.batch_size:,} views, the store "
            f"holds {store.views.num_records:,} ({store.epochs} epochs); pass {teacher} to go on online, precompute "
            f"more epochs, or train for --epochs={store.epochs}"
        )


def _compared(arm: Arm, length: RunLength, flags: argparse.Namespace, store: Store) -> RunLength:
    """The length of a run of an arm that is compared with `offline`: on stored views, like that one.

    Raises:
      UserError: the store has not what the arm needs.
    """
    if flags.write_back:
        raise UserError(
            f"--arm={arm.name}: with --write_back; all its views are stored: leave one of them out"
        )
    if length.online_from < length.steps:
        raise UserError(
            f"--arm={arm.name}: {count_text(length.steps)} steps of {length.batch_size} need "
            f"{count_text(length.steps * length.batch_size)} views, the store holds {store.views.num_records:,}, and what is "
            f"compared is trained on stored views; precompute more epochs, or train for --epochs={store.epochs}"
        )
    arm.check(store)
    return dataclasses.replace(length, online_from=0) if arm.live else length


def _eval_every(length: RunLength) -> int:
    return ENDLESS_EVAL_EVERY if length.endless else -(-int(length.steps) // 10)


def _eval_split(asked: str | None, store: Store) -> str | None:
    """The split to evaluate on: as asked, else validation, else test, else none; by default none that is trained on."""
    if asked is not None:
        store.eval_reader(asked)
        return asked
    return next((name for name in ("validation", "test") if name in store.held_out_splits), None)
