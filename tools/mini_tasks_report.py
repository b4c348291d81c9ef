"""What `mini_tasks.py` tells of its runs: a task's scores beside those of what needs no model."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_bert.tasks.choice import Prediction as ChosenAnswer
from megatron_bert.tasks.classification import Prediction as PredictedLabel
from megatron_bert.tasks.squad import Prediction as FoundAnswer
from megatron_bert.tasks.squad import Question
from megatron_bert.tasks.table import task_class, task_of
from megatron_bert.tasks.tagging import Sentence
from megatron_bert.tasks.tagging_metrics import entities

SENTENCE_ENDS = "。！？；!?;\n"


def task_result(
    verb: str, files: dict[str, Path], shown: Sequence[str], runs: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """All that is known of a task: `runs` by seed, how many examples they learnt from, and the baselines' scores."""
    task = task_of(verb, task_class(verb).settings_class())
    examples = {part: task.read(file) for part, file in files.items()}
    training = examples.pop("train")
    return {
        "training_examples": len(training) - len(task.left_out(training)),
        "shown": shown,
        "baseline": {part: baseline(task, training, some) for part, some in examples.items()},
        "runs": runs,
    }


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Markdown, a line a score: the median over the seeds, and the least and the most."""
    yield "| task | training examples | score | baseline, dev | mini, dev | baseline, test | mini, test | s a run |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, one in results.items():
        runs = one["runs"].values()
        seconds = f"{statistics.median(run['training_seconds'] for run in runs):.0f}" if runs else ""
        for score in one["shown"]:
            cells = [name, f"{one['training_examples']:,}", score]
            for part in ("validation", "test"):
                known = one["baseline"].get(part)
                reached = spread([run["scores"][part][score] for run in runs]) if known else ""
                cells += [f"{known[score]:.1f}" if known else "", reached]
            yield f"| {' | '.join([*cells, seconds])} |"


def spread(values: Sequence[float]) -> str:
    """Median (least to most)."""
    return f"**{statistics.median(values):.1f}** ({min(values):.1f} to {max(values):.1f})" if values else ""


def baseline(task: Any, training: Sequence[Any], examples: Sequence[Any]) -> dict[str, float]:
    """The scores on `examples` of what needs nothing but counting in `training`: the most frequent label, or letter of
    RACE; the dictionary of CoNLL-2003; of a passage the sentence that has most of the question's characters.
    """
    makers = {"sequence": frequent_label, "choice": frequent_letter, "token": dictionary_tags, "span": likest_sentence}
    scores: dict[str, float] = task.scores(examples, makers[task.head](task, training, examples))
    return scores


def frequent_label(task: Any, training: Sequence[Any], examples: Sequence[Any]) -> list[PredictedLabel]:
    """The training file's most frequent label for every text."""
    label = Counter(one.label for one in training if one.label is not None).most_common(1)[0][0]
    return [PredictedLabel(label, (), task.labels(training))] * len(examples)


def frequent_letter(task: Any, training: Sequence[Any], examples: Sequence[Any]) -> list[ChosenAnswer]:
    """The choice that is most often right in the training file."""
    return [ChosenAnswer(Counter(one.label for one in training).most_common(1)[0][0], ())] * len(examples)


def dictionary_tags(task: Any, training: Sequence[Sentence], examples: Sequence[Sentence]) -> list[list[str]]:
    """CoNLL-2003's baseline (Tjong Kim Sang and De Meulder 2003, section 5): the training file's entities with their
    most frequent class (which the published figures follow from; the text says: with a single one), the longest from
    left to right.
    """
    kinds: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for one in training:
        for kind, first, last in entities(one.tags):
            kinds[one.words[first : last + 1]][kind] += 1
    known = {words: found.most_common(1)[0][0] for words, found in kinds.items()}
    longest = max(map(len, known), default=0)
    return [_tagged(one.words, known, longest) for one in examples]


def _tagged(words: tuple[str, ...], known: dict[tuple[str, ...], str], longest: int) -> list[str]:
    tags: list[str] = []
    while (at := len(tags)) < len(words):
        sizes = range(min(longest, len(words) - at), 0, -1)
        size = next((size for size in sizes if words[at : at + size] in known), 0)
        kind = known.get(words[at : at + size])
        tags += [f"B-{kind}", *[f"I-{kind}"] * (size - 1)] if kind else ["O"]
    return tags


def likest_sentence(task: Any, training: Sequence[Question], examples: Sequence[Question]) -> list[FoundAnswer]:
    """The passage's sentence with the most different characters of the question; of equal ones the shortest."""
    return [FoundAnswer(_likest(one), 0.0, ()) for one in examples]


def _likest(one: Question) -> str:
    text = one.context
    for end in SENTENCE_ENDS:
        text = text.replace(end, "\n")
    asked = set(one.question)
    sentences = [sentence.strip() for sentence in text.split("\n") if sentence.strip()]
    return max(sentences, key=lambda sentence: (len(asked & set(sentence)), -len(sentence)), default="")
