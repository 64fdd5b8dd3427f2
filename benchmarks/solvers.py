"""Who ends nearest to the exact path for a given number of evaluations: this library's solvers, its fitted schedules, and other packages?

    python benchmarks/solvers.py                          both exact densities and the loop's overhead
    python benchmarks/solvers.py --parts g2 --nfe 8 12    one of them, at few evaluations
    python benchmarks/solvers.py --parts network          trains a digits network first (both take a while) ...
    python benchmarks/solvers.py --parts network --run runs/digits    ... or takes a finished run

Every sampler starts from the same noise * 80 and sees the same denoiser, which counts its evaluations. The figure is the
mean Euclidean distance between where a sampler ends and where the exact path ends:

    g2       mixture of 5 Gaussians in the plane; 4096 starts
    g64      mixture of 20 Gaussians of unlike widths in 64 dimensions, with centres on a 6-dimensional plane; 1024 starts
    network  digits network, class-conditional; 128 starts; "exact" is 1000 Heun steps, and up to 35 evaluations

"fixed" is the best of 20 schedules (Karras, four rho and five sigma_min), chosen for each sampler and number of evaluations
by the first 512 starts (g64: 128; network: 32, and 8 schedules), for peers as for us; peers that make their own levels have fewer
and, instead, schedules of their own. "peer, to 0.002" are the peers with the usual lowest level alone, as most would use them.
"fitted" are `fit_sigmas` on other starts than those tested. The peers (diffusers, k-diffusion, azula, smalldiffusion) take
part where they are installed: pip install "ddpm_edm[bench]". Stochastic samplers do not belong in this table.
"""
import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from overhead import loop_table
from peers import EXPONENTIAL, TOP, peers

from ddpm_edm.core import CountNFE, Denoiser, seeded_noise
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.oracle import Mixture
from ddpm_edm.solvers import (
    adams_bashforth, adaptive, deis, dpm_multistep, dpm_solver, dpmpp_2m, dpmpp_2s, dpmpp_3m, euler, exp_multistep,
    fit_sigmas, heun, sample, second_order, unipc,
)

# Goals on g2 at each number of evaluations: the best mean errors of 44 settings of the peers, measured before this library
# had fast solvers. Fixed schedules must reach them, fitted ones a third of them.
TARGETS = {8: 0.140, 12: 0.055, 18: 0.028, 35: 4.7e-3, 79: 2.9e-4}
SCHEDULES = [(rho, low) for rho in (3., 7., 20., EXPONENTIAL) for low in (0.002, 0.01, 0.03, 0.1, 0.2)]


class Method(NamedTuple):
    name: str
    step: Callable
    evaluations: int    # in one step; the last, to zero, has one
    fit: bool = False   # whether its schedules are fitted, too


OURS = [
    Method("euler", euler, 1, True), Method("heun", heun, 2, True),
    Method("second_order(1/2)", second_order(1 / 2), 2), Method("second_order(2/3)", second_order(2 / 3), 2),
    *(Method(f"adams_bashforth({k})", adams_bashforth(k), 1) for k in (2, 3, 4)),
    *(Method(f"exp_multistep({k})", exp_multistep(k), 1, k == 4) for k in (2, 3, 4, 5)),
    *(Method(f"deis({k})", deis(k), 1, k == 3) for k in (2, 3, 4)),
    Method("dpmpp_2m", dpmpp_2m, 1, True), Method("dpmpp_3m", dpmpp_3m, 1, True),
    *(Method(f'dpm_multistep({k}, "eps")', dpm_multistep(k, "eps"), 1) for k in (2, 3)),
    Method("dpm_solver_2", dpm_solver(2), 2), Method("dpm_solver_3", dpm_solver(3), 3),
    Method("dpmpp_2s", dpmpp_2s, 2), Method('dpm_solver(3, "x0")', dpm_solver(3, predicts="x0"), 3),
    *(Method(f"unipc({k})", unipc(k), 1, k > 1) for k in (1, 2, 3)), Method('unipc(2, "bh1")', unipc(2, "bh1"), 1),
    Method('unipc(2, "bh2", "eps")', unipc(2, "bh2", "eps"), 1), Method('unipc(3, "bh2", "eps")', unipc(3, "bh2", "eps"), 1),
]


