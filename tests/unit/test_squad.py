"""Windows against the fast tokenizer's own overflowing ones; decoding against trying every span; bad files.

Every 35th question of SQuAD's dev sets; ALL_QUESTIONS=1 takes all, and --junitxml=F has the counts.
"""

import itertools
import json
import lzma
import os

import numpy as np
import pytest
import transformers

from megatron_bert.errors import UserError
from megatron_bert.tasks.squad import WindowOptions, answers_by_name, decode, features, misplaced, read
from megatron_bert.tasks.squad_metrics import squad_scores
from tests.integration.real_text import DATA

EVERY = 1 if os.environ.get("ALL_QUESTIONS") else 35
COUNTS = {"dev-v1.1.json": 10570, "dev-v2.0.json": 11873}


def tokenizer_of(name):
    file = DATA / "vocab" / name
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    words = file.read_text(encoding="utf-8").split("\n")
    return transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words) if word})


@pytest.fixture(scope="module", params=COUNTS)
def questions(request):
    file = DATA / "tasks" / "squad" / request.param
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    every = read(file)
    assert len(every) == COUNTS[request.param]
    assert not misplaced(every)
    return every[::EVERY]


@pytest.mark.parametrize("max_length", [384, 128])
def test_windows_are_those_of_the_tokenizer(questions, max_length, record_property):
    """The procedure of Transformers' run_qa example: overflowing windows, offsets, an answer only where it is whole."""
    tokenizer, overlap = tokenizer_of("bert-base-uncased-vocab.txt"), max_length // 3
    counts = {"questions": len(questions), "answerable": 0, "windows": 0, "with the answer": 0, "answer in none": 0}
    for example in questions:
        texts = {"truncation": "only_second", "max_length": max_length, "return_overflowing_tokens": True}
        theirs = tokenizer(example.question, example.context, stride=overlap, return_offsets_mapping=True, **texts)
        room = max_length - len(tokenizer(example.question)["input_ids"]) - 1
        ours = features([example], tokenizer, WindowOptions(max_length, room - overlap, max_length))
        assert [list(window.input_ids) for window in ours] == theirs["input_ids"]
        assert [list(window.token_type_ids) for window in ours] == theirs["token_type_ids"]
        for index, window in enumerate(ours):
            places = [i for i, side in enumerate(theirs.sequence_ids(index)) if side == 1]
            offsets = theirs["offset_mapping"][index]
            assert (window.start, window.end) == expected_span(example, places, offsets)
        held = sum(window.start > 0 for window in ours)
        counts["answerable"] += bool(example.answers)
        counts["windows"] += len(ours)
        counts["with the answer"] += held
        counts["answer in none"] += bool(example.answers) and not held
    record_property("counts", counts)
    assert counts["answer in none"] == 0  # an answer that is longer than the overlap may be in none
    assert counts["windows"] > counts["questions"] or max_length > 128


def expected_span(example, places, offsets):
    if not example.answers:
        return 0, 0
    begin = example.answers[0].start
    end = begin + len(example.answers[0].text)
    if offsets[places[0]][0] > begin or offsets[places[-1]][1] < end:
        return 0, 0
    return max(i for i in places if offsets[i][0] <= begin), min(i for i in places if offsets[i][1] >= end)


def test_right_logits_give_the_right_answers(questions):
    windows = features(questions, tokenizer_of("bert-base-uncased-vocab.txt"), WindowOptions())
    starts, ends = (
        [np.eye(len(w.input_ids))[place] for w, place in zip(windows, places, strict=True)]
        for places in ([w.start for w in windows], [w.end for w in windows])
    )
    for window, first in zip(windows, starts, strict=True):  # windows that lack the answer say so less loudly
        first *= 1 if window.start else 0.5
    found = decode(questions, windows, starts, ends, null_threshold=0.0)
    scores = squad_scores({name: item.text for name, item in found.items()}, answers_by_name(questions))
    assert scores["exact"] > 98  # the rest are answers inside a word


def write(tmp_path, lines):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "?", "the", "old", "king", "of", "france"]
OWN = {"question": "who?", "context": "the old king of france", "answers": [{"text": "king", "answer_start": 8}]}
TINY = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)})


def test_decoding_is_the_best_of_all_spans(tmp_path):
    examples = read(write(tmp_path, [OWN]))
    windows = features(examples, TINY, WindowOptions())
    draw = np.random.default_rng(0)
    for _ in range(50):
        starts, ends = draw.normal(size=(2, len(windows[0].input_ids)))
        spans = [(a, b) for a, b in itertools.product(range(5), repeat=2) if 0 <= b - a < 3]
        best = max(spans, key=lambda span: starts[span[0] + 4] + ends[span[1] + 4])
        [found] = decode(examples, windows, [starts], [ends], max_answer=3).values()
        assert found.text == " ".join(OWN["context"].split()[best[0] : best[1] + 1])
        assert found.null_score == pytest.approx(starts[0] + ends[0] - starts[best[0] + 4] - ends[best[1] + 4])


def test_an_empty_passage_has_no_answer(tmp_path):
    examples = read(write(tmp_path, [{**OWN, "context": " ", "answers": []}]))
    windows = features(examples, TINY, WindowOptions())
    zeros = np.zeros(len(windows[0].input_ids))
    [found] = decode(examples, windows, [zeros], [zeros]).values()
    assert (found.text, found.n_best) == ("", ())


def test_misplaced_answers_are_listed(tmp_path):
    wrong = {**OWN, "answers": [{"text": "queen", "answer_start": 8}]}
    [found] = misplaced(read(write(tmp_path, [OWN, wrong])))
    assert found.where.endswith("own.jsonl, line 2")


def test_compressed_files(tmp_path):
    [wanted] = read(write(tmp_path, [OWN]))
    (tmp_path / "own.jsonl.xz").write_bytes(lzma.compress((tmp_path / "own.jsonl").read_bytes()))
    [found] = read(tmp_path / "own.jsonl.xz")
    assert (found.question, found.context, found.answers) == (wanted.question, wanted.context, wanted.answers)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "own.jsonl is empty"),
        ([OWN, {"question": "who?"}], "line 2: .*are needed"),
        ([OWN, {**OWN, "context": None}], "line 2: .*are needed: 'context' is not a text"),
        ([{**OWN, "question": ["who?"]}], "line 1: .*are needed: 'question' is not a text"),
        ([{**OWN, "id": 1}, {**OWN, "id": 1}], "line 2: id '1' is also that of .*line 1"),
    ],
)
def test_bad_files(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, lines))


def test_a_long_passage_needs_a_stride(tmp_path):
    examples = read(write(tmp_path, [OWN]))
    with pytest.raises(UserError, match="line 1: the passage has 5 tokens and only 3 fit; set a stride"):
        features(examples, TINY, WindowOptions(max_length=8, stride=None))
    assert len(features(examples, TINY, WindowOptions(max_length=8, stride=1))) == 3
