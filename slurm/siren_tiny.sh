#!/usr/bin/env bash
#SBATCH --job-name=siren-tiny
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
# SIREN on the tiny model, on one CPU node: a check of a site's set-up before GPUs are asked for.
for project in "${PROJECT_DIR:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-.}"{,/..}; do
    [[ ! -f "$project/slurm/train.sh" ]] || break
done
export RANKS_PER_NODE="${RANKS_PER_NODE:-2}"
exec bash "$project/slurm/train.sh" "$0" recipes/siren/siren-tiny-cpu.toml "$@"
