"""Conditions under which the flags of training commands have an effect; see `pipeline.cli.effects`."""

from __future__ import annotations

from pipeline.cli.cache_flags import DATA_MAY_BE_IN_BUCKET
from pipeline.cli.effects import Condition
from pipeline.storage.bucket import is_url
from trainer.config.choices import DEFAULT_ARM, LIVE_ARMS

_DECAY = Condition(lambda flags: flags.weight_decay != 0, "without a --weight_decay above 0")
# For runs and comparisons. `check_strategy` refuses the flags of another strategy.
SHARED = {
    "shard_cache_bytes": Condition(
        lambda flags: any(map(is_url, flags.store or [])), "without a --store in a bucket"
    ),
    "store_weights": Condition(lambda flags: len(flags.store or []) > 1, "without several --store"),
    "decay_mode": _DECAY,
    "decay_kernels_only": _DECAY,
    "clip_norm": Condition(lambda flags: flags.clip != "none", "without a --clip other than none"),
}
TRAIN = {
    **SHARED,
    "views_per_shard": Condition(lambda flags: flags.write_back, "without --write_back"),
    "teacher": Condition(
        lambda flags: flags.arm in (DEFAULT_ARM, *LIVE_ARMS), "without an --arm that runs a teacher"
    ),
}
COMPARE = {
    **SHARED,
    "teacher": Condition(
        lambda flags: any(arm in LIVE_ARMS for arm in flags.arms),
        f"without one of --arms={','.join(LIVE_ARMS)}",
    ),
    "measure": Condition(
        lambda flags: not flags.measure or ("online" in flags.arms and flags.strategy == "default"),
        "without --arms=online and --strategy=default",
    ),
}
# The flags that have an effect with --from, which trains nothing.
WITH_FROM = ("store", "workdir", "earlier", "help", "debug")

FINETUNE = {
    "teacher_value_range": Condition(lambda flags: flags.teacher is not None, "without --teacher"),
    **dict.fromkeys(
        ("data_dir", "image_feature", "label_feature"),
        Condition(lambda flags: flags.dataset is not None, "without --dataset"),
    ),
}

_WITH_STORE = Condition(lambda flags: flags.store is not None, "without --store")
_WITH_DATASET = Condition(lambda flags: flags.dataset is not None, "without --dataset")
EVALUATE = {
    **{name: SHARED[name] for name in ("shard_cache_bytes", "store_weights")},
    "data_cache_bytes": DATA_MAY_BE_IN_BUCKET,
    "student_signature": Condition(
        lambda flags: not flags.student.endswith(".keras"), "with a .keras file as --student"
    ),
    **dict.fromkeys(("temperature", "temperature_squared"), _WITH_STORE),
    **dict.fromkeys(("image_feature", "label_feature", "recipe"), _WITH_DATASET),
}
