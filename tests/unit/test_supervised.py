"""The objective of tasks beside Transformers' own classes on padded rows, and how samples become batches."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from megatron_bert.data.batches import BatchLayout, Position, _apart, _joined
from megatron_bert.data.labelled import LabelledIndex, LabelledSample, LabelledTexts, Row, Text, collate_labelled
from megatron_bert.data.masking import IGNORED
from megatron_bert.model import MegatronBertConfig
from megatron_bert.tasks.splits import Batches, Split
from megatron_bert.training.microbatch import FixedShapes, LabelledBatch
from megatron_bert.training.supervised import HEADS, Head, Problem, SupervisedObjective, target_kind

CPU, LENGTHS, ROW_TOKENS = torch.device("cpu"), (7, 3, 12, 5), 16
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
         "max_position_embeddings": 12, "initializer_range": 0.2}  # fmt: skip
CASES: list[tuple[Head, Problem | None, int]] = [
    ("sequence", "single_label_classification", 3), ("sequence", "multi_label_classification", 3),
    ("sequence", "regression", 1), ("token", None, 3), ("span", None, 2), ("choice", None, 2),
]  # fmt: skip
THEIRS: dict[Head, Any] = {
    "sequence": transformers.MegatronBertForSequenceClassification,
    "token": transformers.MegatronBertForTokenClassification,
    "span": transformers.MegatronBertForQuestionAnswering,
    "choice": transformers.MegatronBertForMultipleChoice,
}


def rows(head: Head, problem: Problem | None) -> list[Row]:
    """Four texts, the last one's target not known; as choices two rows of two."""
    random = np.random.default_rng(3)
    texts = [Text(tuple(random.integers(5, 64, length).tolist()), (0,) * (length - 2) + (1,) * 2) for length in LENGTHS]
    if head == "choice":
        return [Row(0, (texts[0], texts[1]), 1), Row(1, (texts[2], texts[3]), 0)]
    targets: dict[Any, list[Any]] = {
        "token": [(IGNORED, *random.integers(0, 3, length - 2).tolist(), IGNORED) for length in LENGTHS],
        "span": [(1, 4), (0, 0), (3, 9), (2, 2)],
        "single_label_classification": [2, 0, 1, 1],
        "multi_label_classification": [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0, 1.0)],
        "regression": [0.5, -2.0, 3.0, 1.0],
    }
    known = targets[problem or head][:3]
    return [Row(at, (text,), target) for at, (text, target) in enumerate(zip(texts, [*known, None], strict=True))]


def samples(made: list[Row]) -> list[LabelledSample]:
    texts = LabelledTexts(made)
    index = LabelledIndex(texts, None)
    return [texts.build(index.plan(at)) for at in range(len(made))]  # type: ignore[misc]


def their_loss(model: Any, head: Head, made: list[Row]) -> float:
    """On padded rows; a span's, whose loss counts padding, row by row."""
    known = [row for row in made if row.target is not None]
    texts = [torch.tensor(text.input_ids) for row in known for text in row.texts]
    types = [torch.tensor(text.token_type_ids) for row in known for text in row.texts]
    if head == "span":
        losses = [
            model(input_ids=one[None], token_type_ids=kind[None], start_positions=torch.tensor(row.target[:1]),
                  end_positions=torch.tensor(row.target[1:])).loss.item()
            for one, kind, row in zip(texts, types, known, strict=True)
        ]  # fmt: skip
        return float(np.mean(losses))
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = {"input_ids": pad(texts, batch_first=True), "token_type_ids": pad(types, batch_first=True),
              "attention_mask": pad([torch.ones_like(one) for one in texts], batch_first=True)}  # fmt: skip
    if head == "choice":
        inputs = {name: value.view(len(known), 2, -1) for name, value in inputs.items()}
    if head == "token":
        labels = pad([torch.tensor(row.target) for row in known], batch_first=True, padding_value=IGNORED)
    else:
        labels = torch.tensor([row.target for row in known])
    return model(**inputs, labels=labels).loss.item()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("head", "problem", "num_labels"), CASES)
