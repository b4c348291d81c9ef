"""A pretraining run's configuration: one YAML file. What changes the result lies apart from what must not.

`model`, `data`, `objective`, `optimizer` and `training` decide the trained weights. `runtime` and `mesh` only decide
how they are computed: with dropout off, any two settings of them give the same losses and weights within rounding.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from megatron_bert.bundled import resolved
from megatron_bert.errors import UserError

__all__ = [
    "SIZES",
    "ComputeSection",
    "DataSection",
    "MeshSection",
    "ModelFolder",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "PretrainConfiguration",
    "RuntimeSection",
    "Section",
    "TrainingSection",
    "WeightedCorpus",
    "load_configuration",
    "load_recipe",
    "refuse_overlap_of_any_shape",
]


_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads")
# What a checkpoint that a run starts from decides.
_FROM_CHECKPOINT = (*_SHAPE, "intermediate_size", "max_position_embeddings", "initializer_range", "vocabulary_multiple")

# Hidden size, layers, heads: arXiv 1909.08053, table 6, whose 336M is published as 345m; 8.9b is GatorTron-large's.
SIZES = {
    "345m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
    "3.9b": (2560, 48, 40),
    "8.9b": (3584, 56, 56),
}


# A Transformers folder, or the name of the model in the box.
ModelFolder = Annotated[Path, BeforeValidator(lambda value: resolved(value) if isinstance(value, str) else value)]


class Section(BaseModel):
    """A part of a recipe: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_a_number(cls, value: Any, field: ValidationInfo) -> Any:
        kind = cls.model_fields[field.field_name or ""].annotation
        kinds = {kind, *get_args(kind)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"{str(value).lower()} is no number")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _home_is_the_users(cls, value: Any) -> Any:
        """`~/run` as a shell reads it; the folder would be called `~` otherwise."""
        return value.expanduser() if isinstance(value, Path) and value.parts[:1] == ("~",) else value

    def as_yaml(self) -> str:
        """With every value spelled out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


Configuration = TypeVar("Configuration", bound=Section)


class ModelSection(Section):
    """The network, in the words of `MegatronBertConfig`: a known size, numbers, or a checkpoint to start from."""

    size: str | None = None  # one of SIZES, which gives the numbers below that are left out
    start_from: ModelFolder | None = (
        None  # a Transformers folder, or mini: its weights and its shape, nothing of which is given here
    )
    hidden_size: int | None = Field(None, gt=0)
    num_hidden_layers: int | None = Field(None, gt=0)
    num_attention_heads: int | None = Field(None, gt=0)
    intermediate_size: int | None = Field(None, gt=0)  # default: 4 * hidden_size, the paper's
    max_position_embeddings: int = Field(512, gt=0)
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1)
    initializer_range: float = Field(0.02, gt=0, allow_inf_nan=False)
    vocabulary_multiple: int = Field(128, gt=0)  # the embedding has the tokenizer's entries, rounded up to this

    @model_validator(mode="before")
    @classmethod
    def _of_size(cls, values: Any) -> Any:
        size = values.get("size") if isinstance(values, dict) else None
        if size is None:
            return values
        if size not in SIZES:
            raise ValueError(f"size {size!r} is not known{_close(str(size), SIZES)} (known: {', '.join(SIZES)})")
        shape = dict(zip(_SHAPE, SIZES[size], strict=True))
        return {**values, **{name: value for name, value in shape.items() if values.get(name) is None}}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.start_from is not None:
            given = [name for name in ("size", *_FROM_CHECKPOINT) if name in self.model_fields_set and
                     getattr(self, name) != type(self).model_fields[name].default]  # fmt: skip
            if given:
                raise ValueError(f"start_from takes the shape from the checkpoint, so leave out {', '.join(given)}")
            return self
        missing = [name for name in _SHAPE if getattr(self, name) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing: give a size ({', '.join(SIZES)}), numbers, or start_from")
        if self.hidden_size and self.num_attention_heads and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class WeightedCorpus(Section):
    """One corpus of a blend."""

    prefix: Path  # of its token file
    weight: float = Field(gt=0, allow_inf_nan=False)  # its share of the samples is this by the sum of all weights


def _shape_of_tokens(value: Any) -> str:
    return "blend" if isinstance(value, list | tuple) else "prefix"


class DataSection(Section):
    """The text and how rows are cut from it."""

    # PREFIX of the token file, the --output of `megatron-bert preprocess`; or a list of {prefix, weight}
    tokens: Annotated[
        Annotated[Path, Tag("prefix")] | Annotated[list[WeightedCorpus], Field(min_length=1), Tag("blend")],
        Discriminator(_shape_of_tokens),
    ]
    tokenizer: ModelFolder  # folder of the tokenizer that made it, or mini
    validation: Path | None = None  # PREFIX of a token file to validate on; otherwise a share is held out
    validation_share: float = Field(0.01, ge=0, lt=1)  # of each corpus' tokens, in whole documents
    row_tokens: int = Field(512, ge=8)  # longest row, special tokens included
    short_share: float = Field(0.1, ge=0, le=1)  # of the masked objective's samples: target length drawn from 2 on

    @property
    def corpora(self) -> list[WeightedCorpus]:
        """The token files to train on."""
        return [WeightedCorpus(prefix=self.tokens, weight=1.0)] if isinstance(self.tokens, Path) else self.tokens


class ObjectiveSection(Section):
    """What the model has to predict: masked tokens and how a pair of segments belongs together, or the next token."""

    kind: Literal["masked", "causal"] = "masked"
    mask_share: float = Field(0.15, gt=0, lt=1)  # of the tokens
    max_masked_words: int = Field(3, ge=1)  # longest run of words masked together; n words with p ~ 1/n
    whole_words: bool = True  # all tokens of a word are masked together; false: a token is a word of its own
    chinese_segmenter: Literal["none", "jieba"] = "none"  # jieba: Chinese words of several characters are masked whole
    mask_replace_prob: float = Field(0.8, ge=0, le=1)  # of the chosen tokens: become [MASK]
    random_replace_prob: float = Field(0.1, ge=0, le=1)  # become another token; the rest stays
    pair: Literal["sentence-order", "next-sentence", "none"] = "sentence-order"

    @model_validator(mode="after")
    def _causal_has_no_masks(self) -> Self:
        if self.kind == "causal":
            for name, field in type(self).model_fields.items():
                if name != "kind" and getattr(self, name) != field.default:
                    raise ValueError(f"kind=causal has neither masks nor pairs; leave {name} out")
        return self

    @model_validator(mode="after")
    def _chinese_words_are_whole(self) -> Self:
        if self.chinese_segmenter != "none" and not self.whole_words:
            raise ValueError("chinese_segmenter finds words to be masked whole; leave it out or set whole_words=true")
        return self

    @model_validator(mode="after")
    def _replaced_is_at_most_all(self) -> Self:
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError(
                f"mask_replace_prob {self.mask_replace_prob} and random_replace_prob {self.random_replace_prob} are "
                f"more than 1 together"
            )
        return self

    @property
    def predicted_share(self) -> float:
        """Of the tokens, those that are predicted."""
        return 1.0 if self.kind == "causal" else self.mask_share


class OptimizerSection(Section):
    """AdamW with decoupled weight decay, none on biases and layer norms; or Muon on the layers' matrices and AdamW on
    the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    momentum: float = Field(0.95, ge=0, lt=1)  # Muon's
    learning_rate: float = Field(gt=0, allow_inf_nan=False)  # at the end of the warm-up
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    clip_norm: float = Field(1.0, gt=0)  # of the gradient of all parameters together; .inf: never
    schedule: Literal["linear", "cosine"] = "linear"  # how the rate falls from the warm-up's end to the last step
    final_share: float = Field(0.0, ge=0, le=1)  # of the learning rate: what it falls to

    @model_validator(mode="after")
    def _momentum_is_of_muon(self) -> Self:
        if self.kind != "muon" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError("momentum is Muon's; leave it out or set kind=muon")
        return self


