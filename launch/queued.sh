#!/usr/bin/env bash
# Train on Cloud TPU queued resources: ask for slices, wait, set up every host, start, follow, stop, delete.
#
#   queued.sh VERB --name NAME --project PROJECT --zone ZONE [options] [-- COMMAND...]
#
# Verbs
#   create   ask for the slices                        needs --accelerator or --type and --topology, and --runtime;
#            exits with 2 where NAME is in use, with 77 where --owner has it and COMMAND may run on it
#   wait     until they are there; exits with 75 where they were taken away, with 3 where the request has failed
#   setup    copy data to every host, pull the image   needs --image
#   start    run COMMAND in the image on every host    needs --image; what runs on all of them already is left alone
#   up       create, wait, setup, start; what create has made is deleted if one of the others fails
#   log      follow the log of the first host
#   tail     the last lines of the log of every host
#   finish   wait until COMMAND has ended, exit with its status, with 75 where the slices were taken away, or with 76
#            where what has NAME is another request by now
#   stop     ask COMMAND to save and end (SIGTERM)
#   delete   give the slices back
#
# Options
#   --name NAME            of the queued resource and its nodes
#   --project PROJECT      of Google Cloud
#   --zone ZONE            such as us-central1-a
#   --accelerator TYPE     such as v5litepod-16; or
#   --type TYPE            such as v4 (newer ones where gcloud knows them), and
#   --topology SHAPE       such as 2x2x4
#   --runtime VERSION      of the TPU software, such as v2-alpha-tpuv5-lite
#   --slices N             joined over the data-centre network [1]
#   --spot                 cheap and taken away at any time
#   --reserved             from a reservation
#   --valid-until TIME     give up when the slices are not there by then, such as 6h
#   --service-account A    whose rights the hosts have (to read and write the buckets)
#   --image IMAGE          made by launch/Dockerfile
#   --data gs://PATH       copied to every host, /data in the container
#   --grace SECONDS        for a save after SIGTERM [600]
#   --owner WORD           a label of what is created; what does not bear it is never waited for, nor deleted
#                          [none: whatever has NAME; `up` makes one]
#   --replace              what has NAME and is FAILED or SUSPENDED is deleted before `create` and `up`
#   --keep                 do not delete after a failure of `up`
#   --dry-run              print the commands instead of running them
#   --help                 this text
#
# COMMAND runs inside the image, usually: cocoa-stages --base /data/Qwen2-VL-2B-Instruct --run gs://BUCKET/RUN ...
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

verb="" name="" project="" zone="" accelerator="" type="" topology="" runtime="" slices=1 tier="" until=""
account="" image="" data="" grace=600 replace="" keep="" command=() words=() owner=""

parse() {
  begin "${BASH_SOURCE[0]}" "$@"
  verb=$1
  shift
  words=("$@")
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage "${BASH_SOURCE[0]}"; exit 0 ;;
      --dry-run) DRY_RUN=1; shift; continue ;;
      --replace) replace=1; shift; continue ;;
      --keep) keep=1; shift; continue ;;
      --spot | --reserved)
        [ -z "$tier" ] || die "--spot and --reserved exclude each other: give one of them"
        tier=$1; shift; continue ;;
      --) shift; command=("$@"); break ;;
    esac
    value "$@"
    case $1 in
      --name) name=$2 ;;
      --project) project=$2 ;;
      --zone) zone=$2 ;;
      --accelerator) accelerator=$2 ;;
      --type) type=$2 ;;
      --topology) topology=$2 ;;
      --runtime) runtime=$2 ;;
      --slices) slices=$2 ;;
      --valid-until) until=$2 ;;
      --service-account) account=$2 ;;
      --image) image=$2 ;;
      --data) data=$2 ;;
      --grace) grace=$2 ;;
      --owner) owner=$2 ;;
      *) die "unknown option $1 (see --help)" ;;
    esac
    shift 2
  done
}

