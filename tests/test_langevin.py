"langevin: chains against closed forms and recorded noise, ladders against their equations, annealing against the truth."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import PREDICTIONS, CountNFE, NoiseStream, convert, seeded_noise
from ddpm_edm.langevin import (annealed_langevin, geometric_sigmas, ladder_ratio, langevin, langevin_step, largest_distance,
                               level_variance, metropolis_langevin)
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.oracle import Empirical, Gaussian, Mixture

cases = settings(max_examples=60, deadline=None, derandomize=True)
close = torch.testing.assert_close


def f64(*values): return torch.tensor(values, dtype=torch.float64)


def unit(seed, n, *event): return seeded_noise([seed], (n, *event), torch.float64)[0]


def draws(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=g)


def recorded(*tensors):
    "Hands out the tensors one after another, and refuses to be asked for another shape."
    left = list(tensors)
    def draw(x):
        assert x.shape == left[0].shape
        return left.pop(0)
    draw.left = left
    return draw


def Phi(x): return 0.5 * math.erfc(-x / 2**0.5)


two = Mixture(f64([-2., -2.], [2., 2.]), 0.5, [0.2, 0.8])
uneven = Mixture(f64([-1., 0.], [1., 0.5]), f64(0.5, 0.3), [0.3, 0.7])


# --- Langevin dynamics

def test_two_steps_by_hand():
    x, a, b = f64([1., 2.], [3., -4.]), unit(1, 2, 2), unit(2, 2, 2)
    draw = recorded(a, b)
    got = langevin(lambda x: -3 * x, x, 0.1, 2, draw=draw)
    want = 0.7 * (0.7 * x + 0.2**0.5 * a) + 0.2**0.5 * b    # 1 - 3 h = 0.7, sqrt(2 h) = sqrt(0.2)
    close(got, want, rtol=1e-14, atol=1e-14)                # rounding
    assert not draw.left and x[0, 0] == 1                   # one draw a step; the start is left alone


@pytest.mark.parametrize("h", [0.05, 0.5, 1.5])
def test_variance_of_a_gaussian_chain(h):
    p = Gaussian(f64(0.), 1.)
    x = langevin(lambda x: p.score(x, 0.), unit(0, 20_000, 1), h, 100, draw=draws(1))
    v = 1 + (1 - h)**200 * (1 - 1 / (1 - h / 2)) + (1 / (1 - h / 2) - 1)    # recursion from variance 1 to its fixed point
    assert abs(x.var() / v - 1) < 5 * (2 / 20_000)**0.5                     # five standard errors of a variance


@pytest.mark.parametrize("h, explodes", [(1.9, False), (2.1, True)])
def test_stable_below_twice_the_variance(h, explodes):
    x = langevin(lambda x: -x, unit(0, 100, 1), h, 500, draw=draws(1))
    assert (x.var() > 1e6).item() == explodes


def test_small_steps_sample_the_density():
    x = langevin(lambda x: uneven.score(x, 0.), uneven.sample(20_000, torch.Generator().manual_seed(0)), 0.002, 400, draw=draws(1))
    mean, second = uneven.weights @ uneven.means, uneven.weights @ (uneven.means**2 + uneven.stds[:, None]**2)
    bias = 0.002 / (2 * 0.3**2) * 0.3**2    # h / 2 s^2 of the narrower component's variance
    assert ((x.mean(0) - mean).abs() < 5 * x.std(0) / 20_000**0.5 + bias).all()
    assert ((x.square().mean(0) - second).abs() < 5 * x.square().std(0) / 20_000**0.5 + 2 * bias).all()


