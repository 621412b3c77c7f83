#!/bin/sh
# Create the peers' environment: tools/setup_peers.sh VENV_DIR PEERS_VENV_DIR
# It sees the project's own packages (torch, transformers) and adds the peers beside them.
set -eu
cd "$(dirname "$0")/.."
venv=$1
peers=$2
"$venv/bin/python" -m venv --without-pip "$peers"
site=$("$peers/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])' >"$site/project.pth"
# The peers without what they depend on: their pins of torch and numpy are not ours.
names='nemo-automodel|nvidia-modelopt|specforge|speculators'
grep -E "^($names)=" benchmarks/peers/requirements.txt |
    xargs "$peers/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps
grep -vE "^(#|$names)" benchmarks/peers/requirements.txt |
    xargs "$peers/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt
touch "$peers/.ready"  # a stopped set-up starts again
