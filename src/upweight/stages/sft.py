"""sft: supervised fine-tuning on conversations, packed several to a row, the loss on assistant turns only.

Conversations are encoded once, into token shards with the loss mask beside them, so that there may be more of them than
memory holds, and a run that was killed does not encode them again.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from upweight.core.errors import UserError
from upweight.core.records import Conversation
from upweight.core.work import Estimate, Summary, Work
from upweight.model.language_model import fingerprint, load, save
from upweight.objectives.next_token import NextToken
from upweight.store.artifact import write_whole
from upweight.store.shards import Shards, ShardWriter
from upweight.synthesize.talks import Part as Part
from upweight.synthesize.talks import Source as Source
from upweight.synthesize.talks import conversations, label
from upweight.text.chat import CHATML, EncodedConversation, encode_turns
from upweight.text.tokenizer import Tokenizer
from upweight.train import parallel
from upweight.train.checkpoint import CheckpointConfig, discard
from upweight.train.loader import Encoded, EncodedShards, PackedLoader
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import warmup_decay
from upweight.train.trainer import ends, train
from upweight.train.watch import watched

ALL_PROCESSES = True

ASSUMED_CONVERSATIONS = 2000
"""How many a part of unknown size is planned with."""

BYTES_A_CONVERSATION = 1000
"""What one takes in the files of a step, for the plan."""


@dataclass(frozen=True)
class Config:
    """Attributes:
    data: what to imitate: files of the step's inputs, files of one's own, Hugging Face data sets.
    epochs: passes over all conversations.
    context: tokens of a row.
    too_long: what becomes of a conversation that is longer: "drop" leaves it out, "cut" keeps its first `context`
        tokens; both are counted.
    rope_base: base of the rotary frequencies from here on (ABF, where `context` grows); 0 keeps the model's.
    batch_tokens: tokens of one optimizer step, padding included.
    microbatch_tokens: tokens of one forward pass; the loss does not depend on it.
    learning_rate: highest of the schedule: linear warmup, then linear decay to a tenth.
    warmup_share: the share of the steps that warms up.
    template: Jinja chat template that the checkpoint is to carry; None keeps the one that it has.
    """

    data: tuple[Source, ...]
    epochs: int = 2
    context: int = 256
    too_long: Literal["drop", "cut"] = "drop"
    rope_base: float = 0.0
    batch_tokens: int = 4096
    microbatch_tokens: int = 4096
    learning_rate: float = 1.0
    warmup_share: float = 0.1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    template: str | None = CHATML
    save_every_steps: int = 50
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.too_long not in ("drop", "cut"):
            raise UserError(f"too_long is {self.too_long!r}: expected 'drop' or 'cut'")


def run(config: Config, work: Work) -> Summary:
    """Fine-tune the input "model" and write `model/`."""
    source = work.inputs["model"] / "model"
    model, shape = load(source)
    tokenizer = Tokenizer.load(source)
    tokenizer.check_fits(shape.vocab_size, str(source))
    if config.template is not None:
        tokenizer = tokenizer.with_template(config.template)
    encoded, counts = _encoded(config, work, tokenizer)
    example = _shown(tokenizer, encoded[0])
    loader = PackedLoader(
        encoded,
        context=config.context,
        batch_tokens=config.batch_tokens,
        microbatch_tokens=config.microbatch_tokens,
        epochs=config.epochs,
        seed=work.seed,
    )
    reports = train(
        model,
        objective=NextToken(),
        loader=loader,
        timeline=warmup_decay(
            loader.steps,
            config.learning_rate,
            config.warmup_share,
            context=config.context,
            rope_base=config.rope_base,
        ),
        optimizer=config.optimizer,
        machine=work.machine,
        checkpoint=CheckpointConfig(work.out / "checkpoints", every_steps=config.save_every_steps),
        dtype=config.dtype,
    )
    for _ in watched(
        reports, work.monitor, "sft", total=loader.steps, unit="steps", machine=work.machine, dtype=config.dtype
    ):
        pass
    save(model, work.out / "model")
    tokenizer.save(work.out / "model")
    first, last = ends(work.out / "checkpoints")
    summary = {
        "conversations": counts["conversations"],
        "too_long": counts["too_long"],
        "tokens_an_epoch": encoded.shards.tokens,
        "trained_share": round(counts["trained"] / encoded.shards.tokens, 4),
        "steps": loader.steps,
        "first_loss": first and first.loss,
        "final_loss": last and last.loss,
        "mask_example": example,
        "weights": fingerprint(model),
    }
    for finished in (ENCODED, "checkpoints"):
        discard(work.out / finished)
    return summary


ENCODED = "encoded"
COUNTS = "counts.json"


def _encoded(config: Config, work: Work, tokenizer: Tokenizer) -> tuple[EncodedShards, Mapping[str, Any]]:
    """All conversations as token shards, and what was counted; those that an earlier, killed run completed are kept.

    The first of several processes encodes, and all read what it wrote.
    """
    directory = work.out / ENCODED
    if parallel.world().rank == 0:
        try:
            Shards.open(directory, vocab_size=tokenizer.vocab_size)
        except UserError:
            _encode(config, work, tokenizer, directory)
    directory = Path(parallel.told(str(directory)))
    shards = Shards.open(directory, vocab_size=tokenizer.vocab_size)
    return EncodedShards(shards), json.loads((directory / COUNTS).read_text())


def _encode(config: Config, work: Work, tokenizer: Tokenizer, directory: Path) -> None:
    writer = ShardWriter(directory, vocab_size=tokenizer.vocab_size, marked=True)
    by_source: Counter[str] = Counter()
    too_long = trained_tokens = 0
    shortest: int | None = None
    with work.monitor.track("encode", total=0, unit="conversations") as bar:
        for named in _read(config, work):
            by_source[named.conversation.source] += 1
            for number, (tokens, trained) in enumerate(_turns(tokenizer, named)):
                shortest = min(len(tokens), shortest or len(tokens))
                if len(tokens) > config.context:
                    too_long += 1
                    tokens, trained = tokens[: config.context], trained[: config.context]
                    if config.too_long == "drop" or not any(trained[1:]):
                        continue
                name = f"{named.name}.{number}" if number else named.name
                writer.write(tokens, source=named.conversation.source, document_id=name, trained=trained)
                trained_tokens += sum(trained[1:])
            bar.advance()
    if not by_source:
        raise UserError(f"there is nothing to imitate: {[label(part) for part in config.data]} hold no conversation")
    if not writer.documents:
        raise UserError(
            f"none of {too_long} conversations fits a context of {config.context} tokens; the shortest has "
            f"{shortest}: raise context"
        )
    counts = {"conversations": by_source, "too_long": too_long, "trained": trained_tokens}
    write_whole(directory / COUNTS, json.dumps(counts))
    writer.close()


class _Named(NamedTuple):
    """A conversation and where it came from, to be named when something is wrong with it."""

    name: str
    conversation: Conversation


def _turns(tokenizer: Tokenizer, named: _Named) -> list[EncodedConversation]:
    conversation = named.conversation
    try:
        return encode_turns(tokenizer, conversation.messages, tools=conversation.tools or None)
    except UserError as error:
        raise UserError(f"conversation {named.name}: {error}") from None


def _read(config: Config, work: Work) -> Iterator[_Named]:
    """The conversations of all parts, one after another."""
    for part in config.data:
        every = enumerate(conversations(part, work.inputs), start=1)
        chosen: Iterable[tuple[int, Conversation]] = every
        if part.most:
            held = list(every)
            chosen = Random(work.seed).sample(held, part.most) if len(held) > part.most else held
        for number, conversation in chosen:
            yield _Named(f"{label(part)}:{number}", conversation)


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
    """All conversations of the data, as far as anyone knows how many: each a third of a context, both ways."""
    model = inputs["model"]
    count = sum(_expected(part, inputs) for part in config.data)
    tokens = count * config.epochs * config.context / 3
    return Estimate(
        tokens=tokens,
        flops=6 * model.parameters * tokens,
        memory_bytes=16 * model.parameters + config.microbatch_tokens * model.token_bytes + 5e8,
        disk_bytes=4 * model.parameters,
        parameters=model.parameters,
        token_bytes=model.token_bytes,
        held_bytes=model.held_bytes,
    )


def _expected(part: Source, inputs: Mapping[str, Estimate]) -> float:
    """Conversations of a part: as many as it may give, but no more than fit into the artifact that it is read from."""
    count = float(part.most or ASSUMED_CONVERSATIONS)
    name, _, file = part.file.partition("/") if isinstance(part, Part) else ("", "", "")
    artifact = inputs.get(name, Estimate())
    if file in artifact.records:
        held = float(artifact.records[file])
        return min(held, float(part.most)) if part.most else held
    return min(count, artifact.disk_bytes / BYTES_A_CONVERSATION) if artifact.disk_bytes else count
