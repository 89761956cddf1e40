# Sourced by demo.sh and test.sh: leaves $PYTHON, an interpreter that has requirements.txt.
# An active virtual environment that satisfies requirements.txt is used as it is; otherwise .venv is made here.

requirements_met() {
    "$1" scripts/requirements_met.py 2>/dev/null
}

if [ -n "${VIRTUAL_ENV:-}" ] && requirements_met "$VIRTUAL_ENV/bin/python"; then
    PYTHON="$VIRTUAL_ENV/bin/python"
else
    PYTHON="$PWD/.venv/bin/python"
    if ! [ -x "$PYTHON" ]; then
        base=""
        for candidate in python3.11 python3 python; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
                base=$candidate
                break
            fi
        done
        [ -n "$base" ] || { echo "error: Python 3.11 is needed and not on PATH" >&2; exit 2; }
        echo "making a virtual environment in .venv"
        if ! "$base" -m venv .venv; then
            rm -rf .venv
            echo "error: $base has no working venv module (on Debian and Ubuntu: apt-get install python3.11-venv)" >&2
            exit 2
        fi
    fi
    if ! requirements_met "$PYTHON"; then
        echo "installing requirements.txt into .venv (PyTorch is large; minutes on a first run)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
fi
