"""Finds the images of a folder by split and class, `CLASS/FILE` or `SPLIT/CLASS/FILE`, or all of them, without opening them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.errors.text import printable

# Files and folders of operating systems and archivers, by lower-case name. Hidden files are skipped as well.
_CLUTTER = frozenset(
    ("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx", "@eadir")
    + ("$recycle.bin", "system volume information", "lost+found")
)
# Split by lower-case folder name.
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
    "testing": "test",
}
_TFDS_SPLIT = re.compile(r"[\w-]+")
_LAYOUTS = "expected CLASS/IMAGE.jpg or train/CLASS/IMAGE.jpg, or `unlabeled` for images without labels"
UNLABELED = ""  # class of images without labels


@dataclasses.dataclass(frozen=True)
class Folder:
    """The images of a folder.

    Attributes:
      classes: class names, sorted; a label is an index into them. None if the images have no labels.
      splits: (path, class) of each image, sorted by path, by split. The class may be `UNLABELED`.
      problems: files and folders that cannot be used, one line each.
      skipped: number of files and folders of the operating system, by name.
    """

    classes: list[str] | None
    splits: dict[str, list[tuple[Path, str]]]
    problems: list[str]
    skipped: dict[str, int]

    @property
    def images(self) -> list[tuple[Path, str]]:
        """(path, class) of all images."""
        return list(itertools.chain(*self.splits.values()))


class _Tree:
    """Lists each directory once: files and folders, sorted by name. Counts and skips those of the operating system."""

    def __init__(self) -> None:
        self.skipped: collections.Counter[str] = collections.Counter()
        self._known: dict[Path, tuple[list[Path], list[Path]]] = {}

    def _list(self, directory: Path) -> tuple[list[Path], list[Path]]:
        if directory not in self._known:
            files: list[Path] = []
            folders: list[Path] = []
            with os.scandir(directory) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name.startswith(".") or entry.name.lower() in _CLUTTER:
                        self.skipped["._*" if entry.name.startswith("._") else shown(entry.name)] += 1
                    else:
                        (folders if entry.is_dir() else files).append(Path(entry.path))
            self._known[directory] = files, folders
        return self._known[directory]

    def files(self, directory: Path) -> list[Path]:
        return self._list(directory)[0]

    def folders(self, directory: Path) -> list[Path]:
        return self._list(directory)[1]

    def counts(self, directory: Path) -> tuple[int, int]:
        """Number of files in a directory, and in its folders."""
        below = sum(len(self.files(folder)) for folder in self.folders(directory))
        return len(self.files(directory)), below


def shown(path: str | Path) -> str:
    """A path with control characters and bytes outside of UTF-8 escaped, for a terminal."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def scan(folder: Path) -> Folder:
    """Finds images by split and class.

    Raises:
      UserError: the folder does not exist, has no class folders, or its split folders cannot be determined.
    """
    if not folder.is_dir():
        raise UserError(f"`folder`={folder}: no such directory")
    tree = _Tree()
    if not tree.folders(folder):
        raise UserError(f"`folder`={folder}: has no class folders; {_LAYOUTS}")
    problems = [f"{shown(path)}: not in a class folder" for path in tree.files(folder)]
    splits: dict[str, list[tuple[Path, str]]] = {}
    for split, root in _split_roots(folder, tree).items():
        splits[split], found = _scan_split(root, tree, is_split=root != folder)
        problems += found
    trained = {name for _, name in splits.get("train", itertools.chain(*splits.values()))}
    classes = sorted({name for images in splits.values() for _, name in images})
    problems += [f"{shown(name)}: class without images in train" for name in classes if name not in trained]
    problems += _name_problems(classes, splits)
    return Folder(classes, splits, problems, dict(tree.skipped))


def scan_unlabeled(folder: Path) -> Folder:
    """Finds all images of a folder and its subfolders, which are not classes.

    If all subfolders have usual split names, and no file is beside them, they are the splits. Otherwise all images are `train`.

    Raises:
      UserError: the folder has no images, or a link to a folder that contains it.
    """
    tree = _Tree()
    roots = {"train": folder}
    below = tree.folders(folder)
    if below and not tree.files(folder) and all(path.name.lower() in _SPLIT_NAMES for path in below):
        roots = _named_splits(folder, below)
    splits = {
        split: [(path, UNLABELED) for path in _walk(root, tree, above=())] for split, root in roots.items()
    }
    problems = [
        f"{shown(roots[split])}: split folder without images" for split in splits if not splits[split]
    ]
    if not any(splits.values()):
        raise UserError(f"`folder`={folder}: has no files; expected images, in subfolders or not")
    problems += [
        f"{shown(path)}: path is not UTF-8"
        for path, _ in itertools.chain(*splits.values())
        if not _is_utf8(str(path))
    ]
    return Folder(None, splits, problems, dict(tree.skipped))


