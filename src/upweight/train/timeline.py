"""FG-WSD: learning rate, mixture, context and RoPE base as one function of how far training has come.

Fine-Grained Warmup-Stable-Decay (arXiv 2512.06266, section 2) is a schedule and a data curriculum in one: the rate
stays constant through the stable phases while the mixture gets better. A timeline is data: phases in order, each with
what holds in it. Its unit is whatever the loader counts: tokens in pretraining, optimizer steps elsewhere.

No step straddles two phases. A step belongs to the phase of its first unit, it runs at the rate of its first unit, and
loaders that count tokens end their last step of a phase exactly at the phase's end (see train/loader.py).

Within a phase, with x the share of it that has passed, the rate goes from `start_lr` a to `end_lr` b:

    constant     a                        (a = b)
    linear       a + (b - a) x
    cosine       b + (a - b) (1 + cos(pi x)) / 2
    sqrt         a + (b - a) sqrt(x)      (1 - sqrt, the decay of Hägele et al., arXiv 2405.18392)
    exponential  a (b / a)^x
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from upweight.core.errors import UserError

Shape = Literal["linear", "cosine", "sqrt", "exponential", "constant"]

MIXTURE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: unique within its timeline; figures are counted by it.
        tokens: its length in the timeline's unit.
        start_lr, end_lr: the learning rate at its first unit, and the one it reaches where it ends.
        mixture: the share of each source, summing to 1. Empty where the loader knows one source only.
        context: tokens of a row.
        rope_base: base of the rotary frequencies; 0 leaves the model's own.
        shape: how the rate goes from start to end.
    """

    name: str
    tokens: int
    start_lr: float
    end_lr: float
    mixture: Mapping[str, float] = field(default_factory=dict)
    context: int = 0
    rope_base: float = 0.0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        where = f"phase {self.name!r}"
        if self.tokens < 1:
            raise UserError(f"{where} has {self.tokens} tokens: a phase is at least one long; leave it out instead")
        if self.start_lr < 0 or self.end_lr < 0:
            raise UserError(f"{where} goes from learning rate {self.start_lr} to {self.end_lr}: expected 0 or above")
        if self.shape == "exponential" and not (self.start_lr > 0 and self.end_lr > 0):
            raise UserError(f"{where} is exponential, which never reaches 0: give it rates above 0, or another shape")
        if self.shape == "constant" and self.start_lr != self.end_lr:
            raise UserError(f"{where} is constant but goes from {self.start_lr} to {self.end_lr}: name another shape")
        if self.context < 0 or self.rope_base < 0:
            raise UserError(f"{where} has context {self.context} and RoPE base {self.rope_base}: expected 0 or above")
        if self.mixture:
            check_mixture(self.mixture, where)

    def lr(self, share: float) -> float:
        """The learning rate where `share` of the phase has passed."""
        a, b = self.start_lr, self.end_lr
        match self.shape:
            case "constant":
                return a
            case "linear":
                return a + (b - a) * share
            case "cosine":
                return b + (a - b) * (1 + math.cos(math.pi * share)) / 2
            case "sqrt":
                return a + (b - a) * math.sqrt(share)
            case "exponential":
                return float(a * (b / a) ** share)


@dataclass(frozen=True, slots=True)
class Setting:
    """What holds for the next unit.

    Attributes:
        passed: units of this phase that are behind.
        remaining: units of this phase that are ahead, the next one included.
    """

    phase: str
    lr: float
    mixture: Mapping[str, float]
    context: int
    rope_base: float
    passed: int
    remaining: int


@dataclass(frozen=True)
class Timeline:
    """Phases in order."""

    phases: tuple[Phase, ...]

    def __init__(self, phases: Sequence[Phase]) -> None:
        object.__setattr__(self, "phases", tuple(phases))
        if not self.phases:
            raise UserError("a timeline without phases trains nothing: give at least one")
        names = [phase.name for phase in self.phases]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two phases are called {name!r}: figures are counted by phase, so names must differ")

    @property
    def tokens(self) -> int:
        """The length of the whole timeline."""
        return sum(phase.tokens for phase in self.phases)

    def at(self, tokens_seen: int) -> Setting:
        """What holds for the next token after `tokens_seen`.

        Raises ValueError past the end: a trainer that asks has lost count of its tokens.
        """
        ends = list(itertools.accumulate(phase.tokens for phase in self.phases))
        if not 0 <= tokens_seen < ends[-1]:
            raise ValueError(f"token {tokens_seen:,} is past the timeline's {ends[-1]:,} tokens: extend the last phase")
        index = bisect.bisect_right(ends, tokens_seen)
        phase = self.phases[index]
        passed = tokens_seen - (ends[index] - phase.tokens)
        return Setting(
            phase=phase.name,
            lr=phase.lr(passed / phase.tokens),
            mixture=phase.mixture,
            context=phase.context,
            rope_base=phase.rope_base,
            passed=passed,
            remaining=phase.tokens - passed,
        )

    def entered(self, tokens_seen: int) -> list[Setting]:
        """What held at the first unit of each phase that has begun when `tokens_seen` units are behind, in order."""
        ends = itertools.accumulate(phase.tokens for phase in self.phases)
        begins = [0, *ends][: len(self.phases)]
        return [self.at(begin) for begin in begins if begin < tokens_seen]

    def needed(self) -> dict[str, float]:
        """Tokens that the mixtures ask of each source over the whole timeline."""
        total: dict[str, float] = {}
        for phase in self.phases:
            for source, share in phase.mixture.items():
                total[source] = total.get(source, 0.0) + share * phase.tokens
        return total


