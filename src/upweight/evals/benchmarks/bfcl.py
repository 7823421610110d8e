r"""BFCL-V4: calls of functions, single and over several turns, avg@3 (Berkeley Function Calling Leaderboard).

Cases, prompts, the AST checker and the simulated services are those of the package bfcl-eval. Models are asked in text
(the leaderboard's "prompt" mode) and may answer as it asks, `[f(a=1), g(b="x")]`, or as tool-using models do,
`<tool_call>{"name": ..., "arguments": ...}</tool_call>`.

In turns, each call is executed on the simulated services and its result shown, up to 20 steps a turn. The package does
that with `eval`, so text of the model's never reaches it: calls are parsed, only functions of the services are called,
and their arguments are literals, written anew.

Left out are web_search and memory, which need a search service and vector stores; so `figures` gives the overall score
of the rest, by the leaderboard's weights (10 non-live, 10 live, 10 irrelevance, 30 multi-turn). Parts are categories:
`bfcl:simple_python+multi_turn_base`.
"""

import ast
import copy
import json
import keyword
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean
from typing import Any

from upweight.core.errors import UserError
from upweight.core.protocols import Benchmark, Limits, Sampler, Verifier
from upweight.core.records import Completion, Message, Problem, Sample, Verdict
from upweight.evals import bfcl_package as package
from upweight.evals.setting import Setting
from upweight.verify.answers import shown, visible_part

SIMPLE = ("simple_python", "simple_java", "simple_javascript")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
IRRELEVANCE = ("irrelevance", "live_irrelevance")
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
CATEGORIES = (*SIMPLE, "multiple", "parallel", "parallel_multiple", *IRRELEVANCE, *LIVE, "live_relevance", *MULTI_TURN)
LANGUAGES = {"simple_java": "Java", "simple_javascript": "JavaScript"}
MOST_STEPS = 20
"""Replies of one turn that call functions; a further one breaks the case off."""
Call = Mapping[str, Mapping[str, Any]]
"""A call as the checker takes it: {name of the function: {argument: value}}."""

MARK = "_kw_"
_KEYWORD = re.compile(rf"\b({'|'.join(keyword.kwlist)})(\s*=(?!=))")
_SOURCE = re.compile(r"\[?\s*([\w.$]+)\s*\((.*)\)\s*;?\s*\]?", re.DOTALL)
_NAMED = re.compile(r",\s*[\w$]+\s*=(?![=>])")
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_QUOTES = "\"'`"
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_CHECKS = (KeyError, TypeError, ValueError, AttributeError, IndexError)
_episodes = count()


class NoCall(ValueError):
    """A text that is no list of calls."""


def decoded(text: str, *, texts_only: bool = False) -> list[Call]:
    """The calls that a completion asks for, after its thought. Raises NoCall where it asks for none.

    Args:
        texts_only: every argument as a text: how Java and JavaScript values are given.
    """
    visible = visible_part(text) or ""
    tagged = _TAGGED.findall(visible)
    try:
        calls = [_from_json(call) for call in tagged] if tagged else _from_python(visible)
    except NoCall:
        if tagged or not texts_only:
            raise
        return [_from_source(visible)]
    if texts_only:
        return [
            {name: {key: _as_text(value) for key, value in given.items()} for name, given in call.items()}
            for call in calls
        ]
    return calls


def _as_text(value: Any) -> str:
    if not isinstance(value, (bool, list, dict)):
        return str(value)
    try:
        return json.dumps(value)
    except TypeError:  # with a set or the like in it
        return str(value)


def _from_json(call: str) -> Call:
    try:
        asked = json.loads(call)
        name, arguments = asked["name"], asked.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (*_CHECKS, RecursionError) as error:
        raise NoCall(f"a tool call that is no JSON object: {error}") from None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise NoCall("a tool call without a name and arguments")
    return {name: arguments}


def _bare(text: str) -> str:
    return re.sub(r"^```\w*\n?|```$", "", text.strip()).strip("`\n ")


