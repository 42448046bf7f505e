#!/bin/sh
# Scales the workers' StatefulSet: mell scaler --stop-order last --scale-command deploy/scale/kubectl.sh
# Called as `kubectl.sh start COUNT NAME...` or `kubectl.sh stop COUNT NAME`; see docs/scaling.md. A StatefulSet stops the
# highest ordinal, which is what `--stop-order last` drains.
# MELL_KUBE_NAMESPACE (default `mell`) and MELL_KUBE_WORKERS (default `statefulset/gpu-worker`) say what to scale.
set -eu
namespace=${MELL_KUBE_NAMESPACE:-mell}
workers=${MELL_KUBE_WORKERS:-statefulset/gpu-worker}

replicas=$(kubectl --namespace "$namespace" get "$workers" --output 'jsonpath={.spec.replicas}')
case ${1:-} in
start)
  # Never fewer than there are, so that a repeated or late order takes nobody away.
  [ "$replicas" -lt "$2" ] || exit 0
  ;;
stop)
  # Only the last one, and only if nobody has changed the number meanwhile.
  last=${workers##*/}-$((replicas - 1))
  if [ "$replicas" -ne "$(($2 + 1))" ] || [ "$3" != "$last" ]; then
    echo "$3 is not the last of $replicas replicas ($last), or not $2 would be left" >&2
    exit 1
  fi
  ;;
*)
  echo "usage: kubectl.sh start|stop COUNT NAME..." >&2
  exit 2
  ;;
esac
kubectl --namespace "$namespace" scale "$workers" --current-replicas="$replicas" --replicas="$2"
