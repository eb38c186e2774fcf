#!/bin/bash
# Trains in a container, on as many GPUs as it sees, or on its CPU. As the container's command:
#   bash /code/cluster/container.sh resnet_main.py -a resnet50 --epochs 90
#   DATA=sample bash /code/cluster/container.sh lm_main.py --model Transformer --lr 5
# A container that is stopped checkpoints; one that is started with the same OUTPUT goes on.
CODE=${CODE:-/code}
DATA=${DATA:-/data}       # the dataset, maybe read-only; empty: the script's own, downloaded
OUTPUT=${OUTPUT:-/output} # all that is written, downloads and caches too

[ "$DATA" = sample ] || [ -n "$(ls -A "$DATA" 2> /dev/null)" ] || DATA=
script=${1:-}
case $script in
  resnet_main.py) places=(${DATA:+"$DATA"} --output-dir "$OUTPUT") ;;
  lm_main.py) places=(${DATA:+--data "$DATA"} --save "$OUTPUT/model.pt") ;;
  *) echo "container.sh: error: give resnet_main.py or lm_main.py, and its flags" >&2 && exit 2 ;;
esac
shift

export TMPDIR=$OUTPUT/tmp XDG_CACHE_HOME=$OUTPUT/cache PYTHONDONTWRITEBYTECODE=1
# The scripts download to a folder of the working directory.
mkdir -p "$OUTPUT/logs" "$TMPDIR" && cd "$OUTPUT" || exit 2

gpus=$(python -c "import torch; print(torch.cuda.device_count())") || exit
# One process needs no launcher, which would replace its exit code by 1.
launch=(python)
case $gpus in
  0) ;;
  1) export ACCELERATE_MIXED_PRECISION=${ACCELERATE_MIXED_PRECISION:-bf16} ;;
  *) launch=(accelerate launch --config_file "$CODE/accelerate_configs/gpu4.yaml"
    --num_processes "$gpus" --main_process_port 0) ;;
esac
exec 3> >(exec tee -a "$OUTPUT/logs/${script%.py}.log")
log=$!
"${launch[@]}" "$CODE/$script" --resume auto "${places[@]}" "$@" >&3 2>&1 3>&- &
launcher=$!
exec 3>&-

# Stopping a container signals only its first process, this shell. The launcher passes it on.
trap 'kill -TERM "$launcher" 2> /dev/null' TERM INT USR1
until_end() { # `wait` also returns when a signal arrives
  wait "$1"
  code=$?
  while kill -0 "$1" 2> /dev/null; do
    wait "$1"
    code=$?
  done
}
until_end "$launcher"
result=$code
# The container ends with this shell. A training may outlive its launcher while it saves, and keeps
# the log open for as long.
until_end "$log"
exit $result
