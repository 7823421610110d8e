"""The ledger of a run: raw -> kept -> unique -> tiers -> pools -> read in training -> read again, by source.

Each level is what a step of the run has counted for itself, in its manifest. Where two steps counted the same thing,
the counts have to be equal; a difference is shown, never smoothed. Tokens are exact from the step on that made them.
Before it they follow from the bytes, by the bytes of a token of the same source, and are marked as estimated.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Manifest = Mapping[str, Any]


@dataclass
class Level:
    """What there is at one point of the way, by source; tokens alone where documents are no longer told apart."""

    name: str
    step: str
    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    exact: bool = True

    def add(self, source: str, counts: Mapping[str, Any], documents: str = "documents", size: str = "bytes") -> None:
        """Count some more of a source, under the names that the step gives them."""
        self.documents[source] += counts.get(documents, 0)
        self.bytes[source] += counts.get(size, 0)
        self.tokens[source] += counts.get("tokens", 0)


@dataclass(frozen=True)
class Check:
    """Two counts of the same thing, by two steps."""

    what: str
    first: int
    second: int

    @property
    def equal(self) -> bool:
        """Whether they agree to the last one."""
        return self.first == self.second


@dataclass(frozen=True)
class Ledger:
    """The levels in their order, and what was reconciled."""

    levels: Sequence[Level]
    checks: Sequence[Check]

    @property
    def sources(self) -> list[str]:
        """All sources, the largest first."""
        size = Counter[str]()
        for level in self.levels:
            size.update(level.bytes or level.tokens)
        return [source for source, _ in size.most_common()]


def ledger_of(manifests: Sequence[Manifest]) -> Ledger | None:
    """The ledger of the complete steps of a run, in the order of the recipe; None where no step mixed anything."""
    by_stage: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        by_stage.setdefault(str(manifest["identity"]["stage"]).rpartition(".")[2], []).append(manifest)
    if "mix" not in by_stage:
        return None
    mixed = by_stage["mix"][0]
    levels = [
        *(level for manifest in by_stage.get("ingest", [])[:1] for level in _ingested(manifest)),
        *(_unique(manifest) for manifest in by_stage.get("deduplicate", [])[:1]),
        *_tiers(mixed),
    ]
    checks = list(_counted_before_mix(by_stage))
    for manifest in by_stage.get("shard", [])[:1]:
        pools = _pools(manifest)
        _estimate(levels, pools)
        levels += pools
        checks += _sharded(mixed, manifest, pools)
        for trained in by_stage.get("pretrain", []):
            levels += _trained(trained)
            checks += _read(trained, manifest)
    return Ledger([level for level in levels if level.documents or level.tokens], checks)


def _ingested(manifest: Manifest) -> Iterator[Level]:
    raw, kept = Level("raw records", manifest["step"]), Level("readable and past the filters", manifest["step"])
    for source, counts in manifest["summary"]["by_source"].items():
        raw.documents[source] += counts["records"]
        kept.add(source, counts, "kept", "kept_bytes")
    yield raw
    yield kept


def _unique(manifest: Manifest) -> Level:
    level = Level("without repeats and test text", manifest["step"])
    for source, counts in manifest["summary"]["by_source"].items():
        level.add(source, counts, "kept", "kept_bytes")
    return level


def _tiers(manifest: Manifest) -> Iterator[Level]:
    told = manifest["summary"]["ledger"]
    kept = Level("high quality: in a tier", manifest["step"])
    for source, counts in told["kept"].items():
        kept.add(source, counts)
    yield kept
    for name, by_source in told["tiers"].items():
        level = Level(f"tier {name}", manifest["step"])
        for source, counts in by_source.items():
            level.add(source, counts)
        yield level


def _pools(manifest: Manifest) -> list[Level]:
    levels = []
    for name, by_source in manifest["summary"]["pools"].items():
        levels.append(Level(f"pool {name}", manifest["step"]))
        for source, counts in by_source.items():
            levels[-1].add(source, counts)
    return levels


def _trained(manifest: Manifest) -> Iterator[Level]:
    """The stream by phase, and of it what was read again."""
    phases: dict[str, Level] = {}
    again = Level("of these read again", manifest["step"])
    stream = Level("the stream", manifest["step"])
    for account in manifest["summary"].get("accounts", []):
        phase = phases.setdefault(account["phase"], Level(f"phase {account['phase']}", manifest["step"]))
        for level in (phase, stream, *([again] if account["epoch"] else [])):
            level.tokens[account["source"]] += account["tokens"]
    yield from phases.values()
    yield stream
    yield again


def _estimate(levels: Sequence[Level], pools: Sequence[Level]) -> None:
    """Tokens of the levels before there were any."""
    size, tokens = Counter[str](), Counter[str]()
    for pool in pools:
        size.update(pool.bytes)
        tokens.update(pool.tokens)
    of_all = size.total() / max(1, tokens.total())
    for level in levels:
        level.exact = False
        for source, count in level.bytes.items():
            of_source = size[source] / tokens[source] if tokens[source] else of_all
            level.tokens[source] = round(count / max(of_source, 1e-9))


def _counted_before_mix(by_stage: Mapping[str, Sequence[Manifest]]) -> Iterator[Check]:
    mixed = by_stage["mix"][0]["summary"]
    last = {"kept": 0, "kept_bytes": 0}
    for stage in ("ingest", "deduplicate"):
        for manifest in by_stage.get(stage, [])[:1]:
            summary = manifest["summary"]
            if stage == "deduplicate" and last["kept"]:
                yield Check("documents ingested and compared", last["kept"], summary["documents"])
                dropped = sum(summary["dropped"].values())
                yield Check("documents compared, and kept or dropped", summary["documents"], summary["kept"] + dropped)
            last = summary
    if last["kept"]:
        yield Check("bytes kept and mixed", last["kept_bytes"], mixed["raw"]["bytes"])
    yield Check("bytes mixed, and in a tier or dropped", mixed["raw"]["bytes"], _both(mixed, "bytes"))
    yield Check("documents mixed, and in a tier or dropped", mixed["raw"]["documents"], _both(mixed, "documents"))


def _both(mixed: Manifest, unit: str) -> int:
    return int(mixed["kept"][unit]) + int(mixed["dropped"][unit])


def _sharded(mixed: Manifest, sharded: Manifest, pools: Sequence[Level]) -> Iterator[Check]:
    summary = sharded["summary"]
    written = sum(pool.documents.total() for pool in pools)
    elsewhere = sum(summary["heldout_documents"].values()) + sum(summary["documents_in_no_pool"].values())
    elsewhere += sum(summary.get("heldout_not_kept", {}).values())
    tiers = int(mixed["summary"]["kept"]["documents"])
    yield Check("documents in tiers, and in pools, held out or in no pool", tiers, written + elsewhere)
    yield Check("tokens of the pools, and of all", sum(pool.tokens.total() for pool in pools), int(summary["tokens"]))


def _read(trained: Manifest, sharded: Manifest) -> Iterator[Check]:
    summary, pools = trained["summary"], sharded["summary"]["pools"]
    accounts = summary.get("accounts", [])
    counted = sum(account["tokens"] for account in accounts)
    yield Check(f"tokens that {trained['step']} read, by account and in all", counted, int(summary["tokens"]))
    epochs: Counter[tuple[str, int, str]] = Counter()
    for account in accounts:
        epochs[account["pool"], account["epoch"], account["source"]] += account["tokens"]
    # no epoch can read more of a source than its pool holds
    over = sum(
        max(0, tokens - pools.get(pool, {}).get(source, {"tokens": 0})["tokens"])
        for (pool, _, source), tokens in epochs.items()
    )
    yield Check(f"tokens that {trained['step']} read beyond what a pool holds, in one epoch", over, 0)