@pytest.mark.parametrize("event", [(), (1,), (2, 3), (1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_event_shape_and_dtype(event, dtype):
    x = torch.ones(3, *event, dtype=dtype)
    torch.manual_seed(0)
    y = langevin(lambda x: -x.double(), x, 0.1, 3)
    z, rate = metropolis_langevin(lambda x: -x.double().square().reshape(3, -1).sum(1) / 2, x, 0.1, 3)
    a = annealed_langevin(lambda x, sigma: x / 2, x, geometric_sigmas(3, 0.1, 1.), 2, dtype=dtype)
    for t in (y, z, a): assert t.shape == x.shape and t.dtype == dtype and t.isfinite().all()
    assert rate.shape == (3,) and ((rate >= 0) & (rate <= 1)).all()


def test_a_sample_depends_on_its_seed_alone():
    seeds, start = [3, 1, 4, 15, 9], seeded_noise([3, 1, 4, 15, 9], (2,), torch.float64)
    runs = {"langevin": lambda s, x: langevin(lambda x: two.score(x, 0.), x, 0.02, 20, draw=NoiseStream(s)),
            "metropolis": lambda s, x: metropolis_langevin(two.log_prob, x, 0.3, 20, draw=NoiseStream(s))[0],
            "annealed": lambda s, x: annealed_langevin(two, x, geometric_sigmas(6, 0.1, 9.), 3, draw=NoiseStream(s))}
    for run in runs.values():
        whole = run(seeds, start)
        # matrix products may round differently in another batch size; a chain without chaos keeps that small
        close(torch.cat([run(seeds[:2], start[:2]), run(seeds[2:], start[2:])]), whole, rtol=1e-9, atol=1e-9)
        close(run(seeds[::-1], start.flip(0)), whole.flip(0), rtol=1e-9, atol=1e-9)
        assert (run([5], start[:1]) - whole[:1]).abs().max() > 1e-3


def test_callback_sees_the_state_before_each_step():
    seen, start = [], unit(0, 4, 2)
    def note(**now): seen.append(now)
    end = langevin(lambda x: -x, start, 0.1, 3, draw=draws(0), callback=note)
    assert [sorted(s) for s in seen] == [["i", "x"]] * 3 and [s["i"] for s in seen] == [0, 1, 2]
    assert torch.equal(seen[0]["x"], start)
    again = langevin(lambda x: -x, start, 0.1, 2, draw=draws(0))
    assert torch.equal(seen[2]["x"], again) and not torch.equal(end, again)
    seen.clear()
    metropolis_langevin(lambda x: -x.square().sum(1), start, 0.1, 3, draw=draws(0), callback=note)
    assert [s["i"] for s in seen] == [0, 1, 2] and torch.equal(seen[0]["x"], start)


# --- Metropolis

def test_one_proposal_by_hand():
    h, x = 0.4, f64([0.3], [-1.2], [2.])
    z = f64([0.5], [-2.5], [1.5])
    def log_p(x): return -x[:, 0]**4 / 4        # score -x^3
    y = x - h * x**3 + (2 * h)**0.5 * z
    def log_g(to, x): return -((to - x + h * x**3)**2)[:, 0] / (4 * h)
    a = (log_p(y) - log_p(x) + log_g(x, y) - log_g(y, x)).exp().clamp(max=1)
    assert (a < 0.9).any()                      # something to decide
    for shift in (-0.01, 0.01):                 # a uniform number just below, then just above the probability
        u = (a + shift).clamp(1e-6, 1 - 1e-6)
        got, rate = metropolis_langevin(log_p, x, h, 1, draw=recorded(z, torch.special.ndtri(u)))
        yes = u < a
        close(got, torch.where(yes[:, None], y, x), rtol=1e-14, atol=1e-14)
        close(rate, yes.double(), rtol=0, atol=0)
        assert yes.any() if shift < 0 else not yes.all()


def test_detailed_balance():
    "Flow between two halves of the line is the same in both directions, at a step where the plain chain's is far off."
    p, h = Mixture(f64([-0.7], [0.9]), f64(0.4, 0.7), [0.3, 0.7]), 0.25
    y = torch.linspace(-6, 6, 1201, dtype=torch.float64)[:, None]
    log_p, s = p.log_prob(y), p.score(y, 0.)
    log_g = -(y[None, :, 0] - y - h * s)**2 / (4 * h) - 0.5 * math.log(4 * math.pi * h)    # row x, column y
    # probability of acceptance from the implementation itself: the share of accepted proposals on a grid of uniform numbers
    x0, y0 = f64([-0.2]), f64([0.6])
    i, j = int((x0.item() + 6) / 0.01 + 0.5), int((y0.item() + 6) / 0.01 + 0.5)
    def accepted(start, end, k):
        z = (end - start - h * s[k]) / (2 * h)**0.5
        u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        return metropolis_langevin(p.log_prob, start.expand(4000, 1), h, 1, draw=recorded(z.expand(4000, 1), torch.special.ndtri(u)))[1].mean()
    there = log_p[i].exp() * log_g[i, j].exp() * accepted(y[i], y[j], i)
    back = log_p[j].exp() * log_g[j, i].exp() * accepted(y[j], y[i], j)
    assert abs(there / back - 1) < 2 / 4000 / min(accepted(y[i], y[j], i), accepted(y[j], y[i], j))    # the grid's resolution
    assert abs(log_p[i] + log_g[i, j] - log_p[j] - log_g[j, i]) > 0.1                                    # not balanced by itself


@pytest.mark.parametrize("h", [0.05, 0.6])
def test_metropolis_keeps_a_mixture_at_any_step(h):
    x = uneven.sample(20_000, torch.Generator().manual_seed(0))
    x, rate = metropolis_langevin(uneven.log_prob, x, h, 40, draw=draws(1))
    moments = {"mean": (x, uneven.weights @ uneven.means),
               "square": (x**2, uneven.weights @ (uneven.means**2 + uneven.stds[:, None]**2)),
               "sign": ((x[:, :1] > 0).double(), uneven.weights @ torch.special.ndtr(uneven.means[:, :1] / uneven.stds[:, None]))}
    for value, want in moments.values(): assert ((value.mean(0) - want).abs() < 5 * value.std(0) / 20_000**0.5).all()    # five standard errors
    assert 0.02 < rate.mean() < 0.95
    plain = langevin(lambda x: uneven.score(x, 0.), uneven.sample(20_000, torch.Generator().manual_seed(0)), 0.15, 40, draw=draws(1))
    assert (plain.square().mean(0) - moments["square"][1]).abs().max() > 5 * plain.square().std() / 20_000**0.5    # the test can tell


def test_what_is_impossible_is_refused():
    def log_p(x): return torch.where(x[:, 0] > 0, -x[:, 0], -math.inf)    # zero density left of 0
    x, _ = metropolis_langevin(log_p, f64([0.5], [1.]).expand(2, 1).repeat(100, 1), 0.5, 100, draw=draws(0))
    assert (x > 0).all()
    def broken(x): return torch.where(x[:, 0].abs() < 1, -x[:, 0]**2, math.nan)
    x, _ = metropolis_langevin(broken, unit(0, 200, 1) / 5, 0.5, 50, draw=draws(0))
    assert (x.abs() < 1).all()


def test_gradients_are_left_alone():
    x = torch.ones(3, 2, requires_grad=True)
    for y in (langevin(lambda x: -x, x, 0.1, 2), metropolis_langevin(lambda x: -x.square().sum(1), x, 0.1, 2)[0],
              annealed_langevin(lambda x, sigma: x / 2, x, f64(1., 0.), 2, step=0.1)):
        assert not y.requires_grad
    assert x.grad is None


# --- ladders

@cases
@given(st.integers(1, 300), st.floats(1e-4, 1.), st.floats(1.01, 1e5))
def test_geometric_sigmas(n, low, span):
    s = geometric_sigmas(n, low, low * span)
    assert s.shape == (n + 1,) and s.dtype == torch.float64 and s[-1] == 0
    assert abs(s[0] / (low * span) - 1) < 1e-12
    assert (s.diff() < 0).all()
    if n > 1:
        assert abs(s[-2] / low - 1) < 1e-12
        assert ((s[:-2] / s[1:-1]).log() - math.log(span) / (n - 1)).abs().max() < 1e-12    # rounding of exp and log


@cases
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 1000))
def test_largest_distance(n, d, seed):
    x = unit(seed, n + 1, d)
    want = max((x[i] - x[j]).norm().item() for i in range(n + 1) for j in range(i))
    assert abs(largest_distance(x) - want) < 1e-6 * (1 + want)    # cdist may use matrix products


def test_largest_distance_over_blocks():
    x = torch.zeros(9000, 2)               # 5 blocks of 1864 rows or fewer
    x[7], x[8999] = f64(3., 0.), f64(0., 4.)
    assert abs(largest_distance(x) - 5) < 1e-5
    assert abs(largest_distance(x.reshape(-1, 1, 1, 2)) - 5) < 1e-5
    x[4000], x[4001] = f64(-10., 0.), f64(0., -10.)    # both in one block in the middle
    assert abs(largest_distance(x) - 200**0.5) < 1e-4


@cases
@given(st.integers(5, 100_000), st.floats(0.05, 0.95))
def test_ladder_ratio_solves_its_equation(dim, overlap):
    g, w = ladder_ratio(dim, overlap), (2 * dim)**0.5
    assert g > 1
    # the first term is taken as 1; by 0.95 it is 1 - 1.8e-5 at worst (z = 4.1), and rounding is far below
    assert abs(Phi(w * (g - 1) + 3 * g) - Phi(w * (g - 1) - 3 * g) - overlap) < 2.5e-5


def test_ladder_ratio_golden():
    assert abs(ladder_ratio(3072) - 78.38367176906169 / 75.38367176906169) < 1e-12    # sqrt(2 * 3072), minus 3
    norm = unit(0, 4000, 3072).norm(dim=1)
    assert abs((norm > ladder_ratio(3072) * (3072**0.5 - 3 / 2**0.5)).double().mean() - 0.5) < 5 * 0.5 / 4000**0.5 + 0.01


@cases
@given(st.floats(1e-3, 1.), st.integers(1, 200), st.floats(1.001, 20.))
def test_level_variance_is_the_recursion(step, steps, ratio):
    v = ratio**2
    for _ in range(steps): v = (1 - step)**2 * v + 2 * step
    assert abs(level_variance(step, steps, ratio) - v) < 1e-10 * max(1, v)    # rounding of at most 200 steps
    assert v >= 1


def test_level_variance_is_what_annealing_leaves():
    T, step = 4, 0.2
    x = annealed_langevin(lambda x, sigma: 0 * x, unit(0, 50_000, 1), f64(3., 2.), T, step=step, draw=draws(1))
    first = level_variance(step, T, 1.)                       # on the first level it starts with that level's variance
    want = 4 * level_variance(step, T, 1.5 * first**0.5)
    assert abs(x.var() / want - 1) < 5 * (2 / 50_000)**0.5    # five standard errors of a variance


@cases
@given(st.integers(1, 1000), st.floats(1.001, 50.))
def test_langevin_step_is_the_best(steps, ratio):
    e = langevin_step(steps, ratio)
    grid = torch.linspace(1e-6, 1, 2001, dtype=torch.float64)
    assert 0 < e < 1
    assert level_variance(e, steps, ratio) <= level_variance(grid, steps, ratio).min() + 1e-9


def test_langevin_step_golden():
    for ratio in (1.1, 2., 7.): assert abs(langevin_step(1, ratio) - (1 - ratio**-2)) < 1e-6    # T = 1 has a closed form; flat to 1e-8
    # published settings (Song and Ermon 2020, their code): step size at the last level, rounded to two digits
    for top, n, T, published in ((50, 232, 5, 6.2e-6), (90, 500, 5, 3.3e-6)):
        assert abs(langevin_step(T, (top / 0.01)**(1 / (n - 1))) * 0.01**2 - published) < 0.05e-6


# --- annealed Langevin

def test_annealing_by_hand():
    def D(x, sigma): return x / (1 + sigma**2)
    n, z = unit(0, 3, 2), [unit(i, 3, 2) for i in range(1, 5)]
    draw = recorded(*z)
    got = annealed_langevin(D, n, f64(2., 1., 0.), 2, step=0.3, draw=draw)
    x = 2 * n
    for sigma, noise in zip((2., 2., 1., 1.), z): x = x + 0.3 * (x / (1 + sigma**2) - x) + 0.6**0.5 * sigma * noise
    close(got, x / 2, rtol=1e-13, atol=1e-13)              # and at last D at sigma = 1
    assert not draw.left                                   # nothing is drawn for the last denoising
    draw = recorded(*z)
    close(annealed_langevin(D, n, f64(2., 1.), 2, step=0.3, draw=draw), x, rtol=1e-13, atol=1e-13)    # no zero: it stops noisy


def test_is_langevin_dynamics_on_one_level():
    n = unit(0, 50, 2)
    a = annealed_langevin(two, n, f64(1.5), 7, step=0.1, draw=draws(1))
    b = langevin(lambda x: two.score(x, 1.5), 1.5 * n, 0.1 * 1.5**2, 7, draw=draws(1))
    close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("word", PREDICTIONS)
def test_every_prediction_gives_the_same_samples(word):
    n, sigmas = unit(0, 20, 2), geometric_sigmas(8, 0.1, 9.)
    def model(x, sigma): return convert(two(x, sigma), x, sigma, "D", word, sigma_data=0.7)
    want = annealed_langevin(two, n, sigmas, 4, draw=draws(1))
    close(annealed_langevin(model, n, sigmas, 4, predicts=word, sigma_data=0.7, draw=draws(1)), want, rtol=1e-8, atol=1e-8)
    assert want.dtype == torch.float64


def test_default_step_is_technique_4():
    n, sigmas = unit(0, 10, 2), geometric_sigmas(8, 0.1, 9.)
    want = annealed_langevin(two, n, sigmas, 4, step=langevin_step(4, 90**(1 / 7)), draw=draws(1))
    close(annealed_langevin(two, n, sigmas, 4, draw=draws(1)), want, rtol=1e-12, atol=1e-12)
    x = annealed_langevin(two, n, karras_sigmas(20, 0.05, 9.), 4, draw=draws(1))    # any decreasing schedule will do
    assert x.isfinite().all() and (two.log_prob(x, 0.) > -8).all()


def test_callback_and_number_of_evaluations():
    seen, counted, sigmas = [], CountNFE(two), geometric_sigmas(3, 0.5, 4.)
    end = annealed_langevin(counted, unit(0, 5, 2), sigmas, 2, draw=draws(1), callback=lambda **now: seen.append(now))
    assert counted.nfe == len(seen) == 7 and [s["i"] for s in seen] == list(range(7))
    assert [s["sigma"] for s in seen] == sigmas[:-1].repeat_interleave(2).tolist() + [sigmas[2].item()]
    assert all(sorted(s) == ["D", "i", "sigma", "x"] for s in seen)
    for s in seen: assert torch.equal(s["D"], two(s["x"], s["sigma"]))
    assert torch.equal(seen[0]["x"], 4 * unit(0, 5, 2)) and torch.equal(end, seen[-1]["D"])


def test_conditioning_reaches_the_model():
    got = []
    def denoise(x, sigma, labels=None, augment=None):
        got.append((labels, augment))
        return 0 * x
    annealed_langevin(denoise, unit(0, 2, 1), f64(1., 0.), 3, step=0.1, labels="l", augment="a")
    assert got == [("l", "a")] * 4


def test_state_is_float64_around_a_float32_network():
    n, sigmas = unit(0, 20, 2), geometric_sigmas(8, 0.1, 9.)
    def network(x, sigma):
        assert x.dtype == torch.float64
        return two(x.float(), sigma)
    x = annealed_langevin(network, n.float(), sigmas, 3, draw=draws(1))
    assert x.dtype == torch.float64
    close(x, annealed_langevin(two, n.float(), sigmas, 3, draw=draws(1)), rtol=0, atol=1e-4)    # float32 answers at |x| up to 30
    assert annealed_langevin(two, n, sigmas, 3, dtype=torch.float32).dtype == torch.float32


def test_weights_of_separated_modes():
    "Plain Langevin leaves the weights of its start; the annealed one is within two points, as the issue asks."
    n = unit(5, 8000, 2)
    def share(x): return (x.sum(1) > 0).double().mean().item()
    plain = langevin(lambda x: two.score(x, 0.), 3 * n, 0.025, 300, draw=draws(1))
    assert abs(share(plain) - share(3 * n)) < 0.05 and 0.8 - share(plain) > 0.2
    x = annealed_langevin(two, n, geometric_sigmas(30, 0.1, 9.), 40, step=0.2, draw=draws(2))
    # standard error sqrt(0.8 * 0.2 / 8000) = 0.45 points; the ladder's own lag is about 0.7 points
    assert abs(share(x) - 0.8) < 0.02
    heavy = x[x.sum(1) > 0]
    assert (heavy.mean(0) - 2).abs().max() < 0.03 and abs(heavy.std(0) - 0.5).max() < 0.02    # five standard errors: 0.03


def test_exact_score_of_a_data_set_returns_its_points():
    data = unit(3, 20, 1, 3, 3)
    x = annealed_langevin(Empirical(data), unit(4, 30, 1, 3, 3), geometric_sigmas(15, 0.02, largest_distance(data)), 5, draw=draws(0))
    gap = torch.cdist(x.flatten(1), data.flatten(1)).min(1).values
    assert gap.max() < 1e-6    # noise of 0.02 against distances above 1: the softmax is saturated


# --- refused

def chain(**change): return dict(dict(x=unit(0, 4, 2), step=0.1, steps=3), **change)


@pytest.mark.parametrize("change, message", [
    (dict(step=0.), "step must be positive and finite, got 0.0"), (dict(step=-1.), "step must be positive"),
    (dict(step=math.nan), "step must be positive and finite, got nan"), (dict(step=math.inf), "step must be positive and finite, got inf"),
    (dict(steps=0), "steps must be a whole number and at least 1, got 0"), (dict(steps=2.5), "steps must be a whole number"),
    (dict(x=torch.zeros(3, 2, dtype=torch.int64)), "x must be a finite floating-point tensor .* got torch.int64"),
    (dict(x=torch.full((3, 2), math.nan)), r"x must be a finite .* 6 values not finite"),
    (dict(x=[0., 1.]), "x must be a finite floating-point tensor .* got list"), (dict(x=torch.tensor(1.)), "x must be"),
    (dict(draw=lambda x: torch.randn(1, 2)), r"draw's noise must have shape \(4, 2\), got shape \(1, 2\)"),
])
def test_refused_chains(change, message):
    with pytest.raises(ValueError, match=message): langevin(lambda x: -x, **chain(**change))
    with pytest.raises(ValueError, match=message): metropolis_langevin(lambda x: -x.square().sum(1), **chain(**change))


def test_refused_answers():
    with pytest.raises(ValueError, match=r"score's answer must have shape \(4, 2\), got shape \(4,\)"): langevin(lambda x: x[:, 0], **chain())
    with pytest.raises(ValueError, match="score's answer must have .* got NoneType"): langevin(lambda x: None, **chain())
    with pytest.raises(ValueError, match=r"log_prob's answer must have shape \(4,\), got shape \(4, 2\)"): metropolis_langevin(lambda x: -x, **chain())
    with pytest.raises(ValueError, match=r"denoise_or_score's answer must have shape \(4, 2\), got shape \(2,\)"):
        annealed_langevin(lambda x, sigma: x[0], unit(0, 4, 2), f64(1., 0.), 1, step=0.1)
    with pytest.raises(ValueError, match="draw's noise must have"):
        annealed_langevin(two, unit(0, 4, 2), f64(1., 0.), 1, step=0.1, draw=lambda x: x[:1])


@pytest.mark.parametrize("change, message", [
    (dict(sigmas=f64(1., 2., 0.)), "sigmas must be finite, decrease and stay at 0 or above; got 2 at index 1 after 1"),
    (dict(sigmas=f64(1., 1.)), "got 1 at index 1 after 1"), (dict(sigmas=f64(1., -1.)), "sigmas must be finite, decrease"),
    (dict(sigmas=f64(math.inf, 1.)), "got inf at index 0"), (dict(sigmas=f64(math.nan, 1.)), "sigmas must be finite"),
    (dict(sigmas=f64(1., 0., 0.)), "got 0 at index 2 after 0"), (dict(sigmas=f64(0.)), "sigmas must hold at least one level above 0"),
    (dict(sigmas=torch.zeros(0)), "sigmas must hold at least 1 values"), (dict(sigmas=torch.ones(2, 2)), r"sigmas must hold .*, got shape \(2, 2\)"),
    (dict(steps_per_level=0), "steps_per_level must be a whole number and at least 1, got 0"), (dict(steps_per_level=1.5), "steps_per_level"),
    (dict(predicts="x0"), "predicts must be one of .* got 'x0'"), (dict(step=0.), "step must be between 0 and 2"),
    (dict(step=2.), "step must be between 0 and 2"), (dict(step=math.nan), "step must be between 0 and 2"),
    (dict(sigmas=f64(1., 0.)), "step must be given for a ladder of one level"),
    (dict(noise=torch.full((4, 2), math.inf)), "noise must be a finite floating-point tensor .*, 8 values"),
    (dict(noise=torch.zeros(4, 2, dtype=torch.int64)), "noise must be a finite floating-point"),
    (dict(predicts="F", sigma_data=-1.), "sigma_data must be positive"),
])
def test_refused_annealing(change, message):
    good = dict(noise=unit(0, 4, 2), sigmas=geometric_sigmas(4, 0.1, 2.), steps_per_level=2)
    with pytest.raises(ValueError, match=message): annealed_langevin(two, **(good | change))


@pytest.mark.parametrize("make, message", [
    (lambda: geometric_sigmas(0, 0.1, 1.), "n must be a whole number and at least 1, got 0"),
    (lambda: geometric_sigmas(2.5, 0.1, 1.), "n must be a whole number"),
    (lambda: geometric_sigmas(3, 1., 0.1), "need 0 < sigma_min < sigma_max < infinity, got 1.0 and 0.1"),
    (lambda: geometric_sigmas(3, 0., 1.), "need 0 < sigma_min"), (lambda: geometric_sigmas(3, 0.1, math.inf), "need 0 < sigma_min"),
    (lambda: ladder_ratio(4), "dim must be at least 5"), (lambda: ladder_ratio(64.), "dim must be a whole number"),
    (lambda: ladder_ratio(64, 1.), "overlap must be between 0 and 0.99, got 1.0"), (lambda: ladder_ratio(64, 0.), "overlap must be"),
    (lambda: langevin_step(0, 1.3), "steps must be a whole number and at least 1"),
    (lambda: langevin_step(5, 1.), "ratio must be larger than 1 and finite, got 1.0"), (lambda: langevin_step(5, math.nan), "ratio must be"),
    (lambda: largest_distance(torch.ones(1, 3)), r"data must be finite floating-point points \(N, \*\), at least two, got torch.float32 of shape \(1, 3\)"),
    (lambda: largest_distance(torch.ones(3, 3, dtype=torch.uint8)), "data must be finite floating-point"),
    (lambda: largest_distance(torch.full((3, 3), math.nan)), "data must be finite"), (lambda: largest_distance([[0., 1.]]), "got list"),
])
def test_refused_ladders(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_on_a_gpu():
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    n, sigmas, seeds = seeded_noise(range(6), (2,), torch.float64), geometric_sigmas(8, 0.1, 9.), range(6)
    want = annealed_langevin(two, n, sigmas, 3, draw=NoiseStream(seeds))
    close(annealed_langevin(two, n.cuda(), sigmas, 3, draw=NoiseStream(seeds)).cpu(), want, rtol=1e-7, atol=1e-7)
    x, _ = metropolis_langevin(two.log_prob, n.cuda(), 0.1, 10, draw=NoiseStream(seeds))
    close(x.cpu(), metropolis_langevin(two.log_prob, n, 0.1, 10, draw=NoiseStream(seeds))[0], rtol=1e-7, atol=1e-7)
