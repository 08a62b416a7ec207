# Everything that depends on the site. Copy it, adapt it, point ENV_FILE at the copy.
# A variable that is already set wins, so a single job can differ: MASTER_PORT=29600 sbatch slurm/siren_7b.sh
# PROJECT_DIR, this repository on a file system that all nodes see, is known here (train.sh).
# shellcheck shell=bash disable=SC2034,SC2154

# Options of every submission with `bash slurm/<script>.sh`; those of `sbatch slurm/<script>.sh` are given there.
SBATCH_OPTIONS=() # (--account=my-account --partition=batch --qos=normal)

: "${VENV:=$PROJECT_DIR/.venv}"                    # used when CONTAINER_IMAGE is empty
: "${CONTAINER_IMAGE:=}"                           # built from the Dockerfile; needs enroot and Pyxis
: "${CONTAINER_MOUNTS:=$PROJECT_DIR:$PROJECT_DIR}" # models and data too: /shared:/shared
: "${LOG_DIR:=$PROJECT_DIR/runs/slurm}"            # one file per node and restart
: "${MAX_RESTARTS:=50}"                            # a job that asks for more makes no progress
: "${STOP_SECONDS:=3600}"                          # of RECIPE=...: from the signal to the time limit, a step and a save
: "${REQUEUE_PAUSE:=10}"                           # seconds between attempts, where scontrol fails

# Where rank 0 listens: a port below those the kernel hands out, another one for every job.
: "${MASTER_ADDR:=}" # empty: the job's first node
: "${MASTER_PORT:=$((20000 + ${SLURM_JOB_ID:-0} % 10000))}"

: "${NUMA_BINDING:=node}" # a rank runs on the CPUs near its GPU; none: on all of the node's

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # models and data are local paths
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# export PYTORCH_ALLOC_CONF=...  # tools.train sets expandable_segments:True unless vLLM shares the trainer's processes
# export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0  # the interface nodes reach each other by
# export NCCL_IB_HCA=mlx5                                   # the adapters of the InfiniBand or RoCE fabric
export PYTHONUNBUFFERED=1
