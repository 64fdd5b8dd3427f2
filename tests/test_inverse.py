"Operators against their matrices, the exact posterior against Gaussian conditioning, methods against the exact posterior, and what they refuse."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from ddpm_edm.core import CountNFE, score_of, seeded_noise
from ddpm_edm.edm import Churn
from ddpm_edm.guidance import Guided
from ddpm_edm.inverse import (Blur, Downsample, Grayscale, LinearOp, Mask, Matrix, PiGDM, Posterior, Replaced, Tweedie,
                              check_adjoint, dps, keep, repaint, smc)
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.oracle import Mixture
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.solvers import (adaptive, ancestral, deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_sde, euler, euler_ancestral, generate, heun, sample,
                              second_order, unipc)
from ddpm_edm.unet import UNet

SHAPE = (3, 6, 4)
D = math.prod(SHAPE)


def f64(*values): return torch.tensor(values, dtype=torch.float64)
def close(a, b, atol): torch.testing.assert_close(a, b, atol=atol, rtol=0)
def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def some_mask(seed): return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) < 0.5


OPS = {"mask": lambda seed, noise: Mask(some_mask(seed), noise), "mask of a channel": lambda seed, noise: Mask(some_mask(seed)[0], noise),
       "mask (1, H, W)": lambda seed, noise: Mask(some_mask(seed)[:1], noise), "half": lambda seed, noise: Downsample(2, noise),
       "blur": lambda seed, noise: Blur(0.33, noise), "motion": lambda seed, noise: Blur(randn(3, 2, seed=seed), noise),
       "grey": lambda seed, noise: Grayscale(noise=noise), "matrix": lambda seed, noise: Matrix(randn(5, D, seed=seed), SHAPE, noise),
       "rank 2": lambda seed, noise: Matrix(randn(5, 2, seed=seed) @ randn(2, D, seed=seed + 1), SHAPE, noise)}
ops = st.builds(lambda name, seed, noise: OPS[name](seed, noise), st.sampled_from([*OPS]), st.integers(0, 1000), st.sampled_from([0., 0.05, 0.7]))


def conditioning(A, noise, mean, cov, y):
    "Mean and covariance of x0 given y, with x0 ~ N(mean, cov), by the joint Gaussian; a pseudo-inverse serves noise 0."
    S = A @ cov @ A.T + noise**2 * torch.eye(len(A), dtype=A.dtype)
    gain = cov @ A.T @ torch.linalg.pinv(S, rtol=1e-10, hermitian=True)
    return mean + gain @ (y - A @ mean), cov - gain @ A @ cov


# ---- operators

@settings(max_examples=40, deadline=None)
@given(ops, st.integers(0, 1000))
def test_operator_is_its_matrix(op, seed):
    A = Matrix.of(op, SHAPE).A
    x = randn(2, *SHAPE, seed=seed)
    y = op(x)
    z = randn(*y.shape, seed=seed + 1)
    close(y.flatten(1), x.flatten(1) @ A.T, 1e-12)
    close(op.adjoint(z).flatten(1), z.flatten(1) @ A, 1e-12)
    pinv = torch.linalg.pinv(A, rtol=1e-5)    # singular values kept are within 1e-3 of the largest (Blur) or far above 1e-5 (Matrix)
    close(op.pinv(y).flatten(1), y.flatten(1) @ pinv.T, 1e-6)    # condition up to 1e3 for waves, squared in A A^T: 1e6 * 1e-16 * numbers of some 10
    values, U = torch.linalg.eigh(A @ A.T)
    f = lambda v: 1 / (0.3 * v + 0.5)
    wanted = z.flatten(1) @ U * torch.where(values > 1e-9 * values.max(), f(values), 0.) @ U.T
    close(op.spectral(f, z).flatten(1), wanted, 1e-8)
    close(op(op.project(randn(2, *SHAPE, seed=seed + 2), y)), y, 1e-7)
    check_adjoint(op, SHAPE)


@settings(max_examples=20, deadline=None)
@given(ops, st.floats(1.001, 3.), st.integers(0, 100))
def test_dot_test_finds_a_wrong_adjoint(op, factor, seed):
    if isinstance(op, Mask) and not op.mask.any(): return
    good, apply = op.adjoint, type(op).__call__
    op.adjoint = lambda y: factor * good(y)
    with pytest.raises(ValueError, match="dot test"): check_adjoint(op, SHAPE)
    for method in (PiGDM, Tweedie, Replaced, lambda d, op, y: keep(heun, op, y), lambda d, op, y: dps(heun, op, y), lambda d, op, y: Posterior(PRIOR, op, y)):
        op.noise = 0.
        with pytest.raises(ValueError, match="dot test"): method(PRIOR, op, apply(op, randn(1, *SHAPE)))


