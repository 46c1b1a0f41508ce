#!/bin/bash
# sbatch --nodes=4 configs/slurm.sh MODEL --data DATA --output runs/big SETTING=VALUE ...
# One node or many, with a folder that all see (the model, the data, --output). CONFIG: a file of this folder.
#SBATCH --job-name=unmask
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
CONFIG=${CONFIG:-configs/fsdp2.yaml}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))
PORT=$((20000 + SLURM_JOB_ID % 20000))
export CONFIG FIRST PROCESSES PORT
# When a node fails, the others would wait for it: --kill-on-bad-exit ends them too.
# Slurm sends SIGTERM two minutes before it takes the machines: the run saves, exits, and goes on when it is started again.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" \
  --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$FIRST" --main_process_port "$PORT" \
  --module unmask.cli adapt "$@" --resume' adapt "$@"
