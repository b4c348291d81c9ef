"""`wikitext103` and `lambada` against lm-evaluation-harness (pip install '.[parity]'): one causal model, one text.

The harness conditions the first token of a text on its prefix token, which is set to ours: [SEP], as rows begin in
training. In a later window it sees one more token of the text, where we have [SEP] again, and in the last one as many
as the model takes, where we have the overlap, as everywhere. So

- a text of one window goes through its public `loglikelihood_rolling` as it is;
- for longer ones its windows are taken (`get_rolling_token_windows`, whose `context_len` is our overlap + 1), and what
  each is conditioned on becomes the prefix and the `overlap` tokens before those that are scored;
- it puts no prefix before a context that is not empty, so contexts of LAMBADA say "[SEP] " themselves.

ALL_QUESTIONS=1 takes the whole files; --junitxml=F has the figures.
"""

import json
import math
import os

import pytest
import torch

from megatron_bert import MegatronBertForCausalLM
from megatron_bert.tasks.detokenization import Detokenizer, num_original_tokens
from megatron_bert.tasks.lambada import Lambada
from megatron_bert.tasks.scoring import load_scorer
from megatron_bert.tasks.wikitext103 import WikiText103
from tests.integration.real_text import DATA
from tests.integration.tiny_model import write_tiny_model

harness = pytest.importorskip("lm_eval.models.huggingface")
rolling_windows = pytest.importorskip("lm_eval.utils").get_rolling_token_windows
disjoint = pytest.importorskip("lm_eval.utils").make_disjoint_window
Instance = pytest.importorskip("lm_eval.api.instance").Instance

FULL = bool(os.environ.get("ALL_QUESTIONS"))
WINDOW, LONGEST = 128, 512  # tokens; LAMBADA's longest passage fits the model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    file = DATA / "vocab" / "bert-base-uncased-vocab.txt"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    folder = tmp_path_factory.mktemp("causal")
    write_tiny_model(
        folder, vocabulary=file.read_text(encoding="utf-8").split(), model_class=MegatronBertForCausalLM,
        is_decoder=True, max_position_embeddings=LONGEST,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return load_scorer(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder, scorer):
    model = MegatronBertForCausalLM.from_pretrained(folder)
    sep = scorer.tokenizer.sep_token_id
    return harness.HFLM(
        pretrained=model, tokenizer=scorer.tokenizer, backend="causal", device="cpu", batch_size=16,
        max_length=LONGEST, add_bos_token=False, prefix_token_id=sep,
    )  # fmt: skip


def data(name):
    file = DATA / "tasks" / name
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    return file


def instances(kind, arguments):
    return [Instance(kind, {}, one, at) for at, one in enumerate(arguments)]


def ours(task, scorer):
    records = [task.record(at, scorer.score(task.requests(at))) for at in range(len(task))]
    return records, task.result(records)


@pytest.mark.parametrize("overlap", [0, 96])
def test_wikitext103(tmp_path, record_property, scorer, theirs, overlap):
    text = data("wikitext/wikitext-103/wiki.test.tokens").read_text(encoding="utf-8")
    text = text if FULL else text[:9_000]
    (tmp_path / "wiki.tokens").write_text(text, encoding="utf-8")
    task = WikiText103(tmp_path / "wiki.tokens", scorer, WINDOW, overlap)
    records, found = ours(task, scorer)
    ids = theirs.tok_encode(Detokenizer(text).detokenize(text))
    prefix = theirs.prefix_token_id
    pairs = [disjoint(pair) for pair in rolling_windows(ids, prefix, WINDOW, overlap + 1)]
    seen = [context[max(len(context) - overlap, 1) :] for context, _ in pairs]
    requests = [(None, [prefix, *some], scored) for some, (_, scored) in zip(seen, pairs, strict=True)]
    answers = [value for value, _ in theirs._loglikelihood_tokens(requests, disable_tqdm=True)]
    assert [record["tokens"] for record in records] == [len(scored) for _, scored in pairs]
    assert [record["log_likelihood"] for record in records] == pytest.approx(answers, rel=1e-4)
    total = math.fsum(answers)
    assert found["model_tokens"] == len(ids)
    assert len(records) > 10
    assert found["log_likelihood"] == pytest.approx(total, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(-total / num_original_tokens(text)), rel=1e-3)
    assert not FULL or found["original_tokens"] == 245_566
    record_property("figures", {**found, "windows": len(records), "harness": total})


def test_texts_of_one_window(tmp_path, scorer, theirs):
    text = data("wikitext/wikitext-103/wiki.test.tokens").read_text(encoding="utf-8")
    paragraphs = [line for line in text.split("\n") if 20 < len(line.split()) < WINDOW][:8]
    plain = [Detokenizer(one).detokenize(one) for one in paragraphs]
    totals = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", [(one,) for one in plain]))
    for at, (one, total) in enumerate(zip(paragraphs, totals, strict=True)):
        (tmp_path / f"{at}").write_text(one, encoding="utf-8")
        _, found = ours(WikiText103(tmp_path / f"{at}", scorer, None, None), scorer)
        assert found["log_likelihood"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", ["lambada_test.jsonl", "lambada_test_plain_text.txt"])
def test_lambada(tmp_path, record_property, scorer, theirs, name):
    lines = data(f"lambada/{name}").read_text(encoding="utf-8").strip().split("\n")[: None if FULL else 16]
    passages = [json.loads(line)["text"] for line in lines] if name.endswith(".jsonl") else lines
    passages[1::2] = [likely(one, scorer) for one in passages[1::2]]
    path = tmp_path / name
    written = [json.dumps({"text": one}) for one in passages] if name.endswith(".jsonl") else passages
    path.write_text("\n".join(written) + "\n", encoding="utf-8")
    records, found = ours(Lambada(path, scorer), scorer)
    parted = [one.strip().rsplit(maxsplit=1) for one in passages]
    requests = instances("loglikelihood", [(f"[SEP] {context}", f" {word}") for context, word in parted])
    answers = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [record["correct"] for record in records] == [hit for _, hit in answers]
    assert [record["log_likelihood"] for record in records] == pytest.approx([value for value, _ in answers], rel=1e-4)
    assert 0 < found["correct"] < len(passages)
    record_property("figures", {**found, "harness": math.fsum(value for value, _ in answers)})


@torch.inference_mode()
def likely(passage, scorer):
    """The passage up to where the model goes on with a word, and this word: an untrained model has hits, too."""
    tokenizer, words = scorer.tokenizer, passage.split()[:-1]
    while len(words) > 1:
        ids = [tokenizer.sep_token_id, *tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]]
        found = []
        while len(found) < 3:
            found.append(int(scorer.model(torch.tensor([ids + found])).logits[0, -1].argmax()))
        pieces = tokenizer.convert_ids_to_tokens(found)
        size = next((at for at in (1, 2) if not pieces[at].startswith("##")), 3)
        word = "".join(piece.removeprefix("##") for piece in pieces[:size])
        if tokenizer(word, add_special_tokens=False)["input_ids"] == found[:size]:
            return " ".join([*words, word])
        words.pop()
    return passage