def test_other_wrong_operators():
    class Flipped(Blur):
        def adjoint(self, y): return self(y)    # right for symmetric kernels only
    check_adjoint(Flipped(0.33), SHAPE)
    with pytest.raises(ValueError, match="dot test"): check_adjoint(Flipped(f64([0.1, 0.2, 0.7])), SHAPE)

    class Affine(Downsample):
        def __call__(self, x): return super().__call__(x) + 0.1
    with pytest.raises(ValueError, match="dot test"): check_adjoint(Affine(2), SHAPE)

    class Shape(Downsample):
        def adjoint(self, y): return y
    with pytest.raises(ValueError, match=r"op.adjoint must return samples of shape \(1, 3, 6, 4\), got \(1, 3, 3, 2\)"): check_adjoint(Shape(2), SHAPE)

    class Spectral(Downsample):
        def spectral(self, f, y): return y * f(y.new_tensor(1.))
    with pytest.raises(ValueError, match="op.spectral must apply f to A A"): check_adjoint(Spectral(2), SHAPE)

    class Broken(Downsample):
        def adjoint(self, y): return super().adjoint(y) * math.nan
    with pytest.raises(ValueError, match="dot test"): check_adjoint(Broken(2), SHAPE)
    for call in (lambda: LinearOp()(None), lambda: LinearOp().adjoint(None), lambda: LinearOp().spectral(None, None)):
        with pytest.raises(NotImplementedError, match="an operator must have"): call()


def test_known_values():
    x = torch.arange(16.).reshape(1, 1, 4, 4)
    assert Downsample(2)(x).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert Downsample(2).adjoint(torch.ones(1, 1, 2, 2)).unique().tolist() == [0.25]
    close(Grayscale()(torch.tensor([1., 0, -1]).reshape(1, 3, 1, 1)), torch.tensor(0.185).reshape(1, 1, 1, 1), 1e-6)
    spot = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    spot[0, 0, 2, 0] = 1.
    right = Blur(f64([0., 0., 1.]))(spot)    # the kernel's middle is the pixel itself: one step to the right
    close(right[0, 0, 2], f64(0., 1, 0, 0, 0), 1e-12)
    round_the_edge = Blur(f64([1., 0., 0.]))(spot)
    close(round_the_edge[0, 0, 2], f64(0., 0, 0, 0, 1), 1e-12)
    bell = Blur(0.6)(spot)
    assert abs(bell.sum() - 1) < 1e-12 and bell[0, 0, 2].argmax() == 0 and abs(bell[0, 0, 2, 1] - bell[0, 0, 2, 4]) < 1e-12
    assert torch.equal(Mask(torch.eye(4))(x), x * torch.eye(4))
    assert (Mask(torch.eye(4)).noise, Downsample(2, 0.3).noise) == (0., 0.3)


@pytest.mark.parametrize("make, message", [
    (lambda: Mask(torch.ones(2, 2), noise=-0.1), "noise must be 0 or more and finite, got -0.1"),
    (lambda: Downsample(2, math.nan), "noise must be 0 or more"),
    (lambda: Blur(1., math.inf), "noise must be 0 or more"),
    (lambda: Grayscale(noise=-1.), "noise must be 0 or more"),
    (lambda: Matrix(torch.eye(2), (2,), -1.), "noise must be 0 or more"),
    (lambda: Mask(torch.tensor([0., 0.5, 1.])), r"mask must be binary, 1 for known and 0 for lost, got \[0.5\]"),
    (lambda: Mask(torch.tensor([0., math.nan])), r"mask must be binary.*got \[nan\]"),
    (lambda: Mask(torch.tensor([0, 255])), r"mask must be binary.*got \[255\]"),
    (lambda: Mask(torch.ones(7, 4))(torch.zeros(1, *SHAPE)), r"mask must have the shape of a sample, \(3, 6, 4\), or of a channel, got \(7, 4\)"),
    (lambda: Mask(torch.ones(1, 4))(torch.zeros(1, *SHAPE)), r"mask must have the shape of a sample"),
    (lambda: Mask(torch.ones(2, 6, 4))(torch.zeros(1, *SHAPE)), r"mask must have the shape of a sample"),
    (lambda: Mask(torch.tensor(1.))(torch.zeros(1, 3)), r"mask must have the shape of a sample"),
    (lambda: Downsample(0), "factor must be a whole number and at least 1"),
    (lambda: Downsample(4)(torch.zeros(1, *SHAPE)), r"factor 4 must divide height and width"),
    (lambda: Downsample(2)(torch.zeros(4, 4)), r"factor 2 must divide"),
    (lambda: Grayscale()(torch.zeros(1, 1, 2, 2)), r"x must be images \(B, 3, H, W\), got shape \(1, 1, 2, 2\)"),
    (lambda: Grayscale((0., 0.)), "weights must be one number for each channel, not all 0"),
    (lambda: Blur(0.), r"kernel must be \(h, w\) or a positive number"),
    (lambda: Blur(torch.ones(3)), r"kernel must be \(h, w\), finite and not all 0, got shape \(3,\)"),
    (lambda: Blur(torch.zeros(3, 3)), r"kernel must be \(h, w\), finite and not all 0"),
    (lambda: Blur(1.)(torch.zeros(1, *SHAPE)), "kernel of 7 x 7 must fit into images"),
    (lambda: Matrix(torch.ones(2, 3), (4,)), r"A must be finite and \(m, 4\) for samples of shape \(4,\), got shape \(2, 3\)"),
    (lambda: Matrix(torch.full((2, 3), math.nan), (3,)), "A must be finite"),
    (lambda: Matrix(torch.eye(3), (3,))(torch.zeros(1, 4)), r"x must be samples of shape \(3,\), got shape \(1, 4\)"),
    (lambda: Matrix(torch.eye(3), (3,)).adjoint(torch.zeros(1, 4)), r"y must be \(B, 3\), got shape \(1, 4\)"),
])
def test_operators_refuse(make, message):
    with pytest.raises(ValueError, match=message): make()


