"likelihood: densities and probabilities that are known, closed forms, k-diffusion's numbers, full Jacobians and chance."
import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_edm.core import CountNFE, NoiseStream, expand, score_of, seeded_noise
from ddpm_edm.ddpm import DDPM
from ddpm_edm.likelihood import (METHODS, Dequantizer, Rounded, _paired, _trace, bits_per_dim, elbo, fit_dequantizer, level_log_prob,
                                 ode_log_prob, rademacher)
from ddpm_edm.noise import karras_sigmas, linear_betas
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.solvers import adams_bashforth, dpm_solver, euler, heun

FOLDER = Path(__file__).parent / "golden"
f64, close = torch.float64, torch.testing.assert_close
cases = settings(max_examples=25, deadline=None, derandomize=True)


def t64(*values): return torch.tensor(values, dtype=f64)
def gen(seed=0): return torch.Generator().manual_seed(seed)
def open_end(n, *args): return karras_sigmas(n + 1, *args)[:-1]
def combined(e): return e.error.square().sum().sqrt().item() / len(e.error)    # standard error of the mean over samples


BLOBS = Mixture(t64([-1.2, 0.], [1., 1.], [0.9, -1.]), t64(0.35, 0.2, 0.3), t64(0.5, 0.2, 0.3))
SMALL = Mixture(BLOBS.means / 2.2, BLOBS.stds / 2.2, BLOBS.weights)    # within [-1, 1]


def blurred_log_prob(p, x, sigma, nodes=60):
    "E_n log p(x + sigma n; sigma) by quadrature, for x (B, 2): what the bound is for an exact denoiser."
    at, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    w = w / w.sum()
    grid = torch.cartesian_prod(at, at)
    return p.log_prob((x[:, None] + sigma * grid).reshape(-1, 2), sigma).reshape(len(x), -1) @ (w[:, None] * w).flatten()


# ---- k-diffusion ----

@pytest.mark.parametrize("space", ["g2", "img"])
def test_equals_k_diffusion(space):
    d, m = np.load(FOLDER / "kdiff_loglik.npz"), np.load(FOLDER / "mixtures.npz")
    means, stds, weights = (torch.from_numpy(m[f"{space}.{k}"]) for k in ("means", "stds", "weights"))
    p, x, v = Mixture(means, stds, weights), torch.from_numpy(d[f"{space}.x"]), torch.from_numpy(d[f"{space}.v"])
    zero = Gaussian(torch.zeros_like(x[0]), 0.)    # k-diffusion's prior: N(0, sigma_max^2)
    found = ode_log_prob(p, x, open_end(250 if space == "g2" else 400, 0.01, 60.), v=v, prior=zero, step=dpm_solver(3))
    close(found, torch.from_numpy(d[f"{space}.ll.tol1e-08"]), rtol=0, atol=1e-4)
    if space == "g2":
        exact = ode_log_prob(p, x, open_end(250, 0.01, 60.), prior=zero, step=dpm_solver(3))
        close(exact, torch.from_numpy(d["g2.ll.exact_trace"]), rtol=0, atol=1e-4)
        # with the true density on top it is the truth
        close(ode_log_prob(p, x, open_end(250, 0.01, 60.), prior=p, step=dpm_solver(3)), torch.from_numpy(d["g2.logp_exact_at_sigma_min"]), rtol=0, atol=1e-4)


# ---- the ODE ----

@cases
@given(st.integers(0, 10**6), st.sampled_from([(1,), (3,), (2, 2), (1, 2, 3)]), st.floats(-1.5, 1.5), st.floats(0.1, 2))
def test_gaussian(seed, event, mean, std):
    p = Gaussian(torch.full(event, mean, dtype=f64), std)
    x = p.sample(5, gen(seed))
    found = ode_log_prob(p, x, open_end(60), prior=p, step=dpm_solver(3))
    close(found, p.log_prob(x, 0.002), rtol=0, atol=2e-3 * math.prod(event))    # third order in 60 steps, measured at 3e-4 a dimension and below


@pytest.mark.parametrize("step,order", [(euler, 1), (heun, 2), (dpm_solver(2), 2), (adams_bashforth(2), 2), (dpm_solver(3), 3)])
def test_order_of_accuracy(step, order):
    x = BLOBS.sample(40, gen())
    error = [(ode_log_prob(BLOBS, x, open_end(n), prior=BLOBS, step=step) - BLOBS.log_prob(x, 0.002)).abs() for n in (64, 128)]
    assert abs(math.log2(error[0].mean() / error[1].mean()) - order) < 0.35    # still coarse; 0.1 at 256 steps on the page


