"""Verifiers of somebody else's, held to their contract: what they do wrong ends the run and is named."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from upweight.core.errors import UserError
from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Problem, Verdict


@dataclass(frozen=True)
class GuardedVerifier(Verifier):
    """Another verifier whose exceptions, silence beyond `seconds` a group and malformed verdicts raise UserError.

    A wrong reward is worse than none: nothing is replaced by 0, and a run goes on from its checkpoint once the verifier
    is mended.
    """

    verifier: Verifier
    seconds: float = 600.0

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        name = type(self.verifier).__name__
        where = f"the verifier {name} on problem {problem.id} (source {problem.source!r})"
        outcome: list[Any] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                # a tuple: one that sorts its group in place, or empties it, would be believed about other completions
                outcome.append(self.verifier.score(problem, tuple(group)))
            except BaseException as error:  # noqa: BLE001 - somebody else's code, sys.exit too; told below
                failed.append(error)

        thread = threading.Thread(target=work, name=f"verifier {name}", daemon=True)
        thread.start()
        thread.join(self.seconds)
        if failed:
            if isinstance(failed[0], UserError):
                raise failed[0]
            said = f"{type(failed[0]).__name__}: {failed[0]}"
            raise UserError(f"{where} raised {said}. Mend it, and run again: what was trained is kept") from failed[0]
        if not outcome:
            raise UserError(
                f"{where} has not answered within {self.seconds:g} s: bound what it does, or raise "
                "RewardConfig.seconds. What was trained is kept"
            )
        verdicts = outcome[0]
        if not isinstance(verdicts, list) or len(verdicts) != len(group):
            given = f"{len(verdicts)} verdicts" if isinstance(verdicts, list) else f"a {type(verdicts).__name__}"
            raise UserError(f"{where} gave {given} for {len(group)} completions: expected a list of one Verdict each")
        for verdict in verdicts:
            if not (isinstance(verdict, Verdict) and isinstance(verdict.score, Real) and math.isfinite(verdict.score)):
                raise UserError(f"{where} gave {verdict!r}: expected a Verdict with a finite score")
        return [Verdict(float(verdict.score), str(verdict.reason)) for verdict in verdicts]