check() {
  need "$name" --name "give the queued resource a name"
  name "$name" --name
  need "$project" --project "see gcloud config get project"
  need "$zone" --zone "one that has the accelerator, such as us-central1-a"
  word "$project" --project
  word "$zone" --zone
  count "$slices" --slices
  whole "$grace" --grace
  [[ $owner =~ ^[-_a-z0-9]{0,63}$ ]] || die "--owner is '$owner': give at most 63 small letters, digits, - and _"
  [ -z "$data" ] || bucket "$data" --data
  case $verb in
    create | up) check_request ;;
  esac
  case $verb in
    setup | start | up) image "$image" --image ;;
  esac
  case $verb in
    start | up) [ ${#command[@]} -gt 0 ] || die "no command given: put it after --" ;;
  esac
}

check_request() {
  need "$runtime" --runtime "such as v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e"
  if [ -n "$accelerator" ]; then
    [ -z "$type$topology" ] || die "--accelerator is given: leave out --type and --topology"
  else
    need "$type" "--accelerator (or --type)" "such as v5litepod-16"
    need "$topology" --topology "such as 2x2x4"
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || die "--topology is '$topology': give one such as 4x4 or 2x2x2"
  fi
  word "$runtime" --runtime
  word "$accelerator" --accelerator
  word "$type" --type
  word "$account" --service-account
  [[ $until =~ ^([0-9]+[dhms])*$ ]] || die "--valid-until is '$until': give a time such as 6h or 1d12h"
}

# What a host says at last: how many its slice has, and how many slices there are, learnt as JAX learns it.
census="of() { curl -sfH Metadata-Flavor:Google metadata.google.internal/computeMetadata/v1/instance/attributes/\$1; }"
census+="; echo cocoa:done \$(of worker-network-endpoints | tr , ' ' | wc -w)"
census+=" \$(of tpu-env | sed -n s/^MEGASCALE_NUM_SLICES://p | tr -cd 0-9)"

# everywhere COMMAND [EXPECTED]: on all hosts of all slices at once; $said is what they say. It fails when COMMAND fails
# on one of them, and when one does not answer: gcloud leaves out a slice that it cannot reach, and succeeds.
everywhere() {
  local answers line status=0 answered=0 wanted=1 hosts slices
  said=""
  answers=$(ask "${2:-}"$'\n'"cocoa:done 1" "${tpus[@]}" ssh "$name" "${where[@]}" --node=all --worker=all \
    "--command=$1 && { $census; }") || status=$?
  while read -r line; do
    case $line in
      "") ;;
      "cocoa:done "*)
        read -r _ hosts slices <<<"$line"
        answered=$((answered + 1)) wanted=$((hosts * ${slices:-1})) ;;
      *) said+=$line$'\n' ;;
    esac
  done <<<"$answers"
  [ "$status" -eq 0 ] || return "$status"
  [ "$answered" -ge "$wanted" ] || { say "$answered of $wanted hosts of $name have answered"; return 1; }
}

order() {
  local request=("--runtime-version=$runtime")
  if [ -n "$accelerator" ]; then
    request+=("--accelerator-type=$accelerator")
  else
    request+=("--type=$type" "--topology=$topology")
  fi
  if [ "$slices" -gt 1 ]; then
    request+=("--node-count=$slices" "--node-prefix=$name")
  else
    request+=("--node-id=$name")
  fi
  [ -z "$tier" ] || request+=("$tier")
  [ -z "$until" ] || request+=("--valid-until-duration=$until")
  [ -z "$account" ] || request+=("--service-account=$account")
  request+=("--labels=cocoa-owner=${owner:-nobody}")
  surely "${tpus[@]}" create "$name" "${where[@]}" "${request[@]}" --quiet || {
    local status=$?
    loud "create failed; should $name exist and be yours, it COSTS MONEY; to end it: $(shown "${ending[@]}")"
    return "$status"
  }
}

# What has the name already may be somebody's run: it is left alone. Without an answer we go on: Google Cloud refuses a
# name that is in use, too, and what we have not made we do not delete.
create() {
  local now bears
  look GONE
  case $now in
    "" | GONE) order; return ;;
    FAILED | SUSPENDED)
      [ -z "$replace" ] || { say "$name is $now: it is made again"; insist remove && order; return; } ;;
    *)
      [ -z "$owner" ] || [ "$bears" != "$owner" ] ||
        {
          say "$name is $now and was asked for by this owner: it is kept"
          [ "$now" != ACTIVE ] || return 77
          return 0
        } ;;
  esac
  in_use "$name" "queued resource" "$now" "finish where a run is on it, else wait, setup, start" \
    "$0" delete --name "$name" --project "$project" --zone "$zone"
}

