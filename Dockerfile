# For machines with NVIDIA GPUs: CUDA 13.0, the line of the torch that constraints.txt pins.
#
#   docker build --tag mhr_scale .
#   docker run --rm --gpus all --shm-size 16g --user "$(id -u):$(id -g)" --env HOME=/work \
#       --volume "$PWD:/work" mhr_scale deepspeed --num_gpus 8 --module mhr_scale pretrain t0_11b_p3_mhr8
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# g++, ninja and libaio compile DeepSpeed's asynchronous I/O (ds_configs/zero3_nvme.json)
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++ libaio-dev ninja-build openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --uid 10001 --create-home trainer
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/mhr_scale
COPY constraints.txt ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY mhr_scale mhr_scale
COPY launch/recipes launch/recipes
COPY ds_configs ds_configs
RUN pip install --no-cache-dir --constraint constraints.txt ".[trackers]"

USER 10001
WORKDIR /work
CMD ["mhr_scale", "--help"]
