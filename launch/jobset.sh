# shellcheck shell=bash
# What gke.sh and xpk.sh share: how a JobSet is doing, by kubectl; to be sourced.

# The JobSet, options that say where it is, and one that says which container of its pods is meant.
name="" at=() container=()

log() {
  local first=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
  run kubectl logs --follow "${container[@]}" --tail=-1 \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name,$first" "${at[@]}"
}

tail() {
  run kubectl logs --prefix "${container[@]}" --tail=20 "--selector=jobset.sigs.k8s.io/jobset-name=$name" "${at[@]}"
}

# A state that cannot be read is no reason to give up what may well be running, but one to say so loudly. What was not seen
# yet is looked for several times, as kubectl may have been pointed at another cluster for a moment.
finish() {
  local now unread=0 absent=0 seen=""
  have kubectl
  while true; do
    if now=$(ask Completed kubectl get jobset "$name" '--output=jsonpath={.status.terminalState}' "${at[@]}" 2>&1); then
      unread=0 seen=1
    elif [[ $now == *"(NotFound)"* ]]; then
      say "there is no JobSet $name (any more): $now"
      absent=$((absent + 1))
      [ -z "$seen" ] && [ "$absent" -lt 5 ] || return 1
    else
      unread=$((unread + 1))
      say "the state of $name could not be read: $now"
      [ "$unread" -ne 5 ] || loud "the state of $name could not be read 5 times; it MAY STILL BE RUNNING AND COST MONEY"
    fi
    case $'\n'$now$'\n' in
      *$'\n'Completed$'\n'*) return 0 ;;
      *$'\n'Failed$'\n'*) say "$name has failed: see ${0##*/} tail"; return 1 ;;
    esac
    pause
  done
}