class Problem(NamedTuple):
    name: str
    denoise: Denoiser
    noise: torch.Tensor       # starts to test on
    ends: torch.Tensor
    fit_noise: torch.Tensor   # starts to fit on
    fit_ends: torch.Tensor
    nfe: list[int]
    fit: Callable = lambda n: dict(knots=40 if n <= 20 else 16)    # settings of fit_sigmas for n steps
    fits: tuple = ()          # names of the methods to fit; empty: all that say so
    schedules: list = SCHEDULES
    few: int = 512            # starts that choose among the schedules


def fine(denoise: Denoiser, noise: torch.Tensor) -> torch.Tensor:
    "Ends of exact paths, 1e-8 off at most on g2."
    return sample(denoise, noise, karras_sigmas(1500, 5e-6, TOP, 10.), exp_multistep(5))


def g2(starts: int, fit_starts: int, nfe: list[int]) -> Problem:
    "The mixture in the plane of the golden numbers."
    def f64(values): return torch.tensor(values, dtype=torch.float64)
    denoise = Mixture(f64([[-2., 0.5], [1.5, 1.5], [0., -1.], [3., -2.], [-1., 2.5]]),
                      stds=f64([0.3, 0.25, 0.2, 0.4, 0.15]), weights=f64([0.3, 0.25, 0.2, 0.15, 0.1]))
    test, fit = (seeded_noise(range(first, first + n), (2,), torch.float64) for first, n in ((0, starts), (10**6, fit_starts)))
    return Problem("g2", denoise, test, fine(denoise, test), fit, fine(denoise, fit), nfe)


def g64(starts: int, fit_starts: int, nfe: list[int]) -> Problem:
    "20 Gaussians in 64 dimensions whose centres lie on a plane of 6."
    g = torch.Generator().manual_seed(64)
    def normal(*shape): return torch.randn(*shape, generator=g, dtype=torch.float64)
    plane = torch.linalg.qr(normal(64, 6))[0].T
    weights = torch.rand(20, generator=g, dtype=torch.float64) + 0.2
    stds = 10**(torch.rand(20, generator=g, dtype=torch.float64) * 1.2 - 1.7)    # 0.02 to 0.3
    denoise = Mixture(normal(20, 6) @ plane * 64**0.5 * 0.2, stds=stds, weights=weights / weights.sum())
    test, fit = (seeded_noise(range(first, first + n), (64,), torch.float64) for first, n in ((0, starts), (10**6, fit_starts)))
    return Problem("g64", denoise, test, fine(denoise, test), fit, fine(denoise, fit), nfe, few=128)


def network(starts: int, fit_starts: int, nfe: list[int], run: str | None) -> Problem:
    "A trained digits network with its labels."
    from ddpm_edm.cli import train_images
    from ddpm_edm.train import load
    with tempfile.TemporaryDirectory() as folder:
        if run is None: train_images(out=str(Path(folder) / "run"))
        net = load(run or Path(folder) / "run")

    def denoise(x, sigma):    # sample i of a batch asks for digit i % 10
        return net(x, sigma, labels=torch.arange(len(x)) % 10)
    test, fit = (seeded_noise(range(first, first + n), (1, 8, 8), torch.float64) for first, n in ((0, starts), (10**6, fit_starts)))
    def heun_1000(noise): return sample(denoise, noise, karras_sigmas(1000), heun)
    def cheap(n): return dict(knots=8, rounds=8, starts=[karras_sigmas(n, 0.03, TOP, EXPONENTIAL)])
    return Problem("network", denoise, test, heun_1000(test), fit, heun_1000(fit), [k for k in nfe if k <= 35], cheap,
                   ("dpmpp_3m", "unipc(2)"), [s for s in SCHEDULES if s[0] in (7., EXPONENTIAL) and s[1] < 0.2], 32)


def distance(x: torch.Tensor, ends: torch.Tensor) -> float:
    "Mean Euclidean distance; infinite where a sampler went astray."
    d = (x - ends).flatten(1).norm(dim=1).mean().item()
    return d if math.isfinite(d) else math.inf


