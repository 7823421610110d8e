"""reinforce: one stage of on-policy GRPO. Each step samples groups with the weights of that moment and updates.

The policy is the model being trained: no copy, no reload. A step's problems and random streams are a function of the
seed and of how far the run has come, so a killed run goes on with the rollouts that it would have made.

Of several processes each samples and judges its share of a step's groups, then all know all of them, and each trains on
its share. What is sampled for a problem does not depend on who samples it, so the step is the same up to rounding.
"""

import json
import shutil
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean, median, pstdev
from typing import Any, Literal

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.protocols import Limits, Sampler, Verifier
from upweight.core.records import Problem
from upweight.core.work import Estimate, Monitor, Summary, Work
from upweight.model.language_model import fingerprint, interpolate, load, save
from upweight.objectives.grpo import Grpo, RolloutBatch, Sampled, group_advantages
from upweight.rollout.episode import Tool
from upweight.rollout.local import LocalSampler, planned_bytes
from upweight.rollout.sandbox import Sandbox
from upweight.rollout.vllm import Vllm, VllmSampler, open_vllm
from upweight.store.jsonl import read_jsonl, write_jsonl
from upweight.synthesize.difficulty import Gate, Measured, measured
from upweight.synthesize.rollouts import Group, Tools, gather
from upweight.text.tokenizer import Tokenizer
from upweight.train import parallel
from upweight.train.batching import Loader
from upweight.train.checkpoint import CheckpointConfig, discard
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Setting, constant
from upweight.train.trainer import train
from upweight.train.watch import watched
from upweight.verify import hacking
from upweight.verify.compose import BudgetVerifier
from upweight.verify.reward import RewardConfig, open_verifier

ALL_PROCESSES = True

CHECKPOINTS_KEPT = 2

CURVES = ("reward", "truncated_share", "mean_length", "repetition", "length_correlation", "judge")


@dataclass(frozen=True)
class Refresh:
    """The gate again, by the policy as it is now.

    Attributes:
        every: steps between two measurements.
        gate: samples and bounds.
        dropped: whether problems that the gate before the stage dropped are measured too, since what was too hard
            then may not be now.
    """

    every: int = 50
    gate: Gate = field(default_factory=lambda: Gate(count=8))
    dropped: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"the gate is refreshed every {self.every} steps: expected 1 or more")


@dataclass(frozen=True)
class Budget:
    """Less reward for answers longer than their problem takes, see verify.compose.BudgetVerifier. What it takes is read
    from the measurements of the gate before this step."""

    slack: float = 1.5
    span: float = 1.5
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.slack < 1 or self.span <= 0 or not 0 <= self.least <= 1:
            raise UserError(
                f"budget of slack {self.slack}, span {self.span}, least {self.least}: expected 1 or more, above 0, 0-1"
            )


