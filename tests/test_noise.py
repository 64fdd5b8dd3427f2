"Noise levels: the EDM schedule and the training density."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import convert_noise
from ddpm_edm.noise import (LogNormal, LogUniform, VPNoise, alpha_bars, cosine_betas, karras_sigmas, linear_betas,
                            scaled_linear_betas, sigmoid_betas, vp_sigmas, zero_terminal_snr)

GOLDEN = np.load(Path(__file__).parent / "golden" / "edm_coeffs.npz")
SCHEDULES = np.load(Path(__file__).parent / "golden" / "schedules.npz")    # the tables at `index` only

levels = st.tuples(st.floats(1e-4, 10), st.floats(1.1, 1e5)).map(lambda t: (t[0], t[0] * t[1]))    # sigma_min, sigma_max


def seeded(seed): return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [5, 18, 40])
def test_golden_schedule(n):
    golden = GOLDEN[f"schedule.edm.n{n}.rho7.0.002-80"]
    # float64 rounding of a seventh power
    np.testing.assert_allclose(karras_sigmas(n).numpy(), golden, rtol=1e-12, atol=1e-15)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 200), ends=levels, rho=st.floats(1, 100))
def test_schedule_is_a_schedule(n, ends, rho):
    s = karras_sigmas(n, *ends, rho)
    assert s.shape == (n + 1,) and s.dtype == torch.float64
    assert (s.diff() < 0).all() and s[-1] == 0
    # a power rho of a number with relative rounding 2^-53, amplified once more where bottom is small beside top
    slack = 1e-12 * (ends[1] / ends[0])**(1 / rho)
    assert math.isclose(s[0], ends[1], rel_tol=1e-12)
    if n > 1: assert math.isclose(s[-2], ends[0], rel_tol=slack)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 60), ends=levels, rho=st.floats(1, 20), scale=st.floats(1e-3, 1e3))
def test_units_do_not_matter(n, ends, rho, scale):
    a, b = karras_sigmas(n, *ends, rho), karras_sigmas(n, ends[0] * scale, ends[1] * scale, rho)
    torch.testing.assert_close(b, a * scale, rtol=1e-9, atol=0)    # rounding amplified by up to (1e5)^(1/rho) in the ramp


def test_uniform_in_the_power():
    "The defining property: sigma^(1/rho) has equal gaps, for a rho that is not a whole number."
    gaps = (karras_sigmas(30, rho=2.5)[:-1]**(1 / 2.5)).diff()
    assert (gaps - gaps[0]).abs().max() < 1e-13    # rounding of numbers up to 80^0.4 = 5.8


def test_limits_of_rho():
    torch.testing.assert_close(karras_sigmas(9, 1., 9., rho=1.)[:-1], torch.arange(9., 0., -1).double(), rtol=1e-14, atol=0)
    s = karras_sigmas(9, 0.01, 1., rho=1e6)[:-1]
    geometric = torch.logspace(0, -2, 9, dtype=torch.float64)
    # ln(sigma) differs by at most ln(100)^2 / (8 rho) = 2.7e-6
    assert (s / geometric - 1).abs().max() < 2.8e-6
    assert (s / geometric - 1).abs().max() > 2.5e-6    # and by no less: the rate, not an accident


def test_one_step(): assert karras_sigmas(1, 0.1, 7., 3.).tolist() == pytest.approx([7., 0.], rel=1e-15)


@pytest.mark.parametrize("name, bad", [
    ("n", dict(n=0)), ("n", dict(n=-3)), ("n", dict(n=2.5)),
    ("sigma_min", dict(n=5, sigma_min=0.)), ("sigma_min", dict(n=5, sigma_min=-1.)), ("sigma_min", dict(n=5, sigma_min=80.)),
    ("sigma_min", dict(n=5, sigma_min=math.nan)), ("sigma_max", dict(n=5, sigma_max=math.inf)),
    ("rho", dict(n=5, rho=0.)), ("rho", dict(n=5, rho=-7.)), ("rho", dict(n=5, rho=math.nan)), ("rho", dict(n=5, rho=math.inf))])
def test_schedule_refuses(name, bad):
    with pytest.raises(ValueError, match=name): karras_sigmas(**bad)


