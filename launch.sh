#!/usr/bin/env bash
# Set-up and launch. Without arguments: the commands.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    cat <<'EOF'
usage: bash launch.sh COMMAND
  test [PYTEST ARGS]   make .venv if need be, install the test extra, check style, run the tests
EOF
}

setup() { # EXTRA: a .venv with the package and the versions that the tests passed with
    [ -x .venv/bin/python ] || python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".[$1]"
}

case "${1:-}" in
test)
    shift
    setup test
    .venv/bin/ruff check .
    .venv/bin/python -m pytest "$@"
    ;;
*)
    usage
    [ -z "${1:-}" ] || exit 2
    ;;
esac
