#!/usr/bin/env bash
# Starts the head of a Ray cluster in the foreground; Ctrl-C stops it. Run it in the environment of requirements.lock.
# Options, as environment variables: PORT (6379), DASHBOARD_PORT (8265), NUM_CPUS (all), TEMP_DIR (Ray's default).
# Further arguments go to `ray start`, such as --dashboard-agent-listen-port=N beside another cluster's head.
set -euo pipefail
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
token="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
if [ ! -s "$token" ] && [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  mkdir -p "$(dirname "$token")"
  (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token")
fi
[ ! -e "$token" ] || chmod 600 "$token"
exec ray start --head --block --port="${PORT:-6379}" \
  --dashboard-host=127.0.0.1 --dashboard-port="${DASHBOARD_PORT:-8265}" \
  ${NUM_CPUS:+--num-cpus="$NUM_CPUS"} ${TEMP_DIR:+--temp-dir="$TEMP_DIR"} "$@"
