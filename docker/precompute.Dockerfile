# syntax=docker/dockerfile:1
# Beam worker: TensorFlow and this package under Beam's SDK harness, without TensorFlow Addons. Run in the checkout:
#
#   docker build --file docker/precompute.Dockerfile --build-arg VARIANT=gpu --tag HOST/PROJECT/REPO/precompute:gpu .
#
# VARIANT is cpu or gpu. PYTHON selects TensorFlow: 3.11 has 2.15, 3.12 and 3.13 have 2.21. No CUDA base image is needed:
# TensorFlow's wheels contain the CUDA libraries, and the host provides the driver. A change of code rebuilds the last layer, a
# change of a lock file also the one before.
ARG BEAM_VERSION=2.77.0
ARG PYTHON=3.11

# hadolint ignore=DL3006
FROM apache/beam_python${PYTHON}_sdk:${BEAM_VERSION} AS beam

FROM python:${PYTHON}-slim-bookworm AS tools
RUN pip install --no-cache-dir --target /opt/uv uv==0.13.9
ENV PATH=/opt/uv/bin:$PATH UV_NO_CACHE=1 UV_LINK_MODE=copy

FROM tools AS dependencies
ARG VARIANT=cpu
ARG PYTHON
WORKDIR /build
COPY docker/install.sh requirements.lock requirements-tf221.lock pyproject.toml ./
RUN bash install.sh dependencies precompute "$VARIANT" "$PYTHON" /opt/venv

FROM tools AS package
WORKDIR /build
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY trainer trainer
RUN uv build --quiet --wheel --build-constraint requirements.lock --out-dir /dist .

# TensorFlow 2.21 comes with Keras 3 and takes Keras 2 from tf-keras. Commands set this as well; a worker of Beam is no command.
FROM python:3.11-slim-bookworm AS python-3.11
FROM python:3.12-slim-bookworm AS python-3.12
ENV TF_USE_LEGACY_KERAS=1
FROM python:3.13-slim-bookworm AS python-3.13
ENV TF_USE_LEGACY_KERAS=1

# hadolint ignore=DL3006
FROM python-${PYTHON}
RUN useradd --uid 10001 --create-home worker
COPY --from=beam /opt/apache/beam/boot /opt/apache/beam/boot
COPY --from=dependencies /opt/venv /opt/venv
COPY docker/healthcheck.py /opt/healthcheck.py
# By default, Beam's boot creates a new environment without the packages of this one.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 \
    TF_CPP_MIN_LOG_LEVEL=2 \
    TF_FORCE_GPU_ALLOW_GROWTH=true \
    VIEW_DISTILL_CACHE=/tmp/view-distill
RUN --mount=type=bind,from=dependencies,source=/build/install.sh,target=/build/install.sh \
    --mount=type=bind,from=tools,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,from=package,source=/dist,target=/dist \
    PATH=/opt/uv/bin:$PATH UV_NO_CACHE=1 UV_LINK_MODE=copy bash /build/install.sh package /dist/*.whl /opt/venv
USER 10001
WORKDIR /home/worker
HEALTHCHECK --interval=6h --timeout=5m --start-period=5m CMD ["python", "/opt/healthcheck.py"]
ENTRYPOINT ["/opt/apache/beam/boot"]
