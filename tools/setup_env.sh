#!/bin/sh
# Create or update the private environment: tools/setup_env.sh VENV_DIR
set -eu
cd "$(dirname "$0")/.."
venv=$1
python=$venv/bin/python
log=$venv/setup.log
started=$(date +%s)

say() { printf '[setup %3d s] %s\n' "$(($(date +%s) - started))" "$1"; }

# pip's latest step, without folders and warnings, and the growing size of the environment.
progress() {
    step=$(grep -E '^ *(Collecting|Downloading|Processing|Building|Installing) ' "$log" |
        tail -n 1 | sed -e 's/^ *//' -e 's|/.*/||' -e 's/(from .*//' | cut -c 1-60)
    say "$(du -sm "$venv" | cut -f 1) MB; $step"
}

usable() { "$python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

if ! usable; then
    base=$(sh tools/find_python.sh)
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        echo "error: VENV=$venv exists and is not a Python environment" >&2
        exit 1
    fi
    say "creating $venv with $base"
    "$base" -m venv --clear "$venv"
fi

say "installing the pinned packages (about 5 GB on Linux, most of it PyTorch with CUDA)"
# In the background, so that this shell can show that something is happening. --no-compile: most of
# the 11,000 files are never imported, and the rest are compiled when they are.
"$python" -m pip install --disable-pip-version-check --no-input --progress-bar off --no-compile \
    -c constraints.txt -e '.[quickstart,dev]' >"$log" 2>&1 </dev/null &
pip=$!
trap 'kill "$pip" 2>/dev/null; exit 130' INT TERM
ticks=0
while kill -0 "$pip" 2>/dev/null; do
    sleep 1
    ticks=$((ticks + 1))
    [ $((ticks % 10)) -ne 0 ] || progress
done

if ! wait "$pip" || ! "$python" -c 'import torch, megatron.core' >>"$log" 2>&1 </dev/null; then
    tail -n 25 "$log" >&2
    echo "error: the packages could not be installed; the whole log is in $log" >&2
    exit 1
fi
# Python files alone, for tests on a CPU. Beside the packages, not among them: Megatron would take
# them for an installation, whose kernels are missing.
engine=$(grep -E '^transformer-engine==' constraints.txt)
"$python" -m pip install --disable-pip-version-check --no-input --quiet --no-deps --no-compile \
    --upgrade --target "$venv/transformer-engine" "$engine" >>"$log" 2>&1 ||
    say "$engine is not there: its tests will be skipped"
say "$venv is ready: $("$python" --version), $(grep -E '^(torch|megatron-core)==' constraints.txt |
    tr '\n' ' ')"
