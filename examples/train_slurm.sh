#!/bin/bash
# One run on several nodes: torchrun on each, one rank a GPU. --out must lie on a file system that all nodes share.
#
#     sbatch --nodes=2 examples/train_slurm.sh qwen3-8b --out /shared/runs/qwen3-8b --set train.batch_size=64
#
# Queued again, it resumes. Slurm sends SIGTERM five minutes before the end; the ranks then finish their update and save,
# for which torchrun gives them 270 seconds instead of 30: raise both where an update takes longer.
#SBATCH --job-name=atesd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -euo pipefail

: "${1:?which recipe? the words of atesd train follow the name of this script}"
nodes=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?start this with sbatch}")
head=${nodes%%$'\n'*}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
exec srun torchrun \
    --nnodes "${SLURM_JOB_NUM_NODES:?}" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:?}" \
    --rdzv-id "${SLURM_JOB_ID:?}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" \
    --shutdown-timeout 270 \
    -m atesd.cli train "$@"
