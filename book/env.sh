#!/bin/sh
# Make the Python environment: a venv with the packages of constraints.txt and this folder's alr. `make` calls it.
#
# Does nothing when the stamp in the environment is newer than the pins and names this folder, so that a moved or copied
# folder notices. Cut off half-way, the next call goes on.
#
# From the environment: PYTHON (python3), the interpreter to make the venv with; VENV (.venv), where it is, or an
# environment that exists already ($CONDA_PREFIX).
set -eu

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
stamp=$VENV/.alr-installed

stop() {
    printf '\nmake: %s\n' "$1" >&2
    shift
    for line in "$@"; do printf '      %s\n' "$line" >&2; done
    exit 1
}

if [ -x "$VENV/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(pwd -P)" ] &&
    [ ! constraints.txt -nt "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ]; then
    exit 0
fi

new_enough() {                        # $1: an interpreter
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        stop "$1 is Python $("$1" -c 'import platform; print(platform.python_version())'); 3.11 or newer is needed." \
             "Is another one there? make PYTHON=python3.12 book" \
             "With conda: conda env create -f environment.yml, conda activate alr, make VENV=\"\$CONDA_PREFIX\" book"
}

if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
    new_enough "$VENV/bin/python"
else
    "$PYTHON" -c '' 2>/dev/null ||
        stop "no '$PYTHON' that starts. Install Python 3.11 or newer (python.org, your package manager, or conda)," \
             "or name the one you have: make PYTHON=python3.12 book"
    new_enough "$PYTHON"
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
        stop "$PYTHON comes without the venv module. On Debian and Ubuntu: sudo apt install python3-venv" \
             "With conda: conda env create -f environment.yml, conda activate alr, make VENV=\"\$CONDA_PREFIX\" book"
    free=$("$PYTHON" -c 'import shutil; print(shutil.disk_usage(".").free // 2**20)')
    [ "$free" -ge 3000 ] ||
        stop "$free MB are free on this disk; the environment and the book need about 3 GB" \
             "(on Linux about 8 GB when pip takes the CUDA build of torch)."
    if [ -f "$VENV/pyvenv.cfg" ]; then clear=--clear; else clear=; fi       # ours, but broken: make it anew
    echo "Making the environment $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv $clear "$VENV" || stop "$PYTHON -m venv failed; its message is above."
fi

"$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null 2>&1 ||
    stop "$VENV has no pip. Give it one, or leave VENV out and let make build its own .venv."

echo "Installing the pinned packages into $VENV (2 to 10 minutes the first time)"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
if [ -t 1 ]; then quiet=; else quiet=--quiet; fi
"$VENV/bin/python" -m pip install $quiet -c constraints.txt -e ".[train,book,test]" || {
    free=$("$VENV/bin/python" -c 'import shutil; print(shutil.disk_usage(".").free // 2**20)')
    stop "pip could not install the packages of constraints.txt; its own message is above." \
         "A package index has to be in reach, and disk: $free MB are free here, about 3 GB are needed" \
         "(on Linux about 8 GB with CUDA; without it, put PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" \
         "into the environment first)." \
         "Then run the same command again; what was installed is kept."
}
pwd -P >"$stamp"
