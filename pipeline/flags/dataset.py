"""The flags of `pipeline.dataset import`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.parser import Parser, check_exists, file_path, refuse_without_effect
from pipeline.errors import UserError

COMMAND = "python -m pipeline.dataset import"
CHANGES = ("apply_orientation", "flatten_alpha", "convert_to_png")  # flags that change images


def make_parser() -> tuple[Parser, Parser]:
    """The command's parser, and that of its one subcommand."""
    parser = Parser(
        prog="python -m pipeline.dataset",
        description="Makes a TFDS data set of ArrayRecord files, of a folder of images or of a data set in another format. "
        "`import --help` lists the flags.",
    )
    text = "Makes a data set that --dataset takes."
    commands = parser.add_subparsers(dest="command", required=True, metavar="import")
    sub = commands.add_parser("import", help=text, description=text)
    add = sub.add_argument
    add("--folder", type=file_path, help="class folders of JPEG and PNG images, or split folders of those")
    add("--name", help="of the data set that is made of a folder")
    add("--from_tfds", metavar="NAME", help="data set prepared in another format, NAME[/CONFIG][:VERSION]")
    add("--from_data_dir", type=file_path, help="TFDS data directory of that; by default TFDS's own")
    add("--data_dir", type=file_path, required=True, help="TFDS data directory to write to")
    add(
        "--apply_orientation",
        action="store_true",
        help="turn images with an EXIF orientation upright: a JPEG is encoded again at quality 95, a PNG without loss; "
        "otherwise they stay as stored, since TensorFlow's decoders ignore the tag",
    )
    add(
        "--flatten_alpha",
        action="store_true",
        help="put images with transparent pixels onto white; otherwise their alpha channel is dropped",
    )
    add(
        "--convert_to_png",
        action="store_true",
        help="make a PNG, without loss, of each WebP, TIFF, BMP and GIF file of one frame; an ICC profile is kept, EXIF is "
        "not; otherwise such files are refused",
    )
    return parser, sub


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow and TFDS.

    Raises:
      UserError: a flag is unknown, excludes another or needs another, or a path is missing.
    """
    parser, sub = make_parser()
    if list(argv[:1]) != ["import"]:
        parser.parse_strictly(argv[:1])  # --help, or a mistake
        raise UserError(f"name a command: `{COMMAND} ...`")
    flags = sub.parse_strictly(argv[1:])
    if (flags.folder is None) == (flags.from_tfds is None):
        raise UserError("give either --folder and --name, or --from_tfds")
    if (flags.folder is None) != (flags.name is None):
        raise UserError("--name goes with --folder: it names what is made of it")
    if flags.folder is not None:
        refuse_without_effect(sub.given(argv), ["from_data_dir"], "with --folder")
    if flags.folder is None and (asked := [name for name in CHANGES if getattr(flags, name)]):
        raise UserError(f"--{asked[0]} goes with --folder: records of --from_tfds are copied as they are")
    if flags.folder is not None and not Path(flags.folder).is_dir():
        raise UserError(f"--folder={flags.folder}: no such directory")
    check_exists("--from_data_dir", flags.from_data_dir)
    return flags