@settings(max_examples=20, deadline=None)
@given(mean=st.floats(-3, 3), std=st.floats(0.01, 2), seed=st.integers(0, 2**31))
def test_lognormal_is_normal_in_the_logarithm(mean, std, seed):
    n = 20_000
    z = (LogNormal(mean, std).sample(n, seeded(seed)).double().log() - mean) / std
    # 6 standard errors: 1e-9 chance each; 1e-4 for float32 with a small std
    assert abs(z.mean()) < 6 / n**0.5 + 1e-4
    assert abs(z.square().mean() - 1) < 6 * (2 / n)**0.5 + 1e-4
    for q in (-1., 0., 0.5, 2.):
        p = math.erfc(-q / 2**0.5) / 2
        assert abs((z < q).double().mean() - p) < 6 * (p * (1 - p) / n)**0.5 + 1e-3


def test_lognormal_moments_at_the_defaults():
    s = LogNormal().sample(200_000, seeded(0)).double()
    var = (math.exp(1.44) - 1) * math.exp(-2.4 + 1.44)
    assert abs(s.mean() - math.exp(-1.2 + 0.72)) < 5 * (var / 200_000)**0.5    # 5 standard errors
    assert LogNormal().sample(3).dtype == torch.float32


def test_lognormal_matches_edms_draws():
    "ln sigma = P_mean + P_std * draw, for the standard normal that a generator gives."
    draw = torch.randn(7, generator=seeded(3))
    torch.testing.assert_close(LogNormal(-0.6, 1.5).sample(7, seeded(3)), (1.5 * draw - 0.6).exp())


def test_lognormal_generator():
    state = torch.get_rng_state()
    a = LogNormal().sample(8, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)    # an injected generator leaves the global one alone
    assert torch.equal(a, LogNormal().sample(8, seeded(1))) and not torch.equal(a, LogNormal().sample(8, seeded(2)))
    torch.manual_seed(1)
    assert torch.equal(LogNormal().sample(8), a)        # without one, the global generator decides
    assert LogNormal().sample(0).shape == (0,)


def test_lognormal_without_spread(): assert LogNormal(P_mean=0., P_std=0.).sample(4).tolist() == [1.] * 4


@pytest.mark.parametrize("name, value", [("P_std", -0.1), ("P_std", math.nan), ("P_std", math.inf), ("P_mean", math.nan)])
def test_lognormal_refuses(name, value):
    with pytest.raises(ValueError, match=name): LogNormal(**{name: value})


def test_lognormal_is_a_frozen_value():
    assert LogNormal() == LogNormal(-1.2, 1.2) and hash(LogNormal()) == hash(LogNormal(-1.2, 1.2))
    with pytest.raises(AttributeError): LogNormal().P_mean = 0.


# ---- DDPM's tables ----

TABLES = {"linear": linear_betas(), "scaled_linear": scaled_linear_betas(start=1e-4, end=0.02), "sigmoid": sigmoid_betas(),
          "squaredcos_cap_v2": cosine_betas()}


@pytest.mark.parametrize("name", TABLES)
def test_golden_tables(name):
    index, betas = SCHEDULES["index"], TABLES[name]
    assert betas.shape == (1000,) and betas.dtype == torch.float64
    for key, got in {"betas": betas, "alphas_cumprod": alpha_bars(betas), "zero_snr.alphas_cumprod": alpha_bars(zero_terminal_snr(betas))}.items():
        np.testing.assert_allclose(got.numpy()[index], SCHEDULES[f"{name}.{key}"], rtol=0, atol=1e-14)    # float64 rounding of 1000 products below 1


betas_of = st.one_of(st.tuples(st.integers(2, 60), st.floats(1e-5, 0.5), st.floats(1e-5, 0.9)).map(lambda a: linear_betas(*a)),
                     st.tuples(st.integers(2, 60), st.floats(0, 0.1)).map(lambda a: cosine_betas(*a)))


@settings(max_examples=100, deadline=None)
@given(betas=betas_of)
def test_alpha_bars_compose(betas):
    bar = alpha_bars(betas)
    assert (bar.diff() < 0).all() and (bar > 0).all()
    # one step more is one factor more, and noise variances add: var_t = (1 - beta_t) var_{t-1} + beta_t
    var = torch.zeros((), dtype=torch.float64)
    for beta, want in zip(betas, 1 - bar):
        var = (1 - beta) * var + beta
        assert abs(var - want) < 1e-14    # rounding of at most 60 sums below 1


@settings(max_examples=100, deadline=None)
@given(betas=betas_of)
def test_zero_terminal_snr(betas):
    root, old = alpha_bars(zero_terminal_snr(betas)).sqrt(), alpha_bars(betas).sqrt()
    assert root[-1] == 0 and zero_terminal_snr(betas)[-1] == 1
    # affine in the root, beginning where it did; a root carries the square root of its square's rounding only where it is small
    torch.testing.assert_close(root, (old - old[-1]) * old[0] / (old[0] - old[-1]), rtol=1e-7, atol=1e-12)


