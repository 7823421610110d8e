"""reinforce: its options, its figures, and that a killed run ends as one that was not."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import checkpoint, work

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Prompt, Sampler, Verifier
from upweight.core.records import Completion, Message, Problem, Verdict
from upweight.core.work import Estimate, Work
from upweight.model.weights import fingerprint, load
from upweight.objectives.grpo import Grpo
from upweight.rollout.episode import Tool
from upweight.rollout.remote import RemoteSampler
from upweight.rollout.vllm import Vllm, VllmSampler
from upweight.stages import reinforce
from upweight.stages.reinforce import Budget, Config, OnPolicy, Parts, Refresh
from upweight.store.jsonl import write_jsonl
from upweight.synthesize.difficulty import Gate, Measured
from upweight.synthesize.rollouts import Tools
from upweight.text.tokenizer import Tokenizer
from upweight.train import checkpoint as checkpoints
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Setting
from upweight.verify.reward import RewardConfig, Weighted

PROBLEMS = [Problem(str(n), (Message("user", f"what is {n}?"),), answer="1", source="s") for n in range(6)]
SETTING = Setting("rl", 0.1, {}, 64, 0.0, 0, 4)


@dataclass(frozen=True)
class Vowels(Verifier):
    """1 for a completion with more a and e than o in it: some of any model's are, and some are not."""

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        return [Verdict(float(c.text.count("a") + c.text.count("e") > c.text.count("o")), "counted") for c in group]


@dataclass(frozen=True)
class Parity(Verifier):
    """1 for every completion of an odd problem; even problems tell their completions apart."""

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        odd = int(problem.id) % 2 == 1
        return [Verdict(float(odd or index % 2), "by number") for index in range(len(group))]


@dataclass
class Fixed(Sampler):
    """Three tokens whatever is asked; remembers what was."""

    asked: list[list[str]]
    stop: str = "end"

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        self.asked.append([prompt[-1].content for prompt in prompts if not isinstance(prompt, str)])
        return [[Completion((5, 6, 7), (-1.0,) * 3, "abc", self.stop, "fixed") for _ in range(count)] for _ in prompts]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def inputs(tmp_path: Path, model: Path) -> dict[str, Path]:
    folder = tmp_path / "problems"
    folder.mkdir()
    write_jsonl(folder / "problems.jsonl", PROBLEMS)
    write_jsonl(folder / "measured.jsonl", [Measured(one, 0.5, 8, 0.0, None, 4.0) for one in PROBLEMS])
    return {"model": model, "problems": folder}


CONFIG = Config(
    reward=RewardConfig(custom=Vowels()),
    steps=4,
    problems_a_step=3,
    group=4,
    limits=Limits(max_new_tokens=8),
    learning_rate=0.01,
    optimizer=OptimizerConfig(kind="adamw"),
    save_every_steps=1,
)


def metrics(done: Work) -> list[dict[str, Any]]:
    return [row for row in done.monitor.rows if "rollout_step" in row]  # type: ignore[attr-defined]


