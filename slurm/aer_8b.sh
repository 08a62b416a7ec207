#!/usr/bin/env bash
#SBATCH --job-name=aer-8b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
# AER on Qwen3-8B-Base.
for project in "${PROJECT_DIR:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-.}"{,/..}; do
    [[ ! -f "$project/slurm/train.sh" ]] || break
done
exec bash "$project/slurm/train.sh" "$0" recipes/aer/aer-qwen3-8b-base-4n8g.toml "$@"