def _from_source(text: str) -> Call:
    """One call with named arguments as Java or JavaScript writes their values: each value is its own text, a string
    what stands between its quotes."""
    found = _SOURCE.fullmatch(_bare(text))
    if found is None:
        raise NoCall("not a call of a function")
    name, arguments = found.groups()
    given = {}
    for argument in _arguments(arguments):
        key, named, value = (part.strip() for part in argument.partition("="))
        if not named or not re.fullmatch(r"[\w$]+", key):
            raise NoCall(f"an argument without a name: {argument.strip()}")
        given[key] = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in _QUOTES else value
    return {name: given}


def _arguments(text: str) -> list[str]:
    """What stands between the commas that name another argument; those within quotes and brackets do not."""
    found, start, closing, quote, escaped = [], 0, [], "", False
    for place, letter in enumerate(text):
        if quote:
            quote, escaped = ("" if letter == quote and not escaped else quote), letter == "\\" and not escaped
        elif letter in _QUOTES:
            quote = letter
        elif letter in _BRACKETS:
            closing.append(_BRACKETS[letter])
        elif letter in _BRACKETS.values():
            if not closing or closing.pop() != letter:
                raise NoCall("brackets that do not match")
        elif letter == "," and not closing and _NAMED.match(text, place):
            found.append(text[start:place])
            start = place + 1
    if closing or quote:
        raise NoCall("brackets or quotes that do not match")
    return [*found, text[start:]] if text.strip() else []


def _from_python(text: str) -> list[Call]:
    bare = _bare(text)
    bare = bare if bare.startswith("[") else f"[{bare}]"
    try:
        try:
            body = ast.parse(bare, mode="eval").body
        except SyntaxError:  # an argument named like a keyword of Python: from=...
            body = ast.parse(_KEYWORD.sub(rf"\1{MARK}\2", bare), mode="eval").body
        if not isinstance(body, ast.List) or not all(isinstance(item, ast.Call) for item in body.elts):
            raise NoCall("not a list of calls")
        return [_call(item) for item in body.elts if isinstance(item, ast.Call)]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise NoCall(str(error) or type(error).__name__) from None


def _call(node: ast.Call) -> Call:
    name = ast.unparse(node.func)
    if not re.fullmatch(r"[\w.]+", name) or any(argument.arg is None for argument in node.keywords):
        raise NoCall(f"not the name of a function: {name}")
    given: dict[str, Any] = {str(item.arg).removesuffix(MARK): _value(item.value) for item in node.keywords}
    if node.args:
        given[POSITIONAL] = [_value(value) for value in node.args]
    return {name: given}


POSITIONAL = "*"
"""Where arguments without a name are kept; the checker knows no parameter of that name, so they are wrong to it."""


def _value(node: ast.expr) -> Any:
    """A literal, or what an arithmetic of numbers comes to; what is neither (a variable, a call) is its own text, as
    the leaderboard reads it."""
    try:
        value = ast.literal_eval(node)
        return value.replace(f"{MARK}=", "=") if isinstance(value, str) else value
    except (ValueError, TypeError, SyntaxError):
        if isinstance(node, ast.List):
            return [_value(item) for item in node.elts]
        if isinstance(node, ast.Tuple):
            return tuple(_value(item) for item in node.elts)
        if isinstance(node, ast.Dict) and all(node.keys):
            return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = _value(node.left), _value(node.right)
            if isinstance(left, (int, float)) and isinstance(right, (int, float)):
                with suppress(ArithmeticError):
                    return _ARITHMETIC[type(node.op)](left, right)
        return ast.unparse(node)


def written(call: Call) -> str:
    """A call as Python, from its parsed name and literals: safe to be evaluated where the name is of the services."""
    ((name, given),) = call.items()
    parts = [repr(value) for value in given.get(POSITIONAL, ())]
    parts += [f"{key}={value!r}" for key, value in given.items() if key != POSITIONAL and key.isidentifier()]
    return f"{name.rpartition('.')[2]}({', '.join(parts)})"