@torch.no_grad()
def best(solve: Callable, evaluations: int, schedules: list, problem: Problem, budget: int) -> tuple[float, str] | None:
    "The smallest error of solve(denoise, noise, n, schedule) within a budget of evaluations, and the schedule that has it."
    n, few, found = (budget - 1) // evaluations + 1, min(problem.few, len(problem.noise)), []
    while n >= 1:    # a peer may spend more than we expect
        counted = CountNFE(problem.denoise)
        try: solve(counted, problem.noise[:2], n, schedules[0])
        except (ValueError, IndexError): pass
        if 0 < counted.nfe <= budget: break
        n -= 1
    if n == 0: return None
    for schedule in schedules:
        try: found.append((distance(solve(problem.denoise, problem.noise[:few], n, schedule), problem.ends[:few]), schedule))
        except (ValueError, IndexError, ZeroDivisionError): pass    # a schedule that this sampler can't follow
    if not found: return None
    error, schedule = min(found, key=lambda pair: pair[0])
    if few < len(problem.noise): error = distance(solve(problem.denoise, problem.noise, n, schedule), problem.ends)
    return error, "{} {:g}".format({EXPONENTIAL: "exp"}.get(schedule[0], schedule[0] if isinstance(schedule[0], str) else f"{schedule[0]:g}"), schedule[1])


def ours_fixed(method: Method) -> Callable:
    def solve(denoise, noise, n, schedule):
        rho, low = schedule
        return sample(denoise, noise, karras_sigmas(n, low, TOP, rho), method.step)
    return solve


def ours_fitted(method: Method, problem: Problem, budget: int) -> float:
    n = (budget - 1) // method.evaluations + 1
    sigmas = fit_sigmas(problem.denoise, problem.fit_noise, n, method.step, x0=problem.fit_ends, **problem.fit(n))
    counted = CountNFE(problem.denoise)
    error = distance(sample(counted, problem.noise, sigmas, method.step), problem.ends)
    assert counted.nfe <= budget
    return error


@torch.no_grad()
def ours_adaptive(order: int, problem: Problem, budget: int) -> tuple[float, str] | None:
    "The adaptive solver has no schedule: the best of the tolerances, ever tighter, that keep to the budget."
    found = []
    for low in (0.002, 0.03):
        for rtol in (2., 1., 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 3e-3, 1e-3, 3e-4, 1e-4):
            counted = CountNFE(problem.denoise)
            x = sample(counted, problem.noise, torch.tensor([TOP, low, 0.]), adaptive(order, rtol=rtol, atol=rtol / 5, h_init=0.5))
            if counted.nfe > budget: break
            found.append((distance(x, problem.ends), f"rtol {rtol:g}, to {low:g}"))
    return min(found, default=None)


def cell(value: tuple[float, str] | float | None, bold: bool = False) -> str:
    if value is None: return "–"
    error, note = value if isinstance(value, tuple) else (value, "")
    text = f"{error:.3g}" if error >= 1e-3 else f"{error:.1e}"
    return (f"**{text}**" if bold else text) + (f" ({note})" if note else "")


