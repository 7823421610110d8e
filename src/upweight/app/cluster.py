"""Machines to plan for: GPUs by their published figures, or any described by its own.

upweight plan nanbeige4_3b --gpu H100 --gpus 256 --sharding fsdp --gpu-price 2.5
upweight plan small --gpu mine --gpu-tflops 120 --gpu-memory 24 --gpu-bandwidth 900 --gpu-link 32
"""

from dataclasses import dataclass, replace
from typing import Any

from upweight.core.errors import UserError

ATTAINED = 0.38
"""The share of the peak of bf16 products that training attains: torchtitan reports 34 to 39% for Llama-3.1-8B on 8 H100
without float8 (5,762 and 6,667 tokens a second and GPU), nanochat 41 to 46%, the Llama 3 report 38 to 43% for its 405B.
Small models and single GPUs attain less: prime-rl reports 17% for 0.6B and 27% for 4B."""

READ_SHARE = 0.7
"""The share of the memory's bandwidth that decoding attains."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind.

    Attributes:
        name: of the kind.
        flops_per_second: peak of dense bf16 products of one GPU.
        memory_bytes: of one GPU.
        bandwidth: of its memory, in bytes a second.
        link: to other GPUs, one way, in bytes a second.
        count: how many.
        price_per_hour: of one GPU, in any currency; 0 leaves money out.
        attained: the share of the peak that training attains.
    """

    name: str
    flops_per_second: float
    memory_bytes: float
    bandwidth: float
    link: float
    count: int = 1
    price_per_hour: float = 0.0
    attained: float = ATTAINED

    def __post_init__(self) -> None:
        for name in ("flops_per_second", "memory_bytes", "bandwidth", "link", "count"):
            if not getattr(self, name) > 0:
                raise UserError(f"a machine to plan for needs {name} above 0, not {getattr(self, name)}")
        if not 0 < self.attained <= 1:
            raise UserError(f"attained is {self.attained}: it is the share of the peak that training attains, 0 to 1")

    def training_flops_per_second(self) -> float:
        """Of all GPUs together."""
        return self.count * self.attained * self.flops_per_second

    def sampling_flops_per_second(self, rows: int) -> float:
        """Of all GPUs together, each decoding `rows` answers: every step reads all weights (2 bytes each) once."""
        read = 2.0 * rows * READ_SHARE * self.bandwidth / 2.0
        return self.count * min(read, self.attained * self.flops_per_second)


KNOWN = {
    cluster.name: cluster
    for cluster in (
        # dense bf16 peak, memory, its bandwidth and the link one way, from the vendors' data sheets (SXM, PCIe x16)
        Cluster("A100", 312e12, 80e9, 2.04e12, 300e9),
        Cluster("H100", 989e12, 80e9, 3.35e12, 450e9),
        Cluster("H200", 989e12, 141e9, 4.8e12, 450e9),
        Cluster("B200", 2250e12, 180e9, 8.0e12, 900e9),
        Cluster("L40S", 362e12, 48e9, 0.864e12, 32e9),
        Cluster("RTX4090", 165e12, 24e9, 1.01e12, 32e9),
        Cluster("RTX5090", 210e12, 32e9, 1.79e12, 64e9),
    )
}


def describe(
    gpu: str,
    *,
    count: int = 1,
    tflops: float | int | None = None,
    memory_gb: float | int | None = None,
    bandwidth_gb: float | int | None = None,
    link_gb: float | int | None = None,
    price_per_hour: float = 0.0,
    attained: float | int | None = None,
) -> Cluster:
    """A known kind, with what is given replaced; or an unknown one, of which all four figures have to be given.

    Args:
        tflops, memory_gb, bandwidth_gb, link_gb: in 1e12 operations, 1e9 bytes, 1e9 bytes a second.
    """
    given = {
        "flops_per_second": None if tflops is None else tflops * 1e12,
        "memory_bytes": None if memory_gb is None else memory_gb * 1e9,
        "bandwidth": None if bandwidth_gb is None else bandwidth_gb * 1e9,
        "link": None if link_gb is None else link_gb * 1e9,
    }
    known = KNOWN.get(gpu)
    missing = [name for name, value in given.items() if value is None]
    if known is None and missing:
        raise UserError(
            f"the GPU {gpu!r} is none of {', '.join(KNOWN)}: for another, give --gpu-tflops, --gpu-memory, "
            "--gpu-bandwidth and --gpu-link"
        )
    base = known or Cluster(gpu, 1.0, 1.0, 1.0, 1.0)
    figures: dict[str, Any] = {name: float(value) for name, value in given.items() if value is not None}
    made = replace(base, **figures)
    share = made.attained if attained is None else float(attained)
    return replace(made, count=count, price_per_hour=price_per_hour, attained=share)