# ---- the exact posterior

PRIOR = Mixture(randn(3, *SHAPE, seed=5), f64(0.4, 0.7, 1.1), f64(0.2, 0.5, 0.3))


@settings(max_examples=25, deadline=None)
@given(ops, st.floats(0.05, 5.), st.integers(0, 1000))
def test_posterior_is_gaussian_conditioning(op, sigma, seed):
    A = Matrix.of(op, SHAPE).A
    y = op(randn(1, *SHAPE, seed=seed)) + op.noise * op(randn(1, *SHAPE, seed=seed + 1))
    post = Posterior(PRIOR, op, y)
    m, C = zip(*(conditioning(A, op.noise, mu.flatten(), s**2 * torch.eye(D, dtype=A.dtype), y.flatten()) for mu, s in zip(PRIOR.means, PRIOR.stds)))
    m = torch.stack(m)
    keep_rows = torch.linalg.svd(A)    # evidence only along what A reaches: elsewhere y is the same for all components
    r = int((keep_rows.S > 1e-4 * keep_rows.S.max()).sum()) if A.any() else 0
    Ur = keep_rows.U[:, :r]
    def evidence(mu, s):
        B = Ur.T @ A
        return MultivariateNormal(B @ mu.flatten(), s**2 * B @ B.T + op.noise**2 * torch.eye(r, dtype=A.dtype)).log_prob(Ur.T @ y.flatten()) if r else f64(0.)[0]
    weights = (PRIOR.weights.log() + torch.stack([evidence(mu, s) for mu, s in zip(PRIOR.means, PRIOR.stds)])).softmax(0)
    close(post.weights, weights, 1e-7)
    close(post.mean.flatten(), weights @ m, 1e-6)
    cov = sum(w * (c + torch.outer(v - weights @ m, v - weights @ m)) for w, c, v in zip(weights, C, m))
    close(post.cov, cov, 1e-6)
    x = randn(4, *SHAPE, seed=seed + 2) * (1 + sigma)
    parts = torch.stack([MultivariateNormal(v, (c + c.T) / 2 + sigma**2 * torch.eye(D, dtype=A.dtype)).log_prob(x.flatten(1)) for v, c in zip(m, C)], 1)
    close(post.log_prob(x, sigma), (parts + weights.log()).logsumexp(1), 1e-5 / sigma**2)
    x.requires_grad_()
    grad, = torch.autograd.grad(post.log_prob(x, sigma).sum(), x)
    close(score_of(post(x, sigma), x, sigma), grad, 1e-8 / sigma**2)    # float64, divided by sigma^2


