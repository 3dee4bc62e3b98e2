#!/usr/bin/env bash
# Set-up and launch. Without arguments, lists the commands; COMMAND --help shows its options.
# shellcheck disable=SC2034  # launch/*.sh use variables that are set here
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<'EOS'
usage: bash launch.sh COMMAND
  quickstart [FLAGS]   make .venv, install, train a ViT on real handwritten digits, show the result;
                       FLAGS are those of vit_jax.main
  test [PYTEST ARGS]   make .venv if need be, install the test extra, check style, run the tests;
                       with -m slow the longer ones
  docs                 make .venv if need be, build the site of docs/ in build/site
  setup EXTRAS         make .venv with the versions of constraints.txt; EXTRAS: tpu,remote, say
  local EXPERIMENT     train on this machine, with all its devices
  hosts EXPERIMENT     several processes on this machine, with simulated devices
  slurm EXPERIMENT     a batch job, one process a GPU
  tpu EXPERIMENT       every worker of a Cloud TPU: set up, start, follow, resume when preempted
  gke EXPERIMENT       a JobSet on a TPU slice of a Kubernetes cluster

bash launch.sh COMMAND --help says what each of the last five takes. All of them take
  [OPTIONS] EXPERIMENT [FLAGS OF vit_jax.main]
  --workdir DIR        folder of the run; runs/NAME unless given
  --sweep KEY=A,B ...  one run for each combination, in a folder of its own below the workdir, and a
                       table of them; takes all words like KEY=VALUES. Finished runs are skipped
  --select             choose settings as the experiment's section `select` says: a run for each
                       point of its grid (or of --sweep), in WORKDIR/select, then the final run with
                       the settings of the best. The same command goes on where it was stopped
  --dry-run            print the commands, ready to paste, and run nothing
  --                   all that follows goes to vit_jax.main
$VIT_JAX_PYTHON names a Python that has vit_jax; then nothing is installed here.
Exit status: that of the run (0 done, 2 user error, 3 non-finite loss, 129, 130, 143 stopped and
saved); 1 if SLURM, gcloud or kubectl fails.
EOS
}

fail() { # MESSAGE: exits after a mistake of the user
    echo "error: $1" >&2
    exit 2
}

die() { # MESSAGE: exits after a failure of a program that was called
    echo "error: $1" >&2
    exit 1
}

quoted() { # WORDS: prints a line that a shell splits into these words
    local word line=''
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

plain() { # WORDS: fails at control characters, which could add a line to a script or manifest
    local word
    for word in "$@"; do
        case $word in # YAML also breaks lines at U+0085, U+2028 and U+2029; U+FEFF is refused, too
        *[[:cntrl:]]* | *$'\xc2\x85'* | *$'\xe2\x80\xa8'* | *$'\xe2\x80\xa9'* | *$'\xef\xbb\xbf'*)
            fail "remove the control character from $(LC_ALL=C printf %q "$word")" ;;
        esac
    done
}

name_of() { # OPTION VALUE REGEX: fails unless the value is empty or matches
    [[ -z $2 || $2 =~ ^$3$ ]] || fail "--$1 is $(LC_ALL=C printf %q "$2"), not of the form $3"
}

secret() { # prints a new secret for the processes of a job, see vit_jax/distributed/connection.py
    head -c 16 /dev/urandom | od -An -v -tx1 | tr -d ' \n'
}

