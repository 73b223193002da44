# Two stages to choose from:  docker build --target cpu -t clha:cpu .   and   docker build --target gpu -t clha:gpu .
# Run with a volume for what runs make:  docker run --rm -v clha-home:/home/clha/work/.clha clha:cpu run

FROM python:3.11-slim-bookworm AS base
RUN apt-get update && apt-get install -y --no-install-recommends make gcc g++ libnuma1 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home clha && install -d -o clha -g clha /home/clha/work /home/clha/work/.clha
# A new volume takes over the owner of the folder it is mounted on: without .clha there it would be root's.
USER clha
WORKDIR /home/clha/work
ENV PYTHONUNBUFFERED=1 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 PATH=/home/clha/work/.venv/bin:$PATH

FROM base AS cpu
COPY --chown=clha requirements requirements
COPY --chown=clha Makefile pyproject.toml README.md LICENSE pipelines.yaml ./
COPY --chown=clha clha clha
COPY --chown=clha flows flows
COPY --chown=clha data data
RUN make env PYTHON=python3.11
ENTRYPOINT ["clha"]
CMD ["run"]

# vLLM's own image would bring another Python environment; the `gpu` extra installs vLLM with its CUDA build of torch.
FROM base AS gpu
COPY --chown=clha Makefile pyproject.toml README.md LICENSE pipelines.yaml ./
COPY --chown=clha clha clha
COPY --chown=clha flows flows
COPY --chown=clha data data
RUN python3.11 -m venv .venv && .venv/bin/pip install --no-cache-dir ".[gpu]"
ENTRYPOINT ["clha"]
CMD ["run", "--profile", "hh-7b"]
