"""vLLM's side is played by `upweight serve` with vLLM's routes for pausing beside it: what is asked of a server and
when, how far its weights lag, and that served log-probabilities are the trainer's. vLLM itself is asked by
tests/acceptance/vllm_server.py.
"""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from upweight.app.engine import Engine
from upweight.app.serve import ServeConfig, make_app
from upweight.core.errors import Refusal, UserError
from upweight.core.protocols import Limits
from upweight.core.records import Message
from upweight.model import language_model
from upweight.model.transformer import ModelConfig, Transformer, make_model
from upweight.model.weights import from_hub_names, load, save
from upweight.objectives.grpo import Grpo
from upweight.rollout import guardian, vllm
from upweight.rollout.remote import RemoteSampler
from upweight.rollout.service import EndpointError
from upweight.rollout.vllm import HubWeights, Vllm, VllmSampler, command_of, open_vllm
from upweight.text.chat import CHATML, render
from upweight.text.tokenizer import Tokenizer

ASK = (Message("user", "Ann has 3 apples?"),)
TOKENIZER = Tokenizer.train(["Ann has 3 apples. Bob has 5 more."], 300, chat_template=CHATML)
SHAPE = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, width=16, layers=1, heads=2, kv_heads=1, head_size=8, ffn=32, max_context=512
)


