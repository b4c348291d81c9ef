"""What a fine-tuning run is made of: files, processes, and the model with its optimizer at the beginning or where a
checkpoint left it.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_bert.checkpoint.folder import check_config
from megatron_bert.checkpoint.native import read_state
from megatron_bert.data.batches import BatchLayout
from megatron_bert.data.content import content_of_model
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertPreTrainedModel
from megatron_bert.parallel.launch import agreed
from megatron_bert.parallel.materialize import initialize, materialize
from megatron_bert.tasks.adapter import fill_adapters, put_adapters
from megatron_bert.tasks.configuration import FinetuneConfiguration
from megatron_bert.tasks.network import empty_task_network, fill_task_network, labels_of_head, task_network_config
from megatron_bert.tasks.splits import Batches, Split, open_split
from megatron_bert.tasks.table import task_of
from megatron_bert.tasks.task import Making, Task
from megatron_bert.training.configuration import TrainingSection
from megatron_bert.training.execution import make_ready, pass_graphs, should_compile
from megatron_bert.training.microbatch import FixedShapes
from megatron_bert.training.ranks import Ranks
from megatron_bert.training.setup import begun_state, laid_out
from megatron_bert.training.state import TrainState
from megatron_bert.training.supervised import SupervisedObjective

__all__ = ["Inputs", "RunSetup", "open_inputs"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What all runs of a configuration share, whatever their seed.

    contents: what decides a result besides the recipe: tokenizer and files, by dotted key.
    """

    name: str
    task: Task[Any, Any]
    device: torch.device
    ranks: Ranks
    tokenizer: PreTrainedTokenizerBase
    making: Making
    config: MegatronBertConfig
    training: Split
    validation: Split
    test: Split | None
    contents: Mapping[str, Any]

    @property
    def num_outputs(self) -> int:
        """Of the head."""
        number = self.config.num_labels
        assert number
        return number


def open_inputs(name: str, configuration: FinetuneConfiguration, device: torch.device) -> Inputs:
    """Reads the files of the task of this name, on all processes that have joined.

    Raises:
        UserError: the processes do not fit the mesh, a file cannot be used, or the checkpoint's head has other labels.
    """
    ranks = laid_out(configuration, configuration.model, device)
    if configuration.lora and ranks.mesh is not None and ranks.mesh.tensor_degree > 1:
        raise UserError("lora with mesh.tensor: adapters are not split over tensor-parallel processes; leave one out")
    return agreed(lambda: _read(name, configuration, device, ranks))


def _read(name: str, configuration: FinetuneConfiguration, device: torch.device, ranks: Ranks) -> Inputs:
    data, start_from = configuration.data, configuration.model.start_from
    if not start_from.is_dir():
        raise UserError(f"model.start_from {start_from}: no such folder")
    check_config(start_from)
    task = task_of(name, configuration.task)
    files = {"train": data.train, "validation": data.validation, **({"test": data.test} if data.test else {})}
    for key, file in files.items():
        if not file.exists():
            raise UserError(f"data.{key} {file}: no such file")
    tokenizer = load_tokenizer(start_from)
    progress = partial(tqdm, unit="file", delay=2, leave=False, disable=None if ranks.is_first else True)
    examples = {key: task.read(file) for key, file in progress(files.items(), desc="reading")}
    labels = _labels(task, examples["train"], configuration)
    config = task_network_config(configuration, task, labels, tokenizer)
    making = Making(tokenizer, data.max_length, labels)
    splits = {
        key: open_split(task, file, examples[key], making, training=key == "train")
        for key, file in progress(files.items(), desc="making rows")
    }
    contents = {f"data.{key}": _content_of(file) for key, file in files.items()}
    contents |= {"data.tokenizer": fingerprint(tokenizer.backend_tokenizer), "task.name": name}
    return Inputs(
        name, task, device, ranks, tokenizer, making, config, splits["train"], splits["validation"],
        splits.get("test"), contents,
    )  # fmt: skip


