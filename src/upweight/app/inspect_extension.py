"""What inspect-ai finds of ours, by its entry point: checkpoints as models, the sandbox as a sandbox.

    inspect eval inspect_evals/gsm8k --model upweight/quickstart:sft
    inspect eval inspect_evals/humaneval --model upweight/Qwen/Qwen3-0.6B --sandbox upweight

The name after upweight/ is what `upweight eval` takes: a directory, RECIPE, RECIPE:STEP or a hub name. Needs the extra:
pip install 'upweight[inspect]'.
"""

import asyncio
import itertools
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolCall as InspectCall
from inspect_ai.tool import ToolChoice, ToolInfo
from inspect_ai.util import ExecResult, OutputLimitExceededError, SandboxEnvironment, sandboxenv

from upweight.app.engine import Engine, Piece, open_engine
from upweight.core.protocols import REPORTED, Limits
from upweight.core.records import Message, ToolCall
from upweight.rollout.sandbox import Sandbox, SandboxLimits
from upweight.text.tool_calls import parse_reply, render_with_tools

AT_ONCE = 32
STOPS = {"end": "stop", "stop": "stop", "length": "max_tokens"}


@modelapi(name="upweight")
class UpweightModel(ModelAPI):
    """A checkpoint in this process; requests that are made at once are decoded together.

    Args:
        model_name: what comes after upweight/.
        model_args: `root` (where recipes keep their artifacts), `device`, `rows` (answers decoded at once).
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - the interface's own default
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        root = Path(str(model_args.get("root", "runs")))
        rows = int(model_args.get("rows", AT_ONCE))
        self._engine: Engine = open_engine(
            model_name, root=root, device=str(model_args.get("device", "cpu")), rows=rows
        )
        self._asked = itertools.count()

    def max_connections(self) -> int:
        return self._engine.rows

    def max_tokens(self) -> int | None:
        return self._engine.capacity

    async def aclose(self) -> None:
        await asyncio.to_thread(self._engine.close)

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        began = time.monotonic()
        schemas = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, include=SCHEMA_FIELDS)}
            for tool in tools
        ]
        prompt = render_with_tools(
            self._engine.tokenizer, [_message(message) for message in input], [] if tool_choice == "none" else schemas
        )
        room = self._engine.capacity - len(prompt)
        if room < 1:
            output = ModelOutput.from_content(self.model_name, "", stop_reason="model_length")
            output.usage = ModelUsage(input_tokens=len(prompt), total_tokens=len(prompt))
            return output
        choices, written = [], 0
        for pieces in await asyncio.gather(
            *(self._pieces(prompt, self._limits(config, room)) for _ in range(config.num_choices or 1))
        ):
            choices.append(self._choice(pieces, bool(config.logprobs)))
            written += len(pieces)
        usage = ModelUsage(input_tokens=len(prompt), output_tokens=written, total_tokens=len(prompt) + written)
        return ModelOutput(model=self.model_name, choices=choices, usage=usage, time=time.monotonic() - began)

    def _limits(self, config: GenerateConfig, room: int) -> Limits:
        """The request's settings; what it leaves open is as in the report."""
        temperature = REPORTED.temperature if config.temperature is None else config.temperature
        return Limits(
            max_new_tokens=min(config.max_tokens or REPORTED.max_new_tokens, room),
            temperature=temperature,
            top_p=REPORTED.top_p if config.top_p is None else config.top_p,
            top_k=config.top_k or 0,
            stop=tuple(config.stop_seqs or ()),
            # a request that is made again is another sample: epochs repeat the same prompt
            seed=(config.seed or 0) + next(self._asked),
        )

    async def _pieces(self, prompt: Sequence[int], limits: Limits) -> list[Piece]:
        arrived: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, piece)

        request = self._engine.submit(prompt, limits, deliver)
        pieces: list[Piece] = []
        try:
            while not pieces or pieces[-1].stop is None:
                pieces.append(await arrived.get())
        finally:
            request.cancel()
        if pieces[-1].stop == "error":
            raise RuntimeError(pieces[-1].error)
        return pieces

    def _choice(self, pieces: Sequence[Piece], logprobs: bool) -> ChatCompletionChoice:
        reply = parse_reply("".join(piece.text for piece in pieces), prefix=f"call_{next(self._asked)}")
        stop = "tool_calls" if reply.calls else STOPS.get(pieces[-1].stop or "", "unknown")
        told = None
        if logprobs:
            tokenizer = self._engine.tokenizer
            told = Logprobs(
                content=[Logprob(token=tokenizer.one_text(piece.token), logprob=piece.logprob) for piece in pieces]
            )
        message = ChatMessageAssistant(
            content=_content(reply.text),
            tool_calls=[InspectCall(call.id, call.name, _arguments(call)) for call in reply.calls] or None,
            model=self.model_name,
            source="generate",
        )
        return ChatCompletionChoice(message=message, stop_reason=stop, logprobs=told)