@dataclass(frozen=True)
class CallVerifier(Verifier):
    """1 where the package's checker accepts the calls, else 0 with its reason."""

    entries: Mapping[str, Mapping[str, Any]]

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        entry = self.entries[problem.id]
        return [self._judge(entry, completion) for completion in group]

    def _judge(self, entry: Mapping[str, Any], completion: Completion) -> Verdict:
        if completion.truncated:
            return Verdict(0.0, "truncated")
        category = entry["category"]
        if category in MULTI_TURN:
            return _turns_verdict(entry, json.loads(completion.text))
        try:
            calls = decoded(completion.text, texts_only=category in LANGUAGES)
        except NoCall as error:
            return _relevance(category, False) or Verdict(0.0, f"no call: {shown(str(error))}")
        return _relevance(category, bool(calls)) or _ast_verdict(entry, calls)


def _relevance(category: str, called: bool) -> Verdict | None:
    """The verdict of categories that ask only whether a function is called; None for the others."""
    if category == "live_relevance":
        return Verdict(float(called), "a call" if called else "no call: one was expected")
    if category in IRRELEVANCE:
        return Verdict(float(not called), "a call: none was expected" if called else "no call")
    return None


def _ast_verdict(entry: Mapping[str, Any], calls: Sequence[Call]) -> Verdict:
    language = package.part_of("constants.enums").Language
    spoken = LANGUAGES.get(entry["category"], "Python").upper()
    checker = package.part_of("eval_checker.ast_eval.ast_checker")
    try:
        found = checker.ast_checker(
            entry["function"], list(calls), entry["ground_truth"], language[spoken], entry["category"], "upweight"
        )
    except _CHECKS as error:  # values that the checker did not expect: they are not right
        return Verdict(0.0, f"wrong: the checker stops at it ({type(error).__name__}: {shown(str(error))})")
    return _told(found)


def _turns_verdict(entry: Mapping[str, Any], turns: Sequence[Sequence[str]]) -> Verdict:
    """Run what was called in each turn, and the reference calls beside it, and compare states and results."""
    if len(turns) != len(entry["ground_truth"]):
        return Verdict(0.0, f"wrong: broken off in turn {len(turns)} of {len(entry['ground_truth'])}")
    steps = [[_executable(entry, calls) for calls in _decodable(turn) if calls] for turn in turns]
    checker = package.part_of("eval_checker.multi_turn_eval.multi_turn_checker")
    services = package.Services(entry, f"check{next(_episodes)}")
    try:
        found = checker.multi_turn_checker(steps, entry["ground_truth"], entry, entry["category"], services.owner)
    except _CHECKS as error:
        return Verdict(0.0, f"wrong: the checker stops at it ({type(error).__name__}: {shown(str(error))})")
    finally:
        services.close()
    return _told(found)


def _executable(entry: Mapping[str, Any], calls: Sequence[Call]) -> list[str]:
    """The calls as Python, without those of functions that the services do not have, which change nothing there."""
    return [text for text in map(written, calls) if package.callable_here(entry, text)]


def _decodable(turn: Sequence[str]) -> list[list[Call]]:
    found = []
    for text in turn:
        try:
            found.append(decoded(text))
        except NoCall:
            continue
    return found


def _told(found: Mapping[str, Any]) -> Verdict:
    if found["valid"]:
        return Verdict(1.0, "right")
    why = found.get("error_message") or (found.get("error") or [""])[0]
    return Verdict(0.0, f"wrong: {found.get('error_type', '')}: {shown(str(why))}")


