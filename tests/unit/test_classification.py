"""Files of classification tasks as published, rows against the tokenizer's and BERT's rule, scores; bad files."""

import json
import lzma

import numpy as np
import pytest
import transformers

from megatron_bert.errors import UserError
from megatron_bert.tasks.classification import Classification, OwnClassification, OwnSettings, Prediction
from megatron_bert.tasks.glue import FORMATS
from megatron_bert.tasks.task import Making, TaskSettings
from tests.integration.real_text import DATA
from tests.unit.test_squad import tokenizer_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]
TINY = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


def glue(name):
    return Classification(TaskSettings(), FORMATS[name])


def own(**settings):
    return OwnClassification(OwnSettings(**settings))


def write(tmp_path, text, name):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


MNLI_TSV = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
    'sentence1\tsentence2\tlabel1\tgold_label\n0\t1\t1c\ttravel\t( a )\t( b )\t(a)\t(b)\tA "a\tb\tneutral\tneutral\n'
)


@pytest.mark.parametrize(
    ("task", "name", "text", "texts", "label"),
    [
        ("sst2", "dev.tsv", "sentence\tlabel\r\na b \t1\r\n", ("a b ",), "positive"),
        ("cola", "dev.tsv", 'gj04\t0\t*\t"a b.\n', ('"a b.',), "unacceptable"),
        ("mrpc", "t.txt", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\ta\tb\n", ("a", "b"),
         "equivalent"),
        ("rte", "dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n", ("a", "b"), "entailment"),
        ("qnli", "dev.tsv", "index\tquestion\tsentence\tlabel\n0\ta\tb\tnot_entailment\n", ("a", "b"),
         "not_entailment"),
        ("qqp", "dev.tsv", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t0\n", ("a", "b"),
         "not_duplicate"),
        ("stsb", "dev.tsv", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
         "0\tg\tf\t2012\t1\tn\tn\ta\tb\t4.750\n", ("a", "b"), 4.75),
        ("mnli", "dev_matched.tsv", MNLI_TSV, ('A "a', "b"), "neutral"),
        ("mnli", "dev.jsonl", '{"premise": "a", "hypothesis": "b", "label": "neutral"}\n', ("a", "b"), "neutral"),
    ],
)  # fmt: skip
def test_published_formats(tmp_path, task, name, text, texts, label):
    [example] = glue(task).read(write(tmp_path, text, name))
    assert (example.texts, example.label) == (texts, label)
    assert example.where.endswith(f"{name}, line {1 if task == 'cola' or name.endswith('jsonl') else 2}")


@pytest.mark.parametrize(
    ("task", "name", "count", "left_out"),
    [
        ("sst2", "glue/SST-2/train_full.tsv", 67349, 0), ("cola", "glue/CoLA/in_domain_train.tsv", 8551, 0),
        ("mrpc", "glue/MRPC/msr_paraphrase_train.txt", 4076, 0), ("mrpc", "glue/MRPC/msr_paraphrase_test.txt", 1725, 0),
        ("rte", "glue/RTE/train.tsv", 2490, 0), ("rte", "glue/RTE/dev.tsv", 277, 0),
        ("mnli", "glue/MNLI/dev_full_9815.jsonl", 9815, 0), ("qqp", "glue/QQP/train_subset.jsonl", 8999, 0),
        ("stsb", "glue/STS-B/train_subset.jsonl", 5173, 0), ("ocnli", "ocnli/dev.json", 3000, 50),
    ],
)  # fmt: skip
def test_real_files(task, name, count, left_out):
    file = DATA / "tasks" / name
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    examples = glue(task).read(file)
    assert (len(examples), len(glue(task).left_out(examples))) == (count, left_out)


def test_own_files(tmp_path):
    rows = [{"q": 'say "a,\nb"', "p": "c", "tags": ["x", "y"]}, {"q": "d", "p": "", "tags": []}]
    lines = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "own.jsonl")
    table = write(tmp_path, 'p,q,tags\nc,"say ""a,\nb""",x; y\n,d,\n', "own.csv")
    (tmp_path / "own.jsonl.xz").write_bytes(lzma.compress(lines.read_bytes()))
    task = own(texts=("q", "p"), label="tags", kind="multi", separator=";")
    read = {name: task.read(tmp_path / name) for name in ("own.jsonl", "own.csv", "own.jsonl.xz")}
    for examples in read.values():
        assert [(one.texts, one.label) for one in examples] == [(('say "a,\nb"', "c"), ("x", "y")), (("d", ""), ())]
    assert [one.where for one in read["own.csv"]] == [f"{table}, line 2", f"{table}, line 4"]
    assert task.labels(read["own.csv"]) == ("x", "y")
    assert [row.target for row in task.rows(read["own.csv"], Making(TINY, 16, ("x", "y")))] == [(1, 1), (0, 0)]


def longest_first(first, second, room):
    """`_truncate_seq_pair` of BERT's run_classifier.py, said again."""
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        (first if len(first) > len(second) else second).pop()
    return first, second


