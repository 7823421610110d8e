"""Sharing out a model and its rows, as far as one process can see it; the rest is in contract/test_01_layouts.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from upweight.core.batches import PADDING
from upweight.core.errors import UserError
from upweight.core.work import Machine
from upweight.model.attention import visible
from upweight.model.context import Part, Share, scores_of
from upweight.model.transformer import ModelConfig, make_model
from upweight.objectives.next_token import NextToken
from upweight.train import parallel, sharding, tensor
from upweight.train.loader import EpochLoader
from upweight.train.timeline import constant
from upweight.train.trainer import train

SHAPE = ModelConfig(vocab_size=12, width=8, layers=1, heads=4, kv_heads=2, ffn=18)


def mesh_of(size: int) -> Any:
    return SimpleNamespace(size=lambda: size)


def parts(size: int, time: int) -> list[Part]:
    return [Part(Share(None, rank, size), time) for rank in range(size)]


@pytest.mark.parametrize(("size", "time"), [(2, 8), (2, 5), (4, 8), (4, 33), (3, 1)])
def test_every_place_is_held_once_and_the_work_is_even(size: int, time: int) -> None:
    held = parts(size, time)
    padded = held[0].padded
    assert time <= padded < time + 2 * size
    places = torch.cat([part.take(torch.arange(padded)[None])[0] for part in held])
    assert sorted(places.tolist()) == list(range(padded))
    # a query at place p sees p + 1 keys: all processes see as many
    assert len({int((part.take(torch.arange(padded)[None]) + 1).sum()) for part in held}) == 1
    scores = [list(range(time)[scores_of(time, part.share)]) for part in held]
    assert [place for some in scores for place in some] == list(range(time))


@pytest.mark.parametrize("shared", [False, True])
def test_a_part_of_the_queries_sees_what_they_see_in_the_whole(shared: bool) -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2, PADDING], [3, 4, 4, 4, 4, 4, 4, 4]])
    prefixes = torch.where(segments == 2, 0, segments) if shared else None
    device = segments.device
    whole = visible(8, segments, prefixes, None, device)
    # of 2, 3, 2, 1 and of 1, 7 places: 3 + 6 + 3 + 1 and 1 + 28 pairs; where the third continues the first 2 x 2 more
    assert whole.sum() == 13 + 29 + (4 if shared else 0)
    for part in parts(2, 8):
        places = part.take(torch.arange(8)[None])[0]
        assert torch.equal(visible(4, segments, prefixes, part, device), whole[:, :, places])
        assert torch.equal(visible(4, None, None, part, device)[0, 0], torch.ones(8, 8).tril().bool()[places])


@pytest.mark.parametrize(("size", "message"), [(4, "2 key/value heads"), (3, "2 key/value heads")])
def test_heads_that_cannot_be_shared_out_are_refused(size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tensor.split(make_model(SHAPE, 0), mesh_of(size))


def test_features_that_cannot_be_shared_out_are_refused() -> None:
    odd = ModelConfig(vocab_size=12, width=8, layers=1, heads=4, kv_heads=2, ffn=17)
    with pytest.raises(UserError, match="17 features of the feed-forward network"):
        tensor.split(make_model(odd, 0), mesh_of(2))
    with pytest.raises(UserError, match="Llama family"):
        tensor.split(torch.nn.Linear(2, 2), mesh_of(2))


def test_a_group_without_its_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(UserError, match="need a multiple of 2 processes, but there is 1"),
        parallel.joined(Machine(tensor=2)),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "6")
    with (
        pytest.raises(UserError, match="need a multiple of 4 processes, but there are 6"),
        parallel.joined(Machine(tensor=2, context=2)),
    ):
        pass
    with pytest.raises(UserError, match="each is a number of processes"):
        Machine(tensor=0)


def test_a_machine_that_asks_for_another_layout_is_refused() -> None:
    loader = EpochLoader([[1, 2, 3]], lambda chosen: [], items_a_step=1, epochs=1, seed=0)
    machine = Machine(context=2)
    run = train(
        make_model(SHAPE, 0), objective=NextToken(), loader=loader, timeline=constant(total=1, lr=0.1), machine=machine
    )
    with pytest.raises(UserError, match="asks for tensor 1 and context 2, but the processes are laid out for 1 and 1"):
        next(run)


def test_whole_tensors_take_the_shape_of_their_reference() -> None:
    whole = torch.arange(12.0).view(6, 2)
    # as the halves of gate_up lie in a tensor group
    assert torch.equal(sharding.laid_like(whole, torch.zeros(2, 3, 2)), whole.view(2, 3, 2))
    counter = torch.tensor(3.0)
    assert sharding.laid_like(counter, torch.zeros(1)) is counter


def test_work_that_is_shared_out_by_one_process() -> None:
    assert parallel.shared_out([3, 1, 3], lambda some: [2 * item for item in some], alike=lambda item: item) == [
        6,
        2,
        6,
    ]
