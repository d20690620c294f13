# syntax=docker/dockerfile:1

# One image for every service of docker-compose.yml, because Ray refuses to join processes whose Ray version or whose
# Python version differs, the patch level included: head, GPU nodes and the orchestrator that drives them must be alike.
# The default base takes CUDA from PyTorch's own wheels (CUDA 13 for torch 2.13), so that a GPU node needs no more than
# NVIDIA's driver (580 or newer) and container toolkit. Where nodes must train with the torch that an image brings, build
# every service on that image:
#   docker compose build --build-arg BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime
ARG BASE=python:3.12-slim
FROM ${BASE}

# A compiler, because Triton builds its launchers where it runs; libgomp for torch on the CPU.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/*

# PIP_BREAK_SYSTEM_PACKAGES: the container has one Python and one program, whoever packaged that Python.
ENV PYTHONUNBUFFERED=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/caddie
COPY pyproject.toml requirements.lock ./

# The dependencies of pyproject.toml at the versions of requirements.lock, without the tools of the tests. A torch that
# the base brings is kept.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/dependencies.txt \
    && if python3 -c "import torch" 2>/dev/null; then skip='^torch=='; else skip='^$'; fi \
    && grep -v -e "$skip" requirements.lock > /tmp/constraints.txt \
    && python3 -m pip install --requirement /tmp/dependencies.txt --constraint /tmp/constraints.txt \
    && rm /tmp/dependencies.txt /tmp/constraints.txt

COPY . .
RUN python3 -m pip install --no-cache-dir --no-deps . \
    && useradd --create-home --uid 10001 caddie \
    && install --directory --owner caddie /var/lib/caddie /var/lib/caddie/artifacts /var/lib/caddie/data

# Away from the source, so that Python imports what was installed.
WORKDIR /var/lib/caddie
USER caddie
ENTRYPOINT []
CMD ["caddie", "--help"]
