#!/usr/bin/env bash
# Runs one training job on the host of a TPU, independent of any connection. `trainer.launch` copies this file to the
# host and calls it; each answer to it is a line that begins with `view-distill: `.
#
#   tpu_host.sh pull IMAGE | load FILE | install WHEEL
#   tpu_host.sh start WORKDIR_URL SAVE_SECONDS [NAME=URL ...] -- [TRAINER FLAG ...]
#   tpu_host.sh follow LINE | status | logs LINES | stop
#
# The disk of the host is deleted with the host. So the work directory is copied from the bucket at the start, and back
# every SAVE_SECONDS and at the end. NAME=URL are inputs, which are copied to inputs/NAME first. Credentials are those of
# the machine's service account, as gcloud on the host finds them.
set -euo pipefail

SCRIPT=$(realpath "$0")
CONTAINER=view-distill
UNSAVED=74 # EX_IOERR: the bucket could not be read or written
STOPPED=143
mkdir -p "$HOME/view-distill"
cd "$HOME/view-distill"

say() { printf 'view-distill: %s\n' "$*"; }

running() {
    [[ -f pid ]] && grep --quiet --text tpu_host.sh "/proc/$(<pid)/cmdline" 2> /dev/null
}

# --- the software of the trainer ----------------------------------------------------------------------------

pull() {
    ! running || return 0
    sudo gcloud auth configure-docker "${1%%/*}" --quiet
    sudo docker pull --quiet "$1"
    echo "$1" > image
}

load() {
    ! running || return 0
    sudo docker load --input "$HOME/$1" | sed -n 's/^Loaded image: //p' > image
    [[ -s image ]] || { echo "$1: contains no named image" >&2; return 2; }
}

install() {
    ! running || return 0
    rm -f image
    bash "$HOME/install.sh" dependencies trainer tpu 3.12 "$PWD/venv"
    bash "$HOME/install.sh" package "$HOME/$1" "$PWD/venv"
}

trainer() {
    if [[ ! -f image ]]; then
        PYTHONUNBUFFERED=1 venv/bin/python -m trainer.train "$@"
        return
    fi
    local volumes=(--volume="$PWD:/job") flag
    for flag in "$@"; do # paths on disks of this machine
        [[ $flag == --*=/* && -e ${flag#*=} ]] && volumes+=(--volume="${flag#*=}:${flag#*=}")
    done
    sudo docker rm --force "$CONTAINER" > /dev/null 2>&1 || true
    # No health check: it would need the TPU as well.
    sudo docker run --rm --name="$CONTAINER" --no-healthcheck --privileged --net=host \
        --ulimit=memlock=-1:-1 --stop-timeout=120 --user="$(id -u):$(id -g)" --env=HOME=/job --workdir=/job \
        "${volumes[@]}" "$(< image)" python -m trainer.train "$@"
}

# --- the work directory and its copy in the bucket ----------------------------------------------------------

fetch() { # NAME URL
    mkdir -p "inputs/$1"
    echo "copying $2"
    if [[ $2 == *.keras ]]; then
        gcloud storage cp "$2" "inputs/$1/" --quiet
    else
        gcloud storage rsync "$2" "inputs/$1" --quiet --recursive --delete-unmatched-destination-objects
    fi || { echo "cannot copy $2" >&2; return "$UNSAVED"; }
}

restore() { # URL
    if [[ -f unsaved ]]; then # an earlier run on this machine could not copy its work directory
        save "$(< unsaved)" || return "$UNSAVED"
    fi
    rm -rf work unsaved
    mkdir work
    local found
    found=$(gcloud storage objects list "$1/**" --limit=1 --format='value(name)' --quiet) || return "$UNSAVED"
    [[ -z $found ]] || # a new directory
        gcloud storage rsync "$1" work --quiet --recursive --exclude='host\.log$' || return "$UNSAVED"
}

save() { # URL
    (
        flock 9
        rm -rf snapshot
        mkdir snapshot
        # Files named `checkpoint` contain the name of the latest checkpoint. They are linked before the checkpoints
        # and copied after them, so that the named checkpoint is complete. Old files are deleted last. gcloud matches
        # a pattern from the beginning of the path.
        (cd work && find . -name checkpoint -type f -exec cp --parents --link -t ../snapshot {} +)
        whole=yes
        cp --archive --link --no-clobber work/. snapshot/ 2> /dev/null || whole=no # a file was deleted meanwhile
        rm -f snapshot/.lock
        ln --force log snapshot/host.log
        gcloud storage rsync snapshot "$1" --quiet --recursive --exclude='(.*/)?checkpoint$' || exit 1
        gcloud storage rsync snapshot "$1" --quiet --recursive || exit 1
        [[ $whole == no ]] ||
            gcloud storage rsync snapshot "$1" --quiet --recursive --delete-unmatched-destination-objects
    ) 9> saving.lock
}

keep_saving() { # URL SECONDS
    while sleep "$2"; do
        save "$1" || echo "the work directory could not be copied to $1; trying again in $2 s" >&2
    done
}

# --- the job ------------------------------------------------------------------------------------------------

train() { # URL SECONDS [NAME=URL ...] -- [FLAG ...]
    local url=$1 seconds=$2 code=0
    shift 2
    while [[ $1 != -- ]]; do
        fetch "${1%%=*}" "${1#*=}" || return
        shift
    done
    shift
    restore "$url" || return
    echo "$url" > unsaved
    keep_saving "$url" "$seconds" &
    local saver=$!
    trainer "$@" || code=$?
    kill "$saver" 2> /dev/null || true
    if save "$url"; then
        rm -f unsaved
    else
        echo "the work directory could not be copied to $url; it stays on this machine and is copied at the next start" >&2
        [[ $code != 0 ]] || code=$UNSAVED
    fi
    return "$code"
}

run() {
    local code=0
    trap : TERM # the trainer saves and ends; this shell waits for it
    train "$@" || code=$?
    [[ $code == 0 || ! -f stopped ]] || code=$STOPPED
    echo "$code" > code.new
    mv code.new code
}

start() {
    local asked
    asked=$(printf '%q ' "$@")
    if running; then
        if [[ $(< job) == "$asked" ]]; then say already; else say "other $(< job)"; fi
        return
    fi
    echo "$asked" > job
    rm -f code stopped
    [[ ! -f log ]] || mv log log.previous
    : > log
    setsid nohup bash "$SCRIPT" run "$@" >> log 2>&1 < /dev/null &
    echo $! > pid
    say started
}

ended() {
    local by=
    [[ ! -f stopped ]] || by=' stopped'
    if [[ -f code ]]; then say "exit $(< code)$by"; else say lost; fi
}

follow() { # LINE
    [[ -f pid ]] || { say none; return; }
    tail --lines="+$1" --follow --pid="$(< pid)" --sleep-interval=0.5 log
    ended
}

status() {
    if running; then say running; elif [[ -f pid ]]; then ended; else say none; return; fi
    printf 'command: %s\n' "$(< job)"
    [[ ! -s work/metrics.jsonl ]] || printf 'metrics: %s\n' "$(tail --lines=1 work/metrics.jsonl)"
}

logs() { # LINES
    [[ -f log ]] || { say none; return; }
    tail --lines="$1" log
}

stop() {
    running || { status; return; }
    touch stopped
    kill -TERM -- "-$(< pid)" || true
    [[ ! -f image ]] || sudo docker stop --time=300 "$CONTAINER" > /dev/null || true
    local second
    for second in {1..600}; do
        running || break
        sleep 1
    done
    if running; then say "running after $second s"; else ended; fi
}

"$@"; exit # on one line: a newer copy of this file may come while it runs
