"""The only training loop. Every objective goes through it; it yields after each optimizer step.

    loss of a step = sum of the totals of all microbatches and processes / sum of their weights

An objective returns sums. Gradients of the sums add up over microbatches and processes, and are divided once, here, by
the weight of the whole step. So the loss and its gradient do not depend on how a step is cut into microbatches, rows,
padding or processes.

A step whose weight is 0 (all completions truncated) changes nothing and says so. A step whose loss or gradient is not
finite ends the run before any weight is touched.
"""

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upweight.core.batches import Loss
from upweight.core.errors import UserError
from upweight.core.identity import plain
from upweight.core.protocols import Objective
from upweight.core.work import Machine
from upweight.model import context
from upweight.model.memory import keep_freed_memory
from upweight.model.precision import multiplied_in
from upweight.model.transformer import Transformer
from upweight.train import cpu, parallel, sharding
from upweight.train.batching import Loader
from upweight.train.checkpoint import CheckpointConfig, Checkpoints, newest_counters
from upweight.train.optimizer import Optimizer, OptimizerConfig
from upweight.train.timeline import Setting, Timeline

DOCUMENTS_NAMED = 20


class NonFiniteLoss(UserError):
    """The loss or its gradient became infinite or undefined."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did, over all processes.

    Attributes:
        step: counted from 1.
        began, consumed: the places on the timeline before and after this step.
        loss: total / weight over the whole step; nan where nothing was trained.
        weight: what the loss was divided by. 0: nothing was trained and the weights stayed as they were (`skipped`).
        terms: the objective's named terms, each divided by its own weight, and its maxima.
        gradient_norm: before clipping.
        tokens: that were read, padding not counted.
        flops: operations that the tokens take forwards and backwards; 0 where the policy's config does not say.
        shares: of each source in the tokens, where the loader mixes several.
    """

    step: int
    consumed: int
    phase: str
    learning_rate: float
    loss: float
    weight: float
    terms: Mapping[str, float]
    gradient_norm: float
    tokens: int
    seconds: float
    began: int = 0
    flops: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        """Whether there was nothing to train on, so that no weight was changed."""
        return self.weight == 0


