"""The loop: RoPE by phase, steps that are skipped or refused, checkpoints of other runs, and what a report says."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from upweight.core.batches import Loss, TokenBatch
from upweight.core.errors import Refusal, UserError
from upweight.core.packing import pack, strip
from upweight.core.protocols import Objective
from upweight.core.work import Machine
from upweight.model.transformer import ModelConfig, make_model
from upweight.objectives.next_token import NextToken
from upweight.train import parallel
from upweight.train.checkpoint import CheckpointConfig, discard
from upweight.train.loader import Loader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Phase, Setting, Timeline, constant
from upweight.train.trainer import NonFiniteLoss, StepReport, ends, train

SHAPE = ModelConfig(vocab_size=12, width=8, layers=1, heads=2, kv_heads=1, ffn=16)


class Fixed(Loader):
    """The same batch at every step."""

    def __init__(self, weight: float = 1.0, note: str = "") -> None:
        self.weight, self.note = weight, note
        self.settings: list[Setting] = []
        self._step = 0

    @property
    def consumed(self) -> int:
        return self._step

    def next(self, setting: Setting) -> Sequence[TokenBatch]:
        self.settings.append(setting)
        self._step += 1
        return [pack([strip([1, 2, 3, 4], [self.weight] * 4)], 8)]

    def state(self) -> dict[str, Any]:
        return {"step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]

    def identity(self) -> Mapping[str, Any]:
        return {"note": self.note}

    def documents(self) -> Sequence[str]:
        return [f"document-{number}" for number in range(30)]


class Broken(Objective):
    """Infinite at the third step."""

    def __init__(self, how: str) -> None:
        self.calls, self.how = 0, how

    def __call__(self, policy: Any, batch: TokenBatch) -> Loss:
        self.calls += 1
        total: Tensor = next(policy.parameters()).sum()
        if self.calls == 3:
            factor = torch.tensor(float("inf") if self.how == "loss" else 0.0)
            total = total * factor if self.how == "loss" else (total * 0).sqrt()  # the gradient of sqrt at 0 is inf
        return Loss(total, torch.tensor(1.0))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_report() -> None:
    model = make_model(SHAPE, 0)
    timeline = Timeline([Phase("up", 2, 0.0, 0.1), Phase("down", 2, 0.1, 0.0)])
    reports = list(train(model, objective=NextToken(), loader=Fixed(), timeline=timeline))
    assert [(r.step, r.consumed, r.phase) for r in reports] == [
        (1, 1, "up"),
        (2, 2, "up"),
        (3, 3, "down"),
        (4, 4, "down"),
    ]
    assert [r.learning_rate for r in reports] == pytest.approx([0, 0.05, 0.1, 0.05])
    assert reports[0].loss == reports[1].loss  # the first step's rate is 0
    assert reports[1].loss > reports[2].loss > reports[3].loss
    assert all(r.tokens == 4 and r.weight == 3 and not r.skipped for r in reports)
    assert all(r.gradient_norm > 0 and r.seconds > 0 for r in reports)


def test_rope_base_and_context_follow_the_phases() -> None:
    model = make_model(SHAPE, 0)
    timeline = Timeline(
        [
            Phase("a", 1, 0.1, 0.1, {}, 64, 1e4),
            Phase("b", 1, 0.1, 0.1, {}, 8192, 5e5),
            Phase("c", 1, 0.1, 0.1),
            Phase("d", 1, 0.1, 0.1, {}, 9000),
        ]
    )
    bases = [
        (model.config.rope_base, model.config.max_context)
        for _ in train(model, objective=NextToken(), loader=Fixed(), timeline=timeline)
    ]
    # base 0 leaves the model's own; a longer context is what the checkpoint stands for from then on
    assert bases == [(1e4, 4096), (5e5, 8192), (5e5, 8192), (5e5, 9000)]


def test_a_policy_without_rope_is_trained_too() -> None:
    class Linear(Objective):
        def __call__(self, policy: Any, batch: TokenBatch) -> Loss:
            return Loss(policy.weight.square().sum(), torch.tensor(1.0))

    model = nn.Linear(3, 3)
    timeline = Timeline([Phase("a", 5, 0.1, 0.1, {}, 64, 1e4)])
    losses = [r.loss for r in train(model, objective=Linear(), loader=Fixed(), timeline=timeline)]
    assert losses[-1] < losses[0]


def test_a_step_without_weight_changes_nothing() -> None:
    model = make_model(SHAPE, 0)
    before = weights(model)
    loader = Fixed(weight=0.0)
    reports = list(train(model, objective=NextToken(), loader=loader, timeline=constant(total=2, lr=0.1)))
    assert torch.equal(before, weights(model))
    assert all(r.skipped and math.isnan(r.loss) and r.gradient_norm == 0 for r in reports)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, how: str) -> None:
    model = nn.Linear(2, 2)
    steps = train(
        model,
        objective=Broken(how),
        loader=Fixed(),
        timeline=constant(total=9, lr=0.1),
        checkpoint=CheckpointConfig(tmp_path, every_steps=2),
    )
    next(steps), next(steps)
    before = weights(model)
    with pytest.raises(NonFiniteLoss) as caught:
        next(steps)
    assert torch.equal(before, weights(model))
    message = str(caught.value)
    assert "step 3" in message
    assert "step-000000002" in message  # the last good checkpoint
    assert "document-0, document-1" in message
    assert "and 10 more" in message


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    timeline = constant(total=2, lr=0.1)
    usual: dict[str, Any] = {
        "objective": NextToken(),
        "timeline": timeline,
        "optimizer": OptimizerConfig(),
        "checkpoint": CheckpointConfig(tmp_path),
    }
    list(train(make_model(SHAPE, 0), loader=Fixed(), **usual))
    wider = ModelConfig(vocab_size=12, width=16, layers=1, heads=2, kv_heads=1, ffn=16)
    for change, message in [
        ({"policy": make_model(wider, 0)}, r"parameters\.embedding\.weight"),
        ({"timeline": constant(total=3, lr=0.1)}, r"timeline\.phases\[0\]\.tokens was 2, now 3"),
        ({"optimizer": OptimizerConfig(weight_decay=0.1)}, r"optimizer\.weight_decay was 0, now 0.1"),
        ({"objective": NextToken(z_loss=0.1)}, r"objective\[1\]\.z_loss was 0, now 0.1"),
        ({"loader": Fixed(note="other data")}, r"loader\[1\]\.note was , now other data"),
        ({"dtype": "bfloat16"}, r"dtype was float32, now bfloat16"),
    ]:
        options = {"policy": make_model(SHAPE, 0), "loader": Fixed(), **usual, **change}
        with pytest.raises(Refusal, match=message):
            list(train(options.pop("policy"), **options))
    assert list(train(make_model(SHAPE, 0), loader=Fixed(), **usual)) == []  # the same run is finished


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    usual: dict[str, Any] = {
        "objective": NextToken(),
        "timeline": constant(total=5, lr=0.1),
        "checkpoint": CheckpointConfig(tmp_path, every_steps=1, keep=3),
    }
    list(train(make_model(SHAPE, 0), loader=Fixed(), **usual))
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == [f"step-{step:09d}" for step in (3, 4, 5)]
    file = kept[-1] / "state.pt"
    whole = file.read_bytes()
    file.write_bytes(b"no archive" * 99)
    with pytest.raises(UserError, match=r"step-000000005 cannot be read .* remove it"):
        list(train(make_model(SHAPE, 0), loader=Fixed(), **usual))
    file.write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"step-000000005 cannot be read .* remove it"):
        list(train(make_model(SHAPE, 0), loader=Fixed(), **usual))


def test_half_precision_is_named_or_refused() -> None:
    usual: dict[str, Any] = {"objective": NextToken(), "timeline": constant(total=2, lr=0.1)}
    exact = [r.loss for r in train(make_model(SHAPE, 0), loader=Fixed(), **usual)]
    half = [r.loss for r in train(make_model(SHAPE, 0), loader=Fixed(), dtype="bfloat16", **usual)]
    assert exact == pytest.approx(half, abs=0.03)
    assert exact != half
    with pytest.raises(UserError, match="dtype is 'float16'"):
        list(train(make_model(SHAPE, 0), loader=Fixed(), dtype="float16", **usual))


def test_an_exhausted_loader_ends_the_run() -> None:
    class Empty(Fixed):
        def next(self, setting: Setting) -> Sequence[TokenBatch]:
            return super().next(setting) if self._step < 2 else []

    reports = list(
        train(make_model(SHAPE, 0), objective=NextToken(), loader=Empty(), timeline=constant(total=9, lr=0.1))
    )
    assert len(reports) == 2


def test_terms_and_maxima_are_reported() -> None:
    class Terms(Objective):
        def __init__(self) -> None:
            self.values = iter([3.0, 5.0])

        def __call__(self, policy: Any, batch: TokenBatch) -> Loss:
            value = torch.tensor(next(self.values))
            total = next(policy.parameters()).sum() * 0
            return Loss(total, torch.tensor(1.0), {"mean": Loss(value, torch.tensor(2.0))}, {"largest": value})

    class Two(Fixed):
        def next(self, setting: Setting) -> Sequence[TokenBatch]:
            return [*super().next(setting)] * 2

    (report,) = train(nn.Linear(2, 2), objective=Terms(), loader=Two(), timeline=constant(total=1, lr=0.1))
    assert report.terms == {"mean": 2.0, "largest": 5.0}  # (3 + 5) / (2 + 2)


def test_a_model_of_too_few_embeddings_is_refused() -> None:
    class Wide(Fixed):
        @property
        def vocab_size(self) -> int:
            return 13

    with pytest.raises(UserError, match="13 tokens, but the model has embeddings for 12"):
        next(train(make_model(SHAPE, 0), objective=NextToken(), loader=Wide(), timeline=constant(total=1, lr=0.1)))


def test_a_run_taken_up_at_its_end_has_the_last_phases_rope_base(tmp_path: Path) -> None:
    # killed after the last checkpoint and before the model was saved: no step is left that would set it
    timeline = Timeline([Phase("short", 1, 0.1, 0.1), Phase("long", 1, 0.1, 0.1, context=64, rope_base=5e5)])
    keep = CheckpointConfig(tmp_path, every_steps=1)
    list(train(make_model(SHAPE, 0), objective=NextToken(), loader=Fixed(), timeline=timeline, checkpoint=keep))
    model = make_model(SHAPE, 0)
    again = train(model, objective=NextToken(), loader=Fixed(), timeline=timeline, checkpoint=keep)
    assert list(again) == []
    assert model.config.rope_base == 5e5


def test_a_run_taken_up_keeps_what_an_earlier_phase_has_set(tmp_path: Path) -> None:
    # the last phase has no RoPE base of its own and a shorter context: both stay as the one before left them
    timeline = Timeline(
        [
            Phase("long", 1, 0.1, 0.1, context=8192, rope_base=5e5),
            Phase("as it is", 3, 0.1, 0.1, context=64),
        ]
    )
    keep = CheckpointConfig(tmp_path, every_steps=1)
    straight = make_model(SHAPE, 0)
    run = train(straight, objective=NextToken(), loader=Fixed(), timeline=timeline, checkpoint=keep)
    next(run), next(run), next(run)  # two steps are saved
    model = make_model(SHAPE, 0)
    seen = [
        (report.step, model.config.rope_base, model.config.max_context)
        for report in train(model, objective=NextToken(), loader=Fixed(), timeline=timeline, checkpoint=keep)
    ]
    assert seen == [(3, 5e5, 8192), (4, 5e5, 8192)]
    assert (straight.config.rope_base, straight.config.max_context) == (5e5, 8192)


def test_the_ends_of_a_run_are_known_whatever_it_was_killed_in_between(tmp_path: Path) -> None:
    def run(folder: Path, steps: int) -> list[StepReport]:
        keep = CheckpointConfig(folder, every_steps=1)
        reports = train(
            make_model(SHAPE, 0),
            objective=NextToken(),
            loader=Fixed(),
            timeline=constant(total=4, lr=0.1),
            checkpoint=keep,
        )
        return [report for report, _ in zip(reports, range(steps), strict=False)]

    assert ends(tmp_path / "none") == (None, None)
    reports = run(tmp_path / "straight", 9)
    assert ends(tmp_path / "straight") == (reports[0], reports[-1])
    for steps in (2, 2, 9, 9):  # the last time there is nothing left to do
        run(tmp_path / "killed", steps)
    first, last = ends(tmp_path / "killed")
    assert first
    assert last
    assert (first.step, first.loss, last.step, last.loss) == (1, reports[0].loss, 4, reports[-1].loss)


def test_discarded_checkpoints_are_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "checkpoints"
    (directory / "step-000000001").mkdir(parents=True)

    def dies(path: Path, **_: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("shutil.rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            discard(directory)
    assert not directory.exists()  # so that nobody finds half of one
    discard(directory)
    assert not list(tmp_path.iterdir())


def test_a_share_to_recompute_is_a_share() -> None:
    with pytest.raises(UserError, match="expected a share from 0 to 1"):
        Machine(recompute=1.5)


def test_the_machine_says_whether_layers_are_compiled_and_what_they_keep() -> None:
    assert [Machine(device).compiles for device in ("cpu", "cuda", "cuda:1")] == [False, True, True]
    assert not Machine("cuda", compile="off").compiles
    model = make_model(SHAPE, 0)
    run = train(
        model, objective=NextToken(), loader=Fixed(), timeline=constant(total=1, lr=0.1), machine=Machine(recompute=0.5)
    )
    list(run)
    assert (model.compiled, model.recompute) == (False, 0.5)


def test_processes_take_devices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="say --device cuda, not cuda:1"), parallel.joined(Machine("cuda:1")):
        pass
