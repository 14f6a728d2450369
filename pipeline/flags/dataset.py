"""The flags of `pipeline.dataset import`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.effects import Condition, refuse_without_effect
from pipeline.cli.parser import Parser, check_exists, file_path
from pipeline.errors import UserError

COMMAND = "python -m pipeline.dataset import"
CHANGES = ("apply_orientation", "flatten_alpha", "convert_to_png")  # flags that change images

CONDITIONS = {
    "name": Condition(lambda flags: flags.folder is not None, "with --from_tfds, which keeps its name"),
    "from_data_dir": Condition(lambda flags: flags.from_tfds is not None, "without --from_tfds"),
    **dict.fromkeys(
        CHANGES,
        Condition(lambda flags: flags.folder is not None, "with --from_tfds, which copies records unchanged"),
    ),
}


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
            f"{COMMAND} --folder=images --name=my_images --data_dir=data",
            f"{COMMAND} --from_tfds=oxford_flowers102 --data_dir=data",
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
        "--apply_orientation",
        action="store_true",
        help="Rotate images as their EXIF orientation says. JPEG files are encoded again at quality 95, PNG files without "
        "loss. By default images stay as stored, since TensorFlow's decoders ignore the tag.",
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
    add = sub.group("data set in another format").add_argument
    add("--from_tfds", metavar="NAME", help="TFDS data set NAME[/CONFIG][:VERSION] in another file format.")
    add(
        "--from_data_dir",
        type=file_path,
        help="TFDS data directory of --from_tfds (default: that of TFDS).",
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
        raise UserError(f"the subcommand is missing: `{COMMAND} ...`")
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
    return flags
