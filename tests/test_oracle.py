"oracle: exact denoisers against golden numbers, autograd, each other and chance."
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacrev, jvp, vmap

from ddpm_edm import oracle
from ddpm_edm.core import expand, score_of, seeded_noise
from ddpm_edm.oracle import TOYS, Empirical, Gaussian, Mixture, toy_data

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "mixtures.npz").items() if v.dtype == np.float64}
cases = settings(max_examples=60, deadline=None, derandomize=True)
close = torch.testing.assert_close


def golden(space):
    return Mixture(GOLDEN[f"{space}.means"], GOLDEN[f"{space}.stds"], GOLDEN[f"{space}.weights"])


@pytest.mark.parametrize("space", ["g2", "img"])
def test_golden_table(space):
    "D, score and log-density of an independent implementation, at noise levels from 0.002 to 80."
    p, x, sigma = golden(space), GOLDEN[f"{space}.x"], GOLDEN[f"{space}.sigma"]
    # both in float64; 1e-10 leaves room for another order of summation in up to 192 dimensions
    close(p(x, sigma), GOLDEN[f"{space}.D"], rtol=1e-10, atol=1e-10)
    close(p.score(x, sigma), GOLDEN[f"{space}.score"], rtol=1e-10, atol=1e-10)
    close(p.log_prob(x, sigma), GOLDEN[f"{space}.logp"], rtol=1e-10, atol=1e-10)
    for i in (0, len(x) - 1):    # a float for one sample is the same as a tensor for all
        close(p(x[i:i + 1], sigma[i].item()), GOLDEN[f"{space}.D"][i:i + 1], rtol=1e-10, atol=1e-10)


def test_golden_table_spans_the_noise_levels():
    for space in ("g2", "img"): assert GOLDEN[f"{space}.sigma"].min() < 0.0021 and GOLDEN[f"{space}.sigma"].max() > 79


