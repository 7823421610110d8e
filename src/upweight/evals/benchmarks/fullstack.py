"""Fullstack Bench: programs of real work, judged by running them with their tests, avg@3 (ByteDance 2024).

Of its 16 languages those are asked that the sandbox runs, which is Python, and of these the questions that need nothing
but the standard library, which is all that the sandbox holds; `figures` says how large that share is.
Tests usually follow the program: they run in a process of their own, so that the program cannot decide about itself.
Where a test has a place for the program inside it (#<INSERT>) or comes with files, both run as one program, which
passes where it reaches its end; such a program could forge that, if it tried.

Parts are the languages of the questions, `fullstack:en` (the default) and `fullstack:zh`.
"""

import base64
import binascii
import json
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from upweight.core.errors import UserError
from upweight.core.protocols import Benchmark, Verifier
from upweight.core.records import Completion, Message, Problem, Sample, Verdict
from upweight.evals.rows import DataSet, Questions, Row, by_source
from upweight.evals.setting import Setting
from upweight.rollout.sandbox import Sandbox, SandboxLimits, shared_sandbox
from upweight.verify.code_tests import called, program_of, run_tests

PARTS = ("en", "zh")
RUNS = ("python",)
PLACE = "#<INSERT>"
LIMITS = SandboxLimits(cpu_seconds=20.0, wall_seconds=30.0, memory_bytes=1 << 30)
_MAIN = re.compile(r"^if __name__ ==.*", re.MULTILINE | re.DOTALL)


def problem(row: Row, index: int) -> Problem | None:
    """One row whose language runs here; `labels` and `test` may be JSON texts. The test carries its files along."""
    labels, test = _read(row["labels"]), _read(row["test"])
    if labels.get("execution_language") not in RUNS or labels.get("programming_language") not in RUNS:
        return None
    if not _imports(f"{row.get('canonical_solution') or ''}\n{test['code']}") <= sys.stdlib_module_names:
        return None
    kept = json.dumps({"code": test["code"], "files": _read(test.get("asset") or {})})
    messages = (Message("user", str(row["content"])),)
    return Problem(f"fullstack-{row['id']}", messages, None, (kept,), str(labels.get("category", "fullstack")))


def _imports(code: str) -> set[str]:
    """The packages that some code names in its imports, whether it parses or not."""
    named = re.findall(r"^\s*(?:from\s+(\w+)[\w.]*\s+import\b|import\s+(\w[\w., ]*))", code, re.MULTILINE)
    listed = (name for source, several in named for name in ([source] if source else several.split(",")))
    return {name.split()[0].partition(".")[0] for name in listed if name.strip()}


def _read(value: Any) -> dict[str, Any]:
    found = json.loads(value) if isinstance(value, str) else value
    return dict(found)


@dataclass(frozen=True)
class ProgramVerifier(Verifier):
    """1 for a program that its test accepts, else 0."""

    sandbox: Sandbox | None = None
    limits: SandboxLimits = LIMITS

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        sandbox = self.sandbox or shared_sandbox()
        test = json.loads(problem.tests[0])
        return sandbox.map(lambda completion: self._judge(sandbox, test, completion), group)

    def _judge(self, sandbox: Sandbox, test: Mapping[str, Any], completion: Completion) -> Verdict:
        if completion.truncated:
            return Verdict(0.0, "truncated")
        code = program_of(completion.text, defines=called((test["code"],)))
        if code is None:
            return Verdict(0.0, "no program found")
        if PLACE not in test["code"] and not test["files"]:
            failures = run_tests(sandbox, _MAIN.sub("", code), [test["code"]], limits=self.limits)
            return Verdict(0.0, f"failed: {failures[0]}") if failures else Verdict(1.0, "passed")
        end = secrets.token_hex(8)
        whole = test["code"].replace(PLACE, code, 1) if PLACE in test["code"] else f"{code}\n{test['code']}"
        done = sandbox.run(f"{_files(test['files'])}\n{whole}\nprint({end!r})\n", limits=self.limits)
        if done.ok and done.stdout.rstrip().endswith(end):
            return Verdict(1.0, "passed")
        why = "timed out" if done.timed_out else (done.stderr.strip() or f"exit code {done.exit_code}")[-200:]
        return Verdict(0.0, f"failed: {why}")


def _files(files: Mapping[str, str]) -> str:
    """Python that writes the test's files (name to base64) where the program runs."""
    lines = []
    for name, content in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"fullstack: a test's file is named {name!r}, which leads out of its directory")
        try:
            base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise UserError(f"fullstack: the test's file {name!r} is no base64 ({error})") from None
        lines.append(
            f"import base64, pathlib; p = pathlib.Path({name!r}); p.parent.mkdir(parents=True, exist_ok=True); "
            f"p.write_bytes(base64.b64decode({content!r}))"
        )
    return "\n".join(lines)


def benchmark(setting: Setting) -> Benchmark:
    part = setting.parts[0] if setting.parts else "en"
    if part not in PARTS or len(setting.parts) > 1:
        raise UserError(f"fullstack has the parts {' and '.join(PARTS)}: name one of them, fullstack:en")
    data = DataSet(hub="ByteDance/FullStackBench", subset=part)
    name = "fullstack" if part == "en" else f"fullstack:{part}"

    def beside(samples: Sequence[Sample], problems: Sequence[Problem]) -> Mapping[str, float]:
        share = len(problems) / len(data.rows(name, setting.data))
        return {**by_source(samples, problems), "share of the questions asked": share}

    whole = replace(setting, parts=())  # the language is another data set
    return Questions(name, data, problem, ProgramVerifier(setting.sandbox), setting.samples or 3, whole, beside=beside)
