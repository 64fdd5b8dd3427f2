"Churn and the general sampler: against golden numbers, closed forms and misuse."
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import CountNFE, NoiseStream, convert_noise, score_of, seeded_noise
from ddpm_edm.edm import LINEAR_CLOCK, ROOT_CLOCK, Churn, ablation_sampler, clock_step, edm_sampler, iddpm_sigmas, vp_clock
from ddpm_edm.langevin import geometric_sigmas
from ddpm_edm.noise import karras_sigmas, vp_sigmas
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.solvers import euler, heun, sample

GOLDEN = Path(__file__).parent / "golden"


def load(name): return {k: v for k, v in np.load(GOLDEN / name).items()}


CHURN, ABLATION, MIXTURES = load("edm_churn.npz"), load("edm_ablation.npz"), load("mixtures.npz")
CHURN_RUNS, ABLATION_RUNS = (json.loads(str(g["_meta"])) for g in (CHURN, ABLATION))


def mixture(space): return Mixture(*(torch.from_numpy(MIXTURES[f"{space}.{k}"]) for k in ("means", "stds", "weights")))


def recorded(golden, key):
    "Hands out the recorded noise, one draw for each call."
    rows = iter(torch.from_numpy(golden[f"{key}.noise"]))
    return lambda x: next(rows)


def check_golden(sampler, golden, key, kwargs):
    space = key.split(".")[0]
    if f"{key}.noise" in golden: kwargs = kwargs | {"noise_fn": recorded(golden, key)}
    levels = []
    denoise = mixture(space)
    def watched(x, sigma):
        levels.append(sigma)
        return denoise(x, sigma)
    x, want = sampler(watched, torch.from_numpy(golden[f"{space}.latents"]), **kwargs), torch.from_numpy(golden[f"{key}.x"])
    # float64 on both sides; measured 3e-13, 1e-9 allows for another order of operations
    assert (x - want).abs().max() <= 1e-9 * want.abs().max()
    if f"{key}.call_sigma" in golden: np.testing.assert_allclose(levels, golden[f"{key}.call_sigma"], rtol=1e-9)


@pytest.fixture
def p(): return Gaussian(torch.tensor([0.3, -0.2], dtype=torch.float64), std=0.5)


@pytest.fixture
def noise(): return seeded_noise(range(5), (2,), dtype=torch.float64)


def draws(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype)


# --- golden numbers

@pytest.mark.parametrize("key", CHURN_RUNS)
def test_edm_sampler_with_churn_matches_reference(key): check_golden(edm_sampler, CHURN, key, CHURN_RUNS[key])


@pytest.mark.parametrize("key", ABLATION_RUNS)
def test_ablation_sampler_matches_reference(key): check_golden(ablation_sampler, ABLATION, key, ABLATION_RUNS[key])


def test_golden_runs_are_complete():
    combinations = {f"g2.{solver}.{levels}.{schedule}.{scaling}.n10" for solver in ("euler", "heun") for levels in ("vp", "ve", "iddpm", "edm")
                    for schedule in ("vp", "ve", "linear") for scaling in ("vp", "none")}
    assert len(combinations) == 48 and combinations < set(ABLATION_RUNS)
    assert {"g2.churn0.vp", "g2.churn0.ve", "g2.churn0.edm", "g2.extra0", "g2.extra1", "g2.extra2", "g2.extra3"} < set(ABLATION_RUNS)


# --- churn

