#!/usr/bin/env bash
# `make demo-smollm2`: a real model to three engines, beside llama.cpp's own formats of the same
# weights. TEXT is what perplexity is measured on; without it, quality is left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"
text="${TEXT:-../shared/data/wikitext-2/valid.txt}"
model=out/smollm2

say() { printf '\n== %s\n' "$*"; }
mkdir -p out
[ -e "$model/tokenizer_config.json" ] || python examples/smollm2.py "$model"
made=()
for target in executorch gguf onnx; do
    for bits in int8 int4; do
        say "edgekit export $model --target $target --$bits --context 1024"
        made+=("out/smollm2-$target-$bits")
        edgekit export "$model" --target "$target" "--$bits" --context 1024 --force -o "${made[-1]}"
    done
done
for format in Q8_0 Q4_0 Q4_K_M; do
    say "edgekit export $model --target gguf --scheme $format --context 1024"
    made+=("out/smollm2-gguf-$format")
    edgekit export "$model" --target gguf --scheme "$format" --context 1024 --force -o "${made[-1]}"
done
say "edgekit run ${made[0]} 'What is the capital of France?' --temperature 0"
edgekit run "${made[0]}" "What is the capital of France?" --temperature 0 --max-tokens 60
if [ -r "$text" ]; then
    quality=(--text "$text" --reference "$model" --chunks 8)
else
    quality=()
    echo "no $text: quality is not measured (TEXT=FILE make demo-smollm2)"
fi
say "edgekit compare ${made[*]} ${quality[*]}"
edgekit compare "${made[@]}" "${quality[@]}" -o out/smollm2.html
