"""How well is a GPU used: training and sampling speed of a published network against what the device can do at most?

    python benchmarks/gpu.py                                     CIFAR-10's DDPM++ (55.7 million weights), batches of 64 to 512
    python benchmarks/gpu.py --preset digits --batches 16 64     any preset; runs on a CPU too, which is how it is tested

Training: whole steps of `Trainer` (noise, forward, backward, clipping, AdamW, average) on random images in memory, timed between two
synchronizations of the device. FLOPs are counted by torch for the forward pass, times three for the backward pass; the peak is the best
rate of large square matrix products in the same precision (TF32 for fp32, in which a GPU computes convolutions). Sampling: 18 Heun steps, 35 evaluations. Memory: the most that was allocated;
a batch that does not fit ends the list.
"""
import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_edm.data import ImageData
from ddpm_edm.noise import LogNormal, karras_sigmas
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.solvers import generate
from ddpm_edm.train import PRECISIONS, Settings, Trainer, conv_times, fastest
from ddpm_edm.unet import PRESETS, UNet
from digits import cpu_name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"digits": 8, "mnist": 28, "imagenet64_adm": 64}    # all others: 32


def wait() -> None:
    if DEVICE == "cuda": torch.cuda.synchronize()


def seconds(work, repeats: int) -> float:
    "Mean time of one repetition, after one to warm up."
    work()
    wait()
    began = time.perf_counter()
    for _ in range(repeats): work()
    wait()
    return (time.perf_counter() - began) / repeats


def peak(dtype: torch.dtype) -> float:
    "Operations per second of the best of some large matrix products."
    rates, before = [], torch.get_float32_matmul_precision()
    if DEVICE == "cuda": torch.set_float32_matmul_precision("high")    # TF32
    for n in (4096, 8192, 16384) if DEVICE == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        rates.append(2 * n**3 / min(seconds(lambda: a @ b, 10) for _ in range(3)))
    torch.set_float32_matmul_precision(before)
    return max(rates)


def network(preset: str) -> tuple[UNet, tuple[int, int, int]]:
    "The network without labels to be told of augmentation, and the shape of its images."
    torch.manual_seed(0)
    net = UNet(**PRESETS[preset] | dict(augment_dim=0)).to(DEVICE)
    size = SIZES.get(preset, 32)
    return net, (net.in_channels, size, size)


def forward_flops(net: UNet, shape: tuple[int, int, int]) -> int:
    "For one image; a multiplication and an addition are two."
    with FlopCounterMode(display=False) as counter, torch.no_grad(): net(torch.zeros(1, *shape, device=DEVICE), torch.zeros(1, device=DEVICE))
    return counter.get_total_flops()


def training(preset: str, batch: int, precision: str, channels_last: bool, compiled: bool, steps: int) -> dict:
    "Images per second, operations per second and GB of whole training steps."
    net, shape = network(preset)
    flops = 3 * forward_flops(net, shape)
    labels = torch.arange(2000) % net.num_labels if net.num_labels else None
    data = ImageData(torch.randint(256, (2000, *shape), dtype=torch.uint8), labels, [str(k) for k in range(net.num_labels)] or None)
    settings = Settings(10**9, batch, 1e-3, 1., 10**6, 500_000, 0.1, LogNormal(), 0, precision, clip=1., channels_last=channels_last)
    if DEVICE == "cuda": torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(EDMPrecond(net, 0.5), data, settings, compile=compiled)
    for _ in range(3): trainer.step()
    rate = batch / seconds(trainer.step, steps)
    trainer.forget()
    return dict(batch=batch, images_per_second=rate, flops_per_second=rate * flops,
                gigabytes=torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None)


def sampling(preset: str, batch: int, precision: str) -> float:
    "Images per second of 18 Heun steps."
    net, shape = network(preset)
    denoiser, low = EDMPrecond(net, 0.5).eval().requires_grad_(False), PRECISIONS[precision]
    def draw():
        with torch.autocast(DEVICE, low or torch.bfloat16, enabled=low is not None):
            generate(denoiser, range(batch), shape, karras_sigmas(18), batch=batch, device=DEVICE)
    return batch / seconds(draw, 1)


def fitting(measure: Callable[[int], dict], batches: list[int]) -> list[dict]:
    "What is measured of each batch, the smallest first, up to the one that the device's memory does not hold."
    rows = []
    for batch in sorted(batches):
        try: rows.append(measure(batch))
        except torch.cuda.OutOfMemoryError:
            print(f"batch {batch}: out of memory", file=sys.stderr)
            break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cifar10_ddpmpp")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--compile", action="store_true", help="let torch.compile fuse the network")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each batch size")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if min(*args.batches, args.steps) < 1: parser.error("--batches and --steps must be at least 1")
    precision, channels_last = fastest(conv_times(DEVICE)) if args.precision == "auto" else (args.precision, False)
    facts = dict(device=torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name(), torch=torch.__version__, preset=args.preset,
                 precision=precision, channels_last=channels_last, compiled=args.compile, peak=peak(PRECISIONS[precision] or torch.float32))
    rows = fitting(lambda batch: training(args.preset, batch, precision, channels_last, args.compile, args.steps), args.batches)
    drawn = fitting(lambda batch: dict(batch=batch, images_per_second=sampling(args.preset, batch, precision)), args.batches)
    if args.json: return print(json.dumps(facts | dict(training=rows, sampling=drawn), indent=2))
    print(", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" if k == "peak" else f"{k} {v}" for k, v in facts.items()))
    for row in rows:
        memory = f", {row['gigabytes']:.1f} GB" if row["gigabytes"] else ""
        print(f"training, batch {row['batch']:>4}: {row['images_per_second']:8.1f} images/s, {row['flops_per_second'] / 1e12:.3g} TFLOP/s, "
              f"{row['flops_per_second'] / facts['peak']:.0%} of the peak{memory}")
    for row in drawn: print(f"sampling, batch {row['batch']:>4}: {row['images_per_second']:8.1f} images/s")


if __name__ == "__main__": main()
