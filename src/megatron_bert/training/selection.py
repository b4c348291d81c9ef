"""Which state of a run is the best by what was measured on the validation file, and when to stop looking."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["SCORE", "Best", "Selection"]

SCORE = "score"  # the name, in a record of an evaluation, of what selects


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, and the evaluations since. Step 0: there was none."""

    step: int = 0
    score: float = float("-inf")
    since: int = 0


@dataclass(frozen=True)
class Selection:
    """The highest score wins; of equal ones, the first. A score that is not a number never wins but the first time.

    Attributes:
        patience: evaluations in a row without a better score that end the run; None: it is never ended.
    """

    patience: int | None = None

    def after(self, best: Best, step: int, validation: dict[str, float]) -> Best:
        """The best after one more evaluation."""
        score = validation[SCORE]
        if not best.step or score > best.score:
            return Best(step, score)
        return replace(best, since=best.since + 1)

    def is_exhausted(self, best: Best) -> bool:
        """Whether to stop."""
        return self.patience is not None and best.since >= self.patience
