#!/usr/bin/env bash
# Installs a Beam worker or a trainer into a virtual environment. Both Dockerfiles and `trainer.launch --wheel` use it. Needs
# bash, any Python 3 with pip, and a package index.
#
#   install.sh dependencies precompute|trainer cpu|gpu|tpu PYTHON VENV    everything except this project
#   install.sh package WHEEL|CHECKOUT VENV                                this project
#
# Installs the requirements of pyproject.toml with the extras of the image, in the versions of a lock file: Python 3.11 has
# those of requirements.lock (TensorFlow 2.15), 3.12 and 3.13 those of requirements-tf221.lock, and tpu, with Python 3.12,
# those of requirements-tpu.lock. cpu uses tensorflow-cpu, which is half as large. gpu adds the CUDA libraries that
# TensorFlow pins.
set -euo pipefail

UV_VERSION=0.13.9

here=$(cd "$(dirname "$0")" && pwd)
root=$here
[[ -f $root/pyproject.toml ]] || root=$(dirname "$here")
scratch=$(mktemp --directory)
trap 'rm -rf "$scratch"' EXIT

mistake() {
    echo "error: $1" >&2
    exit 2
}

dependencies() { # IMAGE VARIANT PYTHON VENV
    local extras lock listed="$scratch/requirements.txt" more="$scratch/more.in"
    case $1 in
        precompute) extras=(beam dask dataflow gcs s3) ;;
        trainer) extras=(train gcs s3) ;;
        *) mistake "$1: expected precompute or trainer" ;;
    esac
    case $2/$3 in
        cpu/3.11 | gpu/3.11) lock=requirements.lock ;;
        cpu/3.1[23] | gpu/3.1[23]) lock=requirements-tf221.lock extras+=(tf221) ;;
        tpu/3.12) lock=requirements-tpu.lock extras+=(tpu) ;;
        *) mistake "$2 with Python $3: expected cpu or gpu with 3.11, 3.12 or 3.13, or tpu with 3.12" ;;
    esac
    : > "$more"
    [[ $2 != gpu ]] || echo 'tensorflow[and-cuda]' > "$more"
    uv venv --quiet --seed --python "$3" "$4"
    uv pip compile --quiet "$root/pyproject.toml" "$more" "${extras[@]/#/--extra=}" --constraint "$root/$lock" \
        --python-version "$3" --no-header --no-annotate --output-file "$listed"
    # tf-keras requires the package tensorflow, whose place another one takes.
    case $2 in
        cpu) sed --in-place 's/^tensorflow==/tensorflow-cpu==/' "$listed" ;;
        tpu) sed --in-place '/^tensorflow==/d' "$listed" ;;
    esac
    # Compiled here: the user of the image cannot write the compiled files, so each process would compile TensorFlow again.
    uv pip install --quiet --compile-bytecode --python "$4" --no-deps --requirement "$listed"
}

package() { # WHEEL|CHECKOUT VENV
    uv pip install --quiet --compile-bytecode --python "$2" --no-deps --reinstall "$1"
}

[[ $# -ge 3 ]] || mistake "usage: install.sh dependencies precompute|trainer cpu|gpu|tpu PYTHON VENV, or package WHEEL|CHECKOUT VENV"
if ! command -v uv > /dev/null; then # for this run only
    python3 -m pip install --quiet --disable-pip-version-check --target "$scratch/uv" "uv==$UV_VERSION"
    PATH="$scratch/uv/bin:$PATH"
fi
"$@"
