"""GPQA-Diamond: 198 graduate-level questions of four options, avg@3 (Rein et al. 2023).

The data lists the right option first, so each question's options are put into an order drawn from the seed and its id.
"""

import random
from functools import partial

from upweight.core.identity import seed_for
from upweight.core.protocols import Benchmark
from upweight.core.records import Problem
from upweight.evals.prompts import options
from upweight.evals.rows import DataSet, Questions, Row
from upweight.evals.setting import Setting
from upweight.verify.choices import ChoiceVerifier

DATA = DataSet(hub="Idavidrein/gpqa", subset="gpqa_diamond", split="train", gated=True)


def problem(row: Row, index: int, *, seed: int) -> Problem:
    """One row; the fields are those of gpqa_diamond.csv."""
    name = str(row.get("Record ID") or f"gpqa-{index}")
    choices = [row["Correct Answer"], *(row[f"Incorrect Answer {number}"] for number in (1, 2, 3))]
    order = list(range(len(choices)))
    random.Random(seed_for("gpqa", seed, name)).shuffle(order)
    messages = options(row["Question"], [choices[place] for place in order])
    return Problem(name, messages, "ABCD"[order.index(0)], (), str(row.get("High-level domain") or "gpqa"))


def benchmark(setting: Setting) -> Benchmark:
    asked = partial(problem, seed=setting.seed)
    return Questions("gpqa", DATA, asked, ChoiceVerifier(), setting.samples or 3, setting)
