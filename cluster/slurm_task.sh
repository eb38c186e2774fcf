#!/bin/bash
# One process of a SLURM job: srun starts it, for slurm.sbatch.
#   srun cluster/slurm_task.sh resnet_main.py -a resnet50
# No launcher stands in between: it would report exit code 75 (stopped, resume me) as a failure, and
# the warning before the time limit would kill it.

# Signals are for the training, not for this shell.
trap '' USR1 TERM

if [ "$SLURM_NTASKS" -gt 1 ]; then
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
  export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  # Rank 0 runs on the first node, where srun was called. An address needs no name resolution.
  export MASTER_ADDR=$SLURM_LAUNCH_NODE_IPADDR
  # Two jobs on one node, tasks of an array too, have different numbers. Linux never chooses a port of this range itself.
  export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}

script=$1
shift
# A signal while Python loads its libraries must not end the process, which would look like a
# failure: it is blocked, and so kept, until the script unblocks it.
block="import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
os.execvp('python', ['python', *sys.argv[1:]])"
# The last --resume wins, one among the arguments over this.
set -- --resume auto "$@"
python -c "$block" "$script" "$@"
code=$?
[ $code -eq 75 ] || exit $code

# All processes have stopped. The main one, which wrote the checkpoint, queues the job again.
[ "$SLURM_PROCID" -eq 0 ] || exit 0
for argument; do
  [ "$before" = --resume ] && resume=$argument
  case $argument in --resume=*) resume=${argument#*=} ;; esac
  before=$argument
done
if [ "$resume" != auto ]; then
  echo "Not queued again: it would begin from the --resume of its command line once more." >&2
  exit $code
fi
# One task of an array has the array's own number, too, which stands for all of them.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# Not a job that its user has cancelled, nor a preempted one, which SLURM itself queues again.
case $(squeue --noheader --jobs "$job" --format "%T %r") in
  RUNNING* | *TimeLimit) scontrol requeue "$job" && exit 0 ;;
esac
exit $code
