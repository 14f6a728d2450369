"""The flags of `pipeline.dataset import`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.effects import Condition, refuse_without_effect
from pipeline.cli.parser import Parser, check_exists, file_path, positive, positive_number, whole
from pipeline.errors import UserError
from pipeline.flags.prepared import IMPORT, check_prepared

FOLDER_CHANGES = ("apply_orientation", "flatten_alpha", "convert_to_png")
CHANGES = (*FOLDER_CHANGES, "short_side", "quality")  # flags that change images
JPEG_QUALITY = 95


def _of_folder(otherwise: str) -> Condition:
    return Condition(lambda flags: flags.folder is not None, f"with --from_tfds, {otherwise}")


CONDITIONS = {
    "name": _of_folder("which keeps its name"),
    "from_data_dir": Condition(lambda flags: flags.from_tfds is not None, "without --from_tfds"),
    **dict.fromkeys(FOLDER_CHANGES, _of_folder("whose images are kept as they are but for --short_side")),
    "image_feature": Condition(
        lambda flags: flags.from_tfds is not None and flags.short_side is not None,
        "without --from_tfds and --short_side",
    ),
    "quality": Condition(
        lambda flags: flags.short_side is not None or flags.apply_orientation,
        "without --short_side or --apply_orientation",
    ),
    "unlabeled": _of_folder("which has labels or not"),
    "holdout": _of_folder("which has slices, such as --split='train[:90%]' of the precompute"),
    "seed": Condition(lambda flags: flags.holdout is not None, "without --holdout"),
}


def _share(text: str) -> float:
    """argparse type: a number between 0 and 1."""
    found = positive_number(text)
    if found >= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share above 0 and below 1, such as 0.1")
    return found


def _quality(text: str) -> int:
    """argparse type: a JPEG quality."""
    if (found := positive(text)) > 100:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 to 100")
    return found


def make_parser() -> tuple[Parser, Parser]:
    """The command's parser, and that of its subcommand `import`."""
    parser = Parser(
        prog="python -m pipeline.dataset",
        description="Makes a TFDS data set of ArrayRecord files from a folder of images, or from a data set in another "
        "format. `import --help` lists the flags.",
    )
    text = "Makes a data set for --dataset."
    commands = parser.add_subparsers(dest="command", required=True, metavar="import")
    sub = commands.add_parser(
        "import",
        help=text,
        description=text,
        examples=[
            f"{IMPORT} --folder=images --name=my_images --data_dir=data",
            f"{IMPORT} --from_tfds=oxford_flowers102 --data_dir=data --short_side=256",
        ],
    )
    add = sub.group("folder of images").add_argument
    add(
        "--folder",
        type=file_path,
        help="Folder of JPEG and PNG images as CLASS/IMAGE or SPLIT/CLASS/IMAGE.",
    )
    add("--name", help="Name of the new data set.")
    add(
        "--unlabeled",
        action="store_true",
        help="Take all images of the folder and its subfolders, without labels. Subfolders are splits if all of them have "
        "names such as train and test.",
    )
    add(
        "--holdout",
        type=_share,
        metavar="SHARE",
        help="Make a split `test` of this share of each class, such as 0.1. It depends on the contents of the files and "
        "on --seed. Each class keeps a training image.",
    )
    add("--seed", type=whole, default=0, help="Random seed of --holdout.")
    add(
        "--apply_orientation",
        action="store_true",
        help="Rotate images as their EXIF orientation says. JPEG files are encoded again, PNG files without loss. "
        " By default images stay as stored, since TensorFlow's decoders ignore the tag.",
    )
    add(
        "--flatten_alpha",
        action="store_true",
        help="Put images with transparent pixels onto white. By default the alpha channel is dropped.",
    )
    add(
        "--convert_to_png",
        action="store_true",
        help="Convert single-frame WebP, TIFF, BMP and GIF files to PNG without loss, keeping the ICC profile but not EXIF. "
        "By default such files are refused.",
    )
    add = sub.group("data set of TFDS").add_argument
    add(
        "--from_tfds",
        metavar="NAME",
        help="TFDS data set NAME[/CONFIG][:VERSION] in another file format, or in any with --short_side.",
    )
    add(
        "--from_data_dir",
        type=file_path,
        help="TFDS data directory of --from_tfds (default: that of TFDS).",
    )
    add = sub.group("smaller images").add_argument
    add(
        "--short_side",
        type=positive,
        metavar="PIXELS",
        help="Scale images whose short side is longer down to it, as JPEG, which saves most of the decoding in training. The new "
        "data set is the config short_side_PIXELS, so that its stores are not confused with those of the originals.",
    )
    add(
        "--quality",
        type=_quality,
        default=JPEG_QUALITY,
        help="JPEG quality of images that are encoded again.",
    )
    add(
        "--image_feature",
        metavar="NAME",
        help="Image of --from_tfds that is scaled (default: the supervised one, or the only one).",
    )
    add = sub.group("output").add_argument
    add("--data_dir", type=file_path, required=True, help="TFDS data directory for the new data set.")
    return parser, sub


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow and TFDS.

    Raises:
      UserError: a flag is unknown, without effect, excludes another or needs another, or a path does not exist.
    """
    parser, sub = make_parser()
    if list(argv[:1]) != ["import"]:
        parser.parse_strictly(argv[:1])  # --help, or a mistake
        raise UserError(f"the subcommand is missing: `{IMPORT} ...`")
    flags = sub.parse_strictly(argv[1:])
    if (flags.folder is None) == (flags.from_tfds is None):
        got = "neither" if flags.folder is None else "both"
        raise UserError(f"got {got} of --folder and --from_tfds; give one of them")
    if flags.folder is not None and flags.name is None:
        raise UserError(f"--name is missing: the name of the data set made from --folder={flags.folder}")
    refuse_without_effect(sub, argv[1:], flags, conditions=CONDITIONS)
    if flags.folder is not None and not Path(flags.folder).is_dir():
        raise UserError(f"--folder={flags.folder}: no such directory")
    if flags.folder is not None and Path(flags.data_dir).resolve().is_relative_to(
        Path(flags.folder).resolve()
    ):
        raise UserError(
            f"--data_dir={flags.data_dir}: is inside --folder={flags.folder}, all of whose folders are read; name a directory "
            "outside of it"
        )
    check_exists("--from_data_dir", flags.from_data_dir)
    if flags.from_tfds is not None:
        check_prepared(flags.from_tfds, flags.from_data_dir, parameter="from_tfds")
    return flags
