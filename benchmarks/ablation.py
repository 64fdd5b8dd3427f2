"""Which change on the way from the VP and VE models to EDM helps, on digits?

    python benchmarks/ablation.py                                             every row of nbs/09b_ablation.ipynb, three seeds each
    python benchmarks/ablation.py --images 160_000 --seeds 5 --samples 1000   where there is a GPU

One budget and one sampler (18 Heun steps from 80 to 0.02 and 0) for all rows. A row is a wrapper, a density of training noise and
a weight; A and B have another network, A other hyperparameters, F augmentation. Each seed has its own first weights, images and
noise, the same in every row of one network and one batch size. Printed: the mean over seeds and its standard error, of the share
of samples that a classifier reads as asked, of the Frechet distance to all real digits (of pixels), of the distance to the nearest
real digit over that among real ones, and of the squared error on digits that training did not see, in EDM's weight, at a few noise
levels. `--as_json` gives every level and every seed.
"""
import json
import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from ddpm_edm.augment import Augment
from ddpm_edm.cli import run_command
from ddpm_edm.data import digits
from ddpm_edm.ema import EMA
from ddpm_edm.noise import LogNormal, LogUniform, VPNoise, karras_sigmas
from ddpm_edm.precond import DenoisingLoss, EDMLoss, EDMPrecond, VEPrecond, VPPrecond
from ddpm_edm.solvers import generate
from ddpm_edm.train import learning_rate
from ddpm_edm.unet import UNet
from digits import cpu_name, quality

# From here to `drawn` as in the notebook, word for word; tests/test_ablation.py holds them equal

device = "cuda" if torch.cuda.is_available() else "cpu"
data = digits().to(device)
sd = data.stats().std
def by_noise(sigma): return 1 / sigma**2                                               # VP and VE: error of the noise
by_output = EDMLoss(sigma_data=sd).weight                                              # EDM: 1 / c_out^2
WRAPPERS = {"VP": (VPPrecond, 1.), "VE": (VEPrecond, 4.), "EDM": (partial(EDMPrecond, sigma_data=sd), 16.)}
DEEP = dict(channels=16, mults=(1, 2, 4), blocks=2)    # 8 x 8, 4 x 4, 2 x 2
WIDE = dict(channels=32, mults=(1, 1))                 # 8 x 8, 4 x 4
OURS = dict(batch=64, lr=4e-3, lr_end=0.02, warmup=0.05, betas=(0.9, 0.99), clip=math.inf, halflife=0.05)    # warm-up and half-life: shares of the run
SONG = OURS | dict(batch=16, lr=8e-4, lr_end=1., warmup=0.004, betas=(0.9, 0.999), clip=1.)                   # theirs in the measure of this run
GENTLE = Augment(scale=0.12, rotate=0.12, stretch=0.12, translate=0.12, scale_std=0.1, rotate_max=1 / 12, stretch_std=0.1, translate_std=0.06)


class Row(NamedTuple):
    "What a row trains, and how."
    wrapper: str
    noise: LogNormal | LogUniform | VPNoise
    weight: Callable
    network: dict = WIDE
    training: dict = OURS
    augment: Augment | None = None
    told: bool = True    # whether the network hears of the augmentation

ROWS = {
    "A, VP": Row("VP", VPNoise(), by_noise, DEEP | dict(dropout=0.1), SONG | dict(halflife=0.1)),
    "A, VE": Row("VE", LogUniform(), by_noise, DEEP | dict(dropout=0.1), SONG | dict(halflife=0.01)),
    "B, VP": Row("VP", VPNoise(), by_noise, DEEP),           "B, VE": Row("VE", LogUniform(), by_noise, DEEP),
    "C, VP": Row("VP", VPNoise(), by_noise),                 "C, VE": Row("VE", LogUniform(), by_noise),
    "D, VP": Row("EDM", VPNoise(), by_noise),                "D, VE": Row("EDM", LogUniform(), by_noise),
    "D + weight, VP": Row("EDM", VPNoise(), by_output),      "D + weight, VE": Row("EDM", LogUniform(), by_output),
    "D + density": Row("EDM", LogNormal(), by_noise),
    "E": Row("EDM", LogNormal(), by_output),
    "E, density moved": Row("EDM", LogNormal(-0.6), by_output),
    "F": Row("EDM", LogNormal(), by_output, augment=GENTLE),
    "F, not told": Row("EDM", LogNormal(), by_output, augment=GENTLE, told=False),
}

shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
seen, unseen = shuffled[:1500], shuffled[1500:]
LEVELS = np.geomspace(0.02, 80, 13).tolist()


