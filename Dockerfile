# Two images, in stages. Nothing of those that build stays in those that run but /opt/moestro.
#
#   docker build -t moestro .                       computes on an NVIDIA GPU where there is one
#   docker run --rm --gpus all -p 127.0.0.1:8000:8000 -v moestro-data:/data -e MOESTRO_API_KEY=… moestro
#   docker build --target cpu -t moestro:cpu .      computes on the CPU alone
#   docker run --rm -p 127.0.0.1:8000:8000 -v moestro-data:/data -e MOESTRO_API_KEY=… moestro:cpu
#
# BASE_IMAGE     any image with python3 (3.11 or newer), venv, a shell, and a C compiler or apt-get: a
#                mirror, a pinned digest
# TORCH          the torch to install, as pip spells it
# PIP_…          what pip reads by these names: another index, or a folder of wheels.
#                torch from PyTorch's own CPU index makes the CPU's image some gigabytes smaller.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG TORCH="torch==2.13.0"
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_PROGRESS_BAR=off
# The compiler of whichever release the base is of: no version to pin.
# hadolint ignore=DL3008
RUN command -v gcc || { apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/moestro
# The large and rarely changing packages first: a change of our own code rebuilds only what follows.
WORKDIR /src
COPY pyproject.toml ./
RUN python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > /tmp/requirements.txt \
    && /opt/moestro/bin/pip install "${TORCH}" --requirement /tmp/requirements.txt
COPY setup.py README.md LICENSE ./
COPY server server
COPY engine engine
COPY cache cache
COPY factorize factorize
# An image without the library of the products would be slow, and nobody would see why.
RUN CC=gcc /opt/moestro/bin/pip install --no-deps . \
    && /opt/moestro/bin/python -P -c 'from moestro.engine.kernels import MISSING, library; raise SystemExit(None if library() else MISSING)'

# What computes on a GPU beside it: four-bit experts. A torch without CUDA would never find one.
FROM build AS build-cuda
RUN /opt/moestro/bin/python -P -c 'import torch; raise SystemExit(None if torch.version.cuda else f"torch {torch.__version__} is built without CUDA: take it from another index, or build --target cpu")'
RUN /opt/moestro/bin/python -P -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["nf4"], sep="\n")' > /tmp/nf4.txt \
    && /opt/moestro/bin/pip install --requirement /tmp/nf4.txt

FROM ${BASE_IMAGE} AS runtime
LABEL org.opencontainers.image.title="moestro" \
      org.opencontainers.image.description="Serves Mixture-of-Experts models larger than the memory they run in" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, not only a name: Kubernetes' runAsNonRoot can check no other.
RUN groupadd --gid 10001 moestro \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin moestro \
    && install -d -o 10001 -g 10001 -m 0755 /data
# SAFEPATH: the folder a container is started in is never a place to import from.
ENV PATH=/opt/moestro/bin:$PATH \
    HOME=/data \
    MOESTRO_CACHE_DIR=/data \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, not ready: the first start fetches the demo model, and /health answers all the while.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ.get('MOESTRO_PORT', 8000)}/health\", timeout=4)"]
ENTRYPOINT ["moestro"]
CMD ["serve", "demo", "--host", "0.0.0.0"]

FROM runtime AS cpu
COPY --from=build /opt/moestro /opt/moestro
USER 10001:10001

# Last, and so the one that is built unless another is named.
FROM runtime AS cuda
COPY --from=build-cuda /opt/moestro /opt/moestro
# The container toolkit gives what is asked for here, with `docker run --gpus all`.
ENV MOESTRO_DEVICE=auto \
    MOESTRO_EXPERT_FORMAT=auto \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
