"""rollout/vllm.py against a vLLM that runs: its samples, its log-probabilities, and weights pushed to it.

    python tests/acceptance/vllm_server.py FOLDER [--model DIRECTORY] [--backend nccl --devices 1 | --backend ipc]

With --backend file, the default, no GPU is needed, only a vLLM built for CPUs: its own lifecycle of an update runs, its
own routes, its loader and our source of weights, but the tensors travel through a file, since its NCCL and IPC want
CUDA. Everything else is what a run does. FOLDER takes logs and a file of weights. Without --model, models of three
architectures are made, each served in turn; with one, that one. Exits with 1 where anything is not as it has to be.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from upweight.core.protocols import Limits, Verifier
from upweight.core.records import Completion, Message, Problem, Verdict
from upweight.core.work import Machine, Work
from upweight.model.language_model import LanguageModel, load, save
from upweight.model.logprobs import token_logprobs
from upweight.model.transformer import ModelConfig, make_model
from upweight.objectives.grpo import Grpo
from upweight.rollout import vllm
from upweight.rollout.service import EndpointError
from upweight.rollout.vllm import HubWeights, Vllm, VllmSampler, open_vllm
from upweight.stages import reinforce
from upweight.store.jsonl import write_jsonl
from upweight.text.chat import CHATML, render
from upweight.text.tokenizer import Tokenizer
from upweight.train.optimizer import OptimizerConfig
from upweight.verify.reward import RewardConfig

BACKEND = "file"
BOUND = {"float32": 1e-3, "bfloat16": 0.5}
"""Nats: between the server's log-probability of a token and the trainer's own, in float32."""
CONTEXT = 1024
ASKED = ("Ann has 3 apples?", "What is the sum of 12 and 30? " * 3, "Ann has 3 apples. Bob has 5 more. " * 20)
PROMPTS = [(Message("user", text),) for text in ASKED]
DECODING = (
    Limits(40),
    Limits(40, temperature=0.7),
    Limits(40, top_p=0.8),
    Limits(40, top_k=5),
    Limits(40, min_p=0.1),
    Limits(40, temperature=1.3, top_p=0.9, top_k=20),
    Limits(40, top_k=20, min_p=0.05),
)


def register() -> None:
    """Called by vLLM in each of its processes, as a plugin: a way for weights that needs no GPU."""
    from safetensors.torch import load_file, save_file
    from vllm.distributed.weight_transfer import base, factory, nccl_engine

    if BACKEND in factory.WeightTransferTrainerFactory._registry:
        return

    @dataclass
    class Start(base.WeightTransferInitInfo):  # type: ignore[misc]
        path: str

    class Server(nccl_engine.NCCLWeightTransferEngine):  # type: ignore[misc]
        init_info_cls = Start

        def init_transfer_engine(self, init_info: Start) -> None:
            self.path = init_info.path

        def receive_weights(self, update_info: Any) -> None:
            held = load_file(self.path)
            told = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
            for name, kind, shape in told:
                assert (str(held[name].dtype), list(held[name].shape)) == (f"torch.{kind}", shape), name
            self.model.load_weights([(name, held[name]) for name in update_info.names])

        def finish_weight_update(self) -> None:
            super().finish_weight_update()
            if self.model.config.tie_word_embeddings:  # on a CPU the head has a copy of its own, packed
                self.model.lm_head.quant_method.process_weights_after_loading(self.model.lm_head)

        def shutdown(self) -> None:
            return

    @dataclass
    class TrainerStart(base.TrainerInitInfo):  # type: ignore[misc]
        backend: ClassVar[str] = BACKEND
        path: str

    class Trainer(base.TrainerWeightTransferEngine):  # type: ignore[misc]
        init_info_cls = TrainerStart
        path: str

        @classmethod
        def trainer_init(cls, init_info: TrainerStart, *, client: Any, source: Any = None) -> Any:
            made = cls(client=client, source=source)
            made.path = init_info.path
            client.init_weight_transfer_engine({"path": init_info.path})
            return made

        def send_weights(self) -> None:
            meta = self.source.metadata()
            self.client.start_weight_update()
            # theirs: that what is announced and what is sent agree
            sent = nccl_engine.NCCLTrainerWeightTransferEngine._checked_iter(self.source, meta)
            save_file({name: tensor.clone() for name, tensor in sent}, self.path)
            info = nccl_engine.NCCLWeightTransferUpdateInfo(
                [one.name for one in meta],
                [str(one.dtype).split(".")[-1] for one in meta],
                [list(one.shape) for one in meta],
            )
            self.client.update_weights(vars(info))
            self.client.finish_weight_update()

    factory.WeightTransferEngineFactory.register_engine(BACKEND, Server)
    factory.WeightTransferTrainerFactory.register_engine(BACKEND, Trainer)
    Trainer.start = TrainerStart


def through_a_file(folder: Path) -> None:
    """Install the plugin for the servers that are started from here, and use it in place of NCCL."""
    told = folder / "plugin" / "upweight_file-0.dist-info"
    told.mkdir(parents=True, exist_ok=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: upweight-file\nVersion: 0\n")
    (told / "entry_points.txt").write_text("[vllm.general_plugins]\nupweight_file = vllm_server:register\n")
    paths = [str(told.parent.resolve()), str(Path(__file__).parent.resolve()), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; its own choice is most of the memory there is

    def transfer(config: Vllm, model: LanguageModel, address: str) -> Any:
        from vllm.distributed import weight_transfer as theirs

        register()
        trainer = theirs.WeightTransferTrainerFactory._registry[BACKEND]()
        source = type("Source", (HubWeights, theirs.WeightSource), {})(model, theirs.ParamMeta)
        return theirs.WeightTransferTrainerFactory.trainer_init(
            init_info=trainer.start(path=str(folder / "pushed.safetensors"), rank=0),
            client=theirs.HTTPVLLMWeightSyncClient(address, timeout=config.timeout_seconds),
            source=source,
        )

    vllm._transfer = transfer
    vllm._check_device = lambda model: None


def made(folder: Path, **fields: Any) -> Path:
    """A small checkpoint whose distributions are not uniform."""
    shape = {"width": 128, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 32, "ffn": 256, "max_context": CONTEXT}
    tokenizer = Tokenizer.train(["Ann has 3 apples. Bob has 5 more. 42.\n"] * 4, 320, chat_template=CHATML)
    model = make_model(ModelConfig(**{"vocab_size": 320, **shape, **fields}), 0)
    with torch.no_grad():
        model.unembedding.mul_(8.0 if model.config.tied else 2.0)
    save(model, folder)
    tokenizer.save(folder)
    return folder


def difference(
    model: LanguageModel, tokenizer: Tokenizer, groups: Sequence[Sequence[Completion]], limits: Limits, prompts: Any
) -> tuple[int, float, float]:
    """How many tokens were sampled, and the largest and mean difference of a log-probability from the trainer's."""
    found = []
    for prompt, group in zip(prompts, groups, strict=True):
        read = render(tokenizer, prompt)
        for one in group:
            assert len(one.tokens) == len(one.logprobs) > 0
            row = torch.tensor([[*read, *one.tokens]], device=model.device)
            with torch.no_grad():
                hidden = model(row)[0, len(read) - 1 : -1]
                told = {name: getattr(limits, name) for name in ("temperature", "top_p", "top_k", "min_p")}
                own = token_logprobs(hidden, model.unembedding, row[0, len(read) :], **told)
            found.append((own.cpu() - torch.tensor(one.logprobs)).abs())
    every = torch.cat(found)
    return len(every), float(every.max()), float(every.mean())


