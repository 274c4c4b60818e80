#!/usr/bin/env bash
# Run the stages of a training one after the other on this host; in the image it is called cocoa-stages.
#
#   stages.sh --base DIR --run PATH --configs DIR [options] [-- OPTION OF cocoa train...]
#
# Every stage starts from the one before. A finished stage is not run again and an unfinished one continues, so the
# same command, given again on the same or on other hosts, picks up where it was. On several hosts all run it.
#
#   --base DIR       the Hugging Face folder that the first stage starts from
#   --run PATH       where the stages are written, a folder or gs:// path that all hosts see
#   --configs DIR    holds STAGE.yaml for each stage: what `cocoa run RECIPE --write DIR` makes, or configs/pods
#                    (configs/demo is for the small backbone of `cocoa init`)
#   --stages LIST    names with commas between [1-warmup,2-bridge,3-contrastive]
#   --dry-run        print the commands instead of running them
#   --help           this text
#
# Exit status: 0 all stages are finished; 75 asked to stop, saved, try again; else that of the stage that failed.
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

base="" out="" configs="" stages=1-warmup,2-bridge,3-contrastive options=()

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage "${BASH_SOURCE[0]}"; exit 0 ;;
      --dry-run) DRY_RUN=1; shift; continue ;;
      --) shift; options=("$@"); break ;;
    esac
    value "$@"
    case $1 in
      --base) base=$2 ;;
      --run) out=$2 ;;
      --configs) configs=$2 ;;
      --stages) stages=$2 ;;
      *) die "unknown option $1 (see --help)" ;;
    esac
    shift 2
  done
}

# A signal reaches the stage that is running, whose exit status then ends this script; no stage begins after one.
child="" told="" stop=""
pass_on() {
  told=1 stop=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}

# train CHECKPOINT OUTPUT CONFIG: one stage, or the rest of it.
train() {
  local command=(cocoa train --config "$3" "--checkpoint=$1" "--output=$2" "${options[@]}") status=0
  if [ -n "$DRY_RUN" ]; then
    run "${command[@]}"
    return
  fi
  [ -z "$stop" ] || { say "asked to stop before $2: the same command continues"; return 75; }
  "${command[@]}" &
  child=$!
  [ -z "$stop" ] || pass_on # the signal came before there was anybody to pass it on to
  while true; do
    status=0
    told=""
    wait "$child" || status=$?
    [ -n "$told" ] || break # a signal ends wait, not the stage
  done
  child=""
  # bash gives -1 for a stage that ended as the signal came; how it ended is lost.
  [ "$status" -ge 0 ] || { say "$2 ended as it was asked to stop: the same command continues"; return 75; }
  [ "$status" -eq 0 ] || say "$2 ended with status $status$(retry "$status" && printf ': the same command continues')"
  return "$status"
}

parse "$@"
need "$base" --base "the folder of a Qwen2-VL or Qwen2.5-VL"
need "$out" --run "where the stages are to be written"
need "$configs" --configs "a folder that holds STAGE.yaml for each stage"
need "$stages" --stages "names with commas between"
read -ra names <<<"${stages//,/ }"
[ ${#names[@]} -gt 0 ] || die "--stages is '$stages': give names with commas between"
for stage in "${names[@]}"; do
  word "$stage" --stages
  file=${configs%/}/$stage.yaml
  # The last one is missed when the first has trained for days; a relative one may lie in the package.
  [ -n "$DRY_RUN" ] || [[ $file != /* ]] || [ -f "$file" ] || die "$file does not exist: see --configs and --stages"
done
trap pass_on TERM INT
before=$base
for stage in "${names[@]}"; do
  train "$before" "${out%/}/$stage" "${configs%/}/$stage.yaml"
  before=${out%/}/$stage
done
