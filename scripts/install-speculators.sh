#!/usr/bin/env bash
# speculators in an environment of its own, for benchmarks/training_throughput.py. torch comes first and pinned: left to
# itself, pip takes a newer one with the CUDA libraries. torchvision and torchaudio are left out: training does not import them.
set -euo pipefail

environment=${1:-.venv-speculators}
version=0.9.0
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT

"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/pip" download --quiet --no-deps --dest "$downloads" "speculators==$version"
"$environment/bin/python" - "$downloads"/speculators-*.whl > "$downloads/requirements.txt" <<'PYTHON'
import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    header = wheel.read(name).decode().split("\n\n")[0]
for line in header.splitlines():
    requirement = line.removeprefix("Requires-Dist:").strip()
    if requirement != line and "extra ==" not in requirement:
        if re.match(r"[\w.-]+", requirement)[0].lower() not in ("torch", "torchvision", "torchaudio"):
            print(requirement)
print("torch==2.13.0\ntransformers==5.19.0")
PYTHON
"$environment/bin/pip" install --quiet --requirement "$downloads/requirements.txt"
"$environment/bin/pip" install --quiet --no-deps "$downloads"/speculators-*.whl
"$environment/bin/python" -c 'import speculators; print("speculators is ready")'
