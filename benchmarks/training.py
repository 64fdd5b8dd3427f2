"""How fast, in how much memory and to what quality do this package and its peers train?

    python benchmarks/training.py                        images per second at equal FLOPs, and memory
    python benchmarks/training.py --minutes 1,3,10       pixel Frechet distance of digits after so many minutes of training

Peers that are not installed are left out (`pip install ddpm_edm[bench]` has them). Speed: 1 x 32 x 32 images, batches of 64,
networks of 0.85 to 0.92 GFLOP per image forward, whole training steps as each package's own trainer does them (noise, forward,
backward, clipping and averaging where it has them, optimizer), every contestant in turn, minimum and median over the rounds.
`default` is the precision that a user gets who sets none: fp32 for the peers, the measured one here. Memory: growth of the
process while it trains in fp32, in a process of its own. Quality: sets of 1000 samples without labels, 35 evaluations each, clipped
to the range of pictures, against all real digits, mean and scatter of the sets; every package by its own recipe, with the same
wall-clock time; 'real halves' are two random halves of the data, 'real draws' 1000 of them, drawn with replacement.
"""
import importlib
import io
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ddpm_edm.cli import run_command
from ddpm_edm.data import ImageData, digits
from ddpm_edm.metrics import frechet_distance
from ddpm_edm.noise import LogNormal, karras_sigmas
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.solvers import generate
from ddpm_edm.train import Settings, Trainer, conv_times, fastest
from ddpm_edm.unet import UNet
from digits import cpu_name, real_digits, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = ("fp32", "bf16")


def package(name: str):
    "A peer's module; ImportError or whatever its import raises says why there is none."
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def autocast(precision: str): return torch.autocast(DEVICE, torch.bfloat16, enabled=precision != "fp32")


# --- speed: each maker returns a network for counting FLOPs, and a function that does one step on 64 images

def ours(precision: str) -> tuple[Callable, Callable]:
    images = torch.randint(256, (2000, 1, 32, 32), dtype=torch.uint8)
    net = UNet(1, channels=48, mults=(1, 2, 2), attention=(2,))
    denoiser, data = EDMPrecond(net).to(DEVICE), ImageData(images)
    channels_last = False
    if precision == "default": precision, channels_last = fastest(conv_times(DEVICE))
    settings = Settings(10**6, 64, 1e-3, 0.02, 5000, 8000, 0.05, LogNormal(), 0, precision, channels_last=channels_last)
    return lambda x: net(x, x.new_zeros(len(x))), Trainer(denoiser, data, settings).step


