#!/usr/bin/env bash
# Starts the head of a Ray cluster in the foreground; Ctrl-C stops it. Run it in the environment of requirements.lock.
# Options, as environment variables: PORT (6379), DASHBOARD_PORT (8265), NUM_CPUS (all), TEMP_DIR (Ray's default).
# Ports in 10001..19999 are refused: Ray takes them for its client server and its workers.
# Further arguments go to `ray start`, such as --dashboard-agent-listen-port=N beside another cluster's head.
set -euo pipefail
case " $* " in
*" --min-worker-port"* | *" --worker-port-list"*) ;; # the user says which ports are Ray's
*)
  for name in PORT DASHBOARD_PORT; do
    port=${!name:-0}
    if [ "$port" -ge 10001 ] && [ "$port" -le 19999 ]; then
      echo "error: $name=$port lies in 10001..19999, which Ray takes for its client server and its workers;" \
        "choose one below 10000, or give workers others with --min-worker-port and --max-worker-port" >&2
      exit 2
    fi
  done
  ;;
esac
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
