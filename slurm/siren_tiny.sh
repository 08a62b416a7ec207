#!/usr/bin/env bash
#SBATCH --job-name=siren-tiny
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
# The tiny model on one CPU node: a check of a site's set-up before GPUs are asked for.
#   sbatch slurm/siren_tiny.sh            DRY_RUN=1 bash slurm/siren_tiny.sh prints the command
set -euo pipefail
project="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
export PROJECT_DIR="$project" RECIPE=recipes/siren/siren-tiny-cpu.toml RANKS_PER_NODE=2
exec bash "$project/slurm/train.sh" "$@"
