"""Feeding: every rank, worker and resumed run draws cases of its own, and waiting is measured."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from KA2ERSegment.geometry import Box
from KA2ERSegment.training import feeding
from KA2ERSegment.training.feeding import AUTO, Feed, Throughput, workers_for
from KA2ERSegment.training.items import TrainingItem
from KA2ERSegment.training.sampling import SamplingOptions, TargetDataset

ROOT = Path(__file__).resolve().parents[3]
BENCHMARK = ROOT / "Testing" / "benchmarks" / "benchmark_training.py"
OTHERS: dict[str, Any] = {
    "cache": Path("cache/train"),
    "config": ROOT / "KA2ERSegment" / "training" / "configs" / "gpu.json",
    "stage": "amalgamation",
    "start": ROOT / "Resources" / "Models" / "ka2er-base",
    "device": "cpu",
}


@pytest.fixture
def a_dataset() -> TargetDataset:
    labels = np.zeros((30, 28, 26), dtype=np.uint16)
    labels[6:22, 5:20, 4:18] = 1
    boxes = {1: Box((4, 5, 6), (18, 20, 22))}
    item = TrainingItem("one", "a/repo", labels, (), (1.0, 1.2, 2.0), {1: "liver"}, boxes, "CC0", "CT", "abdomen")
    return TargetDataset([item], SamplingOptions(patch_size=16), seed=3)


def first(feed: Feed) -> dict[str, Tensor]:
    return next(iter(feed))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(one[key].equal(other[key]) for key in one)


def test_each_rank_and_each_resumed_run_has_cases_of_its_own(a_dataset: TargetDataset) -> None:
    batches = [
        first(Feed(a_dataset, 4, stream=lambda rank=rank, step=step: (rank, step)))
        for rank, step in [(0, 0), (1, 0), (0, 7)]
    ]
    again = first(Feed(a_dataset, 4))

    assert same(batches[0], again), "what is drawn follows from the seed"
    assert not same(batches[0], batches[1])
    assert not same(batches[0], batches[2])
    assert not same(batches[1], batches[2])


def test_each_worker_has_cases_of_its_own(a_dataset: TargetDataset) -> None:
    feed = Feed(a_dataset, 4, workers=2)
    batches = iter(feed)
    one, other = next(batches), next(batches)  # of the first and the second worker

    assert not same(one, other)
    assert same(one, first(Feed(a_dataset, 4))), "the first worker draws what no worker would"
    del batches


def test_waiting_is_measured_and_the_first_batch_left_out(
    monkeypatch: pytest.MonkeyPatch, a_dataset: TargetDataset
) -> None:
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(feeding, "time", SimpleNamespace(monotonic=lambda: now.time))
    feed = Feed(a_dataset, batch=4)

    def slow(self: Any) -> Iterator[int]:
        now.time += 100  # workers start
        while True:
            now.time += 1
            yield 0

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", slow)
    speed = Throughput(feed)
    batches = iter(feed)
    for _ in range(5):
        next(batches)
        now.time += 3  # a step
        speed.on_train_batch_end(*[None] * 5)

    assert speed.summary(ranks=2) == {"patches_per_second": 2.0, "waiting_for_data": 0.25}
    assert Throughput(feed).summary(ranks=1) == {}


def test_workers_fit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)

    assert workers_for(gpu=False, wanted=AUTO, ranks=1) == 0
    assert workers_for(gpu=True, wanted=AUTO, ranks=1) == 14
    assert workers_for(gpu=True, wanted=AUTO, ranks=4) == 2
    assert workers_for(gpu=True, wanted=AUTO, ranks=16) == 1
    assert workers_for(gpu=False, wanted=3, ranks=2) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_for_a_gpu_lie_in_pinned_memory(a_dataset: TargetDataset) -> None:
    assert first(Feed(a_dataset, 2, workers=1, gpu=True))["labels"].is_pinned()


def test_the_benchmark_measures_each_batch_with_each_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training itself is played: what is asked of it, and what is made of its log."""
    spec = importlib.util.spec_from_file_location("benchmark_training", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    def train(config: Path, output: Path, **given: Any) -> None:
        stage = json.loads(config.read_text())["amalgamation"]
        output.mkdir()
        row = {"batch": stage["batch"], "workers": given["workers"], "hardware": "a CPU", "waiting_for_data": 0.0125}
        (output / "log.json").write_text(json.dumps([row | {"patches_per_second": stage["batch"] + stage["steps"]}]))

    monkeypatch.setattr("KA2ERSegment.training.__main__.train", train)

    benchmark.main(batch=[2, 4], workers=[0, 3], steps=5, output=tmp_path / "out.json", **OTHERS)

    table = [line for line in capsys.readouterr().out.split("\n") if line.startswith("|")][2:]
    assert table == [
        "| 2 | 0 | 7 | 1.2% |  |",
        "| 2 | 3 | 7 | 1.2% |  |",
        "| 4 | 0 | 9 | 1.2% |  |",
        "| 4 | 3 | 9 | 1.2% |  |",
    ]
    assert len(json.loads((tmp_path / "out.json").read_text())["runs"]) == 4