@st.composite
def mixtures(draw):
    "A mixture, a noisy batch that suits it, and its noise levels."
    K, event = draw(st.integers(1, 5)), draw(st.lists(st.integers(1, 3), max_size=3))
    B, seed = draw(st.integers(1, 4)), draw(st.integers(0, 10_000))
    stds = torch.tensor(draw(st.lists(st.floats(0.01, 3), min_size=K, max_size=K)), dtype=torch.float64)
    weights = torch.tensor(draw(st.lists(st.floats(0.01, 1), min_size=K, max_size=K)), dtype=torch.float64)
    p = Mixture(2 * seeded_noise(range(seed, seed + K), event, torch.float64), stds, weights / weights.sum())
    sigma = torch.tensor(draw(st.lists(st.floats(0.01, 100), min_size=B, max_size=B)), dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    x0 = p.sample(B, g)
    x = x0 + expand(sigma, x0) * torch.randn(x0.shape, generator=g, dtype=torch.float64) * draw(st.sampled_from([0., 1., 5.]))
    return p, x, sigma


@cases
@given(mixtures())
def test_score_is_the_gradient_of_the_log_density(case):
    p, x, sigma = case
    x = x.requires_grad_()
    auto, = torch.autograd.grad(p.log_prob(x, sigma).sum(), x)
    x = x.detach()
    # size of the terms that are subtracted, times float64 rounding, with room for the softmax of large exponents
    size = (1 + p.means.abs().max() + x.abs().max()) / (p.stds.min()**2 + sigma.min()**2)
    room = 1e-13 * size * (1 + p.log_prob(x, sigma).abs().max())
    assert (p.score(x, sigma) - auto).abs().max() <= room
    assert (score_of(p(x, sigma), x, sigma) - auto).abs().max() <= room + 1e-13 * (1 + x.abs().max()) / sigma.min()**2


@cases
@given(mixtures())
def test_one_component_is_a_gaussian(case):
    p, x, sigma = case
    one, same = Mixture(p.means[:1], p.stds[:1]), Gaussian(p.means[0], p.stds[0])
    for f, g in ((one, same), (one.score, same.score), (one.log_prob, same.log_prob)):
        # x * a - m * a against (x - m) * a: absolute rounding grows with 1 / variance
        close(f(x, sigma), g(x, sigma), rtol=1e-11, atol=1e-13 * (1 + x.abs().max().item()) / min(1, (p.stds[0]**2 + sigma.min()**2).item()))


@cases
@given(mixtures())
def test_symmetries(case):
    p, x, sigma = case
    D = p(x, sigma)
    assert D.shape == x.shape and D.dtype == x.dtype and p.log_prob(x, sigma).shape == (len(x),)
    order = torch.arange(len(p.means)).flip(0)
    close(Mixture(p.means[order], p.stds[order], p.weights[order])(x, sigma), D, rtol=1e-10, atol=1e-10)    # order of components
    close(Mixture(3 * p.means, 3 * p.stds, p.weights)(3 * x, 3 * sigma), 3 * D, rtol=1e-9, atol=1e-9)       # units
    i = len(x) - 1
    close(p(x[i:], sigma[i].item()), D[i:], rtol=1e-12, atol=1e-12)                                         # a row depends on itself alone
    twice = Mixture(torch.cat([p.means, p.means]), torch.cat([p.stds, p.stds]), torch.cat([p.weights, p.weights]) / 2)
    close(twice.log_prob(x, sigma), p.log_prob(x, sigma), rtol=1e-12, atol=1e-12)


@cases
@given(st.floats(0., 2.), st.floats(0.05, 5.), st.floats(-3, 3))
def test_gaussian_posterior_by_integration(std, sigma, seen):
    p, seen = Gaussian(torch.tensor(0.7, dtype=torch.float64), std + 0.05), torch.tensor([seen], dtype=torch.float64)
    x0 = torch.linspace(-20, 22, 40_001, dtype=torch.float64)
    w = (p.log_prob(x0) - (seen - x0)**2 / (2 * sigma**2)).softmax(0)
    assert abs((w @ x0) - p(seen, sigma)) < 1e-9    # the grid step is far below the posterior's width, 0.035 at least


def test_gaussian_with_a_std_for_each_coordinate():
    mean, std = torch.tensor([[1., -2., 0.]], dtype=torch.float64), torch.tensor([[0.5, 0., 2.]], dtype=torch.float64)
    p, x = Gaussian(mean, std), seeded_noise(range(4), (1, 3), torch.float64).requires_grad_()
    sigma = torch.tensor([0.1, 0.5, 1., 3.], dtype=torch.float64)
    normal = torch.distributions.Normal(mean, (std**2 + expand(sigma, x)**2).sqrt())
    close(p.log_prob(x, sigma), normal.log_prob(x).sum((1, 2)), rtol=1e-12, atol=1e-12)
    auto, = torch.autograd.grad(p.log_prob(x, sigma).sum(), x)
    close(p.score(x, sigma), auto, rtol=1e-12, atol=1e-12)
    close(p(x, sigma), x + expand(sigma, x)**2 * auto, rtol=1e-12, atol=1e-12)
    assert (p(x, sigma)[..., 1] == -2).all()    # a coordinate without spread is known


@pytest.mark.parametrize("sigma", [0.2, 1.])
def test_log_prob_integrates_to_one(sigma):
    t = torch.linspace(-14, 14, 281, dtype=torch.float64)
    p = golden("g2").log_prob(torch.cartesian_prod(t, t), sigma).exp().sum() * 0.1**2
    assert abs(p - 1) < 1e-9    # sums of Gaussians of width 0.28 and more on a grid of 0.1: error below exp(-2 (pi 0.28 / 0.1)^2)


@pytest.mark.parametrize("p", [golden("g2"), Gaussian(torch.tensor([1., -1.], dtype=torch.float64), torch.tensor([0.3, 2.]))])
def test_samples_have_the_density_they_should(p):
    g = torch.Generator().manual_seed(0)
    x0 = p.sample(100_000, g)
    x = x0 + 0.5 * torch.randn(x0.shape, generator=g, dtype=torch.float64)
    assert x0.dtype == torch.float64 and torch.equal(p.sample(3, g.manual_seed(0)), p.sample(3, g.manual_seed(0)))
    for basis in (torch.ones_like(x), x, x.sin(), x.flip(1)):
        error = basis * (p(x, 0.5) - x0)    # zero on average for any function of x if D is the posterior mean
        assert (error.mean(0).abs() < 5 * error.std(0) / 100_000**0.5 + 1e-12).all()    # five standard errors
        slip = basis * (p(x, 0.55) - x0)
        if basis is x: assert (slip.mean(0).abs() > 5 * slip.std(0) / 100_000**0.5).any()    # a sigma 10% off is noticed
    # E[score] = 0 and E[x . score] = -dimension (integrate by parts)
    s = p.score(x, 0.5)
    stein = (x * s).sum(1)
    assert abs(stein.mean() + 2) < 5 * stein.std() / 100_000**0.5
    assert (s.mean(0).abs() < 5 * s.std(0) / 100_000**0.5).all()


@pytest.mark.parametrize("sigma", np.logspace(-4, 4, 9))
@pytest.mark.parametrize("distance", [0., 1., 1e3, 1e6])
def test_stable_far_from_the_data_and_at_any_noise(sigma, distance):
    p = golden("g2")
    x = distance * torch.tensor([[1., 0.], [-0.6, 0.8]], dtype=torch.float64)
    D, score = p(x, sigma), p.score(x, sigma)
    for t in (D, score, p.log_prob(x, sigma)): assert t.isfinite().all()
    assert (D - x - sigma**2 * score).abs().max() < 1e-12 * (1 + distance)    # Tweedie, to rounding of x
    # the answer lies in the box of x and the means: D is an average of both
    low, high = torch.minimum(x, p.means.min(0).values), torch.maximum(x, p.means.max(0).values)
    assert (D >= low - 1e-9).all() and (D <= high + 1e-9).all()


def test_limits():
    p = golden("g2")
    x = p.sample(50, torch.Generator().manual_seed(0))
    close(p(x, 0.), x, rtol=0, atol=1e-14)                                             # nothing to remove
    close(p(x, 1e6), (p.weights @ p.means).expand(50, 2), rtol=0, atol=1e-9)           # nothing known: the mean of all
    spikes = Mixture(p.means, 0., p.weights)
    close(spikes(p.means + 0.01, 0.02), p.means, rtol=0, atol=1e-12)                   # the nearest point
    far = spikes.log_prob(torch.full((1, 2), 1e4, dtype=torch.float64), 1e-3)
    assert far.isfinite().all() and far < -1e12


@pytest.mark.parametrize("event", [(), (1,), (2, 3), (3, 8, 8)])
def test_any_event_shape(event):
    two = torch.stack([torch.zeros(event), torch.ones(event)])
    for p in (Gaussian(torch.zeros(event), 0.5), Mixture(two, 0.5), Empirical(two)):
        x = p.sample(4, torch.Generator().manual_seed(0))
        assert x.shape == p(x, 1.).shape == p.score(x, torch.ones(4)).shape == (4, *event)
        assert p.log_prob(x, torch.tensor(1.)).shape == (4,)
        assert p(x[:0], 1.).shape == p.score(x[:0], 1.).shape == (0, *event) and p.log_prob(x[:0], 1.).shape == (0,)


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [torch.float32, torch.float64])
def test_answers_in_the_dtype_of_x(own, asked):
    p = golden("g2")
    x, sigma = GOLDEN["g2.x"].to(asked), GOLDEN["g2.sigma"]
    q = Mixture(p.means.to(own), p.stds, p.weights)
    for f in (q, q.score, q.log_prob): assert f(x, sigma).dtype == asked
    rtol = 1e-10 if own == asked == torch.float64 else 1e-4    # float32 has 7 digits and x has lost one or two
    close(q(x, sigma).double(), GOLDEN["g2.D"], rtol=rtol, atol=rtol)
    g = Gaussian(torch.zeros(2, dtype=own), 1.)
    for f in (g, g.score, g.log_prob): assert f(x, sigma).dtype == asked