def test_any_denoiser_defines_a_density_of_mass_one():
    "Not the denoiser of anything, yet its ODE is invertible."
    odd = lambda x, sigma: 0.8 * torch.tanh(x / (1 + expand(sigma, x)**2)) + 0.1 * torch.sin(2 * x)
    x = torch.linspace(-12, 12, 4001, dtype=f64)[:, None]
    log_p = ode_log_prob(odd, x, open_end(200, 0.01, 20.), sigma_data=0.8)
    assert abs(torch.trapezoid(log_p.exp(), x[:, 0]) - 1) < 5e-3    # second order: 200 steps


def test_default_prior_and_levels():
    x = BLOBS.sample(6, gen())
    close(ode_log_prob(BLOBS, x, open_end(20), sigma_data=0.7), ode_log_prob(BLOBS, x, open_end(20), prior=Gaussian(torch.zeros(2), 0.7)), rtol=0, atol=1e-6)
    close(ode_log_prob(BLOBS, x, karras_sigmas(21)), ode_log_prob(BLOBS, x, open_end(20)), rtol=0, atol=0)    # a final zero is left out
    close(ode_log_prob(BLOBS, x), ode_log_prob(BLOBS, x, karras_sigmas(128)), rtol=0, atol=0)
    # N(0, sigma_max^2) is off by the mean's share, z.m / sigma, and its default by as much: both by less than that
    truth = BLOBS.log_prob(x, 0.002)
    assert (ode_log_prob(BLOBS, x, open_end(200), sigma_data=1., step=dpm_solver(3)) - truth).abs().max() < 4 * 1. / 80


def test_nfe_conditioning_and_dtype():
    x = BLOBS.sample(3, gen())
    counted = CountNFE(lambda x, sigma, labels: BLOBS(x, sigma) + 0 * labels[:, None])
    a = ode_log_prob(counted, x, open_end(10), labels=torch.arange(3))
    assert counted.nfe == 20 and a.dtype == f64 and a.shape == (3,)
    close(a, ode_log_prob(BLOBS, x, open_end(10)), rtol=0, atol=0)
    shifted = lambda x, sigma, labels: BLOBS(x, sigma) + labels[:, None]
    assert (ode_log_prob(shifted, x, open_end(10), labels=t64(1., 1., 1.)) - a).abs().min() > 0.1
    close(ode_log_prob(BLOBS, x.float(), open_end(10)), a, rtol=0, atol=1e-4)    # x rounded to float32
    assert not a.requires_grad


class Net(nn.Module):
    "Smooth and of no symmetry."
    def __init__(self, event):
        super().__init__()
        d = math.prod(event)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, d)).to(f64)
    def forward(self, x, sigma): return self.layers(x.reshape(len(x), -1)).reshape(x.shape) / sigma


@pytest.mark.parametrize("event", [(1,), (4,), (2, 1, 3)])
def test_trace(event):
    net, x, d = Net(event), seeded_noise(range(5), event, f64), math.prod(event)
    J = torch.stack([torch.autograd.functional.jacobian(lambda y: net(y[None], 0.5)[0].flatten(), y).reshape(d, d) for y in x])
    want = J.diagonal(dim1=1, dim2=2).sum(1)
    for chunk in (None, 1, 2):
        D, trace = _trace(net, x, 0.5, None, chunk)
        close(trace, want, rtol=1e-12, atol=1e-12)
        close(D, net(x, 0.5).detach(), rtol=0, atol=0)
    signs = torch.cartesian_prod(*[t64(-1., 1.)] * d).reshape(-1, 1, *event).expand(-1, 5, *event)
    close(_trace(net, x, 0.5, signs, None)[1], want, rtol=1e-12, atol=1e-12)    # the mean of all sign vectors is the trace
    v = rademacher(range(5), event)
    close(_trace(net, x, 0.5, v[None], None)[1], torch.einsum("bi,bij,bj->b", v.reshape(5, d), J, v.reshape(5, d)), rtol=1e-12, atol=1e-12)


