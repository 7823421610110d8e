"""`upweight compare`: which base is the better one to fine-tune, by the same fine-tuning of all of them.

The report compares bases so (arXiv 2512.06266, section 2): public sets of conversations, the same number of samples of
each, two epochs, the same settings for every base; then the same benchmarks. Every base gets the same chat template
too, which ends a turn with the base's own end-of-text token, so that no base has to know the marks of another.

It is a recipe like any other, one `adopt` a base and one `sft` a base and set, kept in ROOT/NAME: what is complete is
skipped, and what was stopped goes on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from upweight.app.find import recipe_names
from upweight.app.lineage import find_model
from upweight.app.measure import Decoding, check_asked, measure_models
from upweight.app.recipe import Recipe, Step
from upweight.app.runner import run
from upweight.core.errors import UserError
from upweight.core.files import matching
from upweight.core.hub import HUB_NAME
from upweight.core.work import Machine
from upweight.stages import adopt, sft
from upweight.text.conversations import ConversationDataset, ConversationFiles
from upweight.train.optimizer import OptimizerConfig

TEMPLATE = """\
{%- for message in messages %}
    {{- message.role + ": " + message.content + (eos_token if message.role == "assistant" else "") + "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "assistant: " }}
{%- endif %}
"""


@dataclass(frozen=True)
class Tuning:
    """How every base is fine-tuned.

    Attributes:
        samples: conversations of each set, evenly from all of it; 0 takes all. The report takes 500,000.
        context: tokens of a row; longer conversations are left out and counted.
        learning_rate: of AdamW, the highest of the schedule.
    """

    samples: int = 500_000
    epochs: int = 2
    context: int = 4096
    batch_tokens: int = 131_072
    microbatch_tokens: int = 8192
    learning_rate: float = 2e-5
    dtype: str = "float32"


def comparison(
    bases: Sequence[str], data: Sequence[str], tuning: Tuning, *, root: Path, name: str, seed: int
) -> Recipe:
    """The recipe: one goal for each base and set of conversations; those of one base share its `adopt`. The bases tuned
    on one set follow each other, since each model is compared with the one before it.

    Raises UserError where a base is not there, two have the same name, or `name` is that of a recipe.
    """
    if len(bases) < 2 or not data:
        raise UserError("name at least two bases, and with --data at least one set of conversations to tune them on")
    if name in recipe_names():
        raise UserError(f"{name} is a recipe, whose steps {name}:STEP names: give the tuned models another --name")
    sources = {_short(part): _source(part, tuning.samples) for part in data}
    taken = [_short(base) for base in bases]
    if len(set(taken)) < len(taken) or len(sources) < len(data):
        raise UserError(f"two of {', '.join([*bases, *data])} have the same last name: rename or copy one of them")
    for source in sources.values():
        if isinstance(source, ConversationFiles):
            matching(source.paths)  # which raises where there is none: not after the first set has been trained on
    adopted = [
        Step(short, adopt, adopt.Config(str(find_model(base, root)), template=TEMPLATE))
        for base, short in zip(bases, taken, strict=True)
    ]
    goals = [
        Step(f"{base.name}.{part}", sft, _tuned(source, tuning), {"model": base})
        for part, source in sources.items()
        for base in adopted
    ]
    return Recipe(name, tuple(goals), seed=seed)


def _tuned(source: sft.Source, tuning: Tuning) -> sft.Config:
    return sft.Config(
        data=(source,),
        epochs=tuning.epochs,
        context=tuning.context,
        batch_tokens=tuning.batch_tokens,
        microbatch_tokens=tuning.microbatch_tokens,
        learning_rate=tuning.learning_rate,
        optimizer=OptimizerConfig(kind="adamw"),
        template=None,
        dtype=tuning.dtype,
    )


def _source(given: str, most: int) -> sft.Source:
    """Files of conversations, or a data set on the hub."""
    if HUB_NAME.fullmatch(given) and not Path(given).exists():
        return ConversationDataset(given, source=_short(given), most=most)
    return ConversationFiles(given, source=_short(given), most=most)


def _short(given: str) -> str:
    """A name for a step from a path, a hub name or RECIPE:STEP."""
    path = Path(given.rstrip("/"))
    last = path.parent.name if path.name == "model" else path.name
    last = re.sub(r"\.(jsonl|parquet)(\.gz|\.zst)?$", "", last)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", last).strip("_") or "base"


def compare_bases(
    bases: Sequence[str],
    data: Sequence[str],
    on: Sequence[str],
    *,
    tuning: Tuning,
    root: Path,
    name: str,
    out: Path,
    machine: Machine,
    seed: int = 0,
    k: int = 0,
    count: int = 0,
    decoding: Decoding = Decoding(),  # noqa: B008 - frozen
    rebuild: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Fine-tune every base on every set, measure all on the same benchmarks, print one table and return it.

    Raises UserError where a base, a set or a benchmark is not there, before anything is trained.
    """
    console = console or Console()
    check_asked(on, k=k, count=count, decoding=decoding, machine=machine)
    recipe = comparison(bases, data, tuning, root=root, name=name, seed=seed)
    run(recipe, root, machine=machine, console=console, rebuild=rebuild)
    models = [f"{name}:{step.name}" for step in recipe.goals]
    return measure_models(
        models, on, root=root, out=out, k=k, count=count, decoding=decoding, machine=machine, console=console
    )
