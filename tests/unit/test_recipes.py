"""Every fine-tuning recipe that is shipped is one that the verb takes; its name begins with the task's."""

from pathlib import Path

import pytest

from megatron_bert.tasks.configuration import FinetuneConfiguration, configuration_of
from megatron_bert.tasks.table import TASKS, task_class, task_of
from megatron_bert.training.configuration import load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "finetune").glob("*.yaml"))
# arXiv 1909.08053, appendix A.1, the 336M: batch, learning rate, epochs.
PAPER = {
    "mnli": (128, 1e-5, 10), "qqp": (128, 5e-5, 12), "squad_1.1": (64, 3e-5, 2), "squad_2.0": (48, 3e-5, 2),
    "race": (32, 2e-5, 3),
}  # fmt: skip


def finetuning(recipe: Path) -> FinetuneConfiguration:
    name = recipe.stem.split("_")[0]
    return load_recipe(recipe, [], configuration_of(task_class(name)))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_valid(recipe: Path) -> None:
    assert finetuning(recipe).output == Path("runs") / recipe.stem


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_hyperparameters(name: str) -> None:
    (recipe,) = (one for one in RECIPES if one.stem == name)
    configuration = finetuning(recipe)
    training = configuration.training
    assert (training.batch_samples, configuration.optimizer.learning_rate, training.epochs) == PAPER[name]
    assert len(training.seeds) == 5


@pytest.mark.parametrize("name", TASKS)
def test_every_task_of_the_table_is_there(name: str) -> None:
    task = task_of(name, task_class(name).settings_class())
    assert task.head in ("sequence", "choice", "token", "span")
    assert (task.problem() is None) == (task.head != "sequence")
