#!/usr/bin/env bash
# Set-up and launch. Without arguments: the commands.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<'EOS'
usage: bash launch.sh COMMAND
  quickstart           make .venv, install, train a ViT on real handwritten digits, show the result
  test [PYTEST ARGS]   make .venv if need be, install the test extra, check style, run the tests;
                       with -m slow those that take a minute or more
  local FILE [FLAGS]   train experiment FILE on this machine; its workdir is runs/NAME unless given
EOS
}

setup() { # EXTRAS: a .venv with the package and the versions that the tests passed with
    if [ ! -x .venv/bin/python ]; then
        if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: vit_jax needs Python 3.11 or newer, python3 is $(python3 -V 2>&1)" >&2
            exit 2
        fi
        echo 'Making .venv and installing the package (a few minutes the first time)'
        python3 -m venv .venv
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".[$1]"
}

case "${1:-}" in
quickstart)
    shift
    setup digits,figures
    .venv/bin/python -m vit_jax.main --config experiments/digits.py --workdir runs/digits "$@"
    .venv/bin/python -m vit_jax.figures runs/digits
    ;;
test)
    shift
    setup test
    .venv/bin/ruff check .
    .venv/bin/python -m pytest "$@"
    ;;
local)
    experiment=${2:?usage: bash launch.sh local FILE [FLAGS]}
    shift 2
    setup digits,figures
    name=$(basename "${experiment%%:*}" .py)
    .venv/bin/python -m vit_jax.main --config "$experiment" --workdir "runs/$name" "$@"
    ;;
*)
    usage
    [ -z "${1:-}" ] || exit 2
    ;;
esac
