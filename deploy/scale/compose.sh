#!/bin/sh
# Scales the workers of docker-compose.yml: mell scaler --scale-command deploy/scale/compose.sh
# Called as `compose.sh start COUNT NAME...` or `compose.sh stop COUNT NAME`; see docs/scaling.md. Run `mell scaler` where
# compose runs. Containers have their id as host name, so the one to stop is found by MELL_SCALER_HOST.
# MELL_COMPOSE (default `docker compose`) and MELL_COMPOSE_SERVICE (default `gpu_worker`) say what to call and what to scale.
set -eu
compose=${MELL_COMPOSE:-docker compose}
service=${MELL_COMPOSE_SERVICE:-gpu_worker}

case ${1:-} in
start)
  # Never fewer than there are, so that a repeated or late order takes nobody away.
  there=$($compose ps --quiet "$service" | wc -l)
  count=$2
  [ "$there" -le "$count" ] || count=$there
  $compose up --detach --no-deps --no-recreate --scale "$service=$count" "$service"
  ;;
stop)
  # This very container, not the one that compose would choose.
  docker stop "${MELL_SCALER_HOST:?is set by mell scaler}"
  docker rm "$MELL_SCALER_HOST"
  ;;
*)
  echo "usage: compose.sh start|stop COUNT NAME..." >&2
  exit 2
  ;;
esac
