#!/usr/bin/env bash
# Installs a Beam worker or a trainer into a virtual environment of Python 3.11. Both Dockerfiles and
# `trainer.launch --wheel` use it. Needs bash, any Python 3 with pip, and a package index.
#
#   install.sh dependencies precompute|trainer cpu|gpu|tpu VENV    everything except this project
#   install.sh package WHEEL|CHECKOUT VENV                         this project
#
# Installs the requirements of pyproject.toml with the extras of the image, in the versions of requirements.lock. cpu
# uses tensorflow-cpu, which is half as large. gpu adds the CUDA libraries that TensorFlow pins. tpu uses TensorFlow's
# build for TPU VMs from $TENSORFLOW_TPU.
set -euo pipefail

UV_VERSION=0.13.9
# Documented for Python 3.10; "TensorFlow 2.13 and greater support Python 3.10 or greater" (docs.cloud.google.com,
# "Training with TPU accelerators"). Its libtpu is 1.9.0.
TENSORFLOW_TPU=${TENSORFLOW_TPU:-https://storage.googleapis.com/cloud-tpu-tpuvm-artifacts/tensorflow/tf-2.15.0/tensorflow-2.15.0-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl}

here=$(cd "$(dirname "$0")" && pwd)
root=$here
[[ -f $root/requirements.lock ]] || root=$(dirname "$here")
scratch=$(mktemp --directory)
trap 'rm -rf "$scratch"' EXIT

mistake() {
    echo "error: $1" >&2
    exit 2
}

dependencies() { # IMAGE VARIANT VENV
    local extras listed="$scratch/requirements.txt"
    case $1 in
        precompute) extras=(--extra beam --extra dataflow --extra gcs --extra s3) ;;
        trainer) extras=(--extra train --extra gcs --extra s3) ;;
        *) mistake "$1: expected precompute or trainer" ;;
    esac
    uv venv --quiet --seed --python 3.11 "$3"
    uv pip compile --quiet "$root/pyproject.toml" "${extras[@]}" --constraint "$root/requirements.lock" \
        --python-version 3.11 --no-header --no-annotate --output-file "$listed"
    case $2 in
        cpu) sed --in-place 's/^tensorflow==/tensorflow-cpu==/' "$listed" ;;
        gpu) sed --in-place 's/^tensorflow==/tensorflow[and-cuda]==/' "$listed" ;;
        tpu) sed --in-place '/^tensorflow==/d' "$listed" ;;
        *) mistake "$2: expected cpu, gpu or tpu" ;;
    esac
    uv pip install --quiet --python "$3" --requirement "$listed"
    [[ $2 != tpu ]] || uv pip install --quiet --python "$3" --no-deps "$TENSORFLOW_TPU"
}

package() { # WHEEL|CHECKOUT VENV
    uv pip install --quiet --python "$2" --no-deps --reinstall "$1"
}

[[ $# -ge 3 ]] || mistake "usage: install.sh dependencies precompute|trainer cpu|gpu|tpu VENV, or package WHEEL|CHECKOUT VENV"
if ! command -v uv > /dev/null; then # for this run only
    python3 -m pip install --quiet --disable-pip-version-check --target "$scratch/uv" "uv==$UV_VERSION"
    PATH="$scratch/uv/bin:$PATH"
fi
"$@"
