"""The ratio of two models' times: how the turns are taken, and the interval of their median."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from torch import nn

from lorakit.study.comparison import latency as module
from lorakit.study.comparison.latency import TURNS, in_turns, ratio_of


def turns(*ratios: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Times with these ratios; the machine is slower from turn to turn."""
    base = tuple(2.0**turn for turn in range(len(ratios)))
    return tuple(ratio * time for ratio, time in zip(ratios, base, strict=True)), base


def test_each_turn_counts_by_itself_and_the_order_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    served: list[str] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    ours, base = nn.Linear(1, 1), nn.Linear(1, 1)

    def serve(model: nn.Module) -> None:
        assert torch.is_inference_mode_enabled()
        turn = len(served) // 2
        served.append("ours" if model is ours else "base")
        clock[0] += (3.0 if model is ours else 2.0) * (turn + 1) + 100 * (turn == 0)

    found = in_turns(serve, ours, base)
    assert found == (tuple(3.0 * (turn + 1) for turn in range(1, TURNS + 1)),
                     tuple(2.0 * (turn + 1) for turn in range(1, TURNS + 1)))  # fmt: skip
    firsts = served[::2]
    assert len(served) == 2 * (TURNS + 1) and firsts == [*("base", "ours") * ((TURNS + 1) // 2)]
    assert ratio_of([found]) == (1.5, (1.5, 1.5))


def test_a_fast_model_runs_several_times_in_a_turn_and_the_shortest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of 2 and 1 ms, of which every third takes 4 ms more: another program had the processor."""
    clock = [0.0]
    passes: list[str] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    ours, base = nn.Linear(1, 1), nn.Linear(1, 1)

    def serve(model: nn.Module) -> None:
        passes.append("ours" if model is ours else "base")
        clock[0] += (0.002 if model is ours else 0.001) + 0.004 * (len(passes) % 3 == 0)

    slower, faster = in_turns(serve, ours, base)
    assert slower == pytest.approx([0.002] * TURNS) and faster == pytest.approx([0.001] * TURNS)
    # 30 ms of each model in each turn: some nine passes of 10/3 ms and thirteen of 7/3 ms.
    assert 8 * (TURNS + 1) <= passes.count("ours") <= 10 * (TURNS + 1)
    assert 12 * (TURNS + 1) <= passes.count("base") <= 14 * (TURNS + 1)


def test_the_interval_of_a_run_is_that_of_the_sign_test() -> None:
    """Of 9 turns the second and the eighth: 9 coins show at most one head with probability 10/512, below 2.5 %."""
    ratios = (1.07, 1.01, 0.7, 1.03, 1.02, 1.04, 1.9, 1.06, 1.05)
    median, ends = ratio_of([turns(*ratios)])
    assert median == 1.04 and ends == pytest.approx((1.01, 1.07))
    for count in (6, 7, 12, 21, 30):
        values = [1 + index / 100 for index in range(count)]
        (_, ends) = ratio_of([turns(*reversed(values))])
        # scipy inverts the binomial test of the share 1/2: the values that it does not reject.
        kept = [k for k in range(count + 1) if stats.binomtest(k, count, 0.5).pvalue > 0.05]
        assert ends == pytest.approx((values[min(kept) - 1], values[max(kept)]))


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """4,000 draws of 9 turns with log-normal noise around a ratio of 1.1; exactly 492/512 of the intervals hold it."""
    generator, held = torch.Generator().manual_seed(0), 0
    for row in (1.1 * torch.randn(4000, 9, generator=generator, dtype=torch.float64).mul(0.2).exp()).tolist():
        _, ends = ratio_of([(tuple(row), (1.0,) * 9)])
        assert ends is not None
        held += ends[0] <= 1.1 <= ends[1]
    share = 1 - 2 * 10 / 512
    assert held / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))


def test_runs_that_differ_widen_the_interval() -> None:
    """Two seeds whose processes are 10 % apart: 18 turns as one would have the interval of their middle."""
    slow, fast = [1.10 + index / 1000 for index in range(9)], [1.00 + index / 1000 for index in range(9)]
    median, ends = ratio_of([turns(*slow), turns(*fast)])
    assert median == pytest.approx((1.008 + 1.100) / 2) and ends == pytest.approx((1.001, 1.107))


def test_a_run_with_too_few_turns_leaves_no_interval() -> None:
    assert ratio_of([turns(1.0, 3.0, 2.0)]) == (2.0, None)
    assert ratio_of([turns(1.0, 1.1, 1.2, 1.3, 1.4, 1.5), turns(1.0)])[1] is None
    assert ratio_of([turns(1.0, 1.1, 1.2, 1.3, 1.4, 1.5)])[1] == pytest.approx((1.0, 1.5))
