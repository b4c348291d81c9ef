#!/usr/bin/env bash
# Short runs of recipes/mini.yaml with one thing changed, all over the same number of tokens, each measured alike:
#   bash tools/mini_sweep.sh [ARM...]        after `tools/mini.sh CORPUS_DIR split vocabulary tokens`
# The losses of the runs themselves are of their own masks, so what counts is the held-out report (15 %, all [MASK]) of
# the last checkpoint: runs/mini/sweep/ARM.json. An arm that has one is left alone; one that was stopped goes on.
# STEPS: of the recipe's batch. SETTINGS="--set key=value ..." for all arms.
set -euo pipefail
: "${PYTHON:=python3}" "${STEPS:=1500}" "${SETTINGS:=}"
here=$(dirname "$0")
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

declare -A arms=(
  [base]=""
  [rate_2e-3]="optimizer.learning_rate=2.0e-3"
  [rate_8e-3]="optimizer.learning_rate=8.0e-3"
  [batch_half]="training.batch_samples=384 training.steps=$((2 * STEPS))"
  [batch_double]="training.batch_samples=1536 training.steps=$((STEPS / 2)) optimizer.learning_rate=5.6e-3"
  [adamw]="optimizer.kind=adamw"
  [fates]="objective.mask_replace_prob=0.8 objective.random_replace_prob=0.1"
  [mask_15]="objective.mask_share=0.15"
  [mask_30]="objective.mask_share=0.30"
  [mask_40]="objective.mask_share=0.40"
  [words]="objective.whole_words=true"
  [10x320]="model.hidden_size=320 model.num_attention_heads=5 model.num_hidden_layers=10"
  [18x256]="model.hidden_size=256 model.num_attention_heads=4 model.num_hidden_layers=18"
  [short_30]="data.short_share=0.3"
  [dropout]="model.hidden_dropout_prob=0.1 model.attention_probs_dropout_prob=0.1"
)

for arm in ${*:-base adamw rate_2e-3 rate_8e-3 10x320 18x256 mask_15 mask_30 mask_40 short_30 fates batch_half batch_double words dropout}; do
  folder=runs/mini/sweep/$arm
  [ -e "$folder.json" ] && continue
  settings=()
  for setting in training.steps="$STEPS" training.warmup_steps=$((STEPS / 10)) ${arms[$arm]}; do
    settings+=(--set "$setting")
  done
  echo "== $arm: ${arms[$arm]}"
  # shellcheck disable=SC2086 # SETTINGS is several words
  "$PYTHON" -m megatron_bert pretrain "$here/../recipes/mini.yaml" --set output="$folder" "${settings[@]}" \
    --set runtime.evaluate_every_steps=100000 --set runtime.checkpoint_every_steps=100000 $SETTINGS
  "$PYTHON" -m megatron_bert convert "$folder" "$folder/bfloat16" --dtype bfloat16 --overwrite
  "$PYTHON" "$here/mini_report.py" "$folder/bfloat16" runs/mini > "$folder.partial"
  mv "$folder.partial" "$folder.json"
  grep held_out "$folder.json"
done
