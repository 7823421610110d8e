"""The Python of docs/dpd.md runs as it stands there, on a student and a teacher in the current directory."""

import json
import re
import subprocess
import sys
from pathlib import Path

from upweight.model import weights
from upweight.model.transformer import ModelConfig, make_model
from upweight.text.chat import CHATML
from upweight.text.tokenizer import Tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "dpd.md"


def prepared(folder: Path) -> None:
    tokenizer = Tokenizer.train(["what is 12 + 30? it is 42. sure, the tool says so\n"] * 20, 290).with_template(CHATML)
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=1, ffn=24)
    for name, seed in (("student", 0), ("teacher", 1)):
        weights.save(make_model(shape, seed), folder / name)
        tokenizer.save(folder / name)
    rows = [{"prompt": f"what is {n} + 1?", "chosen": f"it is {n + 1}", "rejected": "so"} for n in range(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_twenty_lines_of_the_page_distil(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    prepared(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 2  # 16 pairs, 8 a step
    assert "'positive'" in done.stdout
    made, _ = weights.load(tmp_path / "distilled")
    before, _ = weights.load(tmp_path / "student")
    assert not made.unembedding.equal(before.unembedding)
    Tokenizer.load(tmp_path / "distilled")
