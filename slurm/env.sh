# Everything that depends on the site. Copy it, adapt it, point ENV_FILE at the copy.
# shellcheck shell=bash

: "${PROJECT_DIR:=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
: "${VENV:=$PROJECT_DIR/.venv}"         # used when CONTAINER_IMAGE is empty
: "${CONTAINER_IMAGE:=}"                # an enroot/pyxis image built from the Dockerfile
: "${CONTAINER_MOUNTS:=$PROJECT_DIR:$PROJECT_DIR}"
: "${LOG_DIR:=$PROJECT_DIR/runs/slurm}"
: "${MASTER_PORT:=29500}"

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"   # models and data are local paths
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export PYTHONUNBUFFERED=1
