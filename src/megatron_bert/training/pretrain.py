"""The one place that wires a pretraining run together."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_bert.data.batches import BatchLayout, Position
from megatron_bert.data.files import written_aside
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig, MegatronBertForPreTraining
from megatron_bert.training.configuration import ModelSection, PretrainConfiguration
from megatron_bert.training.corpus import Corpus, open_corpus
from megatron_bert.training.export import write_model_folder
from megatron_bert.training.initialization import scale_residual_projections
from megatron_bert.training.loop import Run, train
from megatron_bert.training.metrics import MetricsSink
from megatron_bert.training.optimizer import build_optimizer

__all__ = ["Outcome", "build_model", "pretrain"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: the model's folder, the metrics file, and the last validation's means."""

    model: Path
    metrics: Path
    validation: dict[str, float]


def pretrain(configuration: PretrainConfiguration, *, overwrite: bool = False, progress: bool = False) -> Outcome:
    """Trains a fresh model; leaves `output`/model (for Transformers), `output`/metrics.jsonl and the resolved recipe.

    Raises:
        UserError: the output exists, the data is missing, damaged or made with another vocabulary, or nothing can be
            trained from it.
        OSError: what the file system says.
    """
    folder = configuration.output
    metrics = folder / "metrics.jsonl"
    if metrics.exists() and not overwrite:
        raise UserError(f"{folder} holds a run already; choose another output or add --overwrite")
    device = _device(configuration.runtime.device)
    tokenizer = load_tokenizer(configuration.data.tokenizer)
    corpus = open_corpus(configuration, tokenizer)
    torch.manual_seed(configuration.training.seed)
    model = build_model(configuration.model, tokenizer)
    model.to(device)  # type: ignore[arg-type]  # its decorator hides the signature
    log.info("%s parameters on %s; %s", f"{model.num_parameters():,}", device, _corpus_line(corpus))
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / "recipe.yaml") as aside:
        aside.write_text(configuration.as_yaml(), encoding="utf-8")
    with MetricsSink(metrics, configuration.training.steps, progress=progress) as sink:
        validation = train(_wire(configuration, model, corpus, device), sink)
    write_model_folder(model, tokenizer, folder / "model")
    return Outcome(folder / "model", metrics, validation)


def build_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> MegatronBertForPreTraining:
    """A freshly initialised model with room for the tokenizer's vocabulary, rounded up to a multiple."""
    multiple = section.vocabulary_multiple
    config = MegatronBertConfig(
        vocab_size=-(-len(tokenizer) // multiple) * multiple,
        hidden_size=section.hidden_size,
        num_hidden_layers=section.num_hidden_layers,
        num_attention_heads=section.num_attention_heads,
        intermediate_size=section.intermediate_size or 4 * section.hidden_size,
        max_position_embeddings=section.max_position_embeddings,
        hidden_dropout_prob=section.hidden_dropout_prob,
        attention_probs_dropout_prob=section.attention_probs_dropout_prob,
        initializer_range=section.initializer_range,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MegatronBertForPreTraining(config)
    scale_residual_projections(model, section.num_hidden_layers)
    return model


def _wire(
    configuration: PretrainConfiguration, model: MegatronBertForPreTraining, corpus: Corpus, device: torch.device
) -> Run:
    training, runtime = configuration.training, configuration.runtime
    micro_samples = min(runtime.micro_batch_samples or training.batch_samples, training.batch_samples)
    layout = BatchLayout(training.batch_samples, micro_samples)
    return Run(
        configuration=configuration,
        model=model,
        optimizer=build_optimizer(model, configuration.optimizer),
        device=device,
        steps=corpus.steps(layout, Position(), num_workers=runtime.num_workers, pin=device.type == "cuda"),
        validation=corpus.validation_batches(micro_samples),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"runtime.device {name!r} is not a device; write auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device cuda: PyTorch finds no CUDA device here; write auto or cpu")
    return device


def _corpus_line(corpus: Corpus) -> str:
    index = corpus.training.index(0)
    line = f"{len(index):,} samples an epoch ({len(index) - index.num_pairs:,} of one sentence, so without a pair)"
    held_out = f"{len(corpus.validation.index(0)):,} held out" if corpus.validation else "none held out"
    return f"{line}, {held_out}"
