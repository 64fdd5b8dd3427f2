"Ancestral and SDE solvers and the Brownian path: against golden numbers, closed forms and misuse."
import itertools
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import CountNFE, NoiseStream, seeded_noise
from ddpm_edm.ddpm import DDPM
from ddpm_edm.edm import Churn
from ddpm_edm.noise import karras_sigmas, linear_betas
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.solvers import (
    Brownian,
    _bridge,
    ancestral,
    ancestral_split,
    dpm_2_ancestral,
    dpm_solver_2,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    sample,
    sde_split,
    white_noise,
)

GOLDEN = Path(__file__).parent / "golden"


def load(name): return {k: v for k, v in np.load(GOLDEN / name).items()}


KDIFF, DIFFUSERS, MIXTURES = load("kdiff_stochastic.npz"), load("diffusers_sde_dpm.npz"), load("mixtures.npz")
KDIFF_RUNS, DIFFUSERS_RUNS = (json.loads(str(g["_meta"])) for g in (KDIFF, DIFFUSERS))
FACTORIES = {"euler_ancestral": euler_ancestral, "dpm_2_ancestral": dpm_2_ancestral, "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
             "dpmpp_sde": dpmpp_sde, "dpmpp_2m_sde": dpmpp_2m_sde, "dpmpp_3m_sde": dpmpp_3m_sde}
LOOKS = {name: 2 if name in ("dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde") else 1 for name in FACTORIES}
SDE_RULE = ("dpmpp_2m_sde", "dpmpp_3m_sde")     # split as the SDE; the others as DDIM
PINNED = [1.0663449274727266, 0.3483470476228623, 0.10113542408216397]    # Brownian([17]).at(1.5, (3,))
EACH = pytest.mark.parametrize("name", FACTORIES)


def mixture(space): return Mixture(*(torch.from_numpy(MIXTURES[f"{space}.{k}"]) for k in ("means", "stds", "weights")))
def zeros(*shape): return torch.zeros(*shape, dtype=torch.float64)