class Server:
    """`upweight serve` with /pause and /resume; `events` holds what was asked for, in order."""

    def __init__(self) -> None:
        self.model = make_model(SHAPE, 0)
        self.events: list[Any] = []
        self.refuses = self.stuck = False
        app = FastAPI()

        @app.post("/pause")
        async def pause(request: Request) -> Any:
            self.events.append(("pause", dict(request.query_params)))
            if self.refuses:
                from fastapi.responses import JSONResponse

                return JSONResponse({"detail": "Not Found"}, 404)
            return {}

        @app.post("/resume")
        async def resume() -> Any:
            self.events.append("resume")
            if self.stuck:
                from fastapi.responses import JSONResponse

                return JSONResponse({"error": "EngineCore encountered an issue"}, 500)
            return {}

        app.mount("/", make_app(Engine(self.model, TOKENIZER, rows=4), vllm.NAME, ServeConfig(concurrent=64)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.address = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()


class Push:
    """Hands a policy's weights to the server by the names of Hugging Face's format, as vLLM's engine would."""

    def __init__(self, policy: Transformer, server: Server) -> None:
        self.policy, self.server, self.fails, self.closed = policy, server, False, False

    def send_weights(self) -> None:
        self.server.events.append("send")
        if self.fails:
            raise RuntimeError("NCCL gave up")
        sent = dict(HubWeights(self.policy, SimpleNamespace))
        wanted = {name: tensor.shape for name, tensor in self.server.model.state_dict().items()}
        self.server.model.load_state_dict(from_hub_names(sent, SHAPE, wanted, torch.float32))

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def sampler_of(server: Server, policy: Transformer, version: list[int], most_stale: int = 0) -> VllmSampler:
    remote = RemoteSampler(
        f"{server.address}/v1", vllm.NAME, pause_seconds=0.01, extra=vllm.REQUEST, tokenizer=TOKENIZER
    )
    return VllmSampler(remote, server.address, Push(policy, server), lambda: version[0], most_stale=most_stale)


def test_served_logprobs_are_the_trainers_after_a_push(server: Server) -> None:
    policy, version = make_model(SHAPE, 5), [0]
    limits = Limits(12, temperature=0.8, top_k=20, seed=3)
    (group,) = sampler_of(server, policy, version).sample([ASK], count=4, limits=limits)
    assert {one.policy for one in group} == {"policy@0"}
    assert all(len(one.logprobs) == len(one.tokens) > 0 for one in group)
    prompt = tuple(render(TOKENIZER, ASK))
    objective = Grpo(temperature=0.8, top_k=20, mismatch_bound=1e-3)
    whole = [one for one in group if not one.truncated] or [group[0]]
    items = [(prompt, type(one)(one.tokens, one.logprobs, one.text, "end", one.policy), 1.0) for one in whole]
    (batch,) = objective.batches(items, row_tokens=500)
    assert float(objective(policy, batch).maxima["logprob_difference"]) < 1e-3  # or it would have been refused


def test_a_server_that_samples_from_other_weights_than_it_was_given_is_noticed(server: Server) -> None:
    policy = make_model(SHAPE, 5)
    sampler = sampler_of(server, policy, [0])
    sampler._transfer.send_weights = lambda: None  # type: ignore[method-assign]
    with torch.no_grad():
        server.model.norm.weight.mul_(6)  # its log-probabilities are plausible, and those of another model
    group = sampler.sample([ASK], count=4, limits=Limits(12, seed=3))[0]
    items = [
        (tuple(render(TOKENIZER, ASK)), type(one)(one.tokens, one.logprobs, one.text, "end", one.policy), 1.0)
        for one in group
    ]
    (batch,) = Grpo().batches(items, row_tokens=500)
    with pytest.raises(Refusal, match="with the same weights and precision"):
        Grpo()(policy, batch)


def test_weights_are_pushed_before_they_are_too_old_and_never_within_an_answer(server: Server) -> None:
    policy, version = make_model(SHAPE, 1), [0]
    sampler = sampler_of(server, policy, version, most_stale=1)
    push = ["send", "resume"]
    pause = ("pause", {"mode": "wait", "clear_cache": "true"})
    sampler.sample([ASK], count=1, limits=Limits(2))
    assert server.events == [pause, *push]  # the first time always: what the server holds is not known
    assert sampler.staleness == 0
    version[0] = 1
    (group,) = sampler.sample([ASK], count=1, limits=Limits(2))
    assert len(server.events) == 3  # one update behind is allowed
    assert sampler.staleness == 1
    assert group[0].policy == "policy@0"
    version[0] = 2
    (group,) = sampler.sample([ASK], count=1, limits=Limits(2))
    assert server.events == [pause, *push] * 2
    assert group[0].policy == "policy@2"
    assert sampler.push_seconds > 0
    sampler.close()
    assert sampler._transfer.closed  # type: ignore[attr-defined]


def test_a_push_that_fails_ends_the_run_and_leaves_the_server_answering(server: Server) -> None:
    sampler = sampler_of(server, make_model(SHAPE, 1), [4])
    sampler._transfer.fails = True  # type: ignore[attr-defined]
    with pytest.raises(EndpointError, match=r"after 4 updates could not be pushed \(RuntimeError: NCCL gave up\)"):
        sampler.sample([ASK], count=1, limits=Limits(2))
    assert server.events[-1] == "resume"
    server.stuck = True  # a server that the push has ended: what it says of that is not the reason
    with pytest.raises(EndpointError, match=r"could not be pushed \(RuntimeError: NCCL gave up\)"):
        sampler.sample([ASK], count=1, limits=Limits(2))
    server.refuses = True
    with pytest.raises(EndpointError, match=r"answered HTTP 404.*VLLM_SERVER_DEV_MODE=1"):
        sampler.sample([ASK], count=1, limits=Limits(2))
    gone = VllmSampler(RemoteSampler("http://127.0.0.1:9/v1", "x"), "http://127.0.0.1:9", sampler._transfer, lambda: 0)
    with pytest.raises(EndpointError, match="Does it run"):
        gone.sample([ASK], count=1, limits=Limits(2))


def test_weights_by_the_names_of_hugging_face(tmp_path: Path) -> None:
    model = make_model(SHAPE, 0)
    source = HubWeights(model, lambda name, dtype, shape: (name, dtype, shape))
    given = list(source)
    assert source.metadata() == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in given]
    save(model, tmp_path)
    again, _ = load(tmp_path)
    assert {name for name, _ in given} == {name for name, _ in HubWeights(again, SimpleNamespace)}
    assert "model.layers.0.self_attn.q_proj.weight" in dict(given)


def test_weights_of_a_wrapped_model_by_the_names_of_its_checkpoint(tmp_path: Path) -> None:
    # held in one tensor, stored one by one
    shape: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3MoeConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, **heads, **shape)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "theirs")
    model, _ = language_model.load(tmp_path / "theirs")
    given = dict(HubWeights(model, SimpleNamespace))
    language_model.save(model, tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert given.keys() == stored.keys()
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in given
    assert all(torch.equal(given[name], stored[name]) for name in stored)


def test_the_command(tmp_path: Path) -> None:
    command, added = command_of(Vllm(devices="1", context=4096, options=("--enforce-eager",)), tmp_path, 8123)
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    told = dict(zip(command[3::2], command[4::2], strict=False))
    assert told["--weight-transfer-config"] == '{"backend": "nccl"}'
    assert told["--logprobs-mode"] == "processed_logprobs"
    assert told["--max-model-len"] == "4096"
    assert told["--generation-config"] == "vllm"  # nothing that a checkpoint's author recommends is mixed in
    assert command[-1] == "--enforce-eager"
    assert added == {"VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": "1"}
    assert command_of(Vllm("ipc"), tmp_path, 1)[1]["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    with pytest.raises(UserError, match="memory_share"):
        Vllm(memory_share=1.5)


def test_without_vllm_or_with_one_that_dies_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(SHAPE, 0)
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)

    def opened() -> Any:
        return open_vllm(Vllm(), model, TOKENIZER, tmp_path, lambda: 0, tmp_path / "log")

    with pytest.raises(UserError, match=r"pip install 'upweight\[vllm\]'"):
        opened().__enter__()
    monkeypatch.setattr(vllm, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"on the device cpu.*--device cuda"):
        opened().__enter__()
    monkeypatch.setattr(vllm, "_check_device", lambda model: None)
    dies = [sys.executable, "-c", "print('no GPU here'); raise SystemExit(3)"]
    monkeypatch.setattr(vllm, "command_of", lambda config, directory, port: (dies, {}))
    with pytest.raises(UserError, match=r"exit code 3 before it was ready.*\n.*no GPU here"):
        opened().__enter__()
    assert "Fatal Python error" not in (tmp_path / "log").read_text()  # of whoever watches over the server


def test_of_a_server_that_fails_the_first_exception_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    failed = [
        "(APIServer pid=1) WARNING 11-27 03:11:42 [a.py:2] this can cause errors like `OSError: [Errno 24]`",
        "(Worker pid=3) ERROR 11-27 03:13:38 [b.py:1063] Traceback (most recent call last):",
        "(Worker pid=3) ERROR 11-27 03:13:38 [b.py:1063] torch.OutOfMemoryError: CUDA out of memory.",
        *["(EngineCore pid=2) ERROR 11-27 03:13:38 [c.py:1512]   File"] * 40,
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    log.write_text("\n".join(failed))
    assert vllm._reason(log).splitlines() == failed[2 : 2 + vllm.LOG_LINES]
    log.write_text("usage: api_server.py\napi_server.py: error: argument --dtype: invalid choice\n")
    assert vllm._reason(log).endswith("invalid choice")


READY = """
import http.server, os, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        print("[core.py:1] ValueError: weights of another shape", flush=True)
        os._exit(7)
    def log_message(self, *told):
        pass
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), worker.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A server that has a process of its own and ends at the first POST."""


def ready(config: Vllm, directory: Path, port: int) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-c", READY, str(port)], {}


def gone(pids: list[int]) -> bool:
    """Whether none of these processes runs any more, within a few seconds."""
    for _ in range(200):
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if not any(state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z" for state in states):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_a_server_ends_with_all_of_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "command_of", ready)
    log = tmp_path / "log"
    with vllm._served(Vllm(), tmp_path, log):
        pids = [int(pid) for pid in log.read_text().split()]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    assert gone(pids)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_a_server_does_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = """
import subprocess, sys
with open(sys.argv[1], "wb") as log:
    subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, stdout=log).wait()
"""
    watched = [sys.executable, "-P", guardian.__file__, sys.executable, "-c", READY, "0"]
    with subprocess.Popen([sys.executable, "-c", run, str(log), *watched]) as process:
        while not (log.exists() and log.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert gone([int(pid) for pid in log.read_text().split()])


def test_where_the_server_has_ended_its_log_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "command_of", ready)
    with (
        pytest.raises(EndpointError, match=r"ended with exit code 7; .*log says:\n.*ValueError: weights of another"),
        vllm._served(Vllm(), tmp_path, tmp_path / "log") as address,
    ):
        RemoteSampler(f"{address}/v1", "policy", attempts=1).sample([ASK], count=1, limits=Limits(2))


def test_where_no_way_for_weights_can_be_opened_both_ways_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: Vllm, model: Any, address: str) -> Any:
        raise RuntimeError("Duplicate GPU detected")

    monkeypatch.setattr(vllm, "_transfer", fails)
    with pytest.raises(UserError, match=r"Duplicate GPU detected.*log.*'nccl'.*`devices`"):
        vllm._connected(Vllm(), make_model(SHAPE, 0), "http://127.0.0.1:9", tmp_path / "log")
