# Runs on this machine: `local` and `hosts`. Sourced by launch.sh.
# shellcheck shell=bash disable=SC2154

help_local() {
    cat <<'EOS'
usage: bash launch.sh local [OPTIONS] EXPERIMENT [FLAGS OF vit_jax.main]
Trains in one process with all devices of this machine; the runs of a sweep one after another. For
GPUs, bash launch.sh setup cuda once before.
  --workdir DIR, --sweep KEY=A,B ..., --select, --dry-run   see: bash launch.sh
EOS
}

help_hosts() {
    cat <<'EOS'
usage: bash launch.sh hosts --processes N [OPTIONS] EXPERIMENT [FLAGS OF vit_jax.main]
Trains in N processes on this machine that find each other as those of N hosts would. The output of
process 0 is shown; that of the others is in WORKDIR/logs/process_I.log. Ctrl-C and SIGTERM are
passed on to all. The exit status is that of the first process that fails.
  --processes N        number of processes
  --devices M          simulated CPU devices of each process (1)
  --port P             of process 0, where the others find it (a free one)
  --grace SECONDS      time for processes to end after a signal, or after the first failure, before
                       they are killed (120)
  --workdir DIR, --sweep KEY=A,B ..., --select, --dry-run   see: bash launch.sh
EOS
}

launch_local() {
    local status=0
    options '' '' "$@"
    setup digits,figures
    grace=120
    waves all_local || status=$?
    exit "$status"
}

all_local() { each run_local; }

run_local() { # WORKDIR FLAGS
    training "$@"
    if [ ! "$several$dry_run" ]; then exec "${words[@]}"; fi
    supervise "$(quoted "${words[@]}")"
}

launch_hosts() {
    local status=0
    processes='' devices=1 port='' grace=120
    options 'processes devices port grace' '' "$@"
    [ "$processes" ] || fail 'no --processes given; write --processes=N'
    count processes "$processes"
    count devices "$devices"
    count grace "$grace"
    [[ -z $port || $port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535 ]] ||
        fail "--port is '$port', not a whole number from 1 to 65535"
    setup digits,figures
    waves all_hosts || status=$?
    exit "$status"
}

all_hosts() { each run_hosts; }

run_hosts() { # WORKDIR FLAGS
    local i place lines=() where=${port:-$(free_port)}
    log_folder "$1"
    if [ "$dry_run" ]; then
        quoted mkdir -p "$logs"
        declare -f secret
        # shellcheck disable=SC2016
        echo 'export VIT_JAX_JOB_SECRET=${VIT_JAX_JOB_SECRET:-$(secret)}'
    else
        export VIT_JAX_JOB_SECRET=${VIT_JAX_JOB_SECRET:-$(secret)}
    fi
    place=(env JAX_PLATFORMS=cpu
        "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
    for ((i = 0; i < processes; i++)); do
        training "$@" --coordinator "localhost:$where" --num_processes "$processes" \
            --process_id "$i" --expect_processes "$processes" \
            --expect_devices $((processes * devices))
        lines+=("$(quoted "${place[@]}" "${words[@]}")")
        [ "$i" = 0 ] || lines[i]+=" >$(quoted "$logs/process_$i.log") 2>&1"
    done
    supervise "${lines[@]}"
}

free_port() {
    "$python" -c 'import socket; print(socket.create_server(("localhost", 0)).getsockname()[1])'
}

supervise() { # LINES: runs shell commands in parallel; returns the status of the first that failed
    local line i rc status=0 deadline=''
    if [ "$dry_run" ]; then
        for line in "${@:2}"; do echo "$line &"; done
        echo "$1"
        [ $# = 1 ] || echo wait
        return
    fi
    pids=() stopped=''
    set -m # a process group each, so that Ctrl-C reaches them once, from here; a second one kills
    for line in "$@"; do
        bash -c "exec $line" </dev/null &
        pids+=($!)
    done
    set +m
    trap 'forward INT' INT
    trap 'forward TERM' TERM HUP
    trap 'kill_all' EXIT
    while [ ${#pids[@]} -gt 0 ]; do
        for i in "${!pids[@]}"; do
            if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
            rc=0
            wait "${pids[i]}" || rc=$?
            unset "pids[i]"
            if [ "$rc" != 0 ] && [ "$status" = 0 ]; then
                status=$rc deadline=$((SECONDS + grace))
                [ $# = 1 ] || [ "$i" = 0 ] || [ "$stopped" ] ||
                    echo "process $i ended with status $rc, see $logs/process_$i.log" >&2
            fi
        done
        # SECONDS counts whole seconds: at the deadline itself grace may be a second short
        [ ! "$stopped" ] || deadline=${deadline:-$((SECONDS + grace))}
        if [ "$deadline" ] && [ "$SECONDS" -gt "$deadline" ] && [ ${#pids[@]} -gt 0 ]; then
            echo "killed after $grace s: process ${!pids[*]}" >&2
            kill_all
            [ "$status" != 0 ] || status=137
        fi
        sleep 0.1
    done
    trap - INT TERM HUP EXIT
    return "$status"
}

forward() { # SIGNAL
    stopped=$1
    [ ${#pids[@]} = 0 ] || kill "-$1" "${pids[@]}" 2>/dev/null || true
}

kill_all() {
    local pid
    for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
}
