# Batch jobs of SLURM. Sourced by launch.sh.
# shellcheck shell=bash disable=SC2034,SC2154

# Options of sbatch that may be given as --OPTION VALUE; others only as --OPTION=VALUE.
sbatch_options='partition time account qos constraint reservation mem cpus-per-task exclude
    nodelist'

help_slurm() {
    cat <<'EOS'
usage: bash launch.sh slurm --nodes N --gpus-per-node G [OPTIONS] EXPERIMENT [FLAGS]
Submits a batch job and follows its log. Ctrl-C cancels the job; losing the terminal does not. This
folder must lie on a disk that all nodes share. A job that is preempted, or near its time limit,
saves, queues again and resumes. The jobs of a sweep are submitted together.
  --nodes N, --gpus-per-node G   size of the job; one process per GPU
  --before SECONDS               time before its time limit at which the job saves (120)
  --partition, --time, --account, --qos, --constraint, --reservation, --mem, --cpus-per-task,
  --exclude, --nodelist VALUE    passed on to sbatch, as is every --OPTION=VALUE before EXPERIMENT
  --detach                       submit without following the log
  --workdir DIR, --sweep KEY=A,B ..., --select, --dry-run   see: bash launch.sh
EOS
}

launch_slurm() {
    local status=0
    nodes='' gpus_per_node='' before=120 detach='' passed_on=true follower='' jobs=()
    local option variable
    for option in $sbatch_options; do printf -v "${option//-/_}" ''; done
    options "nodes gpus-per-node before $sbatch_options" detach "$@"
    count nodes "$nodes"
    count gpus-per-node "$gpus_per_node"
    count before "$before"
    for option in $sbatch_options; do
        variable=${option//-/_}
        [ -z "${!variable}" ] || others+=("--$option=${!variable}")
    done
    for option in "${others[@]}"; do
        [[ $option =~ ^--[a-z][a-z0-9-]*=[^\"\\]*$ ]] ||
            fail "$(quoted "$option") has a quote or backslash, which a job script cannot hold"
    done
    [[ $PWD$workdir != *[\"\\%]* ]] ||
        fail "--workdir $(quoted "$workdir") or this folder has a \", \\ or %; name another"
    [ "$dry_run" ] || command -v sbatch >/dev/null ||
        fail 'sbatch is not installed; run this on a login node of a SLURM cluster'
    setup cuda,remote
    trap 'kill $child $follower 2>/dev/null || true' EXIT
    trap 'cancel 130' INT
    trap 'cancel 143' TERM
    waves all_slurm || status=$?
    exit "$status"
}

all_slurm() { # submits all jobs and waits for them
    local status=0
    [ -z "$follower" ] || kill "$follower" 2>/dev/null || true
    jobs=() follower=''
    each submit || status=$?
    if [ "$detach$dry_run" ] || [ "$status" != 0 ]; then
        [ ${#jobs[@]} = 0 ] || [ "$status" = 0 ] || cancel "$status"
    else
        await_jobs || status=$?
    fi
    return "$status"
}

# One process per GPU, as jax.distributed reads SLURM's variables: process SLURM_PROCID of
# SLURM_NTASKS uses only the device SLURM_LOCALID of its node. So each process must see all devices
# of its node: no --gpus-per-task, no binding.
# When one process ends, the others detect it, save if they can, and exit; srun waits five minutes
# before it kills any. --signal is sent to the processes, not to this script; TERM here means that
# the job is cancelled, or preempted and then requeued by SLURM itself.
job_script() { # WORKDIR FLAGS: prints the script for sbatch
    local option job_name
    training "$@"
    job_name=$(basename "$1")
    cat <<EOS
#!/bin/bash
#SBATCH --job-name="${job_name//[^A-Za-z0-9_.,=+-]/_}"
#SBATCH --nodes=$nodes
#SBATCH --gpus-per-node=$gpus_per_node
#SBATCH --ntasks-per-node=$gpus_per_node
#SBATCH --output="$logs/slurm-%j.log"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=SIGTERM@$before
$(for option in "${others[@]}"; do printf '#SBATCH %s="%s"\n' "${option%%=*}" "${option#*=}"; done)
cd $(quoted "$PWD") || exit
# Gradients are exchanged beside the computation of the layers before. Flags given later win.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true \${XLA_FLAGS:-}"
# What the processes know each other by, a new one for each start; it is in no file.
$(declare -f secret)
export VIT_JAX_JOB_SECRET=\${VIT_JAX_JOB_SECRET:-\$(secret)}
over='' status=0
trap 'over=true' TERM
srun --kill-on-bad-exit=0 --wait=300 --gpu-bind=none \\
    \${SLURM_CPUS_PER_TASK:+--cpus-per-task=\$SLURM_CPUS_PER_TASK} \\
    $(quoted "${words[@]}") || status=\$?
if [ \$status = 143 ] && [ -z "\$over" ]; then
    scontrol requeue "\$SLURM_JOB_ID" && exit 143
fi
echo \$status >$(quoted "$logs")/slurm-\$SLURM_JOB_ID.status
exit \$status
EOS
}

submit() { # WORKDIR FLAGS
    local script job errors
    log_folder "$1"
    script=$logs/job.sbatch
    if [ "$dry_run" ]; then
        quoted mkdir -p "$logs"
        echo "cat >$(quoted "$script") <<'END'"
        job_script "$@"
        echo END
        quoted sbatch --parsable "$script"
        return
    fi
    job_script "$@" >"$script"
    errors=$logs/sbatch.errors
    if ! job=$(sbatch --parsable "$script" 2>"$errors"); then
        echo "error: sbatch refused $script: $(reason "$errors"); sinfo -s lists the partitions, \
sacctmgr show associations the accounts" >&2
        return 1
    fi
    job=${job%%;*} # without the cluster's name
    jobs+=("$job $logs")
    echo "# job $job, log $logs/slurm-$job.log"
}

reason() { # FILE: prints the last error in a file of a command's errors, as one line
    grep -v '^ *$' "$1" | sed -n 's/^[a-z_]*: error: //; $p'
}

await_jobs() { # follows the log of a single job; returns the status of the first that failed
    local entry job logs rc status=0
    if [ ${#jobs[@]} = 1 ]; then
        read -r job logs <<<"${jobs[0]}"
        touch "$logs/slurm-$job.log"
        tail -n +1 -F "$logs/slurm-$job.log" 2>/dev/null &
        follower=$!
    fi
    for entry in "${jobs[@]}"; do
        read -r job logs <<<"$entry"
        await "$job"
        [ -z "$follower" ] || pause "$poll" # for the end of its log
        rc=1
        if [ -e "$logs/slurm-$job.status" ]; then
            rc=$(cat "$logs/slurm-$job.status")
        else
            echo "error: job $job left the queue without an exit status (cancelled, or out of time \
before it could save): see sacct -j $job; the same command goes on from its last checkpoint" >&2
        fi
        [ "$status" != 0 ] || status=$rc
    done
    return "$status"
}

await() { # JOB: waits until it is neither queued nor running; prints changes of its state
    local state before=''
    while :; do
        if state=$(squeue --noheader --jobs="$1" --format=%T 2>&1); then
            [ "$state" ] || return 0
            [ "$state" = "$before" ] || echo "# job $1: $state"
            before=$state
        elif [[ $state == *'Invalid job id'* ]]; then
            return 0
        fi # else the controller does not answer, and the state of the job is unknown
        pause "$poll"
    done
}

cancel() { # STATUS: cancels the submitted jobs, waits until they have ended and exits
    local entry
    trap '' INT TERM
    for entry in "${jobs[@]}"; do
        scancel "${entry%% *}" || true
        echo "# cancelled job ${entry%% *}" >&2
    done
    for entry in "${jobs[@]}"; do await "${entry%% *}" >/dev/null; done
    exit "$1"
}
