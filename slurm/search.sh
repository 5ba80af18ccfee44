#!/bin/bash
# One search by many jobs, each a worker on one GPU: they share the draws through one study in a common folder.
#
#     sbatch --array=1-16 slurm/search.sh config/proxy.py --trials=256 --out=out/search
#
# Jobs may start late, be stopped, or be added with the same command: what was trained stays, and a trial
# whose job died is trained again. In place of the folder, --storage=postgresql+psycopg2://... is a study in a
# database (scaling/search.py). A sweep is shared in the same way: replace scaling.search by scaling.sweep.
#SBATCH --job-name=search
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A-%a.log

set -e
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
.venv/bin/python -m scaling.search "$@"
