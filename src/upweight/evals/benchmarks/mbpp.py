"""MBPP, sanitized: 257 short Python tasks with three tests each, which the task shows (Austin et al. 2021)."""

from upweight.core.protocols import Benchmark
from upweight.core.records import Message, Problem
from upweight.evals.rows import DataSet, Questions, Row
from upweight.evals.setting import Setting
from upweight.verify.code_tests import CodeVerifier

DATA = DataSet(hub="google-research-datasets/mbpp", subset="sanitized")


def problem(row: Row, index: int) -> Problem:
    """One row of the sanitized split (`prompt`, `test_imports`) or of the full one (`text`, `test_setup_code`)."""
    text = row["prompt"] if "prompt" in row else row["text"]
    setup = row["test_imports"] if "test_imports" in row else [row.get("test_setup_code") or ""]
    above = "\n".join(line for line in setup if line)
    tests = tuple(f"{above}\n{test}" if above else str(test) for test in row["test_list"])
    shown = "\n".join(row["test_list"])
    asked = f"{text.strip()}\nYour code has to pass these tests:\n\n{shown}\n\nReply with one ```python block."
    return Problem(f"mbpp-{row['task_id']}", (Message("user", asked),), None, tests, "mbpp")


def benchmark(setting: Setting) -> Benchmark:
    return Questions("mbpp", DATA, problem, CodeVerifier(setting.sandbox), setting.samples or 3, setting)
