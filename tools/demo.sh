#!/usr/bin/env bash
# Masks filled by the model in the box, in two languages: `make demo`, or `PYTHON=... bash tools/demo.sh`.
set -euo pipefail
: "${PYTHON:=python3}"
export HF_HUB_OFFLINE=1 # nothing is fetched

echo '$ megatron-bert fill-mask --top-k 3 TEXT...'
"$PYTHON" -m megatron_bert fill-mask --top-k 3 \
  "The capital of France is [MASK]." \
  "She has lived [MASK] London since she was a child." \
  "中国的首都是北<mask>。" \
  "植物通过光合<mask>用产生能量" \
  "植物通过<mask>合作用产生能量"
