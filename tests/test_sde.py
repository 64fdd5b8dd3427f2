"sde: processes against their moment equations, samplers against exact linear chains, closed forms, golden numbers and chance."
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import CountNFE, NoiseStream, as_denoiser, expand, score_of, seeded_noise
from ddpm_edm.langevin import annealed_langevin, geometric_sigmas, langevin
from ddpm_edm.noise import alpha_bars, vp_sigmas
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.sde import SDE, SubVPSDE, VESDE, VPSDE, ancestral_step, corrector_step, euler_maruyama, predictor_corrector

FOLDER = Path(__file__).parent / "golden"
GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "sde_ve.npz").items() if v.dtype == np.float64}
G2 = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "mixtures.npz").items() if k.startswith("g2.")}
cases = settings(max_examples=50, deadline=None, derandomize=True)
close = torch.testing.assert_close

vp = st.tuples(st.floats(0.5, 40), st.floats(0.01, 2))    # beta_d, beta_min
processes = st.one_of(vp.map(lambda b: VPSDE(*b)), vp.map(lambda b: SubVPSDE(*b)),
                      st.tuples(st.floats(1e-3, 1), st.floats(2, 1e5)).map(lambda s: VESDE(s[0], s[0] * s[1])))
ALL = [VPSDE(), SubVPSDE(), VESDE()]
names = lambda sde: type(sde).__name__


def f64(*values): return torch.tensor(values, dtype=torch.float64)


def draws(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype)


def impulses(run, count):
    "Answers of run(noise, draw), linear in its draws, to a unit impulse in the start and in each of `count` draws."
    rows = iter(torch.eye(count + 1, dtype=torch.float64))
    out = run(next(rows)[:, None], lambda x: next(rows)[:, None])
    assert next(rows, None) is None    # all draws were made
    return out[:, 0]


# ---- processes ----

