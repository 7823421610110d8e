"""vLLM as the sampler of a policy in training: its own process, and the new weights pushed to it as training goes on.

Written for vLLM 0.28 to 0.32, the optional extra `upweight[vllm]`. Sampling goes through vLLM's OpenAI interface
(remote.py), weights through its own weight-transfer interface: the trainer's engine of vllm.distributed.weight_transfer
drives start, update and finish on the server and moves the tensors by NCCL, or by CUDA IPC where both processes share a
GPU. In-flight answers end first (`/pause?mode=wait`), so that every completion comes from one version of the weights.

vLLM is sent tokens, and asked for the answer's and for log-probabilities after temperature and truncation
(`--logprobs-mode processed_logprobs`). It rounds otherwise than the trainer does: give the objective
`off_policy="truncate"` and a `mismatch_bound` that fits, some tenths of a nat in bfloat16.

Run against vLLM 0.32 built for CPUs, weights pushed through all but the last leg (tests/acceptance/vllm_server.py): in
float32 its log-probabilities are the trainer's to 1e-5. Not run: NCCL and CUDA IPC, for want of a GPU.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import httpx
from torch import Tensor

from upweight.core.errors import UserError
from upweight.core.protocols import Limits, Prompt, Sampler
from upweight.core.records import Completion
from upweight.model.language_model import LanguageModel
from upweight.model.transformer import Transformer
from upweight.model.weights import to_hub_names
from upweight.rollout import guardian
from upweight.rollout.remote import RemoteSampler
from upweight.rollout.service import EndpointError
from upweight.text.tokenizer import Tokenizer

NAME = "policy"
REQUEST = {
    "return_token_ids": True,
    # text is what the tokens say, as of a sampler in this process
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
}
"""Fields of each request that are vLLM's own."""

LOG_LINES = 15
"""Of the server's log, shown where it does not start."""

ENDING_SECONDS = 3.0
"""That a server may take to end after it has answered that it cannot go on."""

_RAISED = re.compile(r"(?:^|\] )[\w.]*(?:Error|Exception): ")


@runtime_checkable
class Transfer(Protocol):
    """What pushes weights: an engine of vLLM's own."""

    def send_weights(self) -> None:
        """Move all weights to the server, which answers with them from then on."""

    def shutdown(self) -> None:
        """Let go of the connection."""


@dataclass(frozen=True)
class Vllm:
    """How to run vLLM beside the trainer.

    Attributes:
        backend: "nccl" where the server has GPUs of its own, "ipc" where it shares the trainer's.
        devices: the server's CUDA_VISIBLE_DEVICES; empty leaves it as it is here.
        memory_share: of the GPU's memory that the server may take.
        context: the longest prompt with its answer; 0 takes the model's.
        most_stale: updates that the server's weights may lie behind the policy's. 0 pushes after every update.
        most_in_flight: requests at once; more wait here.
        timeout_seconds: of one request, and of one push.
        start_seconds: how long the server may take to start.
        options: further options of `vllm serve`.
    """

    backend: Literal["nccl", "ipc"] = "nccl"
    devices: str = ""
    memory_share: float = 0.45
    context: int = 0
    most_stale: int = 0
    most_in_flight: int = 256
    timeout_seconds: float = 600.0
    start_seconds: float = 900.0
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.backend not in ("nccl", "ipc") or self.most_stale < 0 or not 0 < self.memory_share < 1:
            raise UserError(
                f"vLLM with backend {self.backend!r}, most_stale {self.most_stale}, memory_share {self.memory_share}: "
                "expected 'nccl' or 'ipc', 0 or more, and a share between 0 and 1"
            )