@dataclass(frozen=True)
class Config:
    """Attributes:
    reward: which verifier judges the completions.
    steps: updates, one for each batch of fresh rollouts, or `updates_a_batch` of them.
    problems_a_step, group: problems of a batch and completions of each.
    limits: how to sample; the seed is derived from the step's own.
    divide_by_spread, truncated_in_baseline: of the advantages, see objectives.grpo.group_advantages.
    resample_rounds: dynamic sampling (arXiv 2503.14476): groups whose advantages are all 0 are dropped, and further
        problems sampled in their place, in so many further rounds at most. 0 keeps every group.
    updates_a_batch: a batch of rollouts is split into so many updates, all but the first by a policy that has moved on
        since it sampled; the objective's clip, or its truncated weights, correct for that.
    refresh: measure the difficulty of the problems again during the stage; None keeps those of the gate.
    budget: a length budget for each problem; None pays right answers whatever their length.
    tools: what the policy may call while it answers; None makes each answer one completion.
    sampler_dtype: what the sampler of this process computes in, see rollout.local.LocalSampler. With "bfloat16" give
        the objective `off_policy="truncate"` and a `mismatch_bound` of about 0.5.
    vllm: sample with vLLM in its own process, to which the weights are pushed; None samples in this one.
    judge: a held-out verifier that watches for reward hacking and that nothing is trained on. One that needs a reward
        model takes that of the input "judge".
    judge_every: steps between two looks of the judge, at the batch that holds the step.
    learning_rate: constant after `warmup_steps`.
    interpolation: how far from the first to the last weights the checkpoint lies, above 0 and up to 1. Less than 1
        forgets less of what earlier stages taught (Ramé et al., arXiv 2406.16768, section 3.3).
    batch_tokens: tokens of one forward pass; the loss does not depend on it.
    keep_rollouts_every: how often, in steps, a batch's rollouts are kept for the report; the last ones always are.
    """

    reward: RewardConfig
    steps: int = 40
    problems_a_step: int = 16
    group: int = 16
    limits: Limits = field(default_factory=lambda: Limits(max_new_tokens=64))
    objective: Grpo = field(default_factory=Grpo)
    divide_by_spread: bool = False
    truncated_in_baseline: bool = True
    resample_rounds: int = 0
    updates_a_batch: int = 1
    refresh: Refresh | None = None
    budget: Budget | None = None
    tools: Tools | None = None
    sampler_dtype: Literal["float32", "bfloat16"] = "float32"
    vllm: Vllm | None = None
    judge: RewardConfig | None = None
    judge_every: int = 5
    learning_rate: float = 1.0
    warmup_steps: int = 2
    interpolation: float = 1.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_tokens: int = 8192
    keep_rollouts_every: int = 10
    save_every_steps: int = 5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"group is {self.group}: advantages are relative to the group, so it needs at least two")
        if self.steps < 1 or self.problems_a_step < 1:
            raise UserError(f"{self.steps} steps of {self.problems_a_step} problems: both have to be at least 1")
        if self.limits.temperature <= 0:
            raise UserError("temperature 0 makes every completion of a group the same: nothing can be learned from it")
        for name in ("temperature", "top_p", "top_k", "min_p"):
            asked, told = getattr(self.limits, name), getattr(self.objective, name)
            if asked != told:
                raise UserError(
                    f"the limits sample with {name} {asked}, and the objective is told {told}: its log-probabilities "
                    f"are those of the distribution that was sampled from, so give it {name}={asked}"
                )
        if self.vllm is not None and self.limits.min_p > 0 and self.limits.top_p < 1:
            raise UserError(
                "vLLM cuts by min_p before top_p, and the trainer after it, which are different distributions: ask for "
                "one of the two, or sample in this process"
            )
        if not 0 < self.interpolation <= 1:
            raise UserError(f"interpolation is {self.interpolation}: expected above 0 and up to 1, the last weights")
        if self.resample_rounds < 0 or not 1 <= self.updates_a_batch <= self.problems_a_step:
            raise UserError(
                f"resample_rounds {self.resample_rounds}, updates_a_batch {self.updates_a_batch}: expected 0 or more, "
                "and 1 to problems_a_step"
            )
        if self.judge_every < 1 or self.keep_rollouts_every < 1:
            raise UserError(
                f"judge_every {self.judge_every}, keep_rollouts_every {self.keep_rollouts_every}: expected 1 or more"
            )
        if self.refresh is not None and self.reward.relative:
            raise UserError(
                "the gate cannot be refreshed by the preference reward: win rates within a group always average 1/2, "
                "so every problem would come into the pool. Leave refresh out"
            )
        if self.budget is not None and self.tools is not None:
            raise UserError(
                "a budget counts the tokens of the last turn, and the gate measured answers without tools: with tools "
                "an answer would be as long as it likes. Leave one of the two out"
            )


@dataclass(frozen=True)
class Parts:
    """What a run's loader works with.

    Attributes:
        problems: the pool that is sampled from.
        measured: what a refresh of the gate measures.
        context: tokens that the sampler reads and writes at most; 0 where nobody knows.
    """

    sampler: Sampler
    tokenizer: Tokenizer
    verifier: Verifier
    problems: Sequence[Problem]
    measured: Sequence[Problem] = ()
    tools: Sequence[Tool] = ()
    judge: Verifier | None = None
    context: int = 0


