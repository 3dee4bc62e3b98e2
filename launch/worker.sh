#!/usr/bin/env bash
# Manages the run on one worker of a pod, which outlives the ssh connection; for launch/tpu.sh.
#   setup EXTRAS       installs the package, and Python if there is none; does nothing during a run
#   start COMMAND      starts it in the background, unless the same command is running already
#   read OFFSET        prints its log from that byte on, then a line with @ and the state
#   stop SECONDS       sends SIGTERM, after SECONDS SIGKILL; then prints the state
#   finish SECONDS     waits SECONDS for its end, then acts as stop
# The state is: nothing, running, or the exit status.
set -euo pipefail
folder=$HOME/.vit_jax_run
mkdir -p "$folder"
cd "$folder"

left() { # whether any process of the run is left
    [ -s group ] && kill -0 -- "-$(cat group)" 2>/dev/null
}

alive() {
    [ ! -s status ] && left
}

clear_up() {
    while left; do
        kill -KILL -- "-$(cat group)" 2>/dev/null || true
        sleep 0.1
    done
}

state() {
    if alive; then echo running; elif [ -s status ]; then cat status
    elif [ -e group ]; then echo 137; else echo nothing; fi # 137: killed, like its supervisor
}

begin() { # COMMAND
    local line
    printf -v line '%q ' "$@"
    if alive; then
        [ "$line" = "$(cat command)" ] && echo 'running already' && return
        echo "error: this worker already runs $(cat command); stop it with --stop" >&2
        exit 3
    fi
    clear_up
    rm -f status process
    [ ! -s ~/vit_jax/job_secret ] || VIT_JAX_JOB_SECRET=$(cat ~/vit_jax/job_secret)
    export VIT_JAX_JOB_SECRET=${VIT_JAX_JOB_SECRET:-}
    echo "$line" >"command"
    # shellcheck disable=SC2016
    setsid bash -c 'cd "$HOME/vit_jax"
        trap : TERM
        "$@" &
        echo $! >"$0/process"
        status=0; wait $! || status=$?
        while kill -0 $! 2>/dev/null; do status=0; wait $! || status=$?; done # it was only a signal
        echo $status >"$0/status.part"; mv "$0/status.part" "$0/status"' \
        "$folder" "$@" >log 2>&1 </dev/null 9>&- &
    echo $! >group
    for _ in {1..100}; do [ ! -s process ] || break; sleep 0.1; done
}

ended() { # SECONDS: waits so long for its end
    local deadline=$((SECONDS + $1))
    while alive && [ $SECONDS -le $deadline ]; do sleep 0.2; done
}

end() { # SECONDS
    if alive; then kill -TERM "$(cat process)" 2>/dev/null || true; fi
    ended "$1"
    clear_up
    echo "$(hostname): $(state)"
}

install() { # EXTRAS
    local uv
    alive && echo 'a run is in progress: set-up is skipped' && return
    cd ~/vit_jax
    find vit_jax experiments benchmarks -type f ! -name '*.so' -delete 2>/dev/null || true
    tar -xzf ~/vit_jax.tgz
    if [ ! -x .venv/bin/python ] && ! command -v python3.1{1..4} >/dev/null; then
        # Ubuntu 22.04, the system of TPU runtimes, has Python 3.10.
        uv=$(grep '^uv==' constraints.txt)
        python3 -m pip install --quiet --user "$uv"
        PATH=$HOME/.local/bin:$PATH uv python install 3.11
    fi
    if [ ! -e /usr/include/jpeglib.h ]; then # for fast JPEG decoding; else Pillow decodes
        sudo -n apt-get -o DPkg::Lock::Timeout=300 install -y gcc libjpeg-dev || true
    fi
    PATH=$HOME/.local/bin:$PATH bash launch.sh setup "$1"
}

exec 9>lock # one of these at a time
flock 9
case $1 in
setup) install "$2" ;;
start) begin "${@:2}" ;;
read)
    now=$(state) # before the log is read, so that its end is not missed
    [ ! -e log ] || tail -c "+$(($2 + 1))" log
    printf '\n@%s' "$now"
    ;;
stop) end "$2" ;;
finish) ended "$2" && end "$2" ;;
esac
