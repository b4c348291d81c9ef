"""A fine-tuning run's configuration: one YAML file, like pretraining's; `runtime` and `mesh` change no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, create_model, model_validator

from megatron_bert.tasks.task import Task, TaskSettings
from megatron_bert.training.configuration import (
    ComputeSection,
    MeshSection,
    ModelFolder,
    OptimizerSection,
    Section,
    refuse_overlap_of_any_shape,
)

__all__ = [
    "FinetuneConfiguration",
    "FinetuneDataSection",
    "FinetuneModelSection",
    "FinetuneTrainingSection",
    "LoraSection",
    "configuration_of",
]


class FinetuneModelSection(Section):
    """The network to start from, which gets the task's head."""

    start_from: ModelFolder  # a Transformers folder, or mini: weights, shape and tokenizer
    new_head: bool = False  # leave out the head that the folder may have from another fine-tuning
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1)


class FinetuneDataSection(Section):
    """Files in the task's format."""

    train: Path
    validation: Path  # chooses the best checkpoint
    test: Path | None = None  # is scored once, at the end
    max_length: int = Field(128, ge=8)  # tokens of a text, special tokens included


class FinetuneTrainingSection(Section):
    """How long, how much at a time, from which seeds."""

    epochs: float = Field(gt=0, allow_inf_nan=False)
    warmup_share: float = Field(0.1, ge=0, lt=1)  # of the steps; the learning rate rises linearly from 0
    batch_samples: int = Field(gt=0)  # of one step, over all ranks
    evaluations_per_epoch: int = Field(1, gt=0)  # on the validation file, besides at the end
    patience: int | None = Field(None, gt=0)  # evaluations in a row without a better score that end the run
    seeds: list[int] = Field([1234], min_length=1)  # of head, order and dropout; several: a run each, and the median
    precision: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights and optimizer stay float32

    @model_validator(mode="after")
    def _seeds_are_different(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or not all(0 <= seed < 2**63 for seed in self.seeds):
            raise ValueError(f"seeds {self.seeds}: different numbers from 0 on are wanted")
        return self


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): they and the head are trained, all else stays."""

    rank: int = Field(8, gt=0)
    alpha: float = Field(16, gt=0)  # an adapter's product is scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # of an adapter's input
    targets: list[str] = Field(["query", "value"], min_length=1)  # the last names of the modules that get one


class FinetuneConfiguration(Section):
    """A run. Every key of a recipe is a field here or below."""

    output: Path  # folder of the run: recipe.yaml, metrics.jsonl, model/
    model: FinetuneModelSection
    data: FinetuneDataSection
    task: TaskSettings = TaskSettings()
    optimizer: OptimizerSection
    training: FinetuneTrainingSection
    lora: LoraSection | None = None
    runtime: ComputeSection = ComputeSection()
    mesh: MeshSection = MeshSection()

    @model_validator(mode="after")
    def _overlap_has_shapes(self) -> Self:
        refuse_overlap_of_any_shape(self.runtime, self.mesh)
        return self

    @property
    def seed(self) -> int:
        """Of a run of one seed."""
        assert len(self.training.seeds) == 1
        return self.training.seeds[0]

    def runs(self) -> list[Self]:
        """A run for each seed, each in a folder of its own where there are several."""
        seeds = self.training.seeds
        if len(seeds) == 1:
            return [self]
        return [
            self.model_copy(
                update={
                    "output": self.output / f"seed-{seed}",
                    "training": self.training.model_copy(update={"seeds": [seed]}),
                }
            )
            for seed in seeds
        ]


def configuration_of(task: type[Task[Any, Any]]) -> type[FinetuneConfiguration]:
    """The configuration whose section `task` is the task's own."""
    settings: Any = (task.settings_class, task.settings_class())
    made: type[FinetuneConfiguration] = create_model(
        "FinetuneConfiguration", __base__=FinetuneConfiguration, task=settings
    )
    return made
