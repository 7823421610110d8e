"""Files outside the run: which a configuration names, and what tells that one of them was written to."""

import os
from pathlib import Path

import pytest

from upweight.core.files import outside_paths, state_of
from upweight.curate.readers import HubDataset, JsonLines, Parquet, TextTree, Warc
from upweight.curate.seeds import SeedFile, SeedRule
from upweight.stages import adopt, assemble, collect, deduplicate, ingest, mix, retrieve, sft, tag
from upweight.text.conversations import ConversationDataset, ConversationFiles
from upweight.verify.gym import Gym


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        (
            ingest.Config(
                (
                    JsonLines(("a.jsonl", "b/*.jsonl"), "web"),
                    TextTree("notes", "notes"),
                    Parquet("c.parquet", "web"),
                    Warc("d.warc", "web"),
                    HubDataset("owner/name", "hub"),
                )
            ),
            ["a.jsonl", "b/*.jsonl", "notes", "c.parquet", "d.warc"],
        ),
        (collect.Config({"stem": "p.jsonl", "gym": Gym({"gcd": {}})}, pairs="q.jsonl"), ["p.jsonl", "q.jsonl"]),
        (adopt.Config("student/model"), ["student/model"]),
        (deduplicate.Config(problem_files=("t/*.jsonl", "exam.txt")), ["t/*.jsonl", "exam.txt"]),
        (tag.Config("my_tagger.npz"), ["my_tagger.npz"]),
        (tag.Config(), []),
        (mix.Config(proxy="measured.jsonl"), ["measured.jsonl"]),
        (retrieve.Config((SeedRule(), SeedFile("seeds.jsonl"))), ["seeds.jsonl"]),
        (
            sft.Config((ConversationFiles("chats/*.jsonl"), ConversationDataset("saved"), sft.Part("gold.jsonl"))),
            ["chats/*.jsonl", "saved"],
        ),
        (assemble.Config({"all": assemble.Share((ConversationFiles("c.jsonl"),), 1.0)}), ["c.jsonl"]),
    ],
)
def test_what_a_configuration_reads_outside_the_run(config: object, paths: list[str]) -> None:
    assert [*outside_paths(config)] == paths


def test_a_file_that_is_written_to_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    file = folder / "deep" / "a.md"
    file.write_text("one")
    root = tmp_path / "runs"
    for path in (str(file), str(folder), f"{folder}/**/*.md"):
        before = state_of(path, root)
        assert before == state_of(path, root) != ""
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        assert state_of(path, root) != before
    before = state_of(str(folder), root)
    (folder / "b.md").write_text("two")
    assert state_of(str(folder), root) != before
    for nothing in ("", "nowhere", "no*where", "owner/name", "s3://bucket/*.jsonl"):
        assert state_of(nothing, root) == ""


def test_the_artifacts_below_a_directory_of_documents_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one")
    root = tmp_path / "runs"
    before = state_of(str(tmp_path), root)
    (root / "mine" / "step").mkdir(parents=True)
    (root / "mine" / "step" / "manifest.json").write_text("{}")
    assert state_of(str(tmp_path), root) == before
    assert state_of(str(root / "mine" / "step"), root) != ""