def test_probes_are_averaged_and_belong_to_samples():
    x, v = BLOBS.sample(6, gen()), rademacher(range(6), (3, 2)).transpose(0, 1)
    each = torch.stack([ode_log_prob(BLOBS, x, open_end(12), v=u) for u in v])
    close(ode_log_prob(BLOBS, x, open_end(12), v=v), each.mean(0), rtol=0, atol=1e-12)
    close(ode_log_prob(BLOBS, x[:2], open_end(12), v=v[:, :2]), each.mean(0)[:2], rtol=0, atol=1e-12)
    both = (ode_log_prob(BLOBS, x, open_end(12), v=t64([1., 1.]).expand(6, 2)) + ode_log_prob(BLOBS, x, open_end(12), v=t64([1., -1.]).expand(6, 2))) / 2
    close(both, ode_log_prob(BLOBS, x, open_end(12)), rtol=0, atol=1e-12)    # all sign vectors of the plane, up to sign


def test_rademacher():
    v = rademacher(range(200), (3, 8))
    assert v.dtype == f64 and v.shape == (200, 3, 8) and set(v.unique().tolist()) == {-1., 1.}
    assert abs(v.mean()) < 5 / v.numel()**0.5                                      # five standard errors
    close(rademacher([7, 3], (3, 8)), v[[7, 3]], rtol=0, atol=0)
    assert rademacher([1], (4,), torch.float32).dtype == torch.float32


def test_hutchinson_without_bias():
    p = Mixture(seeded_noise(range(3), (6,), f64), 0.5)
    x = p.sample(1, gen()).expand(600, 6)
    found = ode_log_prob(p, x, open_end(16), v=rademacher(range(600), (6,)), prior=p)
    want = ode_log_prob(p, x[:1], open_end(16), prior=p).item()
    assert 0 < found.std() and abs(found.mean() - want) < 5 * found.std() / 600**0.5


# ---- the bound ----

@cases
@given(st.integers(0, 10**6), st.floats(-2, 2), st.floats(0.01, 0.2), st.floats(5, 100), st.floats(0.2, 2))
def test_bound_of_a_constant_denoiser(seed, c, low, high, s):
    "D = c: the integral is |x - c|^2 (1 / low^2 - 1 / high^2) / 2, whatever the proposal."
    x = seeded_noise([seed, seed + 1], (3,), f64)
    e = elbo(lambda x, sigma: torch.full_like(x, c), x, sigma_min=low, sigma_max=high, sigma_data=s, draws=120, seeds=[seed, seed + 1])
    integral = (x - c).square().sum(1) / 2 * (low**-2 - high**-2)
    kl = 1.5 * (math.log(1 + (s / high)**2) - 1) + (3 * high**2 + x.square().sum(1)) / 2 / (high**2 + s**2)
    want = -integral - kl - 1.5 * math.log(2 * math.pi * math.e * low**2)
    assert ((e.value - want).abs() < 6 * e.error + 1e-3 * integral).all(), (e, want)    # six standard errors, and what 120 strata leave


def test_bound_of_a_denoiser_that_does_nothing():
    "D = x: the integral is d ln(high / low), and the control removes nearly all of its chance at low noise."
    x = seeded_noise(range(20), (4,), f64)
    e = elbo(lambda x, sigma: x, x, sigma_min=0.01, sigma_max=1., sigma_data=2., draws=64, prior=Gaussian(torch.zeros(4), 0.))
    want = -4 * math.log(100) - x.square().sum(1) / 2 - 2 * math.log(2 * math.pi * math.e * 0.01**2)
    assert ((e.value - want).abs() < 6 * e.error).all()
    assert e.error.mean() < 0.6    # 0.93 without the control


def test_bound_is_the_truth_for_exact_denoisers():
    "At every single point, also where data never are; the blur by sigma_min is known by quadrature."
    x = t64([-0.45, 0.2], [0.9, -1.], [2.5, 2.])
    e = elbo(BLOBS, x.repeat_interleave(300, 0), sigma_min=0.05, sigma_data=1., prior=BLOBS, draws=48)
    value = e.value.reshape(3, 300)
    want = blurred_log_prob(BLOBS, x, 0.05)
    assert ((value.mean(1) - want).abs() < 5 * value.std(1) / 300**0.5).all()                # unbiased: five standard errors
    claimed = e.error.square().reshape(3, 300).mean(1).sqrt()
    assert ((claimed / value.std(1) - 1).abs() < 0.3).all()                                  # the error is the spread


