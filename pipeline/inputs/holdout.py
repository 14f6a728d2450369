"""Splits a test split off: seeded, stratified by class, and determined by what the files contain.

Neither names nor the order of the files matter. Files of a class with the same content stay in one split, so that no training
image is also a test image.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

from pipeline.errors import UserError


def _key(seed: int, content: bytes) -> bytes:
    return hashlib.blake2b(content, key=seed.to_bytes(8, "little"), digest_size=16).digest()


def _wanted(sizes: dict[str, int], share: float, seed: int) -> dict[str, int]:
    """Number of test images of each class by the largest remainder, so that their sum is the share of all images.

    A class keeps at least one training image.
    """
    total = round(share * sum(sizes.values()))
    wanted = {name: min(int(share * size), size - 1) for name, size in sizes.items()}
    by_remainder = sorted(
        sizes, key=lambda name: (int(share * sizes[name]) - share * sizes[name], _key(seed, name.encode()))
    )
    for name in by_remainder:
        if sum(wanted.values()) < total and wanted[name] < sizes[name] - 1:
            wanted[name] += 1
    return wanted


def held_out(classes: Sequence[str], contents: Sequence[bytes], *, share: float, seed: int) -> set[int]:
    """Chooses the images of the test split.

    Args:
      classes: class of each image; the same for all if they have none.
      contents: hash of each image's file.
      share: share of the images, between 0 and 1.
      seed: random seed.

    Returns:
      Indices of the images in the test split.

    Raises:
      UserError: no image can be held out.
    """
    by_class: dict[str, dict[bytes, list[int]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for index, (name, content) in enumerate(zip(classes, contents, strict=True)):
        by_class[name][content].append(index)
    wanted = _wanted({name: sum(map(len, same.values())) for name, same in by_class.items()}, share, seed)
    chosen: set[int] = set()
    for name, same in by_class.items():
        left = wanted[name]
        for content in sorted(same, key=lambda content: _key(seed, content)):
            if len(same[content]) <= left:
                chosen.update(same[content])
                left -= len(same[content])
    if not chosen:
        raise UserError(
            f"`holdout`={share}: holds out none of {len(classes):,} images (classes: {len(by_class):,}), since each class keeps "
            "a training image; use a larger share, or leave it out"
        )
    return chosen