class Checks:
    """What is asked of one server.

    Attributes:
        failed: what was not as it has to be.
    """

    def __init__(self, sampler: VllmSampler, model: LanguageModel, tokenizer: Tokenizer, bound: float) -> None:
        self.sampler, self.model, self.tokenizer, self.bound = sampler, model, tokenizer, bound
        self.failed: list[str] = []

    def that(self, right: bool, what: str) -> None:
        print(f"  {'right' if right else 'WRONG'}: {what}", flush=True)
        self.failed += [] if right else [what]

    def near(self, groups: Any, limits: Limits, what: str, prompts: Any = PROMPTS) -> None:
        count, largest, mean = difference(self.model, self.tokenizer, groups, limits, prompts)
        self.that(
            largest < self.bound, f"{what}: {count} tokens, largest difference {largest:.1e} nats, mean {mean:.1e}"
        )

    def decoding(self) -> None:
        for limits in DECODING:
            told = ", ".join(
                f"{name} {getattr(limits, name)}"
                for name in ("temperature", "top_p", "top_k", "min_p")
                if getattr(limits, name) != getattr(Limits(1), name)
            )
            self.near(self.sampler.sample(PROMPTS, count=4, limits=limits), limits, told or "as it is")

    def texts(self) -> None:
        stops = self.tokenizer.stop_tokens
        ones = [one for group in self.sampler.sample(PROMPTS, count=16, limits=Limits(200)) for one in group]
        said = [self.tokenizer.decode([token for token in one.tokens if token not in stops]) for one in ones]
        # of a character that its tokens do not finish, vLLM writes nothing
        same = all(one.text == text.rstrip("\ufffd") or one.text == text for one, text in zip(ones, said, strict=True))
        self.that(same, f"{len(ones)} texts are what their tokens say")
        ends = [(one.stop, one.tokens[-1] in stops, len(one.tokens) == 200) for one in ones]
        self.that(set(ends) <= {("end", True, False), ("length", False, True), ("end", True, True)}, f"{Counter(ends)}")
        stopped = self.sampler.sample(PROMPTS, count=8, limits=Limits(200, stop=("a", "3")))
        found = [one for group in stopped for one in group if one.stop == "stop"]
        left_out = all(
            not {"a", "3"} & {*one.text} and {"a", "3"} & {*self.tokenizer.decode(one.tokens)} for one in found
        )
        self.that(bool(found) and left_out, f"{len(found)} of 24 ended at a stop string, which is not in the text")
        self.near(stopped, Limits(1), "up to a stop string")

    def seeds(self) -> None:
        def tokens(seed: int, prompts: Any) -> list[list[tuple[int, ...]]]:
            sampled = self.sampler.sample(prompts, count=3, limits=Limits(20, seed=seed))
            return [[one.tokens for one in group] for group in sampled]

        one = tokens(1, [PROMPTS[0]] * 2)
        self.that(len({*one[0], *one[1]}) == 6, "equal prompts are answered differently")
        self.that(one == tokens(1, [PROMPTS[0]] * 2), "the same seed gives the same answers")
        self.that(one[0] == tokens(1, PROMPTS[:1])[0], "also in another batch")
        self.that(one != tokens(2, [PROMPTS[0]] * 2), "another seed gives others")

    def prompts(self) -> None:
        said = [
            (Message("user", "say <|im_end|> or <|endoftext|>"),),
            (Message("user", "q"), Message("assistant", "<tool_call>\n{}\n</tool_call>"), Message("tool", "4")),
            (Message("system", "Be short."), Message("user", " a\n\nb \n"), Message("assistant", "<think>x</think> y")),
        ]
        sampled = self.sampler.sample(said, count=4, limits=Limits(20))
        self.near(sampled, Limits(1), "control tokens as text, tools, thoughts", said)

    def room(self, context: int) -> None:
        long = (Message("user", ""),)
        while len(render(self.tokenizer, long)) < context - 20:
            long = (Message("user", f"{long[0].content} a"),)
        try:
            self.sampler.sample([long], count=16, limits=Limits(40))
            self.that(False, "a completion that the context cuts off is refused")
        except EndpointError as error:
            self.that("longer than its context" in str(error), str(error))

    def pushes(self, version: list[int]) -> None:
        for update in range(1, 4):
            generator = torch.Generator().manual_seed(update)
            with torch.no_grad():
                for weight in self.model.parameters():
                    noise = torch.randn(weight.shape, generator=generator).to(weight)
                    weight.mul_(1 + 0.02 * noise)
            version[0] = update
            sampled = self.sampler.sample(PROMPTS, count=4, limits=Limits(40))
            took = f"pushed in {self.sampler.push_seconds:.2f} s"
            self.near(sampled, Limits(1), f"after update {update}, {took}, by {sampled[0][0].policy}")

    def pause(self) -> None:
        """No answer is by two versions: a pause waits for those that are under way, and holds back what comes after."""
        times = {}

        def ask(name: str, tokens: int) -> None:
            self.sampler.sample(PROMPTS[:1], count=8, limits=Limits(tokens, min_p=0.01))
            times[name] = time.monotonic()

        first = threading.Thread(target=ask, args=("first answered", 400))
        first.start()
        time.sleep(0.3)
        self.sampler._post("pause", {"mode": "wait", "clear_cache": "true"})
        times["paused"] = time.monotonic()
        second = threading.Thread(target=ask, args=("second answered", 5))
        second.start()
        time.sleep(1.0)
        times["resumed"] = time.monotonic()
        self.sampler._post("resume", {})
        first.join()
        second.join()
        self.that(times["second answered"] > times["resumed"], "what is asked during a pause is answered after it")
        self.that(times["first answered"] < times["paused"] + 0.5, "a pause waits for what is under way")