class VllmSampler(Sampler):
    """Samples from a server whose weights follow a policy.

    Args:
        remote: asks the server.
        control: the server's address without "/v1", for pausing and resuming.
        transfer: pushes the policy's weights as they are at that moment.
        version: how many updates the policy has had.
        most_stale: how many of them the server may lack when it samples.
    """

    def __init__(
        self,
        remote: RemoteSampler,
        control: str,
        transfer: Transfer,
        version: Callable[[], int],
        *,
        most_stale: int = 0,
        timeout_seconds: float = 600.0,
    ) -> None:
        self._remote, self._control, self._transfer, self._version = remote, control.rstrip("/"), transfer, version
        self._most_stale, self._timeout = most_stale, timeout_seconds
        self._pushed: int | None = None  # nothing yet: the server may hold older weights than a resumed policy
        self.push_seconds = 0.0

    @property
    def staleness(self) -> int:
        """Updates that the server's weights lie behind the policy's."""
        return 0 if self._pushed is None else self._version() - self._pushed

    def sample(self, prompts: Sequence[Prompt], *, count: int, limits: Limits) -> list[list[Completion]]:
        """As RemoteSampler does, by weights at most `most_stale` updates old; `policy` says by which.

        Raises EndpointError where weights could not be pushed: sampling on with the old ones would go unseen.
        """
        if self._pushed is None or self.staleness > self._most_stale:
            self.push()
        self._remote.policy = f"{NAME}@{self._pushed}"
        return self._remote.sample(prompts, count=count, limits=limits)

    def push(self) -> None:
        """Hand the policy's weights over, between two answers and never within one."""
        began, version = time.monotonic(), self._version()
        self._post("pause", {"mode": "wait", "clear_cache": "true"})
        try:
            self._transfer.send_weights()
        except (RuntimeError, OSError, ValueError) as error:
            with suppress(EndpointError):  # a server that this has ended cannot go on, and that is not the reason
                self._post("resume", {})
            raise EndpointError(
                f"{self._control}: the weights after {version} updates could not be pushed "
                f"({type(error).__name__}: {error}). See the server's log; the run goes on from its last checkpoint"
            ) from error
        self._post("resume", {})
        self._pushed, self.push_seconds = version, time.monotonic() - began

    def close(self) -> None:
        """Let go of the connection that weights are pushed through."""
        self._transfer.shutdown()

    def _post(self, name: str, parameters: dict[str, str]) -> None:
        try:
            answer = httpx.post(f"{self._control}/{name}", params=parameters, timeout=self._timeout)
        except httpx.TransportError as error:
            raise EndpointError(f"{self._control}/{name}: {type(error).__name__}: {error}. Does it run?") from error
        if answer.status_code != 200:
            raise EndpointError(
                f"{self._control}/{name} answered HTTP {answer.status_code}: {answer.text[:300]}. vLLM takes it where "
                "it is started with VLLM_SERVER_DEV_MODE=1"
            )


