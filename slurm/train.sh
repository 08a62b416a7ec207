#!/usr/bin/env bash
# One launcher per node; each starts the ranks of its node and passes Slurm's signals on to them.
# Called by the sbatch scripts beside this file.
#
#   RECIPE=recipes/... bash slurm/train.sh [key=value ...]      inside an allocation
#   DRY_RUN=1 RECIPE=recipes/... bash slurm/train.sh            prints the command
#
# A run stopped by the time limit saves, exits 75 and is requeued; 2 (configuration) and 3 (verifier) are not.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=slurm/env.sh
source "${ENV_FILE:-$here/env.sh}"
: "${RECIPE:?name a recipe: RECIPE=recipes/<method>/<name>.toml}"

nodes="${SLURM_JOB_NUM_NODES:-1}"
ranks_per_node="${SLURM_GPUS_ON_NODE:-${RANKS_PER_NODE:-8}}"
head_node="$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | head -n 1 || true)"
python="$VENV/bin/python"
[[ -n "$CONTAINER_IMAGE" ]] && python=python

command=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1)
command+=(--output="$LOG_DIR/%x-%j-restart${SLURM_RESTART_COUNT:-0}-node%n.log")
[[ -n "$CONTAINER_IMAGE" ]] && command+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS")
command+=("$python" -m tools.ranks --nodes "$nodes" --ranks-per-node "$ranks_per_node")
command+=(--master "${head_node:-127.0.0.1}:$MASTER_PORT" tools.train "$RECIPE" "$@")

if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit 0
fi
mkdir -p "$LOG_DIR"
cd "$PROJECT_DIR"
code=0
"${command[@]}" || code=$?
if [[ "$code" == 75 && -n "${SLURM_JOB_ID:-}" ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
