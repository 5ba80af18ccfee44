#!/bin/bash
# Train one model on several nodes of 8 GPUs, a process on each:
#
#     sbatch --nodes=4 slurm/train.sh config/gpt2.py --out=out/gpt2
#
# from the clone, which all nodes see. Prepare the data first, where there is internet. The same command
# resumes a run that the time limit stopped: a signal comes two minutes before, and the run writes a checkpoint.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log

set -e
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
# If one process dies the others would wait for it
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python train.py "$@"