class OnPolicy(Loader):
    """Batches of fresh rollouts by the policy itself. Its state is how far it has come, and a pool that changed.

    Args:
        out: the directory of the first process, which writes there for all.
    """

    def __init__(self, parts: Parts, config: Config, *, seed: int, monitor: Monitor, out: Path) -> None:
        self.parts, self.config = parts, config
        self.seed, self.monitor, self.out = seed, monitor, out
        self._step = 0
        self._taken = 0  # problems since the pool last changed
        self._pool = list(parts.problems)
        self._refreshed = 0  # the step of the last refresh
        self._groups: list[Group] = []
        self._stale = False  # sampled by older weights than the policy's
        self._order: tuple[tuple[object, ...], list[int]] = ((), [])

    @property
    def consumed(self) -> int:
        return self._step

    @property
    def reads_policy(self) -> bool:
        return True

    def state(self) -> dict[str, Any]:
        changed = [problem.id for problem in self._pool] if self._refreshed else None
        return {"step": self._step, "taken": self._taken, "refreshed": self._refreshed, "pool": changed}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step, self._taken, self._refreshed = (int(state[name]) for name in ("step", "taken", "refreshed"))
        if state["pool"] is not None:
            known = {problem.id: problem for problem in (*self.parts.measured, *self.parts.problems)}
            self._pool = [known[name] for name in state["pool"]]
        if self._step % self.config.updates_a_batch:
            self._groups = read_jsonl(self._pending(self._step), Group)

    def next(self, setting: Setting) -> Sequence[RolloutBatch]:
        """The microbatches of one update: a batch of fresh rollouts, or the next part of one."""
        step, parts = self._step, self.config.updates_a_batch
        part = step % parts
        if part == 0:
            self._refresh(step)
            self._groups = self._sampled(step)
            if parts > 1 and parallel.world().rank == 0:
                self._keep(step)
        self._step += 1
        readers = parallel.readers()
        some = self._groups[part::parts][readers.rank :: readers.size]
        return self.config.objective.batches(
            [item for group in some for item in self._items(group)],
            row_tokens=self.config.batch_tokens,
            fresh=part == 0 and not self._stale,
        )

    def _pending(self, step: int) -> Path:
        """The rollouts of a batch of several updates, which a run that resumes within it could not sample again."""
        return self.out / "pending" / f"{step - step % self.config.updates_a_batch:08d}.jsonl"

    def _keep(self, step: int) -> None:
        """Write this batch down, and remove those that no checkpoint stands in any more."""
        path = self._pending(step)
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path, self._groups)
        # a checkpoint that cannot be read is removed by the user, and the one before it goes on
        oldest = step - self.config.updates_a_batch - CHECKPOINTS_KEPT * self.config.save_every_steps
        for other in path.parent.glob("*.jsonl"):
            if int(other.stem) < oldest:
                other.unlink()

    def _sampled(self, step: int) -> list[Group]:
        """One batch: as many groups as asked for, or with dynamic sampling those that teach something."""
        config, groups, sampled = self.config, list[Group](), list[Group]()
        for again in range(1 + config.resample_rounds):
            name = ("rollouts", step) if again == 0 else ("rollouts", step, again)
            limits = replace(config.limits, seed=seed_for(self.seed, *name))
            made = parallel.shared_out(
                self._problems(config.problems_a_step - len(groups)),
                partial(self._gathered, limits=limits, count=config.group),
                alike=_prompt,
            )
            sampled += made
            groups += [group for group in made if not config.resample_rounds or any(self._advantages(group))]
            if len(groups) >= config.problems_a_step:
                break
        self._stale = self._lag().get("staleness", 0) > 0
        if parallel.world().rank == 0:
            self._record(step, sampled, len(groups))
        return groups

    def _gathered(self, problems: Sequence[Problem], limits: Limits, count: int) -> list[Group]:
        """The judged groups of some problems, `count` completions each."""
        config, parts = self.config, self.parts
        return gather(
            parts.sampler,
            parts.tokenizer,
            parts.verifier,
            problems,
            count=count,
            limits=limits,
            tools=parts.tools,
            most_turns=config.tools.most_turns if config.tools else 1,
            context=parts.context,
        )

    def _advantages(self, group: Group) -> list[float]:
        rollout, config = group.rollout, self.config
        masked = config.objective.mask_truncated
        advantages = group_advantages(
            [verdict.score for verdict in rollout.verdicts],
            truncated=[masked and completion.truncated for completion in rollout.completions],
            truncated_in_baseline=config.truncated_in_baseline,
            divide_by_spread=config.divide_by_spread,
        )
        return [float(value) for value in advantages]

    def _items(self, group: Group) -> list[Sampled]:
        items: list[Sampled] = []
        for sequences, advantage in zip(group.sequences, self._advantages(group), strict=True):
            for one in sequences:
                item = (one.prompt, one.completion, advantage)
                items.append(item if all(one.wrote) else (*item, one.wrote))
        return items

    def _problems(self, count: int) -> list[Problem]:
        """The next problems: every epoch goes through the whole pool in an order of its own."""
        chosen = []
        for place in range(self._taken, self._taken + count):
            epoch, index = divmod(place, len(self._pool))
            chosen.append(self._pool[self._shuffled(epoch)[index]])
        self._taken += count
        return chosen

    def _shuffled(self, epoch: int) -> list[int]:
        """The order of the pool in an epoch; shuffled once, since a pool may be long."""
        name = ("order", self._refreshed, epoch) if self._refreshed else ("order", epoch)
        if self._order[0] != name:
            order = list(range(len(self._pool)))
            Random(seed_for(self.seed, *name)).shuffle(order)
            self._order = (name, order)
        return self._order[1]

    def _refresh(self, step: int) -> None:
        """Where it is time, put the problems that are of the right difficulty now into the pool."""
        refresh = self.config.refresh
        if refresh is None or step < self._refreshed + refresh.every:
            return
        limits = replace(self.config.limits, seed=seed_for(self.seed, "refresh", step))
        problems = (self.parts.measured if refresh.dropped else ()) or self.parts.problems
        found = parallel.shared_out(
            problems,
            lambda mine: [
                measured(group.rollout, refresh.gate) for group in self._gathered(mine, limits, refresh.gate.count)
            ],
            alike=_prompt,
        )
        kept = [one.problem for one in found if one.dropped is None]
        self.monitor.record(
            refresh_step=step, kept=len(kept), measured=len(found), rate=fmean(one.rate for one in found)
        )
        if len(kept) < self.config.problems_a_step:
            self.monitor.say(
                f"the gate kept {len(kept)} of {len(found)} problems after {step} steps, fewer than a step takes: the "
                "pool stays as it was"
            )
            kept = self._pool
        self._pool, self._taken, self._refreshed = kept, 0, step

    def _lag(self) -> dict[str, float]:
        """How far a sampler of its own process lies behind, in updates, and what the last push took."""
        sampler = self.parts.sampler
        if not isinstance(sampler, VllmSampler):
            return {}
        return {"staleness": float(sampler.staleness), "push_seconds": sampler.push_seconds}

    def _holds(self, step: int, every: int) -> bool:
        """Whether one of the steps of the batch that begins with `step` is a multiple of `every`."""
        return -step % every < self.config.updates_a_batch

    def _record(self, step: int, groups: Sequence[Group], kept: int) -> None:
        rollouts = [group.rollout for group in groups]
        completions = [completion for rollout in rollouts for completion in rollout.completions]
        whole = [
            verdict.score
            for rollout in rollouts
            for completion, verdict in zip(rollout.completions, rollout.verdicts, strict=True)
            if not completion.truncated
        ]
        useful = [any(self._advantages(group)) for group in groups]
        lengths = [sum(sum(one.wrote) for one in parts) for group in groups for parts in group.sequences]
        judged: list[Any] = []
        if self.parts.judge is not None and self._holds(step, self.config.judge_every):
            judged = [self.parts.judge.score(rollout.problem, rollout.completions) for rollout in rollouts]
        self.monitor.record(
            rollout_step=step + 1,
            reward=fmean(whole) if whole else 0.0,
            reward_spread=pstdev(whole) if whole else 0.0,
            truncated_share=fmean(completion.truncated for completion in completions),
            mean_length=fmean(lengths),
            median_length=median(lengths),
            longest=max(lengths),
            groups_with_signal_share=fmean(useful),
            kept_share=kept / len(rollouts),
            **hacking.figures(rollouts, judged),
            **self._lag(),
        )
        last = step + self.config.updates_a_batch >= self.config.steps
        if last or self._holds(step, self.config.keep_rollouts_every):
            folder = self.out / "rollouts"
            folder.mkdir(exist_ok=True)
            write_jsonl(folder / f"step-{step + 1:05d}.jsonl", rollouts)


