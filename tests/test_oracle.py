"oracle: exact denoisers against golden numbers, autograd, each other and chance."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import expand, score_of, seeded_noise
from ddpm_edm.oracle import Gaussian, Mixture

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
    for p in (Gaussian(torch.zeros(event), 0.5), Mixture(torch.stack([torch.zeros(event), torch.ones(event)]), 0.5)):
        x = p.sample(4, torch.Generator().manual_seed(0))
        assert x.shape == p(x, 1.).shape == p.score(x, torch.ones(4)).shape == (4, *event)
        assert p.log_prob(x, torch.tensor(1.)).shape == (4,)
        assert p(x[:0], 1.).shape == (0, *event)


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
    (Z(4, 3), -1., "sigma must be a number and not negative, got -1"),
    (Z(4, 3), torch.tensor([1., 1., -2., 1.]), "not negative, got -2"),
    (Z(4, 3), float("nan"), "sigma must be a number"),
    (Z(4, 3), torch.ones(3), r"sigma must be a float, 0-d or \(4,\)"),
])
def test_refused_questions(p, method, x, sigma, message):
    with pytest.raises(ValueError, match=message): getattr(p, method)(x, sigma)


@pytest.mark.parametrize("p", [Mixture(Z(2, 3), [0., 1.]), Gaussian(Z(3), [0., 1., 1.])])
def test_a_spike_needs_noise(p):
    for f in (p, p.score, p.log_prob):
        with pytest.raises(ValueError, match="spike"): f(Z(4, 3), 0.)
        assert f(Z(4, 3), 1e-3).isfinite().all()


def test_on_a_gpu():
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    p = golden("g2")
    x, sigma = GOLDEN["g2.x"].cuda(), GOLDEN["g2.sigma"]
    close(p(x, sigma).cpu(), GOLDEN["g2.D"], rtol=1e-10, atol=1e-10)    # parameters follow x
    q = Mixture(p.means.cuda(), p.stds.cuda(), p.weights.cuda())
    close(q.sample(5, torch.Generator().manual_seed(0)).cpu(), p.sample(5, torch.Generator().manual_seed(0)), rtol=0, atol=1e-15)
