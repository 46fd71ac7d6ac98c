# Two images from one file:
#   docker build --target control -t trainyard-control .                    the API, the scheduler and the command, without torch
#   docker build --target worker --build-arg TORCH=cpu -t trainyard .       the same with torch, for training. TORCH: cpu or cuda
#
# Dependencies are in layers below the code, so that a change of the code downloads nothing.
FROM python:3.11-slim AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_SYSTEM_PYTHON=1
WORKDIR /opt/trainyard
# A new volume gets the owner of the folder on which it is mounted. Without the folder it would belong to root.
RUN groupadd --gid 10001 trainyard \
    && useradd --uid 10001 --gid trainyard --create-home --home-dir /var/lib/trainyard trainyard \
    && install -d -o trainyard -g trainyard /var/lib/trainyard/home /var/lib/trainyard/user
COPY pyproject.toml constraints.txt ./
RUN pip install -c constraints.txt uv setuptools && uv pip install -c constraints.txt -r pyproject.toml
ENV HOME=/var/lib/trainyard/user TRAINYARD_HOME=/var/lib/trainyard/home TRAINYARD_HOST=0.0.0.0 TRAINYARD_PORT=8000
# When the service ends, the container and all runs end too.
ENV TRAINYARD_ON_STOP=save
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
# Binding to all addresses is refused at start-up unless TRAINYARD_TOKEN is set.
CMD ["python", "-m", "trainyard.service"]

FROM base AS worker-base
# training.use_compile needs a C++ compiler. Its version is that of the base image's Debian.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
ARG TORCH=cuda
RUN case "$TORCH" in \
      cpu) uv pip install -c constraints.txt -r pyproject.toml --extra worker --extra corpora --torch-backend cpu ;; \
      cuda) uv pip install -c constraints.txt -r pyproject.toml --extra worker --extra corpora ;; \
      *) echo "TORCH=$TORCH: give cpu or cuda" >&2; exit 1 ;; \
    esac

FROM scratch AS code
COPY pyproject.toml README.md LICENSE /
COPY src /src
COPY contract /contract
COPY model /model
COPY worker /worker
COPY service /service
COPY client /client
COPY mcp_tools /mcp_tools
COPY docs /docs
COPY migrations /migrations

FROM base AS control
COPY --from=code / ./
RUN pip install --no-deps --no-build-isolation -e .
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001

FROM worker-base AS worker
COPY --from=code / ./
RUN pip install --no-deps --no-build-isolation -e .
USER 10001:10001
