#!/bin/sh
# Create the environment of `make test-readers`: tools/setup_readers.sh VENV_DIR MAIN_VENV_DIR
# A layer on the main environment (a .pth file), so that PyTorch is not installed twice.
set -eu
cd "$(dirname "$0")/.."
venv=$1
main=$(cd "$2" && pwd)
wheels=$venv/wheels
pip="$venv/bin/python -m pip --disable-pip-version-check"

pinned() { grep -E "^$1==" constraints-readers.txt; }

echo "[setup] creating $venv"
"$main/bin/python" -m venv --clear "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$main/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/main.pth"

echo "[setup] installing speculators and SpecForge, without their dependencies"
for name in speculators specforge loguru pydantic-settings python-dotenv; do
    $pip install --quiet --no-deps "$(pinned "$name")"
done
for name in vllm sglang; do
    echo "[setup] unpacking the Python files of $(pinned "$name") (a wheel of up to 340 MB)"
    mkdir -p "$wheels/$name"
    $pip download --quiet --no-deps -d "$wheels" "$(pinned "$name")"
    "$venv/bin/python" - "$wheels" "$name" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

wheels, name = Path(sys.argv[1]), sys.argv[2]
for wheel in wheels.glob(f"{name}-*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        members = [n for n in archive.namelist() if n.startswith(f"{name}/") and n.endswith(".py")]
        archive.extractall(wheels / name, members)
    wheel.unlink()
PYTHON
done
echo "[setup] $venv is ready"
