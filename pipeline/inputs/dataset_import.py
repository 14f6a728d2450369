"""`python -m pipeline.dataset import`: makes a TFDS data set of ArrayRecord files.

The source is a folder of images, whose JPEG and PNG files are kept byte for byte unless a flag requests a change, or a TFDS
data set (`pipeline.inputs.tfds_import`). The result is written to a temporary directory and published by one rename.

TFDS's own `ImageFolder` reads the files at training time, without random access.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from pipeline.cli.parameters import with_flags
from pipeline.cli.units import counted
from pipeline.errors import UserError
from pipeline.flags.dataset import CHANGES
from pipeline.inputs.builder import load_builder, quiet_tfds
from pipeline.inputs.holdout import held_out
from pipeline.inputs.image_files import Changes, Examined, change, examine
from pipeline.inputs.image_folder import Folder, scan, scan_unlabeled, shown
from pipeline.inputs.new_dataset import SizeChange, in_parallel, progress_bar, published
from pipeline.inputs.tfds_import import import_tfds

VERSION = "1.0.0"
_NAME = re.compile(r"[a-z][a-z0-9_]*")  # names of TFDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """How a folder becomes a data set.

    Attributes:
      changes: changes of the images.
      unlabeled: whether subfolders are not classes.
      holdout: share of the images that becomes the split `test`; None for none.
      seed: random seed of the holdout.
    """

    changes: Changes = dataclasses.field(default_factory=Changes)
    unlabeled: bool = False
    holdout: float | None = None
    seed: int = 0

    def text(self) -> str:
        """The flags that describe the options."""
        words = ["--unlabeled"] if self.unlabeled else []
        words += [f"--holdout={self.holdout:g} --seed={self.seed}"] if self.holdout is not None else []
        return " ".join([*words, self.changes.text()]).strip()


def check_images(folder: Folder, changes: Changes) -> list[Examined]:
    """Examines every image; returns the results in the order of the images."""
    found = []
    with progress_bar(len(folder.images), "check") as bar:
        for one in in_parallel(lambda image: examine(image[0], changes), folder.images):
            found.append(one)
            bar.update()
    return found


def notes(folder: Folder, examined: list[Examined], changes: Changes) -> list[str]:
    """Lines about files that were skipped, changed, or kept although they need a change."""
    lines = []
    if folder.skipped:
        names = ", ".join(f"{count:,} {name}" for name, count in sorted(folder.skipped.items()))
        lines.append(
            f"skipped hidden files, and files of the operating system: {sum(folder.skipped.values()):,} ({names})"
        )
    if count := sum(one.oriented for one in examined):
        lines.append(
            f"images with an EXIF orientation: {count:,}, "
            + (
                "rotated"
                if changes.apply_orientation
                else "kept as stored. TensorFlow's decoders ignore the tag, so teacher and students see them rotated or "
                "mirrored; --apply_orientation corrects them"
            )
        )
    if count := sum(one.transparent for one in examined):
        lines.append(
            f"images with transparent pixels: {count:,}, "
            + (
                "put onto white"
                if changes.flatten_alpha
                else "kept as stored. The alpha channel is dropped, so teacher and students see the hidden color, often black; "
                "--flatten_alpha puts them onto white"
            )
        )
    if changes.convert_to_png and (count := sum(one.converted for one in examined)):
        lines.append(f"images converted to PNG: {count:,}")
    return lines


def make_builder(
    name: str, root: Path, folder: Folder, options: FolderOptions, on_image: Callable[[bytes, bytes], Any]
) -> type[tfds.core.GeneratorBasedBuilder]:
    """Makes the TFDS builder of a folder of images, with features `image`, `label` and `filename` (`CLASS/FILE`).

    Without labels, the features are `image` and `filename` (the path in the folder).

    Args:
      root: the folder.
      folder: its images.
      options: how it becomes a data set.
      on_image: called after each image with its bytes before and after the changes.
    """
    labels = {} if folder.classes is None else {"label": tfds.features.ClassLabel(names=folder.classes)}
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        **labels,
        "filename": tfds.features.Text(),
    }
    config = options.changes.config

    def load(item: tuple[Path, str]) -> tuple[bytes, bytes]:
        before = item[0].read_bytes()
        return before, change(before, options.changes)

    # For mypy the base class is Any, so it looks for the keyword in `object`.
    class Images(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Images from a folder."""

        VERSION = tfds.core.Version(VERSION)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                description=f"Made from a folder of images by `{f'pipeline.dataset import {options.text()}'.strip()}`.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label") if labels else None,
                disable_shuffling=True,  # examples in the order of their names
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(images) for split, images in folder.splits.items()}

        def _generate_examples(self, images: list[tuple[Path, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
            for key, (before, after) in enumerate(in_parallel(load, images)):
                path, label = images[key]
                example = {"image": io.BytesIO(after)}
                if folder.classes is None:
                    yield key, {**example, "filename": path.relative_to(root).as_posix()}
                else:
                    yield key, {**example, "label": label, "filename": f"{label}/{path.name}"}
                on_image(before, after)

    Images.name = name
    return Images


def split_off(folder: Folder, examined: list[Examined], *, share: float, seed: int) -> Folder:
    """Moves a share of the images of `train` to `test`; see `pipeline.inputs.holdout`."""
    images = folder.splits["train"]
    chosen = held_out(
        [label for _, label in images], [one.content for one in examined], share=share, seed=seed
    )
    splits = {
        split: [image for index, image in enumerate(images) if (index in chosen) == (split == "test")]
        for split in ("train", "test")
    }
    return dataclasses.replace(folder, splits=splits)


def import_folder(folder: Path, name: str, data_dir: Path, options: FolderOptions) -> tuple[str, str]:
    """Makes a data set from a folder; prints `notes`.

    Returns:
      The name of the data set, and one line that describes it.

    Raises:
      UserError: a file cannot be used, the name is taken, or the disk is full.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--name={name}: expected a letter, followed by a-z, 0-9 and _")
    if name in tfds.list_builders(with_community_datasets=False):
        raise UserError(f"--name={name}: is a data set of TFDS; use another name")
    changes = options.changes
    with published(data_dir, Path(name, changes.config, VERSION)) as aside:
        found = scan_unlabeled(folder) if options.unlabeled else scan(folder)
        if options.holdout is not None and set(found.splits) != {"train"}:
            raise UserError(
                f"`holdout`={options.holdout:g}: `folder`={folder} has splits {', '.join(found.splits)}; leave it out"
            )
        examined = check_images(found, changes)
        _refuse_problems(folder, found, examined, changes)
        if options.holdout is not None:
            found = split_off(found, examined, share=options.holdout, seed=options.seed)
        tally = SizeChange()
        with progress_bar(len(found.images), "write") as bar, quiet_tfds():

            def on_image(before: bytes, after: bytes) -> None:
                tally.add(before, after)
                bar.update()

            make_builder(name, folder, found, options, on_image)(data_dir=aside).download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    made = "/".join(filter(None, [name, changes.config]))
    scaled = f"; {tally.text(changes)}" if changes.config else ""
    return made, f"{made}: {_summary(found)}{scaled}"


def _refuse_problems(folder: Path, found: Folder, examined: list[Examined], changes: Changes) -> None:
    """Prints `notes`. Lists the files that cannot be used, and refuses the folder if there are any."""
    problems = found.problems + [
        f"{shown(path)}: {one.problem}"
        for (path, _), one in zip(found.images, examined, strict=True)
        if one.problem is not None
    ]
    for line in notes(found, examined, changes):
        print(line, file=sys.stderr)
    if problems:
        print(with_flags("\n".join(problems)), file=sys.stderr)
        raise UserError(
            f"--folder={folder}: {len(problems)} files or folders cannot be used, as listed above; fix or move them; nothing was "
            "written"
        )


def _summary(folder: Folder) -> str:
    """Numbers of images by class or folder, and by split."""
    parts = ", ".join(f"{split} {len(images):,}" for split, images in folder.splits.items())
    if folder.classes is None:
        folders = {path.parent for path, _ in folder.images}
        kinds = f"{counted(len(folders), 'folder')}, without labels"
    else:
        kinds = f"{len(folder.classes):,} classes"
    return f"{len(folder.images):,} images of {kinds} ({parts})"


def run_import(flags: argparse.Namespace) -> int:
    """Runs the import that the flags of `pipeline.flags.dataset` describe."""
    changes = Changes(**{name: getattr(flags, name) for name in CHANGES})
    if flags.folder is not None:
        options = FolderOptions(
            changes=changes, unlabeled=flags.unlabeled, holdout=flags.holdout, seed=flags.seed
        )
        name, made = import_folder(Path(flags.folder), flags.name, Path(flags.data_dir), options)
    else:
        name, made = import_tfds(
            flags.from_tfds,
            flags.from_data_dir,
            Path(flags.data_dir),
            changes,
            image_feature=flags.image_feature,
        )
    load_builder(name, flags.data_dir)
    print(f"{made}; use it with --dataset={name} --data_dir={flags.data_dir}")
    return 0
