"""pretrain: FG-WSD on the token pools, from scratch or on from a checkpoint; the mixture changes inside one run.

Held-out documents of every pool are measured in bits per byte at the end, and the tokens that were consumed are set
against the tokens that the timeline asked for, by phase and source.
"""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from upweight.core.errors import UserError
from upweight.core.records import Document
from upweight.core.work import Estimate, Machine, Summary, Work
from upweight.model.config import USUAL_ROPE_BASE, ModelConfig
from upweight.model.language_model import LanguageModel, fingerprint, load, save
from upweight.model.logprobs import token_logprobs
from upweight.model.transformer import make_model
from upweight.objectives.next_token import NextToken
from upweight.store.jsonl import read_jsonl
from upweight.store.shards import Shards
from upweight.text.tokenizer import Tokenizer
from upweight.train.checkpoint import CheckpointConfig, discard
from upweight.train.loader import MixtureLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import Phase, Timeline
from upweight.train.trainer import ends, train
from upweight.train.watch import watched

ALL_PROCESSES = True


@dataclass(frozen=True)
class Shape:
    """The backbone, but for the vocabulary, which comes with the tokenizer, and RoPE, which comes with the timeline."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 384
    head_size: int = 0
    tied: bool = True
    qk_norm: bool = False


@dataclass(frozen=True)
class Config:
    """Attributes:
    phases: the timeline; mixtures name the pools of the input "shards".
    shape: the model to make; not used where the input "init" gives a checkpoint to go on from.
    batch_tokens: tokens of one optimizer step, over all processes.
    microbatch_tokens: tokens of one forward pass; the loss does not depend on it.
    epochs: how often a pool may be repeated before the run is refused.
    save_every_steps: how often the run can be taken up again after a kill.
    dtype: of the matrix products: "float32", or "bfloat16" where the device has it.
    """

    phases: tuple[Phase, ...]
    shape: Shape = Shape()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    z_loss: float = 0.0
    batch_tokens: int = 4096
    microbatch_tokens: int = 4096
    epochs: float = 4.0
    save_every_steps: int = 50
    dtype: str = "float32"


def run(config: Config, work: Work) -> Summary:
    """Write `model/` (Hugging Face format, with tokenizer) and the metrics of every step."""
    shards = work.inputs["shards"]
    tokenizer = Tokenizer.load(shards / "tokenizer")
    timeline = Timeline(config.phases)
    model = _start(config, work, tokenizer, timeline)
    pools = {
        folder.name: Shards.open(folder, vocab_size=tokenizer.vocab_size)
        for folder in sorted((shards / "shards").iterdir())
    }
    loader = MixtureLoader(
        pools,
        timeline,
        seed=work.seed,
        batch_tokens=config.batch_tokens,
        microbatch_tokens=config.microbatch_tokens,
        most_epochs=config.epochs,
    )
    reports = train(
        model,
        objective=NextToken(z_loss=config.z_loss),
        loader=loader,
        timeline=timeline,
        optimizer=config.optimizer,
        machine=work.machine,
        checkpoint=CheckpointConfig(work.out / "checkpoints", every_steps=config.save_every_steps),
        dtype=config.dtype,
    )
    for _ in watched(
        reports,
        work.monitor,
        "pretrain",
        total=timeline.tokens,
        unit="tokens",
        machine=work.machine,
        dtype=config.dtype,
    ):
        pass
    save(model, work.out / "model")
    tokenizer.save(work.out / "model")
    _, last = ends(work.out / "checkpoints")
    summary = {
        "parameters": model.config.parameter_count(),
        "steps": 0 if last is None else last.step,
        "tokens": loader.consumed,
        "final_loss": None if last is None else last.loss,
        "consumed": loader.ledger(),
        "accounts": [{**account._asdict(), "tokens": tokens} for account, tokens in loader.accounts().items()],
        "planned": {
            phase.name: {pool: round(share * phase.tokens) for pool, share in phase.mixture.items()}
            for phase in timeline.phases
        },
        "bits_per_byte": bits_per_byte(model, tokenizer, shards / "heldout.jsonl", pools_of(shards), work.machine),
        "weights": fingerprint(model),
    }
    discard(work.out / "checkpoints")
    return summary


def _start(config: Config, work: Work, tokenizer: Tokenizer, timeline: Timeline) -> LanguageModel:
    if "init" in work.inputs:
        source = work.inputs["init"] / "model"
        model, shape = load(source)
        tokenizer.check_fits(shape.vocab_size, str(source))
        if Tokenizer.load(source).fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"the shards {work.inputs['shards']} were encoded with another tokenizer than that of the checkpoint "
                f"{source}, to which their tokens would mean other texts: run the shard step again with "
                f"tokenizer={str(source)!r}"
            )
        return model
    model_config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        rope_base=timeline.phases[0].rope_base or USUAL_ROPE_BASE,
        max_context=max(phase.context for phase in timeline.phases),
        **dataclasses.asdict(config.shape),
    )
    return make_model(model_config, work.seed)


def pools_of(shards: Path) -> Mapping[str, str]:
    """The pool of each source, for reporting."""
    counts = json.loads((shards / "pools.json").read_text())
    return {source: pool for pool, by_source in counts.items() for source in by_source}


def bits_per_byte(
    model: LanguageModel, tokenizer: Tokenizer, heldout: Path, pools: Mapping[str, str], machine: Machine
) -> dict[str, float]:
    """-log2 p(text) / bytes over the held-out documents of each pool; longer documents are cut at the context."""
    bits: dict[str, float] = defaultdict(float)
    size: dict[str, int] = defaultdict(int)
    for document in read_jsonl(heldout, Document):
        tokens = tokenizer.encode(document.text)[: model.config.max_context]
        if len(tokens) < 2:
            continue
        row = torch.tensor([tokens], device=machine.device)
        with torch.no_grad():
            hidden = model(row[:, :-1])
            nats = -token_logprobs(hidden[0], model.unembedding, row[0, 1:]).sum().item()
        pool = pools.get(document.source, document.source)
        bits[pool] += nats / math.log(2)
        size[pool] += len(tokenizer.decode(tokens[1:]).encode())
    return {pool: round(bits[pool] / max(1, size[pool]), 4) for pool in sorted(size)}


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """Training reads each token forwards and backwards: three times the forward pass."""
    shape = ModelConfig(vocab_size=inputs["shards"].vocabulary, **dataclasses.asdict(config.shape))
    flops = sum(3 * phase.tokens * shape.flops_per_token(phase.context) for phase in config.phases)
    parameters = shape.parameter_count()
    activations = config.microbatch_tokens * shape.activation_bytes_per_token()
    return Estimate(
        tokens=sum(phase.tokens for phase in config.phases),
        flops=flops,
        memory_bytes=16 * parameters + activations + 6e8,
        disk_bytes=4 * parameters,
        parameters=parameters,
        token_bytes=shape.activation_bytes_per_token(),
        held_bytes=4 * shape.held_values_per_token(),
    )
