"""Kill -9 a run of the command line at random moments, run it again, and compare the weights bit for bit.

    python tests/acceptance/kill.py [KILLS]        20 by default; about ten minutes on one core

Each life of `upweight run` is killed after a random time; a recipe that reached its end is compared and begun anew, so
the kills fall into every step: reading, tagging, sharding, both training stages, and between them. What
tests/contract/test_06 does to the trainer alone, at every kind of event and in seconds, this does to the whole.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

RECIPE = """
from upweight.app.recipe import Recipe, Step
from upweight.curate.selection import Tier
from upweight.stages import deduplicate, ingest, mix, pose, pretrain, retrieve, sft, shard, tag
from upweight.synthesize.stories import StoryDocuments
from upweight.train.optimizer import OptimizerConfig
from upweight.train.timeline import fg_wsd

def recipe(scale=1.0, seed=0):
    problems = Step("problems", pose, pose.Config(stem=40, code=4, preference=8, reserved_stem=8, reserved_code=2,
        gold_stem=120, gold_code=8, preference_pairs=8))
    documents = Step("documents", ingest, ingest.Config(sources=(StoryDocuments(3000, seed=1, damaged_share=0.2),)))
    unique = Step("unique", deduplicate, deduplicate.Config(), {"documents": documents, "problems": problems})
    tags = Step("tags", tag, tag.Config(), {"documents": unique})
    similarity = Step("similarity", retrieve, retrieve.Config(), {"documents": unique, "tags": tags})
    tiers = (Tier("high", share=0.5), Tier("medium"))
    read = {"documents": unique, "tags": tags, "similarity": similarity}
    mixture = Step("mixture", mix, mix.Config(tiers=tiers), read)
    shards = Step("shards", shard, shard.Config(vocabulary=400), {"documents": mixture})
    timeline = fg_wsd(warmup=4_000, diverse=60_000, high_quality=40_000, decay=40_000, peak_lr=0.02, end_lr=0.001,
        mixtures={"warmup": {"medium": 1.0}, "diverse": {"high": 0.5, "medium": 0.5}, "high_quality": {"high": 1.0},
            "decay": {"high": 1.0}},
        context=64, rope_base=1e4, decay_context=128, decay_rope_base=4e4)
    base = Step("base", pretrain, pretrain.Config(phases=timeline.phases, batch_tokens=2048, microbatch_tokens=1024,
        save_every_steps=3, shape=pretrain.Shape(width=64, layers=2, heads=4, kv_heads=2, ffn=128)), {"shards": shards})
    tuned = Step("sft", sft, sft.Config(data=(sft.Part("problems/gold.jsonl"),), epochs=3, context=256,
        batch_tokens=1024, microbatch_tokens=512, learning_rate=0.004, optimizer=OptimizerConfig(kind="muon"),
        save_every_steps=2), {"model": base, "problems": problems})
    return Recipe("killed", tuned, seed=seed)
"""


def life(recipe: Path, root: Path, seconds: float | None) -> bool:
    """One process, killed after `seconds` unless it is done before; whether it reached its end."""
    command = [sys.executable, "-m", "upweight.cli", "run", str(recipe), "--root", str(root), "--threads", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    try:
        _, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode != 0:
        raise SystemExit(f"a life ended with {process.returncode}: {told}")
    return True


def outcome(root: Path) -> dict[str, object]:
    """The weights of both models, and what the steps counted."""
    found: dict[str, object] = {}
    for step in ("base", "sft"):
        tensors = load_file(root / "killed" / step / "model" / "model.safetensors")
        found[step] = {name: tensor.tobytes() for name, tensor in tensors.items()}
        summary = json.loads((root / "killed" / step / "manifest.json").read_text())["summary"]
        found[f"{step}, counted"] = {name: summary.get(name) for name in ("consumed", "accounts", "steps", "weights")}
    return found


def main() -> None:
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "killed.py"
        recipe.write_text(RECIPE)
        began = time.monotonic()
        life(recipe, Path(folder) / "straight", None)
        usual = time.monotonic() - began
        straight = outcome(Path(folder) / "straight")
        kills = runs = 0
        while kills < wanted:
            runs += 1
            root = Path(folder) / f"run{runs}"
            while not life(recipe, root, draw.uniform(0.2, 0.9) * usual if kills < wanted else None):
                kills += 1
                there = sorted(path.name for path in (root / "killed").glob("*")) if root.exists() else []
                print(f"kill {kills}: {there[:1]} of {len(there)} directories", flush=True)
            different = [name for name, value in outcome(root).items() if value != straight[name]]
            print(f"run {runs}: {'the same, bit for bit' if not different else f'differs in {different}'}", flush=True)
            if different:
                raise SystemExit(1)
    print(f"{kills} kills in {runs} runs; every final weight and count is that of the run that was never killed")


if __name__ == "__main__":
    main()
