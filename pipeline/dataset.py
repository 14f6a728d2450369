"""Makes a data set for `--dataset=NAME` from a folder of images, or from a TFDS data set in another file format.

python -m pipeline.dataset import --folder=DIR --name=NAME --data_dir=DIR          # about 500 images per second
python -m pipeline.dataset import --folder=DIR --name=NAME --data_dir=DIR --unlabeled --holdout=0.1
python -m pipeline.dataset import --from_tfds=NAME --from_data_dir=DIR --data_dir=DIR
python -m pipeline.dataset import --from_tfds=NAME --data_dir=DIR --short_side=256    # Flowers102: a minute
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("pipeline.dataset", flags="pipeline.flags.dataset")

from pipeline.flags.dataset import parse
from pipeline.inputs.dataset_import import run_import


def main(argv: list[str]) -> int:
    """Runs the command; see the module's docstring."""
    return run_import(parse(argv))
