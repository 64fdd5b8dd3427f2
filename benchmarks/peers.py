"""Deterministic samplers of other packages under one call, for the benchmarks; what is not installed is left out.

`peers()` lists them; `peer.solve(denoise, noise, n, schedule)` draws samples with the peer's public interface, starting
from noise * 80, with the exact same denoiser. A schedule is (rho, sigma_min) of Karras et al.; rho = 1e6 is exponential.
Where a peer makes its own levels, it is told rho and sigma_min; a fixed name such as "beta" stands for a schedule of its own.
"""
import importlib
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import torch

from ddpm_edm.noise import karras_sigmas

TOP, EXPONENTIAL = 80., 1e6
PACKAGES = {"k-diffusion": "k_diffusion.sampling", "diffusers": "diffusers", "azula": "azula.sample", "smalldiffusion": "smalldiffusion"}


class Peer(NamedTuple):
    package: str
    method: str
    evaluations: int                 # of the denoiser in one step
    solve: Callable                  # (denoise, noise, n, schedule) -> x
    schedules: Callable = lambda schedule: True   # which schedules it can follow
    own: tuple = ()                  # names of its own schedules


def load(package: str) -> Any:
    "The package's module; ImportError or whatever its import raises says why there is none."
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return importlib.import_module(PACKAGES[package])


def k_diffusion() -> list[Peer]:
    K = load("k-diffusion")
    def peer(name, evaluations, **options):
        sampler = getattr(K, f"sample_{name}")
        def solve(denoise, noise, n, schedule):
            model = lambda x, sigma, **_: denoise(x, sigma.flatten()[0].item())
            rho, low = schedule
            if n == 1: sigmas = torch.tensor([TOP, 0.])
            elif rho == EXPONENTIAL: sigmas = K.get_sigmas_exponential(n, low, TOP)
            else: sigmas = K.get_sigmas_karras(n, low, TOP, rho)
            return sampler(model, noise * TOP, sigmas.to(noise), disable=True, **options)
        label = name + "".join(f" {k}={v}" for k, v in options.items() if k != "noise_sampler")
        return Peer("k-diffusion", label, evaluations, solve)
    still = dict(eta=0., noise_sampler=lambda *_: 0.)    # the SDE samplers without noise are deterministic ones
    return [
        peer("euler", 1), peer("heun", 2), peer("dpm_2", 2), *(peer("lms", 1, order=k) for k in (2, 3, 4)), peer("dpmpp_2m", 1),
        peer("dpmpp_2s_ancestral", 2, **still), peer("dpmpp_sde", 2, **still),
        *(peer("dpmpp_2m_sde", 1, solver_type=s, **still) for s in ("midpoint", "heun")), peer("dpmpp_3m_sde", 1, **still),
    ]


def diffusers() -> list[Peer]:
    D = load("diffusers")
    D.utils.logging.set_verbosity_error()

    def run(scheduler, denoise, noise, variance_preserving, predict):
        "The sampling loop of the documentation, with each step's noise level taken unrounded from the scheduler."
        sigmas, i = scheduler.sigmas.double().tolist(), 0
        x = noise * sigmas[0] / ((1 + sigmas[0]**2)**0.5 if variance_preserving else 1.)
        for i, t in enumerate(scheduler.timesteps):
            sigma = sigmas[i if scheduler.step_index is None else scheduler.step_index]
            scale = (1 + sigma**2)**-0.5 if variance_preserving else 1.
            if not variance_preserving: scheduler.scale_model_input(x, t)    # sets its counter; we denoise the unscaled x
            answer = predict(denoise(x / scale, sigma), x, sigma, scale)
            x = scheduler.step(answer, t, x).prev_sample
        return x

    def own_betas(low):
        "A VP process whose noise levels run from low to 80 in equal ratios."
        alpha_bar = 1 / (1 + torch.logspace(torch.tensor(low).log10(), torch.tensor(TOP).log10(), 1000, dtype=torch.float64)**2)
        return (1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])).numpy()

    def clean(D, x, sigma, scale): return D
    def eps(D, x, sigma, scale): return (x / scale - D) / sigma

    def vp(name, evaluations=1, **options):
        "A scheduler that works in DDPM's coordinates."
        def solve(denoise, noise, n, schedule):
            kind, low = schedule
            flag = {7: "use_karras_sigmas", EXPONENTIAL: "use_exponential_sigmas", "beta": "use_beta_sigmas", "lu": "use_lu_lambdas"}[kind]
            scheduler = getattr(D, f"{name}Scheduler")(trained_betas=own_betas(low), prediction_type="sample", **{flag: True}, **options)
            scheduler.set_timesteps(n)
            return run(scheduler, denoise, noise, True, clean)
        label = f"{name} " + " ".join(str(v) for v in options.values())
        own = tuple((kind, low) for kind in ("beta", "lu") if kind == "beta" or name == "DPMSolverMultistep" for low in (0.002, 0.03))
        return Peer("diffusers", label.strip(), evaluations, solve, lambda s: s[0] in (7, EXPONENTIAL), own)

    def ve(name, evaluations=1):
        "A scheduler that works in ours."
        def solve(denoise, noise, n, schedule):
            kind, low = schedule
            flag = {7: "use_karras_sigmas", EXPONENTIAL: "use_exponential_sigmas", "beta": "use_beta_sigmas"}[kind]
            scheduler = getattr(D, f"{name}Scheduler")(trained_betas=own_betas(low), prediction_type="epsilon", **{flag: True})
            scheduler.set_timesteps(n)
            return run(scheduler, denoise, noise, False, eps)
        return Peer("diffusers", name, evaluations, solve, lambda s: s[0] in (7, EXPONENTIAL), (("beta", 0.002), ("beta", 0.03)))

    def edm(name, **options):
        "A scheduler with EDM's preconditioning: it wants the raw network's answer."
        def network(D, x, sigma, scale):
            c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25)**0.5
            return (D - c_skip * x) / c_out
        def solve(denoise, noise, n, schedule):
            rho, low = schedule
            scheduler = getattr(D, f"{name}Scheduler")(sigma_min=low, sigma_max=TOP, rho=rho if rho != EXPONENTIAL else 7.,
                                                       sigma_schedule="exponential" if rho == EXPONENTIAL else "karras", **options)
            scheduler.set_timesteps(n)
            return run(scheduler, denoise, noise, False, network)
        return Peer("diffusers", (f"{name} " + " ".join(str(v) for v in options.values())).strip(), 1, solve)

    plus = dict(algorithm_type="dpmsolver++")
    return [
        ve("EulerDiscrete"), ve("HeunDiscrete", 2), edm("EDMEuler"),
        *(edm("EDMDPMSolverMultistep", solver_order=k) for k in (2, 3)), edm("EDMDPMSolverMultistep", solver_order=2, solver_type="heun"),
        *(vp("DPMSolverMultistep", solver_order=k, **plus) for k in (2, 3)), vp("DPMSolverMultistep", solver_order=2, solver_type="heun", **plus),
        *(vp("DPMSolverSinglestep", solver_order=k, **plus) for k in (2, 3)),
        *(vp("UniPCMultistep", solver_order=k, solver_type="bh2") for k in (1, 2, 3)),
        *(vp("DEISMultistep", solver_order=k) for k in (1, 2, 3)),
    ]