def _walk(directory: Path, tree: _Tree, *, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files of a directory, then those of its subfolders."""
    here = directory.resolve()
    if here in above:
        raise UserError(f"{shown(directory)}: is a link to a folder that contains it; remove the link")
    yield from tree.files(directory)
    for folder in tree.folders(directory):
        yield from _walk(folder, tree, above=(*above, here))


def _split_roots(folder: Path, tree: _Tree) -> dict[str, Path]:
    """Finds the folder of each split. Without split folders, the whole folder is `train`.

    A folder is a split folder if it has a usual split name and most of its files are in its subfolders. If there is one,
    all its siblings are split folders, too.

    Raises:
      UserError: most files are two levels deep but no folder has a split name, or two folders have the same split.
    """
    counts = {directory: tree.counts(directory) for directory in tree.folders(folder)}
    nested = [directory for directory, (inside, below) in counts.items() if below > inside]
    if not any(directory.name.lower() in _SPLIT_NAMES for directory in nested):
        if sum(below for _, below in counts.values()) > sum(inside for inside, _ in counts.values()):
            names = ", ".join(shown(directory.name) for directory in nested[:3])
            raise UserError(
                f"`folder`={folder}: images are two levels deep, in folders such as {names}, and none of these is named train; "
                f"{_LAYOUTS}; name split folders train, validation and test, or move class folders up"
            )
        return {"train": folder}
    return _named_splits(folder, counts)


def _named_splits(folder: Path, directories: Iterable[Path]) -> dict[str, Path]:
    """The split of each directory.

    Raises:
      UserError: a name cannot be a split of TFDS, or two directories have the same split.
    """
    roots: dict[str, Path] = {}
    for directory in directories:
        split = _SPLIT_NAMES.get(directory.name.lower(), directory.name)
        if split.lower() == "all" or not _TFDS_SPLIT.fullmatch(split):
            raise UserError(
                f"{shown(directory)}: not a split name of TFDS (letters, digits, _ and -; 'all' is reserved); rename the folder"
            )
        if split in roots:
            raise UserError(
                f"`folder`={folder}: {shown(roots[split].name)} and {shown(directory.name)} are the same split; move the images of "
                "one into the other"
            )
        roots[split] = directory
    return roots


def _scan_split(root: Path, tree: _Tree, *, is_split: bool) -> tuple[list[tuple[Path, str]], list[str]]:
    """Returns the (path, class) of each image of a split folder, and problems."""
    images: list[tuple[Path, str]] = []
    problems = []
    if is_split and (count := len(tree.files(root))):
        problems.append(
            f"{shown(root)}: {count:,} files directly in the split folder, expected {shown(root.name)}/CLASS/IMAGE.jpg"
        )
    for class_folder in tree.folders(root):
        problems += [f"{shown(path)}: folder in a class folder" for path in tree.folders(class_folder)]
        found = [(path, class_folder.name) for path in tree.files(class_folder)]
        if not found:
            problems.append(f"{shown(class_folder)}: class folder without images")
        images += found
    if not images and not problems:
        problems.append(f"{shown(root)}: split folder without images")
    return images, problems


def _name_problems(classes: list[str], splits: dict[str, list[tuple[Path, str]]]) -> list[str]:
    """Problems of class and file names. TFDS stores each class name as a stripped line of a text file."""
    problems = []
    spelled: dict[str, str] = {}
    for name in classes:
        if not _is_utf8(name):
            problems.append(f"'{shown(name)}': class name is not UTF-8; rename the folder")
            continue
        if name != name.strip() or re.search(r"[\r\n]", name):
            problems.append(
                f"'{shown(name)}': class name starts or ends with a blank, or has a line break; rename the folder"
            )
        if (other := spelled.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            problems.append(
                f"'{shown(name)}': same class name as '{other}' in other Unicode characters; rename one of the folders"
            )
    paths = (path for images in splits.values() for path, _ in images)
    problems += [f"{shown(path)}: file name is not UTF-8" for path in paths if not _is_utf8(path.name)]
    return problems


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
