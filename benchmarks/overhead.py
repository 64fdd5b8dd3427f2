"""What the sampling loop costs beside the network it calls.

    python benchmarks/overhead.py [--batch 64] [--size 8] [--steps 18] [--repeats 7] [--device cpu]

Times `sample` (Heun) against as many bare forward passes of the network as it makes evaluations, in alternating pairs
(so that a machine that slows down slows both), and prints the median of the pairs' ratios with their quartiles. 1.02 means
2 % above the network. On a busy machine pairs scatter by more than that: then read the last ratio, which compares a run's
whole time with the time inside the network during the same run (CPU only, where a call returns when its work is done).

Last comes the loop without a network: microseconds per evaluation of a denoiser that does nothing, for the solvers of this
library and of the peers that are installed (pip install "ddpm_edm[bench]"), batch 16 x 3 x 32 x 32, in alternating runs.
"""
import argparse
import statistics
import time

import torch

from ddpm_edm.core import CountNFE, seeded_noise
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.solvers import dpmpp_2m, dpmpp_3m, euler, heun, sample, unipc
from ddpm_edm.unet import UNet


def seconds(f, device: str) -> float:
    "Time of one call, with the device's queue empty before and after."
    def wait():
        if device.startswith("cuda"): torch.cuda.synchronize(device)
    wait()
    start = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - start


def overhead(
    batch: int = 64, size: int = 8, steps: int = 18, repeats: int = 7, device: str = "cpu",
) -> dict[str, list[float]]:
    "Ratios of paired times: the loop against the bare network, and against the denoiser (network in EDMPrecond)."
    torch.manual_seed(0)
    net = UNet(1, mults=(1, 1), num_labels=10).to(device).eval()
    denoise, nfe = EDMPrecond(net), 2 * steps - 1
    noise, sigmas = seeded_noise(range(batch), (1, size, size), device=device), karras_sigmas(steps)
    labels = torch.arange(batch, device=device) % 10
    x, c_noise = noise.double(), torch.zeros(batch, device=device)

    @torch.no_grad()
    def network():
        for _ in range(nfe): net(noise, c_noise, labels=labels)

    @torch.no_grad()
    def denoiser():
        for _ in range(nfe): denoise(x, 1., labels=labels)

    def loop(): sample(denoise, noise, sigmas, labels=labels)

    loop(), network(), denoiser()    # warm up
    ratios = {"network": [], "denoiser": []}
    for i in range(repeats):
        for name, f in (("network", network), ("denoiser", denoiser)):
            pair = [(f, 0), (loop, 1)]
            took = {k: seconds(g, device) for g, k in (pair if i % 2 == 0 else pair[::-1])}
            ratios[name].append(took[1] / took[0])
    return ratios


class Timed(torch.nn.Module):
    "A network that adds up the time spent in it."
    def __init__(self, net):
        super().__init__()
        self.net, self.seconds = net, 0.

    def forward(self, *args, **kwargs):
        start = time.perf_counter()
        out = self.net(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return out


def overhead_within(batch: int = 64, size: int = 8, steps: int = 18, repeats: int = 7) -> list[float]:
    "Ratios of a run's time to the time inside the network in the same run, on the CPU."
    torch.manual_seed(0)
    net = Timed(UNet(1, mults=(1, 1), num_labels=10).eval())
    noise, labels, sigmas = seeded_noise(range(batch), (1, size, size)), torch.arange(batch) % 10, karras_sigmas(steps)
    def run():
        net.seconds = 0.
        return seconds(lambda: sample(EDMPrecond(net), noise, sigmas, labels=labels), "cpu") / net.seconds
    run()
    return [run() for _ in range(repeats)]


def loop_microseconds(steps: int = 1000) -> float:
    "Time per evaluation with a denoiser that does next to nothing, in microseconds: the loop itself."
    noise, sigmas = torch.zeros(1, 2), karras_sigmas(steps)
    def run(): sample(lambda x, sigma: x, noise, sigmas)
    run()
    return min(seconds(run, "cpu") for _ in range(5)) / (2 * steps - 1) * 1e6


def loop_costs(with_peers: bool = True, steps: int = 100, repeats: int = 7) -> dict[tuple[str, str], float]:
    "Microseconds per evaluation, by package and method: the best of runs in turn, with a denoiser that returns what it has."
    noise = seeded_noise(range(16), (3, 32, 32))
    answers = {dtype: torch.zeros(16, 3, 32, 32, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    def denoise(x, sigma): return answers[x.dtype]
    runs, sigmas = {}, karras_sigmas(steps)
    for name, step in (("euler", euler), ("heun", heun), ("dpmpp_2m", dpmpp_2m), ("dpmpp_3m", dpmpp_3m), ("unipc(2)", unipc(2))):
        for dtype in (torch.float64, torch.float32):
            runs["ddpm_edm", f"{name}, {str(dtype)[6:]}"] = lambda f, step=step, dtype=dtype: sample(f, noise, sigmas, step, dtype=dtype)
    if with_peers:
        from peers import peers
        for peer in peers()[0]:
            runs[peer.package, f"{peer.method}, float32"] = lambda f, peer=peer: peer.solve(f, noise, steps, (7., 0.002))
    evaluations, times = {}, {}
    with torch.no_grad():
        for key, run in runs.items():    # warm up, and count
            counted = CountNFE(denoise)
            try: run(counted)
            except KeyError: continue    # a peer that works in float64 from float32 noise, or in no dtype of ours
            evaluations[key] = counted.nfe
        for _ in range(repeats):
            for key in evaluations: times.setdefault(key, []).append(seconds(lambda: runs[key](denoise), "cpu"))
    return {key: min(took) / evaluations[key] * 1e6 for key, took in times.items()}


def loop_table(with_peers: bool = True) -> str:
    "`loop_costs` as a Markdown table, the dearest last."
    rows = sorted(loop_costs(with_peers).items(), key=lambda row: (row[0][0] != "ddpm_edm", row[1]))
    lines = [f"| {package} | {method} | {cost:.0f} |" for (package, method), cost in rows]
    head = f"### Loop alone, batch 16 x 3 x 32 x 32, {torch.get_num_threads()} threads\n\n| package | method, state | us per evaluation |\n|---|---|---|\n"
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 64), ("size", 8), ("steps", 18), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.repeats < 5: parser.error("--repeats must be at least 5: single timings are noise")
    print(f"UNet(1, mults=(1, 1), num_labels=10), batch {args.batch}, {args.size} x {args.size}, {args.steps} Heun steps, "
          f"{args.device}, {torch.get_num_threads()} threads")
    def report(name, ratios):
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name}: median {middle:.4f}, quartiles {low:.4f} to {high:.4f}, {len(ratios)} repetitions")
    for name, ratios in overhead(**vars(args)).items(): report(f"sample / (NFE x {name}), alternating pairs", ratios)
    if args.device == "cpu":
        ratios = overhead_within(args.batch, args.size, args.steps, args.repeats)
        report("sample / network, within one run", ratios)
    print(f"the loop alone: {loop_microseconds():.1f} us per evaluation\n")
    print(loop_table())


if __name__ == "__main__": main()
