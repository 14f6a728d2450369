"""Evaluates a saved model: `python -m trainer.evaluate --student=PATH --store=DIR`, or `--dataset=NAME --split=test`.

    python -m trainer.evaluate --student=runs/mnist_5k/student/student --store=runs/mnist_5k/store     # ten seconds

Any SavedModel or `.keras` file that returns logits can be evaluated. On a store, the images are the evaluation crops that the
teacher saw, and the figures are those of `trainer.train` in result.json: top-1 accuracy, agreement with the teacher, and
distillation loss. On a data set without a store, there is no teacher. The calibration error and the confusions are computed
wherever there are labels.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("trainer.evaluate", flags="trainer.flags.evaluate")

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.errors import DataError, UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import UNLABELED, ClassMatch, match_classes, top1
from pipeline.inputs.locate import open_dataset, select_split
from pipeline.inputs.teacher import Teacher
from pipeline.pages.template import report_extra
from pipeline.storage.files import write_json
from pipeline.store.classes import Classes
from pipeline.store.combination import open_stores
from pipeline.store.view_store import ViewStore
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.recipes import view_recipe
from trainer.config.run_files import BEST_DIRECTORY, CONFIG_FILE, STUDENT_DIRECTORY, read_config
from trainer.flags.evaluate import DEFAULT_SPLIT, parse
from trainer.run.evaluation import (
    Evaluator,
    OnBatch,
    accuracy_text,
    calibration_text,
    evaluation_text,
    split_logits,
    unlabeled_text,
)
from trainer.run.options import check_temperature
from trainer.run.predictions import Predictions, calibration_error
from trainer.run.saved_student import as_keras, check_batches, fit_to_student, load_student

_ANY_SIZE = 224  # to try a model of images of any size on
_CONFUSIONS = 20  # most frequent ones that are listed

Figures = dict[str, Any]
Evaluated = dict[str, tuple[Figures, Predictions]]  # by split


def main(argv: list[str]) -> int:
    """Runs the command; see the module's docstring."""
    flags = parse(argv)
    if flags.html is not None:
        with report_extra("the page"):
            from trainer.pages.evaluation_page import write_evaluation_page
    facts, evaluated = _evaluate_on_dataset(flags) if flags.store is None else _evaluate_on_store(flags)
    result = {**facts, "evaluation": {split: figures for split, (figures, _) in evaluated.items()}}
    if flags.json is not None:
        write_json(flags.json, result)
        print(f"figures: {flags.json}")
    if flags.html is not None:
        write_evaluation_page(result, {split: found for split, (_, found) in evaluated.items()}, flags.html)
        print(f"page: {flags.html}")
    return 0


def _evaluate_on_store(flags: argparse.Namespace) -> tuple[Figures, Evaluated]:
    """Evaluates on splits of a store; returns the facts of the evaluation, and the figures by split."""
    store = open_stores(
        flags.store,
        weights=flags.store_weights,
        image_size=flags.image_size,
        shard_cache_bytes=flags.shard_cache_bytes,
    )
    splits = _choose_splits(flags.split, store)
    loss = _Loss.of(flags, store)
    check_temperature(loss.temperature, store)
    store.check_renderer()
    dataset = open_dataset(store, splits[0], data_dir=flags.data_dir, data_cache_bytes=flags.data_cache_bytes)
    student = load_student(flags, image_size=store.image_size)
    store = fit_to_student(store, student)
    match = match_classes(dataset, store.spec.num_classes, store.classes)
    if match.note is not None:
        print(match.note, flush=True)
    print(f"{_describe(flags, student)}; distillation loss: {loss.text}", flush=True)
    evaluated = {}
    for split in splits:
        selected = select_split(store, split, dataset)
        check_batches(student, selected)
        evaluator = Evaluator(
            store,
            selected,
            batch_size=flags.eval_batch_size,
            temperature=loss.temperature,
            temperature_squared=loss.temperature_squared,
            cache_bytes=0,
            buffer_bytes=flags.input_buffer_bytes,
        )
        predictions = _predictions(match, selected)
        with _collecting(predictions, student, split) as on_batch:
            figures = dict(evaluator.evaluate(as_keras(student), on_batch=on_batch))
        figures |= _details(predictions)
        note = "" if split in store.held_out_splits else f" (may overlap {store.spec.dataset.split})"
        print(evaluation_text(f"{split}{note}", figures), flush=True)
        evaluated[split] = figures, predictions
    facts = {
        **_facts(flags, student, dataset, match),
        "store": [part.location for part in store.stores],
        **store.identity(),
        **dataclasses.asdict(loss),
    }
    return facts, evaluated


