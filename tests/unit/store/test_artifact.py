"""An artifact is whole or absent; it is refused when it was built from something else; one process builds at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from upweight.core.errors import RootInUse, StaleArtifact, UserError
from upweight.store.artifact import LocalStore

IDENTITY = {"stage": "count", "config": {"type": "Config", "rate": 1e-3, "to": 3}, "inputs": {}, "seed": 0}


def built(root: Path) -> LocalStore:
    store = LocalStore(root, "recipe")
    with store.create("a", IDENTITY, {"summary": {"n": 1}}) as out:
        (out / "file.txt").write_text("x")
    return store


def test_created_then_found(tmp_path: Path) -> None:
    store = built(tmp_path)
    assert (store.open("a") / "file.txt").read_text() == "x"
    assert store.identity("a") == IDENTITY
    assert store.manifest("a")["summary"] == {"n": 1}
    assert store.check("a", IDENTITY)
    assert not store.building("a").exists()


def test_missing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, "recipe")
    assert store.identity("a") is None
    assert not store.check("a", IDENTITY)
    with pytest.raises(UserError, match="holds no complete artifact"):
        store.open("a")


def test_a_failed_build_is_no_artifact_and_is_continued(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, "recipe")

    def fail() -> None:
        with store.create("a", IDENTITY) as out:
            (out / "begun.txt").write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert store.identity("a") is None
    with store.create("a", IDENTITY) as out:
        assert (out / "begun.txt").read_text() == "half"
    assert store.check("a", IDENTITY)


def test_what_was_begun_from_other_settings_is_emptied(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, "recipe")
    with pytest.raises(RuntimeError), store.create("a", IDENTITY) as out:  # noqa: PT012
        (out / "begun.txt").write_text("half")
        raise RuntimeError("killed")
    with store.create("a", {**IDENTITY, "seed": 1}) as out:
        assert not (out / "begun.txt").exists()


def test_every_differing_field_is_named_with_both_values(tmp_path: Path) -> None:
    store = built(tmp_path)
    other = {**IDENTITY, "config": {"type": "Config", "rate": 2e-3, "to": 3}, "seed": 7}
    with pytest.raises(StaleArtifact) as caught:
        store.check("a", other)
    assert "config.rate was 0.001, now 0.002" in str(caught.value)
    assert "seed was 0, now 7" in str(caught.value)
    assert "to was" not in str(caught.value)
    assert "--rebuild a" in str(caught.value)


def test_equal_values_written_otherwise_are_equal(tmp_path: Path) -> None:
    # 0.001 == 1e-3 and 3.0 == 3: canonical JSON, not spelling
    store = built(tmp_path)
    assert store.check("a", {"seed": 0, **IDENTITY, "config": {"to": 3.0, "rate": 0.001, "type": "Config"}})


def test_discarded(tmp_path: Path) -> None:
    store = built(tmp_path)
    store.discard("a")
    assert store.identity("a") is None
    assert list(store.directory.iterdir()) == []


def test_a_damaged_manifest_is_a_user_error(tmp_path: Path) -> None:
    store = built(tmp_path)
    (store.open("a") / "manifest.json").write_text('{"identity"')
    with pytest.raises(UserError, match="damaged"):
        store.identity("a")


HOLD = """
import sys, time
from pathlib import Path
from upweight.store.artifact import LocalStore
with LocalStore(Path(sys.argv[1]), sys.argv[2]).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_holds_the_root(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), "first"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RootInUse, match=rf"process {holder.pid} on .*, which runs first"),
            LocalStore(tmp_path, "second").locked(),
        ):
            pass
        holder.kill()
        holder.wait()
    with LocalStore(tmp_path, "second").locked():  # a killed process holds nothing
        assert (tmp_path / ".lock").read_text().find(str(os.getpid())) > 0


def test_a_child_that_outlives_the_holder_does_not_block(tmp_path: Path) -> None:
    # the holder forks a child that sleeps, and is killed: flock would live on in the child
    code = HOLD.replace(
        "    print", "    import os\n    child = os.fork()\n    child == 0 and time.sleep(60)\n    print"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "first"], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
        with LocalStore(tmp_path, "second").locked():
            pass
        os.killpg(holder.pid, 9)


def test_twice_in_one_process_is_refused(tmp_path: Path) -> None:
    with (
        LocalStore(tmp_path, "a").locked(),
        pytest.raises(RootInUse, match="this very process"),
        LocalStore(tmp_path, "b").locked(),
    ):
        pass
