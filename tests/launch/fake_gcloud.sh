#!/bin/bash
# Plays gcloud for a TPU VM of several workers, which are folders of this machine.
#
# In FAKE: states, one a line, for `describe` to say in turn (the last one stays;
# ABSENT, or "FAILED why"); workers, how many; calls, what was asked; worker-N, homes.
# ssh.codes, one a line: `ssh` ends with it in place of running the command ("run" runs).
set -u
printf '%q ' "$@" >>"$FAKE/calls"
echo >>"$FAKE/calls"

# The first line of a file, taken off it while there is another.
next() {
    local line
    read -r line <"$FAKE/$1"
    (($(wc -l <"$FAKE/$1") < 2)) || sed -i 1d "$FAKE/$1"
    echo "$line"
}

workers() { for ((n = 0; n < $(<"$FAKE/workers"); n++)); do echo "$FAKE/worker-$n"; done; }

option() {
    local name="$1"
    shift
    for word in "$@"; do [[ "$word" == "$name="* ]] && echo "${word#*=}"; done
}

words=("$@")
case "$3 $4" in
"queued-resources describe")
    read -r state why <<<"$(next states)"
    case "$state" in
    ABSENT)
        echo "ERROR: (gcloud.describe) NOT_FOUND: Resource was not found" >&2
        exit 1
        ;;
    BROKEN)
        echo "ERROR: (gcloud.describe) $why" >&2
        exit 1
        ;;
    FAILED) echo "{\"state\": {\"state\": \"FAILED\", \"failedData\":
        {\"error\": {\"message\": \"$why\"}}}}" ;;
    *) echo "{\"state\": {\"state\": \"$state\"}}" ;;
    esac
    ;;
"queued-resources create")
    if [[ -e "$FAKE/refuse" ]]; then
        cat "$FAKE/refuse" >&2
        exit 1
    fi
    for home in $(workers); do mkdir -p "$home"; done
    ;;
"queued-resources delete") rm -rf "$FAKE"/worker-* ;;
"tpu-vm scp")
    for home in $(workers); do cp "$5" "$home/${6#*:}" || exit 1; done
    ;;
"tpu-vm ssh")
    if [[ -e "$FAKE/ssh.codes" ]]; then
        code="$(next ssh.codes)"
        [[ "$code" == run ]] || exit "$code"
    fi
    pids=()
    for home in $(workers); do
        (cd "$home" && HOME="$home" exec bash -c "$(option --command "${words[@]}")") &
        pids+=($!)
    done
    first=0
    for pid in "${pids[@]}"; do
        wait "$pid" || { code=$? && ((first == 0)) && first=$code; }
    done
    exit "$first"
    ;;
*)
    echo "fake gcloud: unexpected: $*" >&2
    exit 64
    ;;
esac
