# shardwright in a container: `docker build -t shardwright:cpu .` for CPUs, and for NVIDIA GPUs
# `docker build -t shardwright:cuda --build-arg KIND=cuda .` (torch's wheels bring CUDA; the host needs its driver).
# Exactly the versions of constraints.txt are installed; the user is not root, and nothing secret is in it.
ARG PYTHON=3.11
ARG KIND=cpu

FROM python:${PYTHON}-slim-bookworm AS build
ARG KIND
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/shardwright
ENV PATH=/opt/shardwright/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# torch first, so that a change of the sources does not fetch it again; what it needs comes with the rest.
RUN if [ "$KIND" = cpu ]; then \
      pip install --constraint constraints.txt --no-deps --index-url https://download.pytorch.org/whl/cpu torch; \
    else \
      pip install --constraint constraints.txt torch; \
    fi
COPY setup.py pyproject.toml README.md LICENSE NOTICE ./
COPY configs configs
COPY shardwright shardwright
RUN pip install --constraint constraints.txt ".[data,hf,accelerate]"

# torch.compile needs a C++ compiler, on a CPU and on a GPU; ssh is for `launch --hosts`.
FROM python:${PYTHON}-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssh-client \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /usr/sbin/nologin shardwright
COPY --from=build /opt/shardwright /opt/shardwright
ENV PATH=/opt/shardwright/bin:$PATH PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /workspace
ENTRYPOINT ["shardwright"]
CMD ["--help"]
