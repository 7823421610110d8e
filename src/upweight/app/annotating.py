"""`upweight annotate`: one or several models score documents 0-9 on the 20 dimensions, for a tagger to be trained on.

The first annotator scores all documents; the others score the first few of them, which tells how well annotators agree.
Each one's answers are kept in a file as they come, so that nothing is paid for twice.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from upweight.app.console import ConsoleMonitor
from upweight.app.lineage import find_model
from upweight.core.errors import UserError
from upweight.core.files import is_remote
from upweight.core.protocols import Sampler
from upweight.core.records import Document, Tags
from upweight.core.work import Machine
from upweight.curate.annotate import SCHEMA, Annotation, Asking, annotate
from upweight.curate.readers import JsonLines, Parquet, Reject, Source, TextTree
from upweight.curate.tagger_figures import between_annotators
from upweight.model.precision import usual_precision
from upweight.rollout.local import open_local
from upweight.rollout.remote import RemoteSampler
from upweight.store.artifact import write_whole
from upweight.store.jsonl import iterate_jsonl, write_jsonl

ANNOTATED = "annotated.jsonl"
COSTS = "costs.jsonl"
CHARACTERS_OF_TOKEN = 4.0
"""Where nobody counts the tokens that were read."""


@dataclass(frozen=True)
class Endpoint:
    """Where annotators are asked, and what it costs.

    Attributes:
        url: of a server that speaks the OpenAI interface, up to and with /v1; "" asks checkpoints of this machine.
        key_variable: the environment variable that holds its key.
        schema: hold the answers to a JSON schema, for servers that can.
        price_read, price_written: of a million tokens, in any currency.
        most_in_flight: requests at once.
    """

    url: str = ""
    key_variable: str = "OPENAI_API_KEY"
    schema: bool = True
    price_read: float = 0.0
    price_written: float = 0.0
    most_in_flight: int = 16


def annotate_documents(
    documents: str,
    out: Path,
    models: Sequence[str],
    *,
    endpoint: Endpoint,
    count: int,
    agreed_on: int,
    asking: Asking,
    root: Path,
    machine: Machine,
    console: Console | None = None,
) -> dict[str, Any]:
    """Annotate, write `out`/annotated.jsonl and `out`/summary.json, print the latter's figures and return it.

    Args:
        documents: a file or pattern of JSON lines or parquet with a text, or a directory of text files.
        models: the annotators: names that the endpoint knows, or checkpoints.
        count: the first so many documents; 0 takes all.
        agreed_on: documents that the annotators after the first one score.

    Raises UserError where nothing can be read, where a model is not there, and where too many answers stay unreadable.
    """
    console = console or Console()
    if not models or len(set(models)) < len(models):
        raise UserError(f"annotators {list(models)}: name at least one, and each once (--model NAME)")
    if len(models) > 1 and agreed_on < 3:
        raise UserError(f"{agreed_on} documents for the agreement: at least 3 are needed (--agreed-on)")
    chosen = list(islice(_documents(documents), count or None))
    if not chosen:
        raise UserError(f"{documents} holds no document that can be read")
    out.mkdir(parents=True, exist_ok=True)
    if machine.threads:
        torch.set_num_threads(machine.threads)
    passes: list[dict[str, Tags]] = []
    unreadable: dict[str, dict[str, str]] = {}
    for place, model in enumerate(models):
        wanted = chosen[:agreed_on] if place else chosen
        sampler = _sampler(model, endpoint, root, machine)
        found = _annotated(wanted, sampler, asking, out / f"{_file_name(model)}.scores.jsonl", model, console)
        passes.append({tags.document_id: tags for tags in found.tags})
        unreadable[model] = found.unreadable
        _book(out / COSTS, model, sampler, found, endpoint)
    texts = {document.id: document for document in chosen}
    rows = [
        {"id": name, "source": texts[name].source, "text": texts[name].text, "scores": list(tags.scores)}
        for name, tags in passes[0].items()
    ]
    write_jsonl(out / ANNOTATED, rows)
    summary = {
        "documents": len(chosen),
        "annotated": len(rows),
        "unreadable": unreadable,
        "agreement": between_annotators(passes) if len(models) > 1 else None,
        "cost": _total(out / COSTS),
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    _print(summary, out, console)
    return summary


def _documents(given: str) -> Iterator[Document]:
    """The documents by what the path looks like; what cannot be read is left out."""
    source: Source
    if not is_remote(given) and Path(given).is_dir():
        source = TextTree(given, "text")
    elif given.endswith(".parquet"):
        source = Parquet(given, "text")
    else:
        source = JsonLines(given, "text", source_field="source")
    return (record for record in source.documents() if not isinstance(record, Reject))


def _sampler(model: str, endpoint: Endpoint, root: Path, machine: Machine) -> Sampler:
    if endpoint.url:
        form = {"type": "json_schema", "json_schema": {"name": "scores", "schema": SCHEMA, "strict": True}}
        return RemoteSampler(
            endpoint.url,
            model,
            key_variable=endpoint.key_variable,
            most_in_flight=endpoint.most_in_flight,
            extra={"response_format": form} if endpoint.schema else {},
        )
    directory = find_model(model, root)
    return open_local(directory, device=machine.device, dtype=usual_precision(machine.device))


def _annotated(
    documents: Sequence[Document], sampler: Sampler, asking: Asking, kept_in: Path, model: str, console: Console
) -> Annotation:
    monitor = ConsoleMonitor(console, kept_in.parent, model)
    try:
        with monitor.track("annotate", total=len(documents), unit="documents") as bar:
            return annotate(documents, sampler, asking, kept_in=kept_in, bar=bar)
    finally:
        monitor.close()
        monitor.forget()


def _book(path: Path, model: str, sampler: Sampler, found: Annotation, endpoint: Endpoint) -> None:
    """One line for each run, so that the whole cost is known however often it was stopped."""
    counted = isinstance(sampler, RemoteSampler) and sampler.tokens_read > 0
    if isinstance(sampler, RemoteSampler) and counted:
        read, written = sampler.tokens_read, sampler.tokens_written
    else:
        read = round(found.characters_read / CHARACTERS_OF_TOKEN)
        written = found.tokens_written or round(found.characters_written / CHARACTERS_OF_TOKEN)
    price = (read * endpoint.price_read + written * endpoint.price_written) / 1e6
    row = {
        "model": model,
        "calls": found.calls,
        "tokens_read": read,
        "tokens_written": written,
        "tokens_counted_by_the_server": counted,
        "price": round(price, 6),
    }
    if found.calls:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _total(path: Path) -> dict[str, Any]:
    rows = list(iterate_jsonl(path, dict)) if path.exists() else []
    return {
        **{name: sum(row[name] for row in rows) for name in ("calls", "tokens_read", "tokens_written")},
        "tokens_counted_by_the_server": all(row["tokens_counted_by_the_server"] for row in rows),
        "price": round(sum(row["price"] for row in rows), 4),
    }


def _file_name(model: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in model)


def _print(summary: dict[str, Any], out: Path, console: Console) -> None:
    cost, agreed = summary["cost"], summary["agreement"]
    estimated = "" if cost["tokens_counted_by_the_server"] else " (estimated from characters)"
    console.print(
        f"{summary['annotated']:,} of {summary['documents']:,} documents annotated; {cost['calls']:,} calls, "
        f"{cost['tokens_read']:,} tokens read and {cost['tokens_written']:,} written{estimated}, "
        f"price {cost['price']:,.2f}"
    )
    if agreed:
        console.print(
            f"agreement of {agreed['annotators']} annotators on {agreed['documents']} documents: mean Spearman "
            f"{agreed['spearman']:.3f}, mean absolute difference {agreed['mean_absolute_difference']:.2f}"
        )
        for name, row in agreed["by_dimension"].items():
            console.print(f"  {name:22} {row['spearman']:6.3f} {row['mean_absolute_difference']:6.2f}")
    console.print(f"wrote {out / ANNOTATED}; next: upweight tagger train {out / ANNOTATED} my_tagger.npz")