def diffusers(precision: str) -> tuple[Callable, Callable]:
    D = package("diffusers")
    net = D.UNet2DModel(sample_size=32, in_channels=1, out_channels=1, layers_per_block=2, block_out_channels=(32, 64, 96), norm_num_groups=16,
                        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")).to(DEVICE)
    schedule, opt, x0 = D.DDPMScheduler(1000), torch.optim.AdamW(net.parameters(), 1e-4), torch.rand(64, 1, 32, 32, device=DEVICE)
    def step():
        n, t = torch.randn_like(x0), torch.randint(1000, (64,), device=DEVICE)
        with autocast(precision): loss = F.mse_loss(net(schedule.add_noise(x0, n, t), t).sample.float(), n)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        opt.zero_grad()
    return lambda x: net(x, torch.zeros(len(x), device=x.device)), step


def smalldiffusion(precision: str) -> tuple[Callable, Callable]:
    S = package("smalldiffusion")
    net = S.Unet(32, 1, 1, ch=32, ch_mult=(1, 2, 3), attn_resolutions=(8,)).to(DEVICE)
    opt, schedule, x0 = torch.optim.AdamW(net.parameters(), 1e-3), S.ScheduleDDPM(), torch.rand(64, 1, 32, 32, device=DEVICE)
    def step():
        opt.zero_grad()
        x, sigma, eps, _ = S.generate_train_sample(x0, schedule)
        with autocast(precision): loss = type(net).get_loss(net, x, sigma, eps)
        loss.backward()
        opt.step()
    return lambda x: net(x, torch.ones((), device=x.device)), step


def denoising_diffusion_pytorch(precision: str) -> tuple[Callable, Callable]:
    P = package("denoising_diffusion_pytorch")
    net = P.Unet(dim=32, dim_mults=(1, 2, 4), channels=1).to(DEVICE)
    model = P.GaussianDiffusion(net, image_size=32).to(DEVICE)
    opt, x0 = torch.optim.Adam(model.parameters(), 1e-4, betas=(0.9, 0.99)), torch.rand(64, 1, 32, 32, device=DEVICE)
    ema = package("ema_pytorch").EMA(model, beta=0.995, update_every=10)
    def step():
        with autocast(precision): loss = model(x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        ema.update()
    return lambda x: net(x, torch.zeros(len(x), device=x.device)), step


MAKERS = {"ddpm_edm": ours, "diffusers": diffusers, "smalldiffusion": smalldiffusion, "denoising-diffusion-pytorch": denoising_diffusion_pytorch}


def gflop(net: Callable) -> float:
    "Billions of floating-point operations for one image, forward; a multiplication and an addition are two."
    with FlopCounterMode(display=False) as counter, torch.no_grad(): net(torch.zeros(1, 1, 32, 32, device=DEVICE))
    return counter.get_total_flops() / 1e9


def installed(makers: dict) -> list[str]:
    "Who can take part; says who can't."
    names = []
    for name in makers:
        try:
            if name != "ddpm_edm": package(name.replace("-", "_"))
            names.append(name)
        except Exception as e: print(f"without {name}: {type(e).__name__}: {str(e).splitlines()[0][:100] if str(e) else ''}", file=sys.stderr)
    return names


def wait() -> None:
    if DEVICE == "cuda": torch.cuda.synchronize()


def speeds(names: list[str], rounds: int) -> dict:
    "Seconds per step: the contestants' times in every round, one after the other, so that a busy moment hurts all of them."
    steps, flops, times = {}, {}, {}
    for name in names:
        for precision in ("default", *PRECISIONS):
            if name != "ddpm_edm" and precision == "default": continue    # fp32
            net, steps[name, precision] = MAKERS[name](precision)
            flops[name] = gflop(net)
            steps[name, precision]()    # warm up
    for _ in range(rounds):
        for who, step in steps.items():
            wait()
            began = time.perf_counter()
            step()
            wait()
            times.setdefault(who, []).append(time.perf_counter() - began)
    for name in names: times.setdefault((name, "default"), times.get((name, "fp32")))
    return dict(gflop=flops, seconds=times)


def memory(name: str) -> float:
    "MB by which training in fp32 makes a process grow at its largest, beyond the process with its network and data."
    import psutil
    _, step = MAKERS[name]("fp32")
    process, largest, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss
    def watch():
        while not done.wait(0.002): largest[0] = max(largest[0], process.memory_info().rss)
    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(4): step()
    done.set()
    thread.join()
    return torch.cuda.max_memory_allocated() / 1e6 if DEVICE == "cuda" else (largest[0] - before) / 1e6


# --- quality: each trains, and after so many seconds of training yields a function that makes samples (n, 64), one for each of n seeds

def train_ours(marks: list[float]) -> Iterator[Callable]:
    "Muon, stable targets, batches of 128, a rate of 4e-3 that falls to a tenth, half of the default network's width for less than five minutes; a run for each mark, since the rate falls to a run's end."
    data, (precision, channels_last) = digits(), fastest(conv_times(DEVICE))
    settings = Settings(128, 128, 4e-3, 0.1, 5000, 8000, 0., LogNormal(-0.2), 0, precision, channels_last=channels_last, optimizer="muon", stable_targets=True)
    for mark in marks:
        torch.manual_seed(0)
        began, net = time.perf_counter(), UNet(1, channels=32) if mark < 300 else UNet(1, mults=(1, 1))
        run = Trainer(EDMPrecond(net, data.stats().std), data, replace(settings))
        while (share := (time.perf_counter() - began) / mark) < 1:
            if run.seen: run.settings.images = int(run.seen / share)    # at this speed: so the rate falls by the clock
            run.step()
            wait()
        yield lambda seeds: generate(run.ema.model.eval(), seeds, data.shape, karras_sigmas(18)).flatten(1)


def shuffled(size: int) -> Iterator[torch.Tensor]:
    "Real digits (B, 1, 8, 8) in [-1, 1] in random order, without end."
    x = torch.tensor(real_digits()[0], dtype=torch.float32, device=DEVICE).view(-1, 1, 8, 8)
    while True: yield from (x[index] for index in torch.randperm(len(x), device=DEVICE).split(size) if len(index) == size)


def pauses(marks: list[float], step: Callable) -> Iterator[None]:
    "Does steps, and pauses after so many seconds of them; what is done in a pause does not count."
    spent = 0.
    for mark in marks:
        while spent < mark:
            began = time.perf_counter()
            step()
            wait()
            spent += time.perf_counter() - began
        yield


def train_smalldiffusion(marks: list[float]) -> Iterator[Callable]:
    "The recipe of its Fashion-MNIST example: width 64, rate 7e-4, average with 0.99, and its accelerated sampler; at 8 x 8."
    S, averages = package("smalldiffusion"), package("torch.optim.swa_utils")
    net, batches = S.Scaled(S.Unet)(8, 1, 1, ch=64, ch_mult=(1, 2), attn_resolutions=(4,)).to(DEVICE), shuffled(64)
    schedule, opt = S.ScheduleDDPM(beta_start=0.0001, beta_end=0.02, N=1000), torch.optim.AdamW(net.parameters(), 7e-4)
    ema = averages.AveragedModel(net, multi_avg_fn=averages.get_ema_multi_avg_fn(0.99))
    def step():
        opt.zero_grad()
        x, sigma, eps, _ = S.generate_train_sample(next(batches), schedule)
        type(net).get_loss(net, x, sigma, eps).backward()
        opt.step()
        ema.update_parameters(net)
    def draw(seeds):
        *_, x = S.samples(ema.module.eval(), schedule.sample_sigmas(35), gam=1.6, batchsize=len(seeds))
        return x.flatten(1)
    for _ in pauses(marks, step): yield draw


def train_denoising_diffusion_pytorch(marks: list[float]) -> Iterator[Callable]:
    "The settings of its Trainer: rate 1e-4, clipping at 1, average with 0.995 every 10 steps; 35 DDIM steps."
    P, batches = package("denoising_diffusion_pytorch"), shuffled(16)
    model = P.GaussianDiffusion(P.Unet(dim=64, dim_mults=(1, 2), channels=1), image_size=8, sampling_timesteps=35).to(DEVICE)
    opt, ema = torch.optim.Adam(model.parameters(), 1e-4, betas=(0.9, 0.99)), package("ema_pytorch").EMA(model, beta=0.995, update_every=10)
    def step():
        model((next(batches) + 1) / 2).backward()    # it normalizes images from [0, 1] by itself
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        ema.update()
    for _ in pauses(marks, step): yield lambda seeds: 2 * ema.ema_model.sample(batch_size=len(seeds)).flatten(1) - 1


TRAINERS = {"ddpm_edm": train_ours, "smalldiffusion": train_smalldiffusion, "denoising-diffusion-pytorch": train_denoising_diffusion_pytorch}


SETS = 3    # of 1000 samples


def quality(name: str, minutes: list[float]) -> dict[float, dict[str, float]]:
    "Squared Frechet distance of 1000 samples to all real digits, in pixels, after so many minutes of training: mean and scatter of the sets."
    torch.manual_seed(0)
    result = {}
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for m, draw in zip(minutes, TRAINERS[name]([60 * m for m in minutes])):
            with torch.no_grad(): x = torch.cat([draw(range(k, k + 250)) for k in range(0, 1000 * SETS, 250)])
            each = [frechet_distance(part.double().cpu().numpy(), real_digits()[0]) for part in x.clamp(-1, 1).chunk(SETS)]
            result[m] = dict(mean=np.mean(each), scatter=np.std(each, ddof=1))
    return result


def training(
    minutes: str = "",          # such as 1,3,10: measure quality after so many minutes instead of speed
    rounds: int = 8,            # of the speed measurement
    memory_of: str = "",        # used by the command itself: measure one package's memory in this process
    as_json: bool = False,      # print JSON
) -> None:
    "Measure training beside the peers that are installed."
    if rounds < 1: raise ValueError(f"rounds must be at least 1, got {rounds}")
    if memory_of: return print(memory(memory_of))
    facts = dict(device=torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name(), threads=torch.get_num_threads(), torch=torch.__version__)
    if minutes:
        result = {name: quality(name, sorted(float(m) for m in minutes.split(","))) for name in installed(TRAINERS)}
        lines = [f"{name:>28}: " + ", ".join(f"{v['mean']:.3f} (scatter {v['scatter']:.3f}) after {m:g} min" for m, v in values.items()) for name, values in result.items()]
        of_real = reference(by_class=False)
        for name, key in {"real halves": "frechet_of_real_halves", "real draws": "frechet_of_real_draws"}.items():
            result[name] = of_real[key]
            lines.append(f"{name:>28}: {of_real[key]:.3f}")
    else:
        names = installed(MAKERS)
        measured = speeds(names, rounds)
        grown = {name: float(subprocess.run([sys.executable, __file__, "--memory_of", name], capture_output=True, text=True, check=True).stdout.split()[-1])
                 for name in names}
        result, lines = {}, []
        for name in names:
            rate = {precision: {how: 64 / f(measured["seconds"][name, precision]) for how, f in (("best", min), ("median", np.median))}
                    for precision in ("default", *PRECISIONS)}
            result[name] = dict(gflop=measured["gflop"][name], images_per_second=rate, memory_mb=grown[name])
            lines.append(f"{name:>28}: {measured['gflop'][name]:.2f} GFLOP, {grown[name]:6.0f} MB; images/s "
                         + ", ".join(f"{precision} {r['best']:.1f} (median {r['median']:.1f})" for precision, r in rate.items()))
        peers = [name for name in names if name != "ddpm_edm"]
        for precision in ("default", *PRECISIONS) if peers else ():
            best = lambda how: result["ddpm_edm"]["images_per_second"][precision][how] / max(result[p]["images_per_second"][precision][how] for p in peers)
            lines.append(f"{precision}: {best('best'):.2f} times the fastest peer (median {best('median'):.2f})")
    if as_json: print(json.dumps(facts | dict(result=result), indent=2))
    else: print("\n".join([*lines, ", ".join(f"{k} {v}" for k, v in facts.items())]))


if __name__ == "__main__": run_command(training, "training.py")
