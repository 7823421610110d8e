"""A server that speaks the HTTP of LanceDB Cloud and Enterprise, as far as it is asked here, over local files."""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as arrow
from lancedb.index import FTS, HnswSq

KEY = "sk-of-a-test"
ARROW = "application/vnd.apache.arrow.file"
KINDS = {arrow.int64(): "int64", arrow.string(): "string", arrow.float32(): "float"}


class LanceServer(ThreadingHTTPServer):
    """Holds the tables of one database below a directory."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.database = lancedb.connect(str(directory / "served"))
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve(body)

    def _serve(self, body: bytes) -> None:
        if self.headers.get("x-api-key") != KEY:
            self._send(401, b"unknown key")
            return
        assert isinstance(self.server, LanceServer)
        database, path = self.server.database, self.path.partition("?")[0].strip("/").split("/")
        names = database.list_tables().tables
        if path == ["v1", "namespace", "$", "table", "list"]:
            self._tell({"tables": names})
            return
        name, *verb = path[2:]
        with self.server.lock:
            if verb == ["create"]:
                database.create_table(name, arrow.ipc.open_stream(body).read_all())
                self._tell({})
            elif name not in names:
                self._send(404, f"there is no table {name}".encode())
            elif verb == ["drop"]:
                database.drop_table(name)
                self._tell({})
            else:
                self._of_table(database.open_table(name), verb, body)

    def _of_table(self, table: Any, verb: list[str], body: bytes) -> None:
        if verb == ["insert"]:
            table.add(arrow.ipc.open_stream(body).read_all())
            if table.list_indices():
                table.optimize()
            self._tell({"version": table.version})
            return
        asked = json.loads(body or b"{}")
        if verb == ["describe"]:
            self._tell({"version": table.version, "schema": {"fields": [_field(field) for field in table.schema]}})
        elif verb == ["count_rows"]:
            self._tell(table.count_rows())
        elif verb == ["create_index"]:
            given = ("base_tokenizer", "stem", "remove_stop_words", "ascii_folding", "lower_case")
            words = asked["index_type"] == "FTS"
            config: Any = FTS(**{key: asked[key] for key in given}) if words else HnswSq(distance_type="dot")
            assert words or (asked["index_type"], asked["metric_type"]) == ("IVF_HNSW_SQ", "dot")
            table.create_index(asked["column"], config=config)
            self._tell({})
        elif verb == ["index", "list"]:
            found = [{"index_name": index.name, "columns": index.columns} for index in table.list_indices()]
            self._tell({"indexes": found})
        elif verb[0] == "index" and verb[2] == "stats":
            stats = table.index_stats(verb[1])
            counts = {key: getattr(stats, key) for key in ("num_indexed_rows", "num_unindexed_rows", "index_type")}
            self._tell(counts)
        elif verb == ["query"]:
            self._search(table, asked)
        else:
            self._send(400, f"{verb} is not known here".encode())

    def _search(self, table: Any, asked: dict[str, Any]) -> None:
        if "full_text_query" in asked:
            text = asked["full_text_query"]
            query = table.search(text["query"], query_type="fts", fts_columns=text["columns"])
        else:
            assert asked["vector_column"] == "vector"
            query = table.search(asked["vector"], vector_column_name="vector").distance_type(asked["distance_type"])
        query = query.limit(asked["k"]).select(asked["columns"])
        if asked.get("filter"):
            query = query.where(asked["filter"], prefilter=asked["prefilter"])
        answer, packed = query.to_arrow(), io.BytesIO()
        with arrow.ipc.new_file(packed, answer.schema) as file:
            file.write_table(answer)
        self._send(200, packed.getvalue(), ARROW)

    def _tell(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode())

    def _send(self, code: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _field(field: arrow.Field) -> dict[str, Any]:
    if arrow.types.is_fixed_size_list(field.type):
        inner = [_field(field.type.value_field)]
        kind: dict[str, Any] = {"type": "fixed_size_list", "fields": inner, "length": field.type.list_size}
    else:
        kind = {"type": KINDS[field.type]}
    return {"name": field.name, "nullable": field.nullable, "type": kind}


@contextmanager
def running(directory: Path) -> Iterator[str]:
    """The address of such a server."""
    server = LanceServer(directory)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
