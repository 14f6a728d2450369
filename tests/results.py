"""Synthetic results of comparisons, for tests of the report and the charts."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from typing import Any

ARMS = ("offline", "online", "fixed", "independent", "consistent")
STEPS_PER_EPOCH = 8
# Approximate final accuracy of each arm.
_FINAL = {"offline": 0.71, "online": 0.712, "fixed": 0.48, "independent": 0.58, "consistent": 0.66}


def make_run(arm: str, *, seed: int = 0, epochs: int = 100) -> dict[str, Any]:
    """A run with smooth curves that depend on the seed; losses of offline and online differ by about 1e-6."""
    steps = STEPS_PER_EPOCH * epochs
    shift = 0.003 * (seed - 1) + (1e-3 if arm == "online" else 0)
    final = _FINAL.get(arm, 0.5) * (0.55 + 0.15 * math.log10(epochs) * 1.5)

    def loss_at(step: int) -> float:
        wiggle = 0.05 * math.sin(step * (seed + 3) / 17)
        difference = 1e-6 * (1 + math.sin(step)) * step / steps if arm == "online" else 0.0
        return (2.4 * math.exp(-4 * step / steps) + 0.25) * (1 + wiggle) + difference

    def rate_at(step: int) -> float:
        warm = steps / 20
        return (
            0.003 * min(step / warm, 1) * 0.5 * (1 + math.cos(math.pi * max(step - warm, 0) / (steps - warm)))
        )

    history = []
    for number in range(1, 11):
        step = steps * number // 10
        learnt = 1 - math.exp(-5 * number / 10)
        history.append(
            {
                "step": step,
                "epoch": epochs * number / 10,
                "loss": loss_at(step) * (1.9 if arm == "fixed" else 1.2),
                "top1": final * learnt + shift,
                "agreement": min(final * learnt * 1.06 + shift, 1.0),
                "learning_rate": rate_at(step),
            }
        )
    logged = range(0, steps, max(steps // 160, 1))
    last = history[-1]
    return {
        "arm": arm,
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "warmup_steps": steps // 20,
        "batch_size": 128,
        "directory": f"runs/compare/{arm}-{epochs}-{seed}",
        "top1": last["top1"],
        "agreement": last["agreement"],
        "distillation_loss": last["loss"],
        "seconds": steps * (0.34 if arm == "online" else 0.2),
        "teacher_passes": steps * 128 if arm == "online" else 0,
        "seconds_a_step": 0.3391 if arm == "online" else 0.2017,
        "history": history,
        "losses": [[step, loss_at(step)] for step in logged],
        "learning_rates": [[step, rate_at(step)] for step in logged],
    }


def make_pair(*, seed: int = 0, epochs: int = 100) -> dict[str, Any]:
    """A pair of offline and online with tiny differences."""
    return {
        "a": "offline",
        "b": "online",
        "seed": seed,
        "epochs": epochs,
        "largest_loss_difference": 1.953e-06 * (1 + seed),
        "largest_loss_difference_step": 781 - seed,
        "mean_loss": 0.8312,
        "weights_distance": 0.0213,
        "weights_distance_relative": 3.71e-05,
        "weights_largest_difference": 0.00042,
        "agreement": 0.9914 - 0.002 * seed,
        "top1_difference": -0.0011 * (1 - seed),
        "top1_interval": [-0.0052 - 0.0004 * seed, 0.0031 + 0.0009 * seed],
    }


def make_other_pair(other: str) -> dict[str, Any]:
    """A pair of the control and another arm with large differences."""
    return make_pair() | {
        "a": "consistent",
        "b": other,
        "largest_loss_difference": 1.32,
        "weights_distance": 41.2,
        "weights_distance_relative": 0.92,
        "weights_largest_difference": 0.87,
        "agreement": 0.612,
        "top1_difference": 0.083,
        "top1_interval": [0.071, 0.0957],
    }


def make_result(runs: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """A complete result with these runs and pairs."""
    from trainer.comparison.summary import arm_rows

    return {
        "format": 1,
        "created": "2026-11-20T08:30:00+00:00",
        "command": "python -m trainer.compare --store=runs/flowers/store --workdir=runs/compare --epochs=100",
        "versions": {"python": "3.11.9", "tensorflow": "2.15.1", "numpy": "1.26.4"},
        "processor": "x86_64, 2 cores",
        "store": {
            "path": "runs/flowers/store",
            "digest": "5f1c" * 16,
            "views": 102_000,
            "examples": 1020,
            "epochs": 100,
            "bytes": 22_746_000,
            "codec": "float16",
            "temperature": 10.0,
            "spec": {
                "identity": {
                    "dataset": {"name": "oxford_flowers102:2.1.1", "split": "train", "num_examples": 1020},
                    "seed": 0,
                    "policy": {"name": "inception", "image_size": 128, "mixup": True, "area": [0.05, 1.0]},
                    "teacher": {"fingerprint": "9ab0" * 16, "batch_size": 64},
                },
                "provenance": {
                    "command": "python -m pipeline.precompute --store=runs/flowers/store --epochs=100",
                    "versions": {"apache-beam": "2.77.0", "tensorflow": "2.15.1"},
                },
            },
            "precompute_teacher_passes": 102_000,
        },
        "recipe": {
            "student": "small",
            "learning_rate": 0.003,
            "weight_decay": 3e-4,
            "warmup_steps": 40,
            "clip": "global",
        },
        "student": {"name": "small", "parameters": 1_204_326},
        "teacher": {"path": "runs/teacher", "parameters": None, "top1": 0.8134},
        "eval_split": "test",
        "eval_images": 6149,
        "classes": 102,
        "runs": runs,
        "pairs": pairs,
        "arms": arm_rows(runs),
        "cost": {
            "seconds_a_step": {
                "teacher": 0.1412,
                "student": 0.1934,
                "input": 0.0721,
                "offline": 0.2017,
                "online": 0.3391,
            },
            "seconds_a_step_spread": {"teacher": [0.139, 0.146], "offline": [0.1988, 0.2111]},
            "seconds_a_step_in_runs": {"offline": 0.2017, "online": 0.3391},
            "teacher_in_step": 0.1374,
            "teacher_batch_size": 256,
            "teacher_rows_a_step": 256,
            "batch_size": 128,
            "teacher_passes": {"offline": 0, "online": 102_400},
            "store_bytes": 22_746_000,
            "bytes_a_view": 223.0,
            "saving": 0.681,
            "limit": 0.73,
            "precompute_seconds": 412.5,
            "break_even_students": 3.75,
            "how": "median of 40 steps after 10, alternating between the arms in one process",
        },
    }


def full_result() -> dict[str, Any]:
    """All arms at 100 epochs, three seeds of offline and online, and offline at two other lengths."""
    runs = [make_run(arm, seed=seed) for arm in ("offline", "online") for seed in range(3)]
    runs += [make_run(arm) for arm in ARMS[2:]]
    runs += [make_run("offline", epochs=epochs) for epochs in (30, 300)]
    pairs = [make_pair(seed=seed) for seed in range(3)]
    return make_result(runs, [*pairs, make_other_pair("fixed"), make_other_pair("independent")])


def unlabeled_result() -> dict[str, Any]:
    """A result on a split without labels, which has no accuracy."""
    result = full_result()
    result["eval_unlabeled"] = result["eval_images"]
    result["teacher"]["top1"] = None
    for run in result["runs"]:
        run["top1"] = None
        run["history"] = [line | {"top1": None} for line in run["history"]]
    result["arms"] = [arm | {"top1_mean": None, "top1_std": None} for arm in result["arms"]]
    result["pairs"] = [pair | {"top1_difference": None, "top1_interval": None} for pair in result["pairs"]]
    return result


def one_arm_result() -> dict[str, Any]:
    """A result with a single run and without measured costs."""
    result = make_result([make_run("offline")], [])
    result["cost"] |= {
        "seconds_a_step": {"offline": 0.2017},
        "saving": None,
        "limit": None,
        "break_even_students": None,
    }
    return result


def sparse_result() -> dict[str, Any]:
    """A result in which all optional values are null or absent."""
    keys = ("arm", "seed", "epochs")
    runs = [{key: make_run(arm)[key] for key in keys} for arm in ("offline", "online")]
    pair = dict.fromkeys(make_pair()) | {"a": "offline", "b": "online", "seed": 0, "epochs": 100}
    return {"format": 1, "runs": runs, "pairs": [pair], "cost": None, "teacher": None}


HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$x_1$ {{ 7*7 }} \u2028\x1b[2J\u202e"
)


def spoil(tree: Any) -> Any:
    """A tree with markup instead of every text except the names of arms."""
    if isinstance(tree, dict):
        kept = ("arm", "a", "b")
        return {key: value if key in kept else spoil(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [spoil(branch) for branch in tree]
    return HOSTILE if isinstance(tree, str) else tree


def hostile_result() -> dict[str, Any]:
    """A result in which every text is markup, including an arm and a key."""
    result: dict[str, Any] = spoil(full_result())
    result["versions"]["a.b " + HOSTILE] = HOSTILE
    for run in result["runs"]:
        if run["arm"] == "fixed":
            run["arm"] = HOSTILE
    return result


def words(svg: str) -> list[str]:
    """The text in an SVG picture."""
    return [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
