"""reinforce: one stage of on-policy GRPO. Each step samples groups with the weights of that moment and updates once.

The policy is the model being trained: no copy, no reload. A step's problems and random streams are a function of the
seed and the step's number, so a killed run goes on with the rollouts that it would have made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from upweight.core.errors import UserError
from upweight.core.identity import seed_for
from upweight.core.protocols import Limits, Verifier
from upweight.core.records import Problem, Rollout
from upweight.core.work import Estimate, Monitor, Summary, Work
from upweight.model.language_model import fingerprint, load, save
from upweight.objectives.grpo import Grpo, RolloutBatch, group_advantages
from upweight.rollout.local import LocalSampler
from upweight.store.jsonl import read_jsonl, write_jsonl
from upweight.text.chat import render
from upweight.text.tokenizer import Tokenizer
from upweight.train.batching import Loader
from upweight.train.checkpoint import CheckpointConfig, discard
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Setting, constant
from upweight.train.trainer import train
from upweight.train.watch import watched
from upweight.verify.reward import RewardConfig, open_verifier


@dataclass(frozen=True)
class Config:
    """Attributes:
    reward: which verifier judges the completions.
    steps: updates, one for each batch of fresh rollouts.
    problems_a_step, group: problems of a batch and completions of each.
    limits: how to sample; the seed is derived from the step's own.
    learning_rate: constant after `warmup_steps`.
    batch_tokens: tokens of one forward pass; the loss does not depend on it.
    keep_rollouts_every: how often a step's rollouts are kept for the report.
    """

    reward: RewardConfig
    steps: int = 40
    problems_a_step: int = 16
    group: int = 16
    limits: Limits = field(default_factory=lambda: Limits(max_new_tokens=64))
    objective: Grpo = field(default_factory=Grpo)
    learning_rate: float = 1.0
    warmup_steps: int = 2
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


class OnPolicy(Loader):
    """Batches of fresh rollouts by the policy itself. Its state is the number of steps taken."""

    def __init__(
        self,
        sampler: LocalSampler,
        problems: Sequence[Problem],
        verifier: Verifier,
        config: Config,
        *,
        seed: int,
        monitor: Monitor,
        out: Path,
    ) -> None:
        self.sampler, self.problems, self.verifier, self.config = sampler, problems, verifier, config
        self.seed, self.monitor, self.out = seed, monitor, out
        self._step = 0

    @property
    def consumed(self) -> int:
        return self._step

    def state(self) -> dict[str, Any]:
        return {"step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])

    def next(self, setting: Setting) -> Sequence[RolloutBatch]:
        """Sample, judge and pack one step's groups."""
        config, step = self.config, self._step
        problems = self._problems(step)
        limits = Limits(**{**_fields(config.limits), "seed": seed_for(self.seed, "rollouts", step)})
        groups = self.sampler.sample([problem.messages for problem in problems], count=config.group, limits=limits)
        rollouts = [
            Rollout(problem, tuple(group), tuple(self.verifier.score(problem, group)))
            for problem, group in zip(problems, groups, strict=True)
        ]
        self._record(step, rollouts)
        self._step += 1
        return config.objective.batches(
            [
                (render(self.sampler.tokenizer, rollout.problem.messages), completion, advantage)
                for rollout in rollouts
                for completion, advantage in zip(
                    rollout.completions,
                    group_advantages([verdict.score for verdict in rollout.verdicts]),
                    strict=True,
                )
            ],
            row_tokens=config.batch_tokens,
        )

    def _problems(self, step: int) -> list[Problem]:
        """The step's problems: every epoch goes through all of them in an order of its own."""
        count, chosen = len(self.problems), []
        for place in range(step * self.config.problems_a_step, (step + 1) * self.config.problems_a_step):
            epoch, index = divmod(place, count)
            order = list(range(count))
            Random(seed_for(self.seed, "order", epoch)).shuffle(order)
            chosen.append(self.problems[order[index]])
        return chosen

    def _record(self, step: int, rollouts: Sequence[Rollout]) -> None:
        completions = [completion for rollout in rollouts for completion in rollout.completions]
        whole = [
            verdict.score
            for rollout in rollouts
            for completion, verdict in zip(rollout.completions, rollout.verdicts, strict=True)
            if not completion.truncated
        ]
        useful = [len({verdict.score for verdict in rollout.verdicts}) > 1 for rollout in rollouts]
        self.monitor.record(
            rollout_step=step + 1,
            reward=fmean(whole) if whole else 0.0,
            truncated_share=fmean(completion.truncated for completion in completions),
            mean_length=fmean(len(completion.tokens) for completion in completions),
            groups_with_signal_share=fmean(useful),
        )
        if step % self.config.keep_rollouts_every == 0 or step == self.config.steps - 1:
            folder = self.out / "rollouts"
            folder.mkdir(exist_ok=True)
            write_jsonl(folder / f"step-{step + 1:05d}.jsonl", rollouts)


def _fields(limits: Limits) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in limits.__slots__}


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
    with open_verifier(config.reward, work.inputs, work.machine) as verifier:
        loader = OnPolicy(
            LocalSampler(model, tokenizer, policy=work.out.name),
            problems,
            verifier,
            config,
            seed=work.seed,
            monitor=work.monitor,
            out=work.out,
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
            checkpoint=CheckpointConfig(work.out / "checkpoints", every_steps=config.save_every_steps),
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
            mismatch = max(mismatch, report.terms.get("logprob_difference", 0.0))
    save(model, work.out / "model")
    tokenizer.save(work.out / "model")
    discard(work.out / "checkpoints")
    rewards = _curve(work.out / "metrics.jsonl", "reward")
    truncated = _curve(work.out / "metrics.jsonl", "truncated_share")
    return {
        "problems": len(problems),
        "steps": config.steps,
        "reward_first": round(fmean(rewards[:5]), 4) if rewards else None,
        "reward_last": round(fmean(rewards[-5:]), 4) if rewards else None,
        "truncated_share_last": truncated[-1] if truncated else None,
        "largest_logprob_difference": mismatch,
        "weights": fingerprint(model),
    }


def _curve(path: Path, name: str) -> list[float]:
    """The values of one metric by rollout step; a resumed run may have written a step twice, the later one counts."""
    if not path.exists():
        return []
    by_step: dict[int, float] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        if "rollout_step" in row:
            by_step[row["rollout_step"]] = row[name]
    return [by_step[step] for step in sorted(by_step)]


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Each completion is sampled once and trained on once; a group shares a prompt of about twice its length."""
    model = inputs["model"]
    completions = config.steps * config.problems_a_step * config.group
    tokens = completions * config.limits.max_new_tokens
    return Estimate(
        tokens=tokens,
        flops=model.parameters * tokens * (2 + 6 * (1 + 2 / config.group)),
        memory_bytes=16 * model.parameters + 1.2e9,
        disk_bytes=4 * model.parameters,
        parameters=model.parameters,
    )
