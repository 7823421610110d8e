import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.curate.installation import PythonInstallation, docstrings

CODE = '"""{0}"""\n\n\ndef one():\n    r"""{1}\n\n    Indented below.\n    """\n    return """no docstring {1}"""\n'
FIRST, SECOND = " ".join(["The module tells a story."] * 9), " ".join(["The function tells another."] * 9)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small installation: a standard library and two packages, one of them ours."""
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    files = {
        library / "story.py": CODE.format(FIRST, SECOND),
        library / "__pycache__" / "story.py": "hidden = 1",
        packages / "tale" / "code.py": "value = 1\n" * 30,
        packages / "tale" / "data.json": '{"a": 1}',
        packages / "tale" / "page.js": "let a = 1;",
        packages / "tale" / "fast.h": "int a;",
        packages / "tale" / "image.png": "no text",
        packages / "tale-1.0.dist-info" / "METADATA": "Name: tale\nVersion: 1\n\nTale tells tales.\n",
        packages / "tale-1.0.dist-info" / "LICENSE": "You may.",
        packages / "upweight" / "core.py": "ours = 1",
        packages / "upweight-0.1.0.dist-info" / "METADATA": "Name: upweight\n\nOurs.\n",
        packages / "upweighted" / "other.py": "not_ours = 1",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (packages / "tale" / "latin.py").write_bytes(b"# \xe9")
    places = {"stdlib": str(library), "purelib": str(packages), "platlib": str(packages)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: places)
    return tmp_path


def test_every_kind_is_read_and_our_own_package_is_not(installed: Path) -> None:
    records = list(PythonInstallation().documents())
    texts = {record.text: record.source for record in records if isinstance(record, Document)}
    assert texts["Tale tells tales.\n"] == "readme"
    assert texts["You may."] == "licence"
    assert texts['{"a": 1}'] == "data"
    assert texts["let a = 1;"] == "javascript"
    assert texts["int a;"] == "c-code"
    assert texts["not_ours = 1"] == "python-code"
    assert texts[FIRST] == "python-docstring"
    assert not any(text == "ours = 1" or text.startswith(("Ours", "hidden", "no text")) for text in texts)
    # latin.py is rejected once, as code, and not a second time as a holder of docstrings
    assert [(record.source, record.reason) for record in records if not isinstance(record, Document)] == [
        ("python-code", "not UTF-8")
    ]


def test_the_same_documents_in_the_same_order_wherever_it_is_installed(installed: Path, tmp_path: Path) -> None:
    assert list(PythonInstallation().documents()) == list(PythonInstallation().documents())


def test_kinds_keep_to_their_shares_of_the_bytes(installed: Path) -> None:
    for number in range(40):
        (installed / "lib" / f"more{number}.py").write_text(f"# {number:03}\n" + "a" * 94)  # 100 bytes each
        (installed / "lib" / f"more{number}.json").write_text(f'"{number:03}' + "b" * 95 + '"')  # 100 bytes each
    read = PythonInstallation(max_bytes=2000, shares={"data": 0.5, "python-code": 0.5})
    sizes: Counter[str] = Counter()
    for record in read.documents():
        if isinstance(record, Document):
            sizes[record.source] += len(record.text.encode())
    # 1,000 bytes each, and a kind stops at the first text that does not fit (the longest has about 700)
    assert 300 <= sizes["data"] <= 1000
    assert 300 <= sizes["python-code"] <= 2000 - sizes["data"]


def test_long_texts_are_cut_at_the_ends_of_lines(installed: Path) -> None:
    text = "".join(f"line {number:04}\n" for number in range(100))  # 10 characters a line
    (installed / "lib" / "long.csv").write_text(text)
    read = PythonInstallation(shares={"data": 1.0}, part_characters=105, parts_of_file=4)
    parts = [record.text for record in read.documents() if isinstance(record, Document) and "line" in record.text]
    assert parts == [text[start : start + 100] for start in (0, 100, 200, 300)]  # ten lines each, four parts at most


def test_docstrings_are_found_by_their_place() -> None:
    found = docstrings(CODE.format(FIRST, SECOND), fewest_characters=100)
    assert found == [FIRST, f"{SECOND}\n\nIndented below."]
    assert docstrings(CODE.format("short", "short"), fewest_characters=100) == []


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="'poetry' is no kind of text"):
        PythonInstallation(shares={"poetry": 1.0})
    with pytest.raises(UserError, match="at most 1 together"):
        PythonInstallation(shares={"data": 0.6, "readme": 0.6})
    with pytest.raises(UserError, match="counts of 1 or more"):
        PythonInstallation(max_bytes=0)


def test_this_installation_gives_varied_text() -> None:
    records = PythonInstallation(max_bytes=400_000).documents()
    sizes: Counter[str] = Counter()
    for record in records:
        if isinstance(record, Document):
            sizes[record.source] += len(record.text.encode())
    assert 200_000 < sizes.total() <= 400_000
    assert len(sizes) >= 5
    assert max(sizes.values()) < 0.7 * sizes.total()
