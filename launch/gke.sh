# TPU slices of a GKE cluster, as JobSets. Sourced by launch.sh.
# shellcheck shell=bash disable=SC2034,SC2154

help_gke() {
    cat <<'EOS'
usage: bash launch.sh gke --topology AxBxC --image IMAGE [OPTIONS] EXPERIMENT [FLAGS]
Applies a JobSet with one pod per TPU host and shows the output of the first one; --dry-run prints
the manifest. When a pod fails or is preempted, all pods restart from the last checkpoint, except
after a user error (status 2) or a non-finite loss (3). Ctrl-C deletes the JobSet; its pods save.
  --topology AxBxC     chips of the slice: 4x4x8, or 4x8 for accelerators of two dimensions
  --image IMAGE        Python 3.11 or newer and, in its working directory, this repository, with
                       pip install --constraint constraints.txt ".[tpu,remote]"
  --accelerator NAME   tpu-v4-podslice (default of three dimensions), tpu-v5p-slice, tpu7x,
                       tpu-v5-lite-podslice (default of two dimensions), tpu-v6e-slice
  --chips-per-host N   chips of a host (4, or all of 1x1 and 2x4)
  --spot               use spot nodes
  --name NAME          name of the JobSet (that of the experiment)
  --namespace NAME, --service-account NAME   (those of the cluster)
  --max-restarts N     restarts after failures and preemptions (100)
  --grace SECONDS      time for pods to save (120)
  --detach             apply without following the output
  --logs, --stop       only show the output of the first pod; only delete the JobSet (no EXPERIMENT)
  --workdir ADDRESS    folder of the run: gs://...
  --sweep KEY=A,B ..., --select, --dry-run   see: bash launch.sh. A sweep's JobSets are NAME-1 ...
EOS
}

launch_gke() {
    local status=0
    topology='' image='' accelerator='' chips_per_host='' spot='' namespace='' service_account=''
    max_restarts=100 grace=120 detach='' logs='' stop='' follower='' codes=() jobsets=() number=0
    options 'topology image accelerator chips-per-host name namespace service-account max-restarts
        grace' 'spot detach logs stop' "$@"
    [ "$dry_run" ] || command -v kubectl >/dev/null ||
        fail 'kubectl is not installed; run gcloud components install kubectl'
    [ "$name" ] || [ "$experiment" ] || fail 'no --name given; write --name=JOBSET'
    [ "$name" ] || name=$(basename "${experiment%%:*}" .py)
    name=$(tr 'A-Z_.' 'a-z--' <<<"$name")
    [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
        fail "--name is $(quoted "$name"), not a letter and up to 39 letters, digits and -"
    name_of namespace "$namespace" '[a-z0-9]([a-z0-9-]*[a-z0-9])?'
    name_of service-account "$service_account" '[a-z0-9]([a-z0-9.-]*[a-z0-9])?'
    name_of image "$image" '[A-Za-z0-9][A-Za-z0-9_./:@-]*'
    scratch=$(mktemp -d)
    trap 'kill $child $follower 2>/dev/null || true; rm -rf "$scratch"' EXIT
    jobsets=("$name")
    if [ "$stop" ]; then
        delete
        exit
    elif [ "$logs" ]; then
        await_jobsets || status=$?
        exit "$status"
    fi
    [ "$topology" ] || fail 'no --topology given; write --topology=4x4x8, for example'
    [ "$image" ] || fail 'no --image given; name a container image with this repository, see --help'
    count max-restarts "$max_restarts"
    count grace "$grace"
    shared_workdir
    count_hosts
    [ ! "$several" ] || setup remote
    worker_python=python
    trap 'abandon 130' INT
    trap 'abandon 143' TERM
    waves all_gke || status=$?
    exit "$status"
}

all_gke() { # applies all JobSets and waits for them
    local status=0
    jobsets=() number=0
    each apply || status=$?
    if [ "$status" != 0 ]; then
        [ ${#jobsets[@]} = 0 ] || delete
    elif [ ! "$detach$dry_run" ]; then
        await_jobsets || status=$?
    fi
    return "$status"
}

# Source of the slices and machine types:
# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
count_hosts() { # sets accelerator, chips_per_host and hosts; fails if no node pool can be so
    local chips known='1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16'
    [[ $topology =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] ||
        fail "--topology is $(quoted "$topology"); write it as 4x4x8 or 4x8"
    chips=$((${topology//x/*}))
    case $topology in
    *x*x*) accelerator=${accelerator:-tpu-v4-podslice} ;;
    *) accelerator=${accelerator:-tpu-v5-lite-podslice} ;;
    esac
    case $accelerator in
    tpu-v4-podslice | tpu-v5p-slice | tpu7x)
        known='2x2x1, 2x2x2, 2x2x4, 2x4x4, or three multiples of 4 in ascending order'
        [[ " $known" == *" $topology,"* ]] || ascending_fours
        ;;
    tpu-v5-lite-podslice | tpu-v6e-slice) [[ " $known," == *" $topology,"* ]] ;;
    *) fail "unknown --accelerator $(quoted "$accelerator"); see: bash launch.sh gke --help" ;;
    esac || fail "$accelerator has no topology $topology; it has $known"
    case $topology in
    1x1) chips_per_host=${chips_per_host:-1} ;;
    2x4) chips_per_host=${chips_per_host:-8} ;;
    esac
    chips_per_host=${chips_per_host:-4}
    count chips-per-host "$chips_per_host"
    hosts=$((chips / chips_per_host))
    [ $((hosts * chips_per_host)) = "$chips" ] ||
        fail "--chips-per-host $chips_per_host does not divide the $chips chips of $topology"
}