def test_posterior_differs_from_the_prior_by_the_gradient_of_the_evidence():
    op = Matrix(randn(2, 3, seed=1), (3,), 0.4)
    prior, y, sigma = Mixture(randn(2, 3, seed=2), f64(0.5, 0.8), f64(0.3, 0.7)), f64([0.3, -0.5]), 0.6
    x = randn(5, 3, seed=3).requires_grad_()
    # p(y | x) = sum_k p(k | x) N(y; A D_k, A (s^2 sigma^2 / (s^2 + sigma^2)) A^T + noise^2)
    parts = []
    for mu, s in zip(prior.means, prior.stds):
        keep_share = s**2 / (s**2 + sigma**2)
        cov = keep_share * sigma**2 * op.A @ op.A.T + op.noise**2 * torch.eye(2, dtype=torch.float64)
        parts.append(MultivariateNormal((mu + keep_share * (x - mu)) @ op.A.T, cov).log_prob(y))
    log_y = (torch.stack(parts, 1) + prior._parts(x, sigma)[0].log_softmax(1)).logsumexp(1)
    push, = torch.autograd.grad(log_y.sum(), x)
    x = x.detach()
    close(Posterior(prior, op, y)(x, sigma), prior(x, sigma) + sigma**2 * push, 1e-8)


def test_posterior_samples():
    op = Matrix(f64([0.8, 0.6]), (2,), 0.25)
    prior = Mixture(f64([-1.2, 1.0], [0., -1.], [0.9, 0.5]), f64(0.3, 0.35, 0.25), f64(0.5, 0.3, 0.2))
    post, n = Posterior(prior, op, f64([-0.2])), 40_000
    x = post.sample(n, torch.Generator().manual_seed(0))
    assert ((x.mean(0) - post.mean).abs() < 5 * (post.cov.diag() / n).sqrt()).all()    # five standard errors
    spread = (x - post.mean)[:, :, None] * (x - post.mean)[:, None]
    assert ((spread.mean(0) - post.cov).abs() < 5 * spread.std(0) / n**0.5).all()
    share = prior._parts(x, 0.)[0].softmax(1)
    assert ((share.mean(0) - post.weights).abs() < 5 * share.std(0) / n**0.5 + 1e-6).all()
    close(post.weights, f64(0.721654, 0.277446, 0.000900), 1e-6)    # golden, from w N(y; A mu, s^2 + noise^2) by hand
    ends = sample(post, seeded_noise(range(2000), (2,), torch.float64), karras_sigmas(40))
    assert ((ends.mean(0) - post.mean).abs() < 5 * (post.cov.diag() / 2000).sqrt()).all()


def test_posterior_refuses():
    op, y = Downsample(2), torch.zeros(1, 3, 3, 2)
    with pytest.raises(ValueError, match="y must be one observation"): Posterior(PRIOR, op, y.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"y must be one observation of a sample of shape \(3, 6, 4\), got 1 of \(3, 8, 4\)"): Posterior(PRIOR, op, torch.zeros(1, 3, 4, 2))
    with pytest.raises(ValueError, match="prior must have stds above 0 where op.noise is 0"): Posterior(Mixture(PRIOR.means, 0.), op, y)
    Posterior(Mixture(PRIOR.means, 0.), Downsample(2, 0.1), y)
    with pytest.raises(ValueError, match=r"x must be \(B, \*event\)"): Posterior(PRIOR, op, y)(torch.zeros(1, 3), 1.)
    with pytest.raises(ValueError, match="sigma must be positive"): Posterior(PRIOR, op, y).log_prob(torch.zeros(1, *SHAPE))    # the density is infinite
    assert Posterior(PRIOR, Downsample(2, 0.1), y).log_prob(torch.zeros(1, *SHAPE)).isfinite()


# ---- denoisers

@settings(max_examples=30, deadline=None)
@given(ops, st.floats(0.02, 30.), st.floats(0.2, 2.), st.integers(0, 1000), st.booleans())
def test_pigdm_is_exact_on_one_gaussian(op, sigma, s, seed, one):
    prior = Mixture(randn(1, *SHAPE, seed=seed), s)
    x, y = randn(3, *SHAPE, seed=seed + 1) * (1 + sigma), op(randn(1, *SHAPE, seed=seed + 2))
    level = sigma if one else torch.tensor([sigma, 2 * sigma, 3 * sigma], dtype=torch.float64)
    wanted = Posterior(prior, op, y)(x, level)
    close(PiGDM(prior, op, y, s)(x, level), wanted, 1e-6 * (1 + sigma))    # waves of 1/1000, squared, times 1e-16, times x


def test_tweedie_is_exact_on_any_gaussian():
    root, A, x = randn(4, 4, seed=1), randn(2, 4, seed=2), randn(6, 4, seed=3)
    mean, cov = randn(4, seed=4), root @ root.T
    def gaussian(mean, cov):
        return lambda x, sigma: mean + (x - mean) @ torch.linalg.solve(cov + sigma**2 * torch.eye(4, dtype=torch.float64), cov)
    for op in (Matrix(A, (4,), 0.3), Matrix(A, (4,)), Mask(torch.tensor([1, 0, 1, 0]), 0.1), Mask(torch.tensor([1, 0, 0, 1]))):
        y = op(randn(1, 4, seed=5))
        given_y = gaussian(*conditioning(Matrix.of(op, (4,)).A, op.noise, mean, cov, y[0]))
        for sigma in (0.1, 1., 5.):
            close(Tweedie(gaussian(mean, cov), op, y, iterations=2)(x, sigma), given_y(x, sigma), 1e-8)
            close(Tweedie(gaussian(mean, cov), op, y, iterations=9)(x, sigma), given_y(x, sigma), 1e-8)    # nothing happens after the solution
            assert (PiGDM(gaussian(mean, cov), op, y, 1.)(x, sigma) - given_y(x, sigma)).abs().max() > 1e-5


