"score: the three losses against closed forms, explicit Jacobians, each other and chance."
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_edm.core import expand, score_of, seeded_noise
from ddpm_edm.oracle import Empirical, Gaussian, Mixture, toy_data
from ddpm_edm.score import denoising_loss, fisher_divergence, implicit_loss, sliced_loss

cases = settings(max_examples=40, deadline=None, derandomize=True)
close = torch.testing.assert_close
f64 = torch.float64
BY_DERIVATIVE = (implicit_loss, sliced_loss)
MIXTURE = Mixture(torch.tensor([[-1.2, -0.8], [1.2, -0.6], [0., 1.3]], dtype=f64), torch.tensor([0.35, 0.5, 0.3]), [0.3, 0.5, 0.2])


def gen(seed=0): return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    "A small smooth network that takes events of any shape, and a noise level if it is told one."
    def __init__(self, event=(2,), seed=0, width=9, dtype=f64):
        super().__init__()
        d = math.prod(event)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(d + 1, width), nn.Tanh(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, d)).to(dtype)

    def forward(self, x, sigma=0.):
        level = expand(sigma, x.reshape(len(x), -1)).expand(len(x), 1)
        return self.layers(torch.cat([x.reshape(len(x), -1), level], 1)).reshape(x.shape)


def gradients(loss, net): return torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), list(net.parameters()))])


def sign_vectors(x):
    "All 2^d directions of signs for a batch, (2^d, B, *)."
    d = math.prod(x.shape[1:])
    signs = torch.tensor(list(itertools.product([-1., 1.], repeat=d)), dtype=x.dtype)
    return signs.reshape(2**d, 1, *x.shape[1:]).expand(2**d, *x.shape)


def within(mean_of, want, errors=5):
    "Whether a Monte-Carlo mean is within five standard errors of a number."
    assert abs(mean_of.mean() - want) <= errors * mean_of.std() / len(mean_of)**0.5 + 1e-12, (mean_of.mean().item(), want)


# ---- values by hand ----

def test_values_by_hand():
    "s = -x (1, 4) at x = (1, 2): |s|^2 / 2 = (1 + 64) / 2 and a trace of -5."
    x, s = torch.tensor([[1., 2.]], dtype=f64), lambda x: -x * torch.tensor([1., 4.], dtype=f64)
    assert implicit_loss(s, x).tolist() == [32.5 - 5]
    assert fisher_divergence(s, lambda x: -x, x).tolist() == [18.]                         # 6^2 / 2
    v = torch.tensor([[[1., 3.]]], dtype=f64)
    assert sliced_loss(s, x, v=v).tolist() == [32.5 - 37]                                  # v' J v = -(1 + 36)
    assert sliced_loss(s, x, v=v, reduce_variance=False).tolist() == [25**2 / 2 - 37]      # v' s = -1 - 24
    # at x = (2, 4): s + n / 0.5 = (-2 + 2, -16 + 4)
    n = torch.tensor([[1., 2.]], dtype=f64)
    assert denoising_loss(s, torch.tensor([[1.5, 3.]], dtype=f64), 0.5, n, tell_sigma=False).tolist() == [72.]


