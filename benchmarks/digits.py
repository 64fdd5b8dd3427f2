"""How good are the digits of the default model, and how fast are they made?

    python benchmarks/digits.py                      train with the defaults into a temporary folder, then measure
    python benchmarks/digits.py --run runs/digits    measure a finished run

Sets of 1000 samples, 100 of each class, 18 Heun steps (35 evaluations of the network each). The figures of quality are
means over the sets, worst_class is the lowest share of any class in any set; the Frechet distance of each set shows how
much one set of 1000 scatters, and frechet_of_real_draws how far 1000 real digits are from all of them.
"""
import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from ddpm_edm.cli import train_images
from ddpm_edm.metrics import frechet_distance
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.solvers import generate
from ddpm_edm.train import load


def nearest_median(x: np.ndarray, real: np.ndarray, skip_self: bool = False) -> float:
    "Median Euclidean distance from rows of x to their nearest row of real."
    distances = torch.cdist(torch.from_numpy(x), torch.from_numpy(real))
    return distances.sort(1).values[:, int(skip_self)].median().item()


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    "All real digits (1797, 64) in [-1, 1] and their labels."
    digits = load_digits()
    return digits.data / 8 - 1, digits.target


def reference(by_class: bool = True) -> dict:
    "What the real digits score against themselves: random halves, and sets of 1000 drawn with replacement, 100 of each class or as it comes."
    real, target = real_digits()
    rng = np.random.default_rng(0)
    def halves(order): return frechet_distance(real[order[::2]], real[order[1::2]])
    def draw(): return real[np.concatenate([rng.choice(np.flatnonzero(target == k), 100) for k in range(10)]) if by_class else rng.integers(len(real), size=1000)]
    return dict(
        frechet_of_real_halves=float(np.mean([halves(rng.permutation(len(real))) for _ in range(20)])),
        frechet_of_real_draws=float(np.mean([frechet_distance(draw(), real) for _ in range(20)])),
        nearest_real_to_real=nearest_median(real, real, skip_self=True),
    )


def quality(samples: torch.Tensor, labels: np.ndarray) -> dict:
    "Are the samples (N, 1, 8, 8) in [-1, 1] the digits asked for, as varied as the real ones, and no copies?"
    (real, target), x = real_digits(), samples.flatten(1).double().numpy()
    judge = SVC(gamma=0.001).fit((real + 1) * 8, target)
    right = judge.predict((x + 1) * 8) == labels
    return dict(
        label_accuracy=right.mean(),
        worst_class=min(right[labels == k].mean() for k in range(10)),
        frechet=frechet_distance(x, real),
        nearest_over_real=nearest_median(x, real) / nearest_median(real, real, skip_self=True),
    )


def cpu_name() -> str:
    "What the processor calls itself."
    try: names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    except OSError: names = []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a finished run folder; default: train one with the defaults of ddpm-edm-train")
    parser.add_argument("--sets", type=int, default=5, help="sets of 1000 samples")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the samples, and of the training")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()

    result = dict(cpu=cpu_name(), torch=torch.__version__, threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        run = Path(args.run or Path(folder) / "run")
        if not args.run:
            start = time.perf_counter()
            train_images(out=str(run), seed=args.seed, quiet=args.json)
            result["training_seconds"] = time.perf_counter() - start
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        precision = json.loads((run / "config.json").read_text())["training"]["precision"]
        result |= dict(images=log[-1]["images"], precision=precision, training_images_per_second=float(np.median([m["images_per_second"] for m in log])))
        denoiser = load(run)
    result["weights"] = sum(p.numel() for p in denoiser.parameters())

    labels = torch.arange(10).repeat_interleave(100)
    start, sets = time.perf_counter(), []
    for first in range(args.seed, args.seed + 1000 * args.sets, 1000):
        sets.append(generate(denoiser, range(first, first + 1000), (1, 8, 8), karras_sigmas(18), labels=labels))
    result["sampling_images_per_second"] = 1000 * args.sets / (time.perf_counter() - start)
    each = [quality(samples, labels.numpy()) for samples in sets]
    result |= {name: float(np.mean([q[name] for q in each])) for name in each[0]}
    result["worst_class"] = float(min(q["worst_class"] for q in each))
    result |= reference()
    result["frechet_of_each_set"] = [round(q["frechet"], 4) for q in each]
    if args.json: print(json.dumps(result, indent=2))
    else: print("\n".join(f"{k:28} {v:.4g}" if isinstance(v, float) else f"{k:28} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