@pytest.mark.parametrize("max_length", [128, 31])
def test_pairs_are_cut_as_bert_does(max_length):
    file = DATA / "tasks" / "glue" / "MNLI" / "dev_full_9815.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    tokenizer, examples = tokenizer_of("bert-base-uncased-vocab.txt"), glue("mnli").read(file)[:3000]
    sides = [tokenizer([one.texts[at] for one in examples], add_special_tokens=False)["input_ids"] for at in (0, 1)]
    cut, odd = 0, 0
    for row, first, second in zip(
        glue("mnli").rows(examples, Making(tokenizer, max_length, FORMATS["mnli"].labels)), *sides, strict=True
    ):
        [text] = row.texts
        ends = [at for at, token in enumerate(text.input_ids) if token == tokenizer.sep_token_id]
        found = [list(text.input_ids[1 : ends[0]]), list(text.input_ids[ends[0] + 1 : ends[1]])]
        assert text.token_type_ids == (0,) * (ends[0] + 1) + (1,) * (ends[1] - ends[0])
        expected = list(longest_first(first, second, max_length - 3))
        if found != expected:  # the odd token: the second text's, which was longer
            assert [len(side) for side in expected] == [max_length // 2 - 1, max_length - 3 - (max_length // 2 - 1)][
                ::-1
            ]
            assert len(second) > len(first)
            expected = [first[: len(expected[0]) - 1], second[: len(expected[1]) + 1]]
            odd += 1
        assert found == expected
        assert row.feature == (len(first) + len(second) > max_length - 3)
        cut += row.feature
    assert cut < 100 if max_length == 128 else cut > 1000
    assert odd < cut / 10


def test_predictions_and_scores(tmp_path):
    rows = [("a", "b", "0"), ("a", "b", "1"), ("a b", "c"), ("", "c", "1")]
    lines = ["question1\tquestion2\tis_duplicate", *("\t".join(row) for row in rows)]
    task = glue("qqp")
    examples = task.read(write(tmp_path, "\n".join(lines), "train.tsv"))
    assert [(at, why.split(", ", 1)[1]) for at, why in task.left_out(examples)] == [
        (2, "line 4: nothing in column 'is_duplicate'"),
        (3, "line 5: an empty text"),
    ]
    making = Making(TINY, 16, task.labels(examples))
    made = task.rows(examples, making)
    assert [row.target for row in made] == [0, 1, None, None]
    logits = np.array([[0, 1], [0, 1], [1, 0], [0, 0]], dtype=np.float32)
    found = task.predictions(examples, made, list(logits), making)
    assert [one.label for one in found[:3]] == ["duplicate", "duplicate", "not_duplicate"]
    assert found[0].probabilities[1] == pytest.approx(1 / (1 + np.exp(-1)))
    assert task.scores(examples, found) == pytest.approx({"accuracy": 50, "f1": 200 / 3})
    record = task.record(examples[0], found[0])
    assert (record["prediction"], record["label"]) == ("duplicate", "not_duplicate")


def test_matched_and_mismatched(tmp_path):
    task = glue("mnli")
    files = [write(tmp_path, MNLI_TSV, f"dev_{kind}.tsv") for kind in ("matched", "mismatched")]
    examples = [example for file in files for example in task.read(file)]
    found = [Prediction(label, (), FORMATS["mnli"].labels) for label in ("neutral", "entailment")]
    assert task.scores(examples, found) == {"accuracy": 50, "matched_accuracy": 100, "mismatched_accuracy": 0}


@pytest.mark.parametrize(
    ("task", "text", "name", "message"),
    [
        (own(), "", "own.csv", "own.csv is empty"),
        (own(), "text,label\n", "own.csv", "own.csv is empty"),
        (own(), "text,lable\na,x\n", "own.csv", "line 2: columns text, label are needed; there are text, lable"),
        (own(), "text,label\na,x\na,b,x\n", "own.csv", "line 3: 1 more fields than columns"),
        (own(), "text\tlabel\na\tx\na\n", "own.tsv", "line 3: nothing in column 'label'"),
        (own(), "text\tlabel\na\tx\na\t\n", "own.tsv", "line 3: label '' is not one label"),
        (own(), '{"text": "a", "label": "x"}\n{"text": 1, "label": "x"}\n', "own.jsonl",
         "line 2: 'text' is not a text"),
        (own(), '\n{"text"\n', "own.jsonl", "line 2: not JSON"),
        (own(), 'text,label\n"a,x\n', "own.csv", "line 2: not CSV"),
        (own(), "text,label,label\na,x,y\n", "own.csv", "line 1: two columns are named 'label'"),
        (own(kind="number"), "text,label\na,1\na,nan\n", "own.csv", "line 3: label 'nan' is not a number"),
        (glue("rte"), "index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", "dev.tsv", "line 2: nothing in column 'label'"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, task, text, name, message):
    with pytest.raises(UserError, match=message) as error:
        task.read(write(tmp_path, text, name))
    assert "\n" not in str(error.value)


def test_a_long_field(tmp_path):
    """Longer than Python's csv module takes by itself."""
    (example,) = own().read(write(tmp_path, f"text,label\n{'a' * 200_000},x\n", "own.csv"))
    assert len(example.texts[0]) == 200_000


def test_bad_settings_and_labels(tmp_path):
    with pytest.raises(UserError, match=r"task.texts: 3 columns"):
        own(texts=("a", "b", "c"))
    dev = own().read(write(tmp_path, "text,label\na,x\nb,z\n", "dev.csv"))
    with pytest.raises(UserError, match=r"dev.csv, line 3: label 'z' is not one of: x, y"):
        own().rows(dev, Making(TINY, 16, ("x", "y")))
    with pytest.raises(UserError, match="no example has a label"):
        glue("ocnli").scores([], [])
