"""What a confined child does with its program: run it, evaluate calls of its functions, or take part in a test.

Standard library only; read inside the sandbox.

Values travel as JSON with their types told, so that 1, 1.0, True, "1" and (1,) stay apart, and nothing that arrives can
run anything: `unpack` builds numbers, strings and containers of them.

A test that cannot be reduced to calls and expected values runs in a child of its own. There, the candidate's functions
are stand-ins that send the arguments to the candidate's child and give back what it answers (with the changes it made
to lists, dicts and sets that it was given). The test's text, its comparisons and its verdict live where the candidate
has no way in. Objects of the candidate's own classes stay with it. They can be made, called, read and iterated over,
but not compared or computed with, because then the candidate's own code would decide: such a test is undecidable.
"""
# ruff: noqa: S102, S307, BLE001 - running foreign code, whatever it raises, is what this file is for

import builtins
import functools
import json
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RESULT = 3
PARTNER = 4
DEEPEST = 64
"""Levels of nesting that a value may have."""
LARGEST_MESSAGE = 1 << 24
_WORD = re.compile(r"\w+")

PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)


class NotPlain(TypeError):
    """A value that is no number, string or container of these, and so cannot leave its process."""


class Undecidable(BaseException):
    """The test would leave its verdict to the candidate, or needs what cannot leave a process.

    No Exception, and neither is `Ended`: a test that expects one of the candidate would take this for it.
    """


class Ended(BaseException):
    """The candidate's process is gone, or says more than can be read."""


