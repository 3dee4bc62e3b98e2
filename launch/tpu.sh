# Cloud TPUs, through gcloud. Sourced by launch.sh.
# shellcheck shell=bash disable=SC2034,SC2154

help_tpu() {
    cat <<'EOS'
usage: bash launch.sh tpu --name NAME --zone ZONE [OPTIONS] EXPERIMENT [FLAGS]
Trains on every worker of a TPU: copies this folder to ~/vit_jax there, makes .venv with the
versions of constraints.txt, starts the run so that it outlives the connection, and shows the output
of worker 0. The same command again reconnects to the run. Ctrl-C stops all workers; so does the end
of worker 0.
  --type v4-256        create the TPU if it does not exist or was preempted (a queued resource of the
                       same name), as often as needed; the run resumes from its checkpoint
  --spot               create a spot TPU
  --runtime VERSION    software of the TPU (by its type)
  --project PROJECT    project of the TPU (that of gcloud)
  --extras EXTRAS      extras to install (tpu,remote)
  --grace SECONDS      time for processes to save when stopped, before they are killed (120)
  --internal-ip        ssh to the workers' internal addresses
  --detach             return when all workers run; nothing restarts them after a preemption
  --logs               only show the output of worker 0, until its end (no EXPERIMENT)
  --stop               only stop all workers (no EXPERIMENT); the TPU stays, and is billed
  --workdir ADDRESS    folder of the run: gs://..., or a disk that all workers share
  --sweep KEY=A,B ..., --select, --dry-run   see: bash launch.sh
EOS
}

