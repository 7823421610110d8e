"""The loaders: which tokens a step reads, how rows are filled, and that a restored loader takes the next step."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from upweight.core.batches import PADDING, TokenBatch
from upweight.core.errors import UserError
from upweight.core.packing import pack, strip
from upweight.store.shards import Shards, ShardWriter
from upweight.train.batching import divided, even_parts
from upweight.train.loader import Encoded, EncodedShards, EpochLoader, Loader, MixtureLoader, PackedLoader
from upweight.train.mixture import Piece, filled, quotas
from upweight.train.parallel import World
from upweight.train.timeline import Phase, Timeline, constant


def pool(directory: Path, lengths: Sequence[int], first: int) -> tuple[Shards, int]:
    """Documents in which every token of the pool is another number, from `first` on."""
    writer = ShardWriter(directory, vocab_size=60_000)
    for number, length in enumerate(lengths):
        tokens = list(range(first, first + length))
        writer.write(tokens, source=f"{directory.name}-{number % 2}", document_id=f"{directory.name}{number}")
        first += length
    writer.close()
    return Shards.open(directory), first


@pytest.fixture
def pools(tmp_path: Path) -> dict[str, Shards]:
    lengths = [int(n) for n in np.random.default_rng(0).integers(2, 60, 60)]
    a, end = pool(tmp_path / "a", lengths, 0)
    b, _ = pool(tmp_path / "b", lengths[:30], end)
    return {"a": a, "b": b}


def drained(loader: Loader, timeline: Timeline) -> list[list[TokenBatch]]:
    steps = []
    while loader.consumed < timeline.tokens:
        steps.append(list(loader.next(timeline.at(loader.consumed))))
    return steps


def read(steps: Sequence[Sequence[TokenBatch]]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for step in steps:
        for batch in step:
            counts.update(batch.tokens[batch.segments != PADDING].tolist())
    return counts


def mixed(pools: Mapping[str, Shards], timeline: Timeline, **changes: object) -> MixtureLoader:
    options = {"seed": 3, "batch_tokens": 256, "microbatch_tokens": 128, **changes}
    return MixtureLoader(pools, timeline, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("whole", [True, False])
def test_one_epoch_reads_every_token_once_and_trains_all_but_the_first(pools: dict[str, Shards], whole: bool) -> None:
    timeline = constant(total=pools["a"].tokens, lr=1.0, mixture={"a": 1.0}, context=32)
    steps = drained(mixed({"a": pools["a"]}, timeline, whole_documents=whole), timeline)
    assert read(steps) == Counter(range(pools["a"].tokens))
    targets: Counter[int] = Counter()
    for step in steps:
        for batch in step:
            trained = batch.weights > 0
            assert (batch.targets[trained] == batch.tokens[trained] + 1).all()  # the next token of the same document
            targets.update(batch.targets[trained].tolist())
    starts = {int(pools["a"].sequence(number)[0]) for number in range(len(pools["a"]))}
    assert targets == Counter(set(range(pools["a"].tokens)) - starts)


def test_a_second_epoch_is_another_order(pools: dict[str, Shards]) -> None:
    total = pools["a"].tokens
    timeline = constant(total=2 * total, lr=1.0, mixture={"a": 1.0}, context=32)
    loader = mixed({"a": pools["a"]}, timeline)
    steps = drained(loader, timeline)
    assert read(steps) == Counter(dict.fromkeys(range(total), 2))
    assert loader.state()["streams"]["a"] == {"epoch": 2, "place": 0, "offset": 0}
    assert read(steps[:2]) != read(steps[len(steps) // 2 : len(steps) // 2 + 2])


@pytest.mark.parametrize("whole", [True, False])
def test_rows(pools: dict[str, Shards], whole: bool) -> None:
    timeline = constant(total=1000, lr=1.0, mixture={"a": 1.0}, context=64)
    for step in drained(mixed(pools, timeline, whole_documents=whole), timeline):
        for batch in step:
            assert batch.tokens.shape[1] == 64
            assert batch.tokens.shape[0] <= 2  # microbatches of at most 128 tokens
            for row in range(batch.tokens.shape[0]):
                for segment in set(batch.segments[row].tolist()) - {PADDING}:
                    here = batch.segments[row] == segment
                    assert batch.positions[row][here].tolist() == list(range(int(here.sum())))
                    tokens = batch.tokens[row][here]
                    assert (tokens[1:] == tokens[:-1] + 1).all()


def test_documents_that_fit_stay_whole(pools: dict[str, Shards]) -> None:
    timeline = constant(total=1024, lr=1.0, mixture={"a": 1.0}, context=64)
    loader = mixed(pools, timeline)
    while loader.consumed < timeline.tokens:
        last = loader.consumed + 256 >= timeline.tokens
        loader.next(timeline.at(loader.consumed))
        cut = [piece for piece in loader._last if piece.length < pools["a"].length(piece.document)]
        assert last or not cut


def test_full_rows_by_hand() -> None:
    pieces = [Piece("a", 0, 0, 6), Piece("a", 1, 0, 3), Piece("a", 2, 0, 3)]
    # row of 8: the longest that fits is 6; 2 are left and nothing fits, so 3 is cut into 2 + 1; then 3 and 1
    assert filled(pieces, 8) == [
        [Piece("a", 0, 0, 6), Piece("a", 2, 0, 2)],
        [Piece("a", 1, 0, 3), Piece("a", 2, 2, 3)],
    ]


def test_quotas_by_hand() -> None:
    assert quotas({"a": 0.5, "b": 0.3, "c": 0.2}, 9) == {"a": 4, "b": 3, "c": 2}  # 4.5, 2.7, 1.8: b and c round up
    assert quotas({"a": 1.0}, 7) == {"a": 7}
    assert sum(quotas({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 100).values()) == 100


@pytest.mark.parametrize("whole", [True, False])
def test_a_restored_loader_goes_on_with_the_next_step(pools: dict[str, Shards], whole: bool) -> None:
    timeline = Timeline(
        [
            Phase("one", 700, 1.0, 1.0, {"a": 0.6, "b": 0.4}, 32, 0.0),
            Phase("two", 900, 1.0, 1.0, {"a": 0.9, "b": 0.1}, 64, 0.0),
        ]
    )
    straight = mixed(pools, timeline, whole_documents=whole)
    states, steps = [], []
    while straight.consumed < timeline.tokens:
        states.append(json.loads(json.dumps(straight.state())))
        steps.append(straight.next(timeline.at(straight.consumed)))
    for state, expected in zip(states, steps, strict=True):
        resumed = mixed(pools, timeline, whole_documents=whole)
        resumed.restore(state)
        got = resumed.next(timeline.at(resumed.consumed))
        assert len(got) == len(expected)
        assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(got, expected, strict=True))


def test_accounts_by_phase_pool_epoch_tier_and_source(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "p", vocab_size=10)
    for number, (source, tier) in enumerate([("web", "high"), ("web", "medium"), ("books", "high")]):
        writer.write([number] * 10, source=source, document_id=str(number), tier=tier)
    writer.close()
    timeline = Timeline(
        [
            Phase("one", 40, 1.0, 1.0, {"p": 1.0}, 16, 0.0),  # an epoch of 30 tokens and 10 more
            Phase("two", 20, 1.0, 1.0, {"p": 1.0}, 16, 0.0),  # what is left of the second epoch
        ]
    )
    loader = mixed({"p": Shards.open(tmp_path / "p")}, timeline, batch_tokens=16)
    drained(loader, timeline)
    accounts = loader.accounts()
    for part, expected in (
        ("phase", {"one": 40, "two": 20}),
        ("epoch", {0: 30, 1: 30}),
        ("tier", {"high": 40, "medium": 20}),
        ("source", {"web": 40, "books": 20}),
    ):
        sums: Counter[object] = Counter()
        for account, tokens in accounts.items():
            sums[getattr(account, part)] += tokens
        assert sums == expected
    first = {(a.tier, a.source): n for a, n in accounts.items() if (a.phase, a.epoch) == ("one", 0)}
    assert first == {("high", "web"): 10, ("medium", "web"): 10, ("high", "books"): 10}
    restored = mixed({"p": Shards.open(tmp_path / "p")}, timeline, batch_tokens=16)
    restored.restore(json.loads(json.dumps(loader.state())))
    assert restored.accounts() == accounts
    assert restored.ledger() == loader.ledger()
    assert restored.ledger()["one"]["p"].keys() == {"web", "books"}


def test_processes_share_the_rows_of_a_step(pools: dict[str, Shards]) -> None:
    timeline = constant(total=1500, lr=1.0, mixture={"a": 0.5, "b": 0.5}, context=64)
    alone = drained(mixed(pools, timeline), timeline)
    shares = [drained(mixed(pools, timeline, place=World(rank, 3)), timeline) for rank in range(3)]
    for number, step in enumerate(alone):
        assert read([step]) == sum((read([share[number]]) for share in shares), Counter())
        assert len({len(share[number]) for share in shares}) == 1  # the same number of microbatches everywhere


def test_a_timeline_that_cannot_be_fed_is_refused(pools: dict[str, Shards]) -> None:
    total = pools["b"].tokens
    long = constant(total=3 * total, lr=1.0, mixture={"b": 1.0}, context=32)
    with pytest.raises(UserError, match=rf"needs {3 * total:,} tokens of 'b'.*{total:,} are missing"):
        mixed(pools, long, most_epochs=2.0)
    mixed(pools, long, most_epochs=3.0)
    with pytest.raises(UserError, match="mixes \\['c'\\]"):
        mixed(pools, constant(total=9, lr=1.0, mixture={"c": 1.0}, context=32))
    with pytest.raises(UserError, match="no mixture"):
        mixed(pools, constant(total=9, lr=1.0, context=32))
    with pytest.raises(UserError, match="at least one row"):
        mixed(pools, constant(total=9, lr=1.0, mixture={"a": 1.0}, context=512))


def test_a_rare_pool_of_long_documents_gets_its_share(tmp_path: Path) -> None:
    # 1 % of 256 tokens is 2.56 a step, a document is 40: one is due about every 16 steps
    common, end = pool(tmp_path / "common", [7] * 4000, 0)
    rare, _ = pool(tmp_path / "rare", [40] * 20, end)
    timeline = constant(total=25_600, lr=1.0, mixture={"common": 0.99, "rare": 0.01}, context=64)
    loader = mixed({"common": common, "rare": rare}, timeline)
    drained(loader, timeline)
    assert sum(loader.ledger()["stable"]["rare"].values()) == 256


def conversation(length: int, start: int) -> Encoded:
    return Encoded(tuple(range(start, start + length)), (False,) + (True,) * (length - 1), "test")


def test_packed_conversations(tmp_path: Path) -> None:
    lengths = [int(n) for n in np.random.default_rng(1).integers(2, 33, 100)]
    starts = np.cumsum([0, *lengths])
    items = [conversation(length, int(start)) for length, start in zip(lengths, starts, strict=False)]
    make = {"context": 32, "batch_tokens": 256, "microbatch_tokens": 64, "epochs": 2, "seed": 5}
    loader = PackedLoader(items, **make)
    timeline = constant(total=loader.steps, lr=1.0)
    states, steps = [], []
    while loader.consumed < timeline.tokens:
        states.append(loader.state())
        steps.append(loader.next(timeline.at(loader.consumed)))
    assert read(steps) == Counter(dict.fromkeys(range(int(starts[-1])), 2))
    sizes = [sum(len(batch.tokens) for batch in step) for step in steps]
    assert max(sizes) <= 8
    assert max(sizes) - min(sizes) <= 1  # no stump at the end of an epoch
    for at in (0, loader.steps // 2, loader.steps - 1):
        again = PackedLoader(items, **make)
        again.restore(states[at])
        first = again.next(timeline.at(again.consumed))
        assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(first, steps[at], strict=True))
    with pytest.raises(ValueError, match="past the"):
        loader.next(timeline.at(0))


def test_conversations_on_disk_are_packed_like_those_in_memory(tmp_path: Path) -> None:
    items = [conversation(length, 40 * number) for number, length in enumerate([5, 9, 3, 12, 7, 2])]
    writer = ShardWriter(tmp_path / "e", vocab_size=400, marked=True)
    for number, item in enumerate(items):
        writer.write(item.tokens, source=item.source, document_id=f"chats:{number}", trained=item.trained)
    writer.close()
    make = {"context": 16, "batch_tokens": 32, "microbatch_tokens": 16, "epochs": 1, "seed": 2}
    on_disk = EncodedShards(Shards.open(tmp_path / "e"))
    assert list(on_disk) == items
    disk, memory = PackedLoader(on_disk, **make), PackedLoader(items, **make)
    timeline = constant(total=disk.steps, lr=1.0)
    assert disk.identity() == memory.identity()
    assert (disk.vocab_size, memory.vocab_size) == (400, 0)
    seen: list[str] = []
    while disk.consumed < timeline.tokens:
        setting = timeline.at(disk.consumed)
        for one, other in zip(disk.next(setting), memory.next(setting), strict=True):
            assert torch.equal(one.tokens, other.tokens)
            assert torch.equal(one.weights, other.weights)
        seen += disk.documents()  # what a step that breaks is said to be made of
    assert sorted(seen) == [f"chats:{number}" for number in range(6)]


def test_what_packing_refuses() -> None:
    with pytest.raises(UserError, match="trains on none"):
        Encoded((1, 2), (True, False), "chat")  # the first token is never predicted
    with pytest.raises(UserError, match="expected one each"):
        Encoded((1, 2), (True,), "chat")
    make = {"context": 8, "batch_tokens": 16, "microbatch_tokens": 8, "epochs": 1, "seed": 0}
    with pytest.raises(UserError, match="no conversations"):
        PackedLoader([], **make)
    with pytest.raises(UserError, match="does not fit a context of 8"):
        PackedLoader([conversation(9, 0)], **make)


def test_items_by_epoch() -> None:
    def make(chosen: Sequence[int]) -> list[TokenBatch]:
        return [pack([strip([item, item], [True, True]) for item in chosen], 16)]

    loader = EpochLoader(list(range(10)), make, items_a_step=4, epochs=2, seed=0)
    assert loader.steps == 6  # 3 + 3 + 4 items an epoch, in three steps
    seen = [[int(t) for t in loader.next(constant(total=9, lr=1.0).at(0))[0].tokens.unique()] for _ in range(6)]
    assert [item for step in seen for item in step] != sorted(item for step in seen for item in step)
    halves = [sorted({t for step in part for t in step} | {0}) for part in (seen[:3], seen[3:])]
    assert halves == [list(range(10)), list(range(10))]
    assert sorted(loader.documents()) == [f"item {number}" for number in sorted(seen[-1])]
    with pytest.raises(UserError, match="an item for each process"):
        EpochLoader([1], make, items_a_step=1, epochs=1, seed=0, place=World(0, 2))


def test_division_by_hand() -> None:
    assert even_parts(10, 4) == [3, 3, 4]
    assert divided(list(range(7)), World(0, 2), 2) == [[0, 4], [2, 6]]
    assert divided(list(range(7)), World(1, 2), 2) == [[1, 5], [3]]
    assert divided([], World(), 4) == [[]]
