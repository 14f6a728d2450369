r"""Estimates the cost of a precompute before it starts: `python -m pipeline.plan`.

    python -m pipeline.plan --epochs=100                                       # embedded default, half a minute
    python -m pipeline.plan --dataset=oxford_flowers102 --data_dir=DIR --teacher=SAVED_MODEL --epochs=1000
    python -m pipeline.plan --num_examples=1281167 --num_classes=1000 --epochs=300 --teacher_rate=900 --workers=8

Takes the flags of the precompute. The rates are measured on this machine in a few seconds, on the first views of the
precompute. Or they are given, for another machine; then neither data set nor teacher needs to exist. One worker is whatever
has the measured or given rate: a process, or a machine with its accelerator.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("pipeline.plan", flags="pipeline.flags.plan")

import sys

from pipeline.cli.choices import DEMO_STORE
from pipeline.flags.plan import parse
from pipeline.flags.precompute import announce_demo
from pipeline.precomputing.options import resolve
from pipeline.precomputing.planning import (
    Rates,
    given_workload,
    make_plan,
    measure_rates,
    plan_text,
    workload_of,
)
from pipeline.storage.files import write_json


def main(argv: list[str]) -> int:
    """Runs the command; see the module docstring."""
    flags = parse(argv)
    logits = None
    if flags.teacher_rate is not None:
        workload = given_workload(flags)
        precompute_rate = flags.precompute_rate or flags.teacher_rate
        rates = Rates(teacher=flags.teacher_rate, precompute=precompute_rate, measured=False)
    else:
        flags.store = DEMO_STORE  # which nothing is written to
        options = resolve(flags, is_demo=announce_demo(flags))
        print(f"measuring for {flags.calibrate_seconds:g} s ...", file=sys.stderr, flush=True)
        workload = workload_of(options)
        rates, logits = measure_rates(options, seconds=flags.calibrate_seconds)
    plan = make_plan(workload, rates, students=flags.students, workers=flags.workers, logits=logits)
    print(plan_text(plan))
    if flags.json is not None:
        write_json(flags.json, plan)
    return 0
