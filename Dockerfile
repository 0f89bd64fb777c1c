# modstruct with its CUDA kernels, for one host or many. From the root of the repository:
#   docker build -t modstruct .
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" -v "$PWD/cache:/home/modstruct" modstruct \
#       deepspeed launch_scripts/pretrain.py --ds_config ds_configs/zero2.json
# docs/scaling.md ("Containers") says what /dev/shm must hold, and which part of this file was tried.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# A compiler and Python's headers stay: DeepSpeed compiles what its JSON asks for (offload) at the first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# The packages first (7 GB): they change less often than the code.
WORKDIR /work
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install --no-cache-dir -r /tmp/requirements.txt -c constraints.txt
COPY . .
RUN MODSTRUCT_CUDA=1 pip install --no-cache-dir -e '.[export]' -c constraints.txt && modstruct env

# Scenes, tokenizers, indexes and DeepSpeed's operators are kept here, whoever runs it: mount a folder to keep them longer.
ENV HOME=/home/modstruct
RUN mkdir -m 1777 "$HOME"
CMD ["modstruct", "env"]