# look [EXPECTED]: keep in $now the state of the request, GONE where there is none and nothing where it cannot be read,
# and in $bears its owner. What cannot be read goes on by itself: no reason to give it up, but one to say so loudly.
unread=0
look() {
  local answer shape=$'\n([A-Z_]+)($|\n|\t([-_a-z0-9]*))'
  now="" bears=""
  if answer=$(ask "${1-ACTIVE$'\t'$owner}" "${tpus[@]}" describe "$name" "${where[@]}" \
    '--format=value(state.state,tpu.nodeSpec[0].node.labels.cocoa-owner)' 2>&1) && [[ $'\n'$answer =~ $shape ]]; then
    now=${BASH_REMATCH[1]} bears=${BASH_REMATCH[3]} unread=0
  elif [[ $answer == *NOT_FOUND* ]]; then
    now=GONE unread=0
  else
    unread=$((unread + 1))
    say "the state of $name could not be read: $answer"
    [ "$unread" -ne 5 ] || loud "the state of $name could not be read 5 times; it MAY STILL BE RUNNING AND COST MONEY"
  fi
}

left_alone() {
  say "$name is $now: nothing that was made or started here is on it, so it is left alone"
  [ -n "$bears" ] || loud "$name bears no owner; should it be yours, it COSTS MONEY; to end it: $(shown "${ending[@]}")"
  return 76
}

# ours: look, and fail where the name of slices that were taken away has become another's, whose label may say nothing.
ours() {
  look
  [ -z "$owner" ] || [[ $now =~ ^(GONE)?$ ]] || [ "$bears" = "$owner" ] || left_alone
}

wait_active() {
  local now bears absent=0
  while true; do
    ours || return
    case $now in
      ACTIVE) return ;;
      GONE)
        absent=$((absent + 1)) # it may take a moment to appear
        [ "$absent" -lt 5 ] || die "there is no queued resource $name in $zone: see create, or who has deleted it" ;;
      SUSPENDING | SUSPENDED | DELETING) say "$name is $now: the slices were taken away"; return 75 ;;
      FAILED)
        say "$name is $now and will not become active: see gcloud compute tpus queued-resources describe $name"
        return 3 ;;
    esac
    [ -z "$now" ] || say "$name is $now"
    pause
  done
}

setup() {
  local steps="set -eu; sudo gcloud auth configure-docker ${image%%/*} --quiet; sudo docker pull --quiet $image"
  steps+="; mkdir -p ~/cocoa/data"
  [ -z "$data" ] || steps+="; gcloud storage rsync --recursive $data ~/cocoa/data"
  everywhere "$steps"
}

start() {
  local steps
  # What could not be seen for a while may have gone on all the same.
  everywhere "{ sudo docker ps --filter name=^cocoa\$ --format runs | grep runs || echo idle; }" idle || return
  [[ $said != *runs* || $said == *idle* ]] || { say "it runs on all hosts of $name already"; return 0; }
  # Processes of data.workers hand over whole batches in shared memory, of which a container has 64 MB by itself: half of
  # the host's, as on the host.
  steps="set -eu; sudo docker rm --force cocoa >/dev/null 2>&1 || true; sudo docker run --detach --name cocoa"
  steps+=" --privileged --network host --shm-size \$(awk '/MemTotal/{print int(\$2/2)}' /proc/meminfo)k"
  steps+=" --stop-timeout $grace --volume ~/cocoa/data:/data $image $(shown "${command[@]}")"
  everywhere "$steps"
}

log() { run "${tpus[@]}" ssh "$name" "${where[@]}" --node=0 --worker=0 '--command=sudo docker logs --follow cocoa'; }

tail() { run "${tpus[@]}" ssh "$name" "${where[@]}" --node=all --worker=all '--command=sudo docker logs --tail 20 cocoa'; }

inspect="sudo docker inspect --format={{.State.Status}}:{{.State.ExitCode}} cocoa || echo none:0"

