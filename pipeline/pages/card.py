"""The data set card of a store: Markdown with the YAML header that data set hubs read.

It describes the store for people who do not have it yet. What the publisher has to add is marked TODO. Nothing of the machine
that wrote the store is in it: neither paths nor the command.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from pipeline.cli.units import bytes_text, counted
from pipeline.errors import UserError
from pipeline.errors.text import printable
from pipeline.pages.summary import Contents
from pipeline.precomputing.reports import codec_error_text
from pipeline.storage.files import sha256_of, write_text
from pipeline.store.layout import ACCURACY_FILE, CLASSES_FILE, EVAL_DIRECTORY, below
from pipeline.store.metadata import FEATURES_FILE, INFO_FILE, MANIFEST_FILE
from pipeline.store.reader import SplitReader, StoreReader
from pipeline.store.serialization import record_features
from pipeline.store.shards import shard_name

TODO = "TODO"  # marks what the publisher has to add
# Categories of hubs: n<1K, 1K<n<10K, ..., n>1T.
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
_OUTPUTS = {
    "int8": "part of the teacher's outputs, which are `logits * logits_scale + logits_offset`",
    "topk": "part of the teacher's outputs, which are `logits` for the classes `logits_classes`; the other classes share the mass "
    "`logits_rest` at the store's temperature",
}
_RECORD = {
    "example": "index of the image in the split of the data set",
    "box": "crop in the image: y, x, height, width in pixels",
    "flip": "whether the crop is mirrored",
    "mixup_ratio": "share of the crop in the mixed view; the rest is the crop of the next view of the epoch",
    "crop_hash": "fingerprint of the rendered crop",
    "source_hash": "fingerprint of the encoded image",
}


def write_card(store: StoreReader, contents: Contents, path: Path) -> None:
    """Writes the card of a complete store.

    Args:
      contents: of `find_contents`.

    Raises:
      UserError: the store has shards that are not published.
    """
    if count := contents["unpublished"]["files"]:
        raise UserError(
            f"`card`={path}: the store has {counted(count, 'shard file')} that are not published; finish the precompute, or wait for "
            "it, before you share the store"
        )
    write_text(path, card_text(store, contents))


def card_text(store: StoreReader, contents: Contents) -> str:
    """The card of a store."""
    sections = (_header, _images, _teacher, _views, _records, _licenses, _usage, _checksums)
    return "\n".join(line for section in sections for line in section(store, contents)) + "\n"


def _code(value: Any) -> str:
    """A value of a store, which may come from anyone, as a code span that cannot be left."""
    return "`" + printable(str(value)).replace("`", "'").replace("|", "\\|") + "`"


def _size_category(views: int) -> str:
    limits = [1000 * 10**power for power in range(len(_SIZES))]
    number = sum(views >= limit for limit in limits)
    if number in (0, len(_SIZES)):
        return "n<1K" if number == 0 else f"n>{_SIZES[-1]}"
    return f"{_SIZES[number - 1]}<n<{_SIZES[number]}"


def _header(store: StoreReader, contents: Contents) -> Iterator[str]:
    name = store.spec.dataset.name
    yield from (
        "---",
        f"pretty_name: {json.dumps(f'Teacher views of {name}')}",
        f"license: other  # {TODO}: the license under which you publish the teacher's outputs",
        f"license_name: {TODO}",
        f"license_link: {TODO}",
        "task_categories:",
        "- image-classification",
        "size_categories:",
        f"- {_size_category(contents['views'])}",
        "tags:",
        "- knowledge-distillation",
        "- function-matching",
        "- array-record",
        "- tfds",
        "viewer: false",
        "---",
        "",
        f"# Teacher views of {_code(name)}",
        "",
    )
    yield (
        f"{contents['views']:,} augmented views ({counted(contents['epochs'], 'epoch')} of {store.spec.num_examples:,} images), and "
        f"what a teacher returned for each: {store.spec.num_classes:,} logits. A student that is trained on them sees, bit for bit, "
        "what the teacher saw, and needs no teacher (function matching, Beyer et al. 2021, arXiv 2106.05237). The format is that of "
        "view-distill.\n"
    )


def _images(store: StoreReader, contents: Contents) -> Iterator[str]:
    del contents
    dataset = store.spec.dataset
    yield from (
        "## Images",
        "",
        "The images are not in this store.",
        "",
        f"- data set: {_code(dataset.name)}, split {_code(dataset.split)}, {dataset.num_examples:,} images",
        f"- fingerprint of its TFDS metadata: {_code(dataset.fingerprint)}",
    )
    if dataset.image_feature is not None:
        yield f"- image feature: {_code(dataset.image_feature)}"
    plain, _, version = dataset.name.partition(":")
    if store.spec.provenance.get("embedded_default"):
        yield "- view-distill makes this data set when it is needed"
    elif (
        plain.split("/")[0] in tfds.list_builders(with_community_datasets=False)
        and "short_side_" not in plain
    ):
        yield f"- prepare it: `tfds build {plain}:{version} --file_format=array_record --data_dir=DATA`"
    else:
        yield f"- {TODO}: where to get the images, as the TFDS data set that the teacher saw"
    yield ""


def _teacher(store: StoreReader, contents: Contents) -> Iterator[str]:
    teacher, classes, size = store.spec.teacher, contents["classes"], store.spec.policy.image_size
    yield from (
        "## Teacher",
        "",
        f"- {TODO}: name, architecture, training data and source of the teacher",
        f"- SHA-256 of its files: {_code(teacher.fingerprint)}",
        f"- outputs: {store.spec.num_classes:,} classes"
        + (f"; their names are in `{CLASSES_FILE}`" if classes["names"] else f"; {TODO}: their names"),
        f"- inputs: {size} x {size} pixels in {_code(teacher.value_range)}, batches of {teacher.batch_size:,}",
        f"- signature {_code(teacher.signature)}"
        + (f", output {_code(teacher.output)}" if teacher.output else ""),
    )
    for split in contents["splits"]:
        if split["teacher_top1"] is not None:
            top1 = f"{split['teacher_top1']:.2%} of {split['labeled']:,} labeled images"
            yield f"- top-1 on {_code(split['of'])}: {top1}"
    yield ""


def _views(store: StoreReader, contents: Contents) -> Iterator[str]:
    spec, provenance = store.spec, store.spec.provenance
    policy, crop = spec.policy.to_json(), spec.eval_crop
    numbers = ", ".join(f"{name} {value}" for name, value in policy.items() if name != "name")
    yield from (
        "## Views",
        "",
        f"- policy {_code(policy['name'])}: {_code(numbers)}",
        f"- seed {spec.seed}; view `v` is position `v % {spec.num_examples}` of epoch `v // {spec.num_examples}`",
        f"- evaluation crop {_code(crop.kind)} at scale {crop.scale:g}",
    )
    if provenance.get("recipe"):
        yield f"- recipe {_code(provenance['recipe'])}"
    tensorflow = provenance.get("versions", {}).get("tensorflow", "unknown")
    yield f"- rendered with TensorFlow {_code(tensorflow)}; render probe {_code(spec.render_probe)}"
    yield from (
        "",
        "| split | of | views | shards | bytes | bytes per view |",
        "| --- | --- | --- | --- | --- | --- |",
    )
    for split in contents["splits"]:
        yield (
            f"| {_code(split['name'])} | {_code(split['of'])} | {split['views']:,} | {split['shards']:,} | "
            f"{bytes_text(split['bytes'])} | {split['bytes_a_view']:,.0f} |"
        )
    yield ""


def _records(store: StoreReader, contents: Contents) -> Iterator[str]:
    codec, cost = store.spec.codec, contents["splits"][0]
    error = codec_error_text(
        codec,
        mean_kl=cost["mean_kl"],
        max_logit_error=cost["max_logit_error"],
        temperature=store.spec.temperature,
    )
    outputs = _OUTPUTS.get(codec.partition(":")[0], "the teacher's outputs")
    yield from ("## Records", "", f"Codec {error}.", "", "| field | type | meaning |", "| --- | --- | --- |")
    for name, feature in record_features(store.spec.make_codec()).items():
        shape = "".join(f" [{size}]" for size in feature.shape)
        yield f"| `{name}` | {feature.np_dtype.__name__}{shape} | {_RECORD.get(name, outputs)} |"
    yield ""


def _licenses(store: StoreReader, contents: Contents) -> Iterator[str]:
    del store, contents
    yield from (
        "## Licenses",
        "",
        "| of | license | source |",
        "| --- | --- | --- |",
        f"| the images | {TODO} | {TODO} |",
        f"| the teacher | {TODO} | {TODO} |",
        f"| these records | {TODO} | this page |",
        "",
    )


def _usage(store: StoreReader, contents: Contents) -> Iterator[str]:
    del contents
    embedded = store.spec.provenance.get("embedded_default")
    data_flag, data = ("", "") if embedded else (" --data_dir=DATA", ', data_dir="DATA"')
    size, temperature = store.spec.policy.image_size, f"{store.spec.temperature:g}"
    yield f"""## Use

