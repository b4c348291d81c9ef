#!/usr/bin/env bash
# From raw text to a filled mask in demo/: `make demo-train`, or `PYTHON=... bash tools/demo_train.sh`.
# The text is the language reference that every CPython ships. Under three minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}"
export HF_HUB_OFFLINE=1 # nothing is fetched
# So small a model gains a fifth from a second thread, and loses far more waiting for it where other programs use the cores.
export OMP_NUM_THREADS=1

run() {
  echo "\$ megatron-bert $*"
  "$PYTHON" -m megatron_bert "$@"
}

rm -rf demo
mkdir demo
"$PYTHON" tools/demo_text.py demo/topics.txt
echo "demo/topics.txt: $(wc -c < demo/topics.txt) bytes of English"

run tokenizer train --input demo/topics.txt --output demo/tokenizer --vocab-size 2048
run preprocess --input demo/topics.txt --tokenizer demo/tokenizer --output demo/text
run pretrain recipes/demo_cpu.yaml
"$PYTHON" tools/demo_report.py demo/text demo/run
run fill-mask --model demo/run/model --top-k 3 \
  "Changed in [MASK] 3.8." \
  "This method returns a new [MASK]." \
  "The operation is equivalent [MASK] the following." \
  "It is an instance of the [MASK]."
