"""Artifacts in a directory: what a step built, beside a manifest that says from what.

    <root>/<recipe>/<step>/manifest.json        a complete artifact
    <root>/<recipe>/.building-<step>/           one that is being built, or that a killed run left to be resumed
    <root>/.lock                                held by the one process that may write below the root

An artifact is complete when its directory has its own name: the manifest is written last and the directory is renamed
after it, so a kill at any moment leaves either the whole or a hidden directory that the next run continues in.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upweight.core.errors import RootInUse, StaleArtifact, UserError
from upweight.core.identity import Difference, canonical_json, differences, fingerprint
from upweight.core.protocols import Store

MANIFEST = "manifest.json"
IDENTITY = ".identity.json"
LONGEST_SHOWN = 60

_held: set[Path] = set()
"""Roots that this process has locked: POSIX locks do not exclude their own process."""


class LocalStore(Store):
    """The artifacts of one recipe below one root, on a file system of this machine.

    Reading needs no lock. Building does: see `locked`.
    """

    def __init__(self, root: Path, recipe: str) -> None:
        self.root = root
        self.recipe = recipe
        self.directory = root / recipe

    def identity(self, name: str) -> Mapping[str, object] | None:
        manifest = self.manifest(name)
        return None if manifest is None else manifest["identity"]

    def manifest(self, name: str) -> dict[str, Any] | None:
        """Everything known of a complete artifact, None where there is none."""
        path = self.directory / name / MANIFEST
        return read_manifest(path) if path.exists() else None

    def open(self, name: str) -> Path:
        path = self.directory / name
        if not (path / MANIFEST).exists():
            raise UserError(f"{path} holds no complete artifact: build it first with `upweight run {self.recipe}`")
        return path

    def building(self, name: str) -> Path:
        """Where the artifact is built; exists only while it is not complete."""
        return self.directory / f".building-{name}"

    def check(self, name: str, identity: Mapping[str, object]) -> bool:
        """Whether a complete artifact of exactly this identity is there. Raises StaleArtifact where it has another."""
        stored = self.identity(name)
        if stored is None:
            return False
        found = differences(stored, json.loads(canonical_json(identity)))
        if found:
            raise StaleArtifact(
                f"{self.directory / name} was built from other settings than the recipe now asks for: "
                f"{described(found)}. Rebuild it and what depends on it with --rebuild {name}, or give the recipe "
                "another name to keep both"
            )
        return True

    def check_place(self, name: str) -> None:
        """Raises UserError where something that is no complete artifact has the name of one: it would be in the way."""
        final = self.directory / name
        if (final.exists() or final.is_symlink()) and not (final / MANIFEST).exists():
            what = "is a link to what is not there" if not final.exists() else f"exists, but holds no {MANIFEST}"
            raise UserError(f"{final} {what}: mend or remove it, or build it anew with --rebuild {name}")

    @contextmanager
    def create(
        self, name: str, identity: Mapping[str, object], notes: MutableMapping[str, Any] | None = None
    ) -> Iterator[Path]:
        """The directory to build in; leaving without an error writes the manifest and completes the artifact.

        What a killed run of the same identity left is handed out again; what one of another identity left is removed.

        Args:
            notes: JSON data to keep in the manifest beside the identity, read when the artifact is complete.
        """
        final, building = self.directory / name, self.building(name)
        self.check_place(name)
        if final.exists():
            raise UserError(f"{final} exists already: remove it, or rebuild it with --rebuild {name}")
        wanted = canonical_json(identity)
        mark = building / IDENTITY
        if building.exists() and not (mark.exists() and mark.read_text() == wanted):
            shutil.rmtree(building)
        if not building.exists():
            building.mkdir(parents=True)
            write_whole(mark, wanted)
        yield building
        manifest = {
            "format": 1,
            "recipe": self.recipe,
            "step": name,
            "fingerprint": fingerprint(identity),
            "identity": json.loads(wanted),
            **(notes or {}),
        }
        write_whole(building / MANIFEST, json.dumps(manifest, indent=1, allow_nan=True))
        building.rename(final)
        _sync(self.directory)

    def discard(self, name: str) -> None:
        """Remove an artifact, complete or begun. It disappears at once, whenever the process is killed."""
        for path in (self.directory / name, self.building(name)):
            if path.exists() or path.is_symlink():
                away = self.directory / f".discarded-{name}-{time.time_ns()}"
                path.rename(away)
                _remove(away)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the root: while one process is inside, any other that tries raises RootInUse.

        A POSIX lock, not flock: children do not inherit it, so workers that outlive a killed run do not block the next.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        root = self.root.resolve()
        path = root / ".lock"
        if root in _held:
            raise RootInUse(f"{root} is in use by this very process ({os.getpid()}): one run at a time below one root")
        with path.open("a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RootInUse(_in_use(root, path)) from None
            _held.add(root)
            try:
                file.truncate(0)
                file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "recipe": self.recipe}))
                file.flush()
                for remains in self.directory.glob(".discarded-*"):
                    _remove(remains)
                yield
            finally:
                with contextlib.suppress(OSError):  # a full disk must not hide the error that we leave with
                    file.truncate(0)
                _held.discard(root)


def _remove(path: Path) -> None:
    """A directory and all in it; of one that lies elsewhere, behind a link, the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest at `path`. Raises UserError where it is damaged."""
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove its directory, and the next run rebuilds it") from None
    if not isinstance(manifest, dict) or "identity" not in manifest:
        raise UserError(f"{path} is no manifest of ours: remove its directory, and the next run rebuilds it")
    return manifest


def building_identity(directory: Path) -> dict[str, Any]:
    """What an artifact that is being built is made from; nothing where none is, or that is not written down (yet)."""
    try:
        identity = json.loads((directory / IDENTITY).read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return identity if isinstance(identity, dict) else {}


def described(found: list[Difference]) -> str:
    """Differences in words: which field, what it was, what it is now."""
    return "; ".join(f"{item.field} was {_shown(item.stored)}, now {_shown(item.wanted)}" for item in found)


def _shown(value: object) -> str:
    text = canonical_json(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _in_use(root: Path, lock: Path) -> str:
    try:
        holder = json.loads(lock.read_text())
        who = f"process {holder['pid']} on {holder['host']}, which runs {holder['recipe']}"
    except (OSError, json.JSONDecodeError):  # the holder has the lock and has not yet written its name
        who = "another process"
    return f"{root} is in use by {who}: wait until it ends, stop it, or give this run another --root"


def write_whole(path: Path, text: str) -> None:
    """Write and flush to the disk under a hidden name, then rename: the file is whole wherever it is seen."""
    hidden = path.with_name(f".{path.name}.writing")
    with hidden.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    hidden.replace(path)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
