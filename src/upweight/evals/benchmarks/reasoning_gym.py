"""reasoning-gym: procedural problems of a hundred families, judged by the family's own verifier (arXiv 2505.24760).

Parts are families, `reasoning_gym:gcd+spell_backward`; without any, one or two of each kind are asked. Of each family
there are 50 problems, drawn from the seed; the package's generators give any number of others for training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from upweight.core.errors import UserError
from upweight.core.protocols import Benchmark, Verifier
from upweight.core.records import Problem, Sample
from upweight.evals.rows import by_source
from upweight.evals.setting import Setting
from upweight.verify.gym import Gym, GymVerifier, draw

FAMILIES = (
    "basic_arithmetic",
    "chain_sum",
    "gcd",
    "simple_equations",
    "caesar_cipher",
    "spell_backward",
    "number_sorting",
    "propositional_logic",
    "syllogism",
    "family_relationships",
    "shortest_path",
    "maze",
    "mini_sudoku",
    "countdown",
)
EACH = 50
SEED = 1_000_000
"""Added to the seed, so that problems to measure by are not those that a recipe trains on with seed 0, 1, 2."""


@dataclass(frozen=True)
class ReasoningGym(Benchmark):
    """Problems of some families."""

    source: Gym
    samples: int
    unsafe: bool
    verifier: Verifier
    name: str = "reasoning_gym"

    def problems(self) -> Sequence[Problem]:
        """Those that are sound; a family may repeat itself, and then has fewer."""
        found: dict[str, Problem] = {}
        for family in self.source.families:
            for index in range(self.source.count):
                problem = draw(self.source, family, index, unsafe=self.unsafe).problem
                if problem is not None:
                    found[problem.id] = problem
        return list(found.values())

    def figures(self, samples: Sequence[Sample]) -> Mapping[str, float]:
        return by_source(samples, self.problems())


def benchmark(setting: Setting) -> Benchmark:
    if setting.data is not None:
        raise UserError(
            f"reasoning_gym takes no file: its problems are made by the package, so {setting.data} is unread"
        )
    families = setting.parts or FAMILIES
    source = Gym(families={family: {} for family in families}, count=EACH, seed=SEED + setting.seed)
    return ReasoningGym(source, setting.samples or 3, setting.unsafe, GymVerifier(unsafe=setting.unsafe))
