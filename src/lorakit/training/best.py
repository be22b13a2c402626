"""Judge held-out rows at each evaluation: end a run that gets no better, and keep its best adapter.

The scores are read from the history that transformers keeps in each checkpoint, so a resumed run decides as an
uninterrupted one does. The first of equal scores is the best one, and a score that is NaN is the worst.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .evaluate import expected_of, predict, to_answer
from .generation import answers
from .scores import METRICS, logged_as

if TYPE_CHECKING:
    from .models import Loaded
    from .prepare import Prepared

History = Sequence[Mapping[str, Any]]


class Best(TrainerCallback):
    """Ends a run after `patience` evaluations without a better score. hold: called at each new best one."""

    def __init__(self, metric: str, patience: int | None, hold: Callable[[], None] | None) -> None:
        self._metric, self._patience, self._hold = metric, patience, hold
        self._sign = 1 if metric != "loss" and METRICS[metric].higher_is_better else -1

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        since = self._since(state.log_history)
        if since == 0 and self._hold is not None:
            self._hold()
        if self.is_over(state.log_history):
            control.should_training_stop = control.should_save = True
            if state.is_world_process_zero:
                print(f"no better {self._metric} in {since} evaluations: training ends (--patience)", flush=True)

    def is_over(self, history: History) -> bool:
        """Whether a run with this history has ended."""
        return self._patience is not None and self._since(history) >= self._patience

    def told(self, history: History) -> str:
        """What a user must know of the best evaluation."""
        scores = self._scores(history)
        if not scores:
            return "no held-out rows were judged before the end (--eval-steps)"
        step, value = scores[self._index(scores)]
        best = f"best held-out {self._metric}: {value:.4g} at step {step}, of {len(scores)} evaluations"
        return f"{best}; the run ends with the adapter of that step (--keep best)"

    def _since(self, history: History) -> int:
        """How many evaluations came after the best one."""
        scores = self._scores(history)
        return len(scores) - 1 - self._index(scores) if scores else 0

    def _scores(self, history: History) -> list[tuple[int, float]]:
        key = logged_as(self._metric)
        return [(line["step"], line[key]) for line in history if key in line]

    def _index(self, scores: Sequence[tuple[int, float]]) -> int:
        worth = [-math.inf if math.isnan(value) else self._sign * value for _, value in scores]
        return worth.index(max(worth))


def score_of(prepared: Prepared, loaded: Loaded) -> Callable[[], float]:
    """A function that answers, or predicts, held-out rows with the model as it is, and scores that by --metric."""
    config, data = prepared.config, prepared.data
    metric, examples = METRICS[config.metric], data.valid[: config.eval_samples]
    if metric.of == "texts":
        asked = to_answer(loaded, examples, prepared.style, config.max_new_tokens)
        references = [(text,) for text in asked.expected]
        return lambda: metric.score(
            list(answers(loaded, asked.prompts, max_new_tokens=asked.max_new_tokens)), references
        )
    expected = [expected_of(example, data) for example in examples]
    return lambda: metric.score(predict(loaded, data, examples, prepared.limit, "adapter"), expected)