def table(problem: Problem, with_peers: bool, with_fits: bool) -> dict[str, dict[int, float]]:
    "Print a problem's table and return the best of each kind at each number of evaluations."
    rows = {}    # (kind, name): cells

    def add(kind, name, values):
        rows[kind, name] = dict(zip(problem.nfe, values))
        print(f"{problem.name}: {kind}, {name}", file=sys.stderr, flush=True)    # it takes a while: show where it is

    for method in OURS:
        add("fixed", method.name, [best(ours_fixed(method), method.evaluations, problem.schedules, problem, k) for k in problem.nfe])
    for order in (2, 3): add("adaptive", f"adaptive({order})", [ours_adaptive(order, problem, k) for k in problem.nfe])
    if with_fits:
        for method in OURS:
            if method.name in problem.fits if problem.fits else method.fit:
                add("fitted", method.name, [ours_fitted(method, problem, k) for k in problem.nfe])
    settings = 0
    if with_peers:
        found, missing = peers()
        for peer in found:
            schedules = [s for s in problem.schedules if peer.schedules(s)] + list(peer.own)
            settings += len(schedules)
            add("peer", f"{peer.package} {peer.method}", [best(peer.solve, peer.evaluations, schedules, problem, k) for k in problem.nfe])
            usual = [s for s in schedules if s[1] == 0.002]
            add("peer, to 0.002", f"{peer.package} {peer.method}", [best(peer.solve, peer.evaluations, usual, problem, k) for k in problem.nfe])
        for package, reason in missing.items(): print(f"{package} takes no part: {reason}\n")

    def value(v): return math.inf if v is None else v[0] if isinstance(v, tuple) else v
    tops = {kind: {k: min((value(cells[k]), name) for (what, name), cells in rows.items() if what == kind) for k in problem.nfe}
            for kind in ("fixed", "adaptive", "fitted", "peer", "peer, to 0.002") if any(what == kind for what, _ in rows)}
    size = f"{len(problem.noise)} starts" + (f", fitted on {len(problem.fit_noise)} others" if with_fits else "")
    print(f"### {problem.name}: mean end error, {size}" + (f", {settings} settings of peers" if settings else "") + "\n")
    print("| schedule | sampler | " + " | ".join(f"{k} NFE" for k in problem.nfe) + " |\n" + "|---" * (2 + len(problem.nfe)) + "|")
    for (kind, name), cells in rows.items():
        if kind != "peer, to 0.002": print(f"| {kind} | {name} | " + " | ".join(cell(v, value(v) == tops[kind][k][0]) for k, v in cells.items()) + " |")
    print(f"\nBest of each kind on {problem.name}:\n\n| kind | " + " | ".join(f"{k} NFE" for k in problem.nfe) + " |\n|---" + "|---" * len(problem.nfe) + "|")
    for kind, row in tops.items(): print(f"| {kind} | " + " | ".join(f"{cell(error)} {name}" if error < math.inf else "–" for error, name in row.values()) + " |")
    print(flush=True)
    return {kind: {k: error for k, (error, _) in row.items()} for kind, row in tops.items()}


def verdict(tops: dict[str, dict[int, float]]) -> None:
    "Print whether the targets on g2 are met."
    print("Targets on g2 (best of 44 settings of the peers; fitted: a third of it):\n")
    print("| NFE | target | fixed | met | a third | fitted | met |\n|---|---|---|---|---|---|---|")
    for k, goal in TARGETS.items():
        if k not in tops["fixed"]: continue
        fixed, fitted = tops["fixed"][k], tops.get("fitted", {}).get(k)
        met = "yes" if fixed <= goal else "NO"
        met_fitted = "–" if fitted is None else "yes" if fitted <= goal / 3 else "NO"
        print(f"| {k} | {cell(goal)} | {cell(fixed)} | {met} | {cell(goal / 3)} | {cell(fitted)} | {met_fitted} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("g2", "g64", "network", "overhead"), default=["g2", "g64", "overhead"])
    parser.add_argument("--nfe", type=int, nargs="+", default=list(TARGETS), help="numbers of evaluations")
    parser.add_argument("--starts", type=int, help="starts tested; default 4096 (g2), 1024 (g64), 128 (network)")
    parser.add_argument("--fit-starts", type=int, help="starts fitted on; default 512 (g2), 128 (g64), 48 (network)")
    parser.add_argument("--no-peers", action="store_true", help="leave the other packages out")
    parser.add_argument("--no-fits", action="store_true", help="fixed schedules only")
    parser.add_argument("--run", help="a finished run folder for the network; default: train one")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; small tensors want one")
    args = parser.parse_args()
    if min(args.nfe) < 1: parser.error("--nfe must be at least 1")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")    # the peers' own
    builders = {"g2": (g2, 4096, 512), "g64": (g64, 1024, 128), "network": (network, 128, 48)}
    began = time.perf_counter()
    for part in args.parts:
        if part == "overhead":
            print(loop_table(not args.no_peers))
            continue
        build, starts, fit_starts = builders[part]
        more = (args.run,) if part == "network" else ()
        problem = build(args.starts or starts, args.fit_starts or fit_starts, sorted(set(args.nfe)), *more)
        tops = table(problem, not args.no_peers, not args.no_fits)
        if part == "g2": verdict(tops)
    print(f"{time.perf_counter() - began:.0f} s, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__": main()