def test_one_step_of_each_table():
    assert linear_betas(1).tolist() == [1e-4] and cosine_betas(1).tolist() == [0.999] and len(sigmoid_betas(1)) == len(scaled_linear_betas(1)) == 1


@pytest.mark.parametrize("call, message", [
    (lambda: linear_betas(0), "T must be a whole number and at least 1, got 0"), (lambda: cosine_betas(2.5), "T must be a whole number"),
    (lambda: sigmoid_betas(10, start=0.), "start must be between 0 and 1, got 0"), (lambda: linear_betas(10, end=1.), "end must be between 0 and 1, got 1"),
    (lambda: scaled_linear_betas(10, start=-1e-4), "start must be between 0 and 1"), (lambda: cosine_betas(10, s=-1.), "s must be 0 or more"),
    (lambda: cosine_betas(10, max_beta=1.), "max_beta must be between 0 and 1"),
    (lambda: alpha_bars(torch.zeros(3)), "betas must be .* 0 < beta <= 1"), (lambda: alpha_bars(torch.tensor([0.1, math.nan])), "betas must be"),
    (lambda: alpha_bars(torch.ones(2, 2)), r"got shape \(2, 2\)"), (lambda: alpha_bars(torch.ones(0)), "betas must be"),
    (lambda: zero_terminal_snr(torch.tensor([0.5])), "betas must hold at least 2 steps, got 1")])
def test_tables_refuse(call, message):
    with pytest.raises(ValueError, match=message): call()


# ---- VP and VE ----

@pytest.mark.parametrize("n", [5, 18, 40])
def test_golden_vp_schedule(n): np.testing.assert_allclose(vp_sigmas(n).numpy(), SCHEDULES[f"edm.vp.n{n}"], rtol=1e-11, atol=0)


def test_golden_training_levels(monkeypatch):
    "The levels that EDM's VP and VE losses make from the same uniform draws."
    u = torch.from_numpy(SCHEDULES["edm.VPLoss.u"])
    monkeypatch.setattr(torch, "rand", lambda n, generator=None, dtype=None: u)
    # float32 results; VP's golden numbers lose digits themselves where t is tiny
    np.testing.assert_allclose(VPNoise().sample(len(u)).numpy(), SCHEDULES["edm.VPLoss.sigma(u)"], rtol=1e-6)
    np.testing.assert_allclose(LogUniform().sample(len(u)).numpy(), SCHEDULES["edm.VELoss.sigma(u)"], rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 100), eps=st.floats(1e-5, 0.5), beta_d=st.floats(0.1, 40), beta_min=st.floats(0.01, 2))
def test_vp_steps_are_even_in_time(n, eps, beta_d, beta_min):
    s = vp_sigmas(n, eps, beta_d, beta_min)
    assert s.shape == (n + 1,) and s[-1] == 0 and (s.diff() < 0).all()
    time = convert_noise(s[:-1], "sigma", "vp_time", beta_d, beta_min)
    torch.testing.assert_close(time, torch.linspace(1, eps, n, dtype=torch.float64), rtol=1e-9, atol=1e-12)    # rounding through exp and log


def test_vp_time_and_log_sigma_are_uniform():
    n = 50_000
    for u in (convert_noise(VPNoise().sample(n, seeded(0)).double(), "sigma", "vp_time"),
              (LogUniform(0.1, 10.).sample(n, seeded(0)).double() / 0.1).log() / math.log(100)):
        for q in (0.1, 0.5, 0.9):    # 5 standard errors of a share
            assert abs((u < q).double().mean() - q) < 5 * (q * (1 - q) / n)**0.5 + 1e-4    # and VP's least time
    assert VPNoise().sample(4).dtype == LogUniform().sample(4).dtype == torch.float32
    assert torch.equal(VPNoise().sample(4, seeded(1)), VPNoise().sample(4, seeded(1)))


@pytest.mark.parametrize("call, message", [
    (lambda: vp_sigmas(0), "n must be a whole number and at least 1, got 0"), (lambda: vp_sigmas(3, 0.), "epsilon_s must be between 0 and 1"),
    (lambda: vp_sigmas(3, beta_d=-1.), "beta_d and beta_min must be positive"), (lambda: VPNoise(epsilon_t=1.), "epsilon_t must be between 0 and 1"),
    (lambda: LogUniform(1., 1.), "need 0 < sigma_min < sigma_max"), (lambda: LogUniform(0.), "need 0 < sigma_min")])
def test_vp_and_ve_refuse(call, message):
    with pytest.raises(ValueError, match=message): call()