def test_pigdm_with_no_spread_is_dps_as_derived():
    op, y, x = Downsample(2, 0.5), torch.zeros(1, 3, 3, 2, dtype=torch.float64), randn(2, *SHAPE)
    point = x.clone().requires_grad_()
    loss = -(y - op(PRIOR(point, 0.8))).square().sum() / (2 * 0.5**2)
    wanted = PRIOR(x, 0.8) + 0.8**2 * torch.autograd.grad(loss, point)[0]
    close(PiGDM(PRIOR, op, y, 0.)(x, 0.8), wanted, 1e-10)


@settings(max_examples=20, deadline=None)
@given(ops, st.floats(0.05, 10.), st.integers(0, 1000))
def test_replaced_keeps_what_is_seen_and_what_is_not(op, sigma, seed):
    op.noise = 0.
    y, x = op(randn(1, *SHAPE, seed=seed)), randn(2, *SHAPE, seed=seed + 1)
    free, fixed = PRIOR(x, sigma), Replaced(PRIOR, op, y)(x, sigma)
    close(op(fixed), y.expand(2, *y.shape[1:]), 1e-7)
    blind = lambda v: v - op.pinv(op(v))
    close(blind(fixed), blind(free), 1e-7)
    if isinstance(op, Mask): assert torch.equal(fixed, torch.where(op.mask, y, free))


def test_values_in_the_hole_do_not_matter():
    mask = some_mask(3)
    y, x = randn(1, *SHAPE), randn(2, *SHAPE, seed=1)
    filled, holed = torch.where(mask, y, 7.), torch.where(mask, y, math.nan)
    for method in (lambda y: Replaced(PRIOR, Mask(mask), y), lambda y: PiGDM(PRIOR, Mask(mask, 0.1), y), lambda y: Tweedie(PRIOR, Mask(mask), y), lambda y: Posterior(PRIOR, Mask(mask), y)):
        assert torch.equal(method(filled)(x, 0.7), method(holed)(x, 0.7))
    ends = [sample(PRIOR, x, karras_sigmas(3), keep(heun, Mask(mask), v)) for v in (filled, holed)]
    assert torch.equal(*ends) and ends[0].isfinite().all()
    with pytest.raises(ValueError, match="y must be finite where it is known"): Replaced(PRIOR, Mask(mask), torch.where(mask, math.nan, y))


def test_one_y_for_all_or_one_for_each():
    op, x = Downsample(2), randn(3, *SHAPE)
    y = op(randn(3, *SHAPE, seed=1))
    for make in (Replaced, PiGDM, Tweedie):
        each = make(PRIOR, op, y)(x, 0.7)
        for i in range(3): close(make(PRIOR, op, y[i:i + 1])(x, 0.7)[i], each[i], 1e-9)
        with pytest.raises(ValueError, match=r"y must be of 1 or 2 samples of shape \(3, 6, 4\), got 3 of \(3, 6, 4\)"): make(PRIOR, op, y)(x[:2], 0.7)
        with pytest.raises(ValueError, match=r"samples of shape \(3, 4, 4\), got 3 of \(3, 6, 4\)"): make(PRIOR, op, y)(x[:, :, :4], 0.7)


