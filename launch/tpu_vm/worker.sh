#!/bin/bash
# What run.py does on each worker of a TPU VM:
#
#   worker.sh setup DIGEST              install, unless these very files are installed
#   worker.sh run NAME WORKDIR WORDS    start the training once under this name; follow it
#   worker.sh follow                    show the output until it ends; its exit code
#   worker.sh alive                     exit 10 when it runs, else 0
#   worker.sh stop                      let it save and end
#
# The training belongs to no connection. Its folder keeps: pid; log; code, how it ended;
# start, the name; stopped, when `stop` ended it.
set -u

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="$here.venv"
state="$here.state"
mkdir -p "$state"

fail() {
    echo "error: worker $(hostname): $1" >&2
    exit 2
}

alive() {
    local pid
    pid="$(cat "$state/pid" 2>/dev/null)" || return 1
    # Not another process that got this number after a reboot.
    grep -qs attnjax.train "/proc/$pid/cmdline"
}

setup() {
    if [[ "$(cat "$state/installed" 2>/dev/null)" == "$1" ]]; then
        return
    fi
    # The image's own Python is older than what attnjax needs.
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv || return 1
    PATH="$HOME/.local/bin:$PATH"
    [[ -x "$venv/bin/python" ]] || uv venv --quiet --python 3.11 "$venv" || return 1
    (cd "$here" && uv pip install --quiet --python "$venv/bin/python" \
        -c constraints.txt -e ".[tpu]") || return 1
    if [[ -f "$here/launch/tpu_vm/site_setup.sh" ]]; then
        (cd "$here" && bash launch/tpu_vm/site_setup.sh) || return 1
    fi
    echo "$1" >"$state/installed"
}

# A bucket becomes a folder: prints the path of a run directory.
mounted() {
    if [[ "$1" != gs://* ]]; then
        echo "$1"
        return
    fi
    local rest="${1#gs://}"
    local bucket="${rest%%/*}"
    local place="$HOME/gcs/$bucket"
    if ! mountpoint -q "$place"; then
        command -v gcsfuse >/dev/null ||
            fail "gcsfuse is not installed. Install it in --setup, or give a path."
        mkdir -p "$place"
        # A checkpoint is a folder that gets its name when it is whole.
        gcsfuse --implicit-dirs --rename-dir-limit 100000 "$bucket" "$place" >&2 ||
            fail "gcsfuse could not mount $bucket."
    fi
    echo "$place/${rest#*/}"
}

follow() {
    # From the given byte of the log, or its last lines.
    tail "${1:---lines=20}" --follow --sleep-interval=0.1 \
        --pid="$(cat "$state/pid")" "$state/log"
    local code
    code="$(cat "$state/code" 2>/dev/null || echo 137)"
    # A stop that was asked for is not one to start again from.
    if [[ "$code" == 75 && -e "$state/stopped" ]]; then
        code=79
    fi
    return "$code"
}

run() {
    local name="$1" workdir from
    if [[ "$(cat "$state/start" 2>/dev/null)" == "$name" ]] || alive; then
        follow
        return
    fi
    workdir="$(mounted "$2")" || exit
    shift 2
    rm -f "$state/code" "$state/stopped"
    touch "$state/log"
    from=$(($(stat --format=%s "$state/log") + 1))
    # A handler, so that the shell lives until the training has saved.
    (cd "$here" && exec setsid bash -c 'trap : TERM
        state="$1"; shift
        ATTNJAX_HOSTS=auto "$@"
        echo $? >"$state/code"' train "$state" \
        "$venv/bin/python" -u -m attnjax.train --workdir "$workdir" "$@") \
        >>"$state/log" 2>&1 </dev/null &
    echo $! >"$state/pid"
    echo "$name" >"$state/start"
    follow "--bytes=+$from"
}

stop() {
    local pid
    if ! alive; then
        return
    fi
    pid="$(cat "$state/pid")"
    touch "$state/stopped"
    pkill -TERM -P "$pid"
    tail --follow --sleep-interval=0.1 --pid="$pid" /dev/null
}

case "$1" in
setup | run | follow | stop) "$@" ;;
alive) if alive; then exit 10; fi ;;
*) fail "unknown command $1." ;;
esac
