"""`upweight annotate` against a server on this machine that answers well, badly, and at last well."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from upweight.app.annotating import Endpoint, annotate_documents
from upweight.core.errors import UserError
from upweight.core.work import Machine
from upweight.curate.annotate import Asking
from upweight.curate.dimensions import DIMENSIONS


class Annotators:
    """Two models that score by the number in the text; "other" is one off in one dimension. Text 3 needs two tries."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, int]] = Counter()
        self.schemas = 0
        annotators = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                data = json.dumps(annotators.reply(body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        number = int(body["messages"][1]["content"].split("text number ")[1].split()[0])
        self.asked[body["model"], number] += 1
        self.schemas += "response_format" in body
        scores = {dimension.name: (number + place) % 10 for place, dimension in enumerate(DIMENSIONS)}
        if body["model"] == "other":
            scores["safety"] = min(9, scores["safety"] + 1)
        text = json.dumps(scores)
        if number == 3 and self.asked[body["model"], 3] == 1:
            text = text.replace('"safety"', '"safe"')
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage}


@pytest.fixture
def annotators() -> Iterator[Annotators]:
    found = Annotators()
    yield found
    found.server.shutdown()


def test_documents_are_annotated_once_and_agreement_and_cost_are_told(tmp_path: Path, annotators: Annotators) -> None:
    corpus = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"text number {number} of several", "source": "web"}) for number in range(8)]
    corpus.write_text("\n".join([*lines[:2], "{broken", *lines[2:]]))

    def run(count: int) -> dict[str, Any]:
        shown = StringIO()
        summary = annotate_documents(
            str(corpus),
            tmp_path / "out",
            ["strong", "other"],
            endpoint=Endpoint(annotators.url, price_read=1000.0, price_written=2000.0),
            count=count,
            agreed_on=5,
            asking=Asking(),
            root=tmp_path,
            machine=Machine(),
            console=Console(file=shown, width=200),
        )
        assert "agreement of 2 annotators" in shown.getvalue()
        return summary

    run(4)
    summary = run(0)  # goes on: the first four are not asked again
    assert annotators.asked == {("strong", n): 1 for n in range(8)} | {("other", n): 1 for n in range(5)} | {
        ("strong", 3): 2,
        ("other", 3): 2,
    }
    assert annotators.schemas == sum(annotators.asked.values()) == 15
    # 15 calls of 100 tokens read and 10 written: 1,500 * 1000 / 1e6 + 150 * 2000 / 1e6
    assert summary["cost"] == {
        "calls": 15,
        "tokens_read": 1500,
        "tokens_written": 150,
        "tokens_counted_by_the_server": True,
        "price": 1.8,
    }
    agreed = summary["agreement"]
    assert (agreed["annotators"], agreed["documents"]) == (2, 5)
    assert agreed["by_dimension"]["coherence"] == {"spearman": 1.0, "mean_absolute_difference": 0.0}
    # safety is (number + 18) % 10, so 8 9 0 1 2 against 9 9 1 2 3: four of five differ by one
    assert agreed["by_dimension"]["safety"]["mean_absolute_difference"] == 0.8
    rows = [json.loads(line) for line in (tmp_path / "out" / "annotated.jsonl").read_text().splitlines()]
    assert [row["scores"][0] for row in rows] == list(range(8))
    assert rows[0]["text"] == "text number 0 of several"
    assert rows[0]["source"] == "web"
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_what_cannot_be_done_is_said_before_anything_is_paid(tmp_path: Path, annotators: Annotators) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "text number 1"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    common = {
        "endpoint": Endpoint(annotators.url),
        "count": 0,
        "asking": Asking(),
        "root": tmp_path,
        "machine": Machine(),
    }
    for given, models, agreed_on, why in (
        (corpus, [], 20, "name at least one"),
        (corpus, ["a", "a"], 20, "each once"),
        (corpus, ["a", "b"], 2, "at least 3"),
        (tmp_path / "empty.jsonl", ["a"], 20, "holds no document"),
    ):
        with pytest.raises(UserError, match=why):
            annotate_documents(str(given), tmp_path / "out", models, agreed_on=agreed_on, **common)  # type: ignore[arg-type]
    assert not annotators.asked
