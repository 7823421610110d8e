"""Timelines: the shapes by hand, the boundaries, the refusals, and the report's own 23T tokens."""

import math

import pytest

from upweight.core.errors import UserError
from upweight.train.timeline import Phase, Timeline, constant, cosine, fg_wsd, warmup_decay, wsd

T = 10**12
REPORT_MIXTURES = {
    "warmup": {"high": 0.5, "medium": 0.5},
    "diverse": {"high": 0.5, "medium": 0.5},
    "high_quality": {"high": 1.0},
    "decay": {"high": 0.6, "reasoning": 0.4},
}


def report() -> Timeline:
    return fg_wsd(
        warmup=T // 10,
        diverse=124 * T // 10,
        high_quality=65 * T // 10,
        decay=4 * T,
        peak_lr=4.5e-4,
        end_lr=1.5e-6,
        mixtures=REPORT_MIXTURES,
        context=4096,
        rope_base=1e4,
        decay_context=65536,
        decay_rope_base=1e6,
    )


def test_the_reports_timeline_is_23t_tokens() -> None:
    timeline = report()
    assert timeline.tokens == 23 * T  # 0.1 + 12.4 + 6.5 + 4.0
    assert timeline.at(0).lr == 0
    assert timeline.at(T // 20).lr == pytest.approx(2.25e-4)  # half of the warmup
    assert timeline.at(T // 10).phase == "diverse"  # the first token after a phase belongs to the next
    assert timeline.at(10 * T).lr == timeline.at(15 * T).lr == 4.5e-4
    decay = timeline.at(21 * T)  # half of the decay: (4.5e-4 + 1.5e-6) / 2
    assert decay.lr == pytest.approx(2.2575e-4)
    assert (decay.context, decay.rope_base, decay.passed, decay.remaining) == (65536, 1e6, 2 * T, 2 * T)
    assert timeline.at(23 * T - 1).lr == pytest.approx(1.5e-6, rel=1e-6)
    # high: 0.05 + 6.2 + 6.5 + 2.4
    assert timeline.needed()["high"] == pytest.approx(15.15 * T)


def test_past_the_end_is_refused() -> None:
    timeline = constant(total=10, lr=1.0)
    assert timeline.at(9).lr == 1.0
    for place in (10, 11, -1):
        with pytest.raises(ValueError, match="past the timeline's 10 tokens"):
            timeline.at(place)


@pytest.mark.parametrize(
    ("shape", "quarter"),
    [
        ("linear", 0.775),  # 1 + (0.1 - 1) / 4
        ("cosine", 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2),
        ("sqrt", 0.55),  # 1 - 0.9 * 0.5
        ("exponential", 0.1**0.25),
    ],
)
def test_shapes(shape: str, quarter: float) -> None:
    phase = Phase("decay", 100, 1.0, 0.1, shape=shape)  # type: ignore[arg-type]
    timeline = Timeline([phase])
    assert timeline.at(0).lr == pytest.approx(1.0)
    assert timeline.at(25).lr == pytest.approx(quarter)


def test_special_cases() -> None:
    assert [phase.name for phase in wsd(warmup=1, stable=2, decay=3, peak_lr=1.0).phases] == [
        "warmup",
        "stable",
        "decay",
    ]
    assert cosine(warmup=10, total=110, peak_lr=1.0).at(60).lr == pytest.approx(0.5)  # half way down
    assert constant(total=5, lr=0.3).at(4).lr == 0.3
    assert warmup_decay(1, 1.0).tokens == 1
    assert warmup_decay(20, 1.0, 0.1).tokens == 20


def test_the_first_step_of_a_warmup_trains() -> None:
    timeline = wsd(warmup=3, stable=2, decay=0, peak_lr=1.0)  # 1/4, 2/4, 3/4, then the peak
    assert [timeline.at(step).lr for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert warmup_decay(10, 1.0, 0.2).at(0).lr == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixture": {"a": 0.5, "b": 0.4}}, "sums to 0.9"),
        ({"mixture": {"a": 1.5, "b": -0.5}}, "negative share"),
        ({"tokens": 0}, "at least one"),
        ({"shape": "exponential", "end_lr": 0.0}, "never reaches 0"),
        ({"shape": "constant", "end_lr": 0.0}, "name another shape"),
        ({"start_lr": -1.0}, "0 or above"),
        ({"context": -1}, "0 or above"),
    ],
)
def test_a_wrong_phase_is_refused(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"name": "p", "tokens": 10, "start_lr": 1.0, "end_lr": 1.0, "mixture": {"a": 1.0}}
    with pytest.raises(UserError, match=message):
        Phase(**{**good, **change})  # type: ignore[arg-type]


def test_a_wrong_timeline_is_refused() -> None:
    with pytest.raises(UserError, match="without phases"):
        Timeline([])
    with pytest.raises(UserError, match="two phases are called"):
        Timeline([Phase("a", 1, 1.0, 1.0), Phase("a", 1, 1.0, 1.0)])
    with pytest.raises(UserError, match="no mixture for the phases"):
        fg_wsd(
            warmup=0,
            diverse=1,
            high_quality=0,
            decay=1,
            peak_lr=1.0,
            end_lr=0.0,
            mixtures={"diverse": {"a": 1.0}},
            context=8,
            rope_base=1.0,
            decay_context=8,
            decay_rope_base=1.0,
        )
