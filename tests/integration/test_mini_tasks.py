"""The tool that fine-tunes the small model on many tasks: what it leaves, what it says of a run that fails, and what is
reached without a model."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_bert.tasks.table import task_class, task_of
from tests.integration.tiny_model import write_tiny_model
from tests.integration.tiny_tasks import sentences, write_ner

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "mini_tasks.py"
CONLL = Path(os.environ.get("MEGATRON_BERT_DATA", ROOT.parent / "shared" / "data")) / "tasks" / "ner" / "conll2003"


@pytest.fixture(scope="module")
def report() -> Any:
    spec = importlib.util.spec_from_file_location("mini_tasks_report", TOOL.with_name("mini_tasks_report.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_sst2(file: Path, period: int) -> None:
    """41 sentences, every `period`-th of class 0, the first one among them."""
    rows = [f"{' '.join(words)}\t{int(at % period > 0)}" for at, words in enumerate(sentences(41, period))]
    file.write_text("\n".join(["sentence\tlabel", *rows]) + "\n")


def test_a_run_that_works_and_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import mini_tasks

    monkeypatch.setattr(mini_tasks.signal, "signal", lambda *_: None)  # this process keeps its own
    sst2, conll = tmp_path / "data/glue/SST-2", tmp_path / "data/ner/conll2003"
    for folder in (sst2, conll):
        folder.mkdir(parents=True)
    for name, period in (("train_full", 3), ("dev", 2), ("test-labeled", 4)):
        write_sst2(sst2 / f"{name}.tsv", period)
    for name in ("train", "dev", "test"):
        write_ner(conll / f"{name}.txt", 9, 1)
    write_tiny_model(tmp_path / "model", max_position_embeddings=256)
    settings = ["training.epochs=1", "training.precision=float32", "runtime.num_workers=0", "ner:optimizer=1"]
    command = [
        str(TOOL), str(tmp_path / "data"), str(tmp_path / "out"), "--gpus", "0", "--per-gpu", "2",
        "--tasks", "sst2,conll2003", "--seeds", "3", "--model", str(tmp_path / "model"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*command, "--set", settings.pop()])
    with pytest.raises(SystemExit) as refused:
        mini_tasks.main()
    assert (refused.value.code, "unknown tasks: ner" in capsys.readouterr().err) == (2, True)
    settings.append("conll2003:training.epochs=-1")
    monkeypatch.setattr(sys, "argv", [*command, *(word for one in settings for word in ("--set", one))])
    assert mini_tasks.main() == 1
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out/results.json").read_text())["tasks"]
    (run,) = found["sst2"]["runs"].values()
    assert run["scores"] == json.loads((tmp_path / "out/sst2/seed-3/scores.json").read_text())
    assert (found["sst2"]["training_examples"], run["steps"]) == (41, 1)
    assert found["conll2003"]["runs"] == {}
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| sst2")]
    always_1 = [pytest.approx(100 * (41 - zeros) / 41, abs=0.05) for zeros in (21, 11)]  # of dev and test
    assert [(*row[1:3], float(row[3]), float(row[5])) for row in rows] == [("41", "accuracy", *always_1)]
    assert "missing: conll2003, seed 3: megatron-bert finetune: error:" in said
    assert "training.epochs" in said


def test_parts_are_put_together_or_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import mini_tasks

    for name, lines in (("a", 3), ("b", 2), ("c", 21)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{at}\n" for at in range(lines)))
    found = mini_tasks.prepared("a.txt+b.txt c.txt", tmp_path, tmp_path / "one")
    assert found["train"].read_text().split() == ["a0", "a1", "a2", "b0", "b1"]
    assert found["validation"] == tmp_path / "c.txt"
    found = mini_tasks.prepared("c.txt c.txt a.txt", tmp_path, tmp_path / "other")
    assert found["validation"].read_text().split() == ["c0", "c1", "c11"]
    rest = found["train"].read_text().split()
    assert rest[0] == "c0"
    assert sorted([*rest[1:], "c1", "c11"]) == sorted(f"c{at}" for at in range(1, 21))


@pytest.mark.skipif(not CONLL.is_dir(), reason="the data is not here")
@pytest.mark.parametrize(("part", "published"), [("dev", (78.33, 65.23, 71.18)), ("test", (71.91, 50.90, 59.61))])
def test_the_dictionary_is_conlls_baseline(report: Any, part: str, published: tuple[float, ...]) -> None:
    """Precision, recall and F1 of Tjong Kim Sang and De Meulder 2003, table 5; the files differ in a few lines."""
    task = task_of("ner", task_class("ner").settings_class())
    scores = report.baseline(task, task.read(CONLL / "train.txt"), task.read(CONLL / f"{part}.txt"))
    assert [scores[name] for name in ("precision", "recall", "f1")] == pytest.approx(published, abs=0.06)
