#!/usr/bin/env bash
# Pretraining on several nodes of a SLURM cluster: `sbatch docs/slurm.sh --config vit_base --data STORE --output RUN`
# What follows the script's name goes to `meduet-fast pretrain`. STORE and RUN are on a file system that all nodes
# see. Submit the same line again after any end: the run goes on from its last checkpoint.
#SBATCH --job-name=meduet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Two minutes before the time is up SLURM sends SIGTERM to what srun started. The launcher passes it on to its
# processes, which write a checkpoint and end; it kills those that take longer than TORCH_ELASTIC_SHUTDOWN_TIMEOUT
# seconds (30 with torch 2.11, which does not know the variable). Those that hang end by themselves before: when the
# step, or then the checkpoint, takes longer than --grace_s seconds.
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -euo pipefail

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}

# In SLURM 22.05 and 23.02 srun does not take over the number of CPUs by itself: all would share one of them.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" meduet-fast launch \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${GPUS_PER_NODE:-$SLURM_GPUS_ON_NODE}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:${MASTER_PORT:-29500}" \
    pretrain --resume --grace_s "${GRACE_S:-45}" "$@"
