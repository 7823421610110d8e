"""Identity: what makes two runs the same run. Canonical JSON, fingerprints, and seeds derived from names.

Everything that can change a result counts (stage, configuration, inputs, seeds, dtype); nothing else does (device,
workers, paths). Two identities are compared as canonical JSON, so a float written 1e-3 equals one written 0.001.
"""

import dataclasses
import enum
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

TYPE_KEY = "type"


def plain(value: object) -> object:
    """`value` as plain JSON data: dataclasses become objects that carry their type's name, tuples become lists.

    Raises TypeError for what has no canonical form (functions, open files, tensors): it could change a result unseen.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {TYPE_KEY: type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=canonical_json)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, pathlib.PurePath):
        return value.as_posix()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{value!r} ({type(value).__name__}) has no canonical form: a configuration holds numbers, strings, paths, "
        "sequences, mappings and dataclasses of these"
    )


def canonical_json(value: object) -> str:
    """`value` as JSON with sorted keys and no blanks: equal values give equal texts on every machine."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def fingerprint(value: object) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def seed_for(*names: object) -> int:
    """A seed in [0, 2^63) derived from names, so that adding a step does not move the seeds of the others."""
    return int.from_bytes(hashlib.sha256(canonical_json(names).encode()).digest()[:8], "big") >> 1


class Difference(NamedTuple):
    """One field in which two identities differ; a missing side is the string "absent"."""

    field: str
    stored: object
    wanted: object


def differences(stored: object, wanted: object, prefix: str = "") -> list[Difference]:
    """Every leaf in which two plain JSON values differ, with its dotted path."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        found: list[Difference] = []
        for key in sorted(stored.keys() | wanted.keys()):
            path = f"{prefix}.{key}" if prefix else str(key)
            found += differences(stored.get(key, "absent"), wanted.get(key, "absent"), path)
        return found
    if isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        return [
            difference
            for index, (old, new) in enumerate(zip(stored, wanted, strict=True))
            for difference in differences(old, new, f"{prefix}[{index}]")
        ]
    return [] if canonical_json(stored) == canonical_json(wanted) else [Difference(prefix, stored, wanted)]