def train(
    policy: nn.Module,
    *,
    objective: Objective,
    loader: Loader,
    timeline: Timeline,
    optimizer: OptimizerConfig | None = None,
    machine: Machine | None = None,
    checkpoint: CheckpointConfig | None = None,
    dtype: str = "float32",
) -> Iterator[StepReport]:
    """Train `policy` until the timeline ends or the loader has nothing more.

    With a checkpoint directory that holds a checkpoint, the run goes on from it; it is refused where the run that wrote
    it had another model, timeline, optimizer, objective or data. A step is saved after its report was taken, so every
    saved step has been seen by whoever reads the reports, and the steps after the last save are reported again.

    Args:
        policy: called by the objective. Its `set_rope_base`, where it has one, is called with each phase's RoPE base.
            Of several processes each holds all of it. Where the machine says "fsdp", a copy is sharded and trained, and
            `policy` has the new weights when the last report has been taken; a policy that sharding.shard was applied
            to stays sharded.
        loader: makes the microbatches of each step; `loader.consumed` is the place on the timeline.
        optimizer: OptimizerConfig() where none is given.
        dtype: of the matrix products; weights and optimizer stay as they are. "bfloat16" uses autocast.

    Raises NonFiniteLoss, naming the step, its documents and the last good checkpoint, before any weight is touched.

    Example, from token shards to a directory that transformers opens::

        timeline = wsd(warmup=10**6, stable=10**8, decay=10**7, peak_lr=0.02, mixture={"web": 1.0}, context=1024)
        model = make_model(ModelConfig(vocab_size=32_768, width=512, layers=8, heads=8, kv_heads=2, ffn=1536), seed=0)
        loader = MixtureLoader(
            {"web": Shards.open(Path("shards/web"))}, timeline, seed=0, batch_tokens=65_536, microbatch_tokens=8192
        )
        keep = CheckpointConfig(Path("checkpoints"), every_steps=100)
        for report in train(model, objective=NextToken(), loader=loader, timeline=timeline, checkpoint=keep):
            print(report.step, report.phase, report.loss)
        save(model, "model")
    """
    machine = machine or Machine()
    device = torch.device(machine.device)
    compiled = machine.compiles
    if device.type == "cpu":
        keep_freed_memory()
        compiled = compiled and cpu.has_compiler()
    for part in policy.modules():
        if isinstance(part, Transformer):
            part.compiled, part.recompute = compiled, float(machine.recompute)
    place, layout, home = parallel.world(), parallel.layout(), policy
    _check_layout(machine, layout, policy)
    fsdp, shapes = place.size > 1 and machine.sharding == "fsdp", _shapes(home)
    if not sharding.is_sharded(policy):
        if place.size > 1:
            sharding.replicate(policy)
        if fsdp or layout.tensor.size > 1:
            policy = sharding.shard(copy.deepcopy(home.to("cpu")).to(device), fsdp=fsdp)
        else:
            policy.to(device)
    together = sharding.gathers_weights(policy)
    _check_vocabulary(policy, loader)
    config = optimizer or OptimizerConfig()
    updater = Optimizer(policy, config)
    step = 0
    first: Mapping[str, Any] = {}
    saved: Checkpoints | None = None
    if checkpoint is not None:
        saved = Checkpoints(checkpoint, _identity(shapes, objective, loader, timeline, config, dtype))
        restored = saved.restore(policy, updater)
        if restored is not None:
            loader.restore(restored.loader)
            step, first = int(restored.counters["step"]), restored.counters.get("first", {})
            for entered in timeline.entered(loader.consumed):  # what a phase leaves as it is, an earlier one has set
                _enter((policy, home), entered)
    while loader.consumed < timeline.tokens:
        started, began = time.perf_counter(), loader.consumed
        setting = timeline.at(began)
        _enter((policy, home), setting)
        if loader.reads_policy and home is not policy:
            sharding.restore_whole(policy, home.to(device))
        batches = loader.next(setting)
        most = parallel.most(len(batches)) if place.size > 1 else len(batches)
        if not most:
            break
        step += 1
        if not batches:
            raise UserError(
                f"process {place.rank} of {place.size} has nothing to read in step {step}, though others have: make "
                "steps larger, or start fewer processes"
            )
        sums = _Sums()
        for index in range(most if together else len(batches)):
            # with FSDP all gather weights together: one that has run out takes part with a last batch that counts 0
            read = batches[min(index, len(batches) - 1)]
            batch = read.to(device)
            with multiplied_in(dtype, device), context.shared(layout.share):
                loss = objective(policy, batch)
            spare = index >= len(batches)
            if loss.total.requires_grad:
                (loss.total * (0 if spare else 1 / layout.context.size)).backward()
            if not spare:
                sums.add(loss, read.token_count)  # counted on the host: the device is not waited for
        if place.size > 1:
            sharding.sum_gradients(policy)
        total = sums.over_processes(layout)
        norm = 0.0
        if total.weight > 0:
            norm = updater.divide(total.weight)
            if not (math.isfinite(total.loss) and math.isfinite(norm)):
                raise NonFiniteLoss(_non_finite(step, total.loss, norm, setting, loader.documents(), saved))
            updater.step(setting.lr)
        elif total.weight == 0:
            updater.forget()
        else:
            raise NonFiniteLoss(_non_finite(step, total.loss, norm, setting, loader.documents(), saved))
        report = StepReport(
            step=step,
            consumed=loader.consumed,
            phase=setting.phase,
            learning_rate=setting.lr,
            loss=total.loss,
            weight=total.weight,
            terms=total.terms,
            gradient_norm=norm,
            tokens=total.tokens,
            seconds=time.perf_counter() - started,
            began=began,
            flops=_flops(policy, setting, total.tokens),
            shares=loader.shares(),
        )
        yield report
        first = first or asdict(report)
        if saved is not None and (step % saved.config.every_steps == 0 or loader.consumed >= timeline.tokens):
            saved.write(
                policy, updater, loader=loader.state(), counters={"step": step, "first": first, "last": asdict(report)}
            )
    if saved is not None:
        saved.finish()
    if home is not policy:
        sharding.restore_whole(policy, home.to(device))


def ends(directory: Path) -> tuple[StepReport | None, StepReport | None]:
    """The reports of the first and of the last step of a run that has ended, whatever it was killed in between.

    Args:
        directory: of its checkpoints; None twice where it holds none, as for all but the first of several processes.
    """
    told = newest_counters(directory)
    first, last = (StepReport(**told[name]) if told.get(name) else None for name in ("first", "last"))
    return first, last


@dataclass(frozen=True, slots=True)
class _Total:
    loss: float
    weight: float
    tokens: int
    terms: Mapping[str, float]


