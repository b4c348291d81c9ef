"""evaluate wikitext103 and lambada: against Transformers' own class, token by token."""

import gzip
import json
import math

import pytest
import torch
import transformers

from megatron_bert.cli.main import main
from megatron_bert.tasks.detokenization import Detokenizer, num_original_tokens
from megatron_bert.tasks.wikitext103 import windows
from tests.integration.real_text import DATA
from tests.integration.tiny_model import write_tiny_model

PASSAGES = ["the old city of paris is in france", "a river in england is the thames", "big city , big river"]
TOKENS = " \n = the river = \n \n the seine , a big @-@ old river , is in paris . it 's old . \n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a causal and a masked model."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("causal", "masked")}
    write_tiny_model(folders["masked"])
    write_tiny_model(folders["causal"], model_class=transformers.MegatronBertForCausalLM, is_decoder=True)
    return folders


@pytest.fixture
def files(tmp_path):
    (tmp_path / "raw.txt").write_text("\n".join(PASSAGES) + "\n")
    (tmp_path / "wiki.tokens").write_text(TOKENS)
    return tmp_path


def evaluate(capsys, task, model, data, *words, code=0):
    command = ["evaluate", task, "--model", model, "--data", data, "--dtype", "float32", "--json", *words]
    assert main([str(word) for word in command]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out) if code == 0 else printed.err


def reference(folder, kind):
    name = "MegatronBertForCausalLM" if kind == "causal" else "MegatronBertForMaskedLM"
    return getattr(transformers, name).from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_lambada_is_that_of_transformers(capsys, models, files, kind):
    tokenizer = transformers.BertTokenizer.from_pretrained(models[kind])
    model, total, hits = reference(models[kind], kind), 0.0, 0
    for passage in PASSAGES:
        context, word = passage.rsplit(" ", 1)
        ids, pieces = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, word))
        masks = [tokenizer.mask_token_id] * len(pieces)
        row = [3, *ids, *pieces] if kind == "causal" else [2, *ids, *masks, 3]
        with torch.no_grad():
            log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        at = len(ids) + (0 if kind == "causal" else 1)
        chosen = log_probs[at : at + len(pieces)]
        total += chosen.gather(1, torch.tensor(pieces)[:, None]).sum().item()
        hits += chosen.argmax(-1).tolist() == pieces
    found = evaluate(capsys, "lambada", models[kind], files / "raw.txt", "--batch-tokens", 16)
    assert (found["correct"], found["passages"], found["model"], found["variant"]) == (hits, 3, kind, "raw")
    assert found["log_likelihood"] == pytest.approx(total, rel=1e-5)


def test_compressed_passages_are_of_the_same_variant(capsys, models, files):
    (files / "x.jsonl").write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    (files / "x.jsonl.gz").write_bytes(gzip.compress((files / "x.jsonl").read_bytes()))
    plain, compressed = (
        evaluate(capsys, "lambada", models["causal"], files / name) for name in ("x.jsonl", "x.jsonl.gz")
    )
    assert compressed == plain
    assert compressed["variant"] == "detokenised"


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_perplexity_is_that_of_transformers(capsys, models, files, kind):
    tokenizer = transformers.BertTokenizer.from_pretrained(models[kind])
    model, total = reference(models[kind], kind), 0.0
    ids = tokenizer(Detokenizer(TOKENS).detokenize(TOKENS), add_special_tokens=False)["input_ids"]
    for target in range(len(ids)):  # windows of 12 with 4 seen: the first of 12 new tokens, then 8 each
        first = 0 if target < 12 else 12 + (target - 12) // 8 * 8
        begin = max(first - 4, 0)
        window, at = ids[begin : begin + 12], target - begin
        if kind == "causal":
            row, at = [3, *window[:at]], at
        else:
            row, at = [2, *window[:at], tokenizer.mask_token_id, *window[at + 1 :], 3], at + 1
        with torch.no_grad():
            total += model(torch.tensor([row])).logits[0, at].log_softmax(-1)[ids[target]].item()
    found = evaluate(capsys, "wikitext103", models[kind], files / "wiki.tokens", "--window", 12, "--overlap", 4)
    name = "perplexity" if kind == "causal" else "pseudo_perplexity"
    assert found["original_tokens"] == len(TOKENS.strip().split(" "))
    assert found[name] == pytest.approx(math.exp(-total / found["original_tokens"]), rel=1e-4)


def test_windows_score_each_token_once():
    parts = list(windows(100, 16, 6))
    assert [at for _, first, end in parts for at in range(first, end)] == list(range(100))
    assert all(end - begin <= 16 for begin, _, end in parts)
    assert all(first - begin == 6 for begin, first, _ in parts[1:])


def test_wikitext103_test_file():
    file = DATA / "tasks" / "wikitext" / "wikitext-103" / "wiki.test.tokens"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    text = file.read_text(encoding="utf-8")
    assert num_original_tokens(text) == 245_566
    detokenizer = Detokenizer(text)
    plain = detokenizer.detokenize(text)
    assert "@-@" not in plain.replace(" @-@ ", "")
    assert len(plain.split()) < 0.9 * len(text.split())
    assert detokenizer.tokenize(plain).split() == text.split()
    assert [line.split() for line in detokenizer.tokenize(plain).split("\n")] == [x.split() for x in text.split("\n")]


class TestPredictionsFile:
    def test_goes_on_where_it_was_cut(self, capsys, models, files):
        output = files / "out.jsonl"
        options = (models["causal"], files / "raw.txt", "--output", output)
        whole = evaluate(capsys, "lambada", *options)
        lines = output.read_text().splitlines(keepends=True)
        changed = lines[1].replace('"correct": false', '"correct": true')  # shows that it is taken and not made again
        assert changed != lines[1]
        output.unlink()
        (files / "out.jsonl.partial").write_text(lines[0] + changed + lines[2][:20])
        assert evaluate(capsys, "lambada", *options)["correct"] == whole["correct"] + 1
        assert output.read_text() == "".join([lines[0], changed, *lines[2:]])
        assert not (files / "out.jsonl.partial").exists()

    def test_of_another_model_or_damaged(self, capsys, models, files):
        output, partial = files / "out.jsonl", files / "out.jsonl.partial"
        evaluate(capsys, "lambada", models["causal"], files / "raw.txt", "--output", output)
        output.rename(partial)
        options = (files / "raw.txt", "--output", output)
        assert "another model" in evaluate(capsys, "lambada", models["masked"], *options, code=2)
        partial.write_text(partial.read_text().replace('"item": 1', '"item": 7'))
        assert "line 3: damaged" in evaluate(capsys, "lambada", models["causal"], *options, code=2)


@pytest.mark.parametrize(
    ("task", "name", "content", "words", "message"),
    [
        ("lambada", "x.txt", "alone\n", (), "line 1: a passage of two words"),
        ("lambada", "x.txt", "", (), "is empty"),
        ("lambada", "x.jsonl", '{"text": "a b"}\n{}\n', (), 'line 2: an object with a "text"'),
        ("wikitext103", "x.txt", " \n", (), "is empty"),
        ("wikitext103", "x.txt", "a b", ("--window", "400"), "--window 400: the model takes 32"),
        ("wikitext103", "x.txt", "a b", ("--window", "4", "--overlap", "4"), "leaves no new token"),
    ],
)
def test_bad_input(capsys, models, tmp_path, task, name, content, words, message):
    (tmp_path / name).write_text(content)
    error = evaluate(capsys, task, models["causal"], tmp_path / name, *words, code=2)
    assert message in error
    assert error.count("\n") == 1
