"""Refinement: bounded rounds, verified criteria, retries, and models that do not play their part."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from upweight.core.errors import UserError
from upweight.core.identity import canonical_json
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion, Message, Problem
from upweight.core.work import Machine
from upweight.rollout.remote import RemoteSampler
from upweight.stages.refine import strictness
from upweight.synthesize import stories
from upweight.synthesize.checklist import parse_checklist, parse_judgement
from upweight.synthesize.expert import POLICY, RuleBasedExpert
from upweight.synthesize.pipelines import program
from upweight.synthesize.programs import problem as program_problem
from upweight.synthesize.prompts import fill
from upweight.synthesize.refine import Cast, Loop, Prompts, accepted, refine
from upweight.synthesize.roles import Endpoint
from upweight.synthesize.roles import cast as cast_part
from upweight.synthesize.structured import Asking, FormError, NeverInForm, ask, between, json_object
from upweight.synthesize.trail import Criterion, CriterionScore, Refined, weighted
from upweight.verify.answers import AnswerVerifier


@dataclass
class Says(Sampler):
    """Answers with what `speak` makes of the last message, and counts how often it was asked."""

    speak: Callable[[str], str]
    policy: str = "scripted"
    asked: list[str] = field(default_factory=list)

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        texts = [prompt if isinstance(prompt, str) else prompt[-1].content for prompt in prompts]
        self.asked += texts
        return [[Completion((1, 2), (), self.speak(text), "end", self.policy)] * count for text in texts]


CHECKLIST = json.dumps(
    {
        "criteria": [
            {"name": "right", "aspect": "correctness", "requirement": "Right.", "weight": 3, "check": "verify"},
            {"name": "clear", "aspect": "consistency", "requirement": "Clear.", "weight": 1, "check": "judge"},
        ]
    }
)
SUM = Problem("sum", (Message("user", "What is 2+3?"),), answer="5")


def judging(score: int) -> str:
    return json.dumps({"scores": {"right": score, "clear": score}, "critique": "Look again."})


def scripted(
    draft: str = "\\boxed{4}", score: int = 9, revision: str = "<solution>\\boxed{5}</solution>"
) -> tuple[Cast, Says, Says]:
    evaluator, reviser = Says(lambda _: judging(score), "critic"), Says(lambda _: revision, "reviser")
    return Cast([Says(lambda _: draft, "drafter")], Says(lambda _: CHECKLIST), [evaluator], reviser), evaluator, reviser


def test_the_expert_turns_wrong_drafts_into_right_solutions() -> None:
    told = [stories.story(0, index) for index in range(20)]
    problems = [stories.problem(one) for one in told]
    expert = RuleBasedExpert()
    drafter = Says(lambda question: stories.answer_text("1+1=2.", "0"), "student")
    trails = refine(problems, Cast([drafter], expert, [expert], expert), AnswerVerifier(), Loop(drafts=1))
    for one, trail in zip(told, trails, strict=True):
        assert [candidate.origin for candidate in trail.candidates] == ["draft", "revision"]
        assert trail.candidates[0].verified is False
        assert trail.best is not None
        assert trail.best.text == f"\\boxed{{{one.answer}}}"
        assert (trail.best.verified, trail.best.author, trail.best.score) == (True, POLICY, 9.0)
        assert (trail.rounds, trail.stopped) == (1, "good enough")
        found = accepted(trail, Loop())
        assert isinstance(found, Refined)
        # asked once for a draft, a checklist, two critiques and a revision
        assert trail.cost.calls == 5


def test_the_expert_is_given_no_reference_answer() -> None:
    told = stories.story(0, 3)
    misled = Problem("p", (Message("user", told.question),), answer="1000")
    expert = RuleBasedExpert()
    cast = Cast([Says(lambda _: "\\boxed{1}")], expert, [expert], expert)
    trail = refine([misled], cast, AnswerVerifier(), Loop())[0]
    assert trail.candidates[-1].text == f"\\boxed{{{told.answer}}}"  # its own answer, not the reference
    assert trail.candidates[-1].verified is False
    assert accepted(trail, Loop()) == "the solution is verified wrong"


def test_the_expert_says_so_when_it_cannot_read_a_problem() -> None:
    expert = RuleBasedExpert()
    trail = refine([SUM], Cast([Says(lambda _: "\\boxed{5}")], expert, [expert], expert), None, Loop())[0]
    assert trail.stopped == "no gain"
    assert trail.best is not None
    assert trail.best.score == 0
    assert "cannot read" in trail.best.critiques[0].text


def test_the_expert_knows_programs() -> None:
    made = program(0, 2)
    expert = RuleBasedExpert()
    drafter = Says(lambda _: "def f(x):\n    return None")
    trail = refine([program_problem(made)], Cast([drafter], expert, [expert], expert), None, Loop(drafts=1))[0]
    assert trail.best is not None
    assert trail.best.text == made.solution


def test_a_critic_that_always_agrees_cannot_pass_what_is_verified_wrong() -> None:
    # right weighs 3 and is verified wrong: (3 x 0 + 1 x 9) / 4 = 2.25, below good_enough, whatever the critic says
    cast, _, reviser = scripted(score=9, revision="<solution>\\boxed{6}</solution>")
    trail = refine([SUM], cast, AnswerVerifier(), Loop(drafts=1))[0]
    assert trail.candidates[0].score == 2.25
    assert trail.candidates[0].scores[0].judged == (9,)  # its opinion is kept, the verifier's word counts
    assert (trail.stopped, len(reviser.asked)) == ("no gain", 1)
    assert accepted(trail, Loop()) == "the solution is verified wrong"


def test_a_critic_that_always_agrees_ends_the_loop_where_nothing_is_verified() -> None:
    cast, evaluator, reviser = scripted(score=9)
    trail = refine([SUM], cast, None, Loop(drafts=2))[0]
    assert (trail.stopped, trail.rounds, len(evaluator.asked), len(reviser.asked)) == ("good enough", 0, 2, 0)


def test_rounds_are_bounded_while_the_score_rises() -> None:
    scores = iter(range(9))
    evaluator = Says(lambda _: judging(next(scores)))  # each candidate is judged one better than the last
    cast = Cast([Says(lambda _: "a")], Says(lambda _: CHECKLIST), [evaluator], Says(lambda _: "<solution>b</solution>"))
    trail = refine([SUM], cast, None, Loop(drafts=1, rounds=4))[0]
    assert (trail.stopped, trail.rounds, len(trail.candidates), trail.chosen) == ("rounds", 4, 5, 4)


def test_a_revision_that_is_worse_is_not_kept() -> None:
    cast, _, _ = scripted(draft="\\boxed{5}", score=2, revision="<solution>\\boxed{6}</solution>")
    trail = refine([SUM], cast, AnswerVerifier(), Loop(drafts=1))[0]
    # draft: (3 x 9 + 1 x 2) / 4 = 7.25; revision: (0 + 2) / 4 = 0.5
    assert [candidate.score for candidate in trail.candidates] == [7.25, 0.5]
    assert (trail.chosen, trail.stopped) == (0, "no gain")


def test_several_evaluators_are_averaged() -> None:
    cast, _, reviser = scripted()
    kind, strict = Says(lambda _: judging(8), "kind"), Says(lambda _: judging(3), "strict")
    cast = Cast(cast.drafters, cast.checklist, [kind, strict], reviser)
    trail = refine([SUM], cast, None, Loop(drafts=1, rounds=0))[0]
    assert trail.candidates[0].score == 5.5
    assert [critique.evaluator for critique in trail.candidates[0].critiques] == ["kind", "strict"]


def test_a_critic_that_answers_garbage_is_an_error_that_shows_its_answer() -> None:
    cast, _, reviser = scripted()
    garbage = Says(lambda _: "I like turtles", "turtle")
    with pytest.raises(NeverInForm, match=r"turtle cannot be the evaluator.*3 attempts.*I like turtles"):
        refine([SUM], Cast(cast.drafters, cast.checklist, [garbage], reviser), None, Loop())
    assert len(garbage.asked) == 6  # two drafts, each asked for three times


def test_an_answer_out_of_form_is_asked_for_again_with_the_reason() -> None:
    answers = iter(["no form", "<think>mere thought {</think><x>fine</x>"])
    sampler = Says(lambda _: next(answers))
    reply = ask(sampler, ["prompt"], [between("x")], Asking(), part="tester")[0]
    assert (reply.value, reply.attempts, reply.cost.calls) == ("fine", 2, 2)
    assert "nothing stands between <x> and </x>" in sampler.asked[1]


def test_a_tolerated_share_of_unreadable_answers_costs_only_their_problems() -> None:
    sampler = Says(lambda text: "garbage" if text == "bad" or text.startswith("This answer") else "<x>fine</x>")
    replies = ask(sampler, ["good"] * 9 + ["bad"], [between("x")] * 10, Asking(unreadable_share=0.1), part="tester")
    assert [reply.value for reply in replies] == ["fine"] * 9 + [None]
    with pytest.raises(NeverInForm):
        ask(sampler, ["good"] * 8 + ["bad"], [between("x")] * 9, Asking(unreadable_share=0.1), part="tester")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"criteria": []}',
        '{"criteria": [{"name": "a"}]}',
        CHECKLIST.replace('"clear"', '"right"'),
        CHECKLIST.replace("correctness", "beauty"),
        CHECKLIST.replace('"weight": 3', '"weight": 0'),
        "no object",
        "{broken",
        "[1]",
    ],
)
def test_checklists_out_of_form_are_refused(text: str) -> None:
    with pytest.raises(FormError):
        parse_checklist(text)


def test_judgements_name_exactly_the_criteria() -> None:
    criteria = parse_checklist(f"Here you are:\n```json\n{CHECKLIST}\n```")
    assert parse_judgement(judging(4), criteria).scores == (4, 4)
    for wrong in (
        '{"scores": {"right": 4}, "critique": ""}',
        judging(10),
        judging(4).replace("4", "4.5"),
        '{"scores": 3, "critique": ""}',
    ):
        with pytest.raises(FormError):
            parse_judgement(wrong, criteria)
    assert json_object('noise {"a": 1} noise') == {"a": 1}


def test_weights_count() -> None:
    criteria = tuple(Criterion(name, "safety", "x", weight, "judge") for name, weight in (("a", 1.0), ("b", 3.0)))
    scores = tuple(CriterionScore(name, (), None, "", value) for name, value in (("a", 8.0), ("b", 4.0)))
    assert weighted(criteria, scores) == 5.0  # (1 x 8 + 3 x 4) / 4


def test_values_are_not_searched_for_places() -> None:
    assert fill("<{{a}}>", a="{{b}}") == "<{{b}}>"


def test_an_evaluator_that_praises_everything_is_reported() -> None:
    kind, _, _ = scripted(score=9)
    kind = Cast(kind.drafters, kind.checklist, [kind.evaluators[0], Says(lambda _: judging(3), "strict")], kind.reviser)
    trails = refine([SUM] * 3, kind, None, Loop(drafts=1, rounds=1))
    # three drafts and three revisions, which gain nothing
    assert strictness(trails) == {
        "critic": {"texts": 6, "mean_score": 9.0, "full_marks_share": 1.0},
        "strict": {"texts": 6, "mean_score": 3.0, "full_marks_share": 0.0},
    }


def test_prompts_are_files_that_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "critique.md").write_text("Mark {{answer}} by {{checklist}}.")
    own = Prompts.of(tmp_path)
    assert own.critique == "Mark {{answer}} by {{checklist}}."
    assert own.revision == Prompts().revision
    cast, evaluator, _ = scripted()
    refine([SUM], cast, None, Loop(drafts=1, prompts=own))
    assert evaluator.asked[0].startswith("Mark \\boxed{4} by {")
    (tmp_path / "critique.md").write_text("Mark it.")
    with pytest.raises(UserError, match=r"critique has no place \{\{checklist\}\}, \{\{answer\}\}"):
        Prompts.of(tmp_path)


def test_a_part_can_be_an_endpoint() -> None:
    endpoint = Endpoint("http://127.0.0.1:9/v1", "teacher", extra='{"return_token_ids": true}')
    sampler = cast_part(endpoint, {}, Machine())
    assert isinstance(sampler, RemoteSampler)
    assert (sampler.model, sampler.extra) == ("teacher", {"return_token_ids": True})
    assert '"url":"http://127.0.0.1:9/v1"' in canonical_json(endpoint)
    with pytest.raises(UserError, match="expected a JSON object"):
        Endpoint("http://x/v1", "m", extra="[1]").open()