def pack(value: Any, depth: int = 0) -> Any:
    """A plain value as JSON data. Subclasses count as what they derive from; other types raise NotPlain."""
    if depth > DEEPEST:
        raise NotPlain(f"nested deeper than {DEEPEST} levels")
    if value is None:
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return {"i": hex(value)}
    if isinstance(value, float):
        return {"f": float.__repr__(value)}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"c": [repr(value.real), repr(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    for kind, type_ in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if isinstance(value, type_):
            return {kind: [pack(item, depth + 1) for item in value]}
    if isinstance(value, dict):
        return {"d": [[pack(key, depth + 1), pack(item, depth + 1)] for key, item in value.items()]}
    raise NotPlain(f"a {type(value).__name__} is no plain value")


def unpack(data: Any, depth: int = 0) -> Any:
    """The value that `pack` described. Raises ValueError for anything that it would not have written."""
    if data is None or isinstance(data, (bool, str)):
        return data
    if not isinstance(data, dict) or len(data) != 1 or depth > DEEPEST:
        raise ValueError("this is no packed value")
    ((kind, content),) = data.items()
    try:
        if kind == "i":
            return int(content, 16)
        if kind == "f":
            return float(content)
        if kind == "c":
            return complex(float(content[0]), float(content[1]))
        if kind == "b":
            return bytes.fromhex(content)
        if kind == "d":
            return {unpack(key, depth + 1): unpack(item, depth + 1) for key, item in content}
        items = [unpack(item, depth + 1) for item in content]
        return {"l": list, "t": tuple, "s": set, "z": frozenset}[kind](items)
    except (TypeError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"this is no packed value: {error}") from error


def run_program(source: str) -> None:
    """The program as `python program.py` would run it."""
    exec(compile(source, "program.py", "exec"), _main_module())


def run_calls(source: str) -> None:
    """Run the candidate, then evaluate expressions, and write a line for each: its value, or why there is none."""
    request = json.loads(source)
    namespace = _main_module()
    exec(compile(request["program"], "program.py", "exec"), namespace)
    for index, expression in enumerate(request["calls"]):
        try:
            told: dict[str, Any] = {"value": pack(eval(expression, namespace))}
        except Exception as error:
            told = {"error": _told(error)}
        _write_all(RESULT, json.dumps({"index": index, **told}).encode() + b"\n")


def serve_candidate(source: str) -> None:
    """Run the candidate and answer the test's calls of what it defined."""
    namespace = _main_module()
    channel = _Channel(RESULT)
    try:
        exec(compile(source, "program.py", "exec"), namespace)
    except BaseException as error:  # the test is told of whatever ended the candidate, sys.exit too
        channel.send({"failed": _told(error)})
        raise
    objects: list[Any] = []

    def give(value: Any) -> Any:
        try:
            return {"value": pack(value)}
        except NotPlain:
            objects.append(value)
            return {"object": len(objects) - 1, "function": isinstance(value, _FUNCTIONS)}

    def take(sent: Any) -> Any:
        return objects[sent["object"]] if "object" in sent else unpack(sent["value"])

    channel.send({"names": list(namespace)})
    while True:
        request = channel.receive()
        if "name" in request:
            channel.send(give(namespace.get(request["name"])))
            continue
        arguments = [take(argument) for argument in request["arguments"]]
        keywords = {name: take(argument) for name, argument in request["keywords"].items()}
        target = objects[request["object"]]
        try:
            if request["method"] is not None:
                target = getattr(target, request["method"])
            answer = give(target(*arguments, **keywords) if request["call"] else target)
        except Exception as error:
            answer = {"error": _told(error)}
        after = []
        for argument in arguments:
            changed = isinstance(argument, (list, dict, set)) and type(argument) in PLAIN_TYPES
            try:
                after.append(pack(argument) if changed else None)
            except NotPlain:
                after.append(None)
        channel.send({**answer, "after": after})


def run_tests(source: str) -> None:
    """Run test sources against the candidate's child and write the verdict of each: empty, or what was wrong."""
    tests: list[str] = json.loads(source)
    channel = _Channel(PARTNER)
    first = channel.receive()
    for index, test in enumerate(tests):
        kind, failure = "wrong", ""
        if "failed" in first:
            failure = "the candidate did not load: " + ": ".join(first["failed"])
        else:
            namespace = _main_module()
            try:
                namespace.update(_defined(channel, {*map(str, first["names"])}, test))
                exec(compile(test, "test.py", "exec"), namespace)
            except Undecidable as error:
                kind, failure = "undecidable", str(error)
            except Ended as error:
                kind, failure = "ended", str(error)
            except AssertionError as error:
                failure = f"assertion failed {error}".strip()
            except BaseException as error:  # a test that raises has failed, by sys.exit too
                failure = ": ".join(_told(error))
        line = {"index": index, "kind": kind, "failure": failure[:2000]}
        _write_all(RESULT, json.dumps(line).encode() + b"\n")


def _defined(channel: "_Channel", names: set[str], test: str) -> dict[str, Any]:
    """What the candidate defines of the words of the test. Asked for one by one: a candidate may hold large tables.

    The names of built-in functions are not its own to define: a test that applies abs or range means Python's.
    """
    found: dict[str, Any] = {}
    for name in sorted(names & {*_WORD.findall(test)}):
        if name.startswith("__"):
            continue
        if hasattr(builtins, name):
            found[name] = Shadow(name)
        else:
            channel.send({"name": name})
            found[name] = _stand_in(channel, channel.receive(), True)
    return found


class _Channel:
    """JSON messages over a stream socket, each after its length."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        try:
            _write_all(self.descriptor, len(data).to_bytes(4, "little") + data)
        except ConnectionError:
            raise Ended("the candidate's process ended") from None

    def receive(self) -> Any:
        length = int.from_bytes(self._read(4), "little")
        if length > LARGEST_MESSAGE:
            raise Ended("the candidate's answer is too large")
        return json.loads(self._read(length))

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            try:
                part = os.read(self.descriptor, min(count, 1 << 16))
            except ConnectionError:
                part = b""
            if not part:
                raise Ended("the candidate's process ended")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


class Remote:
    """A stand-in for a function, class or object of the candidate's.

    `own` tells objects that the test made from a class from those that a function returned: the methods of the latter
    stay out of reach, since a test that calls one expects a string or a number there and would take its word.
    """

    def __init__(self, channel: _Channel, told: Any, own: bool) -> None:
        object.__setattr__(self, "_at", (channel, int(told["object"]), bool(told["function"]), own))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not self._at[3]:
            raise Undecidable(f"the test uses .{name} of an object of the candidate's own type")
        return self._ask(name, False)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("__setattr__", True, (name, value))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._ask(None, True, arguments, keywords)

    def __iter__(self) -> Any:
        iterator = self._ask("__iter__", True)
        while True:
            try:
                yield iterator._ask("__next__", True)
            except StopIteration:
                return

    def __next__(self) -> Any:
        return self._ask("__next__", True)

    def __len__(self) -> int:
        try:
            return int(self._ask("__len__", True))
        except AttributeError as error:
            raise TypeError("an object of the candidate's own type has no len()") from error

    def __getitem__(self, key: Any) -> Any:
        return self._ask("__getitem__", True, (key,))

    def __repr__(self) -> str:
        return "an object of the candidate's own type"

    def _ask(
        self, method: str | None, call: bool, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        channel, index, function, own = self._at
        request = {"object": index, "method": method, "call": call, "arguments": [_give(item) for item in arguments]}
        channel.send({**request, "keywords": {name: _give(item) for name, item in (keywords or {}).items()}})
        answer = channel.receive()
        for argument, after in zip(arguments, answer.get("after", ()), strict=False):
            if after is not None:
                _replace(argument, unpack(after))
        if "error" in answer:
            raise _exception(*answer["error"])
        return _stand_in(channel, answer, own and not (function and method is None))


class Shadow:
    """What stands for a built-in name that the candidate defined anew: no test can use it."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name: str) -> Any:
        raise Undecidable(f"the test uses {self._name}, which the candidate defines anew")

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.call

    def __repr__(self) -> str:
        return f"{self._name} of the candidate's own"


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(self: Remote | Shadow, *others: Any) -> Any:
        raise Undecidable(f"the test applies {name} to {self!r}")

    return refuse


for _name in (
    *("eq", "ne", "lt", "le", "gt", "ge", "contains", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv"),
    *("rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "neg", "abs", "and", "rand", "or", "ror"),
    *("xor", "rxor", "int", "float", "index", "round", "hash", "str", "format", "bool"),
):
    for _kind in (Remote, Shadow):
        setattr(_kind, f"__{_name}__", _refuse(f"__{_name}__"))

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


def _stand_in(channel: _Channel, told: Any, own: bool) -> Any:
    return Remote(channel, told, own) if "object" in told else unpack(told["value"])


def _give(value: Any) -> Any:
    if isinstance(value, Remote):
        return {"object": value._at[1]}
    try:
        return {"value": pack(value)}
    except NotPlain as error:
        raise Undecidable(f"the test hands the candidate a value that cannot leave its process: {error}") from None


def _replace(held: Any, now: Any) -> None:
    """Give a container the contents that the candidate left in its copy."""
    if isinstance(held, list) and isinstance(now, list):
        held[:] = now
    elif isinstance(held, (dict, set)) and type(held) is type(now):
        held.clear()
        held.update(now)


def _told(error: BaseException) -> list[str]:
    """An exception as its type's name and its message, whatever its own methods do."""
    try:
        message = str(error)[:500]
    except Exception:
        message = "(its message cannot be read)"
    return [type(error).__name__, message]


def _exception(name: Any, message: Any) -> Exception:
    """The candidate's exception as one of the built-in types; its own types become RuntimeError."""
    kind = getattr(builtins, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, AssertionError | UnicodeError):
        return RuntimeError(f"{name}: {message}")
    return kind(str(message))


def _main_module() -> dict[str, Any]:
    """A fresh __main__, so that pickling, dataclasses and inspection find the program's names."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    return module.__dict__


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