@dataclass
class _Episode:
    """One run through the turns of a case."""

    entry: Mapping[str, Any]
    services: package.Services
    messages: list[Message]
    turns: list[list[str]] = field(default_factory=list)
    made: list[Completion] = field(default_factory=list)
    over: bool = False
    finished: bool = False

    def begin_turn(self) -> None:
        """Say what the user says next; with nothing left, it is over."""
        place = len(self.turns)
        if place == len(self.entry["question"]):
            self.over = self.finished = True
            return
        said = self.entry["question"][place]
        self.turns.append([])
        if not said:
            said = [{"role": "user", "content": package.more_functions(self.entry["held_back"].get(str(place), []))}]
        self.messages += [Message(message["role"], message["content"]) for message in said]

    def take(self, completion: Completion) -> None:
        """Execute what was called and show the results; a reply without a call ends the turn."""
        self.made.append(completion)
        self.turns[-1].append(completion.text)
        self.messages.append(Message("assistant", completion.text))
        try:
            calls = [] if completion.truncated else decoded(completion.text)
        except NoCall:
            calls = []
        if not calls:
            self.over = completion.truncated
            if not self.over:
                self.begin_turn()
        elif len(self.turns[-1]) > MOST_STEPS:
            self.over = True
        else:
            texts = [written(call) for call in calls]
            told = [
                {"role": "tool", "name": text, "content": result}
                for text, result in zip(texts, self.services.call(texts), strict=True)
            ]
            self.messages.append(Message("user", repr(told)))

    def completion(self) -> Completion:
        """All of it as one completion: its text is the turns as JSON, each a list of replies, without a last one that
        was broken off."""
        turns = self.turns if self.finished else self.turns[:-1]
        return Completion(
            tokens=tuple(token for completion in self.made for token in completion.tokens),
            logprobs=(),
            text=json.dumps(turns, ensure_ascii=False),
            stop=self.made[-1].stop,
            policy=self.made[-1].policy,
        )


class Bfcl(Benchmark):
    """The cases of some categories."""

    def __init__(self, setting: Setting) -> None:
        if setting.data is not None:
            raise UserError(
                f"bfcl takes no file: its cases are those of the package bfcl-eval, so {setting.data} is unread"
            )
        unknown = [part for part in setting.parts if part not in CATEGORIES]
        if unknown:
            raise UserError(f"bfcl has no category {unknown[0]!r}; those that can be run are {', '.join(CATEGORIES)}")
        self.name = "bfcl"
        self.samples = setting.samples or 3
        self.categories = setting.parts or CATEGORIES
        self.entries = {entry["id"]: entry for category in self.categories for entry in _entries(category)}
        self.verifier = CallVerifier(self.entries)

    def problems(self) -> Sequence[Problem]:
        return [_problem(entry) for entry in self.entries.values()]

    def ask(self, sampler: Sampler, problems: Sequence[Problem], limits: Limits) -> list[list[Completion]]:
        """Single questions at once; episodes of several turns beside each other, a step at a time."""
        single = [problem for problem in problems if self.entries[problem.id]["category"] not in MULTI_TURN]
        answered = dict(zip((problem.id for problem in single), super().ask(sampler, single, limits), strict=True))
        several = [problem for problem in problems if problem.id not in answered]
        episodes = {problem.id: [self._episode(problem) for _ in range(self.samples)] for problem in several}
        try:
            self._play([episode for group in episodes.values() for episode in group], sampler, limits)
            answered |= {name: [episode.completion() for episode in group] for name, group in episodes.items()}
        finally:
            for group in episodes.values():
                for episode in group:
                    episode.services.close()
        return [answered[problem.id] for problem in problems]

    def _episode(self, problem: Problem) -> _Episode:
        entry = self.entries[problem.id]
        prompt = [message for message in problem.messages if message.role == "system"]
        episode = _Episode(entry, package.Services(entry, f"run{next(_episodes)}"), prompt)
        episode.begin_turn()
        return episode

    def _play(self, episodes: Sequence[_Episode], sampler: Sampler, limits: Limits) -> None:
        while going := [episode for episode in episodes if not episode.over]:
            replies = sampler.sample([tuple(episode.messages) for episode in going], count=1, limits=limits)
            for episode, (reply,) in zip(going, replies, strict=True):
                episode.take(reply)

    def figures(self, samples: Sequence[Sample]) -> Mapping[str, float]:
        """The share of each category, and where all are there the leaderboard's averages of them."""
        by_category: dict[str, list[float]] = {}
        for sample in samples:
            by_category.setdefault(self.entries[sample.problem]["category"], []).append(sample.score)
        found = {category: fmean(by_category[category]) for category in CATEGORIES if category in by_category}
        if len(found) < len(CATEGORIES):
            return found
        simple = fmean(found[category] for category in SIMPLE)
        live = [score for category in LIVE for score in by_category[category]]
        whole = {
            "non-live": fmean((simple, found["multiple"], found["parallel"], found["parallel_multiple"])),
            "live": fmean(live),
            "irrelevant": fmean(found[category] for category in IRRELEVANCE),
            "multi-turn": fmean(found[category] for category in MULTI_TURN),
        }
        overall = (
            10 * whole["non-live"] + 10 * whole["live"] + 10 * whole["irrelevant"] + 30 * whole["multi-turn"]
        ) / 60
        return {**found, **whole, "overall without web search and memory": overall}