def check_mixture(mixture: Mapping[str, float], where: str) -> None:
    """Raises UserError where shares are negative or do not sum to 1."""
    if any(not share >= 0 for share in mixture.values()):
        raise UserError(f"{where} has a negative share in its mixture {dict(mixture)}: shares lie in 0-1")
    total = math.fsum(mixture.values())
    if abs(total - 1) > MIXTURE_TOLERANCE:
        raise UserError(f"{where}: the mixture {dict(mixture)} sums to {total:g}: shares must sum to 1")


def fg_wsd(
    *,
    warmup: int,
    diverse: int,
    high_quality: int,
    decay: int,
    peak_lr: float,
    end_lr: float,
    mixtures: Mapping[str, Mapping[str, float]],
    context: int,
    rope_base: float,
    decay_context: int,
    decay_rope_base: float,
    shape: Shape = "linear",
) -> Timeline:
    """The report's four phases: warmup, diverse (diversity-enriched stable), high_quality (stable), decay.

    Args:
        warmup, diverse, high_quality, decay: lengths in tokens; 0 leaves the phase out.
        mixtures: the mixture of each phase, by the phase's name.
        decay_context, decay_rope_base: the longer context of the decay, and the RoPE base it needs (ABF).
        shape: of the decay.
    """
    plan = [
        ("warmup", warmup, 0.0, peak_lr, context, rope_base, "linear"),
        ("diverse", diverse, peak_lr, peak_lr, context, rope_base, "constant"),
        ("high_quality", high_quality, peak_lr, peak_lr, context, rope_base, "constant"),
        ("decay", decay, peak_lr, end_lr, decay_context, decay_rope_base, shape),
    ]
    kept = [row for row in plan if row[1]]
    missing = [row[0] for row in kept if row[0] not in mixtures]
    if missing:
        raise UserError(f"no mixture for the phases {missing}: `mixtures` names {sorted(mixtures)}")
    return Timeline(
        [Phase(name, n, a, b, mixtures[name], length, base, form) for name, n, a, b, length, base, form in kept]  # type: ignore[arg-type]
    )


def wsd(
    *,
    warmup: int,
    stable: int,
    decay: int,
    peak_lr: float,
    end_lr: float = 0.0,
    mixture: Mapping[str, float] | None = None,
    context: int = 0,
    rope_base: float = 0.0,
    shape: Shape = "linear",
) -> Timeline:
    """Vanilla warmup-stable-decay: one mixture throughout. A length of 0 leaves its phase out.

    Unit i of the warmup, counted from 0, has the rate peak_lr (i + 1) / (warmup + 1): where the unit is a step, the
    first one would otherwise train nothing.
    """
    shares = mixture or {}
    phases = []
    if warmup:
        phases.append(Phase("warmup", warmup, peak_lr / (warmup + 1), peak_lr, shares, context, rope_base))
    if stable:
        phases.append(Phase("stable", stable, peak_lr, peak_lr, shares, context, rope_base, "constant"))
    if decay:
        phases.append(Phase("decay", decay, peak_lr, end_lr, shares, context, rope_base, shape))
    return Timeline(phases)


def cosine(
    *,
    warmup: int,
    total: int,
    peak_lr: float,
    end_lr: float = 0.0,
    mixture: Mapping[str, float] | None = None,
    context: int = 0,
    rope_base: float = 0.0,
) -> Timeline:
    """Linear warmup, then one cosine down to `end_lr` over what is left of `total`."""
    return wsd(
        warmup=warmup,
        stable=0,
        decay=total - warmup,
        peak_lr=peak_lr,
        end_lr=end_lr,
        mixture=mixture,
        context=context,
        rope_base=rope_base,
        shape="cosine",
    )


def constant(
    *,
    total: int,
    lr: float,
    warmup: int = 0,
    mixture: Mapping[str, float] | None = None,
    context: int = 0,
    rope_base: float = 0.0,
) -> Timeline:
    """One learning rate throughout, after an optional linear warmup that is part of `total`."""
    return wsd(
        warmup=warmup,
        stable=total - warmup,
        decay=0,
        peak_lr=lr,
        end_lr=lr,
        mixture=mixture,
        context=context,
        rope_base=rope_base,
    )


def warmup_decay(
    steps: int, peak_lr: float, warmup_share: float = 0.1, *, context: int = 0, rope_base: float = 0.0
) -> Timeline:
    """Fine-tuning's schedule over `steps`: linear warmup, then linear decay to a tenth of the peak."""
    warmup = min(max(1, round(steps * warmup_share)), steps - 1)
    return wsd(
        warmup=warmup,
        stable=0,
        decay=steps - warmup,
        peak_lr=peak_lr,
        end_lr=0.1 * peak_lr,
        context=context,
        rope_base=rope_base,
    )
