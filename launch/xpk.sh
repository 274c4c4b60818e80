#!/usr/bin/env bash
# Train on a GKE cluster that xpk manages; the options are those of xpk 1.16.
#
#   xpk.sh VERB --name NAME --cluster CLUSTER --project PROJECT --zone ZONE [options] [-- COMMAND...]
#
# Verbs
#   submit   create the workload                       needs --tpu-type and --image; exits with 2 where NAME is in use
#   finish   wait until it has ended                   needs kubectl; exit 0 when it is complete, 1 when it has failed
#   log      follow the log of the first host          needs kubectl
#   tail     the last lines of the log of every host   needs kubectl
#   stop     let COMMAND save and end: the same as delete, whose grace period is --grace
#   delete   delete the workload
#
# Options
#   --name NAME            of the workload
#   --cluster CLUSTER      of xpk
#   --project PROJECT      of Google Cloud
#   --zone ZONE            of the cluster
#   --context NAME         of kubectl [that of the cluster, which xpk makes, by its name; else the current one]
#   --tpu-type TYPE        of a slice, such as v5litepod-16
#   --slices N             joined over the data-centre network [1]
#   --spot                 spot capacity, where the cluster provisions it itself
#   --reservation NAME     a reservation, where the cluster provisions it itself
#   --image IMAGE          made by launch/Dockerfile
#   --priority P           very-low, low, medium, high or very-high [medium]
#   --max-restarts N       after a host was lost [20]
#   --grace SECONDS        for a save after SIGTERM [600]
#   --dry-run              print the commands instead of running them
#   --help                 this text
#
# COMMAND runs inside the image, usually: cocoa-stages --base /data/Qwen2-VL-2B-Instruct --run gs://BUCKET/RUN ...
# Data come by `xpk storage attach`, which mounts a bucket in the workloads of a cluster.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"
# shellcheck source=launch/jobset.sh
source "$here/jobset.sh"

export PYTHONUNBUFFERED=1 # xpk is to be heard as it goes on, also through a pipe
verb="" cluster="" project="" zone="" tpu="" slices=1 tier=() image="" priority=medium restarts=20 grace=600
command=() context=""

parse() {
  begin "${BASH_SOURCE[0]}" "$@"
  verb=$1
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage "${BASH_SOURCE[0]}"; exit 0 ;;
      --dry-run) DRY_RUN=1; shift; continue ;;
      --spot) tier+=(--spot); shift; continue ;;
      --) shift; command=("$@"); break ;;
    esac
    value "$@"
    case $1 in
      --name) name=$2 ;;
      --cluster) cluster=$2 ;;
      --project) project=$2 ;;
      --zone) zone=$2 ;;
      --context) context=$2 ;;
      --tpu-type) tpu=$2 ;;
      --slices) slices=$2 ;;
      --reservation) tier+=("--reservation=$2") ;;
      --image) image=$2 ;;
      --priority) priority=$2 ;;
      --max-restarts) restarts=$2 ;;
      --grace) grace=$2 ;;
      *) die "unknown option $1 (see --help)" ;;
    esac
    shift 2
  done
}

check() {
  need "$name" --name "give the workload a name"
  name "$name" --name
  need "$cluster" --cluster "see xpk cluster list"
  need "$project" --project "see gcloud config get project"
  need "$zone" --zone "that of the cluster"
  word "$cluster" --cluster
  word "$project" --project
  word "$zone" --zone
  [ "$verb" = submit ] || return 0
  need "$tpu" --tpu-type "such as v5litepod-16"
  image "$image" --image
  [ ${#tier[@]} -le 1 ] || die "--spot and --reservation exclude each other: give one of them"
  [ ${#command[@]} -gt 0 ] || die "no command given: put it after --"
  word "$tpu" --tpu-type
  count "$slices" --slices
  whole "$restarts" --max-restarts
  whole "$grace" --grace
  [[ " very-low low medium high very-high " == *" $priority "* ]] ||
    die "--priority is '$priority': give very-low, low, medium, high or very-high"
}

# A workload that has the name already may be somebody's run: it is left alone.
unused() {
  local all found now
  all=$(ask "" xpk workload list "${where[@]}" "--filter-by-job=$name") || {
    local status=$?
    say "the workloads of $cluster could not be listed: $all"
    return "$status"
  }
  # Name, created, priority, machines needed, running and done, status; the filter finds parts of names, too.
  while read -r found _ _ _ _ _ now _; do
    [ "$found" != "$name" ] || in_use "$name" workload "${now:-unknown}" "log, finish" \
      "$0" delete --name "$name" --cluster "$cluster" --project "$project" --zone "$zone"
  done <<<"$all"
}

submit() {
  unused
  # By itself xpk restarts after 42 and from 127 on: a stage that saved and asks to be tried again (75) would have failed.
  # Also it has a finished workload deleted after 12 hours: after a longer absence `finish` would find nothing. 30 days.
  if ! surely xpk workload create "--workload=$name" "${where[@]}" "--tpu-type=$tpu" "--num-slices=$slices" \
    "--docker-image=$image" "--priority=$priority" "--max-restarts=$restarts" --restart-on-exit-codes=75 \
    "--termination-grace-period-seconds=$grace" --ttl-seconds-after-finished=2592000 "${tier[@]}" \
    "--command=$(shown "${command[@]}")"; then
    loud "xpk failed; should a workload $name exist and be yours, it COSTS MONEY; to end it: $(shown xpk workload delete \
      "--workload=$name" "${where[@]}" --force)"
    return 1
  fi
}

# see: point kubectl at the cluster; its current context is that of the latest command of xpk, whoever gave it.
see() {
  local all one
  if [ -z "$context" ]; then
    all=$(ask "gke_${project}_${zone}_$cluster" kubectl config get-contexts --output=name 2>/dev/null) || all=""
    while read -r one; do
      case $one in "gke_${project}_${zone}_$cluster" | "gke_${project}_${zone%-*}_$cluster") context=$one ;; esac
    done <<<"$all"
  fi
  at=(${context:+"--context=$context"})
}

# A request to delete that has failed may have been heard all the same; without a context kubectl may see another cluster.
remove() {
  local left
  if surely xpk workload delete "--workload=$name" "${where[@]}" --force; then return 0; fi
  see
  [ -n "$context" ] || return 1
  left=$(ask "" kubectl get jobset "$name" --ignore-not-found --output=name "${at[@]}") && [ -z "$left" ]
}

delete() { insist remove; }

stop() { delete; }

parse "$@"
where=("--cluster=$cluster" "--project=$project" "--zone=$zone")
check
case $verb in
  finish | log | tail) see; "$verb" ;;
  submit | stop | delete) "$verb" ;;
  *) die "unknown verb $verb (see --help)" ;;
esac