def test_integers_and_lists_become_floating_point():
    assert Mixture(torch.tensor([[0], [1]]), 1).means.dtype == torch.float32
    assert Mixture(np.array([[0.], [1.]]), 1).means.dtype == torch.float64
    assert Gaussian([0, 1], 0.5).std.tolist() == [0.5, 0.5]    # not rounded to the means' integers
    close(Mixture(torch.tensor([[-1], [1]]), 0.)(torch.tensor([[0.5]]), 1.), torch.tensor([[math.tanh(0.5)]]), rtol=1e-6, atol=0)


def test_a_weight_of_zero_is_a_component_less():
    p = golden("g2")
    q = Mixture(torch.cat([p.means, torch.zeros(1, 2, dtype=torch.float64)]), torch.cat([p.stds, p.stds[:1]]), torch.cat([p.weights, torch.zeros(1, dtype=torch.float64)]))
    x = GOLDEN["g2.x"].clone().requires_grad_()
    close(q(x, 1.), p(x, 1.), rtol=1e-12, atol=1e-12)
    grad, = torch.autograd.grad(q.log_prob(x, 1.).sum(), x)
    assert grad.isfinite().all()


Z = torch.zeros
@pytest.mark.parametrize("make, message", [
    (lambda: Mixture(Z(2, 3), 1., [0.5, 0.6]), "weights must be .* sum to 1"),
    (lambda: Mixture(Z(2, 3), 1., [1.5, -0.5]), "weights must be .* none negative"),
    (lambda: Mixture(Z(2, 3), 1., [float("nan"), 1.]), "weights must be"),
    (lambda: Mixture(Z(2, 3), 1., [1.]), r"weights must be \(2,\)"),
    (lambda: Mixture(Z(2, 3), -1.), "stds must be .* not negative"),
    (lambda: Mixture(Z(2, 3), float("nan")), "stds must be"),
    (lambda: Mixture(Z(2, 3), Z(3)), r"stds must be one number or \(2,\)"),
    (lambda: Mixture(Z(0, 3), 1.), "means must be"),
    (lambda: Mixture(Z(()), 1.), "means must be"),
    (lambda: Gaussian(Z(3), [1., -1., 1.]), "std must be .* not negative"),
    (lambda: Gaussian(Z(3), Z(2)), r"std must be one number or \(3,\)"),
])
def test_refused_data(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.parametrize("p", [Mixture(Z(2, 3), 1.), Gaussian(Z(3), 1.)])
@pytest.mark.parametrize("method", ["__call__", "score", "log_prob"])
@pytest.mark.parametrize("x, sigma, message", [
    (Z(4, 2), 1., r"x must be \(B, \*event\) with event \(3,\), got shape \(4, 2\)"),
    (Z(3), 1., "x must be"),
    (Z(4, 1), 1., "x must be"),    # would broadcast without a word
    (Z(4, 3, dtype=torch.int64), 1., "x must be floating point"),
    (Z(4, 3), -1., "sigma must be 0 or more and finite, got -1"),
    (Z(4, 3), torch.tensor([1., 1., -2., 1.]), r"0 or more and finite, got \[-2.0\]"),
    (Z(4, 3), float("nan"), "sigma must be 0 or more and finite, got nan"),
    (Z(4, 3), math.inf, "sigma must be 0 or more and finite, got inf"),
    (Z(4, 3), torch.ones(3), r"sigma must be a float, 0-d or \(4,\)"),
])
def test_refused_questions(p, method, x, sigma, message):
    with pytest.raises(ValueError, match=message): getattr(p, method)(x, sigma)


@pytest.mark.parametrize("p", [Mixture(Z(2, 3), [0., 1.]), Gaussian(Z(3), [0., 1., 1.]), Empirical(Z(2, 3))])
def test_a_spike_needs_noise(p):
    for f in (p, p.score, p.log_prob):
        for sigma in (0., -1., float("nan"), math.inf, torch.tensor([1., 0., 1., 1.])):
            with pytest.raises(ValueError, match="sigma must be positive and finite, got"): f(Z(4, 3), sigma)
        assert f(Z(4, 3), 1e-3).isfinite().all()


# ---- a finite data set ----

@st.composite
def sets(draw, block=st.sampled_from([1, 5, 17, 60, 2**22])):
    "A small data set, a noisy batch that suits it, its noise levels, and a size of block."
    N, event = draw(st.integers(1, 12)), draw(st.lists(st.integers(1, 3), max_size=3))
    B, seed = draw(st.integers(1, 4)), draw(st.integers(0, 10_000))
    data = seeded_noise(range(seed, seed + N), event, torch.float64) * draw(st.sampled_from([0.1, 1., 10.]))
    sigma = torch.tensor(draw(st.lists(st.floats(0.01, 100), min_size=B, max_size=B)), dtype=torch.float64)
    x = data[torch.arange(B) % N] + expand(sigma, data[:1].expand(B, *event)) * draw(st.sampled_from([0., 1., 5.])) * seeded_noise(range(B), event, torch.float64)
    return data, x, draw(st.sampled_from([sigma, sigma[0], sigma[0].item()])), draw(block)


@cases
@given(sets())
def test_a_data_set_is_a_mixture_of_spikes(case):
    data, x, sigma, block = case
    p, q = Empirical(data), Mixture(data, 0.)
    smallest = torch.as_tensor(sigma).min().item()
    # squared distances are rounded, and divided by 2 sigma^2: an error of the exponents, so a relative one of the weights
    room = 1e-14 * (1 + (data.abs().max() + x.abs().max()).item()**2 * data[0].numel() / smallest**2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "_BLOCK", block)
        close(p(x, sigma), q(x, sigma), rtol=0, atol=room * (1 + data.abs().max().item()))
        close(p.log_prob(x, sigma), q.log_prob(x, sigma), rtol=1e-13, atol=room + 1e-12)
        close(p.score(x, sigma), q.score(x, sigma), rtol=1e-12, atol=room * (1 + data.abs().max().item()) / smallest**2)


@cases
@given(sets())
def test_score_of_a_data_set_is_the_gradient_of_its_log_density(case):
    data, x, sigma, block = case
    x, p = x.requires_grad_(), Empirical(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "_BLOCK", block)    # also through the rescaling from block to block
        auto, = torch.autograd.grad(p.log_prob(x, sigma).sum(), x)
    # the difference of two numbers of this size over sigma^2; far from the data the exponents' rounding is the larger part
    smallest, size = torch.as_tensor(sigma).min().item(), (data.abs().max() + x.abs().max()).item()
    room = 1e-14 * (1 + size) * (1 + size**2 * data[0].numel() / smallest**2) / smallest**2
    close(auto, p.score(x, sigma).detach(), rtol=1e-12, atol=room)


@pytest.mark.parametrize("block", [1, 7, 64, 300])
def test_the_size_of_a_block_does_not_matter(block, monkeypatch):
    data = golden("img").sample(50, torch.Generator().manual_seed(0))
    p, sigma = Empirical(data), torch.tensor([0.01, 0.5, 3., 1e4])
    x = (data[:4] + expand(sigma, data[:4]) * seeded_noise(range(4), data.shape[1:], torch.float64)).requires_grad_()
    def answers():
        return p(x, sigma), p.score(x, sigma), p.log_prob(x, sigma), torch.autograd.grad(p(x, sigma).square().sum(), x)[0]
    whole = answers()
    monkeypatch.setattr(oracle, "_BLOCK", block)    # for images of 192 numbers: one at a time, or one, one, and one
    for data_first in (data, data.flip(0)):         # the largest exponent comes early or late
        p.data = data_first
        for a, b in zip(answers(), whole): close(a, b, rtol=1e-11, atol=1e-11)


@cases
@given(sets(), st.permutations(range(12)))
def test_symmetries_of_a_data_set(case, order):
    data, x, sigma, _ = case
    p, D, log_p = Empirical(data), Empirical(data)(x, sigma), Empirical(data).log_prob(x, sigma)
    smallest, size = torch.as_tensor(sigma).min().item(), (data.abs().max() + x.abs().max()).item()
    room = 1e-14 * (1 + size) * (1 + size**2 * data[0].numel() / smallest**2)
    order = [i for i in order if i < len(data)]
    close(Empirical(data[order])(x, sigma), D, rtol=0, atol=room)                   # in any order
    close(Empirical(3 * data)(3 * x, 3 * sigma), 3 * D, rtol=0, atol=9 * room)      # in any unit
    i = len(x) - 1
    own = sigma if torch.as_tensor(sigma).ndim == 0 else sigma[i:]
    close(p(x[i:], own), D[i:], rtol=0, atol=room)                                  # a row depends on itself alone
    low, high = data.min(0).values, data.max(0).values
    assert (D >= low - 1e-12 * (1 + size)).all() and (D <= high + 1e-12 * (1 + size)).all()    # an average of the data
    # an image that is there twice weighs twice
    K = len(data)
    weights = torch.ones(K, dtype=torch.float64)
    weights[0] = 2
    twice, weighted = Empirical(torch.cat([data, data[:1]])), Mixture(data, 0., weights / (K + 1))
    close(twice(x, sigma), weighted(x, sigma), rtol=0, atol=room)
    close(twice.log_prob(x, sigma), weighted.log_prob(x, sigma), rtol=1e-13, atol=room + 1e-12)
    one = Empirical(data[:1])
    assert (one(x, sigma) == data[:1]).all()                                        # the only possibility
    close(one.log_prob(x, sigma), Gaussian(data[0], 0.).log_prob(x, sigma), rtol=1e-13, atol=1e-12)
    assert log_p.shape == (len(x),)


@pytest.mark.parametrize("sigma", np.logspace(-4, 4, 9))
@pytest.mark.parametrize("distance", [0., 1., 1e3, 1e6])
def test_a_data_set_far_away_and_at_any_noise(sigma, distance):
    data = golden("g2").sample(200, torch.Generator().manual_seed(0))
    p, way = Empirical(torch.cat([data, data])), torch.tensor([[1., 0.], [-0.6, 0.8]], dtype=torch.float64)    # all are there twice
    D, score, log_p = p(distance * way, sigma), p.score(distance * way, sigma), p.log_prob(distance * way, sigma)
    for t in (D, score, log_p): assert t.isfinite().all()
    # a quotient whose weights sum to 1 never leaves the data; exp(a - logsumexp(a)) gives twice as much from afar
    assert (D >= data.min(0).values - 1e-12).all() and (D <= data.max(0).values + 1e-12).all()
    if distance == 1e6 and sigma <= 1:    # the outermost image; rounding of 1e12 over 2 sigma^2 is far below their distances
        outermost = data[(data @ way.T).argmax(0)]
        close(D, outermost, rtol=0, atol=1e-9 if sigma >= 0.1 else 1e-3)
        nearest = (distance * way - outermost).square().sum(1) / (2 * sigma**2)
        close(log_p, -nearest - math.log(200) - math.log(2 * math.pi * sigma**2), rtol=1e-12, atol=1e-9)


def test_a_data_set_at_low_and_high_noise():
    data = golden("img").sample(40, torch.Generator().manual_seed(1))
    p = Empirical(data)
    close(p(data + 0.01, 0.01), data, rtol=0, atol=1e-12)                              # memory
    close(p(data, 1e6), data.mean(0).expand_as(data), rtol=0, atol=1e-9)               # |x . x_i| / sigma^2 is below 1e-9
    close(p.log_prob(data, 1e-3), torch.full((40,), -math.log(40) - 96 * math.log(2 * math.pi * 1e-6), dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [1e2, 1e4])
def test_distances_keep_their_digits(shift):
    "Numbers that float32 holds exactly, far from zero: from the expanded square, |x|^2 - 2 x x_i + |x_i|^2, nothing would be left."
    data = torch.tensor([[0., 0.], [0.125, 0.], [0., 0.25]])
    x, sigma = torch.tensor([[0.0625, 0.0625], [0.125, 0.125]]), 0.125
    here, there = Empirical(data), Empirical(data + shift)
    close(there.log_prob(x + shift, sigma), here.log_prob(x, sigma), rtol=1e-6, atol=1e-6)    # float32 rounding
    close(there(x + shift, sigma) - shift, here(x, sigma), rtol=0, atol=2e-7 * shift)


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [torch.float32, torch.float64])
def test_a_data_set_answers_in_the_dtype_of_x(own, asked):
    data = golden("img").sample(30, torch.Generator().manual_seed(0)).to(own)
    x = (data[:5] + 0.5 * seeded_noise(range(5), data.shape[1:], own)).to(asked)
    p, exact = Empirical(data), Mixture(data.double(), 0.)
    assert p.data is data    # not copied
    for f, g in ((p, exact), (p.score, exact.score), (p.log_prob, exact.log_prob)):
        y, rtol = f(x, 0.5), 1e-11 if asked == torch.float64 else 1e-4    # float32 has 7 digits and exponents near 100 lose two
        assert y.dtype == asked
        close(y.double(), g(x.double(), 0.5), rtol=rtol, atol=rtol)


def test_samples_of_a_data_set():
    data = torch.arange(6.).reshape(3, 2)
    p, g = Empirical(data), torch.Generator().manual_seed(0)
    x = p.sample(30_000, g)
    assert x.shape == (30_000, 2) and torch.equal(p.sample(5, g.manual_seed(1)), p.sample(5, g.manual_seed(1)))
    shares = (x[:, None] == data).all(2).double().mean(0)
    assert abs(shares.sum() - 1) < 1e-12 and (shares - 1 / 3).abs().max() < 5 * (2 / 9 / 30_000)**0.5    # five standard errors


@pytest.mark.parametrize("data, message", [
    (Z(0, 3), r"data must be .* not empty, got torch.float32 of shape \(0, 3\)"),
    (Z(3, 0), "data must be .* not empty"),
    (Z(()), "data must be"),
    (Z(2, 3, dtype=torch.uint8), "data must be a floating-point tensor .* got torch.uint8"),    # in [0, 255]?
    (np.zeros((2, 3)), "data must be a floating-point tensor .* got ndarray"),
    (torch.tensor([[0., 1.], [float("nan"), 0.]]), "data must be finite, got values from nan to nan"),
    (torch.tensor([[0., 1.], [math.inf, 0.]]), "data must be finite, got values from 0.0 to inf"),
])
def test_refused_data_sets(data, message):
    with pytest.raises(ValueError, match=message): Empirical(data)


@pytest.mark.parametrize("method", ["__call__", "score", "log_prob"])
@pytest.mark.parametrize("x, sigma, message", [
    (Z(4, 2), 1., r"x must be \(B, \*event\) with event \(3,\), got shape \(4, 2\)"),
    (Z(3), 1., "x must be"),
    (Z(()), 1., "x must be"),
    (Z(4, 1), 1., "x must be"),    # would broadcast without a word
    (Z(4, 3, dtype=torch.int64), 1., "x must be floating point"),
    (Z(4, 3), torch.ones(3), r"sigma must be a float, 0-d or \(4,\)"),
])
def test_questions_that_a_data_set_refuses(method, x, sigma, message):
    with pytest.raises(ValueError, match=message): getattr(Empirical(Z(2, 3)), method)(x, sigma)


@cases
@given(sets(), st.integers(1, 3), st.integers(0, 99))
def test_classes_of_a_data_set(case, classes, seed):
    "A class is a data set of its own; all classes, as often as they are there, are the whole."
    data, x, sigma, block = case
    labels = torch.arange(len(data)) % classes
    labels = labels[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
    p, count = Empirical(data, labels), len(labels.unique())
    smallest, size = torch.as_tensor(sigma).min().item(), (data.abs().max() + x.abs().max()).item()
    room = 1e-14 * (1 + size) * (1 + size**2 * data[0].numel() / smallest**2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "_BLOCK", block)
        asked = torch.arange(len(x)) % (count + 1) - 1
        parts = [Empirical(data if k < 0 else data[labels == k]) for k in asked.tolist()]
        for f in ("__call__", "log_prob"):
            alone = torch.cat([getattr(part, f)(x[i:i + 1], torch.as_tensor(sigma, dtype=torch.float64).expand(len(x))[i:i + 1]) for i, part in enumerate(parts)])
            close(getattr(p, f)(x, sigma, asked), alone, rtol=1e-13, atol=room + 1e-12)
        close(p.score(x, sigma, asked) * smallest**2, (p(x, sigma, asked) - x) * smallest**2 / expand(sigma, x)**2, rtol=1e-12, atol=room)
        each = torch.stack([p.log_prob(x, sigma, torch.full((len(x),), k)) + math.log((labels == k).double().mean()) for k in range(count)])
        close(each.logsumexp(0), p.log_prob(x, sigma), rtol=1e-13, atol=room + 1e-12)


@pytest.mark.parametrize("labels", [[0, 1], torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)])
def test_refused_classes(labels):
    with pytest.raises(ValueError, match="labels must be a tensor of 2 integers, one for each of the data, got"): Empirical(Z(2, 3), labels)


@pytest.mark.parametrize("asked, message", [
    (torch.tensor([0, 2, 1, 5]), r"labels must be -1 or classes of the data, got \[2, 5\]"),
    (torch.tensor([0, 1]), r"labels must be \(4,\) like x, got shape \(2,\)"),
])
def test_classes_that_are_not_there(asked, message):
    with pytest.raises(ValueError, match=message): Empirical(Z(2, 3), torch.tensor([0, 1]))(Z(4, 3), 1., asked)
    with pytest.raises(ValueError, match="labels are asked for, but the data have none"): Empirical(Z(2, 3))(Z(4, 3), 1., asked)


MEMORY = """
import resource, torch
from ddpm_edm.core import seeded_noise
from ddpm_edm.oracle import Empirical
data = torch.rand(N, *EVENT, generator=torch.Generator().manual_seed(0))
x = data[:B] + 0.3 * seeded_noise(range(B), EVENT, torch.float64)
Empirical(data[:B])(x, 0.3)                                                  # whatever the first call loads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
D = Empirical(data)(x, 0.3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, (D - data[:B]).abs().max().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in Linux's units")
@pytest.mark.parametrize("N, event, B", [(10_000, (3, 32, 32), 64), (60_000, (1, 28, 28), 16)])
def test_large_sets_in_bounded_memory(N, event, B):
    code = MEMORY.replace("EVENT", str(event)).replace("B", str(B)).replace("N,", f"{N},")
    added, error = run(sys.executable, "-c", code, OMP_NUM_THREADS="1").split()
    # 4 million numbers make 32 MB in float64: a block, its distances and a few more of that size at the most.
    # All differences are 16 or 6 GB, and the data alone in float64 would be 246 or 376 MB
    assert int(added) * 1024 < 150e6
    assert float(error) == 0    # the nearest image; others are e^-500 times as likely


# ---- torch.func ----

def covariance(p, x, sigma):
    "Cov[x0 | x] from its definition, for one x (d,)."
    if isinstance(p, Gaussian): return torch.diag((1 / p.std**2 + 1 / sigma**2)**-1)
    means = p.data if isinstance(p, Empirical) else p.means
    s2 = (torch.zeros(len(means)) if isinstance(p, Empirical) else p.stds).double()**2
    weights = torch.full((len(means),), 1 / len(means)).double() if isinstance(p, Empirical) else p.weights
    v = s2 + sigma**2
    r = (weights.log() - (x - means).square().sum(1) / (2 * v) - len(x) / 2 * v.log()).softmax(0)
    guess = (sigma**2 * means + s2[:, None] * x) / v[:, None]
    off = guess - r @ guess
    return (r * s2 * sigma**2 / v).sum() * torch.eye(len(x), dtype=torch.float64) + (off.T * r) @ off


THREE = {"gaussian": Gaussian(torch.tensor([1., -1.], dtype=torch.float64), torch.tensor([0.3, 2.])),
         "mixture": golden("g2"), "data set": Empirical(golden("g2").sample(60, torch.Generator().manual_seed(0)))}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")    # torch's own, on the first forward-mode derivative
@pytest.mark.parametrize("p", THREE.values(), ids=THREE)
def test_inside_torch_func(p):
    x = p.sample(9, torch.Generator().manual_seed(2)) + 0.3
    sigma = torch.logspace(-1, 1.5, 9, dtype=torch.float64)
    D = lambda x, s: p(x[None], s)[0]
    log_p = lambda x, s: p.log_prob(x[None], s)[0]
    close(vmap(D)(x, sigma), p(x, sigma), rtol=1e-12, atol=1e-12)
    close(vmap(log_p)(x, sigma), p.log_prob(x, sigma), rtol=1e-12, atol=1e-12)
    close(vmap(lambda x, s: p.score(x[None], s)[0])(x, sigma), p.score(x, sigma), rtol=1e-12, atol=1e-12)
    close(vmap(D, (0, None))(x, 0.5), p(x, 0.5), rtol=1e-12, atol=1e-12)
    J, cov = vmap(jacrev(D))(x, sigma), torch.stack([covariance(p, *pair) for pair in zip(x, sigma)])
    close(sigma[:, None, None]**2 * J, cov, rtol=1e-10, atol=1e-10)    # Tweedie once more: dD/dx = Cov / sigma^2
    v = seeded_noise(range(9), (2,), torch.float64)
    value, along = jvp(lambda x: p(x, sigma), (x,), (v,))
    close(value, p(x, sigma), rtol=1e-12, atol=1e-12)
    close(along, torch.einsum("bij,bj->bi", J, v), rtol=1e-10, atol=1e-10)
    # score = gradient, and dD/dx = I + sigma^2 times the second derivatives of log p; forward over reverse
    close(vmap(grad(log_p))(x, sigma), p.score(x, sigma), rtol=1e-10, atol=1e-10)
    H = vmap(hessian(log_p))(x, sigma)
    close(torch.eye(2) + sigma[:, None, None]**2 * H, J, rtol=1e-9, atol=1e-9)
    # heat equation for the density, dp/dsigma = sigma laplacian(p): derivatives in sigma too
    density = lambda x, s: log_p(x, s).exp()
    heat = sigma * vmap(hessian(density))(x, sigma).diagonal(dim1=1, dim2=2).sum(1)
    close(vmap(grad(density, argnums=1))(x, sigma), heat, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_derivatives_are_right_on_the_data_themselves():
    "At distance 0 the derivative of a distance is 0 / 0; of its square it is not."
    data = torch.tensor([[0., 0.], [1., 0.]], dtype=torch.float64)
    D = lambda x: Empirical(data)(x[None], 0.7)[0]
    for J in (jacrev(D)(data[0]), torch.func.jacfwd(D)(data[0])):
        close(J, covariance(Empirical(data), data[0], torch.tensor(0.7)) / 0.7**2, rtol=1e-7, atol=1e-12)    # 0.7 in float32
    x = data[:1].clone().requires_grad_()
    slope, = torch.autograd.grad(D(x[0])[0], x, create_graph=True)
    bend, = torch.autograd.grad(slope[0, 0], x)    # d^2 D / dx^2 of a coin at 0 and 1 is that of sigmoid((x - 1/2) / sigma^2)
    s = 1 / (1 + math.exp(0.5 / 0.49))
    close(bend[0, 0].item(), s * (1 - s) * (1 - 2 * s) / 0.49**2, rtol=1e-10, atol=0)


# ---- toy data ----

@pytest.mark.parametrize("name", TOYS)
def test_toy_data(name):
    for n in (1, 2, 7):
        x = toy_data(name, n)
        assert x.shape == (n, 2) and x.dtype == torch.float64 and x.isfinite().all() and x.is_contiguous()
    assert torch.equal(toy_data(name, 50, seed=3), toy_data(name, 50, seed=3)) and torch.equal(toy_data(name, 50), toy_data(name, 50, 0))
    assert not torch.equal(toy_data(name, 50, seed=3), toy_data(name, 50, seed=4))
    n = 400_000
    x = toy_data(name, n, seed=5)
    assert (x.mean(0).abs() < 5 * x.std(0) / n**0.5).all()                    # five standard errors each
    square = x.square().mean(1)
    assert abs(square.mean() - 1) < 5 * square.std() / n**0.5
    assert x.abs().max() < 5 and x.std(0).min() > 0.5                         # in sight, and not flat
    state = np.random.get_state()[1].copy()
    toy_data(name, 10)
    assert (np.random.get_state()[1] == state).all()                          # nobody else's random numbers are used


def test_toy_shapes():
    "What each name promises, by a number that other sets don't give."
    board = (toy_data("checkerboard", 5000) * (4 / 3)**0.5 + 2).floor()
    assert (board.sum(1) % 2 == 0).all() and board.min() == 0 and board.max() == 3 and len(board.unique(dim=0)) == 8
    blobs = toy_data("eight_gaussians", 8000)
    angle = torch.atan2(blobs[:, 1], blobs[:, 0]) / (math.pi / 4)
    assert set(angle.round().int().tolist()) == set(range(-4, 5)) and ((angle - angle.round()).abs() < 0.25).double().mean() > 0.9
    radius = toy_data("rings", 4000).norm(dim=1) * 0.5604                    # 1 and 0.5, with noise of 0.04
    assert (((radius - 1).abs() < 0.2) | ((radius - 0.5).abs() < 0.2)).all() and abs((radius > 0.75).double().mean() - 0.5) < 0.01
    wheel = toy_data("pinwheel", 200_000)
    assert abs(wheel.norm(dim=1).square().mean() - 2) < 0.02
    turned = torch.atan2(wheel[:, 1], wheel[:, 0]) * 5
    assert turned.cos().mean().abs() + turned.sin().mean().abs() > 0.2       # five arms; four or six would average to zero
    for arms in (3, 4, 6): assert (turned / 5 * arms).cos().mean().abs() < 0.02


def test_own_toys_are_the_same_everywhere():
    "numpy keeps the stream of RandomState; scikit-learn's sets may change with it."
    first = {"checkerboard": [-0.239486181029, 1.712989165808], "eight_gaussians": [0.726863719661, -1.051056664582], "pinwheel": [0.797976558241, 1.879140236775], "spirals": [-0.542917623089, 0.226091384923]}
    for name, values in first.items(): close(toy_data(name, 3, seed=7)[0].tolist(), values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("args, message", [
    (("moons", 5), "name must be one of .*'two_moons'.*, got 'moons'"),
    (("rings", 0), "n must be at least 1, got 0"),
    (("rings", -3), "n must be at least 1, got -3"),
    (("rings", 5, -1), r"seed must be an integer from 0 to 2\*\*32 - 1, got -1"),
    (("rings", 5, 2**32), "seed must be an integer"),
    (("rings", 5, 0.5), "seed must be an integer"),
])
def test_refused_toys(args, message):
    with pytest.raises(ValueError, match=message): toy_data(*args)


def test_the_names_of_the_toys():
    assert TOYS == ("checkerboard", "eight_gaussians", "pinwheel", "rings", "s_curve", "spirals", "swiss_roll", "two_moons")
    with pytest.raises(ValueError) as e: toy_data("", 5)
    for name in TOYS: assert repr(name) in str(e.value)


def test_on_a_gpu():
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    p = golden("g2")
    x, sigma = GOLDEN["g2.x"].cuda(), GOLDEN["g2.sigma"]
    close(p(x, sigma).cpu(), GOLDEN["g2.D"], rtol=1e-10, atol=1e-10)    # parameters follow x
    q = Mixture(p.means.cuda(), p.stds.cuda(), p.weights.cuda())
    close(q.sample(5, torch.Generator().manual_seed(0)).cpu(), p.sample(5, torch.Generator().manual_seed(0)), rtol=0, atol=1e-15)
    data = golden("img").sample(30, torch.Generator().manual_seed(0))
    x, sigma = data[:5] + 0.5 * seeded_noise(range(5), data.shape[1:], torch.float64), torch.tensor([0.1, 0.5, 1., 2., 80.])
    for f in ("__call__", "score", "log_prob"):
        here = getattr(Empirical(data), f)(x, sigma)
        for p in (Empirical(data), Empirical(data.cuda())):    # a large set may stay in main memory
            there = getattr(p, f)(x.cuda(), sigma)
            assert there.is_cuda
            close(there.cpu(), here, rtol=1e-10, atol=1e-10)
    assert Empirical(data.cuda()).sample(3).is_cuda
