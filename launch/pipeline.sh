#!/usr/bin/env bash
# The three stages in order, from slices that do not exist yet to a finished model, through preemptions.
#
#   pipeline.sh BACKEND --base DIR --run gs://PATH --configs DIR [--stages LIST] [--attempts N] \
#               [options of launch/BACKEND.sh] [-- OPTION OF cocoa train...]
#
# BACKEND is queued, gke or xpk. With queued, slices that were taken away, also before the stages run on them, are asked
# for again and the stages continue; where the slices are still there the stages are started again on them. GKE and xpk
# restart by themselves. When all is finished, or has failed for good (starting: five times in a row), what was made is
# deleted. The same command given again picks up where it was, once nothing has its --name any more: what has it is left
# alone (exit status 2), as a run may be on it; only slices that are FAILED or SUSPENDED are deleted and asked for again.
#
#   --base DIR       the Hugging Face folder that the first stage starts from, as the container sees it: /data/...
#   --run gs://PATH  where the stages are written
#   --configs DIR    holds STAGE.yaml for each stage, as the container sees it: /data/configs, or configs/pods
#   --stages LIST    names with commas between [1-warmup,2-bridge,3-contrastive]
#   --attempts N     how often the slices may be started on [50]; on GKE and xpk see --max-restarts
#   --owner WORD     (queued) slices that bear it are this run's: taken up again after the pipeline itself was killed,
#                    and deleted at the end; others are left alone [a new one each time]
#   --spot, --reserved (queued), --reservation NAME (gke, xpk) and all other options go to launch/BACKEND.sh
#   --keep           leave what was made when the stages have failed for good
#   --dry-run        print the commands instead of running them
#   --help           this text
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

backend="" out="" attempts=50 keep="" script="" mine=() stages=() options=()

parse() {
  [ $# -gt 0 ] || die "no backend given: queued, gke or xpk (see --help)"
  case $1 in
    --help | -h) usage "${BASH_SOURCE[0]}"; exit 0 ;;
    queued | gke | xpk) backend=$1; shift ;;
    *) die "backend is '$1': give queued, gke or xpk" ;;
  esac
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage "${BASH_SOURCE[0]}"; exit 0 ;;
      --dry-run) DRY_RUN=1; mine+=("$1"); shift; continue ;;
      --keep) keep=1; shift; continue ;;
      --spot | --reserved) mine+=("$1"); shift; continue ;;
      --) shift; options=("$@"); break ;;
    esac
    value "$@"
    case $1 in
      --run) out=$2; stages+=("$1" "$2") ;;
      --base | --configs | --stages) stages+=("$1" "$2") ;;
      --attempts) attempts=$2 ;;
      *) mine+=("$1" "$2") ;;
    esac
    shift 2
  done
}

# The last lines of the log, before it goes with what it was written on.
tell() { call tail || say "the log of the stages could not be read"; }

# call VERB [WORD...]: what only looks or waits may be ended by a signal; what makes or deletes something may not.
call() {
  local how=attend
  case $1 in create | submit | delete) [ -n "$DRY_RUN" ] || how=sheltered ;; esac
  "$how" "$script" "$1" "${mine[@]}" "${@:2}"
}

# give_back STATUS: whatever ends this script, nothing that it made is left and costs money unless it was asked for.
give_back() {
  if [ -n "$keep" ] && [ "$1" -ne 0 ]; then
    loud "the slices ARE LEFT RUNNING AND COST MONEY (--keep); to end them: $(shown "$script" delete "${mine[@]}")"
  elif ! call delete; then
    loud "the slices MAY STILL BE RUNNING AND COST MONEY, deleting them failed; to end them: $(shown "$script" delete \
      "${mine[@]}")"
    return 1
  fi
}

# From what there is to stages that run: ask for slices where there are none, wait, set them up, start. $ran is `maybe`
# where stages may be running on the slices, and `ended` where the last look at them has told so.
bring_up() {
  local old=$made status=0
  if [ -z "$made" ]; then
    making call create --replace || status=$?
    case $status in
      0) ran="" ;;
      77) ran=maybe status=0 ;;
      *) return "$status" ;;
    esac
  fi
  call wait || status=$?
  case $status in
    0) ;;
    75 | 3)
      # Slices that were taken away stay in the list under their name until they are deleted.
      call delete || return 3
      made=""
      [ -z "$old" ] || status=75 # they have been there, and may come again
      return "$status" ;;
    *) return "$status" ;;
  esac
  # Hosts that cannot be reached are no reason to give up what may be running on them: it is waited for first.
  case $ran in
    ended) tell ;;
    maybe) call finish || status=$?; case $status in 0 | 76) return "$status" ;; esac ;;
  esac
  [ -z "$ran" ] || ran=maybe
  call setup || return
  ran=maybe
  call start -- "${command[@]}"
}

queued() {
  local attempt status began unstarted=0 ran=""
  "$script" up --dry-run "${mine[@]}" -- "${command[@]}" >/dev/null # finds wrong options, before anything is made
  for ((attempt = 1; attempt <= attempts; attempt++)); do
    status=0 began=""
    { bring_up && began=1 && call finish; } || status=$?
    case $status in
      0) return 0 ;;
      76) made=""; return 2 ;; # their name has become another's
    esac
    if [ -n "$began" ]; then
      unstarted=0 ran=ended
      retry "$status" || { tell; say "the stages have failed with status $status: see the log above"; return "$status"; }
    else
      # Slices may be taken away before anything runs on them; a wrong value or a name in use (2), or a request that has
      # failed (3), stays.
      case $status in 2 | 3) return "$status" ;; esac
      unstarted=$((unstarted + 1))
      if [ "$unstarted" -ge 5 ]; then
        say "the stages could not be started $unstarted times in a row: see the messages above"
        return "$status"
      fi
      attend sleep "$POLL"
    fi
    say "attempt $attempt of $attempts ended with status $status: trying again"
  done
  say "$attempts attempts were not enough: the same command continues"
  return 75
}

cluster() {
  local context=""
  have kubectl
  # kubectl may well be pointed elsewhere before the stages have ended, or even begun.
  [ "$backend" = xpk ] || [[ " ${mine[*]} " == *" --context "* ]] ||
    context=$(ask CONTEXT kubectl config current-context 2>/dev/null || true)
  [ -z "$context" ] || mine+=(--context "$context")
  making call submit -- "${command[@]}"
  call finish || {
    local status=$?
    tell
    return "$status"
  }
}

parse "$@"
script=$here/$backend.sh
bucket "$out" --run
count "$attempts" --attempts
command=(cocoa-stages "${stages[@]}" -- --distributed.mode=on "${options[@]}")
# After slices were taken away, another pipeline may have asked for some under their name.
[ "$backend" != queued ] || [[ " ${mine[*]} " == *" --owner "* ]] || mine+=(--owner "$(date +%s)-$$")
"$here/stages.sh" --dry-run "${stages[@]}" >/dev/null # a wrong value is found before anything is made
guard
if [ "$backend" = queued ]; then queued; else cluster; fi
say "all stages are finished: $out"