def _prompt(problem: Problem) -> Hashable:
    return problem.messages


def run(config: Config, work: Work) -> Summary:
    """Train the input "model" on the input "problems" and write `model/`, the metrics and some rollouts."""
    source = work.inputs["model"] / "model"
    model, _ = load(source)
    model.to(work.machine.device)
    tokenizer = Tokenizer.load(source)
    problems = read_jsonl(work.inputs["problems"] / "problems.jsonl", Problem)
    if not problems:
        raise UserError(
            f"{work.inputs['problems']} holds no problem: the gate dropped all of them as too easy or too hard. "
            "Give it problems of other difficulty, or widen its bounds"
        )
    if config.vllm is not None and parallel.world().size > 1:
        raise UserError(
            "vLLM takes the weights of one training process so far: leave vllm out, and each of the "
            f"{parallel.world().size} processes samples its share, or start one"
        )
    before = _measured(work.inputs["problems"])
    out = Path(parallel.told(str(work.out)))
    with ExitStack() as opened:
        verifier = opened.enter_context(open_verifier(config.reward, work.inputs, work.machine))
        if config.budget is not None:
            verifier = BudgetVerifier(
                verifier, _usual_lengths(before, work), config.budget.slack, config.budget.span, config.budget.least
            )
        tools: Sequence[Tool] = ()
        if config.tools is not None:
            pool = Sandbox(workers=work.machine.workers, unsafe=work.machine.unsafe_execution)
            tools = config.tools.opened(opened.enter_context(pool))
        judge = None
        if config.judge is not None:
            inputs = work.inputs if "judge" not in work.inputs else {**work.inputs, "reward": work.inputs["judge"]}
            judge = opened.enter_context(open_verifier(config.judge, inputs, work.machine))
        sampler: Sampler = LocalSampler(model, tokenizer, policy=out.name, dtype=config.sampler_dtype)
        if config.vllm is not None:
            log = work.out / "vllm.log"
            sampler = opened.enter_context(
                open_vllm(config.vllm, model, tokenizer, source, lambda: loader.consumed, log)
            )
        loader = OnPolicy(
            Parts(
                sampler,
                tokenizer,
                verifier,
                problems,
                [one.problem for one in before],
                tools,
                judge,
                (config.vllm.context if config.vllm else 0) or model.config.max_context,
            ),
            config,
            seed=work.seed,
            monitor=work.monitor,
            out=out,
        )
        reports = train(
            model,
            objective=config.objective,
            loader=loader,
            timeline=constant(
                total=config.steps, lr=config.learning_rate, warmup=min(config.warmup_steps, config.steps - 1)
            ),
            optimizer=config.optimizer,
            machine=work.machine,
            checkpoint=CheckpointConfig(
                work.out / "checkpoints", every_steps=config.save_every_steps, keep=CHECKPOINTS_KEPT
            ),
            dtype=config.dtype,
        )
        mismatch = 0.0
        for report in watched(
            reports,
            work.monitor,
            "reinforce",
            total=config.steps,
            unit="steps",
            machine=work.machine,
            dtype=config.dtype,
        ):
            if _is_first(config, report.step):
                mismatch = max(mismatch, report.terms.get("logprob_difference", 0.0))
    if config.interpolation < 1:
        interpolate(model, load(source)[0], config.interpolation)
    save(model, work.out / "model")
    tokenizer.save(work.out / "model")
    discard(work.out / "checkpoints")
    shutil.rmtree(work.out / "pending", ignore_errors=True)
    curves = {name: _curve(work.out / "metrics.jsonl", name) for name in CURVES}
    differences = _by_step(work.out / "metrics.jsonl", "logprob_difference", "step")
    mismatch = max([mismatch, *(value for step, value in differences.items() if _is_first(config, step))])
    warnings = hacking.warnings(curves)
    for warning in warnings:
        work.monitor.say(f"reward hacking? {warning}")
    rewards, truncated = curves["reward"], curves["truncated_share"]
    return {
        "problems": len(problems),
        "steps": config.steps,
        "reward_first": round(fmean(rewards[:5]), 4) if rewards else None,
        "reward_last": round(fmean(rewards[-5:]), 4) if rewards else None,
        "truncated_share_last": truncated[-1] if truncated else None,
        "largest_logprob_difference": mismatch,
        "hacking_warnings": warnings,
        "weights": fingerprint(model),
    }


