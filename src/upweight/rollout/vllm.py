"""vLLM as the sampler of a policy in training: its own process, and the new weights pushed to it as training goes on.

Written for vLLM 0.28 to 0.32, the optional extra `upweight[vllm]`. Sampling goes through vLLM's OpenAI interface
(remote.py), weights through its own weight-transfer interface: the trainer's engine of vllm.distributed.weight_transfer
drives start, update and finish on the server and moves the tensors by NCCL, or by CUDA IPC where both processes share a
GPU. In-flight answers end first (`/pause?mode=wait`), so that every completion comes from one version of the weights.

vLLM is asked for log-probabilities after temperature and truncation (`--logprobs-mode processed_logprobs`) and for the
token ids. It rounds otherwise than the trainer does: give the objective `off_policy="truncate"` and a `mismatch_bound`
that fits, some tenths of a nat in bfloat16.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from upweight.rollout.remote import RemoteSampler
from upweight.rollout.service import EndpointError

NAME = "policy"
LOG_LINES = 15
"""Of the server's log, shown where it does not start."""


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
            try:
                self._transfer.send_weights()
            except (RuntimeError, OSError, ValueError) as error:
                raise EndpointError(
                    f"{self._control}: the weights after {version} updates could not be pushed "
                    f"({type(error).__name__}: {error}). See the server's log; the run goes on from its last checkpoint"
                ) from error
        finally:
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
            named = self._model.model.named_parameters()
        for name, tensor in named:
            yield name, tensor.detach().contiguous()


@contextmanager
def open_vllm(
    config: Vllm, model: LanguageModel, directory: Path, version: Callable[[], int], log: Path
) -> Iterator[VllmSampler]:
    """A server of the checkpoint in `directory` and a sampler that keeps its weights those of `model`.

    Raises UserError where vLLM is not installed or does not start; the end of its log is shown.
    """
    if find_spec("vllm") is None:
        raise UserError(
            "this step samples with vLLM, which is not installed: pip install 'upweight[vllm]' on a machine with a "
            "CUDA GPU, or leave the step's `vllm` out to sample in this process"
        )
    with _served(config, directory, log) as address:
        remote = RemoteSampler(
            f"{address}/v1",
            NAME,
            timeout_seconds=config.timeout_seconds,
            most_in_flight=config.most_in_flight,
            extra={"return_token_ids": True},
        )
        sampler = VllmSampler(
            remote,
            address,
            _transfer(config, model, address),
            version,
            most_stale=config.most_stale,
            timeout_seconds=config.timeout_seconds,
        )
        try:
            yield sampler
        finally:
            sampler.close()


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
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT, env={**os.environ, **added}
        )
        try:
            _wait(process, address, config.start_seconds, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], address: str, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise UserError(f"vLLM ended with exit code {process.returncode} before it was ready; {log} says:\n{said}")
        try:
            if httpx.get(f"{address}/health", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise UserError(f"vLLM was not ready within {seconds:g} s: see {log}, or raise start_seconds")


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
