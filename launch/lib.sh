# shellcheck shell=bash
# What the scripts of this folder share; to be sourced.

DRY_RUN=${DRY_RUN:-}
# Seconds between two looks at something that takes minutes.
POLL=${COCOA_POLL_SECONDS:-30}
# Exit statuses after which the same command goes on where it was: 75 asked to stop and saved, another process of the run
# died, or a bucket cannot be read now; 134 a process died or never came, noticed by its missing sign of life; 137 and 143
# killed from outside.
RETRY="75 134 137 143"

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
  say "$*"
  exit 2
}

# Something that costs money may be left over: nobody must overlook this line.
loud() { printf '\n!!! %s: %s\n\n' "${0##*/}" "$*" >&2; }

# need VALUE OPTION REMEDY: a required value, checked before anything is made.
need() { [ -n "$1" ] || die "$2 is missing: $3"; }

# whole VALUE OPTION: a whole number from 0.
whole() { [[ $1 =~ ^[0-9]+$ ]] || die "$2 is '$1': give a whole number from 0"; }

# count VALUE OPTION: a whole number from 1.
count() {
  whole "$1" "$2"
  [ "$1" -ge 1 ] || die "$2 is $1: give 1 or more"
}

# word VALUE OPTION: one word, such as a zone or a type of machine; nothing is one too.
word() { [[ $1 =~ ^[-A-Za-z0-9._:/@]*$ ]] || die "$2 is '$1': give letters, digits and -._:/@ only"; }

# name VALUE OPTION: what Google Cloud and Kubernetes accept as a name.
name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "$2 is '$1': give at most 40 small letters, digits and hyphens, a letter first"
}

# bucket VALUE OPTION: a place that all hosts see.
bucket() { [[ $1 =~ ^gs://[-A-Za-z0-9._/]+$ ]] || die "$2 is '$1': give a gs:// path, which all hosts see"; }

# image VALUE OPTION: a container image by its name.
image() {
  need "$1" "$2" "build launch/Dockerfile and push it first"
  [[ $1 =~ ^[-A-Za-z0-9._/:@]+$ ]] || die "$2 is '$1': give an image such as us-docker.pkg.dev/PROJECT/REPOSITORY/cocoa:1"
}

# have COMMAND: something that is called only after something was made.
have() { [ -n "$DRY_RUN" ] || command -v "$1" >/dev/null || die "$1 is not on PATH: install it first"; }

# value OPTION [VALUE]: the value that has to follow an option.
value() { [ $# -ge 2 ] || die "$1 needs a value (see --help)"; }

# shown WORD...: a command as it can be pasted into a shell.
shown() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]]; then line+=" $word"; else line+=" '${word//\'/\'\\\'\'}'"; fi
  done
  printf '%s\n' "${line# }"
}

# run WORD...: run a command, or print it where --dry-run was given.
run() {
  if [ -n "$DRY_RUN" ]; then shown "$@"; else "$@"; fi
}

# ask EXPECTED WORD...: what a command prints; with --dry-run it is shown and EXPECTED is taken for its answer.
ask() {
  local expected=$1
  shift
  if [ -n "$DRY_RUN" ]; then
    shown "$@" >&3
    printf '%s\n' "$expected"
  else
    "$@"
  fi
}
exec 3>&1

# sheltered WORD...: run what makes or deletes something to its end, in a session of its own, where no Ctrl-C and no
# terminal that is closed reaches it; this script hears of them afterwards. What it says goes to stderr.
sheltered() { setsid --wait "$@" 2>&1 | drain >&2; }

# drain: pass on what is said for as long as anybody reads it: who writes to a terminal or a pipe that has died dies of it.
drain() {
  trap '' INT TERM HUP PIPE
  cat || cat >/dev/null
} 2>/dev/null

# surely WORD...: the same, printed where --dry-run was given.
surely() {
  if [ -n "$DRY_RUN" ]; then shown "$@"; else sheltered "$@"; fi
}

# attend WORD...: run what may take days, also in a session of its own; a signal ends it, and this script, at once.
child=""
attend() {
  setsid "$@" &
  child=$!
  local status=0
  wait "$child" || status=$?
  child=""
  return "$status"
}

# pause: between two looks.
pause() { [ -n "$DRY_RUN" ] || sleep "$POLL"; }

# in_use NAME WHAT STATE VERBS WORD...: refuse a name that something has already; WORDs are what ends that.
in_use() {
  die "--name is '$1', and a $2 of that name exists ($3): give another name, go on with that one (${0##*/} $4)," \
    "or end it: $(shown "${@:5}")"
}

# insist WORD...: a passing failure must not leave undone what gives something back.
insist() {
  local try
  for ((try = 1; try < 10; try++)); do
    if "$@"; then return 0; fi # in a trap, a bare return gives the status from before it
    say "deleting failed: try $((try + 1)) of 10 follows"
    pause
  done
  "$@"
}

# What costs money is given back however a script ends, but only what this script has made: after `guard`,
# `making WORD...` runs a command and keeps in $made that it has succeeded; at the end `give_back STATUS` is called then.
made="" busy="" told=""
guard() {
  trap 'ended $?' EXIT
  trap 'signalled 130' INT
  trap 'signalled 143' TERM
  trap 'signalled 129' HUP
  trap 'signalled 141' PIPE
}

# Signals call it too, as one that comes after `exit` and before this has begun would end the script with `exit`.
ended() {
  trap '' INT TERM HUP PIPE
  trap - EXIT
  local status=$1
  if [ -n "$made" ]; then
    # A terminal that is closed, or a pipe without a reader, would end whoever writes to it.
    say "giving back what was made" || exec 2>/dev/null
    [ -n "$DRY_RUN" ] || exec >&2
    give_back "$status" || [ "$status" -ne 0 ] || status=1
  fi
  exit "$status"
}

making() {
  local status=0
  busy=1
  "$@" || status=$?
  case $status in 0 | 77) made=1 ;; esac # 77: an earlier command of the same owner has
  busy=""
  [ -z "$told" ] || exit "$told"
  return "$status"
}

# A signal waits while something is being made: otherwise nobody would know that it was.
signalled() {
  told=$1
  [ -z "$busy" ] || return 0
  [ -z "$child" ] || kill -TERM -- "-$child" 2>/dev/null || kill -TERM "$child" 2>/dev/null || true
  ended "$told"
}

# retry STATUS: whether the same command may go on after it.
retry() { [[ " $RETRY " == *" $1 "* ]]; }

# usage FILE: the comment at the head of a script.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$1"; }

# begin FILE [WORD...]: see that the words of a script begin with a verb; --help shows the head of FILE.
begin() {
  [ $# -gt 1 ] || die "no verb given (see --help)"
  case $2 in --help | -h) usage "$1"; exit 0 ;; -*) die "a verb comes first, not $2 (see --help)" ;; esac
}