run() { # COMMAND: runs it, or prints it with --dry-run
    if [ "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

setup() { # EXTRAS: installs the package for $python, with the versions that the tests passed with
    python=${VIT_JAX_PYTHON:-.venv/bin/python}
    if [ "${VIT_JAX_PYTHON:-}" ]; then
        command -v "$python" >/dev/null || fail "VIT_JAX_PYTHON is $python, not a program; unset it"
        return
    fi
    local base key extra extras known=.venv/installed missing=$dry_run headers=
    IFS=, read -r -a extras <<<"$1"
    if [ ! -x "$python" ]; then
        for base in python3 python3.11 python3.12 python3.13 python3.14 ''; do
            "${base:-false}" 2>/dev/null -c 'import sys; sys.exit(sys.version_info < (3, 11))' &&
                break
        done
        [ "$base" ] || fail "no Python 3.11 or newer, python3 is $(python3 -V 2>&1); install one"
        [ "$dry_run" ] || echo 'Making .venv and installing the package (minutes the first time)'
        run "$base" -m venv .venv
    fi
    [ ! -e /usr/include/jpeglib.h ] || headers=1
    # Skips pip if all is installed, as it takes seconds and a network.
    key="$(cat constraints.txt setup.cfg setup.py vit_jax/data/*.c | cksum) $headers"
    for extra in "${extras[@]}"; do grep -qsxF "$key $extra" "$known" || missing=1; done
    if [ "$missing" ]; then
        run "$python" -m pip install --quiet --disable-pip-version-check \
            --constraint constraints.txt --editable ".[$1]"
        [ "$dry_run" ] || {
            { grep -sF "$key " "$known" || true; printf "$key %s\n" "${extras[@]}"; } >"$known.new"
            mv "$known.new" "$known"
        }
    fi
}

parse() { # "VALUED OPTIONS" "SWITCHES" ARGUMENTS: sets a variable for each, and those below
    local valued=" workdir ${1//[[:space:]]/ } " switches=" dry-run help select $2 "
    local arg option value
    shift 2
    while [ $# -gt 0 ]; do
        arg=$1 option=${1%%=*} option=${option#--}
        shift
        [ "$arg" != -h ] || [ "$experiment" ] || arg=--help option=help
        if [ "$arg" = -- ]; then
            flags+=("$@")
            break
        elif [ "$arg" = --sweep ]; then
            [[ ${1:-} =~ $combination ]] || fail '--sweep has no value; write --sweep KEY=A,B'
            while [[ ${1:-} =~ $combination ]]; do sweep+=("$1") && shift; done
        elif [[ $arg == --* && $switches == *" $option "* ]]; then
            [ "$arg" = "--$option" ] || fail "--$option takes no value"
            printf -v "${option//-/_}" true
        elif [[ $arg == --* && $valued == *" $option "* ]]; then
            if [ "$arg" = "--$option" ] && [ $# -gt 0 ] && [[ $1 != --* ]]; then
                value=$1
                shift
            else
                value=${arg#"--$option"} value=${value#=}
            fi
            [ "$value" ] || fail "--$option has no value; write --$option=VALUE"
            printf -v "${option//-/_}" %s "$value"
        elif [[ $arg == -* && ! $experiment ]]; then
            [[ $passed_on && $arg == --*=* ]] ||
                fail "unknown option $arg of $command; see: bash launch.sh $command --help"
            others+=("$arg")
        elif [ ! "$experiment" ]; then
            experiment=$arg
        else
            [[ $arg == -* || ${flags[*]: -1} =~ ^-[^=]*$ ]] || fail "unexpected argument $arg"
            flags+=("$arg")
        fi
    done
}

options() { # arguments of parse: parses, then checks what all commands need
    local file
    plain "${@:3}" "${VIT_JAX_PYTHON:-}"
    parse "$@"
    if [ "$help" ]; then
        "help_$command"
        exit
    fi
    file=${experiment%%:*}
    [ "$experiment" ] || [ "${stop:-}${logs:-}" ] ||
        fail "no EXPERIMENT given; see: bash launch.sh $command --help"
    [ ! "$experiment" ] || [ -f "$file" ] ||
        fail "no experiment file $file; there are $(echo experiments/*.py)"
    workdir=${workdir:-runs/$(basename "$file" .py)$([ "$select" ] || echo "${sweep:+.sweep}")}
    [[ $workdir != -* ]] || workdir=./$workdir
    workdir=${workdir%/} given=$experiment several=$select${sweep:+true}
}

count() { # OPTION VALUE: fails unless the value is a whole number above 0
    [[ $2 =~ ^[1-9][0-9]{0,6}$ ]] ||
        fail "--$1 is '$2', not a whole number from 1 to 9999999"
}

shared_workdir() { # fails unless all hosts can see the workdir, as if there are several or new ones
    [[ $workdir == *://* || $workdir == /* ]] ||
        fail "--workdir is $workdir, which other hosts do not see; give gs://BUCKET/FOLDER or the \
absolute path of a folder that all hosts share"
}

training() { # WORKDIR FLAGS: sets words, the command for training
    words=("${worker_python:-$python}" -m vit_jax.main --config "$experiment" --workdir "$@")
}

log_folder() { # WORKDIR: sets logs, a folder on this machine
    logs=$1/logs
    [[ $1 != *://* ]] || logs=runs/${1##*/}/logs
    [ "$dry_run" ] || mkdir -p "$logs"
}

each() { # FUNCTION: calls it with workdir and flags for every unfinished run of a sweep
    local plan line row rc status=0 settings=() flag
    started=0
    if [ ! "$several" ]; then
        "$1" "$workdir" "${flags[@]}"
        return
    fi
    for flag in "${flags[@]}"; do [[ $flag != *-config.* ]] || settings+=("$flag"); done
    table=("$python" -m vit_jax.sweep ${select:+"$stage"} --config "$given" --workdir "$workdir"
        "${settings[@]}" "${sweep[@]}")
    command -v "$python" >/dev/null ||
        fail "no $python, which --sweep and --select need; run bash launch.sh setup digits,figures"
    plan=$("${table[@]}" --plan) || exit $?
    while IFS= read -r line <&3; do
        IFS=$'\t' read -r -a row <<<"$line"
        if [ "${row[0]}" = finished ] || [[ $select && ${row[0]} == *', not finite' ]]; then
            echo "# ${row[1]}: ${row[0]}"
            continue
        fi
        [ "$dry_run" ] || echo "# ${row[1]}"
        rc=0 started=$((started + 1)) experiment=${row[2]}
        "$1" "${row[1]}" "${flags[@]}" "${row[@]:3}" || rc=$?
        [ "$status" != 0 ] || status=$rc
        case $rc in 129 | 130 | 143) break ;; esac
        [ ! "$stopped" ] || break # any other failure is one row of the table
    done 3<<<"$plan"
    return "$status"
}

waves() { # FUNCTION: calls it to run what `each` lists; with --select again for the final run
    local status=0
    "$1" || status=$?
    if [ ! "$select" ]; then
        [ "${detach:-}" ] && [ "$several" ] && echo "# the table: $(quoted "${table[@]}")"
        [ "${detach:-}" ] || show_table
        return "$status"
    fi
    if [ "$dry_run" ]; then
        table[3]=best
        echo '# then, with the settings of the best, the final run:'
        quoted "${table[@]}" --plan
        return "$status"
    fi
    if [ "${detach:-}" ] && [ "$started" != 0 ]; then
        echo '# when these have ended, the same command chooses the best and starts the final run'
        return "$status"
    fi
    if [ "$status" != 0 ] && [ "$status" != 3 ]; then # 3: a run diverged, which is not chosen
        show_table || true
        return "$status"
    fi
    stage=best status=0
    "$1" || status=$?
    [ "${detach:-}" ] || [ "$status" != 0 ] || show_table # adds the choice to the result
    return "$status"
}

show_table() {
    [ ! "$several" ] || run "${table[@]}"
}

pause() { # SECONDS: sleeps; signals are handled at once
    sleep "$1" &
    child=$!
    wait "$child" || true
}

command=${1:-}
shift || true
experiment='' workdir='' name='' dry_run='' help='' flags=() sweep=() others=()
select='' stage=select several='' given='' started=0
passed_on='' stopped='' child='' worker_python=''
combination='^[A-Za-z_][A-Za-z0-9_.]*='
poll=${VIT_JAX_POLL:-10} # seconds between two queries of a remote run's state

case $command,${1:-} in
quickstart,--help | quickstart,-h | test,--help | test,-h | docs,--help | docs,-h | \
    setup,--help | setup,-h)
    usage
    exit
    ;;
esac
case $command in
quickstart)
    setup digits,figures
    "$python" -m vit_jax.main --config experiments/digits.py --workdir runs/digits "$@"
    "$python" -m vit_jax.figures runs/digits
    ;;
test)
    setup test
    "$python" -m ruff check .
    "$python" -m pytest "$@"
    ;;
docs)
    setup docs
    NO_MKDOCS_2_WARNING=1 "$python" -m mkdocs build --strict
    ;;
setup)
    known=$(sed -n '/extras_require/,/^\[/s/^\([a-z]*\) *=.*/\1/p' setup.cfg | tr '\n' ' ')
    [ $# = 1 ] || fail "give EXTRAS, separated by commas; there are: $known"
    for extra in ${1//,/ }; do
        [[ " $known" == *" $extra "* ]] ||
            fail "unknown extra $(LC_ALL=C printf %q "$extra"); there are: $known"
    done
    setup "$1"
    ;;
local | hosts | slurm | tpu | gke)
    # shellcheck source=/dev/null
    source launch/here.sh && { [ ! -e "launch/$command.sh" ] || source "launch/$command.sh"; }
    "launch_$command" "$@"
    ;;
'' | help | -h | --help) usage ;;
*) fail "unknown command $(LC_ALL=C printf %q "$command"); bash launch.sh lists them" ;;
esac