class TrainingSection(Section):
    """How long, how much at a time, from which seed."""

    steps: int = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)  # linear from 0
    batch_samples: int = Field(gt=0)  # of one step, over all ranks
    seed: int = Field(1234, ge=0, lt=2**63)
    # Of the computation; weights and optimizer stay float32. float8: the layers' products, the rest in bfloat16.
    precision: Literal["float32", "bfloat16", "float8"] = "float32"

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        return self


class ComputeSection(Section):
    """How it is computed and reported; never what comes out."""

    device: str = "auto"  # cuda where there is one, else cpu
    micro_batch_samples: int | None = Field(None, gt=0)  # of one forward pass; default: the whole batch
    num_workers: int = Field(0, ge=0)  # processes that make samples; 0: this one
    compile: bool | None = None  # layers and head by torch.compile; default: on a GPU
    cuda_graphs: bool = True  # compiled passes are recorded, so that no GPU waits for its host; see `pass_graphs`
    recompute: Literal["none", "selective", "full"] = "none"  # activations computed again in the backward pass
    tensorboard: bool = False  # event files beside the metrics
    log_every_steps: int = Field(10, gt=0)
    checkpoint_every_steps: int = Field(1000, gt=0)  # besides at the end and when stopped
    keep_checkpoints: int = Field(3, gt=0)  # the last ones; older ones are removed
    stop_after_skipped_steps: int = Field(10, gt=0)  # in a row, for a loss or gradient that is not finite


