"""The ledger of a run of 10 records: 8 read, 6 unique, 5 in tiers, 4 in a pool and 1 held out, one pool read twice."""

from typing import Any

from upweight.curate.ledger import Check, ledger_of


def _manifest(stage: str, **summary: Any) -> dict[str, Any]:
    return {"step": stage, "identity": {"stage": f"upweight.stages.{stage}"}, "summary": summary}


def _run(tokens: int = 60) -> list[dict[str, Any]]:
    web = {"web": {"documents": 5, "bytes": 500}}
    accounts = [
        {"phase": "stable", "pool": "high", "epoch": 0, "tier": "high", "source": "web", "tokens": 40},
        {"phase": "decay", "pool": "high", "epoch": 1, "tier": "high", "source": "web", "tokens": 20},
    ]
    return [
        _manifest("ingest", kept=8, kept_bytes=800, by_source={"web": {"records": 10, "kept": 8, "kept_bytes": 800}}),
        _manifest(
            "deduplicate",
            documents=8,
            kept=6,
            kept_bytes=600,
            dropped={"exact duplicate": 2},
            by_source={"web": {"kept": 6, "kept_bytes": 600}},
        ),
        _manifest(
            "mix",
            raw={"documents": 6, "bytes": 600},
            kept={"documents": 5, "bytes": 500},
            dropped={"documents": 1, "bytes": 100},
            ledger={"kept": web, "tiers": {"high": web}},
        ),
        _manifest(
            "shard",
            pools={"high": {"web": {"documents": 4, "bytes": 400, "tokens": 50}}},
            tokens=50,
            heldout_documents={"high": 1},
            heldout_not_kept={},
            documents_in_no_pool={},
        ),
        _manifest("pretrain", tokens=tokens, accounts=accounts),
    ]


def test_every_level_is_counted_and_reconciled() -> None:
    ledger = ledger_of(_run())
    assert ledger is not None
    shown = {level.name: (level.documents["web"], level.bytes["web"], level.tokens["web"]) for level in ledger.levels}
    assert shown == {
        "raw records": (10, 0, 0),
        # 400 bytes are 50 tokens: 8 bytes a token
        "readable and past the filters": (8, 800, 100),
        "without repeats and test text": (6, 600, 75),
        "high quality: in a tier": (5, 500, 62),
        "tier high": (5, 500, 62),
        "pool high": (4, 400, 50),
        "phase stable": (0, 0, 40),
        "phase decay": (0, 0, 20),
        "the stream": (0, 0, 60),
        "of these read again": (0, 0, 20),
    }
    assert next(level.name for level in ledger.levels if level.exact) == "pool high"
    assert all(check.equal for check in ledger.checks)
    assert ledger.sources == ["web"]


def test_what_does_not_reconcile_is_shown() -> None:
    run = _run(tokens=61)
    run[0]["summary"]["kept"] = 9
    run[3]["summary"]["heldout_documents"] = {}
    ledger = ledger_of(run)
    assert ledger is not None
    assert [check for check in ledger.checks if not check.equal] == [
        Check("documents ingested and compared", 9, 8),
        Check("documents in tiers, and in pools, held out or in no pool", 5, 4),
        Check("tokens that pretrain read, by account and in all", 60, 61),
    ]


def test_a_run_without_a_mixture_has_none_and_one_under_way_has_what_there_is() -> None:
    assert ledger_of(_run()[:2]) is None
    ledger = ledger_of(_run()[:3])
    assert ledger is not None
    assert [level.name for level in ledger.levels][-1] == "tier high"
