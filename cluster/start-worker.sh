#!/usr/bin/env bash
# Joins this machine to a Ray cluster, in the foreground; Ctrl-C leaves it. Needs the head's token (see README.md).
# Usage: start-worker.sh HEAD_ADDRESS:PORT        Option, as environment variable: NUM_CPUS (all)
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 HEAD_ADDRESS:PORT" >&2
  exit 2
fi
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
exec ray start --block --address="$1" ${NUM_CPUS:+--num-cpus="$NUM_CPUS"}
