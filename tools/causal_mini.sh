#!/usr/bin/env bash
# A small causal model, from token files to both zero-shot protocols:
#   bash tools/causal_mini.sh TASKS_DIR        after `tools/mini.sh CORPUS_DIR split vocabulary tokens`
# TASKS_DIR holds wikitext/wikitext-103/wiki.test.tokens, lambada/lambada_test.jsonl and its lambada_test_plain_text.txt. A stopped training goes on, and what is
# there already is left alone. SECONDS_A_PIECE=200 has the training stop and save after so long. SETTINGS="--set key=value ..."
# change the recipe. Everything is written to runs/causal_mini in the folder where it is started; scores: *.json there.
set -euo pipefail
: "${PYTHON:=python3}" "${SECONDS_A_PIECE:=0}" "${SETTINGS:=}"
data=$1
here=$(dirname "$0")
runs=runs/causal_mini
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

score() { # NAME TASK FILE
  [ -e "$runs/$1.json" ] && return
  "$PYTHON" -m megatron_bert evaluate "$2" --model $runs/model --data "$data/$3" --batch-tokens 32768 --json > "$runs/$1.partial"
  mv "$runs/$1.partial" "$runs/$1.json"
  cat "$runs/$1.json"
}

if [ ! -e $runs/model ]; then
  # shellcheck disable=SC2086 # SETTINGS is several words
  timeout --foreground "$SECONDS_A_PIECE" "$PYTHON" -m megatron_bert pretrain "$here/../recipes/causal_mini.yaml" $SETTINGS || {
    code=$?
    [ "$code" = 124 ] || exit "$code"
    echo "stopped after $SECONDS_A_PIECE s; the same command goes on"
    exit 0
  }
  "$PYTHON" -m megatron_bert convert $runs/run $runs/model --dtype bfloat16
fi
score wikitext103 wikitext103 wikitext/wikitext-103/wiki.test.tokens
score lambada lambada lambada/lambada_test.jsonl
score lambada_raw lambada lambada/lambada_test_plain_text.txt
