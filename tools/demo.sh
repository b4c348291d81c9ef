#!/usr/bin/env bash
# Masks filled by the model in the box, in two languages: `make demo`, or `PYTHON=... bash tools/demo.sh`.
set -euo pipefail
: "${PYTHON:=python3}"
export HF_HUB_OFFLINE=1 # nothing is fetched

echo '$ megatron-bert fill-mask --top-k 3 TEXT...'
"$PYTHON" -m megatron_bert fill-mask --top-k 3 \
  "Paris is the capital of [MASK]." \
  "She has lived [MASK] London since she was a child." \
  "他昨天去了图书<mask>看书。" \
  "绿色植物进行光合<mask>用。" \
  "The capital of France is [MASK]." \
  "植物通过<mask>合作用产生能量"
