"""Stages small enough to watch: Count writes numbers one by one and resumes; Total adds up what its input wrote."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from upweight.core.work import Estimate, Work


class Count:
    @dataclass(frozen=True)
    class Config:
        to: int
        pause_seconds: float = 0.0
        label: str = "numbers"

    @staticmethod
    def run(config: "Count.Config", work: Work) -> Mapping[str, object]:
        path = work.out / "numbers.txt"
        done = path.read_text().count("\n") if path.exists() else 0
        with (
            work.monitor.track(config.label, total=config.to, unit="numbers", done=done) as bar,
            path.open("a") as file,
        ):
            for number in range(done, config.to):
                file.write(f"{number}\n")
                file.flush()
                work.monitor.record(step=number, loss=1 / (1 + number))
                bar.advance(1, loss=1 / (1 + number))
                time.sleep(config.pause_seconds)
        return {"count": config.to, "resumed_at": done, "seed": work.seed}

    @staticmethod
    def estimate(config: "Count.Config", inputs: Mapping[str, Estimate]) -> Estimate:
        return Estimate(tokens=float(config.to), flops=1e9 * config.to, disk_bytes=4.0 * config.to)


class Total:
    @dataclass(frozen=True)
    class Config:
        times: float = 1.0
        fail: str = ""

    @staticmethod
    def run(config: "Total.Config", work: Work) -> Mapping[str, object]:
        if config.fail == "disk":
            raise OSError(28, "No space left on device")
        if config.fail == "archive":
            raise RuntimeError("PytorchStreamWriter failed writing file data/0") from OSError(28, "no space")
        numbers = [int(line) for path in work.inputs.values() for line in Path(path, "numbers.txt").read_text().split()]
        total = config.times * sum(numbers)
        (work.out / "total.txt").write_text(f"{total}\n")
        return {"total": total}

    @staticmethod
    def estimate(config: "Total.Config", inputs: Mapping[str, Estimate]) -> Estimate:
        return Estimate(tokens=sum((item.tokens for item in inputs.values()), 0.0))