@pytest.mark.parametrize("make, message", [
    (lambda op, y: Replaced(PRIOR, Downsample(2, 0.1), y), "op.noise must be 0, since replacement takes y at its word, got 0.1"),
    (lambda op, y: keep(heun, Downsample(2, 0.1), y), "op.noise must be 0 to keep y exactly"),
    (lambda op, y: PiGDM(PRIOR, op, y, -1.), "sigma_data must be positive and finite"),
    (lambda op, y: PiGDM(PRIOR, op, y, 0.), "sigma_data must be positive and finite, or 0 if y is noisy"),
    (lambda op, y: PiGDM(PRIOR, op, y, math.nan), "sigma_data must be positive"),
    (lambda op, y: Tweedie(PRIOR, op, y, iterations=0), "iterations must be a whole number and at least 1"),
    (lambda op, y: dps(heun, op, y, -1.), "zeta must be 0 or more and finite"),
    (lambda op, y: repaint(heun, 0), "times must be a whole number and at least 1"),
    (lambda op, y: PiGDM(PRIOR, op, y.long()), r"y must be a floating-point tensor \(B, \*\), got torch.int64"),
    (lambda op, y: PiGDM(PRIOR, op, [1.]), r"y must be a floating-point tensor \(B, \*\), got list"),
    (lambda op, y: PiGDM(PRIOR, op, y[0, 0, 0]), r"y must be a floating-point tensor"),
    (lambda op, y: PiGDM(PRIOR, Mask(torch.ones(6, 4)), y), r"mask must have the shape of a sample, \(3, 3, 2\)"),
    (lambda op, y: Replaced(PRIOR, Grayscale(), y), r"y must have the shape of A x, \(1, 1, 3, 2\), got \(1, 3, 3, 2\)"),
    (lambda op, y: PiGDM(PRIOR, op, y * math.inf), "y must be finite"),
])
def test_methods_refuse(make, message):
    with pytest.raises(ValueError, match=message): make(Downsample(2), torch.ones(1, 3, 3, 2))


# ---- steps

def test_repaint_counts_and_is_the_step_once():
    noise, levels = randn(4, *SHAPE), karras_sigmas(4)
    close(sample(PRIOR, noise, levels, repaint(heun, 1)), sample(PRIOR, noise, levels, heun), 1e-15)
    count, drawn = CountNFE(PRIOR), []
    def draw(x, sigma, sigma_next): return drawn.append((sigma, sigma_next)) or torch.zeros_like(x)
    sample(count, noise, levels, repaint(euler, 3, draw))
    assert count.nfe == 12 and drawn == [(a, b) for a, b in zip(levels.tolist(), levels.tolist()[1:]) for _ in range(2)]
    torch.manual_seed(0)
    big, _ = repaint(lambda d, x, s, t, c=None: (x * 0, c), 2)(None, torch.zeros(100_000, dtype=torch.float64), 2., 1.2)
    assert big.abs().max() == 0
    seen = []
    repaint(lambda d, x, s, t, c=None: (seen.append(x) or x * 0, c), 2)(None, torch.zeros(100_000, dtype=torch.float64), 2., 1.2)
    assert abs(seen[1].var() - (2**2 - 1.2**2)) < 5 * (2 / 1e5)**0.5 * 2.56    # five standard errors of a variance


def test_repaint_mends_what_replacement_gets_wrong():
    prior = Mixture(f64([-1.2, 1.0], [0., -1.], [0.9, 0.5], [1.2, -0.6]), f64(0.3, 0.35, 0.25, 0.3), f64(0.4, 0.25, 0.15, 0.2))
    op, y = Mask(torch.tensor([1, 0])), f64([0.45, 0.])
    post, noise = Posterior(prior, op, y), seeded_noise(range(1000), (2,), torch.float64)
    torch.manual_seed(0)
    off = [(sample(Replaced(prior, op, y), noise, karras_sigmas(60), repaint(euler_ancestral(), k)) - post.mean).mean(0).norm().item() for k in (1, 12)]
    assert off[0] > 0.25 and off[1] < 0.15    # the standard error is .023; the biases found are .37 and .06


def test_dps_moves_by_the_gradient():
    s, zeta, sigma, sigma_next = 0.7, 0.2, 1.5, 0.9
    prior, op = Mixture(torch.zeros(1, 2, dtype=torch.float64), s), Matrix(f64([1., 2.]), (2,))
    x, y = randn(3, 2), f64([0.4])
    plain, _ = heun(prior, x, sigma, sigma_next)
    moved, _ = dps(heun, op, y, zeta)(prior, x, sigma, sigma_next)
    c = s**2 / (s**2 + sigma**2)    # D = c x
    way = torch.sign(y - c * op(x)) * c * op.A    # minus the gradient of |y - c A x|
    close(moved, plain + 2 * zeta * ((1 + sigma**2) * (1 + sigma_next**2))**0.5 * way, 1e-12)
    close(dps(heun, op, y, 0.)(prior, x, sigma, sigma_next)[0], plain, 1e-15)
    count = CountNFE(prior)
    sample(count, x, karras_sigmas(5), dps(heun, op, y, 0.01))
    assert count.nfe == 2 * 5 - 1    # the gradient's evaluation serves the step too


# ---- sequential Monte Carlo

FOUR = Mixture(f64([-1.2, 1.0], [0., -1.], [0.9, 0.5], [1.2, -0.6]), f64(0.3, 0.35, 0.25, 0.3), f64(0.4, 0.25, 0.15, 0.2))