def draws(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda x, *_: torch.randn(x.shape, generator=g, dtype=x.dtype)


def joined_variances(sigma, middle, sigma_next, eta):
    "Weights of the noise of a step's two parts, written with powers: another way to the numbers of the code."
    a, b, whole = (1 - (low / high)**(2 * eta**2) for high, low in ((sigma, middle), (middle, sigma_next), (sigma, sigma_next)))
    return (sigma_next / middle)**eta**2 * math.sqrt(a / whole), math.sqrt(b / whole)


@pytest.fixture
def p(): return Gaussian(torch.tensor([0.3, -0.2], dtype=torch.float64), std=0.5)


@pytest.fixture
def noise(): return seeded_noise(range(5), (2,), dtype=torch.float64)


# --- golden numbers

def recorded(key, run, asked):
    "The recorded noise as a draw. k-diffusion records the noise of half a step and of the whole; dpmpp_sde here asks for the two halves."
    rows, first = iter(run.get("s_noise", 1.) * torch.from_numpy(KDIFF[f"{key}.noise"])), []

    def draw(x, sigma, sigma_next):
        if run["sampler"] != "dpmpp_sde" or not first:
            asked.append((sigma, sigma_next))
            if run["sampler"] == "dpmpp_sde": first[:] = next(rows), sigma, sigma_next
            return first[0] if first else next(rows)
        z, start, middle = first
        first.clear()
        assert sigma == middle
        asked.append((start, sigma_next))
        a, b = joined_variances(start, middle, sigma_next, run.get("eta", 1.))
        return (next(rows) - a * z) / b
    return draw


@pytest.mark.parametrize("key", KDIFF_RUNS)
def test_matches_k_diffusion(key):
    run, (space, name, *_) = KDIFF_RUNS[key], key.split(".")
    sigmas, latents = torch.from_numpy(KDIFF[f"{run['sigmas']}.n{run['n']}"]), torch.from_numpy(KDIFF[f"{space}.latents"])
    asked, churn = [], None
    draw = recorded(key, run, asked) if f"{key}.noise" in KDIFF else None
    if name.endswith("churn"):
        step = {"euler": euler, "heun": heun, "dpm_2": dpm_solver_2}[run["sampler"]]
        rows = iter(torch.from_numpy(KDIFF[f"{key}.noise"]))
        churn = Churn(run["n"], run["s_churn"], run["s_tmin"], run["s_tmax"], run["s_noise"], draw=lambda x: next(rows))
    else:
        options = {k: run[k] for k in ("eta", "r", "solver_type") if k in run}
        if run["sampler"] in SDE_RULE and "eta" in options: options["eta"] **= 0.5    # k-diffusion's eta there is our eta^2
        step = FACTORIES[run["sampler"]](draw=draw, **options)
    x, want = sample(mixture(space), latents, sigmas, step, churn=churn), torch.from_numpy(KDIFF[f"{key}.x"])
    # float64 on both sides; measured 2e-13, 1e-8 is what the issue asks for
    torch.testing.assert_close(x, want, rtol=0, atol=1e-10)
    if run.get("eta", 1.) == 0: assert not asked      # k-diffusion's 2S draws there too, and multiplies by 0
    elif f"{key}.noise_args" in KDIFF: np.testing.assert_allclose(asked, KDIFF[f"{key}.noise_args"], rtol=1e-12)


def test_k_diffusion_runs_are_complete():
    names = {run["sampler"] for run in KDIFF_RUNS.values()}
    assert set(FACTORIES) | {"euler", "heun", "dpm_2"} == names and len(KDIFF_RUNS) == 53
    etas = {(run["sampler"], run.get("eta", 1.)) for run in KDIFF_RUNS.values()}
    assert {("dpmpp_2m_sde", 0.6), ("dpmpp_3m_sde", 0.6), ("dpmpp_sde", 0.5), ("euler_ancestral", 0.5), ("dpmpp_2s_ancestral", 0.)} < etas


@pytest.mark.parametrize("key", DIFFUSERS_RUNS)
def test_matches_diffusers(key):
    space, variance_preserving = key.split(".")[0], "edm" not in key
    sigmas, latents = torch.from_numpy(DIFFUSERS[f"{key}.sched_sigmas"]) if f"{key}.sched_sigmas" in DIFFUSERS else None, torch.from_numpy(DIFFUSERS[f"{space}.latents"])
    if sigmas is None: sigmas = torch.from_numpy(DIFFUSERS["g2.edm_dpm.o2.sde.n10.sched_sigmas"])    # the same scheduler and n
    rows = iter(torch.from_numpy(DIFFUSERS[f"{key}.noise"]))
    start = latents * (1 + 1 / sigmas[0]**2).sqrt() if variance_preserving else latents               # VP begins at x_T = z
    x = sample(mixture(space), start, sigmas, dpmpp_2m_sde(draw=lambda *_: next(rows)))
    assert len(list(rows)) == 1      # diffusers draws at the last step too, and multiplies by 0
    # measured 2e-14
    torch.testing.assert_close(x, torch.from_numpy(DIFFUSERS[f"{key}.x"]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", ["0", "0.3", "1"])
def test_ancestral_split_matches_k_diffusion(eta):
    sigma, want = KDIFF["ancestral_step.sigma"], KDIFF[f"ancestral_step.eta{eta}"]
    got = [ancestral_split(high, low, float(eta)) for high, low in zip(sigma, sigma[1:])]
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)


# --- splits

@given(st.floats(1e-3, 100), st.floats(1e-4, 0.999), st.floats(0, 3))
@settings(max_examples=100, deadline=None)
def test_splits_keep_the_variance(sigma, ratio, eta):
    for split in (ancestral_split, sde_split):
        down, up = split(sigma, sigma * ratio, eta)
        assert 0 <= down <= sigma * ratio * (1 + 1e-12) and 0 <= up <= sigma * ratio * (1 + 1e-12)
        assert math.hypot(down, up) == pytest.approx(sigma * ratio, rel=1e-12)    # rounding


@given(st.floats(1e-3, 100), st.floats(1e-4, 0.999))
@settings(max_examples=50, deadline=None)
def test_splits_are_the_posterior_at_eta_1_and_the_ode_at_0(sigma, ratio):
    posterior = sigma * ratio**2, sigma * ratio * math.sqrt((1 - ratio) * (1 + ratio))
    # relative 1e-13 / (1 - ratio): the difference of nearly equal squares
    assert ancestral_split(sigma, sigma * ratio) == pytest.approx(posterior, rel=1e-12 / (1 - ratio))
    assert sde_split(sigma, sigma * ratio) == pytest.approx(posterior, rel=1e-12 / (1 - ratio))
    for split in (ancestral_split, sde_split): assert split(sigma, sigma * ratio, 0.) == (pytest.approx(sigma * ratio, rel=1e-14), 0.)


def test_ancestral_split_adds_nothing_at_the_end_and_at_most_everything():
    assert ancestral_split(3., 0.) == (0., 0.)
    assert ancestral_split(3., 1., eta=50.) == (0., 1.)


def test_sde_split_composes():
    # noise of the first half, faded by the second, plus that of the second is the noise of the whole
    (d1, u1), (d2, u2), (d, u) = sde_split(5., 2., 0.7), sde_split(2., 0.3, 0.7), sde_split(5., 0.3, 0.7)
    assert (d1 / 5) * (d2 / 2) == pytest.approx(d / 5, rel=1e-13)
    assert math.hypot(d2 / 2 * u1, u2) == pytest.approx(u, rel=1e-13)


# --- steps

@EACH
def test_one_step_looks_once_draws_nothing_and_lands_on_D(name, p, noise):
    def refuse(*_): raise AssertionError("no noise is needed")
    count = CountNFE(p)
    x = sample(count, noise, karras_sigmas(1), FACTORIES[name](draw=refuse))
    assert count.nfe == 1
    torch.testing.assert_close(x, p(80 * noise, 80.), rtol=0, atol=1e-12)


@EACH
def test_evaluations_and_draws(name, p, noise):
    count, asked, sigmas = CountNFE(p), [], karras_sigmas(6).tolist()
    def draw(x, sigma, sigma_next):
        asked.append((sigma, sigma_next))
        return torch.randn_like(x)
    sample(count, noise, sigmas, FACTORIES[name](draw=draw))
    assert count.nfe == 6 * LOOKS[name] - (LOOKS[name] == 2)
    ends = [low for _, low in asked]
    assert [high for high, _ in asked] == [sigmas[0], *ends[:-1]] and ends[-1] == sigmas[-2]    # they follow on each other, none to 0
    assert [s for s in ends if s in sigmas] == sigmas[1:-1]


@EACH
def test_without_noise_nothing_is_drawn(name, noise):
    def refuse(*_): raise AssertionError("no noise is needed")
    denoise, n = mixture("g2"), 7
    x = sample(denoise, noise, karras_sigmas(n), FACTORIES[name](eta=0., draw=refuse))
    assert torch.equal(x, sample(denoise, noise, karras_sigmas(n), FACTORIES[name](eta=0.)))
    twin = {"euler_ancestral": euler, "dpm_2_ancestral": dpm_solver_2, "dpmpp_2m_sde": dpmpp_2m}.get(name)
    if twin: torch.testing.assert_close(x, sample(denoise, noise, karras_sigmas(n), twin), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.4, 1.])
def test_euler_ancestral_is_the_step_of_ddim(eta):
    denoise, chain, z = mixture("g2"), DDPM(linear_betas()), draws(1)(zeros(20, 2))
    for t in (1, 300, 998):
        (s, s_next), (a, a_next), x = chain.sigmas[[t, t - 1]].tolist(), chain.signal[[t, t - 1]].tolist(), draws(0)(zeros(20, 2))
        theirs, _ = chain.ddim_step(chain.network(denoise), a * x, t, z, eta=eta)
        ours, _ = euler_ancestral(eta, lambda *_: z)(denoise, x, s, s_next)
        torch.testing.assert_close(ours, theirs / a_next, rtol=1e-10, atol=1e-10)


@EACH
def test_frozen_denoiser_composes_exactly(name):
    # where D never changes there is nothing to approximate: with the path's noise any schedule gives the same end
    x = draws(0)(zeros(3, 2))
    def frozen(x, sigma): return torch.ones_like(x)
    for eta in (1., 0.6) if name in SDE_RULE else (1.,):
        ends = [sample(frozen, x, karras_sigmas(n)[:-1], FACTORIES[name](eta, draw=Brownian(range(3), eta))) for n in (2, 9, 100)]
        # rounding; "eps" steps take the difference of numbers near 80, over 0.002 they are 1e5 times worse
        for end in ends[1:]: torch.testing.assert_close(ends[0], end, rtol=0, atol=5e-9 if name == "dpm_2_ancestral" else 1e-11)


def third_step(make, D, eta, **options):
    step, carry = make(eta, draw=lambda x, *_: torch.zeros_like(x), **options), None
    x = torch.full((1,), 0.9, dtype=torch.float64)
    for s, s_next in ((4., 3.), (3., 2.), (2., 1.2)): end, carry = step(lambda x, s: torch.full_like(x, D(-math.log(s))), x, s, s_next, carry)
    return end.item()


def exact_mean(D, eta):
    h, rate, (s, w) = math.log(2 / 1.2), 1 + eta**2, np.polynomial.legendre.leggauss(40)
    s, w = h / 2 * (s + 1), h / 2 * w
    return math.exp(-rate * h) * 0.9 + rate * float((np.exp(-rate * (h - s)) * D(s - math.log(2))) @ w)


@pytest.mark.parametrize("eta", [0., 0.5, 1., 2.])
def test_lines_are_integrated_exactly(eta):
    def line(lam): return 0.3 - 0.7 * lam
    for make, options in ((dpmpp_2m_sde, {"solver_type": "heun"}), (dpmpp_3m_sde, {})):
        assert third_step(make, line, eta, **options) == pytest.approx(exact_mean(line, eta), abs=1e-13)
    H = (1 + eta**2) * math.log(2 / 1.2)
    off = third_step(dpmpp_2m_sde, line, eta) - exact_mean(line, eta)
    want = -0.7 * math.log(2 / 1.2) * ((1 - math.exp(-H)) / 2 - 1 + (1 - math.exp(-H)) / H)      # "midpoint" less the exact weight
    assert off == pytest.approx(want, abs=1e-13)


def test_3m_takes_half_of_a_parabola():
    def bend(lam): return (lam + math.log(2))**2      # no slope where the step begins
    for eta in (0., 1.): assert exact_mean(bend, eta) - third_step(dpmpp_2m_sde, lambda _: 0., eta) == pytest.approx(
        2 * (third_step(dpmpp_3m_sde, bend, eta) - third_step(dpmpp_2m_sde, lambda _: 0., eta)), abs=1e-13)


@pytest.mark.parametrize("make", [dpmpp_2m_sde, dpmpp_3m_sde])
def test_memory_is_short_and_starts_afresh_after_churn(make, p, noise):
    carries = []
    def spy(denoise, x, sigma, sigma_next, carry=None):
        x, carry = make(draw=draws(0))(denoise, x, sigma, sigma_next, carry)
        carries.append([node for node, _ in carry])
        return x, carry
    def up(x, sigma, i): return x, sigma * (3. if i == 3 else 1.)
    x = sample(p, noise, [8., 4., 3., 2., 1., 0.], spy, churn=up)
    assert x.isfinite().all()
    assert carries == [[8.], [4., 8.], [3., 4.] if make is dpmpp_2m_sde else [3., 4., 8.], [6.], [1., 6.]]


def test_churn_on_a_level_seen_before_is_harmless(p, noise):
    # up to exactly the last level: a node that coincided would divide by log 1 = 0
    x = sample(p, noise, [8., 4., 2., 1., 0.], dpmpp_3m_sde(draw=draws(0)), churn=lambda x, sigma, i: (x, {4.: 8., 2.: 4.}.get(sigma, sigma)))
    assert x.isfinite().all()


def test_any_step_can_be_ancestral(p, noise):
    sigmas = karras_sigmas(9)
    assert torch.equal(sample(p, noise, sigmas, ancestral(euler, 0.5, draws(3))), sample(p, noise, sigmas, euler_ancestral(0.5, draws(3))))
    assert sample(p, noise, sigmas, ancestral(heun)).shape == noise.shape


# --- orders

def open_end(n): return karras_sigmas(n + 1)[:-1]


def variance_error(make, n):
    "Exact for Gaussian data: row 0 has the mean, row 1 the start, row k + 2 the k-th draw."
    gaussian, count = Gaussian(torch.tensor([0.3], dtype=torch.float64), std=0.5), itertools.count(2)
    def draw(x, *_):
        z = torch.zeros_like(x)
        z[next(count)] = 1.
        return z
    rows = torch.full((2 * n + 2, 1), 0.3 / 80, dtype=torch.float64)
    rows[1] += math.sqrt(1 + 0.25 / 80**2)
    x = sample(gaussian, rows, open_end(n), make(draw=draw))
    assert x[0].item() == pytest.approx(0.3, abs=1e-12)
    return abs((x[1:] - x[0]).square().sum().item() - 0.25 - 0.002**2)


@EACH
@pytest.mark.parametrize("eta", [0.7, 1.])
def test_weak_order(name, eta):
    errors = [variance_error(lambda draw: FACTORIES[name](eta, draw=draw), n) for n in (256, 512)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1 if name == "euler_ancestral" else 2, abs=0.15)


@pytest.mark.parametrize("options", [(dpmpp_2m_sde, {"solver_type": "heun"}), (dpmpp_sde, {"r": 1 / 4}), (dpmpp_sde, {"r": 3 / 4})])
def test_weak_order_of_options(options):
    make, options = options
    errors = [variance_error(lambda draw: make(draw=draw, **options), n) for n in (256, 512)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


@cache
def on_one_path(make, n):
    gaussian, crowd, path = Gaussian(torch.tensor([0.3], dtype=torch.float64), std=0.5), seeded_noise([0], (500, 1), dtype=torch.float64)[0], Brownian([1])
    return sample(gaussian, crowd, open_end(n), make(draw=lambda x, s, s_next: path(x[None], s, s_next)[0]))


@EACH
def test_strong_order_on_one_path(name):
    errors = [(on_one_path(FACTORIES[name], n) - on_one_path(dpmpp_2m_sde, 2048)).square().mean().sqrt().item() for n in (64, 256)]
    # 500 particles: the ratio of two RMS errors is known to 5 %, 0.03 of an order; the reference is off by an eighth, 64 steps are few
    assert math.log2(errors[0] / errors[1]) / 2 == pytest.approx(1, abs=0.15)


@EACH
def test_samples_have_the_right_spread(name):
    gaussian, N = Gaussian(torch.tensor([0.3], dtype=torch.float64), std=0.5), 20_000
    x = sample(gaussian, draws(0)(zeros(N, 1)), karras_sigmas(200), FACTORIES[name](draw=draws(1)))
    # five standard errors, 0.0125 of 0.5; Euler's own error, 0.015 with 200 steps
    assert x.std().item() == pytest.approx(0.5, abs=0.0125 + (0.015 if name == "euler_ancestral" else 0.001))
    assert x.mean().item() == pytest.approx(0.3, abs=5 * 0.5 / N**0.5)


# --- Brownian

def test_path_has_the_law_of_unit_noise():
    n, levels = 20_000, [3000., 80., 3., 2.99, 0.002, 1e-8]
    for eta in (0.05, 0.5, 1., 3.):
        X, s = torch.cat([Brownian([5], eta).at(level, (n,)) for level in levels]), torch.tensor(levels, dtype=torch.float64)
        rho = (torch.minimum(s[:, None], s) / torch.maximum(s[:, None], s))**eta**2
        torch.testing.assert_close(X @ X.T / n, rho, rtol=0, atol=5 * (2 / n)**0.5)    # five standard errors of a variance
        assert X.mean(1).abs().max() < 5 / n**0.5
        assert (X[:, :] ** 4).mean(1).sub(3).abs().max() < 5 * (96 / n)**0.5           # kurtosis of a Gaussian; its draws vary by 96


@given(st.floats(1e-6, 20), st.floats(1e-6, 20))
@settings(max_examples=50, deadline=None)
def test_bridge_is_the_conditional_gaussian(p, q):
    ends, cross = np.exp(-np.abs(np.subtract.outer([0, p + q], [0, p + q]))), np.exp([-p, -q])
    weights = np.linalg.solve(ends, cross)
    # the matrix is singular up to p + q: 1e-16 / 2e-6, times a few
    assert [_bridge(1., 0., p, q, 0.), _bridge(0., 1., p, q, 0.)] == pytest.approx(weights, abs=1e-9)
    assert _bridge(0., 0., p, q, 1.)**2 == pytest.approx(1 - weights @ cross, abs=1e-9)


def test_increments_are_unit_and_independent_of_each_other_and_of_the_past():
    n, levels, path = 20_000, [80., 20., 3., 2.99, 0.1, 0.002], Brownian([4])
    z = torch.cat([path.at(80., (n,))] + [path(zeros(1, n), a, b) for a, b in zip(levels, levels[1:])])
    torch.testing.assert_close(z @ z.T / n, torch.eye(6, dtype=torch.float64), rtol=0, atol=5 * (2 / n)**0.5)


def test_rough_at_every_scale():
    # 512 steps of one in a thousand each: as independent as any others, and as large
    n, path = 512, Brownian([4])
    s = [1.001**-k for k in range(n + 1)]
    z = torch.cat([path(zeros(1, 20), a, b) for a, b in zip(s, s[1:])])
    assert z.square().mean().item() == pytest.approx(1, abs=5 * (2 / z.numel())**0.5)
    assert abs((z[1:] * z[:-1]).mean().item()) < 5 / z.numel()**0.5


@given(st.lists(st.floats(0.01, 50), min_size=3, max_size=3, unique=True), st.sampled_from([0.3, 1., 1.5]), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_coarse_noise_is_made_of_the_fine(levels, eta, seed):
    low, middle, high = sorted(levels)
    if math.log(middle / low) < 1e-3 or math.log(high / middle) < 1e-3: return
    path, x = Brownian([seed], eta), zeros(1, 3)
    whole, first, second = path(x, high, low), path(x, high, middle), path(x, middle, low)
    a, b = joined_variances(high, middle, low, eta)
    # rounding, enlarged by the root of the shortest step: 1e-16 / sqrt(2 * 0.09 * 1e-3)
    torch.testing.assert_close(whole, a * first + b * second, rtol=0, atol=1e-12)


def test_path_does_not_depend_on_order_batch_or_instance():
    levels, seeds = [0.1, 30., 2., 80., 0.3], [7, 3, 11]
    asked = {s: Brownian(seeds).at(s, (2, 2)) for s in levels}
    path = Brownian(seeds[::-1])
    for s in reversed(levels):
        assert torch.equal(path.at(s, (2, 2)), asked[s].flip(0))
        assert torch.equal(Brownian([3]).at(s, (2, 2)), asked[s][1:2])
    x = zeros(3, 2, 2)
    whole, again = Brownian(seeds), Brownian(seeds)
    z = [whole(x, a, b) for a, b in ((80., 30.), (30., 2.), (2., 0.3))]
    for (a, b), want in reversed(list(zip(((80., 30.), (30., 2.), (2., 0.3)), z))): assert torch.equal(again(x, a, b), want)


def test_cache_does_not_mix_shapes():
    path = Brownian([0, 1])
    a = path(zeros(2, 3), 2., 1.)
    b = path(zeros(2, 4), 2., 1.)
    assert b.shape == (2, 4) and torch.equal(path(zeros(2, 3), 2., 1.), a)


def test_path_is_the_same_for_ever():
    # pinned: pictures made today can be made again. numpy keeps Philox and its normals fixed except for announced changes of stream
    got = Brownian([17]).at(1.5, (3,))[0].tolist()
    assert got == pytest.approx(PINNED, abs=1e-12)


def test_seeds_give_unrelated_paths():
    X = Brownian(range(200)).at(1., (100,))
    z = torch.cat([X, seeded_noise(range(200), (100,), dtype=torch.float64)])        # nor are they related to the start's noise
    c = z @ z.T / 100 - torch.diag((z @ z.T / 100).diagonal())
    assert c.abs().max() < 6.5 / 10      # 80,000 pairs: 6.5 standard errors is once in 1e5


@EACH
def test_same_seeds_same_samples_whatever_the_batch(name):
    denoise, seeds = mixture("g2"), [5, 9, 2, 30]
    def run(seeds): return sample(denoise, seeded_noise(seeds, (2,), dtype=torch.float64), karras_sigmas(12), FACTORIES[name](draw=Brownian(seeds)))
    whole = run(seeds)
    assert torch.equal(whole, run(seeds))
    torch.testing.assert_close(torch.cat([run(seeds[:1]), run(seeds[1:])]), whole, rtol=0, atol=1e-10)    # matrix products of another size
    assert (whole[:1] - run([6])).abs().max() > 1e-3


def test_refining_the_steps_keeps_the_picture():
    seeds = range(12)
    start = seeded_noise(seeds, (2,), dtype=torch.float64)
    def run(n, draw): return sample(mixture("g2"), start, karras_sigmas(n), dpmpp_sde(draw=draw))
    fine = run(320, Brownian(seeds))
    near, far = ((run(80, draw) - fine).norm(dim=1).median() for draw in (Brownian(seeds), draws(1)))
    assert near < 0.1 < far       # measured 0.02 and 0.9; the median, as some may fall to the other side of a watershed


def test_dtype_and_shape_follow_x():
    z = Brownian([0, 1])(torch.zeros(2, 3, 4, 4), 2., 1.)
    assert z.dtype == torch.float32 and z.shape == (2, 3, 4, 4)
    assert torch.equal(z, Brownian([0, 1])(zeros(2, 3, 4, 4), 2., 1.).float())
    assert Brownian([0, 1])(zeros(2), 2., 1.).shape == (2,)


def test_other_sources_of_noise(p, noise):
    stream = NoiseStream(range(5))
    x = sample(p, noise, karras_sigmas(6), euler_ancestral(draw=lambda x, *_: stream(x)))
    stream = NoiseStream([2])
    torch.testing.assert_close(sample(p, noise[2:3], karras_sigmas(6), euler_ancestral(draw=lambda x, *_: stream(x))), x[2:3], rtol=0, atol=1e-12)
    torch.manual_seed(0)
    a = sample(p, noise, karras_sigmas(6), dpmpp_2m_sde())
    torch.manual_seed(0)
    assert torch.equal(a, sample(p, noise, karras_sigmas(6), dpmpp_2m_sde(draw=white_noise)))


# --- misuse

@EACH
@pytest.mark.parametrize("eta", [-0.1, math.nan, math.inf])
def test_bad_eta(name, eta):
    with pytest.raises(ValueError, match=f"eta must be 0 or more and finite, got {eta}"): FACTORIES[name](eta=eta)


@pytest.mark.parametrize("r", [0., 1., -1., 1.5, math.nan])
def test_bad_r(r):
    with pytest.raises(ValueError, match=f"r must be between 0 and 1, got {r}"): dpmpp_sde(r=r)


def test_bad_solver_type():
    with pytest.raises(ValueError, match="""solver_type must be "midpoint" or "heun", got 'euler'"""): dpmpp_2m_sde(solver_type="euler")


@EACH
def test_draw_of_wrong_shape(name, p, noise):
    with pytest.raises(ValueError, match=r"draw's noise must have shape \(5, 2\), got shape \(2,\)"):
        sample(p, noise, karras_sigmas(4), FACTORIES[name](draw=lambda x, *_: x[0]))      # would broadcast
    with pytest.raises(ValueError, match=r"draw's noise must have shape \(5, 2\), got float"):
        sample(p, noise, karras_sigmas(4), FACTORIES[name](draw=lambda *_: 0.5))


@EACH
def test_nan_from_the_denoiser_is_named(name, noise):
    with pytest.raises(ValueError, match="in step 0"): sample(lambda x, s: x * math.nan, noise, karras_sigmas(4), FACTORIES[name]())


def test_brownian_misuse():
    for seeds in ([], [-1], [0.5], [2**32]):
        with pytest.raises(ValueError, match="seeds must be integers"): Brownian(seeds)
    for eta in (0., -1., math.nan, math.inf):
        with pytest.raises(ValueError, match="eta must be at least 0.001 and finite"): Brownian([0], eta)
    path = Brownian([0, 1])
    for x in (zeros(3, 2), zeros(())):
        with pytest.raises(ValueError, match="one sample for each of the 2 seeds"): path(x, 2., 1.)
    for a, b in ((1., 2.), (1., 1.), (math.nan, 1.)):
        with pytest.raises(ValueError, match="sigma must be above sigma_next"): path(zeros(2, 1), a, b)
    for a, b in ((1., 0.), (math.inf, 1.), (2.**33, 1.), (1., 2.**-33)):
        with pytest.raises(ValueError, match="between 2\\^-32 and 2\\^32"): path(zeros(2, 1), a, b)