def _measured(directory: Path) -> list[Measured]:
    """What the gate before this step measured; nothing where the problems come from elsewhere."""
    path = directory / "measured.jsonl"
    return read_jsonl(path, Measured) if path.exists() else []


def _usual_lengths(before: Sequence[Measured], work: Work) -> dict[str, float]:
    usual = {one.problem.id: one.right_tokens for one in before if one.right_tokens}
    if not usual:
        raise UserError(
            f"{work.inputs['problems']} does not say how long right answers are, which a length budget needs: give the "
            'artifact of a gate step as the input "problems", or leave the budget out'
        )
    return usual


def _is_first(config: Config, step: int) -> bool:
    """Whether the update of this step, counted from 1, is the first of its batch: by the weights that sampled it."""
    return (step - 1) % config.updates_a_batch == 0


def _curve(path: Path, name: str) -> list[float]:
    """The values of one metric of the rollouts, by step."""
    by_step = _by_step(path, name, "rollout_step")
    return [by_step[step] for step in sorted(by_step)]


def _by_step(path: Path, name: str, counter: str) -> dict[int, float]:
    """One metric by the counter of its row; a resumed run may have written a step twice, the later one counts."""
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text().splitlines())
    return {row[counter]: row[name] for row in rows if counter in row and name in row}


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Each completion takes half of the tokens allowed, is sampled once and trained on once; a group shares a prompt of
    about twice its length. A step samples, frees what that held, and trains. Of several updates of a batch the first
    one alone samples. What dynamic sampling and further turns take besides is not known."""
    model = inputs["model"]
    completions = config.steps / config.updates_a_batch * config.problems_a_step * config.group
    tokens = completions * config.limits.max_new_tokens / 2
    measuring = _measured_again(config, inputs["problems"].records if "problems" in inputs else {})
    sampled = tokens + measuring * config.limits.max_new_tokens / 2
    held = planned_bytes(model.held_bytes, config.problems_a_step * config.group, config.limits)
    return Estimate(
        tokens=tokens,
        flops=model.parameters * (2 * sampled + 6 * tokens * (1 + 2 / config.group)),
        sampled_flops=model.parameters * sampled * 2,
        memory_bytes=16 * model.parameters + max(config.batch_tokens * model.token_bytes, held) + 6e8,
        disk_bytes=4 * model.parameters,
        parameters=model.parameters,
        token_bytes=model.token_bytes,
        held_bytes=model.held_bytes,
    )


def _measured_again(config: Config, records: Mapping[str, float | int]) -> float:
    """Completions that the refreshed gate takes, as far as the gate before the stage says what it measures."""
    if config.refresh is None:
        return 0.0
    times = (config.steps - 1) // config.refresh.every
    kept = float(records.get("problems.jsonl", 0.0))
    problems = float(records.get("measured.jsonl", kept)) if config.refresh.dropped else kept
    return times * problems * config.refresh.gate.count