def smc_errors(prior, op, y, spread, levels, K, runs=8):
    "Errors of mean and covariance, averaged over runs, and their standard errors."
    g, post, found = torch.Generator().manual_seed(0), Posterior(prior, op, y), []
    for _ in range(runs):
        p = smc(PiGDM(prior, op, y, spread), torch.randn(K, 2, generator=g, dtype=torch.float64), levels, g)
        assert abs(p.weights.sum() - 1) < 1e-12 and p.samples.shape == (K, 2) and p.ess.shape == (len(levels) - 1,) and (p.ess <= K + 1e-6).all() and (p.ess >= 1).all()
        mean = p.weights @ p.samples
        found.append(torch.cat([mean, ((p.weights[:, None] * (p.samples - mean)).T @ (p.samples - mean)).flatten()]))
    found = torch.stack(found)
    return found.mean(0) - torch.cat([post.mean, post.cov.flatten()]), found.std(0) / runs**0.5


@pytest.mark.parametrize("n", [4, 12])
def test_smc_is_exact_on_one_gaussian_with_steps_of_any_size(n):
    off, se = smc_errors(Mixture(f64([0.5, -0.5]), 0.8), Matrix(f64([0.8, 0.6]), (2,), 0.4), f64([1.2]), 0.8, karras_sigmas(n, 0.01, 40.), 4000)
    assert (off.abs() < 5 * se + 1e-3).all() and (se < 0.01).all(), (off, se)    # five standard errors; 1e-4 is the variance left at .01, and the start has mean 0


def test_smc_on_a_mixture():
    off, se = smc_errors(FOUR, Matrix(f64([0.8, 0.6]), (2,), 0.25), f64([-0.2]), 0.977, karras_sigmas(100, 0.01, 40.), 500)
    assert (off.abs() < 5 * se + 0.03).all(), (off, se)    # five standard errors, and .03 for steps of finite size (found: .03 at 100 levels, .01 at 300)


def test_smc_that_must_resample():
    op, y, levels = Mask(torch.tensor([1, 0])), f64([0.45, 0.]), karras_sigmas(100, 0.01, 40.)
    off, se = smc_errors(FOUR, op, y, 0.977, levels, 1000)
    assert (off.abs() < 5 * se + 0.03).all() and (se < 0.06).all(), (off, se)
    ess = smc(PiGDM(FOUR, op, y, 0.977), randn(1000, 2), levels, torch.Generator().manual_seed(0)).ess
    low = (ess[:-1] < 500).nonzero().flatten()
    assert len(low) and (ess[low + 1] > 600).all() and ess[-1] > 400    # all alike after a resampling; without any, 130 are left


def test_smc_without_noise_ends_on_y():
    prior = Mixture(f64([-1., 0], [1, 0.5]), 0.4)
    op, y = Mask(torch.tensor([1, 0])), f64([0.3, math.nan])
    p = smc(PiGDM(prior, op, y), randn(64, 2), karras_sigmas(20), torch.Generator().manual_seed(0))
    assert (p.samples[:, 0] == 0.3).all() and p.samples.isfinite().all()
    again = smc(PiGDM(prior, op, y), randn(64, 2), karras_sigmas(20), torch.Generator().manual_seed(0))
    assert torch.equal(p.samples, again.samples) and torch.equal(p.weights, again.weights)


def test_smc_resamples_by_weight():
    prior, op = Mixture(f64([-1.], [1.]), 0.05), Matrix(f64([1.]), (1,), 0.1)
    p = smc(PiGDM(prior, op, f64([1.]), 1.), randn(400, 1), karras_sigmas(60, 0.01, 40.), torch.Generator().manual_seed(0))
    assert (p.samples > 0).double().mean() > 0.9 and p.ess.min() < 400 and p.ess[-1] > 100    # those at -1 have died out


def test_smc_refuses():
    op, y = Downsample(2, 0.1), torch.zeros(1, 3, 3, 2, dtype=torch.float64)
    model, noise = PiGDM(PRIOR, op, y), randn(4, *SHAPE)
    with pytest.raises(ValueError, match="sigmas must end in 0, got 1"): smc(model, noise, f64(3., 2., 1.))
    with pytest.raises(ValueError, match="sigmas must hold at least 3 values"): smc(model, noise, f64(3., 0.))
    with pytest.raises(ValueError, match="y must be one observation for all particles, got 4"): smc(PiGDM(PRIOR, op, y.repeat(4, 1, 1, 1)), noise, karras_sigmas(3))
    with pytest.raises(ValueError, match="the same for all particles"): smc(model, noise, karras_sigmas(3), labels=torch.arange(4))


