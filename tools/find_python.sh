#!/bin/sh
# Print the path of a Python that can hold the environment, or say what to install.
# PYTHON=/path/to/python, when set, is the only one considered.
set -u

# megatron-core 0.19.2 has wheels for CPython 3.12 and 3.13 only; on anything else pip falls back
# to a source build or to a release without the trainer. 3.12 comes first: it is the tested one.
probe='
import sys
version = "%d.%d.%d" % sys.version_info[:3]
if not (3, 12) <= sys.version_info[:2] <= (3, 13):
    sys.exit("it is Python " + version)
import sysconfig
if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("it is not the standard CPython build")
missing = []
for name in ("ctypes", "ensurepip", "ssl", "venv", "zlib"):
    try:
        __import__(name)
    except ImportError:
        missing.append(name)
if missing:
    sys.exit("Python " + version + " lacks the modules " + ", ".join(missing))
print(sys.executable)
'

rejected=""

accept() {
    command -v "$1" >/dev/null 2>&1 || return 1
    # A pyenv shim can exist for a version that is not active, so a candidate has to run.
    if answer=$("$1" -c "$probe" 2>&1 </dev/null); then
        printf '%s\n' "$answer"
        exit 0
    fi
    rejected="$rejected
  $1: $(printf '%s\n' "$answer" | head -n 1)"
    return 1
}

fail() {
    {
        printf 'error: %s\n' "$1"
        [ -z "$rejected" ] || printf 'Found, but not usable:%s\n' "$rejected"
        cat <<'TEXT'
Install Python 3.12 (or 3.13) in one of these ways, then run the same command again:
  Ubuntu 24.04      sudo apt install python3.12 python3.12-venv
  Debian 13         sudo apt install python3.13 python3.13-venv
  macOS             brew install python@3.12
  pyenv             pyenv install 3.12
  uv                uv python install 3.12
or name one yourself: make setup PYTHON=/path/to/python3.12
TEXT
    } >&2
    exit 1
}

if [ -n "${PYTHON:-}" ]; then
    accept "$PYTHON"
    fail "PYTHON=$PYTHON is not a usable Python 3.12 or 3.13"
fi

for name in python3.12 python3.13 python3 python; do
    accept "$name"
done
for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[23].*/bin/python; do
    accept "$path"
done
if command -v uv >/dev/null 2>&1; then
    found=$(uv python find '>=3.12,<3.14' 2>/dev/null) && accept "$found"
fi
fail "no usable Python 3.12 or 3.13 was found"
