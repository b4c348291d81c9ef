"""What the model in the box can do: held-out masked tokens of both languages, the cloze set, a few sentences.

`python tools/mini_report.py MODEL FOLDER`, FOLDER as tools/mini.sh leaves it. Prints a JSON object a line.

Held-out accuracy: every held-out document is cut into rows [CLS] ... [SEP] of at most 256 tokens; 15 % of a row's
tokens, drawn uniformly and singly, are shown as [MASK]; an answer is right if it is the most probable of the whole
vocabulary. Beside it what knows no context: the training text's most frequent token as every answer, and the loss of
its token shares (a token that it lacks counts as seen once).
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from megatron_bert.data.indexed import IndexedReader
from megatron_bert.data.split import document_tokens
from megatron_bert.inference.fill_mask import MaskFiller, load_mask_filler

ROW_TOKENS, MASK_SHARE, BATCH_ROWS = 256, 0.15, 64
EXAMPLES = [
    "The capital of France is [MASK].",
    "Water boils at one hundred [MASK].",
    "She has lived [MASK] London since she was a child.",
    "植物通过[MASK]合作用产生能量",
    "中国的首都是北[MASK]。",
    "他昨天去了图书[MASK]看书。",
]


def rows_of(reader: IndexedReader, cls_id: int, sep_id: int) -> list[np.ndarray]:
    """The documents in rows of at most ROW_TOKENS, the longest first."""
    rows, room = [], ROW_TOKENS - 2
    ends = np.cumsum(document_tokens(reader))
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        for at in range(start, stop, room):
            rows.append(np.concatenate([[cls_id], reader.tokens[at : min(at + room, stop)], [sep_id]]).astype(np.int64))
    return sorted(rows, key=len, reverse=True)


@torch.inference_mode()
def masked_accuracy(filler: MaskFiller, held_out: IndexedReader, training: IndexedReader) -> dict[str, float]:
    """Accuracy and loss in nats a masked token, of the model and without context."""
    tokenizer, model = filler.tokenizer, filler.model
    special = np.isin(np.arange(model.config.vocab_size), tokenizer.all_special_ids)  # [UNK] too: no answer to it
    counts = np.bincount(training.tokens, minlength=model.config.vocab_size).clip(1)
    unigram = torch.from_numpy(np.log(counts / counts.sum())).float().to(model.device)
    rng = np.random.default_rng(0)
    sums: dict[str, float] = defaultdict(float)
    rows = rows_of(held_out, tokenizer.cls_token_id, tokenizer.sep_token_id)
    for first in range(0, len(rows), BATCH_ROWS):
        batch = rows[first : first + BATCH_ROWS]
        ids = torch.full((len(batch), len(batch[0])), tokenizer.pad_token_id)
        chosen = torch.zeros_like(ids, dtype=torch.bool)
        for at, row in enumerate(batch):
            ordinary = np.flatnonzero(~special[row])
            picked = rng.choice(ordinary, round(MASK_SHARE * len(ordinary)), replace=False)
            ids[at, : len(row)] = torch.from_numpy(row)
            chosen[at, torch.from_numpy(picked)] = True
        wanted = ids[chosen].to(model.device)
        seen = ids.masked_fill(chosen, tokenizer.mask_token_id).to(model.device)
        hidden = model.bert(seen, attention_mask=(seen != tokenizer.pad_token_id).long()).last_hidden_state
        log_probs = model.cls(hidden[chosen.to(model.device)]).float().log_softmax(-1)
        sums["masked"] += len(wanted)
        sums["right"] += int((log_probs.argmax(-1) == wanted).sum())
        sums["loss"] -= log_probs.gather(1, wanted[:, None]).sum().item()
        sums["frequent"] += int((wanted == counts.argmax()).sum())
        sums["unigram"] -= unigram[wanted].sum().item()
    masked = sums["masked"]
    return {
        "documents": len(held_out.documents) - 1,
        "rows": len(rows),
        "masked_tokens": int(masked),
        "accuracy": sums["right"] / masked,
        "loss": sums["loss"] / masked,
        "unigram_accuracy": sums["frequent"] / masked,
        "unigram_loss": sums["unigram"] / masked,
    }


def cloze(filler: MaskFiller, file: Path) -> list[dict[str, object]]:
    """Top-1 and top-5 by language and kind. Lines of the file: language, kind, text, answer, tabs between.

    Raises:
        ValueError: an answer is not one entry of the vocabulary, so that no model could give it.
    """
    items = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line]
    vocabulary = filler.tokenizer.get_vocab()
    if unknown := [answer for *_, answer in items if answer not in vocabulary]:
        raise ValueError(f"{file}: not in the vocabulary: {', '.join(unknown)}")
    groups: dict[tuple[str, str], list[int]] = {}
    for (language, kind, _, answer), filled in zip(items, filler.fill([text for _, _, text, _ in items]), strict=True):
        answers = [prediction.token for prediction in filled.predictions[0]]
        rank = answers.index(vocabulary[answer]) if vocabulary[answer] in answers else len(answers)
        groups.setdefault((language, kind), []).append(rank)
    return [
        {"cloze": language, "kind": kind, "items": len(ranks), "top1": ranks.count(0) / len(ranks),
         "top5": sum(rank < 5 for rank in ranks) / len(ranks)}
        for (language, kind), ranks in groups.items()
    ]  # fmt: skip


def main() -> None:
    """Prints everything."""
    model, folder = map(Path, sys.argv[1:])
    print(json.dumps({"folder_bytes": sum(file.stat().st_size for file in model.iterdir())}))
    transformers_logging.disable_progress_bar()
    filler = load_mask_filler(model, top_k=5)
    for language in ("en", "zh"):
        held_out, training = IndexedReader(folder / f"{language}.held_out"), IndexedReader(folder / language)
        print(json.dumps({"held_out": language, **masked_accuracy(filler, held_out, training)}), flush=True)
    for group in cloze(filler, Path(__file__).with_name("mini_cloze.tsv")):
        print(json.dumps(group))
    for filled in filler.fill(EXAMPLES):
        words = [f"{prediction.token_str} {prediction.score:.2f}" for prediction in filled.predictions[0]]
        print(json.dumps({"text": filled.text, "answers": words}, ensure_ascii=False))


if __name__ == "__main__":
    main()
