import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.unit.store import part_work

from upweight.core.errors import UserError
from upweight.core.work import Bar, Machine, Work
from upweight.store import parts
from upweight.store.parts import forget, in_parts


class Counted(Bar):
    def __init__(self) -> None:
        self.units = 0.0

    def advance(self, amount: float | int = 1, **shown: float | int) -> None:
        self.units += amount


def _squares(out: Path, workers: int, do: Callable[..., Any] = part_work.squared, cluster: str = "") -> tuple[Any, Any]:
    out.mkdir(exist_ok=True)
    bar = Counted()
    results = list(in_parts(do, range(6), Work(out, {}, Machine(workers=workers, cluster=cluster)), bar))
    assert bar.units == 15  # 0 + 1 + 2 + 3 + 4 + 5
    return [result["square"] for result in results], {result["process"] for result in results}


def test_results_come_in_order_whoever_does_the_work(tmp_path: Path) -> None:
    here, mine = _squares(tmp_path / "here", 1)
    elsewhere, theirs = _squares(tmp_path / "elsewhere", 2)
    assert here == elsewhere == [0, 1, 4, 9, 16, 25]
    assert mine == {os.getpid()}
    assert os.getpid() not in theirs


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_goes_on_with_the_parts_that_are_left(tmp_path: Path, workers: int) -> None:
    with pytest.raises(UserError, match="item 3 is wrong"):
        _squares(tmp_path, workers, part_work.refused)
    complete = set((tmp_path / "calls").read_text().split())
    assert {"0", "1", "2"} <= complete
    assert _squares(tmp_path, 1)[0] == [0, 1, 4, 9, 16, 25]
    assert sorted((tmp_path / "calls").read_text().split()) == ["0", "1", "2", "3", "4", "5"]
    forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["calls"]


def test_the_part_of_a_worker_that_was_killed_is_done_again(tmp_path: Path) -> None:
    assert _squares(tmp_path, 2, part_work.killed_once)[0] == [0, 1, 4, 9, 16, 25]
    assert (tmp_path / "killed").exists()


def test_a_ray_cluster_gives_the_same_though_a_worker_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert _squares(tmp_path, 2, part_work.killed_once, cluster="local")[0] == [0, 1, 4, 9, 16, 25]
    assert (tmp_path / "killed").exists()


def test_on_a_ray_cluster_a_part_that_computes_on_cuda_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, num_gpus=1, log_to_driver=False, logging_level="error")
    try:
        work = Work(tmp_path, {}, Machine(device="cuda", cluster="local"))
        for device, gpus in (("cuda", [0]), ("cpu", [])):
            found = list(in_parts(part_work.equipped, range(2), work, Counted(), device, device=device))
            assert [part["gpus"] for part in found] == [gpus, gpus]
    finally:
        ray.shutdown()


def test_a_file_of_another_node_may_be_seen_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SEEN_SECONDS", 5.0)
    monkeypatch.setattr(parts, "POLL_SECONDS", 0.01)
    late = threading.Timer(0.1, (tmp_path / "late").touch)
    late.start()
    parts._await_seen(tmp_path / "late")
    late.join()
    monkeypatch.setattr(parts, "SEEN_SECONDS", 0.05)
    with pytest.raises(UserError, match="all nodes need the root by the same path"):
        parts._await_seen(tmp_path / "never")


def test_what_a_file_of_ones_own_defines_is_done_here(tmp_path: Path) -> None:
    class Mine:
        def __repr__(self) -> str:
            return "mine"

    def do(item: object, place: int, out: Path, tick: Any) -> dict[str, Any]:
        return {"process": os.getpid()}

    results = in_parts(do, [Mine(), Mine()], Work(tmp_path, {}, Machine(workers=2)), Counted())
    assert [result["process"] for result in results] == [os.getpid()] * 2


def test_a_part_of_another_input_is_not_taken_for_done(tmp_path: Path) -> None:
    work = Work(tmp_path, {}, Machine(workers=1))
    assert [result["square"] for result in in_parts(part_work.squared, [1, 2], work, Counted())] == [1, 4]
    assert [result["square"] for result in in_parts(part_work.squared, [1, 3], work, Counted())] == [1, 9]
    assert (tmp_path / "calls").read_text().split() == ["0", "1", "1"]
