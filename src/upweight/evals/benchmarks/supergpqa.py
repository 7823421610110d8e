"""SuperGPQA: 26,529 graduate-level questions of up to ten options in 285 fields, avg@3 (M-A-P 2025).

The options keep their published order, in which the right one is already spread. Shares are told by discipline.
"""

from upweight.core.protocols import Benchmark
from upweight.core.records import Problem
from upweight.evals.prompts import options
from upweight.evals.rows import DataSet, Questions, Row
from upweight.evals.setting import Setting
from upweight.verify.choices import ChoiceVerifier

DATA = DataSet(hub="m-a-p/SuperGPQA", split="train")


def problem(row: Row, index: int) -> Problem:
    right = str(row["answer_letter"]).strip()
    if row["options"]["ABCDEFGHIJ".index(right)] != row["answer"]:
        raise ValueError(f"its answer is not option {right}")
    messages = options(row["question"], row["options"])
    return Problem(str(row.get("uuid", index)), messages, right, (), str(row.get("discipline", "supergpqa")))


def benchmark(setting: Setting) -> Benchmark:
    return Questions("supergpqa", DATA, problem, ChoiceVerifier(), setting.samples or 3, setting)