def azula() -> list[Peer]:
    A, denoisers, noises = load("azula"), importlib.import_module("azula.denoise"), importlib.import_module("azula.noise")

    class Karras(noises.Schedule):
        def __init__(self, rho, low): self.rho, self.top, self.bottom = rho, TOP**(1 / rho), low**(1 / rho)
        def __call__(self, t): return torch.ones_like(t), (self.bottom + t * (self.top - self.bottom))**self.rho

    class Exact(denoisers.Denoiser):
        def __init__(self, denoise, schedule):
            super().__init__()
            self.denoise, self.schedule = denoise, schedule
        def forward(self, x_t, t, **kwargs): return denoisers.DiracPosterior(self.denoise(x_t, self.schedule(t)[1].item()))

    def peer(name, evaluations=1, **options):
        def solve(denoise, noise, n, schedule):    # it stops at sigma_min: the last evaluation is the answer there
            if n == 1: return denoise(noise * TOP, TOP)
            exact = Exact(denoise, Karras(*schedule))
            x = getattr(A, f"{name}Sampler")(exact, steps=n - 1, silent=True, dtype=torch.float64, **options)(noise * TOP)
            return denoise(x, schedule[1])
        return Peer("azula", f"{name} {options.get('order', '')}".strip(), evaluations, solve)
    return [peer("DDIM"), peer("Euler"), peer("Heun", 2), *(peer(name, order=k) for name in ("zAB", "vAB", "zEAB", "xEAB", "REAB") for k in (2, 3))]


def smalldiffusion() -> list[Peer]:
    S = load("smalldiffusion")

    class Exact(torch.nn.Module):
        def __init__(self, denoise):
            super().__init__()
            self.denoise = denoise
        def rand_input(self, n): return torch.zeros(())
        def predict_eps_cfg(self, x, sigma, cond, cfg_scale): return (x - self.denoise(x, sigma.item())) / sigma

    class Accelerator: device = torch.device("cpu")

    def peer(gam):
        def solve(denoise, noise, n, schedule):
            rho, low = schedule
            sigmas = karras_sigmas(n, low, TOP, rho)
            for x in S.samples(Exact(denoise), sigmas, gam=gam, xt=noise * TOP, accelerator=Accelerator()): pass
            return x
        return Peer("smalldiffusion", f"samples gam={gam:g}", 1, solve)
    return [peer(gam) for gam in (1., 1.5, 2.)]


def peers() -> tuple[list[Peer], dict[str, str]]:
    "All peers of the packages that can be imported, and for the others the reason why not."
    found, missing = [], {}
    for package, collect in zip(PACKAGES, (k_diffusion, diffusers, azula, smalldiffusion)):
        try: found += collect()
        except Exception as e: missing[package] = f"{type(e).__name__}: {e}"
    return found, missing