class RuntimeSection(ComputeSection):
    """Pretraining's own."""

    packing: bool = False  # several samples in a row; micro_batch_samples is then the most rows of a forward pass
    evaluate_every_steps: int = Field(200, gt=0)


class MeshSection(Section):
    """How the processes that `torchrun` started share the run; never what comes out."""

    tensor: int = Field(1, gt=0)  # tensor-parallel degree: processes that share a sample and each layer's matrices
    sequence_parallel: bool = False  # between those matrices, each of them holds a part of the tokens
    overlap: bool = False  # with it: GPUs of one host copy tokens from each other while they multiply others
    shard: int | None = Field(None, gt=0)  # data-parallel ranks that share weights and states; default: `laid_out`
    keep_layers: bool = False  # put together once a pass instead of twice: more memory, less traffic
    timeout_seconds: float = Field(600, gt=0)  # a process that is waited for longer ends the run

    @model_validator(mode="after")
    def _no_key_is_for_nothing(self) -> Self:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel splits tokens over tensor-parallel processes: give tensor, or leave it "
                             "out")  # fmt: skip
        if self.overlap and not self.sequence_parallel:
            raise ValueError("overlap is of what sequence_parallel sends: set that too, or leave it out")
        if self.keep_layers and self.shard == 1:
            raise ValueError("keep_layers is of weights that shard splits over processes: leave one of them out")
        return self


def refuse_overlap_of_any_shape(runtime: ComputeSection, mesh: MeshSection) -> None:
    """Raises ValueError where batches that are not of one shape would have ever more memory put aside for what is sent
    of them (`parallel.overlap`).
    """
    if mesh.overlap and runtime.compile is False:
        raise ValueError("mesh.overlap is for batches of one shape, which only compiled layers have: leave it out, or "
                         "runtime.compile=false")  # fmt: skip