def test_bound_counts_and_seeds():
    x = BLOBS.sample(6, gen())
    counted = CountNFE(BLOBS)
    e = elbo(counted, x, draws=5)
    assert counted.nfe == 10 and e.value.shape == e.error.shape == (6,) and (e.error > 0).all() and e.value.dtype == f64
    close(elbo(BLOBS, x[3:], draws=5, seeds=[3, 4, 5]).value, e.value[3:], rtol=0, atol=1e-10)
    assert (elbo(BLOBS, x, draws=5, seeds=range(9, 15)).value != e.value).all()
    asked = []
    elbo(lambda x, sigma, labels: asked.append(labels) or BLOBS(x, sigma), x, draws=1, labels=torch.arange(6))
    assert len(asked) == 2 and asked[0].tolist() == list(range(6))
    levels = []
    elbo(lambda x, sigma: levels.append(sigma) or BLOBS(x, sigma), x, draws=8, sigma_min=0.01, sigma_max=50., sigma_data=1.)
    sigma = torch.stack(levels).reshape(8, 2, 6)
    w = torch.log1p(1 / sigma**2) / 2
    low, high = math.log1p(50.**-2) / 2, math.log1p(0.01**-2) / 2
    share = (w - low) / (high - low) * 8 - torch.arange(8, dtype=f64)[:, None, None]
    assert ((share > 0) & (share < 1)).all()    # one stratum of the capacity after the other


def test_paired():
    g = gen()
    control = torch.randn(9, 2, 4, generator=g, dtype=f64)
    exact = _paired(3. + 2.5 * control, control)
    close(exact.value, torch.full((4,), 3., dtype=f64), rtol=0, atol=1e-12)
    close(exact.error, torch.zeros(4, dtype=f64), rtol=0, atol=1e-12)
    looks = torch.randn(6, 2, 20_000, generator=g, dtype=f64)
    looks = looks + 2 * torch.linspace(0, 5, 6, dtype=f64)[:, None, None] * (noise := torch.randn(6, 2, 20_000, generator=g, dtype=f64))
    found = _paired(looks, noise)
    assert abs(found.value.mean()) < 5 * found.value.std() / 20_000**0.5    # no bias, though the factor is chosen from the same noise
    plain = _paired(looks, torch.zeros_like(looks))
    close(plain.value, looks.mean((0, 1)), rtol=1e-12, atol=1e-12)
    close(plain.error.square().mean().sqrt(), plain.value.std(), rtol=0.03, atol=0)    # of 20,000 values, 0.5 %
    single = _paired(looks[:1], noise[:1])                                  # one stratum: nobody to advise
    close(single.value, looks[0].mean(0), rtol=1e-12, atol=1e-12)


# ---- grey levels ----

@pytest.mark.parametrize("levels,event", [(2, (2,)), (7, (2,)), (5, (1, 1, 3))])
def test_rounded_against_all_its_pictures(levels, event):
    mixture = Mixture(0.7 * seeded_noise(range(3), event, f64), t64(0.3, 0.5, 0.2), t64(0.5, 0.2, 0.3))
    p, d = Rounded(mixture, levels), math.prod(event)
    every = torch.cartesian_prod(*[p.grid] * d).reshape(-1, *event)
    P = p.log_probability(every).exp()
    assert abs(P.sum() - 1) < 1e-12
    # each as a product of differences of Phi, by hand
    edge = torch.cat([t64(-math.inf), (p.grid[1:] + p.grid[:-1]) / 2, t64(math.inf)])
    k = ((every + 1) * (levels - 1) / 2).round().long().reshape(-1, 1, d)
    z = lambda at: torch.special.ndtr((at - mixture.means.reshape(1, 3, d)) / mixture.stds[:, None])
    close(P, (z(edge[k + 1]) - z(edge[k])).prod(2) @ mixture.weights, rtol=1e-9, atol=1e-14)
    brute, x = Mixture(every, 0., P / P.sum()), p.sample(8, gen()) + 0.2 * seeded_noise(range(8), event, f64)
    sigma = torch.linspace(0.1, 3, 8, dtype=f64)
    close(p(x, sigma), brute(x, sigma), rtol=1e-10, atol=1e-12)
    close(p.log_prob(x, sigma), brute.log_prob(x, sigma), rtol=1e-10, atol=1e-12)
    close(p(x, 0.3), brute(x, 0.3), rtol=1e-10, atol=1e-12)
    assert p(x.float(), 0.3).dtype == torch.float32
    assert torch.isin(p.sample(50, gen(1)), p.grid).all()