SCHEMA_FIELDS = {"name", "description", "parameters"}


def _content(text: str) -> str | list[Any]:
    """The thought apart from the answer, so that scorers read the answer alone."""
    thought, closed, answer = text.rpartition("</think>")
    if not closed:
        return text
    return [ContentReasoning(reasoning=thought.removeprefix("<think>").strip()), ContentText(text=answer.strip())]


def _arguments(call: ToolCall) -> dict[str, Any]:
    try:
        found = json.loads(call.arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _message(message: ChatMessage) -> Message:
    calls: tuple[ToolCall, ...] = ()
    if isinstance(message, ChatMessageAssistant) and message.tool_calls:
        calls = tuple(ToolCall(call.id, call.function, json.dumps(call.arguments)) for call in message.tool_calls)
    given = getattr(message, "tool_call_id", None)
    return Message(message.role, message.text, tool_calls=calls, tool_call_id=given)


@sandboxenv(name="upweight")
class UpweightSandbox(SandboxEnvironment):
    """Our sandbox: each command is one Python program, run isolated from the network, from files and from the others.

    `python -c CODE`, `python FILE` and `python -` run; any other command ends with 127, since no process can be started
    inside. Files that are written with `write_file` are there for each program to read; what a program writes itself is
    gone with it.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__()
        self._sandbox = sandbox
        self._files: dict[str, bytes] = {}

    @classmethod
    async def sample_init(cls, task_name: str, config: Any, metadata: dict[str, str]) -> dict[str, SandboxEnvironment]:
        return {"default": cls(Sandbox(workers=1))}

    @classmethod
    async def sample_cleanup(
        cls, task_name: str, config: Any, environments: Mapping[str, Any], interrupted: bool
    ) -> None:
        for environment in environments.values():
            if isinstance(environment, UpweightSandbox):
                environment._sandbox.close()

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        program = self._program(cmd, input)
        if program is None:
            return ExecResult(False, 127, "", f"{shlex.join(cmd)[:200]}: this sandbox runs Python programs only\n")
        stdin = input.decode() if isinstance(input, bytes) else input or ""
        seconds = float(timeout or LIMITS.wall_seconds)
        limits = SandboxLimits(
            cpu_seconds=seconds,
            wall_seconds=seconds,
            memory_bytes=LIMITS.memory_bytes,
            output_bytes=LIMITS.output_bytes,
        )
        done = await asyncio.to_thread(self._sandbox.run, program, stdin=stdin, limits=limits)
        if done.timed_out:
            raise TimeoutError(f"the program ran for more than {seconds:g} s")
        if done.output_exceeded:
            raise OutputLimitExceededError(f"{LIMITS.output_bytes >> 20} MB", done.stdout)
        return ExecResult(done.exit_code == 0, done.exit_code, done.stdout, done.stderr)

    def _program(self, cmd: Sequence[str], given: str | bytes | None) -> str | None:
        """The Python that a command stands for, after the files that it may read; None for another command."""
        if not cmd or Path(cmd[0]).name not in ("python", "python3"):
            return None
        words = [word for word in cmd[1:] if word not in ("-u", "-B", "-I")]
        if len(words) >= 2 and words[0] == "-c":
            code, arguments = words[1], words[2:]
        elif words and words[0] == "-":
            code, arguments = (given.decode() if isinstance(given, bytes) else given or ""), words[1:]
        elif words and self._place(words[0]) in self._files:
            code, arguments = self._files[self._place(words[0])].decode(), words[1:]
        else:
            return None
        return (
            f"{self._written()}import sys\nsys.argv[1:] = {arguments!r}\nexec(compile({code!r}, '<program>', 'exec'))\n"
        )

    def _written(self) -> str:
        lines = [
            f"p = pathlib.Path({name!r}); p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes({content!r})\n"
            for name, content in self._files.items()
        ]
        return f"import pathlib\n{''.join(lines)}del pathlib, p\n" if lines else ""

    @staticmethod
    def _place(file: str) -> str:
        """Where a file lies inside: relative to the scratch directory, wherever it was asked for."""
        return str(Path(file)).lstrip("/")

    async def write_file(self, file: str, contents: str | bytes) -> None:
        self._files[self._place(file)] = contents.encode() if isinstance(contents, str) else contents

    async def read_file(self, file: str, text: bool = True) -> Any:
        place = self._place(file)
        if place not in self._files:
            raise FileNotFoundError(f"there is no {file} in this sandbox: a program's own files go with it")
        return self._files[place].decode() if text else self._files[place]


LIMITS = SandboxLimits(cpu_seconds=60.0, wall_seconds=60.0, memory_bytes=1 << 30, output_bytes=10 << 20)