class _File:
    """A monitor's record that writes metrics.jsonl, which the summary reads."""

    def __init__(self, done: Work) -> None:
        self.path, self.rows = done.out / "metrics.jsonl", done.monitor.rows  # type: ignore[attr-defined]

    def __call__(self, **row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run(config: Config, tmp_path: Path, inputs: dict[str, Path], name: str = "out") -> tuple[Work, Any]:
    given = work(tmp_path / name, inputs)
    given.monitor.record = _File(given)  # type: ignore[method-assign]
    return given, reinforce.run(config, given)


def test_a_step_trains_and_says_what_it_saw(tmp_path: Path, inputs: dict[str, Path]) -> None:
    done, summary = run(replace(CONFIG, judge=RewardConfig(custom=Parity()), judge_every=2), tmp_path, inputs)
    assert summary["weights"] != fingerprint(load(inputs["model"] / "model")[0])
    assert summary["steps"] == 4
    rows = metrics(done)
    assert [row["rollout_step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert 0 <= row["reward"] <= 1
        assert row["median_length"] <= row["longest"] <= 8
        assert {"reward_spread", "kept_share", "repetition", "length_correlation", "truncated_share"} <= row.keys()
    assert ["judge" in row for row in rows] == [True, False, True, False]
    trained = [row for row in done.monitor.rows if "sampled_nll" in row]  # type: ignore[attr-defined]
    assert {"clip_share", "logprob_difference", "sampler_kl", "ratio"} <= trained[0].keys()
    assert summary["largest_logprob_difference"] < 1e-3


def test_the_checkpoint_lies_between_the_first_and_the_last_weights(tmp_path: Path, inputs: dict[str, Path]) -> None:
    whole, _ = run(CONFIG, tmp_path, inputs, "whole")
    part, summary = run(replace(CONFIG, interpolation=0.25), tmp_path, inputs, "part")
    weights = {
        name: dict(load(path / "model")[0].named_parameters())
        for name, path in (("first", inputs["model"]), ("last", whole.out), ("part", part.out))
    }
    for name, between in weights["part"].items():
        expected = weights["first"][name] + 0.25 * (weights["last"][name] - weights["first"][name])
        assert torch.allclose(between, expected, atol=1e-7)
    assert summary["weights"] == fingerprint(load(part.out / "model")[0])


@pytest.mark.parametrize(
    "changes", [{}, {"updates_a_batch": 3, "resample_rounds": 1}], ids=["plain", "several updates"]
)
def test_a_killed_run_goes_on_as_it_would_have(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    # nine in ten completions of a random model are cut off: masked, hardly a step would train
    objective = Grpo(mask_truncated=False)
    config = replace(CONFIG, refresh=Refresh(every=2, gate=Gate(4, low=-1.0, high=2.0)), objective=objective, **changes)
    _, whole = run(config, tmp_path, inputs, "whole")
    write, steps = checkpoints.Checkpoints.write, []

    def dying(self: Any, *args: Any, **kwargs: Any) -> None:
        write(self, *args, **kwargs)
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.Checkpoints, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, inputs, "killed")
    monkeypatch.setattr(checkpoints.Checkpoints, "write", write)
    done, resumed = run(config, tmp_path, inputs, "killed")
    assert resumed["weights"] == whole["weights"]
    assert not (done.out / "pending").exists()


def test_a_run_whose_last_checkpoint_is_lost_goes_on_from_the_one_before(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Grpo(mask_truncated=False)
    config = replace(CONFIG, steps=15, updates_a_batch=3, save_every_steps=5, objective=objective)
    done, whole = run(config, tmp_path, inputs, "whole")
    # of two implementations of the same weights: where the policy has moved on a difference says nothing of them
    largest = max(row.get("logprob_difference", 0.0) for row in done.monitor.rows)  # type: ignore[attr-defined]
    assert 0 < whole["largest_logprob_difference"] < 1e-4 < largest
    write = checkpoints.Checkpoints.write

    def dying(self: Any, *args: Any, counters: Any, **kwargs: Any) -> None:
        if counters["step"] == 15:
            raise KeyboardInterrupt
        write(self, *args, counters=counters, **kwargs)

    monkeypatch.setattr(checkpoints.Checkpoints, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, inputs, "killed")
    monkeypatch.setattr(checkpoints.Checkpoints, "write", write)
    # five updates are within the batch of those from 3 on; those from 6, 9 and 12 on were sampled since
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-000000010")
    assert run(config, tmp_path, inputs, "killed")[1]["weights"] == whole["weights"]


def test_the_judge_looks_and_rollouts_are_kept_as_often_as_asked(tmp_path: Path, model: Path) -> None:
    config = replace(CONFIG, steps=16, updates_a_batch=3, judge_every=5, keep_rollouts_every=7)
    made = loader(replace(config, objective=Grpo(mismatch_bound=100.0)), Fixed([]), tmp_path, model)
    made.parts = replace(made.parts, judge=Parity())
    for _ in range(config.steps):
        made.next(SETTING)
    # batches begin with steps 0, 3, 6, 9, 12 and 15; those of 0, 3 (5), 9 (10) and 15 hold a multiple of 5
    rows = made.monitor.rows  # type: ignore[attr-defined]
    assert [row["rollout_step"] for row in rows if "judge" in row] == [1, 4, 10, 16]
    # and those of 0, 6 (7) and 12 (14) one of 7; the last is always kept
    assert [path.name[5:10] for path in sorted((tmp_path / "rollouts").iterdir())] == [
        "00001",
        "00007",
        "00013",
        "00016",
    ]


def test_a_plan_samples_a_batch_once_whatever_its_updates_and_measures_again(tmp_path: Path) -> None:
    given = {
        "model": Estimate(parameters=1e6),
        "problems": Estimate(records={"problems.jsonl": 60, "measured.jsonl": 100}),
    }
    config = replace(CONFIG, steps=40, problems_a_step=8, group=4, limits=Limits(100))
    plain = reinforce.estimate(config, given)
    # 40 x 8 x 4 completions of 50 tokens
    assert plain.tokens == 64_000
    assert plain.sampled_flops == 2e6 * 64_000
    assert reinforce.estimate(replace(config, updates_a_batch=4), given).flops == plain.flops / 4
    # after steps 15 and 30: 2 x 100 problems x 8 samples, or 2 x 60 x 8, of 50 tokens
    for dropped, measured in ((True, 80_000), (False, 48_000)):
        again = reinforce.estimate(replace(config, refresh=Refresh(every=15, gate=Gate(8), dropped=dropped)), given)
        assert again.flops - plain.flops == pytest.approx(2e6 * measured)
        assert again.sampled_flops - plain.sampled_flops == pytest.approx(2e6 * measured)
        assert again.tokens == plain.tokens


def test_the_length_of_an_episode_is_that_of_all_its_turns(tmp_path: Path, model: Path) -> None:
    @dataclass
    class Calls(Sampler):
        tokenizer: Tokenizer

        def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
            return [[self.reply(prompt) for _ in range(count)] for prompt in prompts]

        def reply(self, prompt: Prompt) -> Completion:
            text = "12" if prompt[-1].role == "tool" else '<tool_call>{"name": "t"}</tool_call>'  # type: ignore[union-attr]
            tokens = (*self.tokenizer.encode(text), self.tokenizer.end_of_turn)
            return Completion(tokens, (-1.0,) * len(tokens), text, "end", "calls")

    tokenizer = Tokenizer.load(model / "model")
    made = loader(
        replace(CONFIG, tools=Tools(), objective=Grpo(mismatch_bound=100.0)), Calls(tokenizer), tmp_path, model
    )
    made.parts = replace(made.parts, tools=[Tool("t", "", {}, lambda arguments: "sure")])
    made.next(SETTING)
    turns = len(tokenizer.encode('<tool_call>{"name": "t"}</tool_call>')) + 1, len(tokenizer.encode("12")) + 1
    row = made.monitor.rows[0]  # type: ignore[attr-defined]
    assert (row["mean_length"], row["longest"]) == (sum(turns), sum(turns))


def loader(
    config: Config, sampler: Sampler, out: Path, model: Path, problems: Sequence[Problem] = PROBLEMS
) -> OnPolicy:
    tokenizer = Tokenizer.load(model / "model")
    parts = Parts(sampler, tokenizer, Parity(), problems, PROBLEMS)
    return OnPolicy(parts, config, seed=3, monitor=work(out, {}).monitor, out=out)


def test_dynamic_sampling_puts_other_problems_in_the_place_of_those_that_teach_nothing(
    tmp_path: Path, model: Path
) -> None:
    plain, dynamic = Fixed([]), Fixed([])
    config = replace(CONFIG, objective=Grpo(mismatch_bound=100.0))
    (batch,) = loader(config, plain, tmp_path / "a", model).next(SETTING)
    assert len(plain.asked) == 1
    assert len(plain.asked[0]) == 3
    made = loader(replace(config, resample_rounds=3), dynamic, tmp_path / "b", model)
    (filled,) = made.next(SETTING)
    # half of the six problems teach: each is asked once an epoch, and further ones until three of them are even
    assert dynamic.asked[0] == plain.asked[0]
    asked = [int(question.split()[2][:-1]) for round_ in dynamic.asked for question in round_]
    assert sum(number % 2 == 0 for number in asked) == 3
    assert len(asked) == made.state()["taken"]
    # of an odd problem's completions all advantages are 0: in the plain batch they weigh, here they are not even there
    assert (filled.advantages != 0).sum() == 12
    assert (batch.advantages != 0).sum() == 4 * sum(
        int(question.split()[2][:-1]) % 2 == 0 for question in plain.asked[0]
    )
    assert made.monitor.rows[0]["kept_share"] == 3 / len(asked)  # type: ignore[attr-defined]


def test_what_is_cut_off_teaches_only_without_the_mask(tmp_path: Path, model: Path) -> None:
    config = replace(CONFIG, objective=Grpo(mismatch_bound=100.0), problems_a_step=6)
    masked, counted = (
        loader(
            replace(config, objective=replace(config.objective, mask_truncated=mask)), Fixed([], "length"), out, model
        )
        for mask, out in ((True, tmp_path / "a"), (False, tmp_path / "b"))
    )
    (nothing,), (batch,) = masked.next(SETTING), counted.next(SETTING)
    assert nothing.sequences.weights.sum() == 0
    # three of six problems are even and tell their four completions apart
    assert (batch.advantages != 0).sum() == 12


def test_a_refreshed_pool_is_what_the_policy_solves_now(tmp_path: Path, model: Path) -> None:
    sampler = Fixed([])
    config = replace(CONFIG, problems_a_step=2, refresh=Refresh(every=1), objective=Grpo(mismatch_bound=100.0))
    made = loader(config, sampler, tmp_path, model, problems=PROBLEMS[:4])
    made.next(SETTING)
    made.next(SETTING)
    # odd problems are solved always, even ones in half of the samples: those stay, the fifth though the gate dropped it
    assert made.state()["pool"] == ["0", "2", "4"]
    assert set(sampler.asked[-1]) <= {"what is 0?", "what is 2?", "what is 4?"}
    again = loader(config, sampler, tmp_path, model, problems=PROBLEMS[:4])
    again.restore(made.state())
    assert again.state() == made.state()
    # where too few are left the pool stays
    few = loader(replace(config, problems_a_step=4), sampler, tmp_path, model)
    few.next(SETTING)
    few.next(SETTING)
    assert len(few.state()["pool"]) == 6


def test_a_budget_needs_what_the_gate_measured(tmp_path: Path, inputs: dict[str, Path]) -> None:
    done, _ = run(replace(CONFIG, steps=1, budget=Budget(slack=1.0, span=0.5)), tmp_path, inputs)
    rollouts = [json.loads(line) for line in (done.out / "rollouts/step-00001.jsonl").read_text().splitlines()]
    seen = 0
    for rollout in rollouts:
        for completion, verdict in zip(rollout["completions"], rollout["verdicts"], strict=True):
            if verdict["reason"] != "counted":
                # the usual length is 4: 5 tokens are 1.25 times, and lose (1.25 - 1) / 0.5 = half
                expected = max(0.0, 1 - (len(completion["tokens"]) / 4 - 1) / 0.5)
                assert verdict["score"] == pytest.approx(expected)
                seen += 1
            else:
                assert verdict["score"] == 0 or len(completion["tokens"]) <= 4
    assert seen
    (inputs["problems"] / "measured.jsonl").unlink()
    with pytest.raises(UserError, match="does not say how long right answers are"):
        run(replace(CONFIG, budget=Budget()), tmp_path, inputs, "other")


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="interpolation is 0"):
        replace(CONFIG, interpolation=0.0)
    with pytest.raises(UserError, match="updates_a_batch 4"):
        replace(CONFIG, updates_a_batch=4)
    cooler = Limits(max_new_tokens=8, temperature=0.9, top_p=0.8, min_p=0.1)
    with pytest.raises(UserError, match=r"temperature 0\.9, and the objective is told 1\.0"):
        replace(CONFIG, limits=cooler)
    told = Grpo(temperature=0.9, top_p=0.8, min_p=0.1)
    assert replace(CONFIG, limits=cooler, objective=told).limits == cooler
    with pytest.raises(UserError, match="vLLM cuts by min_p before top_p"):
        replace(CONFIG, limits=cooler, objective=told, vllm=Vllm())
    with pytest.raises(UserError, match=r"slack 0\.5"):
        Budget(slack=0.5)
    with pytest.raises(UserError, match="every 0 steps"):
        Refresh(every=0)
    with pytest.raises(UserError, match="keep_rollouts_every 0"):
        replace(CONFIG, keep_rollouts_every=0)
    for relative in (
        RewardConfig("preference"),
        RewardConfig(mixture=(Weighted("taste", 0.5, RewardConfig("judge")), Weighted("right", 0.5, RewardConfig()))),
    ):
        with pytest.raises(UserError, match="win rates within a group always average 1/2"):
            replace(CONFIG, reward=relative, refresh=Refresh())
    with pytest.raises(UserError, match="a budget counts the tokens of the last turn"):
        replace(CONFIG, budget=Budget(), tools=Tools())


def test_a_refresh_lets_the_policy_use_its_tools(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    whole = reinforce.gather

    def noted(*args: Any, **options: Any) -> Any:
        told.append((options["count"], len(options["tools"])))
        return whole(*args, **{**options, "tools": ()})

    monkeypatch.setattr(reinforce, "gather", noted)
    tools = [Tool("python", "", {}, lambda arguments: "")]
    config = replace(CONFIG, problems_a_step=2, refresh=Refresh(every=1), objective=Grpo(mismatch_bound=100.0))
    made = loader(config, Fixed([]), tmp_path, model)
    made.parts = replace(made.parts, tools=tools)
    made.next(SETTING)
    made.next(SETTING)
    # four completions of a step's problems, eight of each problem for the gate, four again
    assert told == [(4, 1), (8, 1), (4, 1)]


def test_rollouts_of_older_weights_are_no_fresh_ones(tmp_path: Path, model: Path) -> None:
    class Pushed:
        def send_weights(self) -> None:
            return

        def shutdown(self) -> None:
            return

    remote = RemoteSampler("http://nowhere", "policy")
    remote.sample = Fixed([]).sample  # type: ignore[method-assign]
    version = [0]
    sampler = VllmSampler(remote, "http://nowhere", Pushed(), lambda: version[0], most_stale=1)
    sampler._post = lambda *_: None  # type: ignore[method-assign]
    made = loader(replace(CONFIG, objective=Grpo(mismatch_bound=1e-3)), sampler, tmp_path, model)
    fresh = []
    for version[0] in range(3):
        fresh += [batch.fresh for batch in made.next(SETTING)]
    # the second batch is sampled one update late: the bound on two implementations of the same weights does not apply
    assert fresh == [True, False, True]
    assert [row["staleness"] for row in made.monitor.rows] == [0, 1, 0]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Broken(Verifier):
    how: str

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        if self.how == "raises":
            raise ZeroDivisionError("by nothing")
        if self.how == "hangs":
            import time

            time.sleep(60)
        if self.how == "leaves":
            raise SystemExit(3)
        if self.how == "few":
            return [Verdict(1.0, "")]
        verdicts = [Verdict(1.0, "") for _ in group]
        if self.how == "nan":
            object.__setattr__(verdicts[0], "score", float("nan"))
        if self.how == "text":
            object.__setattr__(verdicts[0], "score", "1")
        return [1.0 for _ in group] if self.how == "numbers" else verdicts  # type: ignore[misc]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "the verifier Broken on problem . .* raised ZeroDivisionError: by nothing"),
        ("hangs", r"has not answered within 0\.5 s"),
        ("leaves", "raised SystemExit: 3"),
        ("text", "expected a Verdict with a finite score"),
        ("few", "gave 1 verdicts for 4 completions"),
        ("nan", "expected a Verdict with a finite score"),
        ("numbers", r"gave 1\.0: expected a Verdict"),
    ],
)
def test_a_verifier_that_breaks_its_contract_is_named(
    tmp_path: Path, inputs: dict[str, Path], how: str, message: str
) -> None:
    config = replace(CONFIG, reward=RewardConfig(custom=Broken(how), seconds=0.5))
    with pytest.raises(UserError, match=message):
        run(config, tmp_path, inputs)
