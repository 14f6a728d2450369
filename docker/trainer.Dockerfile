# syntax=docker/dockerfile:1
# Trainer: TensorFlow, TensorFlow Addons and this package, without Beam. Run in the checkout:
#
#   docker build --file docker/trainer.Dockerfile --build-arg VARIANT=tpu --tag HOST/PROJECT/REPO/trainer:tpu .
#   docker run --rm --gpus all --volume "$PWD:/job" --workdir /job IMAGE python -m trainer.train --store=... --workdir=...
#
# VARIANT is cpu, gpu or tpu. No CUDA base image is needed: TensorFlow's wheels contain the CUDA libraries, and the host
# provides the driver. `trainer.launch` uses tpu, which contains TensorFlow's build for TPU VMs and its libtpu. A change
# of code rebuilds the last layer, a change of requirements.lock also the one before.
ARG VARIANT=cpu

FROM python:3.11-slim-bookworm AS tools
RUN pip install --no-cache-dir --target /opt/uv uv==0.13.9
ENV PATH=/opt/uv/bin:$PATH UV_NO_CACHE=1 UV_LINK_MODE=copy

FROM tools AS dependencies
ARG VARIANT
# URL of another wheel than the one in install.sh, for VARIANT=tpu.
ARG TENSORFLOW_TPU=
WORKDIR /build
COPY docker/install.sh requirements.lock pyproject.toml ./
RUN bash install.sh dependencies trainer "$VARIANT" /opt/venv

FROM tools AS package
WORKDIR /build
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY trainer trainer
RUN uv build --quiet --wheel --build-constraint requirements.lock --out-dir /dist .

FROM python:3.11-slim-bookworm AS base-cpu

FROM python:3.11-slim-bookworm AS base-gpu

FROM python:3.11-slim-bookworm AS base-tpu
# The libtpu of TensorFlow 2.15.0 at its default path. v5e needs PJRT, which the second instruction selects ("Training
# with TPU accelerators", docs.cloud.google.com).
ADD --chmod=644 https://storage.googleapis.com/cloud-tpu-tpuvm-artifacts/libtpu/1.9.0/libtpu.so /lib/libtpu.so
ENV NEXT_PLUGGABLE_DEVICE_USE_C_API=true TF_PLUGGABLE_DEVICE_LIBRARY_PATH=/lib/libtpu.so

# hadolint ignore=DL3006
FROM base-${VARIANT}
RUN useradd --uid 10001 --create-home trainer
COPY --from=dependencies /opt/venv /opt/venv
COPY docker/healthcheck.py /opt/healthcheck.py
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TF_CPP_MIN_LOG_LEVEL=2 \
    VIEW_DISTILL_CACHE=/tmp/view-distill
RUN --mount=type=bind,from=dependencies,source=/build/install.sh,target=/build/install.sh \
    --mount=type=bind,from=dependencies,source=/build/requirements.lock,target=/build/requirements.lock \
    --mount=type=bind,from=tools,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,from=package,source=/dist,target=/dist \
    PATH=/opt/uv/bin:$PATH UV_NO_CACHE=1 UV_LINK_MODE=copy bash /build/install.sh package /dist/*.whl /opt/venv
USER 10001
WORKDIR /home/trainer
HEALTHCHECK --interval=6h --timeout=5m --start-period=5m CMD ["python", "/opt/healthcheck.py"]
CMD ["python", "-m", "trainer.train", "--help"]