def test_rounded_by_counting():
    p = Rounded(SMALL, 9)
    x = p.sample(50_000, gen())
    for target in p.sample(5, gen(1)):
        P = p.log_probability(target[None]).exp().item()
        assert abs((x == target).all(1).double().mean() - P) < 5 * (P * (1 - P) / 50_000)**0.5


@cases
@given(st.integers(2, 300), st.floats(0.05, 8), st.integers(0, 10**6))
def test_level_log_prob(levels, share, seed):
    "Against the whole softmax, on and beyond the scale."
    grid, sigma = torch.linspace(-1, 1, levels, dtype=f64), share * 2 / (levels - 1)
    noisy = 1.2 * seeded_noise([seed], (6, 1), f64)[0]
    found = level_log_prob(grid.expand(6, levels), noisy.expand(6, levels), sigma, levels)
    close(found, (-(noisy - grid)**2 / (2 * sigma**2)).log_softmax(1), rtol=1e-9, atol=1e-9)


@cases
@given(st.integers(2, 300), st.floats(-2, 2), st.floats(-2, 1.5), st.integers(0, 10**6))
def test_dequantizer_density(levels, shift, log_scale, seed):
    "x' stays in the bin, and log q is that of the change of variables, by autograd."
    q = Dequantizer(levels, lambda x: torch.cat([torch.full_like(x, shift), torch.full_like(x, log_scale)], 1))
    x = torch.linspace(-1, 1, levels, dtype=f64)[torch.randint(levels, (4, 3), generator=gen(seed))]
    u = torch.rand(4, 3, generator=gen(seed + 1), dtype=f64).clamp(1e-3, 1 - 1e-3).requires_grad_()
    place, log_q = q(x, u)
    slope, = torch.autograd.grad(place.sum(), u)
    assert ((place - x).abs() <= 1 / (levels - 1) * (1 + 1e-9)).all()
    close(log_q.detach(), -slope.log().sum(1), rtol=1e-6, atol=1e-6)    # 1 - sigmoid loses digits near the edge
    uniform, log_u = Dequantizer(levels)(x, u.detach())
    zero, log_0 = Dequantizer(levels, lambda x: torch.zeros(len(x), 6))(x, u.detach())
    close(zero, uniform, rtol=0, atol=1e-12), close(log_0, log_u, rtol=1e-9, atol=1e-9)
    close(log_u, torch.full((4,), -3 * math.log(2 / (levels - 1)), dtype=f64), rtol=1e-12, atol=0)


def network(): return nn.Sequential(nn.Linear(1, 24), nn.SiLU(), nn.Linear(24, 2))


def test_fit_dequantizer_tightens_the_bound():
    p, width = Rounded(Mixture(t64([-0.4], [0.5]), t64(0.2, 0.12), t64(0.6, 0.4)), 16), 2 / 15
    torch.manual_seed(0)
    net = network()
    nn.init.zeros_(net[-1].weight), nn.init.zeros_(net[-1].bias)
    before, x = Dequantizer(16), p.sample(3000, gen())
    q = fit_dequantizer(Dequantizer(16, net), p, x, 0.25 * width, steps=200)
    u = torch.rand(3000, 1, generator=gen(1), dtype=f64)
    mass = (p.log_prob((p.grid[:, None] + width * (torch.linspace(0.0025, 0.9975, 200, dtype=f64) - 0.5)).reshape(-1, 1), 0.25 * width).reshape(16, 200).exp().mean(1) * width).log()
    k = ((x[:, 0] + 1) * 7.5).round().long()
    gaps = []
    for which in (before, q):
        place, log_q = which(x, u)
        gaps.append((mass[k] - p.log_prob(place, 0.25 * width) + log_q).mean().item() / math.log(2))
    assert 0.1 < gaps[0] and 0 < gaps[1] < 0.25 * gaps[0], gaps


