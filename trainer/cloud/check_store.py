"""Resolves the flags of a trainer against the metadata of its stores: `python -m trainer.cloud.check_store --store=DIR ...`.

Takes the flags of `trainer.train`. `trainer.launch` runs it in a child process, because it needs TensorFlow, on copies of
the metadata before a TPU is created. It opens no shard.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("trainer.cloud.check_store")

from pipeline.cli.parser import positive
from pipeline.store.combination import open_stores
from trainer.config.choices import student_kind
from trainer.config.run_length import replica_batch_size
from trainer.flags.train import check_flags, make_parser
from trainer.models import build_student
from trainer.run.describe import describe
from trainer.run.options import resolve


def main(argv: list[str]) -> int:
    """Prints the description of the run that the flags give."""
    parser = make_parser()
    parser.prog, parser.description = (
        "python -m trainer.cloud.check_store",
        "Resolves the flags of a trainer.",
    )
    parser.add_argument(
        "--fewest_replicas", type=positive, default=1, help="Minimum number of replicas of the strategy."
    )
    parser.add_argument("--new_run", action="store_true", help="The work directory has no checkpoint.")
    flags = parser.parse_strictly(argv)
    check_flags(flags)
    store = open_stores(flags.store, weights=flags.store_weights, image_size=flags.image_size)
    options = resolve(flags, store)
    if flags.new_run:
        options.check_teacher()
    replica_batch_size(options.recipe.batch_size, flags.fewest_replicas)
    if student_kind(options.recipe.student) == "keras":  # whose smallest image size only Keras knows
        build_student(options.recipe.student, num_classes=store.spec.num_classes, image_size=store.image_size)
    print(describe(options, store))
    return 0