@given(st.floats(1e-3, 100), st.floats(0, 200), st.integers(1, 300), st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_churn_adds_the_variance_that_sigma_hat_lacks(sigma, S_churn, n, S_noise):
    churn = Churn(n, S_churn, S_noise=S_noise, draw=torch.ones_like)
    x, sigma_hat = churn(torch.zeros(2, 3, dtype=torch.float64), sigma)
    gamma = min(S_churn / n, math.sqrt(2) - 1)
    assert sigma_hat == pytest.approx(sigma * (1 + gamma), rel=1e-14)
    # the difference of squares loses digits where gamma is tiny: 1e-15 of sigma^2, under the root 1e-7 of sigma
    torch.testing.assert_close(x, torch.full_like(x, S_noise * math.sqrt(2 * gamma + gamma**2) * sigma), rtol=1e-6, atol=3e-7 * sigma)


def test_churn_window_includes_its_ends():
    churn = Churn(10, 3, S_min=0.5, S_max=2.)
    assert [churn.gamma(s) > 0 for s in (0.499, 0.5, 1., 2., 2.001)] == [False, True, True, True, False]


def test_churn_draws_in_every_step_so_that_a_window_does_not_shift_the_noise(p, noise):
    def churned(**window):
        calls, stream = [], NoiseStream(range(5))
        def draw(x):
            calls.append(stream(x))
            return calls[-1]
        edm_sampler(p, noise, 7, S_churn=3, noise_fn=draw, **window)
        return calls
    wide, narrow = churned(), churned(S_min=0.1, S_max=2.)
    assert len(wide) == len(narrow) == 7 and all(torch.equal(a, b) for a, b in zip(wide, narrow))


def test_churn_outside_its_window_and_without_amount_is_the_ode(p, noise):
    want = sample(p, noise, karras_sigmas(9), heun)
    def never(x): raise AssertionError("no noise is needed")
    assert torch.equal(edm_sampler(p, noise, 9, noise_fn=never), want)
    assert torch.equal(edm_sampler(p, noise, 9, S_churn=30, S_min=100.), want)
    assert torch.equal(edm_sampler(p, noise, 9, S_churn=30, S_max=1e-4), want)


def test_churned_samples_keep_mean_and_spread(p):
    noise = draws(0)(torch.empty(40_000, 2, dtype=torch.float64))
    x = edm_sampler(p, noise, 200, S_churn=40, noise_fn=draws(1))
    # five standard errors, 0.0125 and 0.009, and the steps' own error of the spread, 0.2 % with 200
    torch.testing.assert_close(x.mean(0), p.mean, rtol=0, atol=5 * 0.5 / 40_000**0.5)
    torch.testing.assert_close(x.std(0), p.std, rtol=0, atol=5 * 0.5 / 80_000**0.5 + 0.001)
    together = torch.stack([noise[:, 0], x[:, 0]])
    assert torch.corrcoef(together)[0, 1] < 0.9    # the ODE gives 1: churn forgets where it began


def test_small_churn_is_a_langevin_step():
    denoise, sigma = mixture("g2"), 0.7
    x = denoise.sample(500, torch.Generator().manual_seed(0)) + sigma * draws(1)(torch.empty(500, 2, dtype=torch.float64))
    def off(gamma):
        n, eta = draws(2)(x), gamma * sigma**2
        x_hat, sigma_hat = Churn(1, gamma, draw=draws(2))(x, sigma)
        langevin = x + eta * score_of(denoise(x, sigma), x, sigma) + (2 * eta)**0.5 * n
        return (euler(denoise, x_hat, sigma_hat, sigma)[0] - langevin).square().mean().sqrt()
    assert (off(2e-5) / off(1e-5)).log2().item() == pytest.approx(1.5, abs=0.05)    # next term smaller by sqrt(gamma)


@pytest.mark.parametrize("sampler", [edm_sampler, ablation_sampler])
def test_churned_sample_does_not_depend_on_its_batch(sampler, p, noise):
    whole = sampler(p, noise, 8, S_churn=4, noise_fn=NoiseStream(range(5)))
    for part in (slice(0, 2), slice(2, 5), slice(4, 5)):
        seeds = range(5)[part]
        assert torch.equal(sampler(p, noise[part], 8, S_churn=4, noise_fn=NoiseStream(seeds)), whole[part])    # elementwise denoiser
    torch.manual_seed(0)
    one = sampler(p, noise, 8, S_churn=4)
    torch.manual_seed(0)
    assert torch.equal(sampler(p, noise, 8, S_churn=4, noise_fn=torch.randn_like), one)


# --- the samplers

@pytest.mark.parametrize("S_churn", [0, 10])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_number_of_evaluations(p, noise, n, S_churn):
    for sampler in (edm_sampler, ablation_sampler):
        count = CountNFE(p)
        assert sampler(count, noise, n, S_churn=S_churn).isfinite().all()
        assert count.nfe == 2 * n - 1
    count = CountNFE(p)
    ablation_sampler(count, noise, n, solver="euler", S_churn=S_churn)
    assert count.nfe == n


def test_one_step_lands_on_D(p, noise):
    for sampler in (edm_sampler, ablation_sampler):
        torch.testing.assert_close(sampler(p, noise, 1), p(80 * noise, 80.), rtol=0, atol=1e-12)
        churned = sampler(p, noise, 1, S_churn=9, noise_fn=torch.zeros_like)
        torch.testing.assert_close(churned, p(80 * noise, 80 * 2**0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("discretization", ["vp", "ve", "iddpm", "edm"])
@pytest.mark.parametrize("schedule, scaling", [("vp", "vp"), ("ve", "none"), ("linear", "none")])
def test_one_step_of_every_kind_is_finite(p, noise, discretization, schedule, scaling):
    x = ablation_sampler(p, noise, 1, discretization=discretization, schedule=schedule, scaling=scaling)
    assert x.shape == noise.shape and x.isfinite().all()


def test_defaults_of_both_samplers_agree(p, noise):
    torch.testing.assert_close(ablation_sampler(p, noise), edm_sampler(p, noise), rtol=0, atol=1e-12)
    kwargs = dict(sigma_min=0.01, sigma_max=20., rho=4., S_churn=5, S_min=0.1, S_max=3., S_noise=1.01)
    both = [f(p, noise, 11, **kwargs, noise_fn=NoiseStream(range(5))) for f in (edm_sampler, ablation_sampler)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-12)


def test_levels_of_each_discretization(p, noise):
    def levels(**kwargs):
        seen = []
        ablation_sampler(p, noise, 7, solver="euler", callback=lambda x, sigma, D, i: seen.append(sigma), **kwargs)
        return torch.tensor([*seen, 0.], dtype=torch.float64)
    for want, kwargs in ((karras_sigmas(7, rho=3), dict(rho=3)), (geometric_sigmas(7, 0.02, 100), dict(discretization="ve")),
                         (vp_sigmas(7), dict(discretization="vp")), (vp_sigmas(7, 0.01), dict(discretization="vp", epsilon_s=0.01)),
                         (iddpm_sigmas(7, 0.002, 10, M=500), dict(discretization="iddpm", sigma_max=10, M=500))):
        torch.testing.assert_close(levels(**kwargs), want, rtol=1e-12, atol=0)    # another order of operations


def test_conditioning_callback_progress_and_dtype_reach_the_loop(p, noise, capsys):
    for sampler in (edm_sampler, ablation_sampler):
        labels, seen = torch.arange(5), []
        def denoise(x, sigma, labels=None):
            seen.append(labels)
            return p(x, sigma)
        steps = []
        x = sampler(denoise, noise, 3, labels=labels, progress=True, dtype=torch.float32, callback=lambda **k: steps.append(k["i"]))
        assert len(seen) == 5 and all(l is labels for l in seen) and steps == [0, 1, 2]
        assert x.dtype == torch.float32 and "/3" in capsys.readouterr().err


# --- clocks

@pytest.mark.parametrize("clock", [LINEAR_CLOCK, ROOT_CLOCK, vp_clock(0.01, 150.), vp_clock(0.002, 80.), vp_clock(0.02, 100., 0.01)])
def test_clock_is_consistent(clock):
    for t in (0.02, 0.3, 0.77):
        assert clock.time(clock.sigma(t)) == pytest.approx(t, rel=1e-9)                     # rounding
        slope = (clock.sigma(t + 1e-6) - clock.sigma(t - 1e-6)) / 2e-6
        assert clock.slope(t) == pytest.approx(slope, rel=1e-6)                             # differences keep half the digits
    assert clock.time(0.) == 0


def test_vp_clock_covers_its_range():
    low, high = (convert_noise(t, "vp_time", "sigma").item() for t in (1e-3, 1.))
    for t in (0.01, 0.4, 0.9): assert vp_clock(low, high).sigma(t) == pytest.approx(convert_noise(t, "vp_time", "sigma").item(), rel=1e-9)
    clock = vp_clock(0.02, 90., 0.01)
    assert clock.sigma(0.01) == pytest.approx(0.02, rel=1e-9) and clock.sigma(1.) == pytest.approx(90, rel=1e-9)


@pytest.fixture(scope="module")
def fine(): return sample(mixture("g2"), torch.from_numpy(MIXTURES["g2.latents"]), torch.linspace(2, 0.25, 4001), heun)


@pytest.mark.parametrize("scaling", ["none", "vp"])
@pytest.mark.parametrize("clock", [LINEAR_CLOCK, ROOT_CLOCK, vp_clock(0.002, 80.)])
@pytest.mark.parametrize("solver, alpha, order", [("euler", 1., 1), ("heun", 1., 2), ("heun", 0.5, 2), ("heun", 0.7, 2)])
def test_order_of_every_clock_and_scale(fine, clock, scaling, solver, alpha, order):
    q, step, x = mixture("g2"), clock_step(clock, scaling, solver, alpha), torch.from_numpy(MIXTURES["g2.latents"])
    def error(n): return (sample(q, x, torch.linspace(2, 0.25, n + 1), step) - fine).square().mean().sqrt().item()
    assert math.log2(error(128) / error(256)) == pytest.approx(order, abs=0.15)    # next term of the error: a few per cent


def test_linear_clock_without_scale_is_euler_and_heun(p, noise):
    for solver, want in (("euler", euler), ("heun", heun)):
        x = sample(p, noise, karras_sigmas(12), clock_step(LINEAR_CLOCK, solver=solver))
        torch.testing.assert_close(x, sample(p, noise, karras_sigmas(12), want), rtol=0, atol=1e-12)


def test_vp_scale_is_exact_for_unit_gaussian(noise):
    q = Gaussian(torch.zeros(2, dtype=torch.float64))
    x = clock_step(LINEAR_CLOCK, "vp", "euler")(q, 80 * noise, 80., 0.5)[0]
    torch.testing.assert_close(x, 80 * noise * (1.25 / (1 + 80**2))**0.5, rtol=0, atol=1e-12)


def test_root_clock_keeps_half_of_the_last_noise(p, noise):
    x, D = 0.02 * noise, p(0.02 * noise, 0.02)
    torch.testing.assert_close(clock_step(ROOT_CLOCK)(p, x, 0.02, 0.)[0], D + (x - D) / 2, rtol=0, atol=1e-14)


# --- iDDPM's levels

def test_iddpm_levels_are_those_of_the_cosine_table():
    table = iddpm_sigmas(1000, 1e-9, 1e9)
    assert table.shape == (1001,) and (table.diff() < 0).all()
    bar = lambda j: math.sin(math.pi / 2 * j / 1008)**2
    for row, j in ((300, 300), (999, 999)):     # (1 + u_j^2) = product of the ratios, where none is bounded
        assert table[row].item() == pytest.approx((bar(1000) / bar(j) - 1)**0.5, rel=1e-6)    # 1 + u^2 - 1 loses digits at small u
    assert (1 + table[0]**2) / (1 + table[1]**2) == pytest.approx(1000, rel=1e-9)             # C_1


# --- misuse

@pytest.mark.parametrize("sampler", [edm_sampler, ablation_sampler])
@pytest.mark.parametrize("kwargs, message", [
    (dict(S_churn=1, S_min=2., S_max=1.), "need 0 <= S_min <= S_max, got 2.0 and 1.0"),
    (dict(S_min=2., S_max=1.), "S_min <= S_max"),
    (dict(S_min=-1.), "S_min"), (dict(S_min=math.nan), "S_min"), (dict(S_max=math.nan), "S_max"),
    (dict(S_churn=-1), "S_churn must be 0 or more, got -1"), (dict(S_churn=math.nan), "S_churn"),
    (dict(S_noise=-0.1), "S_noise must be 0 or more and finite, got -0.1"), (dict(S_noise=math.inf), "S_noise"), (dict(S_noise=math.nan), "S_noise"),
    (dict(num_steps=0), "at least 1"), (dict(num_steps=2.5), "whole number"),
    (dict(sigma_min=0.), "sigma_min"), (dict(sigma_min=90.), "sigma_min < sigma_max"), (dict(sigma_max=math.inf), "sigma_max"),
    (dict(rho=0.), "rho"),
    (dict(S_churn=1, noise_fn=lambda x: x[:1]), r"draw's answer must have shape \(5, 2\), got shape \(1, 2\)"),
])
def test_bad_settings(sampler, p, noise, kwargs, message):
    count = CountNFE(p)
    with pytest.raises(ValueError, match=message): sampler(count, noise, **kwargs)
    assert count.nfe == 0                         # refused before any work


@pytest.mark.parametrize("kwargs, message", [
    (dict(discretization="karras"), "discretization must be"), (dict(schedule="cosine"), "schedule must be"),
    (dict(scaling=None), "scaling must be"), (dict(solver="rk4"), "solver must be"), (dict(alpha=0.), "alpha"), (dict(alpha=1.5), "alpha"),
    (dict(epsilon_s=0.), "epsilon_s"), (dict(epsilon_s=1., discretization="vp"), "epsilon_s"),
    (dict(discretization="iddpm", C_1=0.), "C_1"), (dict(discretization="iddpm", C_2=-1.), "C_2"), (dict(discretization="iddpm", M=0), "M must be"),
    (dict(discretization="iddpm", num_steps=2000), "n must be at most"),
    (dict(schedule="vp", sigma_min=1., sigma_max=1.1), "no vp clock"),
])
def test_bad_choices(p, noise, kwargs, message):
    with pytest.raises(ValueError, match=message): ablation_sampler(p, noise, **kwargs)


def test_faults_of_others_name_step_and_level(p, noise):
    sigma = karras_sigmas(6)[2].item()
    def breaks_down(x, s): return p(x, s) * (math.nan if abs(s / sigma - 1) < 1e-9 else 1)    # a clock may round
    for sampler in (edm_sampler, ablation_sampler):
        with pytest.raises(ValueError, match=rf"step 1 \(sigma = {sigma:g}\) must be finite"): sampler(breaks_down, noise, 6)    # Heun's second look
        with pytest.raises(ValueError, match=r"step 0 \(sigma = 80\) must have shape \(5, 2\), got shape \(2,\)"): sampler(lambda x, s: x[0], noise, 6)
        def stop(**kwargs): raise KeyboardInterrupt("enough")
        with pytest.raises(KeyboardInterrupt, match="enough"): sampler(p, noise, 6, callback=stop)