@pytest.mark.parametrize("event", [(), (1,), (4,), (2, 1, 3)])
@pytest.mark.parametrize("told", [None, 0.7, "each"])
def test_trace_is_that_of_the_whole_jacobian(event, told):
    net, x = Net(event), seeded_noise(range(5), event, f64)
    sigma = torch.linspace(0.1, 2, 5, dtype=f64) if told == "each" else told
    levels = torch.zeros(5, dtype=f64) if sigma is None else expand(sigma, x).reshape(-1).expand(5)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x, s: net(x[None], s[None])[0]))(x, levels)
    d = math.prod(event)
    trace = jacobian.reshape(5, d, d).diagonal(dim1=1, dim2=2).sum(1)
    want = net(x, levels).reshape(5, d).square().sum(1) / 2 + trace
    for chunk_size in (None, 1, 2): close(implicit_loss(net, x, sigma, chunk_size=chunk_size), want, rtol=1e-12, atol=1e-12)
    close(gradients(implicit_loss(net, x, sigma), net), gradients(want, net), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("event", [(), (3,), (1, 2, 2)])
@pytest.mark.parametrize("reduce_variance", [True, False])
def test_all_sign_vectors_make_sliced_implicit(event, reduce_variance):
    "The mean over 2^d sign vectors has no chance in it: E[vv'] = I exactly."
    net, x = Net(event), seeded_noise(range(4), event, f64)
    sliced, implicit = sliced_loss(net, x, 0.3, v=sign_vectors(x), reduce_variance=reduce_variance), implicit_loss(net, x, 0.3)
    close(sliced, implicit, rtol=1e-12, atol=1e-12)
    close(gradients(sliced, net), gradients(implicit, net), rtol=1e-10, atol=1e-12)


def test_unit_vectors_make_sliced_implicit():
    "d^(1/2) e_i are directions with E[vv'] = I too."
    net, x = Net((3,)), seeded_noise(range(4), (3,), f64)
    v = (3**0.5 * torch.eye(3, dtype=f64))[:, None].expand(3, 4, 3)
    for reduce_variance in (True, False): close(sliced_loss(net, x, v=v, reduce_variance=reduce_variance), implicit_loss(net, x), rtol=1e-12, atol=1e-12)


@cases
@given(seed=st.integers(0, 1000), sigma=st.floats(1e-3, 50), event=st.sampled_from([(), (3,), (1, 2, 2)]), told=st.booleans())
def test_denoising_loss_is_its_formula(seed, sigma, event, told):
    net, x0, n = Net(event), *seeded_noise([seed, seed + 1], (4, *event), f64)
    got = denoising_loss(net if told else lambda x: net(x), x0, sigma, n, tell_sigma=told)
    s = net(x0 + sigma * n, sigma if told else 0.)
    want = (s + n / sigma).square().reshape(4, -1).sum(1) / 2
    assert got.shape == (4,)
    close(got, want, rtol=1e-12, atol=0)
    levels = sigma * torch.tensor([1., 2., 0.5, 3.], dtype=f64)
    rows = torch.cat([denoising_loss(net, x0[i:i + 1], levels[i].item(), n[i:i + 1]) for i in range(4)])
    close(denoising_loss(net, x0, levels, n), rows, rtol=1e-12, atol=0)    # a level for each sample


@cases
@given(seed=st.integers(0, 1000), scale=st.floats(-3, 3), event=st.sampled_from([(), (2,), (2, 1, 2)]))
def test_properties(seed, scale, event):
    net, x, n = Net(event, seed), *seeded_noise([seed, seed + 1], (3, *event), f64)
    for loss, at in ((lambda s, i=slice(None): implicit_loss(s, x[i]), x), (lambda s, i=slice(None): sliced_loss(s, x[i], v=n[None, i]), x),
                     (lambda s, i=slice(None): denoising_loss(s, x[i], 0.4, n[i], tell_sigma=False), x + 0.4 * n)):
        whole = loss(net)
        assert whole.shape == (3,) and whole.dtype == f64 and whole.requires_grad
        close(torch.cat([loss(net, slice(1)), loss(net, slice(1, 3))]), whole, rtol=1e-12, atol=1e-12)    # rows do not mix
        # each loss is quadratic in the score, with |s|^2 / 2 in front: what is left of the second difference
        along = lambda a: loss(lambda y, a=a: a * net(y) + 0 * y)
        close(along(scale) + along(-scale) - 2 * along(0.), scale**2 * net(at).square().reshape(3, -1).sum(1), rtol=1e-9, atol=1e-9)
    # a divergence is never negative, zero at the truth and symmetric
    other = Net(event, seed + 1)
    assert (fisher_divergence(net, other, x) >= 0).all() and (fisher_divergence(net, net, x) == 0).all()
    assert torch.equal(fisher_divergence(net, other, x), fisher_divergence(other, net, x))


@cases
@given(seed=st.integers(0, 1000))
def test_a_rotation_changes_nothing(seed):
    q, _ = torch.linalg.qr(seeded_noise([seed], (3, 3), f64)[0])
    net, x, n = Net((3,)), *seeded_noise([seed + 1, seed + 2], (4, 3), f64)
    turned = lambda x: net(x @ q) @ q.T
    for loss in (lambda s, x, n: implicit_loss(s, x), lambda s, x, n: sliced_loss(s, x, v=n[None]),
                 lambda s, x, n: denoising_loss(s, x, 0.3, n, tell_sigma=False), lambda s, x, n: fisher_divergence(s, lambda x: -x, x)):
        close(loss(turned, x @ q.T, n @ q.T), loss(net, x, n), rtol=1e-10, atol=1e-10)


def test_dsm_and_antithetic_pairs_tend_to_ssm():
    net, x, n = Net(), *seeded_noise([0, 1], (6, 2), f64)
    pair = sum(denoising_loss(net, x, 1e-4, sign * n, tell_sigma=False) for sign in (1, -1)) / 2 - (n / 1e-4).square().sum(1) / 2
    close(pair, sliced_loss(net, x, v=n[None]), rtol=0, atol=1e-6)    # order sigma^2 = 1e-8; 1e8 loses 8 of 16 digits


# ---- expectations in closed form ----

@pytest.mark.parametrize("slope", [-2., -1 / 0.64, 0.5])
def test_linear_scores_of_gaussian_data(slope):
    "Data N(m, s^2), score slope (x - c): all three expectations are short formulas, in d = 3 coordinates."
    m, s, c, d, sigma, N = 0.4, 0.8, -0.3, 3, 0.5, 40_000
    p, score = Gaussian(torch.full((d,), m, dtype=f64), s), lambda x: slope * (x - c)
    x, n = p.sample(N, gen()), seeded_noise(range(N // 8), (8, d), f64).reshape(N, d)
    size = lambda var: slope**2 * (var + (m - c)**2) * d / 2        # E |s|^2 / 2
    within(implicit_loss(score, x), size(s**2) + d * slope)
    for dist in ("rademacher", "gaussian"):
        for reduce_variance in (True, False): within(sliced_loss(score, x, distribution=dist, reduce_variance=reduce_variance, generator=gen(1)), size(s**2) + d * slope)
    # E |s + n / sigma|^2 / 2 = E |s|^2 / 2 + slope E |n|^2 + d / 2 sigma^2
    within(denoising_loss(score, x, sigma, n, tell_sigma=False), size(s**2 + sigma**2) + d * slope + d / (2 * sigma**2))
    # (slope + 1/s^2) (x - m) + slope (m - c)
    within(fisher_divergence(lambda x, sigma: score(x), p.score, x, 0.), ((slope + 1 / s**2)**2 * s**2 + slope**2 * (m - c)**2) * d / 2)


CANDIDATES = {"exact": lambda x: MIXTURE.score(x, 0.), "zero": lambda x: 0 * x, "blurred": lambda x: MIXTURE.score(x, 0.3),
              "swirl": lambda x: MIXTURE.score(x, 0.) + x.flip(1) * torch.tensor([-1., 1.], dtype=f64), "network": Net()}


@pytest.mark.parametrize("name", CANDIDATES)
def test_losses_are_the_fisher_divergence_and_a_constant(name):
    score, N, sigma = CANDIDATES[name], 50_000, 0.4
    x = MIXTURE.sample(N, gen())
    n = torch.randn(x.shape, generator=gen(1), dtype=f64)
    exact = lambda x: MIXTURE.score(x, 0.)
    J, C = fisher_divergence(score, exact, x), exact(x).square().sum(1) / 2
    within(J - implicit_loss(score, x) - C, 0)
    within(J - sliced_loss(score, x, generator=gen(2)) - C, 0)
    within(J - sliced_loss(score, x, distribution="gaussian", reduce_variance=False, generator=gen(3)) - C, 0)
    noisy = x + sigma * n
    J, C = fisher_divergence(lambda x, sigma: score(x), MIXTURE.score, noisy, sigma), (x - MIXTURE(noisy, sigma)).square().sum(1) / (2 * sigma**4)
    within(denoising_loss(score, x, sigma, n, tell_sigma=False) - J - C, 0)
    within(C + MIXTURE.score(noisy, sigma).square().sum(1) / 2, 1 / sigma**2)    # C = d / 2 sigma^2 - E |score|^2 / 2


def test_the_constants_would_notice_a_fault():
    "Five standard errors are tight enough: a trace 3% off is seen."
    x = MIXTURE.sample(50_000, gen())
    exact = lambda x: MIXTURE.score(x, 0.)
    s = exact(x).square().sum(1) / 2
    trace = implicit_loss(exact, x) - s
    with pytest.raises(AssertionError): within(2 * s + 1.03 * trace, 0)
    within(2 * s + trace, 0)


def test_variance_of_hutchinsons_trace():
    "Var v'Av = Var[v_i^2] sum S_ii^2 + 4 sum_{i<j} S_ij^2, with Var[v_i^2] = 2 or 0."
    A = seeded_noise([0], (6, 6), f64)[0]
    S, x = (A + A.T) / 2, torch.ones(40_000, 6, dtype=f64)
    off = 4 * S.triu(1).square().sum()
    for dist, want in (("gaussian", off + 2 * S.diagonal().square().sum()), ("rademacher", off)):
        for k in (1, 4):
            got = sliced_loss(lambda x: x @ A.T, x, distribution=dist, projections=k, generator=gen()).var()
            assert abs(got * k / want - 1) < 5 * (14 / 40_000)**0.5    # kurtosis of such forms is at most 15
    diagonal = sliced_loss(lambda x: x * S.diagonal(), x, generator=gen())
    close(diagonal, (S.diagonal().square().sum() / 2 + S.trace()).expand(40_000), rtol=1e-12, atol=1e-12)    # signs are exact here


def test_directions_are_what_they_are_called():
    "A score x -> v' J v with J = diag(0, 1): slopes are v_2^2, 1 for signs and chi-squared for Gaussians."
    x, one = torch.zeros(20_000, 2, dtype=f64), torch.tensor([0., 1.], dtype=f64)
    signs = sliced_loss(lambda x: x * one, x, generator=gen())
    assert (signs == 1).all()
    squares = sliced_loss(lambda x: x * one, x, distribution="gaussian", generator=gen())
    within(squares, 1)
    within((squares - 1)**2, 2)
    cross = sliced_loss(lambda x: x.flip(1), x, generator=gen())    # 2 v_1 v_2
    assert set(cross.tolist()) == {-2., 2.}
    within(cross, 0)


# ---- how they are called ----

def test_oracles_are_scores():
    x = toy_data("two_moons", 6)
    sigma = torch.linspace(0.3, 1, 6, dtype=f64)
    for p in (MIXTURE, Gaussian(torch.zeros(2, dtype=f64)), Empirical(toy_data("rings", 50))):
        want = (p.score(x, sigma).square().sum(1) / 2) + torch.func.vmap(torch.func.jacrev(lambda x, s: p.score(x[None], s)[0]))(x, sigma).diagonal(dim1=1, dim2=2).sum(1)
        close(implicit_loss(p.score, x, sigma), want, rtol=1e-9, atol=1e-9)
        close(sliced_loss(p.score, x, sigma, v=sign_vectors(x)), want, rtol=1e-9, atol=1e-9)
        n = seeded_noise(range(6), (2,), f64)
        # Tweedie: the score's regression error is the denoiser's, over sigma^4
        close(denoising_loss(p.score, x, sigma, n), (p(x + sigma[:, None] * n, sigma) - x).square().sum(1) / (2 * sigma**4), rtol=1e-8, atol=1e-8)
        assert (fisher_divergence(p.score, lambda x, s: score_of(p(x, s), x, s), x, sigma) < 1e-18).all()


def test_one_call_of_the_score():
    calls = []
    def score(x, *sigma):
        calls.append(sigma)
        return -x
    x = torch.zeros(3, 4)
    for loss in BY_DERIVATIVE:
        loss(score, x), loss(score, x, 0.5)
        assert calls == [(), (0.5,)]
        calls.clear()
    denoising_loss(score, x, 0.5), denoising_loss(score, x, 0.5, tell_sigma=False)
    assert calls == [(0.5,), ()]


@pytest.mark.parametrize("draw", [lambda g: sliced_loss(Net(), torch.ones(5, 2, dtype=f64), generator=g),
                                  lambda g: sliced_loss(Net(), torch.ones(5, 2, dtype=f64), distribution="gaussian", projections=3, generator=g),
                                  lambda g: denoising_loss(Net(), torch.ones(5, 2, dtype=f64), 0.5, generator=g)])
def test_a_generator_repeats_and_the_global_one_is_left_alone(draw):
    before = torch.get_rng_state()
    assert torch.equal(draw(gen(3)), draw(gen(3))) and not torch.equal(draw(gen(3)), draw(gen(4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(draw(gen()).unique()) > 1    # each sample has draws of its own


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_dtypes(dtype):
    net, x, n = Net(dtype=dtype), *seeded_noise([0, 1], (4, 2), dtype)
    wide = Net().to(f64)
    wide.load_state_dict(net.state_dict())
    for loss in (implicit_loss, lambda s, x: sliced_loss(s, x, v=n[None]), lambda s, x: denoising_loss(s, x, 0.5, n), lambda s, x: fisher_divergence(s, lambda x: -x, x)):
        got = loss(net, x)
        assert got.dtype == dtype
        close(got.double(), loss(wide, x.double()), rtol=1e-5, atol=1e-5)    # float32 has 7 digits
    other = f64 if dtype == torch.float32 else torch.float32    # draws and levels of another precision are taken over in x's
    assert sliced_loss(net, x, v=n[None].to(other)).dtype == denoising_loss(net, x, 0.5, n.to(other)).dtype == dtype
    assert sliced_loss(net, x).dtype == denoising_loss(net, x, torch.tensor(0.5, dtype=f64)).dtype == dtype
    close(sliced_loss(net, x, generator=gen()).double(), sliced_loss(wide, x.double(), generator=gen()), rtol=1e-5, atol=1e-5)    # the same signs


def test_a_score_in_another_precision():
    net, x = Net(dtype=torch.float32), seeded_noise(range(4), (2,), f64)
    for v in (sign_vectors(x), sign_vectors(x)[:1]):
        close(sliced_loss(lambda x: net(x.float()), x, v=v).float(), sliced_loss(net, x.float(), v=v), rtol=1e-5, atol=1e-5)
    close(implicit_loss(lambda x: net(x.float()), x).float(), implicit_loss(net, x.float()), rtol=1e-5, atol=1e-6)


def test_chunks_are_as_large_as_asked():
    calls = []
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return 2 * x
        @staticmethod
        def backward(ctx, g):
            calls.append(1)
            return 2 * g
    x = torch.ones(3, 6)
    for chunk_size, passes in ((None, 1), (1, 6), (2, 3), (4, 2)):
        calls.clear()
        with torch.no_grad(): assert implicit_loss(Double.apply, x, chunk_size=chunk_size).tolist() == [12. + 12.] * 3
        assert len(calls) == passes
    net, x = Net(), seeded_noise(range(4), (2,), f64)    # a graph that is needed for the next chunk too
    with torch.no_grad(): close(implicit_loss(net, x, chunk_size=1), implicit_loss(net, x), rtol=1e-12, atol=1e-12)


def test_without_gradients():
    "Evaluation under no_grad gives the same numbers and keeps no graph, and x stays as it was."
    net, x = Net(), seeded_noise(range(4), (2,), f64)
    for loss in (implicit_loss, lambda s, x: sliced_loss(s, x, generator=gen()), lambda s, x: denoising_loss(s, x, 0.5, generator=gen())):
        with torch.no_grad(): quiet = loss(net, x)
        loud = loss(net, x)
        assert not quiet.requires_grad and loud.requires_grad and not x.requires_grad
        close(quiet, loud.detach(), rtol=1e-12, atol=0)
    for p in net.parameters(): p.requires_grad_(False)
    close(implicit_loss(net, x).detach(), implicit_loss(Net(), x).detach(), rtol=1e-12, atol=0)    # a frozen network


def test_gradients_in_x():
    "x that wants a gradient gets the loss's own: by finite differences."
    net, x = Net(), seeded_noise(range(4), (2,), f64)
    for loss in (implicit_loss, lambda s, x: sliced_loss(s, x, generator=gen()), lambda s, x: denoising_loss(s, x, 0.5, generator=gen())):
        assert torch.autograd.gradcheck(lambda x: loss(net, x), (x.clone().requires_grad_(),))


def test_an_empty_batch():
    net, x = nn.Linear(2, 2), torch.zeros(0, 2)
    for loss in (implicit_loss, sliced_loss, lambda s, x: sliced_loss(s, x, projections=3, reduce_variance=False),
                 lambda s, x: denoising_loss(s, x, 0.5, tell_sigma=False), lambda s, x: fisher_divergence(s, s, x)): assert loss(net, x).shape == (0,)


@pytest.mark.parametrize("loss, sigma", [(implicit_loss, 0.), (lambda s, x: sliced_loss(s, x, generator=gen()), 0.),
                                         (lambda s, x: denoising_loss(s, x, 0.4, tell_sigma=False, generator=gen(1)), 0.4)])
def test_the_minimiser_is_the_score(loss, sigma):
    "Scores linear in 1, x_1, x_2 and x_1 x_2, so every loss is a parabola in 8 weights whose lowest point is one Newton step away."
    p = Gaussian(torch.tensor([0.5, -1.], dtype=f64), torch.tensor([0.7, 1.2]))
    x, zero = p.sample(40_000, gen()), torch.zeros(8, dtype=f64)
    features = lambda x: torch.stack([1 + 0 * x[:, 0], x[:, 0], x[:, 1], x[:, 0] * x[:, 1]], 1)
    value = lambda w: loss(lambda x: features(x) @ w.reshape(4, 2), x).mean()
    w = -torch.linalg.solve(torch.autograd.functional.hessian(value, zero), torch.autograd.functional.jacobian(value, zero))
    var = p.std**2 + sigma**2
    truth = torch.stack([p.mean / var, *torch.diag(-1 / var), torch.zeros(2, dtype=f64)])
    # over other seeds the worst of the 8 weights is off by up to 0.04, with DSM 0.05; the weights themselves are up to 2
    close(w.reshape(4, 2), truth, rtol=0, atol=0.1)


# ---- what is refused ----

X = torch.zeros(4, 2)
linear = nn.Linear(2, 2)
NOT_DIFFERENTIABLE = {"x detached": lambda x: linear(x.detach()), "output detached": lambda x: linear(x).detach(), "no_grad": torch.no_grad()(linear),
                      "numpy": lambda x: torch.from_numpy(-x.numpy()), "an array of numpy": lambda x: torch.as_tensor(np.sin(x)),
                      "constant": torch.zeros_like, "parameters without x": lambda x: linear.bias.expand(len(x), 2), "data": lambda x: torch.tensor(x.tolist())}


@pytest.mark.parametrize("loss", BY_DERIVATIVE)
@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
@pytest.mark.parametrize("grad", [True, False])
def test_refuses_what_autograd_cannot_see(loss, name, grad):
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="score must be a function of x that autograd can differentiate"):
        loss(NOT_DIFFERENTIABLE[name], X)
    if loss is sliced_loss:
        with pytest.raises(ValueError, match="score must be a function of x"): loss(NOT_DIFFERENTIABLE[name], X, projections=3)


def test_torch_func_alone_would_see_nothing():
    "Why the losses look for themselves; should this ever fail, they need not."
    assert (torch.func.jacrev(lambda x: linear(x.detach()))(torch.ones(2)) == 0).all()


@pytest.mark.parametrize("loss", BY_DERIVATIVE)
def test_other_errors_of_a_score_are_its_own(loss):
    def score(x): raise RuntimeError("out of cheese")
    with pytest.raises(RuntimeError, match="out of cheese"): loss(score, X)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="torch.no_grad"): loss(linear, X)


def test_a_staircase_has_no_trace():
    "It has a gradient, zero wherever one looks, so it can't be refused."
    x = seeded_noise(range(4), (2,), f64)
    close(implicit_loss(lambda x: -x.round(), x), x.round().square().sum(1) / 2, rtol=1e-12, atol=0)


LOSSES = {"implicit": implicit_loss, "sliced": sliced_loss, "denoising": lambda s, x, sigma=0.5: denoising_loss(lambda x, sigma: s(x), x, sigma),
          "fisher": lambda s, x, sigma=None: fisher_divergence(s, lambda x, *sigma: -x, x, sigma)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("score, got", [
    (lambda x: x.sum(1), r"torch.float32 of shape \(4,\)"),
    (lambda x: x[:1], r"torch.float32 of shape \(1, 2\)"),
    (lambda x: x.sum(1, keepdim=True), r"torch.float32 of shape \(4, 1\)"),
    (lambda x: x.T, r"torch.float32 of shape \(2, 4\)"),
    (lambda x: x.long(), r"torch.int64 of shape \(4, 2\)"),
    (lambda x: x.detach().numpy(), "ndarray"),
    (lambda x: (x, x), "tuple"),
    (lambda x: None, "NoneType"),
])
def test_refuses_a_score_of_another_kind(name, score, got):
    with pytest.raises(ValueError, match=r"score must return a floating-point tensor of x's shape \(4, 2\), got " + got): LOSSES[name](score, X)


def test_names_the_exact_score():
    with pytest.raises(ValueError, match=r"exact must return a floating-point tensor of x's shape \(4, 2\), got torch.float32 of shape \(4,\)"):
        fisher_divergence(lambda x: -x, lambda x: x.sum(1), X)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("x", [torch.zeros(4, 2, dtype=torch.int64), torch.tensor(0.), [[0., 0.]], np.zeros((4, 2))])
def test_refuses_samples_of_another_kind(name, x):
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor \(B, \*event\), got"): LOSSES[name](lambda x: -x, x)


@pytest.mark.parametrize("sigma", [0., -1., math.nan, math.inf, torch.tensor([1., 1., 0., 1.]), torch.tensor(-1.)])
def test_denoising_needs_positive_sigma(sigma):
    for told in (True, False):
        with pytest.raises(ValueError, match="sigma must be positive and finite"): denoising_loss(lambda x, *sigma: -x, X, sigma, tell_sigma=told)


@pytest.mark.parametrize("name", ["implicit", "sliced", "fisher"])
def test_sigma_that_is_only_told_may_be_zero_but_not_negative(name):
    score = lambda x, sigma: -x
    assert LOSSES[name](score, X, 0.).shape == (4,)
    for sigma in (-1., math.nan, torch.tensor([1., 1., -2., 1.])):
        with pytest.raises(ValueError, match="sigma must be 0 or more and finite"): LOSSES[name](score, X, sigma)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sigma", [torch.ones(3), torch.ones(4, 1), torch.ones(4, 2)])
def test_refuses_sigma_of_a_wrong_shape(name, sigma):
    with pytest.raises(ValueError, match=r"sigma must be a float, 0-d or \(4,\)"): LOSSES[name](lambda x, *sigma: -x, X, sigma)


@pytest.mark.parametrize("make, message", [
    (lambda: denoising_loss(linear, X, 0.5, torch.zeros(4, 1), tell_sigma=False), r"n must have shape \(4, 2\), got shape \(4, 1\)"),
    (lambda: denoising_loss(linear, X, 0.5, torch.zeros(2), tell_sigma=False), r"n must have shape \(4, 2\), got shape \(2,\)"),
    (lambda: sliced_loss(linear, X, projections=0), "projections must be at least 1, got 0"),
    (lambda: sliced_loss(linear, X, distribution="uniform"), "distribution must be 'rademacher' or 'gaussian', got 'uniform'"),
    (lambda: sliced_loss(linear, X, v=torch.ones(4, 2)), r"v must be \(V, 4, 2\), .* got \(4, 2\)"),
    (lambda: sliced_loss(linear, X, v=torch.ones(3, 1, 2)), r"v must be \(V, 4, 2\), .* got \(3, 1, 2\)"),
    (lambda: sliced_loss(linear, X, v=torch.ones(0, 4, 2)), r"v must be \(V, 4, 2\), .* got \(0, 4, 2\)"),
])
def test_refused_draws(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_on_a_gpu():
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    net, x, n = Net((1, 2, 2)), *seeded_noise([0, 1], (4, 1, 2, 2), f64)
    sigma = torch.tensor([0.1, 0.5, 1., 2.])
    losses = (lambda s, x: implicit_loss(s, x, sigma), lambda s, x: sliced_loss(s, x, 0.5, projections=3, generator=gen()), lambda s, x: sliced_loss(s, x, v=n[None]),
              lambda s, x: denoising_loss(s, x, sigma, generator=gen()), lambda s, x: denoising_loss(s, x, 0.5, n), lambda s, x: fisher_divergence(s, lambda x: -x, x))
    here = [loss(net, x).detach() for loss in losses]
    net.cuda()
    for want, loss in zip(here, losses): close(loss(net, x.cuda()).detach().cpu(), want, rtol=1e-9, atol=1e-9)
