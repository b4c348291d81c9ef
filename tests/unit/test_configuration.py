"""Recipes: what parses, what is refused, and in which words."""

from pathlib import Path

import pytest
import yaml

from megatron_bert.errors import UserError
from megatron_bert.training.configuration import SIZES, PretrainConfiguration, load_configuration

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
GOOD = {
    "output": "out",
    "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1},
    "data": {"tokens": "text", "tokenizer": "tok"},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"steps": 10, "batch_samples": 4},
}


def load(tmp_path: Path, *overrides: str) -> PretrainConfiguration:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(GOOD))
    return load_configuration(recipe, overrides)


def test_there_are_recipes() -> None:
    wanted = {"demo_cpu", "pretrain_345m", "pretrain_1.3b", "pretrain_3.9b", "adapt", "causal_345m"}
    assert wanted <= {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_parses(recipe: Path) -> None:
    load_configuration(recipe)


def test_overrides_are_put_in_and_validated(tmp_path: Path) -> None:
    overrides = ["training.steps=20", "runtime.num_workers=2", "optimizer.learning_rate=1e-4", "output=else/where"]
    configuration = load(tmp_path, *overrides, "data.validation=null")
    assert configuration.training.steps == 20
    assert configuration.runtime.num_workers == 2
    assert configuration.optimizer.learning_rate == 1e-4
    assert configuration.output == Path("else/where")


def test_a_blend_of_corpora(tmp_path: Path) -> None:
    configuration = load(tmp_path, "data.tokens=[{prefix: a, weight: 3}, {prefix: b, weight: 1}]")
    assert [(str(corpus.prefix), corpus.weight) for corpus in configuration.data.corpora] == [("a", 3.0), ("b", 1.0)]
    assert [(str(corpus.prefix), corpus.weight) for corpus in load(tmp_path).data.corpora] == [("text", 1.0)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.pair=none", "kind=causal has neither masks nor pairs; leave pair out"),
        ("objective.mask_share=0.2", "leave mask_share out"),
        ("objective.chinese_segmenter=jieba", "leave chinese_segmenter out"),
        ("runtime.packing=true", r"runtime\.packing: rows of the causal objective are always full"),
        ("data.short_share=0.5", r"data\.short_share: rows of the causal objective are always full"),
    ],
)
def test_the_causal_objective_takes_no_option_that_would_do_nothing(
    tmp_path: Path, override: str, message: str
) -> None:
    causal = load(tmp_path, "objective.kind=causal")
    (tmp_path / "resolved.yaml").write_text(causal.as_yaml())
    assert load_configuration(tmp_path / "resolved.yaml") == causal
    with pytest.raises(UserError, match=message):
        load(tmp_path, "objective.kind=causal", override)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell reads it (POSIX, tilde expansion); a `~` elsewhere is a character."""
    monkeypatch.setenv("HOME", "/home/me")
    configuration = load(tmp_path, "output=~/run", "data.tokens=[{prefix: ~/text, weight: 1}]", "data.tokenizer=a/~/b")
    assert configuration.output == Path("/home/me/run")
    assert configuration.data.corpora[0].prefix == Path("/home/me/text")
    assert configuration.data.tokenizer == Path("a/~/b")
    assert load(tmp_path, "model={start_from: ~/in}").model.start_from == Path("/home/me/in")


def test_a_size_gives_the_papers_numbers(tmp_path: Path) -> None:
    """arXiv 1909.08053, table 6; numbers beside it go before it."""
    model = load(tmp_path, "model={size: 3.9b, num_hidden_layers: 2}").model
    assert (model.hidden_size, model.num_hidden_layers, model.num_attention_heads) == (2560, 2, 40)
    for size, (hidden, _, heads) in SIZES.items():
        assert hidden == 64 * heads, size


@pytest.mark.parametrize("model", ["{size: 345m}", "{start_from: checkpoint, hidden_dropout_prob: 0.0}"])
def test_other_sources_of_a_model_resolve_too(tmp_path: Path, model: str) -> None:
    configuration = load(tmp_path, f"model={model}")
    (tmp_path / "resolved.yaml").write_text(configuration.as_yaml())
    assert load_configuration(tmp_path / "resolved.yaml") == configuration


def test_a_resolved_recipe_gives_the_same_configuration(tmp_path: Path) -> None:
    configuration = load(tmp_path, "data.validation=other", "data.tokens=[{prefix: a, weight: 3}]")
    (tmp_path / "resolved.yaml").write_text(configuration.as_yaml())
    assert load_configuration(tmp_path / "resolved.yaml") == configuration


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.learning_rat=1",
            r"unknown key optimizer\.learning_rat \(did you mean optimizer\.learning_rate\?\)",
        ),
        ("trainig.steps=1", r"unknown key trainig \(did you mean training\?\)"),
        ("model.learning_rate=1", r"unknown key model\.learning_rate \(did you mean optimizer\.learning_rate\?\)"),
        ("runtime.xyzzy=1", r"unknown key runtime\.xyzzy \(known here: device, "),
        ("training.steps=0", r"training\.steps: Input should be greater than 0, not 0"),
        ("training.steps=many", r"training\.steps: Input should be a valid integer.*not 'many'"),
        ("training.warmup_steps=10", r"training: warmup_steps 10 must be less than steps 10"),
        (
            "training.precision=float7",
            r"training\.precision: Input should be 'float32', 'bfloat16' or 'float8', not 'float7'",
        ),
        ("model.num_attention_heads=3", r"model: hidden_size 64 is not a multiple of num_attention_heads 3"),
        ("data.row_tokens=1024", r"data\.row_tokens 1024 is more than .*max_position_embeddings 512"),
        ("data.tokens=null", r"data\.tokens.*: a path is wanted .*, not None"),
        ("output=5", r"output: a path is wanted .*, not 5"),
        ("model.size=354m", r"model: size '354m' is not known \(did you mean 345m\?\) \(known: 345m, 1\.3b, "),
        ("training.steps=true", r"training\.steps: .*true is no number"),
        ("runtime.micro_batch_samples=false", r"micro_batch_samples: .*false is no number"),
        ("model={size: 2b}", r"model: size '2b' is not known.*\(known: 345m, "),
        ("model={num_hidden_layers: 2}", r"model: hidden_size, num_attention_heads missing: give a size"),
        ("model.start_from=checkpoint", r"start_from takes the shape from the checkpoint, so leave out hidden_size, "),
        ("model={start_from: x, size: 345m}", r"start_from takes the shape from the checkpoint, so leave out size"),
        ("optimizer.schedule=cosin", r"optimizer\.schedule: Input should be 'linear' or 'cosine', not 'cosin'"),
        ("optimizer.final_share=2", r"optimizer\.final_share: Input should be less than or equal to 1, not 2"),
        ("runtime.recompute=some", r"runtime\.recompute: Input should be 'none', 'selective' or 'full', not 'some'"),
        ("mesh={shard: 1, keep_layers: true}", r"mesh: keep_layers is of weights that shard splits"),
        ("mesh={overlap: true}", r"mesh: overlap is of what sequence_parallel sends"),
        ("model=5", r"model: a section with the keys size, start_from, .* is wanted, not 5"),
        ("data.tokens=[a, b]", r"blend\.0: a section with the keys prefix, weight is wanted, not 'a'"),
        ("optimizer.learning_rate=.inf", r"optimizer\.learning_rate: Input should be a finite number, not inf"),
        ("optimizer.epsilon=.inf", r"optimizer\.epsilon: Input should be a finite number"),
        (
            "data.tokens=[{prefix: a, weight: 0}]",
            r"data\.tokens\.blend\.0\.weight: Input should be greater than 0, not 0",
        ),
        ("data.tokens=[{prefix: a, weight: -0.5}]", r"weight: Input should be greater than 0, not -0\.5"),
        ("data.tokens=[{prefix: a, weight: .nan}]", r"weight: Input should be .* not nan"),
        ("data.tokens=[{prefix: a}]", r"data\.tokens\.blend\.0\.weight is missing"),
        (
            "data.tokens=[{prefix: a, weight: 1, wieght: 1}]",
            r"unknown key data\.tokens\.blend\.0\.wieght \(did you mean data\.tokens\.blend\.0\.weight\?\)",
        ),
        ("data.tokens=[]", r"data\.tokens\.blend: List should have at least 1 item"),
        ("objective.kind=causl", r"objective\.kind: Input should be 'masked' or 'causal', not 'causl'"),
        ("objective.pair=next", r"objective\.pair: Input should be 'sentence-order', 'next-sentence' or 'none'"),
        (
            "objective={whole_words: false, chinese_segmenter: jieba}",
            r"objective: chinese_segmenter finds words to be masked whole; leave it out or set whole_words=true",
        ),
        ("output.folder=5", r"--set output\.folder=5: output is not a section"),
        ("training.steps", r"--set training\.steps: write section\.key=value"),
        ("=5", "write section.key=value"),
        ("training.steps=[1", "the value is not YAML"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, override)
    assert "\n" not in str(caught.value)


def test_memory_for_what_overlaps_is_of_one_shape(tmp_path: Path) -> None:
    """Whoever does not compile has batches of ever new shapes, and memory for each."""
    mesh = "mesh={tensor: 2, sequence_parallel: true, overlap: true}"
    assert load(tmp_path, mesh).mesh.overlap
    with pytest.raises(UserError, match=r"mesh\.overlap is for batches of one shape, which only compiled layers have"):
        load(tmp_path, mesh, "runtime.compile=false")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {hidden_size: 64", "is not YAML"),
        ("- a list", "is not a recipe"),
        ("", "is not a recipe"),
        ("output: x", "model is missing; data is missing; optimizer is missing; training is missing"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_configuration(tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"output: \xff\xfe")
    with pytest.raises(UserError, match="is not YAML"):
        load_configuration(tmp_path / "recipe.yaml")