class PretrainConfiguration(Section):
    """A run. Every key of a recipe is a field here or below."""

    output: Path  # folder of the run: recipe.yaml, metrics.jsonl, model/
    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection
    training: TrainingSection
    runtime: RuntimeSection = RuntimeSection()
    mesh: MeshSection = MeshSection()

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.model.start_from is None and self.data.row_tokens > self.model.max_position_embeddings:
            raise ValueError(
                f"data.row_tokens {self.data.row_tokens} is more than the model's "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        short_share = type(self.data).model_fields["short_share"].default
        refused = {"runtime.packing": self.runtime.packing, "data.short_share": self.data.short_share != short_share}
        for name, is_set in refused.items():
            if is_set and self.objective.kind == "causal":
                raise ValueError(f"{name}: rows of the causal objective are always full; leave it out")
        return self

    @model_validator(mode="after")
    def _overlap_has_shapes(self) -> Self:
        refuse_overlap_of_any_shape(self.runtime, self.mesh)
        return self

    @model_validator(mode="after")
    def _float8_is_of_whole_layers(self) -> Self:
        refused = {
            "mesh.tensor: leave it out": self.mesh.tensor > 1,
            "mesh.shard: set it to 1": (self.mesh.shard or 1) > 1,
            "runtime.recompute full: leave it out": self.runtime.recompute == "full",
        }
        for what, is_set in refused.items():
            if self.training.precision == "float8" and is_set:
                raise ValueError(f"training.precision float8 does not go with {what}, or use bfloat16")
        return self


def load_configuration(recipe: Path, overrides: Sequence[str] = ()) -> PretrainConfiguration:
    """A pretraining run's configuration; see `load_recipe`."""
    return load_recipe(recipe, overrides, PretrainConfiguration)


def load_recipe(recipe: Path, overrides: Sequence[str], kind: type[Configuration]) -> Configuration:
    """The validated recipe, with `overrides` ("section.key=value", values in YAML) put in before validation.

    Raises:
        UserError: not YAML, an unknown key (with the nearest known one), a missing or impossible value; the message
            names the file or the override, the key and the value.
        OSError: the file cannot be read.
    """
    try:
        raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{recipe} is not a recipe: it should hold the sections {', '.join(_sections(kind))}")
    for override in overrides:
        _apply(raw, override)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{recipe}: " + "; ".join(_problem(one, kind) for one in error.errors())) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override}: write section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error
    place = raw
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise UserError(f"--set {override}: {key} is not a section")
    place[keys[-1]] = value


def _problem(error: Any, kind: type[BaseModel]) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"unknown key {name}{_nearest(path, kind)}"
    if error["type"] == "missing":
        return f"{name} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "model_type":
        message = f"a section with the keys {', '.join(_keys_of(path, kind))} is wanted"
    if error["type"] == "path_type":
        message = "a path is wanted (a number as a name in quotes)"
    value = error["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f", not {value!r}"
    return f"{name}: {message}{shown}" if name else message


def _nearest(path: list[str], kind: type[BaseModel]) -> str:
    """`` (did you mean ...?)``: the most similar name, first among the same section's keys, then among all."""
    sections = _sections(kind)
    own = _keys_of(path[:-1], kind)
    prefix = ".".join(path[:-1])
    found = difflib.get_close_matches(path[-1], own, n=1)
    if found:
        return f" (did you mean {f'{prefix}.' if prefix else ''}{found[0]}?)"
    everywhere = {key: f"{section}.{key}" for section, keys in sections.items() for key in keys}
    found = difflib.get_close_matches(path[-1], everywhere, n=1)
    if found:
        return f" (did you mean {everywhere[found[0]]}?)"
    return f" (known here: {', '.join(own)})" if own else f" ({prefix} has no keys)"


def _keys_of(section: list[str], kind: type[BaseModel]) -> list[str]:
    """The keys known in a section; the empty list: of the recipe itself."""
    if section[:2] == ["data", "tokens"]:
        return list(WeightedCorpus.model_fields)
    return _sections(kind).get(section[0], []) if section else list(kind.model_fields)


def _close(word: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)``, or nothing where nothing is similar."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def _sections(kind: type[BaseModel]) -> dict[str, list[str]]:
    """The keys of each section; of one that may be left out (`lora`), too."""
    sections = {}
    for name, field in kind.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                sections[name] = list(part.model_fields)
    return sections