def test_the_loss_is_transformers(head: Head, problem: Problem | None, num_labels: int) -> None:
    """End to end, in rows of a fixed length, and there filled up: the same loss, gradient and outputs."""
    torch.manual_seed(0)
    ours = HEADS[head](MegatronBertConfig(**SHAPE, num_labels=num_labels, problem_type=problem)).eval()
    theirs = THEIRS[head](transformers.MegatronBertConfig(**SHAPE, num_labels=num_labels, problem_type=problem)).eval()
    theirs.load_state_dict(ours.state_dict())
    made = rows(head, problem)
    first, *others = samples(made)
    kind = target_kind(head, problem)
    packings = [
        (collate_labelled([[first, *others]], kind, num_labels, 0), None),
        (collate_labelled([[None], [first], others], kind, num_labels, 0), None),
        (collate_labelled([[first, *others[:1]], [*others[1:]], []], kind, num_labels, 0, 32, 12),
         FixedShapes(3, 32, 0.0, 12)),
    ]  # fmt: skip
    seen = []
    for batch, shapes in packings:
        objective = SupervisedObjective(ours, CPU, head, problem, shapes=shapes)
        micro = objective.micro_batch(_apart(_joined(batch)))  # as it comes from a worker
        losses, outputs = objective.predicted(micro)
        ours.zero_grad()
        objective.mean(losses, objective.numbers(micro)).backward()
        mean = objective.sums(losses, micro).means()["loss"]
        assert mean == pytest.approx(their_loss(theirs, head, made), rel=1e-5)
        gradient = ours.bert.encoder.layer[0].output.dense.weight.grad.clone()
        seen.append((outputs, gradient))
        assert micro.num_tokens == sum(LENGTHS)
        assert micro.rows == tuple(range(len(made)))
    for outputs, gradient in seen[1:]:
        torch.testing.assert_close(outputs, seen[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, seen[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("head", "problem", "num_labels"), CASES)
def test_a_batch_without_samples(head: Head, problem: Problem | None, num_labels: int) -> None:
    """What a rank has of a step that another one's samples have used up."""
    model = HEADS[head](MegatronBertConfig(**SHAPE, num_labels=num_labels, problem_type=problem)).eval()
    objective = SupervisedObjective(model, CPU, head, problem)
    micro = objective.micro_batch(collate_labelled([[None]], target_kind(head, problem), num_labels, 0))
    losses, outputs = objective.predicted(micro)
    objective.mean(losses, objective.numbers(micro)).backward()
    assert losses.task.item() == 0.0
    assert outputs == []
    assert objective.numbers(micro) == (0,)
    assert not model.bert.encoder.layer[0].output.dense.weight.grad.any()


class Choosing:
    """What batches ask of a task."""

    head = "choice"

    def problem(self) -> None:
        """None of its own."""


@pytest.mark.parametrize("limit", [2, 8])
def test_packed_batches_have_one_shape(limit: int) -> None:
    """Of a compiled model: every row once, in training and after it, and nowhere a position that no text has."""
    random = np.random.default_rng(1)
    made = [
        Row(at, tuple(Text((7,) * length, (0,) * length) for length in random.integers(30, 50, 4)), at % 4)
        for at in range(40)
    ]
    split = Split(made, made, LabelledTexts(made))
    longest = max(len(text.input_ids) for row in made for text in row.texts)
    layout = BatchLayout(8, limit, packing=True)
    batches = Batches.of(Choosing(), 1, 0, layout, [split], 5)  # type: ignore[arg-type]
    steps = batches.steps(split, 5, Position(), num_workers=0, pin=False)
    epoch = [batch for step in islice(steps, 5) for batch in step.micro_batches]
    shapes = FixedShapes(batches.layout.micro_samples, batches.row_tokens, 0.0, batches.text_tokens)
    assert batches.row_tokens <= -(-limit * split.longest // 64) * 64
    for seen in (epoch, list(batches.once(split))):
        assert {batch["input_ids"].shape for batch in seen} == {(1, batches.row_tokens)}
        assert max(int(batch["position_ids"].max()) for batch in seen) == longest - 1
        micro = [LabelledBatch.of(batch, shapes) for batch in seen]
        assert sorted(row for one in micro for row in one.rows) == list(range(40))
        assert {one.layout.max_length for one in micro if one.layout} == {longest}
        assert all(max(one.layout.lengths) <= longest for one in micro if one.layout)
    steps.close()


def test_every_epoch_has_every_row_once_in_another_order() -> None:
    texts = LabelledTexts(rows("sequence", "regression") * 5)
    epochs = [[index.plan(at).spans[0][0] for at in range(20)] for index in (LabelledIndex(texts, 1, 0),
              LabelledIndex(texts, 1, 1), LabelledIndex(texts, 2, 0), LabelledIndex(texts, 1, 0))]  # fmt: skip
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] == epochs[3]
    assert epochs[0] != epochs[1]
    assert epochs[0] != epochs[2]
