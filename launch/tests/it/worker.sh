#!/bin/sh
# A stand-in for tangelo-worker: does what FAKE_<rank>, or else FAKE, says; by default it ends well at once.
# Beside the plain shell, these are at hand:

# progress JSON: tells the launcher
progress() { [ -z "$TANGELO_PROGRESS_FD" ] || echo "$1" > "/proc/self/fd/$TANGELO_PROGRESS_FD"; }

# fail KIND CODE STEP MESSAGE: reports an error as a worker does, and ends
fail() {
    printf '{"rank":%s,"step":%s,"kind":"%s","message":"%s","unix_time_ms":%s}' \
        "$RANK" "$3" "$1" "$4" "$(date +%s%3N)" > "$TANGELO_ERROR_FILE"
    echo "error: $4" >&2
    exit "$2"
}

# linger: does nothing for as long as the launcher lives; from now on traps are set
linger() { touch "$PIDS.ready.$RANK"; while kill -0 "$TANGELO_SUPERVISOR_PID" 2> /dev/null; do sleep 0.05; done; exit 77; }

# await FILE: until it is there
await() { while [ ! -e "$1" ]; do sleep 0.02; done; }

echo "rank $RANK of $WORLD_SIZE, restart $TORCHELASTIC_RESTART_COUNT, told: $*"
echo "note of rank $RANK" >&2
echo $$ > "$PIDS/$RANK.$TORCHELASTIC_RESTART_COUNT"
doing=$(printenv "FAKE_$RANK" || printenv FAKE)
eval "$doing"