def _evaluate_on_dataset(flags: argparse.Namespace) -> tuple[Figures, Evaluated]:
    """Evaluates on a split of a data set, without a teacher's figures; see `_evaluate_on_store`."""
    dataset = Dataset(
        flags.dataset,
        flags.split or DEFAULT_SPLIT,
        data_dir=flags.data_dir,
        data_cache_bytes=flags.data_cache_bytes,
        image_feature=flags.image_feature,
        label_feature=flags.label_feature,
    )
    student = load_student(flags, image_size=flags.image_size or _ANY_SIZE)
    if flags.image_size is None and student.fixed_size is None:
        raise UserError(f"{student.what}: takes images of any size; pass --image_size")
    match = match_classes(dataset, student.num_classes, Classes())
    predictions = _predictions(match, dataset)
    _check_labels(student, dataset, predictions)
    check_batches(student, dataset)
    eval_crop = EvalCrop() if flags.recipe is None else view_recipe(flags.recipe).eval_crop
    print(_describe(flags, student), flush=True)
    batches = split_logits(
        as_keras(student),
        dataset,
        eval_crop=eval_crop,
        image_size=student.image_size,
        batch_size=flags.eval_batch_size,
        remedy="lower --eval_batch_size",
        buffer_bytes=flags.input_buffer_bytes,
    )
    with _collecting(predictions, student, dataset.split) as on_batch:
        for ours in batches:
            on_batch(ours, None)
    figures: Figures = {
        "examples": dataset.num_examples,
        "unlabeled": int((predictions.labels == UNLABELED).sum()),
        "student_top1": top1(predictions.predicted, predictions.labels),
        **_details(predictions),
    }
    text = f"{dataset.split}: top-1 {accuracy_text(figures['student_top1'])}{calibration_text(figures)}"
    print(f"{text}{unlabeled_text(figures)}", flush=True)
    facts = {**_facts(flags, student, dataset, match), "eval_crop": eval_crop.to_json()}
    return facts, {dataset.split: (figures, predictions)}


def _check_labels(student: Teacher, dataset: Dataset, predictions: Predictions) -> None:
    """Refuses a data set without the labels that the accuracy needs.

    Raises:
      UserError: it has no labels, or those of other classes.
    """
    if not dataset.num_classes:
        raise UserError(
            f"--dataset={dataset.name}: has no labels, and without a store there is nothing else to compute; pass --store"
        )
    if predictions.match.no_accuracy is not None:
        raise UserError(
            f"{student.what}: has {student.num_classes:,} classes, but {dataset.name} has {dataset.num_classes:,}; evaluate it on a "
            "--store that was precomputed with --class_map"
        )
    if predictions.compared_with != "label":
        raise UserError(
            f"--split={dataset.split}: none of its {dataset.num_examples:,} images has a label; {dataset.name} has splits "
            f"{', '.join(dataset.split_names)}"
        )