`STORE` is the directory of these files, `DATA` the TFDS data directory of the images. Compare the files first (see Checksums), then the
store with the images and, if you have it, the teacher. A SavedModel is code: load it only if you trust its source.

```sh
python -m pipeline.inspect --store=STORE --checksums
python -m pipeline.verify --store=STORE{data_flag} --teacher=TEACHER
python -m trainer.train --store=STORE{data_flag} --workdir=RUN
```

With view-distill in Python; each view is rendered from its image and compared with its record:

```python
from pipeline import open_store

store = open_store("STORE"{data})
view = store[0]
print(view.box, view.flip, view.ratio, view.logits.shape)
for views, logits in store.as_numpy(batch_size=8):  # float32 [8, {size}, {size}, 3] in 0..255, float32 [8, {store.spec.num_classes}]
    break
```

In PyTorch, with `network` and `optimizer` of yours:

```python
import torch
from pipeline import open_store

store = open_store("STORE"{data})
loss = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
for views, logits in store.as_numpy(batch_size=64):
    images = torch.from_numpy(views).permute(0, 3, 1, 2) / 255  # [64, 3, {size}, {size}]
    targets = torch.log_softmax(torch.from_numpy(logits) / {temperature}, dim=-1)
    outputs = torch.log_softmax(network(images) / {temperature}, dim=-1)
    optimizer.zero_grad()
    ({temperature}**2 * loss(outputs, targets)).backward()
    optimizer.step()
```