def test_gradient_of_fit_is_that_of_the_bound():
    "The score stands for the gradient of log p: against autograd through log_prob."
    p, q = Rounded(SMALL, 16), Dequantizer(16, nn.Linear(2, 4).double())
    x, u = p.sample(8, gen()), torch.rand(8, 2, generator=gen(1), dtype=f64)
    place, log_q = q(x, u)
    want = torch.autograd.grad((log_q - p.log_prob(place, 0.1)).mean(), q.net.weight, retain_graph=True)[0]
    found = torch.autograd.grad((log_q - (score_of(p(place, 0.1), place, 0.1).detach() * place).sum(1)).mean(), q.net.weight)[0]
    close(found, want, rtol=1e-8, atol=1e-10)


# ---- bits per dimension ----

BYTES = Rounded(SMALL, 256)


@pytest.fixture(scope="module")
def pictures():
    x = BYTES.sample(300, gen(3))
    return x, -BYTES.log_probability(x) / (2 * math.log(2))


FAST = dict(steps=24, step=dpm_solver(3), probes=0)


@pytest.mark.parametrize("kw", [dict(method="ode", draws=2, **FAST), dict(method="ode", draws=2, steps=160, probes=0)], ids=["DPM-Solver-3", "Heun"])
def test_ode_on_bytes(pictures, kw):
    "Issue's goal: within 0.01 of the truth."
    x, truth = pictures
    e = bits_per_dim(SMALL, x, prior=SMALL, **kw)
    assert abs((e.value - truth).mean()) < 0.008 and combined(e) < 0.002


@pytest.mark.parametrize("kw", [dict(), dict(dequantize=Dequantizer()), dict(told=True, sigma_min=0.001)], ids=["levels", "uniform", "told"])
def test_bound_on_bytes(pictures, kw):
    x, truth = pictures
    p = BYTES if kw.pop("told", False) else SMALL
    n = 20 if p is BYTES else 150
    e = bits_per_dim(p, x[:n].repeat(1 if p is SMALL else 2, 1), prior=SMALL, draws=400 if p is SMALL else 150, **kw)
    off = (e.value - truth[:n].repeat(1 if p is SMALL else 2)).mean()
    assert abs(off) < 0.002 + 4 * combined(e), (off, combined(e))
    if p is SMALL: assert combined(e) < 0.02 and abs(off) < 0.05


def test_hutchinson_on_bytes(pictures):
    x, truth = pictures
    e = bits_per_dim(SMALL, x, "ode", prior=SMALL, steps=24, step=dpm_solver(3), draws=8)
    assert abs((e.value - truth).mean()) < 0.005 + 4 * combined(e)
    assert 0.6 < ((e.value - truth).abs() < 2 * e.error).double().mean() < 1    # signs in the plane take two values: 8 draws give rough errors


def test_chain_on_bytes(pictures):
    "DDPM's sum falls towards the truth, and stays above it by what its last variance costs."
    x, truth = (t[:60] for t in pictures)
    whole = DDPM(linear_betas(), variance="large")
    found = [bits_per_dim(SMALL, x, "ddpm", chain=whole.respace(torch.linspace(0, 999, n).round().long())) for n in (50, 500)]
    off = [(e.value - truth).mean().item() for e in found]
    r = (whole.sigmas[0]**2 / whole.posterior_variance[1]).item()
    floor = 0.5 * (r - 1 - math.log(r)) / math.log(2)
    assert off[0] > off[1] and abs(off[1] - floor) < 0.06 + 4 * combined(found[1])
    # the same numbers as the chain's own
    short = whole.respace(torch.arange(0, 1000, 100))
    mine = bits_per_dim(SMALL, x, "ddpm", chain=short, draws=1)
    stream = NoiseStream(range(60))
    close(mine.value, short.bpd(short.network(SMALL), x, draw=stream).total, rtol=0, atol=1e-9)


def test_density_without_levels():
    x = BLOBS.sample(60, gen())
    truth = -BLOBS.log_prob(x, 0.002) / (2 * math.log(2))
    e = bits_per_dim(BLOBS, x, "ode", levels=None, prior=BLOBS, **FAST)
    close(e.value, truth, rtol=0, atol=0.04)    # third order in 24 steps, the worst of 60 samples
    assert (e.error == 0).all() and abs((e.value - truth).mean()) < 0.005
    b = bits_per_dim(BLOBS, x, levels=None, prior=BLOBS, sigma_data=1., draws=200)
    assert abs((b.value - truth).mean()) < 4 * combined(b) + 1e-3


