"""Web crawls: WARC files of pages as they were fetched (and WET files, in which a crawl already took the text out).

The main text of a page is found by trafilatura: what surrounds it, menus, notices and lists of links, is the larger
part of most pages. A page in which it finds none is counted as one without text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from upweight.core.errors import UserError
from upweight.core.files import DAMAGE, OUTSIDE, opened
from upweight.core.records import Document
from upweight.curate.source import (
    EMPTY,
    MAX_RECORD_BYTES,
    NO_TEXT,
    OVERSIZED,
    Part,
    Reject,
    as_document,
    begins,
    damaged,
    decoded,
    listed,
    parts_of_files,
)

_PAGES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True)
class Warc:
    """The pages of WARC or WET files, plain or compressed. Needs the extra `web`.

    Attributes:
        paths: a path or a pattern with * and **, or several.
        source: what the documents count as.
        max_record_bytes: larger pages are rejected.

    Requests, metadata, redirects, errors and what is neither a page nor plain text are passed over.
    """

    paths: str | tuple[str, ...] = field(metadata=OUTSIDE)
    source: str
    max_record_bytes: int = MAX_RECORD_BYTES

    def parts(self) -> list[Part]:
        """Its files, small ones together."""
        return parts_of_files(listed(self.paths), lambda names: replace(self, paths=names))

    def documents(self) -> Iterator[Document | Reject]:
        """One document a page."""
        try:
            # optional extras: nothing else of the package needs them
            import trafilatura
            from warcio.archiveiterator import ArchiveIterator
            from warcio.exceptions import ArchiveLoadFailed
        except ImportError:
            raise UserError(f"reading the crawl {self.paths} needs the extra: pip install 'upweight[web]'") from None
        for path in listed(self.paths):
            try:
                with opened(path) as file:
                    for number, record in enumerate(ArchiveIterator(file), start=1):
                        page = self._page(record, f"{path}, record {number}", trafilatura.extract)
                        if page is not None:
                            yield page
            except (ArchiveLoadFailed, *DAMAGE) as error:
                yield damaged(self.source, path, error)

    def _page(self, record: Any, origin: str, extract: Any) -> Document | Reject | None:
        """The text of a record; None for a record that is no page."""
        if record.rec_type == "conversion":
            kind = "text/plain"
        elif record.rec_type == "response" and record.http_headers is not None:
            if record.http_headers.get_statuscode() != "200":
                return None
            kind = (record.http_headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
        else:
            return None
        if kind != "text/plain" and kind not in _PAGES:
            return None
        url = record.rec_headers.get_header("WARC-Target-URI")
        origin = f"{origin} ({url})" if url else origin
        data = record.content_stream().read(self.max_record_bytes + 1)
        if kind == "text/plain":
            return decoded(data, self.source, origin, most=self.max_record_bytes)
        if len(data) > self.max_record_bytes:
            return Reject(self.source, origin, OVERSIZED, begins(data))
        if not data.strip():
            return Reject(self.source, origin, EMPTY)
        text = extract(data, include_comments=False)
        return as_document(text, self.source, origin) if text else Reject(self.source, origin, NO_TEXT, begins(data))
