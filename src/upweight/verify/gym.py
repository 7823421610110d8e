"""reasoning-gym: a hundred families of procedural problems, each with a verifier of its own (Stojanovski et al.,
arXiv 2505.24760). The optional extra `upweight[gym]`.

The package is never imported here, but in worker processes. Some of its verifiers evaluate the answer as Python, so a
worker runs inside bubblewrap: without network, with nothing that it can write to, in process and user name spaces of
its own, with bounded processor time and memory. Where that is not to be had it is refused, as for programs.

A verifier that raises, hangs or returns no number gives 0 and says so. Answers that could reach Python through a
verifier that evaluates them (calls of anything but an elementary function, attributes, dunder names) are 0 before it
sees them.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upweight.core.errors import IsolationUnavailable, UserError
from upweight.core.identity import fingerprint
from upweight.core.protocols import Verifier
from upweight.core.records import Completion, Message, Problem, Verdict
from upweight.rollout.enclosure import ADVICE, bubblewrap
from upweight.rollout.inside import pack
from upweight.verify.answers import decided_by_rule, extract, shown, visible_part
from upweight.verify.exact import LONGEST_ANSWER
from upweight.verify.workers import WorkerDied, Workers

INSTRUCTION = "Think, then give the final answer, and nothing else, between <answer> and </answer>."
JUNK = ("I do not know", "0", "nan")
"""What no verifier may accept, unless it is the answer; nor the answer of another problem."""

MAKE_SECONDS = 60.0
"""Processor time to make one problem."""

EVALUATED = frozenset(
    [
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    ]
)
"""Families of reasoning-gym 0.1.25 whose verifier evaluates the answer, by eval or through sympy."""

_REACHES_PYTHON = re.compile(r"__|\\|\.\s*[^\W\d]|lambda")
_NAME = re.compile(r"[^\W\d]\w*")
_FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_FUNCTIONS |= {"asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs", "pi"}
_OPEN, _CLOSE = "<answer>", "</answer>"
_WORKER = "from upweight.verify import gym_worker; gym_worker.main()"


@dataclass(frozen=True)
class Gym:
    """Problems to draw from reasoning-gym.

    Attributes:
        families: by name ("chain_sum", "gcd"), settings of the family's own configuration; {} for its defaults.
        count: problems of each family; fewer come out where a family repeats itself or a problem is unsound.
        seed: of the package's generators.
        instruction: written below each question.
    """

    families: Mapping[str, Mapping[str, Any]]
    count: int = 500
    seed: int = 0
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        if not self.families or self.count < 1:
            raise UserError(f"{self.count} problems of the families {[*self.families]}: name one, and at least 1 each")


@dataclass(frozen=True)
class GymVerifier(Verifier):
    """1 for an answer that the family's own verifier gives full marks, else 0.

    The answer is the last <answer>...</answer> after the thought, or else what `answers.extract` finds.

    Attributes:
        partial: give the family's own marks, 0-1, which pay some families' wrong or empty answers a little.
        cpu_seconds: of one verdict.
        unsafe: run without isolation where isolation is not to be had.
    """

    partial: bool = False
    cpu_seconds: float = 5.0
    unsafe: bool = False

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        if problem.check is None:
            raise UserError(f"problem {problem.id} (source {problem.source!r}) was not drawn from reasoning-gym")
        return [self._judge(problem.check, completion) for completion in group]

    def _judge(self, check: str, completion: Completion) -> Verdict:
        if completion.truncated:
            return Verdict(0.0, "truncated")
        answer = answer_of(completion.text)
        if answer is None:
            return Verdict(0.0, "no answer found")
        return self.marks(check, answer)

    def marks(self, check: str, answer: str) -> Verdict:
        """The verdict on an answer by what a problem's `check` says."""
        spec = json.loads(check)
        if spec["family"] in EVALUATED and _reaches_python(answer):
            return Verdict(0.0, f"refused, since the verifier would run it: got {shown(answer)}")
        try:
            told = _workers(self.unsafe).ask({**spec, "answer": answer, "seconds": self.cpu_seconds}, self.cpu_seconds)
        except WorkerDied:
            return Verdict(0.0, f"timed out: got {shown(answer)}")
        marks = told.get("score")
        if not isinstance(marks, (int, float)) or not math.isfinite(marks):
            return Verdict(0.0, f"verifier failed: {told.get('error', marks)} on {shown(answer)}")
        marks = min(1.0, max(0.0, float(marks)))
        right = marks > 1 - 1e-6
        reason = "equal" if right else f"different: got {shown(answer)}, {marks:.2f} of its family's marks"
        return Verdict(marks if self.partial else float(right), reason)


def answer_of(text: str) -> str | None:
    """The answer that a completion hands in, None where there is none."""
    visible = visible_part(text)
    if visible is None:
        return None
    before, closed, _ = visible.rpartition(_CLOSE)
    _, opened, answer = before.rpartition(_OPEN)
    return (answer.partition(_CLOSE)[0].strip() or None) if closed and opened else extract(text)