# ---- all of it at once

torch.manual_seed(0)
NET = EDMPrecond(UNet(1, channels=8, mults=(1, 2), attention=(), head_dim=None, num_labels=3), 0.6).eval()
for parameter in NET.parameters(): parameter.data += 0.02 * torch.randn_like(parameter)    # a fresh network answers 0
STEPS = {"euler": euler, "heun": heun, "ralston": second_order(2 / 3), "deis": deis(3), "dpmpp_2m": dpmpp_2m, "dpmpp_3m": dpmpp_3m, "unipc": unipc(), "adaptive": adaptive(rtol=0.5, h_init=0.5),
         "ancestral": euler_ancestral(), "heun ancestral": ancestral(heun), "2m sde": dpmpp_2m_sde(), "sde": dpmpp_sde(), "repaint": repaint(euler_ancestral(), 2)}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([*STEPS]), st.sampled_from([Replaced, PiGDM, Tweedie, None]), st.floats(0, 3), st.sampled_from([(0., math.inf), (0.1, 5.), (3., 4.)]),
       st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**16))
def test_guidance_interval_inpainting_and_any_solver_in_one_call(step, method, w, interval, batch, n, seed):
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) < 0.4
    y = torch.where(mask, torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), math.nan)
    op, labels, seeds = Mask(mask), torch.tensor([0, 2, -1]), range(seed, seed + 3)
    model = Guided(NET, w, interval=interval)
    solver = STEPS[step]
    if method is None: solver = dps(solver, op, y, 0.05)    # DPS pushes the step, not the denoiser
    else: model = method(model, op, y)
    torch.manual_seed(seed)
    x = generate(model, seeds, (1, 8, 8), karras_sigmas(n), keep(solver, op, y), labels=labels, batch=batch)
    assert x.shape == (3, 1, 8, 8) and x.dtype == torch.float32 and x.isfinite().all()
    assert torch.equal(x[:, mask[None]], y[:, mask[None]].expand(3, -1))    # bit for bit


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["euler", "heun", "deis", "dpmpp_2m", "unipc"]), st.integers(1, 3), st.booleans())
def test_batches_do_not_matter(step, batch, keeps):
    op = Downsample(2)
    y = op(torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    solver = keep(STEPS[step], op, y) if keeps else STEPS[step]
    def run(batch): return generate(PiGDM(Guided(NET, 1.5), op, y), range(3), (1, 8, 8), karras_sigmas(4), solver, labels=torch.tensor([1, 0, 2]), batch=batch)
    close(run(batch), run(3), 1e-4)    # float32 networks in batches of other sizes
    if keeps: close(op(run(3)), y.expand(3, -1, -1, -1), 1e-5)    # float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_y_come_back_in_its_own_precision(dtype):
    mask = some_mask(4)
    y = randn(1, *SHAPE).to(dtype)
    x = sample(Replaced(PRIOR, Mask(mask), y), randn(2, *SHAPE, seed=1), karras_sigmas(3), keep(heun, Mask(mask), y), churn=Churn(3, 1.))
    assert x.dtype == torch.float64 and torch.equal(x[:, mask].to(dtype), y[:, mask].expand(2, -1))
    rest = sample(Replaced(PRIOR, Mask(mask), y), randn(2, *SHAPE, seed=1), f64(5., 1.), keep(heun, Mask(mask), y))    # does not end at 0: still noisy
    assert not torch.equal(rest[:, mask].to(dtype), y[:, mask].expand(2, -1))


def test_state_in_float64_network_in_float32_and_its_own_spread():
    op, y = Downsample(2, 0.1), torch.zeros(1, 1, 4, 4)
    model = PiGDM(Guided(NET, 2.), op, y)
    assert model.sigma_data == 0.6 and PiGDM(PRIOR, op, y).sigma_data == 1. and PiGDM(NET, op, y, 0.3).sigma_data == 0.3
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in NET.parameters())    # `generate` finds the device
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1])
    assert all(model(x, s, labels=labels).dtype == torch.float64 and not model(x, s, labels=labels).requires_grad for s in (0.5, torch.tensor([0.5, 2.])))
    one = torch.cat([model(x[i:i + 1], s, labels=labels[i:i + 1]) for i, s in enumerate((0.5, 2.))])
    close(model(x, torch.tensor([0.5, 2.], dtype=torch.float64), labels=labels), one, 1e-4)    # float32
    p = smc(PiGDM(Guided(NET, 2.), op, y), torch.randn(6, 1, 8, 8), karras_sigmas(5), labels=torch.ones(6, dtype=torch.int64))
    assert p.samples.shape == (6, 1, 8, 8) and p.samples.isfinite().all()
