"""What a pretraining run is made of: data, processes, and the model with its optimizer at the beginning or where a
checkpoint left it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_bert.checkpoint.native import read_state
from megatron_bert.data.batches import BatchLayout
from megatron_bert.data.tokenization import load_tokenizer
from megatron_bert.data.vocabulary import fingerprint
from megatron_bert.errors import UserError
from megatron_bert.model import MegatronBertConfig
from megatron_bert.parallel.launch import (
    agreed,
    check_agreement,
    exchange,
    is_launched,
    joined_processes,
    local_device,
)
from megatron_bert.parallel.materialize import initialize, materialize
from megatron_bert.training.configuration import OptimizerSection, PretrainConfiguration
from megatron_bert.training.corpus import Corpus, open_corpus
from megatron_bert.training.execution import build_objective, should_compile
from megatron_bert.training.float8 import check_device
from megatron_bert.training.network import (
    Network,
    StartingSection,
    empty_network,
    fill_network,
    network_config,
    num_layer_parameters,
)
from megatron_bert.training.objective import Objective
from megatron_bert.training.optimizer import build_optimizer
from megatron_bert.training.ranks import Ranks
from megatron_bert.training.resume import run_identity
from megatron_bert.training.session import Recipe
from megatron_bert.training.state import TrainState, restore
from megatron_bert.training.step import Minimised

__all__ = ["Setup", "begun_state", "joined", "laid_out", "set_up"]

log = logging.getLogger(__name__)

_STATE_BYTES = 16  # a parameter: the weight, its gradient and AdamW's two moments, in float32
_GRACE_SECONDS = 60  # that the library waits longer than we do, whose message says more


@contextmanager
def joined(configuration: Recipe) -> Iterator[torch.device]:
    """This process's device. The processes that torchrun started are joined, unless whoever calls has done so.

    Raises:
        UserError: there is no such device.
        LostProcess: see `joined_processes`.
    """
    device = _device(configuration.runtime.device)
    if not is_launched() or dist.is_initialized():
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        yield device
        return
    with joined_processes(device, configuration.mesh.timeout_seconds + _GRACE_SECONDS):
        yield device


@dataclass(frozen=True)
class Setup:
    """A run before it has a state.

    identity: see `run_identity`.
    """

    configuration: PretrainConfiguration
    device: torch.device
    ranks: Ranks
    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    layout: BatchLayout
    identity: Mapping[str, Any]

    def summary(self) -> str:
        """Where the run is computed, and what of."""
        where = str(self.device)
        if self.ranks.mesh is not None:
            replicas, shards, tensor, _ = self.ranks.layout
            where = f"{self.ranks.size} processes ({tensor} tensor-parallel x {shards} sharded x {replicas} replicated)"
        return f"{where}; {self.corpus.summary(self.layout)}"

    def begin(self, checkpoint: Path | None) -> tuple[TrainState, Objective]:
        """A run at its beginning, or where the checkpoint left it, and what it minimises. The order is that of
        `parallelize`: the model is spread while it has no values, then gets memory, then values, then its optimizer.
        """
        configuration, ranks, device = self.configuration, self.ranks, self.device
        seed = configuration.training.seed
        torch.manual_seed(ranks.stream_seed(seed))
        config = agreed(lambda: self._config(checkpoint))
        network = empty_network(config, configuration.objective)
        objective = agreed(lambda: self._spread(network))
        materialize(network, device)
        if checkpoint is None:
            agreed(lambda: fill_network(network, configuration.model.start_from, seed))
        else:  # what the run once started from may be gone by now
            initialize(network, seed, only=set())
        state = begun_state(network, objective, configuration.optimizer, checkpoint, ranks)
        return state, objective

    def _config(self, checkpoint: Path | None) -> MegatronBertConfig:
        if checkpoint is None:
            return network_config(self.configuration, self.tokenizer)
        section = self.configuration.model
        config = MegatronBertConfig.from_dict(read_state(checkpoint)["config"])
        config.hidden_dropout_prob = section.hidden_dropout_prob
        config.attention_probs_dropout_prob = section.attention_probs_dropout_prob
        return config

    def _spread(self, network: Network) -> Objective:
        """The objective of the network, which is spread over the processes for it, on the meta device."""
        configuration = self.configuration
        training, runtime = configuration.training, configuration.runtime
        return build_objective(
            network,
            self.device,
            precision=training.precision,
            rows=self.layout.micro_samples,
            row_tokens=configuration.data.row_tokens,
            predicted_share=configuration.objective.predicted_share,
            recompute=runtime.recompute,
            compiled=should_compile(runtime.compile, self.device),
            mesh=self.ranks.mesh,
            keeps_layers=configuration.mesh.keep_layers,
            cuda_graphs=runtime.cuda_graphs,
        )


def begun_state(
    network: PreTrainedModel,
    objective: Minimised[Any, Any],
    section: OptimizerSection,
    checkpoint: Path | None,
    ranks: Ranks,
) -> TrainState:
    """The state of a network that has its values, or gets those of the checkpoint; the objective takes over the shapes
    that its batches had there, unless rows are dealt out otherwise now: micro-batches or the processes are others.
    """
    state = TrainState(network, build_optimizer(network, section), objective.device)
    if checkpoint:
        restore(state, checkpoint, ranks)
        log.info("going on from %s", checkpoint)
    if objective.shapes and state.shapes and objective.shapes.is_of_same_rows(state.shapes):
        objective.shapes = state.shapes
    state.shapes = objective.shapes
    return state


def set_up(configuration: PretrainConfiguration, device: torch.device) -> Setup:
    """Opens the data, on all processes that have joined.

    Raises:
        UserError: the processes do not fit the mesh, the device lacks the precision, or what `open_corpus` finds.
    """
    ranks = laid_out(configuration, configuration.model, device)
    if configuration.training.precision == "float8":
        agreed(lambda: check_device(device))
    tokenizer = agreed(lambda: load_tokenizer(configuration.data.tokenizer))
    corpus = agreed(lambda: open_corpus(configuration, tokenizer))
    layout = agreed(lambda: corpus.best_layout(_layout(configuration, ranks)))
    identity = agreed(lambda: run_identity(configuration, fingerprint(tokenizer.backend_tokenizer)))
    return Setup(configuration, device, ranks, tokenizer, corpus, layout, identity)


def laid_out(recipe: Recipe, model: StartingSection, device: torch.device) -> Ranks:
    """The processes as the recipe says. Where it does not say how many share one set of weights, each GPU has its own
    if weights, gradients and optimizer states, 16 bytes a parameter, take up at most a third of it.

    Raises:
        UserError: the processes do not fit the mesh, or were not started alike.
    """
    fits_whole = False
    if dist.is_initialized():
        check_agreement(_facts(recipe))
        fits_whole = recipe.mesh.shard is None and _fits_whole(recipe, model, device)
    return agreed(lambda: Ranks.of(recipe.mesh, device, fits_whole=fits_whole))


def _fits_whole(recipe: Recipe, model: StartingSection, device: torch.device) -> bool:
    """Whether they fit into a third of the smallest GPU; of CPUs it is not known."""
    parameters, is_gpu = agreed(lambda: num_layer_parameters(model)), device.type == "cuda"
    memory = min(exchange(torch.cuda.get_device_properties(device).total_memory if is_gpu else 0))
    return parameters is not None and _STATE_BYTES * parameters / recipe.mesh.tensor <= memory / 3


def _facts(configuration: Recipe) -> dict[str, str]:
    """What has to be the same on all processes."""
    recipe = hashlib.sha256(configuration.as_yaml().encode()).hexdigest()[:12]
    return {"the recipe (its fingerprint)": recipe, "megatron-bert's code (its fingerprint)": _fingerprint_of_code(),
            "PyTorch's version": torch.__version__}  # fmt: skip


def _fingerprint_of_code() -> str:
    """Of all modules of this package."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _layout(configuration: PretrainConfiguration, ranks: Ranks) -> BatchLayout:
    samples, runtime = configuration.training.batch_samples, configuration.runtime
    share = max(samples // ranks.data_degree, 1)
    micro_samples = min(runtime.micro_batch_samples or share, share)
    return BatchLayout(samples, micro_samples, ranks.data_rank, ranks.data_degree, packing=runtime.packing)


def _device(name: str) -> torch.device:
    """The device; with several processes, this one's."""
    if name == "auto":
        return local_device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"runtime.device {name!r}: training is on a CPU or a CUDA GPU; write auto, cpu or cuda")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"runtime.device {name!r} is not a device; write auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("runtime.device cuda: PyTorch finds no CUDA device here; write auto or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"runtime.device {name}: the last CUDA device here is cuda:{torch.cuda.device_count() - 1}")
    return local_device(device.type) if is_launched() else device