def _entries(category: str) -> list[dict[str, Any]]:
    """The cases of a category with their reference answers and the functions that they may call."""
    rows = package.lines(f"BFCL_v4_{category}.json")
    answers = []
    if category not in (*IRRELEVANCE, "live_relevance"):
        answers = package.lines(f"possible_answer/BFCL_v4_{category}.json")
        if [row["id"] for row in rows] != [row["id"] for row in answers]:
            raise UserError(f"bfcl-eval: the cases and the answers of {category} are not of the same ids")
    for place, row in enumerate(rows):
        row["category"] = category
        row["ground_truth"] = answers[place]["ground_truth"] if answers else None
        row["held_back"] = {}
        if category in MULTI_TURN:
            _give_functions(row)
    return rows


def _give_functions(row: dict[str, Any]) -> None:
    """The functions of the services that a case involves, without those held back until a later turn."""
    files = package.part_of("constants.executable_backend_config").MULTI_TURN_FUNC_DOC_FILE_MAPPING
    known = [doc for name in row["involved_classes"] for doc in package.documents(files[name])]
    missing = row.get("missed_function", {})
    row["held_back"] = {turn: [doc for doc in known if doc["name"] in names] for turn, names in missing.items()}
    row["callable"] = frozenset(doc["name"] for doc in known)
    later = {name for names in missing.values() for name in names}
    row["function"] = [doc for doc in known if doc["name"] not in later]


def _problem(entry: Mapping[str, Any]) -> Problem:
    functions = [_described(function, entry["category"]) for function in entry["function"]]
    said = [Message(message["role"], message["content"]) for message in entry["question"][0]]
    given = [message.content for message in said if message.role == "system"]
    system = "\n\n".join([*given, package.system_prompt(functions)])
    rest = [message for message in said if message.role != "system"]
    truth = entry["ground_truth"]
    answer = None if truth is None else json.dumps(truth, ensure_ascii=False)
    return Problem(entry["id"], (Message("system", system), *rest), answer, (), entry["category"])


def _described(function: Mapping[str, Any], category: str) -> dict[str, Any]:
    """A function's description as the model reads it: in Java and JavaScript every value is given as a text."""
    made = copy.deepcopy(dict(function))
    language = LANGUAGES.get(category)
    syntax = {"Java": "Java 8 SDK", None: "Python 3"}.get(language, str(language))
    made["description"] += f" Note that the provided function is in {syntax} syntax."
    if language is not None:
        for field_ in made["parameters"]["properties"].values():
            kind, items = field_["type"], field_.pop("items", {})
            field_["description"] += f" This is a value of the {language} type {kind}, written as a string."
            if items.get("type"):
                field_["description"] += f" Its elements are of the type {items['type']}, not written as strings."
            field_["type"] = "string"
    return made


def benchmark(setting: Setting) -> Benchmark:
    return Bfcl(setting)
