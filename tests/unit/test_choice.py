"""RACE's rows against Transformers' own tokenizer on every dev question; its published folder; bad files."""

import json
import os

import numpy as np
import pytest
import transformers

from megatron_bert.errors import UserError
from megatron_bert.tasks.choice import Choice, ChoiceSettings, Cut
from megatron_bert.tasks.task import Making
from tests.integration.real_text import DATA
from tests.unit.test_squad import tokenizer_of

EVERY = 1 if os.environ.get("ALL_QUESTIONS") else 20
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "?", "the", "old", "king", "of", "france", "queen", "is"]
TINY = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
OWN = {"context": "the king of france is old", "question": "who is old?", "choices": ["the king", "queen"], "label": 0}
RACE = {
    "id": "high1.txt",
    "article": "the king of france is old",
    "questions": ["who is old?", "the _ of _ is old"],
    "options": [["the king", "queen", "who", "france"], ["king", "queen", "france", "old"]],
    "answers": ["A", "D"],
}
TASK = Choice(ChoiceSettings())


def write(tmp_path, *lines):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("max_length", [512, 128])
@pytest.mark.parametrize(("part", "count"), [("middle", 1436), ("high", 3451)])
def test_rows_are_those_of_the_tokenizer(part, count, max_length):
    """Megatron-LM's order (tasks/race/data.py): question and choice, then the passage, which alone is cut."""
    file = DATA / "tasks" / "race" / f"dev-{part}.jsonl.xz"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    tokenizer, examples = tokenizer_of("bert-base-uncased-vocab.txt"), TASK.read(file)
    assert len(examples) == count
    assert {one.section for one in examples} == {part}
    examples, cut = examples[::EVERY], 0
    rows = TASK.rows(examples, Making(tokenizer, max_length))
    for number, (one, row) in enumerate(zip(examples, rows, strict=True)):
        asked = [
            one.question.replace("_", choice) if "_" in one.question else f"{one.question} {choice}"
            for choice in one.choices
        ]
        contexts = [one.context] * len(asked)
        theirs = tokenizer(asked, contexts, truncation="only_second", max_length=max_length)
        assert [list(text.input_ids) for text in row.texts] == theirs["input_ids"]
        assert [list(text.token_type_ids) for text in row.texts] == theirs["token_type_ids"]
        whole = max(map(len, tokenizer(asked, contexts)["input_ids"])) if max_length == 512 else max_length
        assert row.feature == (whole > max_length or row.feature.passage, False)
        assert (row.example, row.target) == (number, one.label)
        cut += row.feature.passage
    assert 0 < cut < len(rows) if (max_length, part) != (512, "middle") else cut < len(rows) / 50


def test_published_folder(tmp_path):
    for section in ("middle", "high"):
        (tmp_path / "dev" / section).mkdir(parents=True)
        entry = {**RACE, "id": f"{section}1.txt"}
        (tmp_path / "dev" / section / "1.txt").write_text(json.dumps(entry))
    examples = TASK.read(tmp_path / "dev")
    assert [(one.name, one.section, one.label) for one in examples] == [
        ("high1.txt-1", "high", 0), ("high1.txt-2", "high", 3), ("middle1.txt-1", "middle", 0),
        ("middle1.txt-2", "middle", 3),
    ]  # fmt: skip
    assert examples[1].where == f"{tmp_path}/dev/high/1.txt, line 1, question 2"
    rows = TASK.rows(examples, Making(TINY, 64))
    assert (
        TINY.decode(rows[1].texts[1].input_ids)
        == "[CLS] the queen of queen is old [SEP] the king of france is old [SEP]"
    )
    logits = [np.array(one, dtype=np.float32) for one in ([3, 1, 1, 1], [3, 1, 1, 1], [3, 1, 1, 1], [0, 0, 0, 1])]
    found = TASK.predictions(examples, rows, logits, Making(TINY, 64))
    assert TASK.scores(examples, found) == {"accuracy": 75, "middle_accuracy": 100, "high_accuracy": 50}
    assert found[3].probabilities[3] == pytest.approx(np.e / (3 + np.e))
    assert TASK.record(examples[3], found[3]).items() >= {"id": "middle1.txt-2", "prediction": 3, "label": 3}.items()


def test_own_questions(tmp_path):
    unknown = {**OWN, "context": "", "question": "the ___ of france", "label": None}
    examples = TASK.read(write(tmp_path, OWN, unknown))
    assert [(at, why.rsplit("/")[-1]) for at, why in TASK.left_out(examples)] == [
        (1, "own.jsonl, line 2: it has no label")
    ]
    rows = TASK.rows(examples, Making(TINY, 13))
    assert [TINY.decode(text.input_ids) for text in rows[0].texts] == [
        "[CLS] who is old? the king [SEP] the king of france [SEP]",
        "[CLS] who is old? queen [SEP] the king of france is [SEP]",
    ]
    assert TINY.decode(rows[1].texts[1].input_ids) == "[CLS] the queen of france [SEP]"
    assert [row.feature for row in rows] == [Cut(True, False), Cut(False, False)]
    [row, _] = TASK.rows(examples, Making(TINY, 8))  # 6 tokens of question and choice, and room for 5
    assert (row.feature, TINY.decode(row.texts[0].input_ids)) == (Cut(True, True), "[CLS] who is old? the [SEP]")
    assert Choice(ChoiceSettings(blank=""))._asked(examples[1], "king") == "the ___ of france king"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "own.jsonl is empty"),
        ([OWN, {"question": "who?"}], 'line 2: "article" .* or "context" is needed; there are question'),
        ([OWN, {"context": "a", "question": "b"}], 'line 2: there is no "choices"'),
        ([OWN, {**OWN, "label": 2}], "line 2: the label is not one of the 2 choices"),
        ([OWN, {**OWN, "choices": ["a", "b", "c"]}], "line 2: 3 choices, where .*, line 1 has 2; every question needs"),
        ([{**OWN, "choices": ["a"]}], "line 1: 1 choices; at least 2"),
        ([{**OWN, "choices": "ab"}], "line 1: .* a list of texts"),
        ([RACE, {**RACE, "answers": ["A"]}], "line 2: as many questions, options and answers are needed, not 2, 2, 1"),
        ([{**RACE, "answers": ["A", "E"]}], "line 1, question 2: the label is not one of the 4"),
        ([{**RACE, "questions": None}], "line 1: lists of"),
    ],
)
def test_bad_files(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        TASK.read(write(tmp_path, *lines))


def test_files_of_different_numbers_of_choices(tmp_path):
    examples = TASK.read(write(tmp_path, OWN))
    examples += TASK.read(write(tmp_path, RACE))
    with pytest.raises(UserError, match=r"line 1, question 1: 4 choices, where .*own.jsonl, line 1 has 2"):
        TASK.rows(examples, Making(TINY, 64))
    with pytest.raises(UserError, match=r"is empty: it holds no question \(\*.txt\)"):
        TASK.read(tmp_path)
