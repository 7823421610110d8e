"""refine, reconstruct, pair and gate as stages: files, figures, and going on after a kill."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from upweight.core.errors import Refusal, UserError
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion, Conversation, Pair, Problem
from upweight.core.work import Estimate, Work
from upweight.model.config import ModelConfig
from upweight.model.transformer import make_model
from upweight.model.weights import save
from upweight.stages import gate, imitate, pair, reconstruct, refine
from upweight.store.jsonl import read_jsonl, write_jsonl
from upweight.synthesize import stories
from upweight.synthesize.difficulty import Gate, Measured
from upweight.synthesize.pairs import PairRules
from upweight.synthesize.pipelines import program
from upweight.synthesize.programs import problem as program_problem
from upweight.synthesize.reading import read
from upweight.synthesize.refine import Loop
from upweight.synthesize.trail import Refined, Trail
from upweight.text.chat import PLAIN
from upweight.text.tokenizer import Tokenizer
from upweight.verify.reward import RewardConfig

STORIES = [stories.story(0, index) for index in range(40)]


@dataclass(frozen=True)
class Solver(Sampler):
    """Solves a story rightly in `right` of every 16 samples; what is wrong is wrong by one."""

    right: int

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        return [[self._solve(prompt, sample) for sample in range(count)] for prompt in prompts]

    def _solve(self, prompt: Prompt, sample: int) -> Completion:
        assert not isinstance(prompt, str)
        told = read(prompt[-1].content)
        assert told is not None
        answer = told.answer if sample % 16 < self.right else str(int(told.answer) + 1)
        text = stories.thought(told.chain, answer)
        return Completion(tuple(text.encode()), (), text, "end", f"solver {self.right}")


@dataclass(frozen=True)
class Guesser(Sampler):
    """Ends every story in the same guess."""

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        text = stories.thought("A guess.", "-1")
        return [[Completion((1,), (), text, "end", "guesser")] * count for _ in prompts]


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    folder = tmp_path / "problems"
    folder.mkdir()
    write_jsonl(folder / "stem.jsonl", [stories.problem(told, "stem") for told in STORIES])
    write_jsonl(folder / "code.jsonl", [program_problem(program(0, index)) for index in range(3)])
    return folder


def work(tmp_path: Path, name: str, **inputs: Path) -> Work:
    out = tmp_path / name
    out.mkdir(exist_ok=True)
    return Work(out=out, inputs=inputs, seed=1)


def tiny_model(folder: Path, vocabulary: int = 300) -> Path:
    told = [stories.worked(one) for one in STORIES]
    tokenizer = Tokenizer.train(told, vocabulary).with_template(PLAIN)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, head_size=8, ffn=32, max_context=1024
    )
    save(make_model(config, 0), folder / "model")
    tokenizer.save(folder / "model")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def test_drafts_of_a_model_are_refined_and_their_chains_reconstructed(tmp_path: Path, problems: Path) -> None:
    model = tiny_model(tmp_path / "made")
    config = refine.Config(
        problems={"stem.jsonl": 12, "code.jsonl": 3},
        loop=Loop(drafts=1, draft_limits=Limits(max_new_tokens=8)),
        block=10,
    )
    refining = work(tmp_path, "refine", problems=problems, model=model)
    told = refine.run(config, refining)
    # an untrained model is never right; the expert always is
    assert (told["problems"], told["refined"]) == (15, 15)
    assert (told["drafts_right_share"], told["solutions_right_share"]) == (0.0, 1.0)
    assert told["evaluators_agree_with_verifier"] == {"rule-based expert": 1.0}
    assert told["cost"]["calls"] == 15 * 5  # draft, checklist, critique, revision, critique
    assert len(read_jsonl(refining.out / "trail.jsonl", Trail)) == 15
    assert len(read_jsonl(refining.out / "refined.jsonl", Refined)) == 15
    assert not (refining.out / "blocks").exists()

    chains = work(tmp_path, "reconstruct", refined=refining.out)
    summary = reconstruct.run(reconstruct.Config(), chains)
    assert (summary["conversations"], summary["dropped"]) == (15, {})
    talks = read_jsonl(chains.out / "conversations.jsonl", Conversation)
    assert talks[0].messages == stories.conversation(STORIES[0]).messages
    assert {talk.source for talk in talks} == {"stem-reconstructed", "code-reconstructed"}
    assert len(read_jsonl(chains.out / "completer.jsonl", Conversation)) == 15


def test_what_refinement_started_from_can_be_imitated_instead(tmp_path: Path, problems: Path) -> None:
    refining = work(tmp_path, "refine", problems=problems)
    refine.run(refine.Config(problems={"stem.jsonl": 12}, drafters=(Guesser(),)), refining)
    made = {}
    for target in ("written", "kept", "draft"):
        chains = work(tmp_path, target, refined=refining.out)
        assert reconstruct.run(reconstruct.Config(target=target), chains)["conversations"] == 12
        talks = read_jsonl(chains.out / "conversations.jsonl", Conversation)
        made[target] = [talk.messages[-1].content.partition("</think>") for talk in talks]
    for written, kept, draft in zip(*made.values(), strict=True):
        assert kept[0] == draft[0] != written[0]  # the draft's thought
        assert kept[2] == written[2] != draft[2]  # the refined solution


def test_a_part_given_to_a_missing_input_is_an_error(tmp_path: Path, problems: Path) -> None:
    with pytest.raises(UserError, match="input 'model', which this step does not have"):
        refine.run(refine.Config(), work(tmp_path, "refine", problems=problems))


def test_the_gate_keeps_what_is_solved_sometimes(
    tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for right, kept in ((0, 0), (1, 0), (2, 40), (14, 40), (15, 0)):
        monkeypatch.setattr(gate, "cast", lambda *_, right=right: Solver(right))
        asked = work(tmp_path, f"gate{right}", problems=problems)
        summary = gate.run(gate.Config(block=16), asked)
        assert summary["kept"] == len(read_jsonl(asked.out / "problems.jsonl", Problem)) == kept
        assert sum(1 for _ in (asked.out / "dropped.jsonl").open()) == 40 - kept
    assert summary["dropped"] == {"too easy": 40}


def test_the_gate_stops_when_it_has_enough(tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "cast", lambda *_: Solver(8))
    summary = gate.run(gate.Config(block=16, enough=20), work(tmp_path, "gate", problems=problems))
    assert (summary["kept"], summary["not_measured"]) == (32, 8)  # two whole blocks of 16


def test_what_an_earlier_gate_measured_is_not_sampled_again(
    tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "cast", lambda *_: Solver(8))
    gate.run(gate.Config(problems={"stem.jsonl": 30}, block=16), work(tmp_path, "first", problems=problems))
    asked: list[int] = []
    sample = Solver.sample

    def counted(self: Solver, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        asked.append(len(prompts))
        return sample(self, prompts, count=count, limits=limits)

    monkeypatch.setattr(Solver, "sample", counted)
    again = work(tmp_path, "again", problems=problems, measured=tmp_path / "first")
    summary = gate.run(gate.Config(gate=Gate(low=0.5, high=0.9), block=16), again)
    assert sum(asked) == 10  # forty problems, thirty of them known
    # by the new bounds: 8 of 16 is not above 0.5
    assert (summary["problems"], summary["kept"]) == (40, 0)
    other = work(tmp_path, "other", problems=problems, measured=tmp_path / "first")
    with pytest.raises(UserError, match="another number of samples"):
        gate.run(gate.Config(gate=Gate(count=8)), other)


def test_a_problem_that_was_mended_under_its_id_is_measured_anew(
    tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "cast", lambda *_: Solver(8))
    gate.run(gate.Config(problems={"stem.jsonl": 30}), work(tmp_path, "first", problems=problems))
    stem = read_jsonl(problems / "stem.jsonl", Problem)
    stem[3] = replace(stem[3], answer="not a number")
    write_jsonl(problems / "stem.jsonl", stem)
    again = work(tmp_path, "again", problems=problems, measured=tmp_path / "first")
    gate.run(gate.Config(problems={"stem.jsonl": 30}), again)
    found = {one.problem.id: one for one in read_jsonl(again.out / "measured.jsonl", Measured)}
    assert found[stem[3].id].problem == stem[3]
    assert found[stem[3].id].rate == 0


def test_rates_by_another_judge_are_not_taken_over(
    tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "cast", lambda *_: Solver(8))
    judges = {name: tmp_path / name for name in ("one", "other")}
    for name, folder in judges.items():
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"identity": {"stage": name}}))
    config = gate.Config(problems={"stem.jsonl": 2})
    gate.run(config, work(tmp_path, "first", problems=problems, judge=judges["one"]))
    again = {"problems": problems, "measured": tmp_path / "first"}
    assert gate.run(config, work(tmp_path, "second", **again, judge=judges["one"]))["problems"] == 2
    with pytest.raises(UserError, match="another judge"):
        gate.run(config, work(tmp_path, "third", **again, judge=judges["other"]))


def test_win_rates_are_no_gate() -> None:
    with pytest.raises(UserError, match="average 1/2"):
        gate.Config(reward=RewardConfig(kind="preference"))


class Killed(BaseException):
    """What stands for kill -9: nothing catches it."""


@dataclass
class Mortal(Sampler):
    """Dies at the third call."""

    inner: Sampler
    calls: int = 0

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        self.calls += 1
        if self.calls == 3:
            raise Killed
        return self.inner.sample(prompts, count=count, limits=limits)


def test_a_killed_gate_goes_on_where_it_was(tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = gate.Config(block=8)
    whole, killed = work(tmp_path, "whole", problems=problems), work(tmp_path, "killed", problems=problems)
    monkeypatch.setattr(gate, "cast", lambda *_: Solver(8))
    expected = gate.run(config, whole)
    mortal = Mortal(Solver(8))
    monkeypatch.setattr(gate, "cast", lambda *_: mortal)
    with pytest.raises(Killed):
        gate.run(config, killed)
    assert not (killed.out / "problems.jsonl").exists()
    assert gate.run(config, killed) == expected
    assert mortal.calls == 3 + 3  # 5 blocks: two done, the third died, three made in the second run
    assert contents(killed.out) == contents(whole.out)


def test_pairs_hold_right_against_wrong(tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "made")
    samplers = {"teacher": Solver(16), "student": Solver(1)}
    monkeypatch.setattr(pair, "cast", lambda part, *_: samplers[part.input])
    asked = work(tmp_path, "pair", problems=problems, teacher=model, student=model)
    summary = pair.run(pair.Config(problems={"stem.jsonl": 30}), asked)
    pairs = read_jsonl(asked.out / "pairs.jsonl", Pair)
    assert len(pairs) == summary["pairs"] == 30
    assert (summary["teacher_score"], summary["student_score"]) == (1.0, 0.25)
    for found in pairs:
        assert found.chosen.policy == "solver 16"
        assert found.rejected.text.endswith(f"boxed{{{int(found.problem.answer or 0) + 1}}}")


def test_any_sampler_can_be_the_teacher_and_its_text_is_read_anew(tmp_path: Path, problems: Path) -> None:
    model = tiny_model(tmp_path / "made")
    asked = work(tmp_path, "pair", problems=problems, student=model)
    config = pair.Config(
        problems={"stem.jsonl": 10},
        teacher=Solver(16),
        teacher_samples=1,
        student_limits=Limits(max_new_tokens=8),
        rules=PairRules(truncated_negatives=True, longest_ratio=100.0),
    )
    told = pair.run(config, asked)
    tokenizer = Tokenizer.load(model / "model")
    for found in read_jsonl(asked.out / "pairs.jsonl", Pair):
        assert found.chosen.tokens == (*tokenizer.encode(found.chosen.text), tokenizer.end_of_turn)
    assert told["length_bias"] == 1.0  # the solver writes more than eight tokens
    guarded = replace(config, rules=replace(config.rules, length_bias=0.5))
    with pytest.raises(UserError, match="one side is longer too often"):
        pair.run(guarded, work(tmp_path, "guarded", problems=problems, student=model))


def test_right_answers_become_conversations(tmp_path: Path, problems: Path) -> None:
    asked = work(tmp_path, "imitate", problems=problems)
    told = imitate.run(imitate.Config(problems={"stem.jsonl": 12}, author=Solver(8), samples=16, kept=2), asked)
    assert (told["conversations"], told["right_share"]) == (12, 0.5)  # the same text counts once
    talks = read_jsonl(asked.out / "conversations.jsonl", Conversation)
    assert talks[0].messages == stories.conversation(STORIES[0]).messages
    with pytest.raises(UserError, match="none of 12 problems has a right answer"):
        imitate.run(imitate.Config({"stem.jsonl": 12}, Solver(0)), work(tmp_path, "wrong", problems=problems))


def test_no_pair_at_all_is_an_error(tmp_path: Path, problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "made")
    monkeypatch.setattr(pair, "cast", lambda *_: Solver(16))
    asked = work(tmp_path, "pair", problems=problems, teacher=model, student=model)
    with pytest.raises(UserError, match="the student is not clearly worse"):
        pair.run(pair.Config(rules=replace(PairRules(), margin=1.0)), asked)


def test_teacher_and_student_of_different_tokenizers_are_refused(tmp_path: Path, problems: Path) -> None:
    teacher, student = tiny_model(tmp_path / "teacher"), tiny_model(tmp_path / "student", 320)
    with pytest.raises(Refusal, match="different tokenizers"):
        pair.run(pair.Config(), work(tmp_path, "pair", problems=problems, teacher=teacher, student=student))


def test_estimates_follow_the_configuration() -> None:
    inputs = {name: Estimate(parameters=1e6, disk_bytes=6e5) for name in ("model", "teacher", "student", "refined")}
    # 100 problems x 16 samples x 48 tokens on average, two operations a parameter and token
    assert gate.estimate(gate.Config(problems={"stem.jsonl": 100}), inputs).flops == 2e6 * 100 * 16 * 48
    assert pair.estimate(pair.Config(problems={"stem.jsonl": 100}), inputs).tokens == 2 * 100 * 4 * 48
    assert refine.estimate(refine.Config(problems={"stem.jsonl": 100}), inputs).tokens == 100 * 2 * 128
    assert reconstruct.estimate(reconstruct.Config(), inputs).tokens == 0  # the expert is no model
