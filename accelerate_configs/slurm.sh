#!/usr/bin/env bash
# Train on several machines under Slurm. The job requeues itself after preemption and at its time limit.
#   sbatch accelerate_configs/slurm.sh RECIPE --save_model RUN
# Slurm sends SIGUSR1 two minutes before the end. All ranks save after the same step and exit, and the job is requeued.
# --init_from resume starts the run or continues it.
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

# Pass the signal on to the training processes of this job on its machines, and of no other job of the user. The
# brackets keep the pattern from matching this command line.
pass_on='for process in /proc/[0-9]*; do
    grep -qzx "SLURM_JOB_ID=$SLURM_JOB_ID" "$process/environ" &&
        tr "\0" " " <"$process/cmdline" | grep -q "[-]m hf_myllm.train" && kill -USR1 "${process#/proc/}"
done 2>/dev/null'
trap 'warned=1; srun --overlap --ntasks-per-node=1 bash -c "$pass_on"' USR1
export HEAD PROCESSES
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PROCESSES=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))

# The launchers ignore the signal, which would end them; the training processes install their own handler.
srun bash -c 'trap "" USR1
    exec accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines "$SLURM_NNODES" \
        --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" \
        -m hf_myllm.train "$@" --init_from resume' launcher "$@" &
run=$!
while kill -0 "$run" 2>/dev/null; do # `wait` also returns after a signal
    wait "$run"
    code=$?
done
if [ -n "${warned:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
