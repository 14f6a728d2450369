"""Software and inputs of a training job as the host of the TPU sees them: what is copied there, and the paths on its disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage.bucket import is_url
from trainer.cloud.tpu_job import INSTALL_FILES
from trainer.flags.shared import check_stores, spelled


def host_inputs(flags: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The trainer's flags for stores, data and teachers, and the URLs to copy to the host by name.

    Raises:
      UserError: the numbers of stores and teachers differ, or a place is neither in a bucket nor on the VM.
    """
    flags.store = [store.rstrip("/") for store in flags.store]
    check_stores(argparse.Namespace(store=flags.store, teacher=flags.teacher, store_weights=None))
    if flags.stream_store and not any(map(is_url, flags.store)):
        raise UserError(
            f"--stream_store: expected a gs:// URL, got {spelled('store', flags.store)}; leave one of them out"
        )
    given = {"store": flags.store, "data_dir": [flags.data_dir], "teacher": flags.teacher or []}
    own, inputs = [], {}
    for flag, places in given.items():
        for number, place in enumerate(places, 1):
            name = flag if number == 1 else f"{flag}_{number}"
            if flags.stream_store and flag == "store" and place.startswith("gs://"):
                there = place
            elif place.startswith("gs://"):
                inputs[name] = place.rstrip("/")
                file = f"/{Path(place).name}" if place.endswith(".keras") else ""
                there = f"inputs/{name}{file}"
            elif place.startswith("/"):
                there = place
            else:
                raise UserError(
                    f"--{flag}={place}: expected a gs:// URL, or an absolute path on a disk of the VM"
                )
            own.append(f"--{flag}={there}")
    return own, inputs


def software(flags: argparse.Namespace) -> tuple[tuple[str, str], tuple[Path, ...]]:
    """The host script's command that prepares the trainer, and the files that it needs."""
    names = ("image", "image_file", "wheel")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    if len(given) != 1:
        raise UserError(
            f"expected exactly one of --image, --image_file and --wheel, got {len(given)}: pass the trainer's software"
        )
    ((kind, value),) = given.items()
    if kind == "image":
        return ("pull", value), ()
    path = Path(value)
    verb, files = ("load", (path,)) if kind == "image_file" else ("install", (path, *INSTALL_FILES))
    for file in files:
        if not file.is_file():
            raise UserError(f"--{kind}={value}: no such file: {file}")
    return (verb, path.name), files