@pytest.mark.parametrize("levels", [2, 17, 256, 1000])
def test_offset_of_levels(levels):
    "Uniform in the bin: minus the log density, less the log of the bin's width 2 / (levels - 1)."
    p = Gaussian(torch.zeros(2, dtype=f64), 0.4)
    x = torch.linspace(-1, 1, levels, dtype=f64)[torch.randint(levels, (4, 2), generator=gen())]
    centre = Dequantizer(levels)    # held at the centre of the bin
    centre.forward = lambda x, u: (x, x.new_full((len(x),), -2 * math.log(2 / (levels - 1))))
    e = bits_per_dim(p, x, "ode", levels=levels, dequantize=centre, sigma_min=0.01, prior=p, draws=1, **FAST)
    close(e.value, -p.log_prob(x, 0.01) / (2 * math.log(2)) + math.log2((levels - 1) / 2), rtol=0, atol=2e-3)    # third order in 24 steps
    assert e.error.isnan().all()    # one draw says nothing of its error


def test_importance_tightens(pictures):
    p = Rounded(SMALL, 16)
    x = p.sample(40, gen())
    kw = dict(levels=16, prior=SMALL, sigma_min=0.3 * 2 / 15, steps=16, step=dpm_solver(3), probes=0)
    one = bits_per_dim(p, x, "ode", draws=8, **kw)
    together = bits_per_dim(p, x, "ode", draws=8, importance=True, **kw)
    assert (together.value < one.value).all()    # Jensen, sample by sample: the same draws
    truth = -p.log_probability(x) / (2 * math.log(2))
    assert (one.value - truth).mean() > (together.value - truth).mean() > -0.02


def test_seeds_batches_and_labels():
    x, calls = BYTES.sample(7, gen()), []
    def conditional(x, sigma, labels):
        calls.append(labels)
        return SMALL(x, sigma) + 0 * labels[:, None]
    for method, kw in dict(elbo=dict(draws=3), ode=dict(draws=2, steps=4), ddpm=dict(draws=2, chain=DDPM(linear_betas()).respace(torch.arange(0, 1000, 250)))).items():
        whole = bits_per_dim(SMALL, x, method, **kw)
        parts = bits_per_dim(conditional, x, method, labels=torch.arange(7), batch=3, **kw)
        close(parts.value, whole.value, rtol=0, atol=1e-9), close(parts.error, whole.error, rtol=0, atol=1e-9)
        close(bits_per_dim(SMALL, x[[4, 2]], method, seeds=[4, 2], **kw).value, whole.value[[4, 2]], rtol=0, atol=1e-9)
        assert {tuple(c.tolist()) for c in calls} == {(0, 1, 2), (3, 4, 5), (6,)}
        assert whole.value.shape == (7,) and (whole.value != bits_per_dim(SMALL, x, method, seeds=range(100, 107), **kw).value).all()
        calls.clear()


def test_defaults_and_counts():
    x = BYTES.sample(2, gen())
    assert set(METHODS) == {"elbo", "ode", "ddpm"}
    for method, want, kw in ("elbo", 32, {}), ("ode", 4 * 2 * 5, dict(steps=5)), ("ddpm", 2 * 10, dict(chain=DDPM(linear_betas()).respace(torch.arange(0, 1000, 100)))):
        counted = CountNFE(SMALL)
        bits_per_dim(counted, x, method, **kw)
        assert counted.nfe == want
    assert inspect.signature(bits_per_dim).parameters["steps"].default == 128
    seen = []
    bits_per_dim(lambda x, sigma: seen.append(float(torch.as_tensor(sigma).min())) or SMALL(x, sigma), x, "ode", steps=3, draws=1)
    assert math.isclose(min(seen), 1 / 255, rel_tol=1e-6) and math.isclose(max(seen), 80, rel_tol=1e-6)    # from half a level
    images = BYTES.sample(3, gen()).float().reshape(3, 2)                         # float32 of a data set is snapped to its levels
    close(bits_per_dim(SMALL, images, draws=2).value, bits_per_dim(SMALL, images.double().mul(127.5).add(127.5).round().div(127.5).sub(1), draws=2).value, rtol=0, atol=1e-9)


# ---- faults ----

X = BYTES.sample(4, gen())