# No XLA flags: libtpu overlaps communication by default. Flags that other projects set (async
# collective fusion, data parallel all-reduce) don't change the compiled step, see
# benchmarks/RESULTS.md.
launch_tpu() {
    local status=0
    zone='' type='' runtime='' project='' extras=tpu,remote grace=120 spot='' internal_ip=''
    detach='' stop='' logs='' asked='' state=''
    options 'name zone type runtime project extras grace' 'spot internal-ip detach logs stop' "$@"
    [ "$name" ] || fail 'no --name given; write --name=TPU'
    [ "$zone" ] || fail 'no --zone given; write --zone=us-central2-b, for example'
    count grace "$grace"
    name_of name "$name" '[a-z]([a-z0-9-]{0,61}[a-z0-9])?'
    name_of zone "$zone" '[a-z][a-z0-9-]*'
    name_of project "$project" '[a-z][a-z0-9.:-]*'
    name_of type "$type" '[a-z0-9][a-z0-9-]*'
    name_of runtime "$runtime" '[a-z0-9][a-z0-9._-]*'
    name_of extras "$extras" '[a-z]+(,[a-z]+)*'
    [ "$dry_run" ] || command -v gcloud >/dev/null ||
        fail 'gcloud is not installed; install the Google Cloud CLI and run gcloud auth login'
    scratch=$(mktemp -d)
    trap 'kill $child 2>/dev/null || true; rm -rf "$scratch"' EXIT
    if [ "$stop" ]; then
        stop_workers stop || status=1
        [ "$dry_run" ] || cat "$scratch/out"
        exit "$status"
    fi
    if [ "$logs" ]; then
        follow || status=$?
        [ "$status" != "$gone" ] || die "TPU $name is $state"
        exit "$status"
    fi
    shared_workdir
    [[ $experiment != /* && $experiment != *..* ]] ||
        fail "$experiment lies outside of this folder, which alone is copied to the workers"
    [ ! "$several" ] || setup remote
    worker_python=.venv/bin/python
    trap 'abandon 130' INT
    trap 'abandon 143' TERM
    waves all_tpu || status=$?
    exit "$status"
}

all_tpu() { each run_tpu; }

gone=254 # status of a run whose TPU is gone

run_tpu() { # WORKDIR FLAGS: returns the exit status of the run
    local status
    training "$@"
    if [ "$dry_run" ]; then
        describe
        [ -z "$type" ] || { echo '# where there is none:' && request; }
        ship && begin
        echo "# every $poll s, from the byte on that was shown last:"
        ask_worker_0 0
        echo '# at the end:'
        stop_workers finish
        return
    fi
    while :; do
        make_ready || return 1
        status=0
        { ship && begin; } || status=1
        if [ "$status" = 0 ]; then
            [ -z "$detach" ] || return 0
            follow || status=$?
        fi
        if [[ $status != [023] && $status != 130 ]] && taken_away; then
            echo "# TPU $name is $state; the run resumes when it is READY" >&2
            continue
        fi
        [ "$status" != "$gone" ] || status=1 # recreated before its loss was detected, and empty
        if [ "$status" != 0 ]; then
            stop_workers stop || true
        elif stop_workers finish && grep -v ': 0$' "$scratch/out" >&2; then
            echo "error: worker 0 of $name succeeded, but the workers above failed" >&2
            status=1
        fi
        return "$status"
    done
}

gcloud_tpu() { # GROUP VERB ARGUMENTS: output goes to $scratch/out, errors to $scratch/err
    local words=(gcloud --quiet compute tpus "$1" "$2" "$name" "--zone=$zone"
        ${project:+"--project=$project"} "${@:3}")
    [ "$1 $2" != 'tpu-vm scp' ] || words=(gcloud --quiet compute tpus tpu-vm scp "${@:3}"
        "--zone=$zone" ${project:+"--project=$project"})
    if [ "$dry_run" ]; then
        quoted "${words[@]}"
        return
    fi
    # In the background, so that signals are handled at once.
    "${words[@]}" >"$scratch/out" 2>"$scratch/err" </dev/null &
    child=$!
    wait "$child"
}

describe() { gcloud_tpu tpu-vm describe '--format=value(state)'; }

ssh_to() { # WORKERS COMMAND
    gcloud_tpu tpu-vm ssh ${internal_ip:+--internal-ip} "--worker=$1" "--command=$2"
}

ask_worker_0() { ssh_to 0 "bash vit_jax/launch/worker.sh read $1"; } # OFFSET

look() { # sets state, that of the TPU or NOT_FOUND; false if gcloud can't tell
    if describe; then
        state=$(cat "$scratch/out")
    elif grep -q NOT_FOUND "$scratch/err"; then
        state=NOT_FOUND
    else
        explain "cannot query TPU $name"
        return 1
    fi
}

make_ready() { # waits until the TPU is READY
    local said=''
    while look; do
        case $state in
        READY) return ;;
        STOPPED) gcloud_tpu tpu-vm start || { explain "cannot start TPU $name" && return 1; } ;;
        NOT_FOUND | PREEMPTED | TERMINATED) have_made || return 1 ;;
        esac # else it is being created
        [ "$state" = "$said" ] || echo "# TPU $name: $state"
        said=$state
        pause "$poll"
    done
    return 1
}

have_made() { # one step towards a new TPU in place of a missing one; `state` selects which
    local node=$state
    if [ ! "$type" ]; then
        echo "error: TPU $name in $zone is $state; to create it, give --type=v4-256, say" >&2
        return 1
    fi
    if gcloud_tpu queued-resources describe '--format=value(state.state)'; then
        state=$(cat "$scratch/out")
        case $state in
        FAILED)
            if [ "$asked" ]; then
                echo "error: the request for a $type in $zone has failed; gcloud compute tpus \
queued-resources describe $name --zone=$zone says why. Take another --zone or --type" >&2
                return 1
            fi
            ;;
        SUSPENDED) ;;
        ACTIVE) # unless the TPU has come up since it was last looked at
            look && [ "$state" = "$node" ] || return 0
            ;;
        *) return 0 ;; # queued, or being created or deleted
        esac
        gcloud_tpu queued-resources delete --force ||
            { explain "cannot delete the queued resource $name" && return 1; }
    elif ! grep -q NOT_FOUND "$scratch/err"; then
        explain "cannot query the queued resource $name"
        return 1
    elif [ "$node" != NOT_FOUND ]; then
        gcloud_tpu tpu-vm delete || { explain "cannot delete TPU $name" && return 1; }
    fi
    state=requested asked=true
    request || { explain "cannot request a $type in $zone" && return 1; }
}

request() {
    case ${runtime:-$type} in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=$runtime ;;
    esac
    version=${runtime:-$version}
    [ "$version" ] ||
        fail "--type $type needs a --runtime: gcloud compute tpus tpu-vm versions list --zone=$zone"
    gcloud_tpu queued-resources create "--node-id=$name" "--accelerator-type=$type" \
        "--runtime-version=$version" ${spot:+--spot}
}

ship() { # copies this folder to every worker and sets it up
    local archive=runs/$name.tgz
    [ "$dry_run" ] || echo "# setting up every worker of $name"
    run mkdir -p "runs/$name.job"
    # The secret of the job, which worker.sh reads at the start of a run.
    run bash -c "$(declare -f secret); umask 077; secret >runs/$name.job/job_secret"
    run tar --exclude=__pycache__ --exclude='*.so' -czf "$archive" launch.sh launch setup.cfg \
        setup.py pyproject.toml constraints.txt README.md vit_jax experiments benchmarks \
        "${experiment%%:*}" -C "runs/$name.job" job_secret || return 1
    gcloud_tpu tpu-vm scp ${internal_ip:+--internal-ip} --worker=all "$archive" \
        "$name:vit_jax.tgz" ||
        { explain "cannot copy to every worker of $name" && return 1; }
    # On the first start there is no worker.sh yet; the archive does not contain .venv.
    ssh_to all "mkdir -p vit_jax && tar -xzf vit_jax.tgz -C vit_jax launch/worker.sh && \
bash vit_jax/launch/worker.sh setup $extras" ||
        { explain "cannot set up every worker of $name" && return 1; }
}

begin() {
    [ "$dry_run" ] || echo "# starting every worker of $name"
    ssh_to all "bash vit_jax/launch/worker.sh start $(quoted "${words[@]}")" ||
        { explain "cannot start every worker of $name" && return 1; }
}

follow() { # shows the log of worker 0; returns the exit status of its run, or $gone
    local offset=0 size ended said=''
    while :; do
        if ask_worker_0 "$offset"; then
            ended=$(tail -n 1 "$scratch/out")
            size=$(($(wc -c <"$scratch/out") - ${#ended} - 1))
            head -c "$size" "$scratch/out"
            offset=$((offset + size)) said=''
            case $ended in
            @running) ;;
            @[0-9]*) return "${ended#@}" ;;
            *) echo "error: no run on TPU $name; start one without --logs" >&2 && return 1 ;;
            esac
        else
            [ "$said" ] || explain "cannot read the log of worker 0 of $name; the run continues"
            said=true
            if look && [ "$state" != READY ]; then return "$gone"; fi
        fi
        pause "$poll"
    done
}

taken_away() { # whether the TPU is not READY, now or in one of six queries
    local i
    for i in 1 2 3 4 5 6; do
        look && [ "$state" != READY ] && return
        [ "$i" = 6 ] || pause "$poll"
    done
    return 1
}

stop_workers() { # HOW: stop, or finish if they should end by themselves
    ssh_to all "[ ! -e vit_jax/launch/worker.sh ] || bash vit_jax/launch/worker.sh $1 $grace" || {
        explain "cannot stop every worker of $name; try again: bash launch.sh tpu --name $name \
--zone $zone --stop"
        return 1
    }
}

abandon() { # STATUS: on a signal; a second signal exits without waiting
    trap 'exit 130' INT TERM
    kill "$child" 2>/dev/null || true
    echo "# stopping every worker of $name" >&2
    stop_workers stop || true
    exit "$1"
}

explain() { # WHAT FAILED: prints it with gcloud's reason and a hint, in one line
    local why hint list workers
    why=$(sed -n 's/^ERROR: ([^)]*) //p' "$scratch/err" | tail -n 1)
    why=${why:-$(grep -Ev '^ *$|^#####|^S(SH|CP): |^Retrying: ' "$scratch/err" | tail -n 1)}
    # gcloud names a worker whose command failed; it retries to connect to one without ssh.
    list=$(sed -n 's/.* on worker \([0-9]*\) failed with exit status.*/\1/p' "$scratch/err")
    list+=" $(sed -n 's/.*connect to worker \([0-9]*\).*/\1/p' "$scratch/err" | sort -n | uniq -d)"
    read -r -d '' -a workers <<<"$list" || true
    case $(cat "$scratch/err") in
    *uota*) hint='ask for more quota, or take another --zone, a smaller --type or --spot' ;;
    *apacity* | *tockout*) hint='give --type to queue for it, or take another --zone or --type' ;;
    *PERMISSION_DENIED* | *credential* | *'active account'*)
        hint='log in (gcloud auth login) and check --project' ;;
    *'code [255]'*) hint="allow ssh in the firewall and add your key to the agent (ssh-add \
~/.ssh/google_compute_engine); then --stop and the same command again" ;;
    *) hint='' ;;
    esac
    why=${workers:+worker ${workers[*]}: }${why:-gcloud gives no reason}
    echo "error: $1: $why${hint:+; $hint}" >&2
}
