# The one image of Duet: workers, and the servers of compose.yaml by another command. From the project's root:
#   docker build -f docker/worker.Dockerfile -t duet:0.1.0 .
#   docker build -f docker/worker.Dockerfile -t duet:0.1.0 --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
# PyTorch's wheels bring their own CUDA libraries, so GPUs work on either base. The CUDA one adds NVIDIA's check that
# the machine's driver is new enough.
ARG BASE=debian:12.11-slim

FROM python:3.11.13-slim-bookworm AS uv
COPY requirements.lock /
RUN pip install --no-cache-dir "$(grep '^uv==' /requirements.lock)"

FROM ${BASE}
# DVC and the entrypoint need git; tini passes signals on and reaps what a killed run leaves. No versions, because
# distributions drop old ones, and the build would stop that day.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates git openssh-client tini \
 && rm -rf /var/lib/apt/lists/*

# uv's own Python, because bases differ in theirs and the lock was checked on this one.
ENV PATH=/opt/venv/bin:$PATH VIRTUAL_ENV=/opt/venv UV_PYTHON_INSTALL_DIR=/opt/python UV_LINK_MODE=copy \
    UV_CACHE_DIR=/opt/uv-cache
COPY --from=uv /usr/local/bin/uv /usr/local/bin/uv
RUN uv venv --managed-python --python 3.11.13 /opt/venv
# The lock comes before the code: a change of code leaves this layer, gigabytes of it, as it is.
COPY requirements.lock /opt/
RUN --mount=type=cache,target=/opt/uv-cache uv pip install --no-deps --requirement /opt/requirements.lock

# A number above the users that bases bring. The folders are made here so that volumes mounted there belong to duet.
RUN useradd --create-home --uid 10001 duet \
 && install --directory --owner=duet --group=duet /duet /duet/.duet /var/lib/mlflow
# Not in /duet: a checkout there would change the script while it runs.
COPY --chmod=755 docker/entrypoint.sh /usr/local/bin/duet-entrypoint
WORKDIR /duet
COPY --chown=duet:duet . .
# Editable, so that flows and tasks come from the checkout that the entrypoint makes in /duet, never from an older copy.
RUN uv pip install --no-deps --no-build-isolation --editable .

# By number, so that Kubernetes can see that it is not root.
USER 10001
ENV DO_NOT_TRACK=1 PYTHONUNBUFFERED=1 PREFECT_WORKER_WEBSERVER_HOST=127.0.0.1 PREFECT_WORKER_WEBSERVER_PORT=8080
# Prefect's worker says here whether it still polls its pool.
HEALTHCHECK --interval=30s --timeout=10s --start-period=180s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/health', timeout=8)"]
ENTRYPOINT ["tini", "--", "duet-entrypoint"]
CMD ["worker"]
