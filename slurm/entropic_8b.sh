#!/usr/bin/env bash
#SBATCH --job-name=entropic-8b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
# EntroPIC on Qwen3-8B-Base.
for project in "${PROJECT_DIR:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-.}"{,/..}; do
    [[ ! -f "$project/slurm/train.sh" ]] || break
done
exec bash "$project/slurm/train.sh" "$0" recipes/entropic/entropic-qwen3-8b-base-8n8g.toml "$@"