class HubWeights:
    """The weights of a policy under the names of Hugging Face's format, in one order: what vLLM calls a WeightSource.

    Args:
        parameter: makes a description of (name, dtype, shape): vLLM's ParamMeta.
    """

    def __init__(self, model: LanguageModel, parameter: Callable[..., Any]) -> None:
        self._model, self._parameter = model, parameter

    def metadata(self) -> list[Any]:
        """Name, dtype and shape of all that iteration gives."""
        return [self._parameter(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self._model, Transformer):
            named = to_hub_names(self._model.state_dict(), self._model.config)
        else:
            named = self._model.hub_weights()
        for name, tensor in named:
            yield name, tensor.detach().contiguous()


@contextmanager
def open_vllm(
    config: Vllm, model: LanguageModel, tokenizer: Tokenizer, directory: Path, version: Callable[[], int], log: Path
) -> Iterator[VllmSampler]:
    """A server of the checkpoint in `directory` and a sampler that keeps its weights those of `model`.

    Raises UserError where vLLM is not installed, does not start (what its log says of it is shown), or the model's
    weights have no way to it.
    """
    if find_spec("vllm") is None:
        raise UserError(
            "this step samples with vLLM, which is not installed: pip install 'upweight[vllm]' on a machine with a "
            "CUDA GPU, or leave the step's `vllm` out to sample in this process"
        )
    _check_device(model)
    with _served(config, directory, log) as address:
        remote = RemoteSampler(
            f"{address}/v1",
            NAME,
            timeout_seconds=config.timeout_seconds,
            most_in_flight=config.most_in_flight,
            extra=REQUEST,
            tokenizer=tokenizer,
        )
        sampler = VllmSampler(
            remote,
            address,
            _connected(config, model, address, log),
            version,
            most_stale=config.most_stale,
            timeout_seconds=config.timeout_seconds,
        )
        try:
            yield sampler
        finally:
            sampler.close()


def _check_device(model: LanguageModel) -> None:
    if model.device.type != "cuda":
        raise UserError(
            f"the policy is on the device {model.device}, and vLLM takes new weights from a CUDA GPU only: run with "
            "--device cuda, or leave the step's `vllm` out to sample in this process"
        )


def command_of(config: Vllm, directory: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """The server's command line and what its environment has beside ours."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--weight-transfer-config", json.dumps({"backend": config.backend})]
    command += ["--logprobs-mode", "processed_logprobs", "--gpu-memory-utilization", str(config.memory_share)]
    # not the sampling parameters that a checkpoint's author recommends: what is not asked for would be changed unseen
    command += ["--generation-config", "vllm"]
    if config.context:
        command += ["--max-model-len", str(config.context)]
    added = {"VLLM_SERVER_DEV_MODE": "1"}
    if config.devices:
        added["CUDA_VISIBLE_DEVICES"] = config.devices
    if config.backend == "ipc":
        added["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles of GPU memory travel pickled, on this machine alone
    return [*command, *config.options], added


@contextmanager
def _served(config: Vllm, directory: Path, log: Path) -> Iterator[str]:
    """The address of a server that is ready; it is ended on the way out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, added = command_of(config, directory, port)
    address = f"http://127.0.0.1:{port}"
    with (
        log.open("wb") as written,
        subprocess.Popen(
            [sys.executable, "-P", guardian.__file__, *command],
            stdin=subprocess.PIPE,  # closed on the way out, or when this process dies: that ends the server
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**os.environ, **added},
            start_new_session=True,  # Ctrl-C is for this process to answer
        ) as process,
    ):
        _wait(process, address, config.start_seconds, log)
        try:
            yield address
        except EndpointError as error:
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_SECONDS)
            if process.returncode is None:
                raise
            raise EndpointError(
                f"vLLM has ended with exit code {process.returncode}; {log} says:\n{_reason(log)}"
            ) from error


def _wait(process: subprocess.Popen[bytes], address: str, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UserError(
                f"vLLM ended with exit code {process.returncode} before it was ready; {log} says:\n{_reason(log)}"
            )
        try:
            if httpx.get(f"{address}/health", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise UserError(f"vLLM was not ready within {seconds:g} s: see {log}, or raise start_seconds")


def _reason(log: Path) -> str:
    """What a server's log says of its end: from the first exception on, since each of its processes reports that the
    one below it has failed; the last lines where there is none."""
    lines = log.read_text(errors="replace").splitlines()
    first = next((number for number, line in enumerate(lines) if _RAISED.search(line)), len(lines) - LOG_LINES)
    return "\n".join(lines[max(0, first) :][:LOG_LINES])


def _connected(config: Vllm, model: LanguageModel, address: str, log: Path) -> Transfer:
    try:
        return _transfer(config, model, address)
    except (RuntimeError, OSError, ValueError, httpx.HTTPError) as error:
        raise UserError(
            f"vLLM runs, but no way for weights could be opened to it ({type(error).__name__}: {error}); see {log}. "
            f"The backend is {config.backend!r}: 'nccl' needs GPUs of the server's own, named by `devices`, and 'ipc' "
            "the trainer's GPU"
        ) from error


def _transfer(config: Vllm, model: LanguageModel, address: str) -> Transfer:
    """vLLM's own engine for the trainer's side, with our weights as its source."""
    from vllm.distributed import weight_transfer as theirs

    # theirs asks whether a source is one of its own class
    source = type("Source", (HubWeights, theirs.WeightSource), {})(model, theirs.ParamMeta)
    if config.backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        start = IPCTrainerInitInfo(rank=0, packed=True)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        workers = httpx.get(f"{address}/get_world_size", timeout=config.timeout_seconds).json()["world_size"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start = NCCLTrainerInitInfo(
            master_address="127.0.0.1", master_port=port, world_size=workers + 1, rank=0, packed=True
        )
    client = theirs.HTTPVLLMWeightSyncClient(address, timeout=config.timeout_seconds)
    engine: Transfer = theirs.WeightTransferTrainerFactory.trainer_init(init_info=start, client=client, source=source)
    return engine
