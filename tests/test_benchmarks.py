"The benchmarks measure what they say: on cases whose answer is known, and in short runs."
import importlib
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def benchmark():
    "A benchmark by name, imported as where it is run: beside the others."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def training(benchmark): return benchmark("training")


def test_quality_of_real_digits(benchmark, training, monkeypatch):
    "Real digits drawn at random score what the reference says of them; what is out of a picture's range is clipped; sets differ."
    real, rng = torch.from_numpy(benchmark("digits").real_digits()[0]), np.random.default_rng(0)
    def loud(seeds): return torch.where((x := real[rng.integers(len(real), size=len(seeds))]) == 1, 7., x)
    monkeypatch.setitem(training.TRAINERS, "real", lambda marks: (loud for _ in marks))
    scores = training.quality("real", [1, 2])
    drawn = benchmark("digits").reference(by_class=False)["frechet_of_real_draws"]
    assert list(scores) == [1, 2]
    for score in scores.values():
        assert score["mean"] == pytest.approx(drawn, rel=0.25)    # one set of 1000 scatters by 12 %, so the mean of three by 7 %
        assert 0 < score["scatter"] < 0.5 * drawn
    json.dumps(scores)


def test_pauses_do_not_count(training, monkeypatch):
    clock, steps = [0.], [0]
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    def step():
        steps[0] += 1
        clock[0] += 0.25
    after = []
    for _ in training.pauses([1, 3], step):
        after.append(steps[0])
        clock[0] += 100
    assert after == [4, 12]


def test_our_training_lasts_as_long_as_it_is_given(training, monkeypatch):
    "By a clock that only steps move, unevenly: the run ends with the step in which the time is over, and the rate falls by the clock."
    clock, rates = [0.], []
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(training, "fastest", lambda times: ("fp32", False))
    monkeypatch.setattr(training, "conv_times", lambda device: {})
    step = training.Trainer.step
    def timed(self):
        step(self)
        rates.append((clock[0], self.opt.param_groups[0]["lr"]))
        clock[0] += 8 if clock[0] < 100 else 2    # the machine gets faster
    monkeypatch.setattr(training.Trainer, "step", timed)
    for draw in training.train_ours([200]):
        assert clock[0] == 200
        for t, rate in rates[5:]:    # the first 39 steps also rise, to a fortieth each
            rise = min(1, (rates.index((t, rate)) * 128 + 1) / 5000)
            assert rate == pytest.approx(4e-3 * rise * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 200)) / 2), rel=0.05)    # images are whole numbers
        x = draw(range(2))
        assert x.shape == (2, 64) and x.isfinite().all()


def test_our_network_does_the_work_that_the_docstring_says(training):
    net, _ = training.ours("fp32")
    assert 0.85 < training.gflop(net) < 0.92


def test_gpu_benchmark_runs_on_a_cpu(benchmark, monkeypatch, capsys):
    gpu = benchmark("gpu")
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(sys, "argv", "gpu.py --preset digits --batches 4 2 --steps 1 --precision fp32 --json".split())
    gpu.main()
    said = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in said["training"]] == [row["batch"] for row in said["sampling"]] == [2, 4]
    net, shape = gpu.network("digits")
    for row in said["training"]:
        assert row["flops_per_second"] / row["images_per_second"] == pytest.approx(3 * gpu.forward_flops(net, shape))
        assert 0 < row["flops_per_second"] < said["peak"]    # or one of the two is miscounted


def test_a_batch_that_does_not_fit_loses_nothing(benchmark, capsys):
    gpu = benchmark("gpu")
    def measure(batch):
        if batch > 128: raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return dict(batch=batch)
    assert gpu.fitting(measure, [512, 64, 256, 128]) == [dict(batch=64), dict(batch=128)]
    assert capsys.readouterr().err == "batch 256: out of memory\n"
