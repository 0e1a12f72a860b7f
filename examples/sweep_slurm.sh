#!/bin/bash
# A sweep as a Slurm array: one `atesd train` a task. Folders and environment must be on a file system that all nodes share.
#
#     atesd sweep PLAN --out /shared/sweep --print-commands > commands.txt
#     sbatch --array=0-$(($(examples/sweep_slurm.sh commands.txt 0 count) - 1))%8 examples/sweep_slurm.sh commands.txt
#
# Lines behind `# wait here` read runs above them: they are stage 1 (then 2, ...), to be queued behind the array of stage 0:
#
#     sbatch --dependency=afterok:JOBID --array=... examples/sweep_slurm.sh commands.txt 1
#
# A task that was cut goes on from its checkpoint when it is queued again; `--print-commands` leaves out what is finished.
#SBATCH --job-name=atesd-sweep
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -euo pipefail

commands=${1:?which file? write it with: atesd sweep PLAN --out FOLDER --print-commands}
stage=${2:-0}
mapfile -t lines < <(awk -v stage="$stage" '/^# wait here/ { n++; next } !/^#/ && n == stage' "$commands")

if [[ ${3:-} == count ]]; then
    echo "${#lines[@]}"
    exit
fi
task=${SLURM_ARRAY_TASK_ID:?not set: this is the body of a job array, start it with sbatch --array}
if ((task >= ${#lines[@]})); then
    echo "task $task: stage $stage of $commands has ${#lines[@]} commands, 0 to $((${#lines[@]} - 1))" >&2
    exit 2
fi
echo "task $task: ${lines[task]}"
eval "exec ${lines[task]}"
