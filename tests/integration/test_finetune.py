"""Fine-tuning, by the command's own verbs: what comes out works in Transformers, and nothing is lost on the way."""

import json
import math
import os
import shutil
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tools.kill_and_resume import compare
from torch.nn import functional

from megatron_bert.checkpoint.native import list_checkpoints
from megatron_bert.cli.main import main
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.training import metrics
from megatron_bert.training.supervised import SupervisedObjective
from tests.integration.tiny_tasks import prepare_tasks, write_qa, write_task_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    prepare_tasks(folder)
    return folder


def finetune(folder: Path, task: str, name: str, *words: str, **changes: Any) -> Path:
    recipe = write_task_recipe(folder, task, name, **changes)
    assert main(["finetune", task, str(recipe), "--json", *words]) == 0
    return folder / name


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def scores(run: Path) -> dict[str, float]:
    return json.loads((run / "scores.json").read_text())["validation"]  # type: ignore[no-any-return]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def theirs(run: Path, kind: Any) -> tuple[Any, Any]:
    """Transformers' own class and tokenizer, from the folder that was left."""
    model, report = kind.from_pretrained(run / "model", output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval(), transformers.AutoTokenizer.from_pretrained(run / "model")


@pytest.fixture(scope="module")
def tagger(folder: Path) -> Path:
    return finetune(folder, "ner", "tagger", training__epochs=12, data__test=str(folder / "ner-dev.txt"))


def test_a_tagger_learns_and_works_in_a_pipeline(tagger: Path) -> None:
    assert scores(tagger)["f1"] > 95
    model, tokenizer = theirs(tagger, transformers.MegatronBertForTokenClassification)
    assert sorted(model.config.label2id) == ["B-LAND", "B-LOC", "O"]
    find = transformers.pipeline("ner", model=model, tokenizer=tokenizer, aggregation_strategy="simple")
    assert [(one["entity_group"], one["word"]) for one in find("the old city in london")] == [("LOC", "london")]
    assert (tagger / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(lines(tagger / "predictions-validation.jsonl")) == 33
    assert lines(tagger / "predictions-test.jsonl") == lines(tagger / "predictions-validation.jsonl")


def test_the_best_checkpoint_is_the_one_that_is_left(tagger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first of the highest scores; later ones fall out of the last three before the end."""
    measured = [record["f1"] for record in records(tagger, "validation")]
    assert scores(tagger)["f1"] == max(measured)
    assert main(["finetune", "ner", str(tagger.parent / "tagger.yaml"), "--json"]) == 0  # it is finished
    best = json.loads(capsys.readouterr().out)["runs"][0]["best_step"]
    assert best == 6 * (measured.index(max(measured)) + 1)
    assert f"step-{best:08d}" in [path.name for path in list_checkpoints(tagger)]


def test_evaluate_gives_the_same_scores(tagger: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    words = ["--model", str(tagger / "model"), "--data", str(folder / "ner-dev.txt"), "--json", "--batch-tokens", "50",
             "--dtype", "float32"]  # fmt: skip
    assert main(["evaluate", "ner", *words, "--output", str(folder / "again.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in ("precision", "recall", "f1")} == {
        name: scores(tagger)[name] for name in ("precision", "recall", "f1")
    }
    assert lines(folder / "again.jsonl") == lines(tagger / "predictions-validation.jsonl")


def test_a_classifier_and_its_loss(folder: Path) -> None:
    """The loss of packed batches is that of Transformers' class on padded rows; its pipeline gives the predictions."""
    run = finetune(folder, "classify", "classifier", training__epochs=4)
    model, tokenizer = theirs(run, transformers.MegatronBertForSequenceClassification)
    assert model.config.problem_type == "single_label_classification"
    texts, labels = zip(*(line.rsplit(",", 1) for line in (folder / "classify-dev.csv").read_text().split("\n")[1:-1]),
                        strict=True)  # fmt: skip
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True)
    with torch.no_grad():
        loss = model(**inputs, labels=torch.tensor([model.config.label2id[label] for label in labels])).loss
    assert scores(run)["loss"] == pytest.approx(loss.item(), rel=1e-5)
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    predicted = [one["label"] for one in classify(list(texts))]
    assert predicted == [line["prediction"] for line in lines(run / "predictions-validation.jsonl")]
    words = ["--model", str(run / "model"), "--data", str(folder / "classify-dev.csv"), "--plot", str(folder / "c.png")]
    assert main(["evaluate", "classify", *words]) == 0
    assert (folder / "c.png").read_bytes().startswith(b"\x89PNG")


def test_answers(folder: Path) -> None:
    """The loss is that of Transformers' class on rows without padding, whose best span is the answer."""
    run = finetune(folder, "squad", "answers", training__epochs=8)
    model, tokenizer = theirs(run, transformers.MegatronBertForQuestionAnswering)
    total = 0.0
    questions, found = lines(folder / "squad-dev.jsonl"), lines(run / "predictions-validation.jsonl")
    for question, ours in zip(questions, found, strict=True):
        inputs = tokenizer(question["question"], question["context"], return_tensors="pt")
        start = question["answers"][0]["answer_start"]
        token = torch.tensor([inputs.char_to_token(0, start, sequence_index=1)])
        with torch.no_grad():
            output = model(**inputs, start_positions=token, end_positions=token)
        total += output.loss.item()
        passage = [at for at, side in enumerate(inputs.sequence_ids()) if side == 1]
        spans = {(first, last): (output.start_logits[0, first] + output.end_logits[0, last]).item()
                 for first in passage for last in passage if first <= last < first + 30}  # fmt: skip
        first, last = max(spans, key=spans.__getitem__)
        characters = slice(inputs.token_to_chars(first).start, inputs.token_to_chars(last).end)
        assert question["context"][characters] == ours["prediction"]
    assert scores(run)["loss"] == pytest.approx(total / len(questions), rel=1e-5)


def test_a_threshold_for_no_answer_is_chosen_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(write_qa(folder / f"null-{seed}.jsonl", 48, seed, unanswerable=True)) for seed in (1, 2)]
    run = finetune(folder, "squad", "threshold", data__train=files[0], data__validation=files[1], training__epochs=2)
    kept = json.loads((run / "model" / "task.json").read_text())["settings"]["null_threshold"]
    assert math.isfinite(kept)
    assert scores(run)["f1"] == pytest.approx(records(run, "validation")[-1]["f1"])
    capsys.readouterr()
    words = ["--model", str(run / "model"), "--data", files[1], "--json", "--dtype", "float32"]
    assert main(["evaluate", "squad", *words]) == 0
    assert json.loads(capsys.readouterr().out)["f1"] == pytest.approx(scores(run)["f1"])


def test_choices(folder: Path) -> None:
    """The loss is Transformers' on padded rows of four choices."""
    run = finetune(folder, "race", "choices", training__epochs=2, runtime__micro_batch_samples=5)
    model, tokenizer = theirs(run, transformers.MegatronBertForMultipleChoice)
    questions = lines(folder / "race-dev.jsonl")
    logits = []
    for question in questions:
        asked = [question["questions"][0].replace("_", option) for option in question["options"][0]]
        inputs = tokenizer(asked, [question["article"]] * 4, return_tensors="pt", padding=True)
        with torch.no_grad():
            logits.append(model(**{name: value[None] for name, value in inputs.items()}).logits[0])
    wanted = torch.tensor(["ABCD".index(question["answers"][0]) for question in questions])
    assert scores(run)["loss"] == pytest.approx(functional.cross_entropy(torch.stack(logits), wanted).item(), rel=1e-5)
    right = (torch.stack(logits).argmax(-1) == wanted).float().mean()
    assert scores(run)["accuracy"] == pytest.approx(100 * right.item())


def test_micro_batches_and_workers_change_no_loss(folder: Path) -> None:
    knobs = ({"micro_batch_samples": 16, "num_workers": 0}, {"micro_batch_samples": 3, "num_workers": 2})
    runs = [
        finetune(folder, "classify", f"micro-{at}", **{f"runtime__{name}": value for name, value in some.items()})
        for at, some in enumerate(knobs)
    ]
    one, other = ([record["loss"] for record in records(run, "training")] for run in runs)
    assert one == pytest.approx(other, rel=1e-5)


def test_stopped_killed_and_gone_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout: bit for bit the run that was not interrupted, after SIGTERM in the middle of an epoch, and from
    the checkpoint before the last ones, as after SIGKILL."""
    options = {"model__hidden_dropout_prob": 0.1, "training__epochs": 3, "runtime__checkpoint_every_steps": 4}
    whole = finetune(folder, "ner", "whole", **options)
    done, step_done = [0], metrics.MetricsSink.step_done

    def counted(sink: metrics.MetricsSink) -> None:
        done[0] += 1
        if done[0] == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        step_done(sink)

    monkeypatch.setattr(metrics.MetricsSink, "step_done", counted)
    stopped = finetune(folder, "ner", "stopped", **options)
    assert not (stopped / "model").exists()
    assert list_checkpoints(stopped)[0].name == "step-00000009"
    finetune(folder, "ner", "stopped", **options)
    assert not compare(whole, stopped)
    shutil.copytree(whole, folder / "killed", ignore=shutil.ignore_patterns("model", "step-0000001[68]"))
    finetune(folder, "ner", "killed", **options)
    assert not compare(whole, folder / "killed")


def test_a_step_that_is_not_finite_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mean, calls = SupervisedObjective.mean, [0]

    def poisoned(self: SupervisedObjective, *args: Any) -> torch.Tensor:
        calls[0] += 1
        return mean(self, *args) * (float("nan") if calls[0] == 2 else 1.0)

    monkeypatch.setattr(SupervisedObjective, "mean", poisoned)
    run = finetune(folder, "classify", "skipping", training__precision="bfloat16")
    assert [record["step"] for record in records(run, "skipped")] == [2]
    assert math.isfinite(scores(run)["loss"])


def test_a_changed_file_or_knob_is_refused(folder: Path, tagger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(folder / "tagger.yaml")
    for change, said in (
        ("optimizer.learning_rate=1", "optimizer.learning_rate was 0.003, is 1"),
        (f"data.train={folder / 'ner-dev.txt'}", "data.train was content"),
    ):
        assert main(["finetune", "ner", recipe, "--set", change]) == 2
        assert said in capsys.readouterr().err


def test_several_seeds_and_their_median(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finetune(folder, "classify", "seeds", training__seeds=[1, 2, 3])
    report = json.loads(capsys.readouterr().out)
    found = [scores(run / f"seed-{seed}")["accuracy"] for seed in (1, 2, 3)]
    assert report["median"]["validation"]["accuracy"] == statistics.median(found)
    assert json.loads((run / "scores.json").read_text()) == report
    heads = [load_file(run / f"seed-{seed}" / "model" / "model.safetensors")["classifier.weight"] for seed in (1, 2)]
    assert not torch.equal(*heads)


def test_it_stops_early(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a learning rate of next to nothing the first evaluation stays the best."""
    run = finetune(
        folder, "classify", "early", training__epochs=9, training__patience=2, optimizer__learning_rate=1e-12,
        runtime__log_every_steps=4,
    )  # fmt: skip
    assert [record["step"] for record in records(run, "validation")] == [6, 12, 18]
    assert records(run, "training")[-1]["step"] == 18
    assert (run / "model").is_dir()
    capsys.readouterr()
    assert main(["finetune", "classify", str(folder / "early.yaml"), "--json"]) == 0
    said = capsys.readouterr().err
    assert "is finished: nothing got better for too long, after 18 of 54 steps; --overwrite starts over, and" in said
    assert "--set training.patience=N with --allow training.patience goes on" in said


def test_lora(folder: Path) -> None:
    """The adapter on the checkpoint, as `peft` loads it, and the merged model say the same; nothing else moved."""
    import peft

    run = finetune(
        folder, "ner", "lora", lora__rank=4, lora__targets=["query", "value", "dense"], training__epochs=2,
        model__hidden_dropout_prob=0.1, lora__dropout=0.1,
    )  # fmt: skip
    merged, tokenizer = theirs(run, transformers.MegatronBertForTokenClassification)
    start, changed = (load_file(path / "model.safetensors") for path in (folder / "start", run / "model"))
    same = {name for name in start if name in changed and torch.equal(start[name], changed[name])}
    moved = {name.split(".")[-2] for name in changed if name not in same}
    assert moved == {"query", "value", "dense", "classifier"}
    base = transformers.MegatronBertForTokenClassification.from_pretrained(
        folder / "start", num_labels=3, attn_implementation="eager"
    )
    adapted = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    inputs = tokenizer(["the river thames is in england", "to paris"], return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-5)
    finetune(folder, "ner", "lora", "--overwrite", training__epochs=0.1)
    assert not (run / "adapter").exists()  # it belongs to the run that was


@pytest.mark.parametrize(
    ("task", "file", "text", "message"),
    [
        ("ner", "train", "", "is empty"),
        ("ner", "train", "paris\n", "line 1: a word and its tag are expected"),
        ("ner", "validation", "paris B-LOC\nlondon B-TOWN\n", "line 2: label 'B-TOWN' is not one of: O, "),
        ("classify", "train", "words,kind\nthe,loc\n", "columns text, label are needed"),
        ("classify", "train", "text,label\nthe,loc\nold,loc\n", "has the one label loc: there is nothing to tell"),
        ("classify", "validation", "text,label\nthe,loc\nold,town\n", "line 3"),
        ("squad", "train", "{}\n", 'line 1: "question", "context" and "answers"'),
        ("race", "train", "{}\n", "line 1"),
    ],
)
def test_bad_files(
    folder: Path, tmp_path: Path, task: str, file: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = {"ner": "txt", "classify": "csv"}.get(task, "jsonl")
    (tmp_path / f"bad.{suffix}").write_text(text)
    recipe = write_task_recipe(folder, task, "bad")
    assert main(["finetune", task, str(recipe), "--set", f"data.{file}={tmp_path}/bad.{suffix}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"bad.{suffix}" in said[0]
    assert message in said[0]
    assert not (folder / "bad").exists()


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("squad", ["task.stride=null", "data.max_length=12"], "only"),
        ("squad", ["data.max_length=65"], "data.max_length 65 is more than the 64 positions"),
        ("squad", ["task.strde=3"], "unknown key task.strde (did you mean task.stride?)"),
        ("ner", ["lora.rnk=3"], "unknown key lora.rnk (did you mean lora.rank?)"),
        ("ner", ["lora.targets=[nothing]"], "lora.targets ['nothing']"),
        ("ner", ["data.train=nowhere"], "data.train nowhere: no such file"),
        ("ner", ["task.lr=1"], "unknown key task.lr (task has no keys)"),
        ("ner", ["model.start_from=RUN"], "no config.json in it (did you mean"),
        ("ner", ["training.seeds=[1,1]"], "different numbers"),
        ("classify", ["task.kind=multi", "data.train=BARE"], "bare.csv has no label: there is nothing to tell apart"),
        ("ner", ["model.start_from=TAGGER", "data.train=OTHER"], "is for O, B-LAND, B-LOC; set model.new_head=true"),
    ],
)
def test_bad_recipes(
    folder: Path, tagger: Path, task: str, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "other.txt").write_text("paris B-TOWN\n")
    (folder / "bare.csv").write_text("text,label\nthe,\nold,\n")
    names = {"TAGGER": tagger / "model", "RUN": tagger, "OTHER": folder / "other.txt", "BARE": folder / "bare.csv"}
    for name, path in names.items():
        settings = [setting.replace(name, str(path)) for setting in settings]
    recipe = write_task_recipe(folder, task, "bad")
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["finetune", task, str(recipe), *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]


def test_evaluating_what_does_not_fit(folder: Path, tagger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "town.txt").write_text("paris B-TOWN\n")
    for task, model, data, message in (
        ("ner", tagger / "model", "town.txt", "town.txt, line 1: label 'B-TOWN'"),
        ("ner", folder / "start", "ner-dev.txt", "has no head for ner"),
        ("squad", tagger / "model", "squad-dev.jsonl", "has no head for squad"),
        ("ner", tagger, "ner-dev.txt", f"did you mean {tagger / 'model'}?"),
    ):
        assert main(["evaluate", task, "--model", str(model), "--data", str(folder / data)]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main(["convert", str(tagger), str(folder / "converted")]) == 2
    assert "is of a fine-tuning run" in capsys.readouterr().err


def test_evaluating_a_head_of_other_outputs_or_no_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "sst2.tsv").write_text("sentence\tlabel\nthe city\t1\n")
    (folder / "stsb.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": 1.5}\n')
    kind = transformers.MegatronBertForSequenceClassification
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    for name, options in (("labels", labels), ("number", {"num_labels": 1, "problem_type": "regression"})):
        kind.from_pretrained(folder / "start", **options).save_pretrained(folder / name)
        shutil.copy(folder / "start/tokenizer.json", folder / name)
    damaged = load_file(folder / "labels/model.safetensors")
    damaged["bert.encoder.ln.bias"][3] = float("nan")
    shutil.copytree(folder / "labels", folder / "nan")
    save_file(damaged, folder / "nan/model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    for task, model, data, message in (
        ("stsb", "labels", "stsb.jsonl", "its head of 2 outputs is none for the numbers of stsb"),
        ("sst2", "number", "sst2.tsv", "its head of 1 outputs is none for the labels of sst2"),
        ("sst2", "nan", "sst2.tsv", "the model's scores are not numbers in "),
    ):
        assert main(["evaluate", task, "--model", str(folder / model), "--data", str(folder / data)]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert main(["evaluate", "sst2", "--model", str(folder / "labels"), "--data", str(folder / "sst2.tsv")]) == 0


def test_evaluating_a_head_whose_labels_have_no_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Transformers' own examples leave it: of GLUE's tasks with numbers in the files, those are meant."""
    model = transformers.MegatronBertForSequenceClassification.from_pretrained(folder / "start")
    model.save_pretrained(folder / "unnamed")
    shutil.copy(folder / "start/tokenizer.json", folder / "unnamed")
    tokens = load_tokenizer(folder / "unnamed")("the city", return_tensors="pt")
    with torch.no_grad():
        number = int(model.eval()(**tokens).logits.argmax())
    (folder / "unnamed.tsv").write_text(f"sentence\tlabel\nthe city\t{number}\nthe city\t{1 - number}\n")
    words = ["evaluate", "sst2", "--model", str(folder / "unnamed"), "--data", str(folder / "unnamed.tsv")]
    assert main([*words, "--output", str(folder / "unnamed.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 50.0
    assert [line["prediction"] for line in lines(folder / "unnamed.jsonl")] == 2 * [("negative", "positive")[number]]
    (folder / "mnli.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}\n')
    assert main([*words[:1], "mnli", *words[2:4], "--data", str(folder / "mnli.jsonl")]) == 2  # whose order differs


def test_misplaced_answers_are_counted_and_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = lines(folder / "squad-train.jsonl")
    for question in good[:5]:
        question["answers"][0]["answer_start"] += 1
    (folder / "misplaced.jsonl").write_text("".join(json.dumps(question) + "\n" for question in good))
    finetune(folder, "squad", "misplaced", data__train=str(folder / "misplaced.jsonl"))
    said = capsys.readouterr().err
    assert "5 of 96 examples of" in said
    assert "misplaced.jsonl, line 1: the answer" in said
    assert "91 examples (91 rows) to train on" in said