def _reaches_python(answer: str) -> bool:
    """Whether evaluating an answer could do more than compute. What is called by a name of Python's or sympy's can:
    eval(chr(49)), and Integral(x, x) is its own derivative's integral without anybody having integrated."""
    if _REACHES_PYTHON.search(answer):
        return True
    named = (name for name in _NAME.findall(answer) if len(name) > 1)
    return "(" in answer and (not {*"'\"[{"}.isdisjoint(answer) or not _FUNCTIONS.issuperset(named))


@dataclass(frozen=True, slots=True)
class Drawn:
    """A problem of a family, or why there is none."""

    family: str
    problem: Problem | None
    flaw: str | None = None


def draw(source: Gym, family: str, index: int, *, unsafe: bool = False) -> Drawn:
    """One problem, tried on its own answer and on what is none; a flaw where its verifier is wrong about any.

    Raises UserError where there is no such family, or its configuration is refused.
    """
    spec = {"family": family, "config": pack({**source.families[family], "seed": source.seed, "size": source.count})}
    try:
        told = _workers(unsafe).ask({**spec, "index": index, "seconds": MAKE_SECONDS}, MAKE_SECONDS)
    except WorkerDied:
        return Drawn(family, None, f"not made within {MAKE_SECONDS:g} s")
    if "unknown" in told:
        raise UserError(f"reasoning-gym has no family {family!r}: it has {', '.join(told['unknown'])}")
    if "error" in told:
        settings = dict(source.families[family])
        raise UserError(f"reasoning-gym cannot make {family!r} with the settings {settings}: {told['error']}")
    question = f"{told['question']}\n\n{source.instruction}".strip()
    check = json.dumps({**spec, "entry": told["entry"]}, separators=(",", ":"))
    name = f"{family}-{fingerprint(question)}"
    problem = Problem(name, (Message("user", question),), answer=told["answer"], source=family, check=check)
    flaw = _flaw(GymVerifier(unsafe=unsafe), check, problem.answer)
    if flaw is None:
        other = _answer_of_another(spec, (index + 1) % source.count, unsafe)
        flaw = _accepted(GymVerifier(unsafe=unsafe), check, problem.answer, other, "the answer of another problem")
    return Drawn(family, None if flaw else problem, flaw)


def _answer_of_another(spec: Mapping[str, Any], index: int, unsafe: bool) -> str | None:
    try:
        told = _workers(unsafe).ask({**spec, "index": index, "seconds": MAKE_SECONDS}, MAKE_SECONDS)
    except WorkerDied:
        return None
    answer: str | None = told.get("answer")
    return answer


def _flaw(verifier: GymVerifier, check: str, answer: str | None) -> str | None:
    own = None if answer is None else verifier.marks(check, answer)
    if own is not None and own.score < 1:
        return f"its own answer is not accepted ({own.reason.partition(':')[0]})"
    return next(filter(None, (_accepted(verifier, check, answer, junk, repr(junk)) for junk in JUNK)), None)


def _accepted(verifier: GymVerifier, check: str, answer: str | None, wrong: str | None, name: str) -> str | None:
    """That a wrong answer is accepted; None where it is not, or is the answer."""
    if wrong is None or wrong == answer:
        return None
    short = answer is not None and max(len(answer), len(wrong)) <= LONGEST_ANSWER
    if short and decided_by_rule(wrong, answer or ""):
        return None
    return f"{name} is accepted" if verifier.marks(check, wrong).score > 0 else None


_started: dict[bool, Workers] = {}


def _workers(unsafe: bool) -> Workers:
    if unsafe not in _started:
        _started[unsafe] = Workers(lambda: (_command(unsafe), _environment()))
    return _started[unsafe]


def _environment() -> dict[str, str]:
    """A fixed hash seed, since some families draw from sets; TMPDIR is the one place where a worker can write."""
    import_path = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    scratch = dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), "/dev/shm")
    return {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(import_path), **scratch}


def _command(unsafe: bool) -> list[str]:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError("these problems come from reasoning-gym, which is not installed: pip install 'upweight[gym]'")
    python = [sys.executable, "-P", "-B", "-W", "ignore", "-c", _WORKER]
    program = bubblewrap()
    problem = "bubblewrap is not installed"
    if program is not None:
        walls = ["--unshare-user", "--unshare-all", "--cap-drop", "ALL", "--ro-bind", "/", "/"]
        walls += ["--tmpfs", "/proc", "--tmpfs", "/dev", "--dir", "/dev/shm"]
        for device in ("/dev/null", "/dev/urandom"):
            walls += ["--dev-bind", device, device]
        tried = subprocess.run([program, *walls, "--", sys.executable, "-I", "-S", "-c", ""], capture_output=True)
        if tried.returncode == 0:
            return [program, *walls, "--", *python]
        said = tried.stderr[-500:].decode(errors="replace").strip()
        problem = f"bubblewrap could not isolate a program here ({said})"
    if not unsafe:
        raise IsolationUnavailable(
            f"the verifiers of reasoning-gym evaluate answers, which a model wrote, and {problem}. {ADVICE}"
        )
    warnings.warn(
        f"{problem}: the verifiers of reasoning-gym now evaluate answers WITHOUT isolation, as was asked for",
        RuntimeWarning,
        stacklevel=2,
    )
    return python
