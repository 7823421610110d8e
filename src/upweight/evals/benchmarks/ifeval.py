"""IFEval: 541 prompts of one to three instructions that rules can check (Zhou et al. 2023).

avg@k is the paper's strict accuracy of prompts; the share of single instructions that were followed stands beside it.
"""

import json
import re
from collections.abc import Mapping, Sequence

from upweight.core.protocols import Benchmark
from upweight.core.records import Message, Problem, Sample
from upweight.evals.rows import DataSet, Questions, Row
from upweight.evals.setting import Setting
from upweight.verify.instructions import InstructionVerifier

DATA = DataSet(hub="google/IFEval", split="train")
_FOLLOWED = re.compile(r"followed (\d+) of (\d+)")


def problem(row: Row, index: int) -> Problem:
    """One row. Parquet fills the arguments that a rule does not take with null, so these are left out."""
    arguments = [{name: value for name, value in given.items() if value is not None} for given in row["kwargs"]]
    rules = list(zip(row["instruction_id_list"], arguments, strict=True))
    return Problem(f"ifeval-{row.get('key', index)}", (Message("user", row["prompt"]),), json.dumps(rules))


def followed(samples: Sequence[Sample], problems: Sequence[Problem]) -> Mapping[str, float]:
    """The share of all instructions that were followed."""
    rules = {problem.id: len(json.loads(problem.answer or "[]")) for problem in problems}
    told = [_FOLLOWED.match(sample.reason) for sample in samples]
    kept = sum(int(found.group(1)) for found in told if found)
    return {"instructions followed": kept / sum(rules[sample.problem] for sample in samples)}


def benchmark(setting: Setting) -> Benchmark:
    return Questions("ifeval", DATA, problem, InstructionVerifier(), setting.samples or 3, setting, beside=followed)
