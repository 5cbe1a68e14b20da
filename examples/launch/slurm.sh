#!/usr/bin/env bash
# Train on a Slurm cluster: one torchrun per node. Cluster names are given to sbatch, not written here.
#
#   sbatch --nodes 4 --gpus-per-node 8 --partition NAME examples/launch/slurm.sh RECIPE.py [--parallel.tp 8 ...]
#
# Submit it from the repository root, on a file system that all nodes share.
#SBATCH --job-name=megamm
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --output=runs/slurm-%j.log
set -euo pipefail

MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))
export MASTER NODES=$SLURM_JOB_NUM_NODES
# The task's number is only known on its node, so it is read there.
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec examples/launch/torchrun.sh "$@"' torchrun "$@"
