#!/bin/sh
# Builds llama-bench, llama-quantize and llama-imatrix for this very machine.
#
#   benchmarks/peers/build_llamacpp.sh FOLDER
#
# The source is the llama.cpp tree inside the llama-cpp-python sdist: a fixed, checksummed version
# that pip can fetch. A native build is the strongest form of the peer: the prebuilt wheels choose a
# baseline instruction set. The binaries land in FOLDER/bin, with their version in FOLDER/version.txt.
# PYTHON (default python3) and JOBS (default: all cores) may be set.
set -eu

version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
folder=${1:?usage: build_llamacpp.sh FOLDER}
python=${PYTHON:-python3}
jobs=${JOBS:-$(nproc)}

mkdir -p "$folder/sdist"
folder=$(cd "$folder" && pwd)
sdist="$folder/sdist/llama_cpp_python-$version.tar.gz"
source="$folder/sdist/llama_cpp_python-$version/vendor/llama.cpp"

[ -f "$sdist" ] || "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python \
    --dest "$folder/sdist" "llama-cpp-python==$version"
echo "$sha256  $sdist" | sha256sum --check --quiet
[ -d "$source" ] || tar -xzf "$sdist" -C "$folder/sdist"

cmake -S "$source" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
    -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
    -DLLAMA_BUILD_APP=OFF
cmake --build "$folder/build" --parallel "$jobs" --target llama-bench llama-quantize llama-imatrix

mkdir -p "$folder/bin"
for tool in llama-bench llama-quantize llama-imatrix; do
    cp "$folder/build/bin/$tool" "$folder/bin/"
done
echo "llama-cpp-python $version" > "$folder/version.txt"
