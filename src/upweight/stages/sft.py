"""sft: supervised fine-tuning on conversations, packed several to a row, the loss on assistant turns only."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from upweight.core.errors import UserError
from upweight.core.records import Conversation
from upweight.core.work import Estimate, Summary, Work
from upweight.model.language_model import fingerprint, load, save
from upweight.objectives.next_token import NextToken
from upweight.store.jsonl import read_jsonl
from upweight.text.chat import CHATML, encode_turns
from upweight.text.tokenizer import Tokenizer
from upweight.train.checkpoint import CheckpointConfig, discard
from upweight.train.loader import Encoded, PackedLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import warmup_decay
from upweight.train.trainer import train
from upweight.train.watch import watched


@dataclass(frozen=True)
class Part:
    """Conversations of one file: `file` is "<input>/<file>.jsonl". At most `most` of them are taken, 0 takes all."""

    file: str
    most: int = 0


@dataclass(frozen=True)
class Config:
    """Attributes:
    data: the files to imitate.
    epochs: passes over all conversations.
    context: tokens of a row; a longer conversation is left out and counted.
    batch_tokens: tokens of one optimizer step, padding included.
    microbatch_tokens: tokens of one forward pass; the loss does not depend on it.
    learning_rate: highest of the schedule: linear warmup, then linear decay to a tenth.
    warmup_share: the share of the steps that warms up.
    template: Jinja chat template that the checkpoint is to carry; None keeps the one that it has.
    """

    data: tuple[Part, ...]
    epochs: int = 2
    context: int = 256
    batch_tokens: int = 4096
    microbatch_tokens: int = 4096
    learning_rate: float = 1.0
    warmup_share: float = 0.1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    template: str | None = CHATML
    save_every_steps: int = 50
    dtype: str = "float32"


def run(config: Config, work: Work) -> Summary:
    """Fine-tune the input "model" and write `model/`."""
    source = work.inputs["model"] / "model"
    model, _ = load(source)
    tokenizer = Tokenizer.load(source)
    if config.template is not None:
        tokenizer = tokenizer.with_template(config.template)
    conversations, counts = _read(config, work)
    encoded = [
        Encoded(tuple(tokens), tuple(trained), conversation.source)
        for conversation in conversations
        for tokens, trained in encode_turns(tokenizer, conversation.messages)
    ]
    fitting = [item for item in encoded if len(item.tokens) <= config.context]
    if not fitting:
        raise UserError(
            f"none of {len(encoded)} conversations fits a context of {config.context} tokens; the shortest has "
            f"{min(len(item.tokens) for item in encoded)}: raise context"
        )
    loader = PackedLoader(
        fitting,
        context=config.context,
        batch_tokens=config.batch_tokens,
        microbatch_tokens=config.microbatch_tokens,
        epochs=config.epochs,
        seed=work.seed,
    )
    timeline = warmup_decay(loader.steps, config.learning_rate, config.warmup_share)
    reports = train(
        model,
        objective=NextToken(),
        loader=loader,
        timeline=timeline,
        optimizer=config.optimizer,
        machine=work.machine,
        checkpoint=CheckpointConfig(work.out / "checkpoints", every_steps=config.save_every_steps),
        dtype=config.dtype,
    )
    first = last = None
    for report in watched(reports, work.monitor, "sft", total=loader.steps, unit="steps"):
        first, last = first or report, report
    save(model, work.out / "model")
    tokenizer.save(work.out / "model")
    discard(work.out / "checkpoints")
    trained = sum(sum(item.trained) for item in fitting)
    return {
        "conversations": dict(counts),
        "too_long": len(encoded) - len(fitting),
        "tokens_an_epoch": sum(len(item.tokens) for item in fitting),
        "trained_share": round(trained / sum(len(item.tokens) for item in fitting), 4),
        "steps": loader.steps,
        "first_loss": first and first.loss,
        "final_loss": last and last.loss,
        "mask_example": _shown(tokenizer, fitting[0]),
        "weights": fingerprint(model),
    }


def _read(config: Config, work: Work) -> tuple[list[Conversation], Counter[str]]:
    conversations: list[Conversation] = []
    for part in config.data:
        name, _, file = part.file.partition("/")
        if name not in work.inputs:
            raise UserError(f"data {part.file!r}: the step has no input {name!r}; it has {sorted(work.inputs)}")
        read = read_jsonl(work.inputs[name] / file, Conversation)
        if part.most and len(read) > part.most:
            read = Random(work.seed).sample(read, part.most)
        conversations += read
    if not conversations:
        raise UserError(f"there is nothing to imitate: {[part.file for part in config.data]} hold no conversation")
    return conversations, Counter(conversation.source for conversation in conversations)


def _shown(tokenizer: Tokenizer, item: Encoded) -> Sequence[Mapping[str, object]]:
    """One conversation as runs of trained and untrained text, for the report."""
    runs: list[dict[str, object]] = []
    start = 0
    for end in range(1, len(item.tokens) + 1):
        if end == len(item.tokens) or item.trained[end] != item.trained[start]:
            runs.append({"trained": item.trained[start], "text": tokenizer.decode(list(item.tokens[start:end]))})
            start = end
    return runs


def estimate(config: Config, inputs: Mapping[str, Estimate]) -> Estimate:
    """At most all conversations of the inputs, each a third of a context, forwards and backwards."""
    model = inputs["model"]
    count = sum(part.most or 2000 for part in config.data)
    tokens = count * config.epochs * config.context / 3
    return Estimate(
        tokens=tokens,
        flops=6 * model.parameters * tokens,
        memory_bytes=16 * model.parameters + 1e9,
        disk_bytes=4 * model.parameters,
        parameters=model.parameters,
    )