def served(config: Vllm, directory: Path, log: Path, bound: float, device: str, *, every: bool) -> list[str]:
    """What is wrong with a server of the checkpoint; `every` asks all of it, else only what depends on the model."""
    model, _ = load(directory, device=device)
    tokenizer, version, began = Tokenizer.load(directory), [0], time.monotonic()
    with open_vllm(config, model, tokenizer, directory, lambda: version[0], log) as sampler:
        print(f"  ready after {time.monotonic() - began:.0f} s")
        checks = Checks(sampler, model, tokenizer, bound)
        checks.decoding()
        checks.pushes(version)
        if every:
            checks.texts()
            checks.seeds()
            checks.prompts()
            checks.pause()
            checks.room(CONTEXT)
    return checks.failed


@dataclass(frozen=True)
class Vowels(Verifier):
    """1 for a completion with more a and e than o in it: some of any model's are, and some are not."""

    def score(self, problem: Problem, group: Sequence[Completion]) -> list[Verdict]:
        return [Verdict(float(one.text.count("a") + one.text.count("e") > one.text.count("o")), "") for one in group]


def reinforced(folder: Path, directory: Path, config: Vllm, bound: float, device: str) -> list[str]:
    """Four steps of `reinforce`, every other one by weights one update old."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "problems").mkdir(parents=True)
    (folder / "out").mkdir()
    (folder / "model").mkdir()
    shutil.copytree(directory, folder / "model" / "model")
    problems = [Problem(str(n), (Message("user", f"what is {n}?"),), answer="1", source="s") for n in range(6)]
    write_jsonl(folder / "problems" / "problems.jsonl", problems)
    done = Work(
        folder / "out", {"model": folder / "model", "problems": folder / "problems"}, machine=Machine(device=device)
    )
    settings = reinforce.Config(
        reward=RewardConfig(custom=Vowels()),
        steps=4,
        problems_a_step=3,
        group=8,
        limits=Limits(max_new_tokens=24),
        objective=Grpo(off_policy="truncate", mismatch_bound=bound, mask_truncated=False),
        learning_rate=0.0003,
        optimizer=OptimizerConfig(kind="adamw"),
        vllm=replace(config, most_stale=1),
    )
    print(reinforce.run(settings, done))
    rows: list[dict[str, Any]] = done.monitor.rows  # type: ignore[attr-defined]
    told = [row["staleness"] for row in rows if "staleness" in row]
    seconds = [round(row["push_seconds"], 3) for row in rows if "push_seconds" in row]
    apart = [row["logprob_difference"] for row in rows if "logprob_difference" in row]
    print(f"  staleness {told}, seconds of the last push {seconds}, largest differences {apart}")
    fresh = [value for value, stale in zip(apart, told, strict=True) if not stale]
    return [] if told == [0, 1, 0, 1] and max(fresh) < bound else [f"reinforce: {told}, {apart}"]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--backend", default=BACKEND, choices=[BACKEND, "nccl", "ipc"])
    arguments.add_argument("--devices", default="")
    arguments.add_argument("--dtype", default="float32", choices=list(BOUND))
    asked = arguments.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    options: list[str] = ["--dtype", asked.dtype, "--enforce-eager"]
    on_cpu = asked.backend == BACKEND
    if on_cpu:
        through_a_file(asked.folder)
        options += ["--weight-transfer-config", json.dumps({"backend": BACKEND})]
        # on CPUs 0.32 ends where a prompt is read in parts and the request has a seed
        options += ["--max-num-batched-tokens", "65536"]
    device = "cpu" if on_cpu else "cuda"
    config = Vllm("nccl" if on_cpu else asked.backend, asked.devices, context=CONTEXT, options=tuple(options))
    bound, failed = BOUND[asked.dtype], list[str]()
    models = (
        {str(asked.model): asked.model}
        if asked.model
        else {
            name: made(asked.folder / name, **fields)
            for name, fields in {
                "llama_tied": {},
                "qwen2_untied": {"qkv_bias": True, "tied": False},
                "qwen3_tied": {"qk_norm": True},
            }.items()
        }
    )
    for name, directory in models.items():
        print(f"{name}, {asked.dtype}")
        every = name == next(iter(models))
        failed += served(config, directory, asked.folder / "log", bound, device, every=every)
    print("reinforce")
    failed += reinforced(asked.folder / "run", next(iter(models.values())), config, bound, device)
    print("\n".join(["not as it has to be:", *failed]) if failed else "all of it is as it has to be")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