def _choose_splits(given: str | None, store: ViewStore) -> list[str]:
    """The split that is asked for; otherwise all held-out splits; if there are none, all splits.

    Raises:
      UserError: the store has no such split, or none at all.
    """
    if not store.eval_splits:
        raise UserError(
            f"`store`={store.location}: has no evaluation logits; run its precompute again with --eval_splits=SPLIT, or evaluate on "
            f"--dataset={store.spec.dataset.name}"
        )
    if given is None:
        return store.held_out_splits or store.eval_splits
    if given not in store.eval_splits:
        raise UserError(
            f"--split={given}: {store.location} has evaluation logits of {', '.join(store.eval_splits)}; name one of them"
        )
    return [given]


@dataclasses.dataclass(frozen=True)
class _Loss:
    """How the distillation loss is computed.

    Attributes:
      loss_of: the config.json of the run that this is taken from; None for none.
    """

    temperature: float
    temperature_squared: bool
    loss_of: str | None = None

    @classmethod
    def of(cls, flags: argparse.Namespace, store: ViewStore) -> _Loss:
        """As the flags say; by default as in the run that the student is from, or KL at the store's temperature."""
        given = {name: getattr(flags, name) for name in ("temperature", "temperature_squared")}
        if None not in given.values():
            return cls(**given)
        found, path = cls(store.spec.temperature, False), Path(flags.student)
        if path.name in (STUDENT_DIRECTORY, BEST_DIRECTORY):
            with contextlib.suppress(FileNotFoundError):  # not in the directory of a run
                found = cls._of_run(path.parent)
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(found, **given, loss_of=None) if given else found

    @classmethod
    def _of_run(cls, workdir: Path) -> _Loss:
        place = workdir / CONFIG_FILE
        try:
            config = read_config(workdir)
        except ValueError as error:
            raise UserError(
                f"{place}: not the config of a run, whose loss is used by default ({error}); pass --temperature and "
                "--temperature_squared or --no-temperature_squared"
            ) from error
        return cls(config["temperature"], config["recipe"].get("temperature_squared", False), str(place))

    @property
    def text(self) -> str:
        """The loss in words."""
        origin = f", as in {self.loss_of}" if self.loss_of else ""
        return f"{'T^2 ' * self.temperature_squared}KL at T = {self.temperature:g}{origin}"


def _predictions(match: ClassMatch, dataset: Dataset) -> Predictions:
    labels = match.labels(dataset, np.arange(dataset.num_examples))
    return Predictions(match=match, labels=labels, class_names=dataset.class_names)


@contextlib.contextmanager
def _collecting(predictions: Predictions, student: Teacher, split: str) -> Iterator[OnBatch]:
    """Yields a function that collects predictions and advances a progress bar."""
    with tqdm(total=len(predictions.labels), desc=split, unit=" images", dynamic_ncols=True) as bar:

        def add(ours: np.ndarray, theirs: np.ndarray | None) -> None:
            if not (finite := np.isfinite(ours)).all():
                row, column = np.argwhere(~finite)[0]
                raise DataError(
                    f"{student.what}: logit {column} of example {bar.n + row} of {split} is {ours[row, column]}; expected finite numbers"
                )
            predictions.add(ours, theirs)
            bar.update(len(ours))

        yield add


def _describe(flags: argparse.Namespace, student: Teacher) -> str:
    parameters = "" if student.num_parameters is None else f"{student.num_parameters:,} parameters, "
    size = student.image_size
    return f"{flags.student}: {parameters}{student.num_classes:,} classes, images of {size} x {size} pixels"


def _facts(flags: argparse.Namespace, student: Teacher, dataset: Dataset, match: ClassMatch) -> Figures:
    """The entries of the result about student and data."""
    return {
        "student": flags.student,
        "parameters": student.num_parameters,
        "num_classes": student.num_classes,
        "image_size": student.image_size,
        "dataset": dataset.name,
        "no_accuracy": match.no_accuracy,
    }


def _details(predictions: Predictions) -> Figures:
    """The entries of a split's figures that only the predictions show."""
    bins = predictions.calibration()
    return {
        "calibration_error": calibration_error(bins),
        "calibration": bins,
        "compared_with": predictions.compared_with,
        "confusions": predictions.confusions(_CONFUSIONS),
    }
