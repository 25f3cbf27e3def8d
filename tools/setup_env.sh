#!/bin/sh
# Make .venv with the pinned requirements. Idempotent: does nothing when the requirements have not changed.
# Usage: tools/setup_env.sh [cpu|gpu]
set -eu
cd "$(dirname "$0")/.."
kind=${1:-cpu}
venv=.venv

find_python() {
    # PATH first (a pyenv shim may be there and not work), then pyenv's versions, then uv's own search.
    for candidate in python3.12 python3 python "$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")"/versions/3.12*/bin/python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    if command -v uv >/dev/null 2>&1; then
        uv python find 3.12 2>/dev/null || { uv python install -q 3.12 && uv python find 3.12; }
        return
    fi
    return 1
}

wanted=$(cat requirements.txt pyproject.toml tools/setup_env.sh tools/requirements.py | cksum)-$kind
if [ -f "$venv/.installed" ] && [ "$(cat "$venv/.installed")" = "$wanted" ]; then
    exit 0
fi
rm -f "$venv/.installed"

if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then
    python=$(find_python) && [ -n "$python" ] || {
        echo "error: no Python 3.12: tried python3.12, python3, python, pyenv's versions and uv; install Python 3.12 (or uv) and run this again" >&2
        exit 1
    }
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
[ -x "$venv/bin/uv" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.9'
"$venv/bin/python" tools/requirements.py "$kind" "$venv/requirements.txt" "$venv/overrides.txt"
echo "setup: installing the $kind requirements into $venv (several GB the first time)"
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --override "$venv/overrides.txt" -r "$venv/requirements.txt"
echo "$wanted" >"$venv/.installed"