ascending_fours() {
    local size before=4
    for size in ${topology//x/ }; do
        [ $((size % 4)) = 0 ] && [ "$size" -ge "$before" ] || return 1
        before=$size
    done
    [[ $topology == *x*x* ]]
}

# GKE sets TPU_WORKER_ID and TPU_WORKER_HOSTNAMES in each pod, which jax.distributed reads. A JobSet
# is one slice: the annotation keeps other jobs out of its node pool. The rules (JobSet 0.6) end it
# if a pod exits with status 2 or 3; after any other failure all pods restart.
manifest() { # NAME SECRET
    cat <<EOS
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $1
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: hosts
    replicas: 1
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {operator: In, values: [2, 3]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $grace
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
EOS
    [ -z "$spot" ] || cat <<'EOS'
              cloud.google.com/gke-spot: "true"
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
EOS
    [ -z "$service_account" ] || echo "            serviceAccountName: $service_account"
    cat <<EOS
            containers:
            - name: vit-jax
              image: $(text "$image")
              command:
$(for word in "${words[@]}"; do printf '%s\n' "              - $(text "$word")"; done)
              env:
              - {name: VIT_JAX_JOB_SECRET, value: "$2"}
              ports:
              - containerPort: 8482
              resources:
                limits:
                  google.com/tpu: $chips_per_host
EOS
}

text() { # WORD: prints it as a YAML string for Kubernetes
    local word=${1//\\/\\\\}
    word=${word//\"/\\\"}
    printf '%s\n' "\"${word//\$/\$\$}\"" # Kubernetes expands $(NAME), and $$ to $
}

kube() { # ARGUMENTS: runs kubectl, with its output in $scratch/out and errors in $scratch/err
    kubectl ${namespace:+"--namespace=$namespace"} "$@" >"$scratch/out" 2>"$scratch/err" &
    child=$!
    wait "$child"
}

apply() { # WORKDIR FLAGS
    local jobset=$name secret
    training "$@"
    number=$((number + 1))
    [ ! "$several" ] || [ "$stage" = best ] || jobset=$name-$number
    if [ "$dry_run" ]; then
        echo "$(quoted kubectl ${namespace:+"--namespace=$namespace"} apply -f -) <<'END'"
        manifest "$jobset" "$(secret)"
        echo END
        return
    fi
    # A JobSet that has ended can't restart, so one of this name is deleted.
    kube get jobset "$jobset" --ignore-not-found '--output=jsonpath={.status.terminalState}' ||
        { explain "cannot query JobSet $jobset" && return 1; }
    if [ -s "$scratch/out" ]; then
        kube delete jobset "$jobset" --wait ||
            { explain "cannot delete JobSet $jobset" && return 1; }
    fi
    # A running JobSet keeps its secret, as changes of its manifest are rejected.
    secret='{..env[?(@.name=="VIT_JAX_JOB_SECRET")].value}'
    kube get jobset "$jobset" --ignore-not-found "--output=jsonpath=$secret" || true
    secret=$(cat "$scratch/out")
    manifest "$jobset" "${secret:-$(secret)}" >"$scratch/manifest"
    kube apply -f "$scratch/manifest" || { explain "cannot apply JobSet $jobset" && return 1; }
    jobsets+=("$jobset")
    echo "# JobSet $jobset: $hosts pods of $chips_per_host chips"
}

await_jobsets() { # shows the log of a single JobSet's first pod; returns the first nonzero status
    local jobset rc status=0
    for jobset in "${jobsets[@]}"; do
        rc=0
        await_jobset "$jobset" || rc=$?
        [ "$status" != 0 ] || status=$rc
    done
    return "$status"
}

await_jobset() { # NAME
    local pod phase output end='' said='' shown=''
    local first="jobset.sigs.k8s.io/jobset-name=$1,batch.kubernetes.io/job-completion-index=0"
    while [ ! "$end" ]; do
        if kube get jobset "$1" '--output=jsonpath={.status.terminalState}'; then
            end=$(cat "$scratch/out")
        elif grep -q NotFound "$scratch/err"; then
            die "no JobSet $1; kubectl get jobsets lists them"
        fi # else the cluster does not answer, and the state of the JobSet is unknown
        if kube get pods "--selector=$first" --sort-by=.metadata.creationTimestamp \
            '--output=jsonpath={range .items[*]}{.metadata.name} {.status.phase}{"\n"}{end}'; then
            read -r pod phase < <(tail -n 1 "$scratch/out") || pod=$1 phase='no pod yet'
            [ "$phase" = "$said" ] || echo "# $pod: $phase"
            said=$phase
            if [ ${#jobsets[@]} = 1 ]; then show "$pod" "$phase"; fi
        fi
        [ "$end" ] || pause "$poll"
    done
    [ -z "$follower" ] || wait "$follower" || true
    [[ $end != Complete* ]] || return 0
    output='.items[*].status.containerStatuses[0].state.terminated.exitCode'
    kube get pods "--selector=${first%,*}" "--output=jsonpath={$output}" || true
    read -r -a codes < <(tr ' ' '\n' <"$scratch/out" | grep -vx 0 | sort -n | tr '\n' ' ') || true
    echo "error: JobSet $1: $end; exit statuses of its pods: $(cat "$scratch/out")" >&2
    return "${codes[0]:-1}"
}

show() { # POD PHASE: follows its log in the background, resuming after a lost connection
    local from=()
    if [ "$1" = "$shown" ]; then
        [ "$2" = Running ] && ! kill -0 "$follower" 2>/dev/null || return 0
        from=("--since=${poll}s")
    fi
    case $2 in Running | Succeeded | Failed) ;; *) return 0 ;; esac
    shown=$1
    kubectl ${namespace:+"--namespace=$namespace"} logs --follow "${from[@]}" "$1" &
    follower=$!
}

delete() {
    local jobset
    for jobset in "${jobsets[@]}"; do
        if kube delete jobset "$jobset" --ignore-not-found --wait; then
            echo "# deleted JobSet $jobset" >&2
        else
            explain "cannot delete JobSet $jobset; try: kubectl delete jobset $jobset"
        fi
    done
}

abandon() { # STATUS: on a signal; a second signal exits without waiting
    trap 'exit 130' INT TERM
    kill "$child" 2>/dev/null || true
    delete
    exit "$1"
}

explain() { # WHAT FAILED: prints it with kubectl's reason and a hint, in one line
    local hint
    case $(cat "$scratch/err") in
    *'no matches for kind'* | *'resource type "jobset"'*)
        hint='; JobSet is not installed in this cluster: kubectl apply --server-side -f '
        hint+='https://github.com/kubernetes-sigs/jobset/releases/latest/download/manifests.yaml' ;;
    *refused* | *'current-context'* | *'nable to connect'*)
        hint='; log in: gcloud container clusters get-credentials CLUSTER --location=ZONE' ;;
    *orbidden*) hint='; ask for permission in this --namespace, or name another' ;;
    *immutable*) hint='; one of this name runs with other settings: --stop it, or name another' ;;
    *) hint='' ;;
    esac
    echo "error: $1: $(tr '\n' ' ' <"$scratch/err")$hint" >&2
}