def fresh(row, seed=0):
    "The untrained denoiser of a row; for networks of one shape the first weights depend on the seed alone."
    if row not in ROWS: raise ValueError(f"row must be one of {', '.join(map(repr, ROWS))}, got {row!r}")
    r, (wrapper, noise_scale) = ROWS[row], WRAPPERS[ROWS[row].wrapper]
    def network(augment_dim): return UNet(1, num_labels=10, noise_scale=noise_scale, augment_dim=augment_dim, **r.network)
    torch.manual_seed(seed)
    plain, net = network(0), network(r.augment.dim if r.augment and r.told else 0)
    net.load_state_dict(plain.state_dict(), strict=False)    # told or not, the first weights are the same
    if net.augment_dim: torch.nn.init.normal_(net.embed_augment.weight)    # so short a run can't start it at zero
    return wrapper(net).to(device)


def trained(row, seed=0, images=16_000, **changes):    # changes to the row's training, such as batch=192
    "Averaged weights after so many images; which images, and the unit noise on them, depend on seed and batch alone."
    model, r = fresh(row, seed), ROWS[row]
    s = r.training | changes
    if images < s["batch"]: raise ValueError(f"images must be at least one batch, {s['batch']}, got {images}")
    loss, ema = DenoisingLoss(r.noise, r.weight), EMA(model, images * s["halflife"], rampup=0.1)
    opt = torch.optim.Adam(model.parameters(), s["lr"], betas=s["betas"])
    which, levels, noises, changed = (torch.Generator().manual_seed(4 * seed + k) for k in range(4))
    for start in range(0, images, s["batch"]):
        x0, labels = data.batch(seen[torch.randint(len(seen), (s["batch"],), generator=which)])
        x0, told = r.augment(x0, r.augment.draw(len(x0), changed)) if r.augment else (x0, None)
        sigma, n = r.noise.sample(len(x0), levels).to(x0), torch.randn(x0.shape, generator=noises).to(x0)
        for group in opt.param_groups: group["lr"] = learning_rate(start, images, s["lr"], s["lr_end"], images * s["warmup"])
        loss(model, x0, sigma=sigma, n=n, labels=labels, **dict(augment=told) if r.augment and r.told else {}).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s["clip"])
        opt.step()
        opt.zero_grad()
        ema.update(model, s["batch"], start + s["batch"])
    return ema.model


@torch.no_grad()
def errors(denoise):
    "Mean squared error on unseen digits at each of LEVELS, in EDM's weight; the unit noise is one for all."
    x0, labels = data.batch(unseen)
    n = torch.randn(x0.shape, generator=torch.Generator().manual_seed(9)).to(x0)
    by_level = [denoise(x0 + s * n, torch.full((len(x0),), s).to(x0), labels=labels) - x0 for s in LEVELS]
    return [by_output(s) * error.square().mean().item() for s, error in zip(LEVELS, by_level)]


def drawn(denoise, seed=0, count=500, steps=18):
    "Samples, as many of each class in order."
    labels = torch.arange(10).repeat_interleave(count // 10)
    return generate(denoise, range(seed * count, (seed + 1) * count), data.shape, karras_sigmas(steps, 0.02, 80.), labels=labels, device=device)


def over_seeds(values: list[float]) -> tuple[float, float | None]:
    "Mean and its standard error, which one seed does not tell."
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / n**0.5) if n > 1 else None


def ablation(
    images: int = 16_000,    # images in each run
    seeds: int = 3,          # runs of each row
    samples: int = 500,      # samples of each run, as many of every class
    as_json: bool = False,   # print JSON with every seed and level
) -> None:
    "Train every row of the ablation at equal budget and measure its samples and its error on unseen digits."
    if seeds < 1: raise ValueError(f"seeds must be at least 1, got {seeds}")
    if samples < 20 or samples % 10: raise ValueError(f"samples must be a multiple of 10 and at least 20, got {samples}")
    asked, result, began = np.repeat(np.arange(10), samples // 10), {}, time.perf_counter()
    for row in ROWS:
        runs = []
        for seed in range(seeds):
            model = trained(row, seed, images)
            measured = quality(drawn(model, seed, samples), asked)
            runs.append(dict(accuracy=float(measured["label_accuracy"]), frechet=measured["frechet"],
                             nearest=measured["nearest_over_real"], errors=errors(model)))
        result[row] = runs
        if not as_json: print(line(row, runs), flush=True)
    facts = dict(images=images, seeds=seeds, samples=samples, device=device if device == "cuda" else cpu_name(),
                 threads=torch.get_num_threads(), torch=torch.__version__, minutes=(time.perf_counter() - began) / 60)
    if as_json: print(json.dumps(facts | dict(levels=LEVELS, rows=result), indent=2))
    else: print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()))


def line(row: str, runs: list[dict]) -> str:
    "One row in words and numbers."
    parts = []
    for measure in ("accuracy", "frechet", "nearest"):
        mean, error = over_seeds([run[measure] for run in runs])
        parts.append(f"{measure} {mean:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
    shown = [f"{np.mean([run['errors'][i] for run in runs]):.3f} at {LEVELS[i]:.2g}" for i in (0, 4, 8, 12)]
    return f"{row:>17}: {', '.join(parts)}; error {', '.join(shown)}"


if __name__ == "__main__": run_command(ablation, "ablation.py")