@cases
@given(processes, st.floats(0.02, 1))
def test_marginals_solve_the_moment_equations(sde, end):
    "Fourth-order Runge-Kutta on d scale = f scale, d V = 2 f V + g^2, which knows f and g only."
    n, y = 400, np.array([1., sde.std(0.).item()**2])
    h = end / n
    half = torch.linspace(0, end, 2 * n + 1, dtype=torch.float64)
    f, g = sde.rate(half).numpy(), sde.diffusion(half).numpy()
    def change(i, y): return np.array([f[i] * y[0], 2 * f[i] * y[1] + g[i]**2])
    for i in range(0, 2 * n, 2):
        k1 = change(i, y)
        k2 = change(i + 1, y + h / 2 * k1)
        k3 = change(i + 1, y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + change(i + 2, y + h * k3))
    # local error (rate h)^5 / 120 with rate up to 42 and h = 1/400, 400 times: below 1e-4 of itself
    np.testing.assert_allclose([sde.scale(end).item(), sde.std(end).item()**2], y, rtol=1e-4, atol=1e-12)
    close(sde.sigma(end), sde.std(end) / sde.scale(end), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sde,start", [(VPSDE(), 0.), (SubVPSDE(), 0.), (VESDE(), 0.01)], ids=["VP", "sub-VP", "VE"])
def test_start(sde, start):
    "Data are whole at t = 0, without noise or, for VE, with sigma_min."
    assert sde.scale(0).item() == 1 and math.isclose(sde.std(0).item(), start, abs_tol=1e-15)


def test_known_numbers():
    "Song et al.'s constants: beta from 0.1 to 20; what is left of the data and of room for noise at t = 1."
    assert math.isclose(VPSDE().beta(0.), 0.1) and math.isclose(VPSDE().beta(1.), 20.)
    assert math.isclose(VPSDE().scale(1.), math.exp(-10.05 / 2), rel_tol=1e-12)
    assert math.isclose(VPSDE().std(1.)**2 + VPSDE().scale(1.)**2, 1, rel_tol=1e-12)
    assert math.isclose(SubVPSDE().std(1.), 1 - math.exp(-10.05), rel_tol=1e-12)
    assert math.isclose(VESDE().std(0.5), math.sqrt(0.01 * 50), rel_tol=1e-12)
    assert (SubVPSDE().std(torch.linspace(0.01, 1, 50)) < VPSDE().std(torch.linspace(0.01, 1, 50))).all()


@cases
@given(processes, st.integers(1, 30))
def test_times_sigmas_and_back(sde, n):
    times, sigmas = sde.times(n), sde.sigmas(n)
    assert times.shape == sigmas.shape == (n + 1,) and times.dtype == sigmas.dtype == torch.float64
    assert times[0] == 1 and times[-1] == sde.t_min and sigmas[-1] == 0
    assert (times.diff() < 0).all() and (sigmas.diff() < 0).all()
    close(sigmas[0], sde.sigma(1.), rtol=1e-12, atol=0)
    if n > 1: close(sigmas[-2], sde.sigma(sde.t_min), rtol=1e-9, atol=0)    # 1 - exp(-B) for small B
    close(sde.time(sde.sigma(times)), times, rtol=1e-6, atol=1e-9)    # sigma of 1e-4 holds t to a few parts in 1e-8
    s = sde.sigma(0.3).item()
    close(sde.time(s), f64(0.3)[0], rtol=1e-8, atol=0)                      # a number is taken as float64
    assert sde.time(torch.tensor([s])).dtype == torch.float32


def test_schedules_of_other_pages():
    close(VPSDE().sigmas(17), vp_sigmas(17), rtol=1e-10, atol=0)
    close(VESDE(0.02, 100.).sigmas(9), geometric_sigmas(9, 0.02, 100.), rtol=1e-12, atol=0)
    close(VPSDE().sigmas(1), f64(VPSDE().sigma(1.), 0.), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sde", ALL, ids=names)
def test_score_is_the_gradient_of_the_density_in_its_own_coordinates(sde):
    p = Mixture(seeded_noise(range(3), (1, 2, 2), torch.float64), stds=0.4)
    x, t = seeded_noise(range(5), (1, 2, 2), torch.float64).requires_grad_(), f64(0.05, 0.2, 0.5, 0.8, 1.)
    log_p = p.log_prob(x / expand(sde.scale(t), x), sde.sigma(t)) - 4 * sde.scale(t).log()
    auto, = torch.autograd.grad(log_p.sum(), x)
    # (D - x) / sigma^2 loses digits where sigma is large or small beside x: sigma^2 from 1e-4 to 2e4
    close(sde.score(p, x, t).detach(), auto, rtol=1e-8, atol=1e-10)
    close(sde.score(p, x[:1], 0.05).detach(), auto[:1], rtol=1e-8, atol=1e-10)    # a float is the same as a tensor
    close(sde.drift(x, t).detach(), expand(sde.rate(t), x) * x.detach(), rtol=1e-14, atol=0)


def test_score_hands_on_the_conditioning():
    x = torch.ones(2, 3, dtype=torch.float64)
    s = VESDE().score(lambda x, sigma, labels: labels[:, None] + 0 * x, x, 0.5, labels=f64(0., 1.))
    close(s, f64([-1.] * 3, [0.] * 3) / VESDE().std(0.5)**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sde", ALL, ids=names)
def test_forward_simulation(sde):
    "Euler-Maruyama forwards in 400 steps reaches scale x0 and std at t = 0.6."
    x = torch.full((4000, 1), 1.5, dtype=torch.float64)
    draw = draws(0)
    x = x + sde.std(0.) * draw(x)
    for t in torch.arange(240) / 400: x = x + sde.drift(x, t) / 400 + sde.diffusion(t) / 20 * draw(x)
    std = sde.std(0.6).item()
    assert abs(x.mean() - 1.5 * sde.scale(0.6)) < 5 * std / 4000**0.5 + 0.02      # five standard errors, and first order
    assert abs(x.std() / std - 1) < 5 / 8000**0.5 + 0.03                         # VE grows by 2% in a step


# ---- reverse SDE and ODE ----

@pytest.mark.parametrize("eta", [0., 0.5, 1., 2.])
@pytest.mark.parametrize("sde", ALL, ids=names)
def test_gaussian_chain(sde, eta):
    "Mean and variance of the discrete chain are a linear recursion, written here for N(m, s^2) without a denoiser."
    m, s, n = 0.7, 0.5, 40
    times, p = torch.linspace(1, 0.05, n + 1, dtype=torch.float64), Gaussian(f64(m), s)
    mean, var = 0., sde.std(1.).item()**2
    for t, t_next in zip(times.tolist(), times.tolist()[1:]):
        f, g, a, b = (h(t).item() for h in (sde.rate, sde.diffusion, sde.scale, sde.std))
        dt, pull = t - t_next, (1 + eta**2) / 2 * g**2 / (a**2 * s**2 + b**2)
        keep = 1 - dt * f - dt * pull
        mean, var = keep * mean + dt * pull * a * m, keep**2 * var + eta**2 * g**2 * dt
    a = sde.scale(0.05).item()

    def run(z, draw): return euler_maruyama(p, z, sde, times, eta=eta, clean=False, draw=draw)
    still = run(torch.zeros(1, 1, dtype=torch.float64), torch.zeros_like).item()
    answers = impulses(run, n if eta else 0) - still
    assert math.isclose(still, mean / a, rel_tol=1e-10) and math.isclose(answers.square().sum(), var / a**2, rel_tol=1e-9)

    cleaned = euler_maruyama(p, torch.zeros(1, 1), sde, times, eta=eta, draw=torch.zeros_like)
    close(cleaned, p(f64([still]), sde.sigma(0.05)), rtol=1e-10, atol=0)    # `clean` is one call of the denoiser


@pytest.mark.parametrize("eta", [0., 1., 2.])
@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()], ids=names)
def test_every_eta_has_the_same_marginals(sde, eta):
    "The variance of the chain tends to that of the data, at first order or better."
    p, end = Gaussian(f64(0.), 0.5), 0.05
    def error(n):
        times = torch.linspace(1, end, n + 1, dtype=torch.float64)
        run = lambda z, draw: euler_maruyama(p, z, sde, times, eta=eta, clean=False, draw=draw)
        return impulses(run, n if eta else 0).square().sum().item() / (0.25 + sde.sigma(end).item()**2) - 1
    coarse, fine = error(400), error(800)
    assert abs(fine) < 0.06 and abs(fine) < abs(coarse) / 1.8    # first order: 2, or more where the first term is small


@pytest.mark.parametrize("sde", ALL, ids=names)
def test_ode_in_other_coordinates_is_ours(sde):
    "With eta = 0 the exact solution is known: x - m shrinks like sqrt(s^2 + sigma^2), whatever the fading."
    p, z, end = Gaussian(f64(0.3), 0.5), seeded_noise(range(6), (1,), torch.float64), 0.1
    def off(n):
        x = euler_maruyama(p, z, sde, torch.linspace(1, end, n + 1), eta=0., clean=False, draw=None)
        top, low = sde.sigma(1.), sde.sigma(end)
        return (x - 0.3 - ((0.25 + low**2) / (0.25 + top**2)).sqrt() * (top * z - 0.3)).abs().max().item()
    assert off(2000) < 0.02 and abs(off(1000) / off(2000) - 2) < 0.1    # first order


@pytest.mark.parametrize("eta", [0., 1.])
def test_mixture_weights(eta):
    p = Mixture(f64([-2.], [1.], [2.]), stds=0.2, weights=f64(0.5, 0.2, 0.3))
    z = seeded_noise([0], (4000, 1), torch.float64)[0]
    x = euler_maruyama(p, z, VPSDE(), VPSDE().times(300), eta=eta, draw=draws(1))
    share = (x - p.means.T).abs().argmin(1).bincount(minlength=3) / 4000
    assert ((share - p.weights).abs() < 5 * (p.weights * (1 - p.weights) / 4000).sqrt() + 0.01).all()    # five standard errors, and the steps


def test_euler_maruyama_is_told_sigma_in_data_units_and_reports_the_same():
    p, seen, told = Gaussian(f64(0., 1.), 0.5), [], []
    def denoise(x, sigma, **cond): told.append((x.clone(), sigma, cond)); return p(x, sigma).float()
    sde, times, labels = VPSDE(), f64(0.9, 0.5, 0.2), torch.tensor([1, 2])
    x = euler_maruyama(denoise, torch.randn(2, 2), sde, times, draw=torch.zeros_like, callback=lambda **kw: seen.append(kw), labels=labels)
    assert x.dtype == torch.float64 and len(told) == 3 and len(seen) == 2 and all(c["labels"] is labels for *_, c in told)
    for (x_told, sigma, _), t, kw in zip(told, times, seen):
        assert math.isclose(sigma, sde.sigma(t), rel_tol=1e-12) and kw["sigma"] == sigma and (kw["x"] == x_told).all()
    assert [kw["i"] for kw in seen] == [0, 1] and seen[0]["D"].shape == (2, 2)


def test_your_own_process():
    "EDM's process, sigma = 80 t, by four functions."
    class Straight(SDE):
        t_min = 0.01
        def rate(self, t): return 0 * torch.as_tensor(t)
        def diffusion(self, t): return 80 * (2 * torch.as_tensor(t)).sqrt()
        def scale(self, t): return 1 + self.rate(t)
        def std(self, t): return 80 * torch.as_tensor(t)
    p, z = Gaussian(f64(0.3), 0.5), seeded_noise(range(4), (1,), torch.float64)
    x = euler_maruyama(p, z, Straight(), Straight().times(4000), eta=0., clean=False)
    close(x, 0.3 + ((0.25 + 0.64) / (0.25 + 6400))**0.5 * (80 * z - 0.3), rtol=0, atol=0.02)    # first order
    assert Straight().sigmas(3).tolist() == pytest.approx([80, 40.4, 0.8, 0])


# ---- one step back ----

levels = st.tuples(st.floats(0.01, 100), st.floats(0, 1)).map(lambda t: (t[0], t[0] * t[1]))    # sigma, sigma_next


@cases
@given(levels, st.floats(0.01, 10), st.floats(-3, 3), st.floats(-3, 3))
def test_ancestral_step_is_bayes_rule_for_gaussian_data(pair, s, m, y):
    "N(m, s^2 + sigma'^2) times N(y; y', v) as a product of Gaussians, by adding precisions."
    (high, low), p = pair, Gaussian(f64(m), s)
    prior, v = s**2 + low**2, high**2 - low**2
    if v == 0: return
    var = prior * v / (prior + v)
    mean = (m * v + y * prior) / (prior + v)
    x, z = f64([y]), f64([1.])
    step = partial(ancestral_step, p(x, high), x, high, low, data_std=s)
    # x + (1 - r) (D - x) against a weighted mean: rounding of numbers up to 3, and of 1 - r for close levels
    assert math.isclose(step(0 * z), mean, rel_tol=1e-9, abs_tol=1e-11)
    assert math.isclose(step(z) - step(0 * z), var**0.5, rel_tol=1e-6, abs_tol=1e-11)


@cases
@given(st.integers(0, 97), st.floats(1e-4, 0.2), st.floats(1e-4, 0.5))
def test_ancestral_step_is_ddpm_in_other_coordinates(row, first, last):
    betas = torch.linspace(first, last, 100, dtype=torch.float64)
    bar = alpha_bars(betas)
    before, after, beta = bar[row].item(), bar[row + 1].item(), betas[row + 1].item()
    if after < 1e-12: return
    low, high = (((1 - b) / b)**0.5 for b in (before, after))
    p, x_t, z = Mixture(f64([-1.], [1.]), 0.3), f64([0.4], [-2.]), f64([1.], [-0.5])
    D = p(x_t / after**0.5, high)
    score = (after**0.5 * D - x_t) / (1 - after)                                    # in DDPM's coordinates
    mean = (x_t + beta * score) / (1 - beta)**0.5
    for data_std, var in ((0., beta * (1 - before) / (1 - after)), (1., beta)):
        ours = before**0.5 * ancestral_step(D, x_t / after**0.5, high, low, z, data_std)
        close(ours, mean + var**0.5 * z, rtol=1e-7, atol=1e-8)    # 1 / alpha-bar up to 1e12 eats digits


def test_ancestral_step_by_itself():
    x, D, z = seeded_noise([0, 1, 2], (2, 3), torch.float64), torch.zeros(3, 2, 3).double(), torch.ones(3, 2, 3).double()
    close(ancestral_step(D, x, 0.5, 0., z), D, rtol=0, atol=1e-15)                  # no noise at the last step
    close(ancestral_step(D, x, 0.5, 0., z, math.inf), D + 0.5 * z, rtol=0, atol=1e-15)
    close(ancestral_step(D, x, 0.5, 0.5, z, 1.), x, rtol=0, atol=0)                 # nowhere to go
    close(ancestral_step(D, x, 2., 1., z, math.inf), x / 4 + 3**0.5 * z, rtol=1e-14, atol=1e-14)
    high, low = f64(2., 1., 0.5), f64(1., 0.3, 0.2)
    each = torch.cat([ancestral_step(D[i:i + 1], x[i:i + 1], high[i].item(), low[i].item(), z[:1], 0.7) for i in range(3)])
    close(ancestral_step(D, x, high, low, z, 0.7), each, rtol=1e-14, atol=1e-15)    # one level for each sample
    close(ancestral_step(D, x, 2., 1., z, 1e9), ancestral_step(D, x, 2., 1., z, math.inf), rtol=1e-12, atol=0)


# ---- the corrector ----

def test_corrector_sigma_rule_is_langevin():
    p, x = Mixture(f64([-1., 0.], [1., 0.5]), 0.3), seeded_noise(range(5), (2,), torch.float64)
    z = seeded_noise(range(5, 10), (2,), torch.float64)
    ours = corrector_step(p(x, 0.7), x, 0.7, z, 0.2)
    close(ours, langevin(lambda x: p.score(x, 0.7), x, 2 * (0.2 * 0.7)**2, 1, draw=lambda x: z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("snr", [0.1, 0.16, 0.5])
def test_corrector_excess_variance(snr):
    "Many steps around one image, by impulses: 1 / (1 - snr^2) of the right variance, at once and exactly."
    def run(z, draw):
        for _ in range(n): z = corrector_step(0 * z, z, 1., draw(z), snr)
        return z
    n = math.ceil(30 / (2 * snr**2))    # the start has faded to e^-30
    assert math.isclose(impulses(run, n).square().sum(), 1 / (1 - snr**2), rel_tol=1e-9)


@pytest.mark.parametrize("rule", ["sample", "batch"])
def test_corrector_norms(rule):
    "The ratio of pull to kick is snr, for each sample or for the means of the batch; written from the definition."
    p, x = Mixture(seeded_noise(range(3), (1, 4, 4), torch.float64), 0.2), 2 * seeded_noise(range(6), (1, 4, 4), torch.float64)
    z = seeded_noise(range(10, 16), (1, 4, 4), torch.float64)
    D = p(x, 0.6)
    pull = corrector_step(D, x, 0.6, z, 0.3, rule) - x
    kick = (pull - corrector_step(D, x, 0.6, -z, 0.3, rule) + x) / 2    # -z has z's norm
    pull = pull - kick
    norm = lambda v: v.flatten(1).norm(dim=1)
    step = norm(pull) / norm(score_of(D, x, 0.6))
    close(norm(kick), (2 * step).sqrt() * norm(z), rtol=1e-10, atol=0)    # one step size for pull and kick
    ratio = norm(pull) / norm(kick) if rule == "sample" else step.sqrt() * norm(score_of(D, x, 0.6)).mean() / norm(z).mean() / 2**0.5
    close(ratio, torch.full((6,), 0.3, dtype=torch.float64), rtol=1e-10, atol=0)
    flat = corrector_step(D.flatten(1), x.flatten(1), 0.6, z.flatten(1), 0.3, rule)
    close(flat.reshape(x.shape), x + pull + kick, rtol=1e-12, atol=1e-12)


@cases
@given(st.sampled_from(["sigma", "sample", "batch"]), st.floats(1e-3, 1e3))
def test_corrector_has_no_units(rule, c):
    x, D, z = (seeded_noise(range(k, k + 4), (3,), torch.float64) for k in (0, 10, 20))
    close(corrector_step(c * D, c * x, c * 0.4, z, 0.2, rule), c * corrector_step(D, x, 0.4, z, 0.2, rule), rtol=1e-10, atol=1e-12 * c)


# ---- predictor and corrector ----

@pytest.mark.parametrize("n", [10, 20])
def test_golden_trajectory(n):
    "The whole trajectory of diffusers' ScoreSdeVeScheduler with its recorded noise."
    g = {k.removeprefix(f"g2.n{n}."): v for k, v in GOLDEN.items() if k.startswith(f"g2.n{n}.")}
    p, sigmas = Mixture(G2["g2.means"], G2["g2.stds"], G2["g2.weights"]), VESDE().sigmas(n)
    close(sigmas[:-1], g["discrete_sigmas"].flip(0), rtol=1e-12, atol=0)
    told = dict(zip(sigmas.tolist(), g["sigmas"].tolist()))    # it steps on one list and tells the network another, 1e-4 apart
    seen, z = [], iter(g["noise"])
    def score(x, sigma): seen.append(x); return p.score(x, told[sigma])
    x = predictor_corrector(as_denoiser(score, "score"), G2["g2.latents"], sigmas, predictor=partial(ancestral_step, data_std=math.inf),
                            snr=0.15, rule="batch", draw=lambda x: next(z))
    # float64 throughout; steps may be summed in another order
    close(torch.stack(seen), g["traj"][:-1], rtol=0, atol=1e-9)
    close(x, g["final_mean"], rtol=0, atol=1e-9)
    last = sigmas[-2].item()
    D = as_denoiser(score, "score")(seen[-1], last)
    close(ancestral_step(D, seen[-1], last, 0., next(z), math.inf), g["traj"][-1], rtol=0, atol=1e-9)    # with noise at the last step
    assert next(z, None) is None


@pytest.mark.parametrize("how", [dict(), dict(rule="sample"), dict(corrector_steps=0), dict(corrector_steps=3), dict(predictor=None)], ids=str)
def test_seeds_not_the_batch(how):
    p, sigmas = Mixture(f64([-1.2, 0.], [1., 1.], [0.9, -1.]), 0.3), geometric_sigmas(6, 0.05, 5.)
    def some(seeds): return predictor_corrector(p, seeded_noise(seeds, (2,), torch.float64), sigmas, draw=NoiseStream(seeds), **how)
    together = some(range(7))
    close(together, torch.cat([some(range(3)), some(range(3, 7))]), rtol=1e-8, atol=1e-9)    # rounding, amplified along the way
    def euler(seeds): return euler_maruyama(p, seeded_noise(seeds, (2,), torch.float64), VPSDE(), VPSDE().times(20), draw=NoiseStream(seeds))
    close(euler(range(7))[2:3], euler([2]), rtol=1e-8, atol=1e-9)


def test_batch_rule_depends_on_the_batch():
    p, sigmas = Mixture(f64([-1.2, 0.], [1., 1.]), 0.3), geometric_sigmas(6, 0.05, 5.)
    def some(seeds): return predictor_corrector(p, seeded_noise(seeds, (2,), torch.float64), sigmas, draw=NoiseStream(seeds), rule="batch")
    assert (some(range(4))[:2] - some(range(2))).abs().max() > 1e-3


def test_corrector_alone_is_annealed_langevin():
    p, sigmas, z = Mixture(f64([-1.], [1.]), 0.3), geometric_sigmas(5, 0.1, 4.), seeded_noise(range(9), (1,), torch.float64)
    ours = predictor_corrector(p, z, sigmas, predictor=None, corrector_steps=4, snr=0.25, draw=draws(0))
    close(ours, annealed_langevin(p, z, sigmas, 4, step=2 * 0.25**2, draw=draws(0)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("corrector_steps", [0, 1, 3])
def test_gaussian_data_keep_their_variance(corrector_steps):
    "With the right data_std the predictor is exact; the corrector's own excess is as predicted from its recursion."
    s, snr, sigmas = 0.5, 0.2, geometric_sigmas(12, 0.01, 50.)
    p, var = Gaussian(f64(0.), s), sigmas[0].item()**2
    for high, low in zip(sigmas.tolist(), sigmas.tolist()[1:]):
        right, h = s**2 + high**2, 2 * (snr * high)**2
        for _ in range(corrector_steps): var = (1 - h / right)**2 * var + 2 * h
        v = high**2 - low**2
        var = (1 - v / right)**2 * var + (v * (s**2 + low**2) / right if low else 0.)
    def run(z, draw): return predictor_corrector(p, z, sigmas, predictor=partial(ancestral_step, data_std=s), corrector_steps=corrector_steps, snr=snr, draw=draw)
    assert math.isclose(impulses(run, 12 * corrector_steps + 11).square().sum(), var, rel_tol=1e-9)    # no draw at the last step
    if corrector_steps == 0:
        # the last step gives D, which lacks the variance of x0 given x; the start lacks s^2 / sigma_max^2
        assert math.isclose(var, s**4 / (s**2 + 0.01**2), rel_tol=2 * s**2 / 50**2)


def test_counts_and_callback():
    p, z, seen = Gaussian(f64(0., 1.), 0.5), torch.randn(3, 2), []
    counted = CountNFE(p)
    x = predictor_corrector(counted, z, [3., 1., 0.3, 0.], corrector_steps=2, callback=lambda **kw: seen.append(kw))
    assert counted.nfe == 9 and x.dtype == torch.float64 and [kw["i"] for kw in seen] == [0, 1, 2] and [kw["sigma"] for kw in seen] == [3., 1., 0.3]
    close(x, p(seen[-1]["x"], 0.3), rtol=0, atol=0)                       # the step to 0 gives the estimate
    close(seen[-1]["D"], x, rtol=0, atol=0)
    x = predictor_corrector(p, z, [3., 1.], corrector_steps=0, predictor=lambda D, x, s, s_next, n: x - n + s_next, draw=torch.ones_like)
    close(x, 3 * z.double(), rtol=0, atol=0)                              # a predictor of one's own, and no last estimate
    close(predictor_corrector(p, z, [3., 0.], corrector_steps=0), p(3 * z.double(), 3.), rtol=0, atol=0)
    assert predictor_corrector(p, z, [3., 0.], dtype=torch.float32).dtype == torch.float32


def test_conditioning_and_low_precision():
    def denoise(x, sigma, labels): return (expand(labels, x) + 0 * x).half()
    labels = torch.tensor([1., -2.])
    x = predictor_corrector(denoise, torch.randn(2, 3), VESDE().sigmas(5), labels=labels)
    assert x.dtype == torch.float64 and (x == labels[:, None]).all()
    x = euler_maruyama(denoise, torch.randn(2, 3), VESDE(), VESDE().times(5), labels=labels)
    assert (x == labels[:, None]).all()


# ---- faults ----

p, z = Gaussian(f64(0.), 1.), torch.zeros(4, 1, dtype=torch.float64)
pc = partial(predictor_corrector, p, z)
em = partial(euler_maruyama, p, z, VPSDE())


@pytest.mark.parametrize("call,words", [
    (lambda: VPSDE().std(1.01), "t must be from 0 (data) to 1 (noise), got [1.0"),
    (lambda: VESDE().rate(f64(0.5, -0.1)), "t must be from 0 (data) to 1 (noise), got [-0.1]"),
    (lambda: SubVPSDE().scale(math.nan), "t must be from 0"),
    (lambda: VPSDE(beta_d=0.), "beta_d and beta_min must be positive and finite, got 0.0 and 0.1"),
    (lambda: SubVPSDE(beta_min=-1), "beta_d and beta_min must be positive"),
    (lambda: VESDE(2., 1.), "need 0 < sigma_min < sigma_max < infinity, got 2.0 and 1.0"),
    (lambda: VESDE().time(0.), "sigma must be positive"),
    (lambda: SubVPSDE().time(-1.), "sigma must be 0 or more"),
    (lambda: VPSDE().time(-1.), "value must be from 0"),
    (lambda: VPSDE().times(0), "n must be a whole number and at least 1, got 0"),
    (lambda: VPSDE().sigmas(2.5), "n must be a whole number and at least 1, got 2.5"),
    (lambda: em([0.5]), "times must hold at least 2 values in one axis, got shape (1,)"),
    (lambda: em([0.5, 0.7]), "times must be finite, decrease and stay at 0 or above; got 0.7 at index 1 after 0.5"),
    (lambda: em([0.5, 0.]), "times must end where sigma is above 0, got 0"),
    (lambda: em([1.5, 0.5]), "t must be from 0 (data) to 1 (noise), got [1.5]"),
    (lambda: em([1., 0.5], eta=-0.1), "eta must be 0 or more and finite, got -0.1"),
    (lambda: em([1., 0.5], eta=math.nan), "eta must be 0 or more"),
    (lambda: em([1., 0.5], draw=lambda x: x[:1]), "draw's noise must have shape (4, 1), got shape (1, 1)"),
    (lambda: euler_maruyama(lambda x, s: x[0], z, VPSDE(), [1., 0.5]), "denoise's answer must have shape (4, 1), got shape (1,)"),
    (lambda: euler_maruyama(p, z.long(), VPSDE(), [1., 0.5]), "noise must be a finite floating-point tensor (B, *), got torch.int64"),
    (lambda: predictor_corrector(p, z * math.inf, [1., 0.]), "noise must be a finite floating-point tensor"),
    (lambda: predictor_corrector(p, [1.], [1., 0.]), "noise must be a finite floating-point tensor (B, *), got list"),
    (lambda: pc([1., 1., 0.]), "sigmas must be finite, decrease and stay at 0 or above; got 1 at index 1 after 1"),
    (lambda: pc([math.inf, 0.]), "sigmas must be finite"),
    (lambda: pc([1., -1.]), "sigmas must be finite, decrease and stay at 0 or above; got -1 at index 1 after 1"),
    (lambda: pc([1., 0.], corrector_steps=-1), "corrector_steps must be a whole number and at least 0, got -1"),
    (lambda: pc([1., 0.], snr=0.), "snr must be above 0 and below 1"),
    (lambda: pc([1., 0.], snr=1.), "snr must be above 0 and below 1, where the variance diverges, got 1.0"),
    (lambda: pc([1., 0.], rule="mean"), "rule must be one of ('sigma', 'sample', 'batch'), got 'mean'"),
    (lambda: pc([1., 0.], predictor=None, corrector_steps=0), "corrector_steps must be at least 1 without a predictor, got 0"),
    (lambda: pc([1., 0.5], predictor=lambda *a: z[0]), "predictor's sample must have shape (4, 1), got shape (1,)"),
    (lambda: predictor_corrector(lambda x, s: x[0], z, [1., 0.]), "denoise's answer must have shape (4, 1), got shape (1,)"),
    (lambda: ancestral_step(z, z, 1., 2., z), "sigma_next must not be above sigma"),
    (lambda: ancestral_step(z, z, 0., 0., z), "sigma must be positive"),
    (lambda: ancestral_step(z, z, 1., -0.5, z), "sigma must be 0 or more"),
    (lambda: ancestral_step(z[0], z, 1., 0.5, z), "D must have shape (4, 1), got shape (1,)"),
    (lambda: ancestral_step(z, z, 1., 0.5, z[0]), "noise must have shape (4, 1), got shape (1,)"),
    (lambda: ancestral_step(z, z, 1., 0.5, z, -1.), "data_std must be 0 or more, got -1.0"),
    (lambda: ancestral_step(z, z, 1., 0.5, z, math.nan), "data_std must be 0 or more"),
    (lambda: corrector_step(z, z, 0., z), "sigma must be positive"),
    (lambda: corrector_step(z, z, 1., z[0]), "noise must have shape (4, 1), got shape (1,)"),
])
def test_faults(call, words):
    with pytest.raises(ValueError) as error: call()
    assert words in str(error.value)
