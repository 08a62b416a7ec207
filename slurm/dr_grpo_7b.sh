#!/usr/bin/env bash
#SBATCH --job-name=dr-grpo-7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
# Dr.GRPO on Qwen2.5-Math-7B, the baseline of SIREN.
for project in "${PROJECT_DIR:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-.}"{,/..}; do
    [[ ! -f "$project/slurm/train.sh" ]] || break
done
exec bash "$project/slurm/train.sh" "$0" recipes/dr_grpo/dr_grpo-qwen2.5-math-7b-2n8g.toml "$@"