class _Sums:
    """Totals and weights of a step, added up without waiting for the device."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.tokens = 0

    def add(self, loss: Loss, tokens: int) -> None:
        self.tokens += tokens
        for name, part in {"": loss, **loss.terms}.items():
            pair = torch.stack((part.total.detach().double(), part.weight.detach().double()))
            self.values[name] = self.values[name] + pair if name in self.values else pair
        for name, value in loss.maxima.items():
            peak = value.detach().double()
            self.maxima[name] = torch.maximum(self.maxima[name], peak) if name in self.maxima else peak

    def over_processes(self, layout: parallel.Layout) -> _Total:
        """Over those that read other rows; what shares out rows or matrices with this process has the same sums."""
        names, peaks = sorted(self.values), sorted(self.maxima)
        some = self.values[""]
        sums = torch.stack([*(self.values[name] for name in names), some.new_tensor((self.tokens, 0))])
        highest = torch.stack([self.maxima[name] for name in peaks]) if peaks else some.new_empty(0)
        if layout.data.size > 1:
            sums = parallel.reduced(sums, "sum", layout.data_group)
            highest = parallel.reduced(highest, "max", layout.data_group)
        *pairs, (tokens, _) = sums.tolist()
        by_name = {name: (a / b if b else math.nan, b) for name, (a, b) in zip(names, pairs, strict=True)}
        loss, weight = by_name.pop("")
        terms = {name: value for name, (value, _) in by_name.items()}
        terms.update(zip(peaks, highest.tolist(), strict=True))
        return _Total(loss, weight, int(tokens), terms)


def _enter(models: Sequence[nn.Module], setting: Setting) -> None:
    """Take on the phase's RoPE base (ABF) and its context, where the models have them."""
    for model in models:
        adapt: Any = getattr(model, "set_rope_base", None)
        if adapt is None:
            continue
        shape: Any = getattr(model, "config", None)
        if shape is None:
            if setting.rope_base:
                adapt(setting.rope_base)
            continue
        base, longest = setting.rope_base or shape.rope_base, max(setting.context, shape.max_context)
        if (shape.rope_base, shape.max_context) != (base, longest):
            adapt(base, max_context=longest)


def _check_vocabulary(policy: nn.Module, loader: Loader) -> None:
    """Raises UserError where some of the loader's tokens have no embedding."""
    known = getattr(getattr(policy, "config", None), "vocab_size", None)
    if known is not None and loader.vocab_size > known:
        raise UserError(
            f"the data has {loader.vocab_size:,} tokens, but the model has embeddings for {known:,}: use the tokenizer "
            "that the model was trained with to encode it, or a model of a larger vocabulary"
        )


def _flops(policy: nn.Module, setting: Setting, tokens: int) -> float:
    """The backward pass takes twice as much as the forward pass."""
    forwards: Any = getattr(getattr(policy, "config", None), "flops_per_token", None)
    return 0.0 if forwards is None else 3.0 * tokens * float(forwards(setting.context))


def _shapes(policy: nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in policy.named_parameters()}


def _check_layout(machine: Machine, layout: parallel.Layout, policy: nn.Module) -> None:
    """Raises UserError where the processes are not laid out as the machine says, or the policy cannot be."""
    if (machine.tensor, machine.context) != (layout.tensor.size, layout.context.size):
        raise UserError(
            f"the machine asks for tensor {machine.tensor} and context {machine.context}, but the processes are laid "
            f"out for {layout.tensor.size} and {layout.context.size}: start them with torchrun, and train within "
            "parallel.joined(machine)"
        )
    if layout.context.size > 1 and not any(isinstance(part, Transformer) for part in policy.modules()):
        raise UserError("context parallelism is for models of the Llama family: use --sharding fsdp for others")


def _identity(
    shapes: Mapping[str, list[int]],
    objective: Objective,
    loader: Loader,
    timeline: Timeline,
    optimizer: OptimizerConfig,
    dtype: str,
) -> dict[str, Any]:
    """What must be the same for a checkpoint to belong to this run."""
    settings = getattr(objective, "identity", None)
    return {
        "parameters": shapes,
        "objective": [type(objective).__name__, settings() if settings else _plain_fields(objective)],
        "loader": [type(loader).__name__, plain(loader.identity())],
        "timeline": plain(timeline),
        "optimizer": plain(optimizer),
        "dtype": dtype,
    }


def _plain_fields(objective: Objective) -> object:
    return plain(objective) if hasattr(objective, "__dataclass_fields__") else {}


def _non_finite(
    step: int, loss: float, norm: float, setting: Setting, documents: Sequence[str], saved: Checkpoints | None
) -> str:
    good = saved.complete() if saved else []
    back = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint before it"
    named = ", ".join(documents[:DOCUMENTS_NAMED])
    more = f" and {len(documents) - DOCUMENTS_NAMED} more" if len(documents) > DOCUMENTS_NAMED else ""
    read = f" It was made of the documents {named}{more}." if named else ""
    return (
        f"step {step} ({setting.phase}, learning rate {setting.lr:.3g}): the loss is {loss} and its gradient norm "
        f"{norm}. No weight was changed by it; {back}.{read} Lower the learning rate, or look at what this step was "
        "made of"
    )
