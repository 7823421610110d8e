from collections.abc import Sequence
from dataclasses import dataclass, field

from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion, Message, Problem
from upweight.verify.python_agent import PythonAgentVerifier, call_of

PROBLEM = Problem("p", (Message("user", "Which primes are below 6?"),), answer="the primes p with p < 6")
CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "print(2 + 3)"}}\n</tool_call>'


def completion(text: str, stop: str = "end") -> Completion:
    return Completion(tokens=(1,), logprobs=(), text=text, stop=stop, policy="test")


@dataclass
class _Agent(Sampler):
    replies: list[str]
    seen: list[Sequence[Message]] = field(default_factory=list)

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        assert not isinstance(prompts[0], str)
        self.seen.append(prompts[0])
        return [[completion(self.replies[len(self.seen) - 1])]]


@dataclass(frozen=True)
class _Execution:
    stdout: str
    stderr: str = ""
    timed_out: bool = False


def test_agent_runs_python_and_says_its_verdict() -> None:
    ran: list[str] = []

    def run_python(code: str) -> _Execution:
        ran.append(code)
        return _Execution("5\n")

    agent = _Agent([f"Let me see. {CALL}\nVerdict: different", "Both list them.\n**Verdict: equal**"])
    group = [completion("\\boxed{2, 3, 5}"), completion("none"), completion("\\boxed{2, 3, 5}")]
    verdicts = PythonAgentVerifier(agent, run_python).score(PROBLEM, group)
    # the verdict beside the call was said before the output was seen, and does not count; the repeat is not asked again
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 1.0]
    assert ran == ["print(2 + 3)"]
    assert len(agent.seen) == 2
    # in words: a message of a tool needs a template that knows tools, and at an endpoint the id of a call
    assert agent.seen[1][-1] == Message("user", "<tool_response>\n5\n</tool_response>")
    assert verdicts[0].reason.startswith("equal by the agent: [assistant] Let me see.")
    assert "[user] <tool_response>\n5\n" in verdicts[0].reason
    assert verdicts[1].reason == "no answer found"


def test_agent_is_not_asked_where_rules_decide() -> None:
    agent = _Agent([])
    problem = Problem("p", PROBLEM.messages, answer="42")
    texts = ["\\boxed{42}", "\\boxed{41}", "\\boxed{" + "x" * 2000 + "}", "what?"]
    group = [completion(text) for text in texts] + [completion("\\boxed{x}", stop="length")]
    verdicts = PythonAgentVerifier(agent, lambda code: _Execution("")).score(problem, group)
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert agent.seen == []


def test_agent_without_a_verdict_is_bounded() -> None:
    agent = _Agent(["hm", CALL, CALL])
    verifier = PythonAgentVerifier(agent, lambda code: _Execution("", "Traceback", True), most_turns=3)
    verdict = verifier.score(PROBLEM, [completion("\\boxed{2, 3, 5}")])[0]
    assert verdict.score == 0.0
    assert verdict.reason.startswith("undecided by the agent in 3 turns")
    assert agent.seen[2][-1].content == "<tool_response>\nthe program ran out of time\nTraceback\n</tool_response>"


def test_call_of() -> None:
    assert call_of(CALL) == "print(2 + 3)"
    assert call_of("<tool_call>print(1)</tool_call>") == "print(1)"
    assert call_of('<tool_call>{"arguments": "{\\"code\\": \\"x\\"}"}</tool_call>') == "x"
    assert call_of("no call") is None
    deep = "[" * 5000
    assert call_of(f"<tool_call>{deep}</tool_call>") == deep  # deeper than JSON is read
