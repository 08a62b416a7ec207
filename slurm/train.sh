#!/usr/bin/env bash
# The launcher behind the scripts of this folder: train.sh SCRIPT RECIPE [key=value ...] [--dry-run]
#
#   sbatch slurm/siren_7b.sh [key=value ...]            a job; options of sbatch before the script's name
#   bash slurm/siren_7b.sh [key=value ...]              the same with SBATCH_OPTIONS of env.sh
#   sbatch slurm/siren_7b.sh --dry-run                  tries nodes, paths and recipe, does not train
#   DRY_RUN=1 bash slurm/siren_7b.sh                    prints the commands and runs none
#   RECIPE=recipes/... bash slurm/siren_7b.sh           another recipe, on the nodes and GPUs that its name says
#   RECIPE=recipes/... RANKS_PER_NODE=1 sbatch ...      another recipe, another number of ranks; sbatch's own --nodes
#
# In the job one task per node runs tools.ranks, which starts the node's ranks; rank 0's address is fixed
# beforehand, so there is nothing to discover. Before the time limit Slurm sends USR1 to this script (--signal in the
# scripts; the time must hold a step and a save, for another recipe it is STOP_SECONDS). It passes it on; the ranks
# save and exit with 75, and the job goes back into the queue. Every other exit code ends the job: 2 configuration, 3 training health, 4 saving, 76 stopped three
# times in a row before anything new was saved (the time is too short for a start, a step and a save), 77 a rank hung,
# else a crash.
set -euo pipefail
script="$1" own="$2" recipe="${RECIPE:-$2}"
shift 2
: "${PROJECT_DIR:=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
export PROJECT_DIR # where the job finds this script, wherever it was submitted
# shellcheck source=slurm/env.sh
source "${ENV_FILE:-$PROJECT_DIR/slurm/env.sh}"
export RECIPE="$recipe"

show() {
    printf '%q ' "$@"
    echo
}

fail() { # what nothing can come of is found here, not by every node after a wait in the queue
    echo "configuration error: $1" >&2
    exit 2
}
for argument in "$@"; do
    case "$argument" in
    --dry-run | --print-config | [a-z]*=*) ;;
    *) fail "argument '$argument': expected key=value (train.steps=50) or --dry-run; sbatch's own options go before the script" ;;
    esac
done
[[ "${RANKS_PER_NODE:-1}" =~ ^[1-9][0-9]*$ ]] || fail "RANKS_PER_NODE: found '$RANKS_PER_NODE', expected a number above 0"
if [[ -z "$CONTAINER_IMAGE" ]]; then # which may have the recipe somewhere else
    (cd "$PROJECT_DIR" && [[ -f "$recipe" ]]) || fail "no such recipe: $recipe, looked for from $PROJECT_DIR"
fi

[[ "$recipe" =~ -([0-9]+)n([0-9]+)g\.toml$ ]] || true # a recipe's name says its size
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    submit=(sbatch "${SBATCH_OPTIONS[@]}")
    if [[ -n "${BASH_REMATCH[1]:-}" && "$recipe" != "$own" ]]; then
        submit+=(--nodes="${BASH_REMATCH[1]}" --gpus-per-node="${BASH_REMATCH[2]}" --signal="B:USR1@$STOP_SECONDS")
    fi
    submit+=("$script" "$@")
    [[ -n "${DRY_RUN:-}" ]] || exec "${submit[@]}"
    show "RECIPE=$recipe" "${submit[@]}"
fi

nodes="${SLURM_JOB_NUM_NODES:-${BASH_REMATCH[1]:-1}}"
ranks_per_node="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${BASH_REMATCH[2]:-1}}}"
hosts=("the-first-node")
[[ -z "${SLURM_JOB_NODELIST:-}" ]] || mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
restart="${SLURM_RESTART_COUNT:-0}"

# A node that has saved and left must not take the others with it, as --kill-on-bad-exit=1 would: they save too.
# One that has failed leaves them waiting for it; they get a minute.
launch=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60)
launch+=(--output="$LOG_DIR/%x-%j-restart$restart-node%n.log")
[[ -z "${SLURM_CPUS_ON_NODE:-}" ]] || launch+=(--cpus-per-task="$SLURM_CPUS_ON_NODE") # srun's default is 1
python="$VENV/bin/python"
if [[ -n "$CONTAINER_IMAGE" ]]; then
    launch+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$CONTAINER_MOUNTS")
    launch+=(--container-workdir="$PROJECT_DIR")
    python=python
fi
launch+=("$python" -m tools.ranks --nodes "$nodes" --ranks-per-node "$ranks_per_node")
launch+=(--numa-binding "$NUMA_BINDING")
launch+=(--master "${MASTER_ADDR:-${hosts[0]}}:$MASTER_PORT" tools.train "$recipe" "$@")
show "${launch[@]}"
[[ -z "${DRY_RUN:-}" ]] || exit 0

srun="" notified=""
trap 'notified=1; [[ -z "$srun" ]] || kill -USR1 "$srun" 2>/dev/null || true' USR1 TERM

mkdir -p "$LOG_DIR"
cd "$PROJECT_DIR"
"${launch[@]}" &
srun=$!
while # a signal ends the wait before srun ends
    notified="" code=0
    wait "$srun" || code=$?
    [[ -n "$notified" ]]
do :; done

echo "$(date '+%F %T') restart $restart: exit code $code, logs in $LOG_DIR"
if [[ "$code" == 75 ]]; then
    state="$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" || state=RUNNING # the controller does not answer
    if ((restart >= MAX_RESTARTS)); then
        echo "not requeued: MAX_RESTARTS=$MAX_RESTARTS restarts are used up; the state is saved, submit again"
    elif [[ "$state" != RUNNING ]]; then # cancelled, or preempted: then Slurm itself requeues
        echo "not requeued: the job is $state; the state is saved, submit again to go on"
    else
        for ((attempt = 1; attempt <= 6; attempt++)); do
            if scontrol requeue "$SLURM_JOB_ID"; then
                echo "the state is saved: requeued"
                exit "$code"
            fi
            sleep "$REQUEUE_PAUSE"
        done
        echo "not requeued: scontrol failed; the state is saved, submit again to go on"
    fi
fi
exit "$code"