@pytest.mark.parametrize("call,message", [
    (lambda: ode_log_prob(SMALL, X, [1., 0.]), "sigmas must hold at least 2 levels above 0"),
    (lambda: ode_log_prob(SMALL, X, [1., 2.]), "sigmas must be finite, decrease"),
    (lambda: ode_log_prob(SMALL, X * math.nan, open_end(3)), "x must be a finite floating-point tensor"),
    (lambda: ode_log_prob(SMALL, X.byte(), open_end(3)), "x must be a finite floating-point tensor"),
    (lambda: ode_log_prob(SMALL, X, open_end(3), v=torch.ones(3, 2)), r"v must have shape \(4, 2\)"),
    (lambda: ode_log_prob(SMALL, X, open_end(3), v=torch.ones(0, 4, 2)), "v must hold"),
    (lambda: ode_log_prob(SMALL, X, open_end(3), prior=1.), r"prior must have log_prob\(x, sigma\)"),
    (lambda: ode_log_prob(SMALL, X, open_end(3), sigma_data=-1.), "sigma_data must be positive"),
    (lambda: ode_log_prob(lambda x, s: x[:, :1], X, open_end(3)), r"denoise's answer must have shape \(4, 2\)"),
    (lambda: ode_log_prob(lambda x, s: x.detach(), X, open_end(3)), "autograd can differentiate"),
    (lambda: ode_log_prob(lambda x, s: x / 0, X, open_end(3)), "denoise's answers must be finite"),
    (lambda: elbo(lambda x, s: x / 0, X), "denoise's answers must be finite"),
    (lambda: elbo(lambda x, s: x[:2], X), r"denoise's answer must have shape \(4, 2\)"),
    (lambda: elbo(SMALL, X, sigma_min=0.), "need 0 < sigma_min < sigma_max"),
    (lambda: elbo(SMALL, X, draws=1.5), "draws must be a whole number"),
    (lambda: elbo(SMALL, X, seeds=[1]), "one sample for each of the 1 seeds"),
    (lambda: bits_per_dim(SMALL, X, "flow"), "method must be one of"),
    (lambda: bits_per_dim(SMALL, X + 1e-3), "x must hold grey levels, multiples of 2/255"),
    (lambda: bits_per_dim(SMALL, X * 1.1), "x must hold grey levels"),
    (lambda: bits_per_dim(SMALL, X[:0]), "not empty"),
    (lambda: bits_per_dim(SMALL, X, draws=0), "draws must be a whole number"),
    (lambda: bits_per_dim(SMALL, X, "ode", steps=0), "steps must be a whole number"),
    (lambda: bits_per_dim(SMALL, X, "ode", probes=-1), "probes must be a whole number"),
    (lambda: bits_per_dim(SMALL, X, levels=1), "levels must be a whole number"),
    (lambda: bits_per_dim(SMALL, X, levels=None, dequantize=Dequantizer()), "levels must be a number"),
    (lambda: bits_per_dim(SMALL, X, "ddpm", levels=None), "levels must be a number"),
    (lambda: bits_per_dim(SMALL, X, "ddpm", dequantize=Dequantizer()), "dequantize must be None for method 'ddpm'"),
    (lambda: bits_per_dim(SMALL, X, "ode", dequantize=Dequantizer(16)), "dequantize must be made for 256 levels, got 16"),
    (lambda: bits_per_dim(SMALL, X, "ode", importance=True), "importance must be False"),
    (lambda: bits_per_dim(SMALL, X, importance=True, probes=0), "importance must be False"),
    (lambda: bits_per_dim(SMALL, X, seeds=[0, 1]), "seeds must be 4"),
    (lambda: bits_per_dim(SMALL, X, labels=torch.arange(3)), r"labels must be \(4,\)"),
    (lambda: bits_per_dim(SMALL, X, batch=0), "batch must be a whole number"),
    (lambda: bits_per_dim(SMALL, X, sigma_min=90.), "sigma_min"),
    (lambda: Rounded(SMALL, 1), "levels must be a whole number"),
    (lambda: Rounded(Mixture(X, 0.)), "mixture must have stds above 0"),
    (lambda: Dequantizer(1), "levels must be a whole number"),
    (lambda: fit_dequantizer(Dequantizer(), SMALL, X), "dequantizer must have a network"),
    (lambda: fit_dequantizer(Dequantizer(16, nn.Linear(2, 4)), SMALL, X), "x must hold grey levels"),
    (lambda: fit_dequantizer(Dequantizer(256, nn.Linear(2, 4)), SMALL, X, steps=0), "steps must be a whole number"),
])
def test_faults(call, message):
    with pytest.raises(ValueError, match=message): call()
