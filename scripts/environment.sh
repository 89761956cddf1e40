# Sourced by the scripts beside it: leaves $PYTHON, an interpreter that has requirements.txt.
# An active virtual environment whose Python and PyTorch fit is taken, and gets what else it lacks. Otherwise .venv is
# made here, with the PyTorch that the results were made with (constraints.txt).

fits() {        # INTERPRETER [NAME ...], see requirements_met.py
    "$1" scripts/requirements_met.py "${@:2}" 2>/dev/null
}

if [ -n "${VIRTUAL_ENV:-}" ] && fits "$VIRTUAL_ENV/bin/python" torch; then
    PYTHON="$VIRTUAL_ENV/bin/python"
    constraints=()
else
    PYTHON="$PWD/.venv/bin/python"
    constraints=(-c scripts/constraints.txt)
    if ! [ -x "$PYTHON" ]; then
        base=""
        for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
            if fits "$candidate" python; then
                base=$candidate
                break
            fi
        done
        [ -n "$base" ] || { echo "error: Python 3.11 or later is needed and not on PATH" >&2; exit 2; }
        echo "making a virtual environment in .venv with $base"
        if ! "$base" -m venv .venv; then
            rm -rf .venv
            echo "error: $base has no working venv module (on Debian and Ubuntu: apt-get install python3-venv)" >&2
            exit 2
        fi
    fi
    fits "$PYTHON" python || { echo "error: the Python of .venv is older than 3.11: remove .venv" >&2; exit 2; }
fi
if ! fits "$PYTHON"; then
    echo "installing what requirements.txt lists into ${PYTHON%/bin/python} (PyTorch is large; minutes on a first run)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt ${constraints[@]+"${constraints[@]}"}
fi
