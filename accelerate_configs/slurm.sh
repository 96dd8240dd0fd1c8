#!/usr/bin/env bash
# A run on several machines under Slurm, which goes on by itself after pre-emption or the end of its time:
#   sbatch accelerate_configs/slurm.sh RECIPE --save_model RUN
# Two minutes before the end Slurm sends SIGUSR1. All processes then save after the same step and exit, and the job is
# put in the queue again. --init_from resume starts the run, or goes on with it.
#SBATCH --job-name=hf_myllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# Slurm tells this script, which tells the training processes; brackets, so that pkill does not find its own command
trap 'warned=1; srun --overlap pkill -USR1 -f "[-]m hf_myllm.train"' USR1
export HEAD PROCESSES
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PROCESSES=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))

# the launchers are deaf to the signal, which would end them; the training processes are not
srun bash -c 'trap "" USR1
    exec accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines "$SLURM_NNODES" \
        --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" \
        -m hf_myllm.train "$@" --init_from resume' launcher "$@" &
run=$!
while kill -0 "$run" 2>/dev/null; do # a signal ends `wait`, too
    wait "$run"
    code=$?
done
if [ -n "${warned:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
