#!/usr/bin/env bash
#SBATCH --job-name=grpo-7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
# GRPO on Qwen2.5-Math-7B, the baseline of SENT.
for project in "${PROJECT_DIR:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-.}"{,/..}; do
    [[ ! -f "$project/slurm/train.sh" ]] || break
done
exec bash "$project/slurm/train.sh" "$0" recipes/grpo/grpo-qwen2.5-math-7b-1n8g.toml "$@"