def _content_of(path: Path) -> str:
    """A SHA-256 of a file, or of all that a folder holds."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _labels(task: Task[Any, Any], training: list[Any], configuration: FinetuneConfiguration) -> tuple[str, ...]:
    """Those of the training file; in the order of the head that the checkpoint has already, if it has one."""
    labels, start_from = task.labels(training), configuration.model.start_from
    least = {"single_label_classification": 2, "multi_label_classification": 1}.get(task.problem() or "", 0)
    if len(labels) < least:
        said = f"the one label {labels[0]}" if labels else "no label"
        raise UserError(f"{configuration.data.train} has {said}: there is nothing to tell apart")
    has = None if configuration.model.new_head else labels_of_head(start_from, task.head)
    if has is None or has == labels or task.problem() == "regression":
        return labels
    if sorted(has) != sorted(labels):
        raise UserError(
            f"{configuration.data.train} has the labels {', '.join(labels)}, and the head of model.start_from "
            f"{start_from} is for {', '.join(has)}; set model.new_head=true to leave that head out"
        )
    return has


@dataclass(frozen=True)
class RunSetup:
    """A run of one seed before it has a state."""

    configuration: FinetuneConfiguration
    inputs: Inputs
    batches: Batches
    training: TrainingSection
    evaluate_every_steps: int

    @classmethod
    def of(cls, configuration: FinetuneConfiguration, inputs: Inputs) -> RunSetup:
        """The run of a configuration with one seed.

        Raises:
            UserError: the samples of a step cannot be shared equally.
        """
        section, seed, split = configuration.training, configuration.seed, inputs.training
        steps_of_epoch = len(split.texts) / section.batch_samples
        steps = max(math.ceil(section.epochs * steps_of_epoch), 1)
        training = TrainingSection(
            steps=steps,
            warmup_steps=min(int(section.warmup_share * steps), steps - 1),
            batch_samples=section.batch_samples,
            seed=seed,
            precision=section.precision,
        )
        pad_id = inputs.tokenizer.pad_token_id or 0
        splits = [one for one in (split, inputs.validation, inputs.test) if one]
        batches = agreed(
            lambda: Batches.of(inputs.task, inputs.num_outputs, pad_id, _layout(configuration, inputs), splits, seed)
        )
        every = max(math.ceil(steps_of_epoch / section.evaluations_per_epoch), 1)
        return cls(configuration, inputs, batches, training, every)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result, by dotted key; see `resume`."""
        free = {"output", "runtime", "mesh"}
        sections = self.configuration.model_dump(mode="json", exclude=free)
        sections["model"]["start_from"] = content_of_model(self.configuration.model.start_from)
        named = {f"{name}.{key}": value for name, section in sections.items() for key, value in (section or {}).items()}
        named |= self.inputs.contents
        return {key: value for key, value in named.items() if key != "data.test"}  # which decides nothing

    def begin(self, checkpoint: Path | None) -> tuple[TrainState, SupervisedObjective]:
        """A run at its beginning, or where the checkpoint left it, and what it minimises; in the order of
        `parallelize`."""
        configuration, inputs, seed = self.configuration, self.inputs, self.training.seed
        lora, ranks, device = configuration.lora, inputs.ranks, inputs.device
        torch.manual_seed(ranks.stream_seed(seed))
        config = agreed(lambda: self._config(checkpoint))
        network = empty_task_network(config, inputs.task.head)
        if lora:
            put_adapters(network, lora)
        objective = agreed(lambda: self._spread(network))
        materialize(network, device)
        if checkpoint is None:
            section, head = configuration.model, inputs.task.head
            agreed(lambda: fill_task_network(network, section.start_from, head, seed, new=section.new_head))
            if lora:
                fill_adapters(network, seed)
        else:
            initialize(network, seed, only=set())
        state = begun_state(network, objective, configuration.optimizer, checkpoint, ranks)
        return state, objective

    def _config(self, checkpoint: Path | None) -> MegatronBertConfig:
        if checkpoint is None:
            return MegatronBertConfig.from_dict(self.inputs.config.to_dict())
        config = MegatronBertConfig.from_dict(read_state(checkpoint)["config"])
        if config.id2label != self.inputs.config.id2label:
            raise UserError(f"{checkpoint} was trained for other labels than those of data.train: start over with "
                            f"--overwrite, or choose another output")  # fmt: skip
        section = self.configuration.model
        config.hidden_dropout_prob = section.hidden_dropout_prob
        config.attention_probs_dropout_prob = section.attention_probs_dropout_prob
        return config

    def _spread(self, network: MegatronBertPreTrainedModel) -> SupervisedObjective:
        configuration, inputs = self.configuration, self.inputs
        compiled = self.batches.layout.packing
        make_ready(
            network,
            inputs.device,
            precision=self.training.precision,
            recompute=configuration.runtime.recompute,
            compiled=compiled,
            mesh=inputs.ranks.mesh,
            keeps_layers=configuration.mesh.keep_layers,
            fused=configuration.lora is None,
        )
        batches = self.batches
        shapes = None
        if compiled:
            shapes = FixedShapes(batches.layout.micro_samples, batches.row_tokens, 0.0, batches.text_tokens)
        task = inputs.task
        runtime, precision = configuration.runtime, self.training.precision
        graphs = pass_graphs(inputs.device, precision, runtime.recompute)
        return SupervisedObjective(
            network, inputs.device, task.head, task.problem(), precision, shapes=shapes,
            graphs=graphs if compiled and runtime.cuda_graphs else None,
        )  # fmt: skip

    def summary(self) -> str:
        """Where the run is computed, and what of."""
        inputs, where = self.inputs, str(self.inputs.device)
        if inputs.ranks.mesh is not None:
            replicas, shards, tensor, _ = inputs.ranks.layout
            where = (
                f"{inputs.ranks.size} processes ({tensor} tensor-parallel x {shards} sharded x {replicas} replicated)"
            )
        parts = [f"{len(inputs.training.examples):,} examples ({len(inputs.training.texts):,} rows) to train on",
                 f"{len(inputs.validation.examples):,} to validate on"]  # fmt: skip
        return f"{where}; {', '.join(parts)}, {self.training.steps:,} steps"


def _layout(configuration: FinetuneConfiguration, inputs: Inputs) -> BatchLayout:
    """A compiled model's batches are packed rows of one shape."""
    samples, ranks = configuration.training.batch_samples, inputs.ranks
    share = max(samples // ranks.data_degree, 1)
    micro_samples = min(configuration.runtime.micro_batch_samples or share, share)
    layout = BatchLayout(samples, micro_samples, ranks.data_rank, ranks.data_degree)
    return replace(layout, packing=should_compile(configuration.runtime.compile, inputs.device))