The records alone, with TFDS and without view-distill:

```python
import tensorflow_datasets as tfds

records = tfds.builder_from_directory("STORE").as_data_source("views")
print(len(records), records[0]["example"], records[0]["box"], records[0]["logits"].shape)
```
"""


def _metadata_files(store: StoreReader) -> Iterator[str]:
    published = (MANIFEST_FILE, FEATURES_FILE, INFO_FILE)
    names = (*published, *(f"{EVAL_DIRECTORY}/{name}" for name in published), CLASSES_FILE, ACCURACY_FILE)
    yield from (name for name in names if (store.path / name).is_file())


def _split_digest(reader: SplitReader) -> tuple[str, str]:
    """Pattern of a split's shards, and the SHA-256 of what `sha256sum` prints for them."""
    place = f"{below(reader.split)}/".lstrip("/")
    names = [f"{place}{shard_name(reader.split, number)}" for number in range(len(reader.manifest.shards))]
    lines = [f"{info.sha256}  {name}\n" for info, name in zip(reader.manifest.shards, names, strict=True)]
    return names[0].rpartition("-")[0] + "-*", hashlib.sha256("".join(lines).encode()).hexdigest()


def _checksums(store: StoreReader, contents: Contents) -> Iterator[str]:
    yield from (
        "## Checksums",
        "",
        f"- digest of the spec, which `inspect` prints and every command compares: {_code(contents['digest'])}",
        "- the files of metadata, as `sha256sum --check` takes them in `STORE`:",
        "",
        "```text",
        *(f"{sha256_of(store.path / name)}  {name}" for name in _metadata_files(store)),
        "```",
        "",
        "- the shards of a split, together:",
        "",
        "| command in `STORE` | prints |",
        "| --- | --- |",
    )
    for reader in store.readers():
        pattern, digest = _split_digest(reader)
        yield f"| `sha256sum {pattern} \\| sha256sum` | {_code(digest)} |"
    yield (
        "\n`manifest.json` has the SHA-256 of every shard, and `inspect --checksums` compares them. That finds damage. Only checksums "
        "from a place that you trust show that shards and manifest were not replaced together."
    )
