#!/usr/bin/env bash
# Train on GKE by a plain JobSet: one job a slice, one pod a host, restarted as a whole when a host is lost.
#
#   gke.sh VERB --name NAME [options] [-- COMMAND...]
#
# Verbs
#   submit   create the JobSet                          needs --type, --topology and --image; exits with 2 where NAME
#            is in use
#   render   print its YAML
#   log      follow the log of the first host
#   tail     the last lines of the log of every host
#   finish   wait until it has ended; exit 0 when it is complete, 1 when it has failed
#   stop     let COMMAND save and end: the same as delete, whose grace period is --grace
#   delete   delete the JobSet and its pods
#
# Options
#   --name NAME            of the JobSet
#   --namespace NAME       of Kubernetes [default]
#   --context NAME         of kubectl [the current one]
#   --type TYPE            v5e, v5p or v6e
#   --topology SHAPE       of a slice, such as 4x4 or 2x2x2
#   --slices N             joined over the data-centre network [1]
#   --spot                 on spot nodes
#   --reservation NAME     on the nodes of a reservation
#   --image IMAGE          made by launch/Dockerfile
#   --data gs://PATH       mounted at /data, read-only, by Cloud Storage FUSE
#   --service-account A    of Kubernetes, with rights to the buckets [default]
#   --max-restarts N       after a host was lost [20]
#   --grace SECONDS        for a save after SIGTERM [600]
#   --dry-run              print the commands (and the YAML) instead of running them
#   --help                 this text
#
# COMMAND runs inside the image, usually: cocoa-stages --base /data/Qwen2-VL-2B-Instruct --run gs://BUCKET/RUN ...
# The cluster needs the JobSet controller, and TPU node pools of that type and topology.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"
# shellcheck source=launch/jobset.sh
source "$here/jobset.sh"

verb="" namespace=default type="" topology="" slices=1 spot="" reservation="" image="" data=""
account=default restarts=20 grace=600 command=() accelerator="" chips=0 hosts=0 context="" container=(--container=cocoa)

parse() {
  begin "${BASH_SOURCE[0]}" "$@"
  verb=$1
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage "${BASH_SOURCE[0]}"; exit 0 ;;
      --dry-run) DRY_RUN=1; shift; continue ;;
      --spot) spot=1; shift; continue ;;
      --) shift; command=("$@"); break ;;
    esac
    value "$@"
    case $1 in
      --name) name=$2 ;;
      --namespace) namespace=$2 ;;
      --context) context=$2 ;;
      --type) type=$2 ;;
      --topology) topology=$2 ;;
      --slices) slices=$2 ;;
      --reservation) reservation=$2 ;;
      --image) image=$2 ;;
      --data) data=$2 ;;
      --service-account) account=$2 ;;
      --max-restarts) restarts=$2 ;;
      --grace) grace=$2 ;;
      *) die "unknown option $1 (see --help)" ;;
    esac
    shift 2
  done
}

check() {
  need "$name" --name "give the JobSet a name"
  name "$name" --name
  name "$namespace" --namespace
  case $verb in submit | render) check_request ;; esac
}

check_request() {
  image "$image" --image
  [ ${#command[@]} -gt 0 ] || die "no command given: put it after --"
  [ -z "$spot" ] || [ -z "$reservation" ] || die "--spot and --reservation exclude each other: give one of them"
  [ -z "$reservation" ] || name "$reservation" --reservation
  [ -z "$data" ] || bucket "$data" --data
  name "$account" --service-account
  count "$slices" --slices
  whole "$restarts" --max-restarts
  whole "$grace" --grace
  need "$type" --type "v5e, v5p or v6e"
  case $type in
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice ;;
    v6e) accelerator=tpu-v6e-slice ;;
    *) die "--type is '$type': give v5e, v5p or v6e" ;;
  esac
  need "$topology" --topology "such as 4x4, or 2x2x2 for v5p"
  local sides=1
  [ "$type" != v5p ] || sides=2
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){$sides}$ ]] ||
    die "--topology is '$topology': give one such as 4x4 for v5e and v6e, 2x2x2 for v5p"
  local total=$((${topology//x/*}))
  # Hosts of several have four chips each.
  chips=$((total < 4 ? total : 4))
  [ $((total % chips)) -eq 0 ] || die "--topology $topology has $total chips, which hosts of $chips cannot share"
  hosts=$((total / chips))
}

# json WORD...: a list as YAML reads it.
json() {
  local word line=""
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || die "the command has control characters in '$word': leave them out"
    word=${word//\\/\\\\}
    line+=", \"${word//\"/\\\"}\""
  done
  printf '[%s]\n' "${line#, }"
}

# The lines of the template that begin with '#if WORD ' are kept where WORD is among the arguments.
keep() {
  local line
  while IFS= read -r line; do
    if [[ $line =~ ^#if\ ([a-z]+)\ (.*)$ ]]; then
      [[ " $* " == *" ${BASH_REMATCH[1]} "* ]] || continue
      line=${BASH_REMATCH[2]}
    fi
    printf '%s\n' "$line"
  done
}

render() {
  local text wanted=() path=${data#gs://} inside="" key
  [ -z "$spot" ] || wanted+=(spot)
  [ -z "$reservation" ] || wanted+=(reservation)
  [ -z "$data" ] || wanted+=(data)
  [[ $path != */?* ]] || inside=,only-dir=${path#*/}
  text=$(keep "${wanted[@]}" <"$here/jobset.yaml")
  local -A values=(
    [NAME]=$name [NAMESPACE]=$namespace [ACCELERATOR]=$accelerator [TOPOLOGY]=$topology [SLICES]=$slices
    [HOSTS]=$hosts [CHIPS]=$chips [RESERVATION]=$reservation [IMAGE]=$image [BUCKET]=${path%%/*}
    [INSIDE]=${inside%/} [ACCOUNT]=$account [RESTARTS]=$restarts [GRACE]=$grace [COMMAND]=$(json "${command[@]}")
  )
  for key in "${!values[@]}"; do text=${text//"{$key}"/"${values[$key]}"}; done
  printf '%s\n' "$text"
}

# A JobSet that has the name already may be somebody's run: it is left alone.
unused() {
  local now
  now=$(ask "" kubectl get jobset "$name" --ignore-not-found \
    '--output=jsonpath={.metadata.name}:{.status.terminalState}' "${at[@]}")
  [ -n "$now" ] || return 0
  now=${now#*:}
  in_use "$name" JobSet "${now:-not ended}" "log, finish" "${ending[@]}"
}

submit() {
  local text
  text=$(render)
  unused
  if [ -n "$DRY_RUN" ]; then
    shown kubectl create --filename=- "${at[@]}"
    printf '%s\n' "$text"
  elif ! surely kubectl create --filename=- "${at[@]}" <<<"$text"; then
    loud "kubectl create failed; should a JobSet $name exist and be yours, it COSTS MONEY; to end it: $(shown \
      "${ending[@]}")"
    return 1
  fi
}

delete() { insist surely kubectl delete jobset "$name" --ignore-not-found --wait "${at[@]}"; }

stop() { delete; }

parse "$@"
check
at=("--namespace=$namespace" ${context:+"--context=$context"})
ending=("$0" delete --name "$name" --namespace "$namespace" ${context:+--context "$context"})
case $verb in
  submit | render | log | tail | finish | stop | delete) "$verb" ;;
  *) die "unknown verb $verb (see --help)" ;;
esac
