"""The arithmetic of the benchmarks, and the table that they keep. Contests take minutes and run by hand."""

import threading
from multiprocessing import Pipe
from pathlib import Path

from benchmarks import __main__ as contests
from benchmarks import curation
from benchmarks.contest import Ratio, Turn, Turns, ratio
from benchmarks.table import HEAD, RULE, Row, put
from benchmarks.work import LONGEST, PROMPTS, RESPONSES, SHAPES, SHORTEST, preferences, samples


def test_ratios_are_taken_round_by_round() -> None:
    # 10/5 = 2, 30/10 = 3, 8/2 = 4; the ratio of the medians would be 10/5 = 2
    assert ratio([10, 30, 8], [5, 10, 2]) == Ratio(3.0, 2.0, 4.0)
    assert str(Ratio(3.0, 2.0, 4.0)) == "3.00 (2.00-4.00)"


def test_a_contender_is_held_between_its_turns() -> None:
    parent, child = Pipe()
    done: list[bool] = []

    def work() -> None:
        turns = Turns(child, warmup=2, steps=3)
        while turns.step(10):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    assert parent.recv() is None  # warm
    assert len(done) == 1
    parent.send(True)
    turn = parent.recv()
    assert isinstance(turn, Turn)
    assert turn.units == 30  # the two steps of the warmup are not counted
    assert len(done) == 4
    parent.send(False)
    thread.join(timeout=10)
    assert not thread.is_alive()


def _row(peer: str, median: float) -> Row:
    return Row("work", peer, "2 against 1", Ratio(median, median, median), "command", "machine", "float32")


def test_the_table_replaces_what_was_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    file.write_text("# Benchmarks\n\n## Ours\nBefore the table nothing is lost.\n")
    put([_row("a", 1.0), _row("b", 2.0)], file, "## Ours")
    put([_row("a", 3.0)], file, "## Ours")
    lines = file.read_text().splitlines()
    assert lines[3] == "Before the table nothing is lost."
    first = lines.index(HEAD) + 2
    assert [line.split("|")[2:5:2] for line in lines[first:]] == [
        [" a ", " 3.00 (3.00-3.00) "],
        [" b ", " 2.00 (2.00-2.00) "],
    ]


def test_each_section_has_a_table_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    file.write_text("# Benchmarks\n\n## First\nNo table yet.\n\n## Second\n")
    for section in ("## Second", "## First", "## Third", "## First"):
        put([_row("a", 2.0)], file, section)
    line, head = _row("a", 2.0).line(), [HEAD, RULE]
    assert file.read_text().splitlines() == [
        "# Benchmarks",
        "",
        "## First",
        "No table yet.",
        "",
        *[*head, line, ""],
        "## Second",
        *[*head, line, ""],
        "## Third",
        "",
        *[*head, line],
    ]


def test_the_sections_of_the_benchmarks_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text().splitlines()
    assert {contests.SECTION, curation.SECTION} <= set(page)


def test_shapes_and_samples_are_what_the_table_says() -> None:
    assert round(SHAPES["5.5M"].parameter_count() / 1e6, 1) == 5.5
    assert round(SHAPES["21M"].parameter_count() / 1e6) == 21
    lengths = [len(tokens) for tokens, _ in samples(4096, 200)]
    assert min(lengths) >= SHORTEST
    assert max(lengths) <= LONGEST
    tokens, trained = samples(4096, 1)[0]
    assert sum(trained) == len(tokens) - round(len(tokens) / 3)


def test_pairs_are_what_the_table_says() -> None:
    for prompt, chosen, rejected in preferences(4096, 30):
        assert PROMPTS[0] <= len(prompt) <= PROMPTS[1]
        assert all(RESPONSES[0] <= len(response) <= RESPONSES[1] for response in (chosen, rejected))
        assert chosen != rejected
    for prompt, chosen, rejected in preferences(4096, 3, length=300):
        assert len(prompt) + len(chosen) == len(prompt) + len(rejected) == 300
