# syntax=docker/dockerfile:1
# Trainer: TensorFlow, TensorFlow Addons and this package; no Beam. From the checkout:
#
#   docker build --file docker/trainer.Dockerfile --build-arg VARIANT=tpu --tag HOST/PROJECT/REPO/trainer:tpu .
#   docker run --rm --gpus all --volume "$PWD:/job" --workdir /job IMAGE python -m trainer.train --store=... --workdir=...
#
# VARIANT: cpu, gpu or tpu. A GPU needs no CUDA image below: CUDA's libraries come with TensorFlow's wheels, the driver
# from the host. tpu is for TPU VMs, as `trainer.launch` starts it: TensorFlow's build for them, and the libtpu that goes
# with it. A change of code builds the last layer anew, a change of requirements.lock the one before.
ARG VARIANT=cpu

FROM python:3.11-slim-bookworm AS tools
RUN pip install --no-cache-dir --target /opt/uv uv==0.13.9
ENV PATH=/opt/uv/bin:$PATH UV_NO_CACHE=1 UV_LINK_MODE=copy

FROM tools AS dependencies
ARG VARIANT
# Of VARIANT=tpu: another wheel than install.sh's.
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
# The libtpu of TensorFlow 2.15.0, and where it is looked for. PJRT, the second line, is what v5e needs: "Training with
# TPU accelerators", docs.cloud.google.com.
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
