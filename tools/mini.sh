#!/usr/bin/env bash
# The English-Chinese model in the box, from Wikipedia's text to the model's folder:
#   bash tools/mini.sh CORPUS_DIR [STEP...]        steps: split vocabulary tokens pretrain convert report; default: all
# CORPUS_DIR holds simplewiki, enwiki2020, enwiki_first and zhwiki, each .jsonl.xz with {"title", "text"} a line.
# Each step leaves alone what is there already, and pretrain goes on from its newest checkpoint, so the same command goes
# on after a stop. SECONDS_A_PIECE=540 has the training stop and save after so long. SETTINGS="--set key=value ..." change the
# recipe. Everything is written to runs/mini in the folder where it is started.
set -euo pipefail
: "${PYTHON:=python3}" "${SECONDS_A_PIECE:=0}" "${SETTINGS:=}"
corpus=$1
shift
steps=${*:-split vocabulary tokens pretrain convert report}
here=$(dirname "$0")
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

run() {
  echo "\$ megatron-bert $*"
  "$PYTHON" -m megatron_bert "$@"
}

split() { # 1 % of the documents by a hash of the title
  mkdir -p runs/mini
  [ -e runs/mini/en.jsonl ] || "$PYTHON" "$here/mini_split.py" runs/mini/en \
    "$corpus"/{simplewiki,enwiki2020,enwiki_first}.jsonl.xz
  [ -e runs/mini/zh.jsonl ] || "$PYTHON" "$here/mini_split.py" runs/mini/zh "$corpus/zhwiki.jsonl.xz"
}

vocabulary() { # 20,096 = 157 x 128; rarer characters than the first 6,500 become [UNK]
  [ -e runs/mini/tokenizer ] || run tokenizer train --input runs/mini/{en,zh}.jsonl --output runs/mini/tokenizer \
    --vocab-size 20096 --alphabet-limit 6500 --cased
}

tokens() {
  for language in en zh; do
    for part in "" .held_out; do
      [ -e "runs/mini/$language$part.idx" ] || run preprocess --input "runs/mini/$language$part.jsonl" \
        --tokenizer runs/mini/tokenizer --output "runs/mini/$language$part" --language "$language"
    done
  done
  [ -e runs/mini/held_out.idx ] ||
    run preprocess merge runs/mini/{en,zh}.held_out --output runs/mini/held_out
}

pretrain() {
  # shellcheck disable=SC2086 # SETTINGS is several words
  timeout --foreground "$SECONDS_A_PIECE" "$PYTHON" -m megatron_bert pretrain "$here/../recipes/mini.yaml" $SETTINGS || {
    code=$?
    [ "$code" = 124 ] || exit "$code"
    echo "stopped after $SECONDS_A_PIECE s; the same command goes on"
  }
}

convert() {
  run convert runs/mini/run runs/mini/model --dtype bfloat16 --overwrite
}

report() {
  "$PYTHON" "$here/mini_report.py" runs/mini/model runs/mini
}

for step in $steps; do
  "$step"
done