# verdict CODE: keep in $status how COMMAND has ended, which on the first host did with CODE; fails where it may go on,
# with what a host says on which it does in $now. After an error on one host the others only tell that it is gone. A host
# that was started anew says 255 of its container, by some versions of Docker 0 (moby/moby#45788): all have to say 0.
verdict() {
  local line code all=1
  status=$1 now=""
  everywhere "$inspect" exited:0 || all=""
  for line in $said; do
    code=${line#*:}
    case $line in
      exited:0 | dead:0) ;;
      exited:* | dead:*)
        [ "$status" -ne 0 ] || status=$code
        [ "$code" = 255 ] || retry "$code" || { status=$code; return; } ;;
      *) all="" now=$line ;;
    esac
  done
  [ "$status" -ne 255 ] || { say "a host of $name was started anew"; status=75; }
  [ "$status" -ne 0 ] || [ -n "$all" ]
}

# Exit with the status of COMMAND, which ends on all hosts together. Where no host answers it may well go on, unseen.
finish() {
  local first now bears status lost=0 silent=0
  while true; do
    first=$(ask exited:0 "${tpus[@]}" ssh "$name" "${where[@]}" --node=0 --worker=0 "--command=$inspect") || first=""
    now=$first said=""
    case $first in
      exited:* | dead:*) ! verdict "${first#*:}" || { [ -z "$owner" ] || ours || return; return "$status"; } ;;
      "") everywhere "$inspect" || true; now=$said ;;
    esac
    if [[ $now =~ (running|paused|restarting): ]]; then
      lost=0 silent=0
    else
      ours || return
      case $now in
        ACTIVE)
          if [[ $first$said =~ (none|created|removing|exited|dead): ]]; then
            lost=$((lost + 1)) silent=0
          else
            silent=$((silent + 1))
          fi ;;
        "") ;;
        SUSPENDING | SUSPENDED | FAILED | DELETING | GONE) say "$name is $now: the slices were taken away"; return 75 ;;
        # Nothing was started on a request that waits, unless somebody has reset it.
        *) [ -z "$owner" ] || return 75; left_alone; return ;;
      esac
      [ "$lost" -lt 5 ] || { say "hosts of $name have said $lost times that nothing runs on them"; return 75; }
      [ "$silent" -ne 5 ] || loud "no host of $name has answered 5 times (see ssh-add); it RUNS AND COSTS MONEY"
    fi
    pause
  done
}

stop() { everywhere "sudo docker stop --time $grace cocoa"; }

# A request to delete that has failed may have been heard all the same.
remove() {
  local now bears
  surely "${ending[@]}" || { look && [ "$now" = GONE ]; } || return
  [ -n "$DRY_RUN" ] || say "$name was deleted"
}

remove_ours() {
  local now bears
  ours || return 0
  [ -n "$now" ] || return 1
  remove
}

delete() { if [ -n "$owner" ]; then insist remove_ours; else insist remove; fi; }

# Nothing that costs money outlives a failure, unless it was asked for.
give_back() {
  if [ -n "$keep" ]; then
    loud "$name IS LEFT RUNNING AND COSTS MONEY (--keep); to end it: $(shown "${ending[@]}")"
  elif ! delete; then
    loud "$name MAY STILL BE RUNNING AND COST MONEY, deleting it failed; to end it: $(shown "${ending[@]}")"
    return 1
  fi
}

up() {
  # Somebody may have replaced what this has made before it is given back.
  [ -n "$owner" ] || { owner=$(date +%s)-$$; words=(--owner "$owner" "${words[@]}"); }
  guard
  making create || [ $? -eq 77 ]
  attend "$here/queued.sh" wait "${words[@]}"
  attend "$here/queued.sh" setup "${words[@]}"
  attend "$here/queued.sh" start "${words[@]}"
  made="" # it is what was asked for, and stays
}

parse "$@"
tpus=(gcloud compute tpus queued-resources)
where=("--project=$project" "--zone=$zone")
ending=("${tpus[@]}" delete "$name" "${where[@]}" --force --quiet)
case $verb in
  create | setup | start | up | log | tail | finish | stop | delete) check; "$verb" ;;
  wait) check; wait_active ;;
  *) die "unknown verb $verb (see --help)" ;;
esac
