"""GSM8K: 1,319 word problems of grade school (Cobbe et al. 2021). The answer stands after #### in the solution."""

from upweight.core.protocols import Benchmark
from upweight.core.records import Problem
from upweight.evals.prompts import question
from upweight.evals.rows import DataSet, Questions, Row
from upweight.evals.setting import Setting
from upweight.verify.answers import AnswerVerifier

DATA = DataSet(hub="openai/gsm8k", subset="main")


def problem(row: Row, index: int) -> Problem:
    _, marked, answer = str(row["answer"]).rpartition("####")
    if not marked:
        raise ValueError("its answer has no ####")
    return Problem(f"gsm8k-{index}", question(row["question"]), answer.strip().replace(",", ""), (), "gsm8k")


def benchmark(setting: Setting) -> Benchmark:
    return Questions("gsm8k", DATA, problem, AnswerVerifier(), setting.samples or 3, setting)
