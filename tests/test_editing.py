"Codes against closed forms, round trips of every solver, spheres, middle levels, and what is refused."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.special import ndtr

from ddpm_edm.core import CountNFE, seeded_noise
from ddpm_edm.edm import Churn
from ddpm_edm.editing import image_to_image, invert, slerp
from ddpm_edm.guidance import Guided
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.solvers import (adams_bashforth, adaptive, ancestral, deis, dpm_solver_2, dpm_solver_3, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, euler,
                              euler_ancestral, heun, sample, second_order, unipc)
from ddpm_edm.unet import UNet

f64, close = torch.float64, torch.testing.assert_close
cases = settings(max_examples=15, deadline=None, derandomize=True)


def t64(*values): return torch.tensor(values, dtype=f64)
def gen(seed=0): return torch.Generator().manual_seed(seed)
def median(a): return a.flatten(1).norm(dim=1).median().item()


BLOBS = Mixture(t64([-1.2, 0.], [1., 1.], [0.9, -1.]), t64(0.35, 0.2, 0.3), t64(0.5, 0.2, 0.3))
LINE = Mixture(t64([-1.2], [0.4], [1.5]), t64(0.3, 0.15, 0.25), t64(0.5, 0.2, 0.3))
CLASSES = Gaussian(t64(-1., 0.), 0.3), Gaussian(t64(2., 1.), 0.6)
LEVELS = t64(10., 3., 1., 0.2, 0.)


def known(x, sigma, labels):
    "Two Gaussian classes; -1 asks for a third denoiser."
    D = Gaussian(t64(0.5, 0.5), 1.5)(x, sigma)
    for k, c in enumerate(CLASSES): D = torch.where((labels == k)[:, None], c(x, sigma), D)
    return D


class Recorder:
    "A denoiser that keeps what it was called with."
    def __init__(self, denoise): self.denoise, self.calls = denoise, []
    def __call__(self, x, sigma, **cond):
        self.calls.append((x.clone(), sigma, cond))
        return self.denoise(x, sigma)


# ---- codes ----

@cases
@given(st.integers(0, 10**6), st.sampled_from([(), (1,), (3,), (1, 2, 3)]), st.floats(-1.5, 1.5), st.floats(0.1, 2), st.sampled_from([2., 20., 80.]))
def test_code_of_a_gaussian_is_linear(seed, event, mean, std, top):
    p = Gaussian(torch.full(event, mean, dtype=f64), std)
    x0 = p.sample(5, gen(seed))
    exact = (mean + (1 + (top / std)**2)**0.5 * (x0 - mean)) / top
    found = invert(p, x0, karras_sigmas(60, sigma_max=top), dpm_solver_3)
    close(found, exact, rtol=0, atol=4e-3)    # third order in 60 steps, within four standard deviations


@cases
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), st.sampled_from([3., 80.]))
def test_code_in_one_dimension_is_the_percentile(points, top):
    def cdf(x, sigma): return (LINE.weights * ndtr((x - LINE.means[:, 0]) / (LINE.stds**2 + sigma**2)**0.5)).sum(1)
    x0 = t64(*points)[:, None]
    close(cdf(top * invert(LINE, x0, karras_sigmas(160, sigma_max=top), unipc(3)), top), cdf(x0, 0.), rtol=0, atol=1e-4)


def test_codes_of_data_are_standard_normal():
    n = 8000
    x0 = BLOBS.sample(n, gen(1))
    z = invert(BLOBS, x0, karras_sigmas(60), unipc(3))
    # five standard errors each; 80 for infinity adds 2e-4 to variances, the solver less
    for c in (z[:, 0], z[:, 1], (z[:, 0] + z[:, 1]) / 2**0.5):
        assert abs(c.mean()) < 5 / n**0.5
        assert abs(c.var() - 1) < 5 * (2 / n)**0.5 + 1e-3
        assert abs((c**3).mean()) < 5 * (15 / n)**0.5
        assert abs((c**4).mean() - 3) < 5 * (96 / n)**0.5
        assert (ndtr(c.sort().values) - (torch.arange(n) + 0.5) / n).abs().max() < 2.4 / n**0.5    # Kolmogorov: twice in 100,000
    assert abs((z[:, 0] * z[:, 1]).mean()) < 5 / n**0.5
    assert (ndtr(x0[:, 0].sort().values) - (torch.arange(n) + 0.5) / n).abs().max() > 5 / n**0.5   # the data are not


def test_samples_lead_back_to_their_noise():
    noise = seeded_noise(range(50), (2,), f64)
    found = invert(BLOBS, sample(BLOBS, noise, karras_sigmas(300), unipc(3)), karras_sigmas(300), unipc(3))
    assert median(found - noise) < 1e-5    # high order, and the last step, which (2) undoes to second order in sigma_min / s


@pytest.mark.parametrize("step, code, trip", [(euler, 1, 1), (heun, 2, 3), (second_order(0.5), 2, 3), (dpm_solver_2, 2, 3), (dpm_solver_3, 3, 3)])
def test_even_orders_come_home_one_order_better(step, code, trip):
    x0, levels = BLOBS.sample(60, gen(2)), {n: karras_sigmas(n + 1)[:-1] for n in (96, 192)}
    exact = invert(BLOBS, x0, karras_sigmas(601)[:-1], dpm_solver_3)
    codes = {n: invert(BLOBS, x0, s, step) for n, s in levels.items()}
    off = [median(c - exact) for c in codes.values()]
    away = [median(sample(BLOBS, codes[n], s, step) - x0) for n, s in levels.items()]
    assert math.log2(off[0] / off[1]) == pytest.approx(code, abs=0.25)     # the next order is still there
    assert math.log2(away[0] / away[1]) == pytest.approx(trip, abs=0.25)


@pytest.mark.parametrize("step", [heun, dpm_solver_2, dpm_solver_3, dpmpp_2m, dpmpp_3m, deis(3), unipc(3), adams_bashforth(3), ancestral(heun, 0.)])
def test_any_solver_of_the_ode_comes_back(step):
    x0, levels = BLOBS.sample(40, gen(3)), karras_sigmas(128)
    code = invert(BLOBS, x0, levels, step)
    assert median(sample(BLOBS, code, levels, step) - x0) < 2e-3                         # measured: deis 1e-3, others below
    assert median(code - invert(BLOBS, x0, karras_sigmas(400), unipc(3))) < 5e-3         # and it is the code: second order, 128 steps


def test_the_lowest_step():
    x0 = LINE.sample(30, gen(4))
    up, low = karras_sigmas(16, sigma_min=0.1, sigma_max=5.), 0.1
    close(invert(LINE, x0, up), invert(LINE, 2 * x0 - LINE(x0, low), up[:-1]), rtol=0, atol=1e-14)    # (2); without the last 0 nothing is done there
    first = 2 * x0 - LINE(x0, low)
    assert median(LINE(first, low) - x0) < 0.5 * median(LINE(x0, low) - x0)
    for step, calls in ((euler, 16), (heun, 1 + 2 * 15)):
        count = CountNFE(LINE)
        invert(count, x0, up, step)
        assert count.nfe == calls


def test_the_way_up():
    seen, x0 = [], BLOBS.sample(4, gen(5))
    record = Recorder(BLOBS)
    code = invert(record, x0, LEVELS, euler, callback=lambda **kw: seen.append(kw))
    assert [kw["sigma"] for kw in seen] == [0.2, 1., 3.] and [kw["i"] for kw in seen] == [0, 1, 2]
    assert [sigma for _, sigma, _ in record.calls] == [0.2, 0.2, 1., 3.]
    for kw in seen: close(kw["D"], BLOBS(kw["x"], kw["sigma"]), rtol=0, atol=1e-14)
    x = 2 * x0 - BLOBS(x0, 0.2)
    for a, b in ((0.2, 1.), (1., 3.), (3., 10.)): x = x + (b - a) * (x - BLOBS(x, a)) / a
    close(code, x / 10, rtol=0, atol=1e-14)


def test_rows_are_alone_and_input_is_left():
    x0 = BLOBS.sample(7, gen(6))
    kept = x0.clone().requires_grad_()
    code = invert(BLOBS, kept, karras_sigmas(12))
    assert torch.equal(kept, x0) and not code.requires_grad and code.dtype == f64
    close(code[2:5], invert(BLOBS, x0[2:5], karras_sigmas(12)), rtol=0, atol=1e-13)
    assert invert(BLOBS, x0.float(), karras_sigmas(12)).dtype == f64


def test_classes():
    x0, zero, levels = CLASSES[0].sample(20, gen(7)), torch.zeros(20, dtype=torch.int64), karras_sigmas(150)
    code = invert(known, x0, levels, labels=zero)
    close(sample(known, code, levels, labels=zero), x0, rtol=0, atol=1e-4)
    swapped = sample(known, code, levels, labels=zero + 1)
    close((swapped - CLASSES[1].mean) / 0.6, (x0 - CLASSES[0].mean) / 0.3, rtol=0, atol=0.06)    # means of 3 in 80, second order


@pytest.mark.parametrize("w", [0.5, 1., 2., 4.])
def test_guided_both_ways(w):
    one, everything, levels = Gaussian(t64(0.8), 0.5), Gaussian(t64(0.), 1.), karras_sigmas(200)
    guided, x0 = Guided(lambda x, sigma: one(x, sigma), w, everything), t64([0.3], [1.3])
    code = invert(guided, x0, levels)
    assert (code[1] - code[0]).item() == pytest.approx(2 * 2**(w - 1), rel=0.01)    # (S/s)^(w-1); solver, and 80 for infinity
    close(sample(guided, code, levels), x0, rtol=0, atol=1e-3)


def test_a_network_with_guidance_in_an_interval():
    torch.manual_seed(0)
    net = EDMPrecond(UNet(1, channels=32, num_labels=3), 0.5).eval()
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.02 * torch.randn_like(p))    # a fresh network answers 0 to everybody
    x0, labels, levels = 0.5 * seeded_noise(range(3), (1, 8, 8)), torch.tensor([0, 2, 1]), karras_sigmas(64)
    guided = Guided(net, 1.5, interval=(0.1, 2.))
    code = invert(guided, x0, levels, labels=labels)
    back = sample(guided, code, levels, labels=labels)
    assert code.dtype == f64 and (back - x0).square().mean().sqrt() < 1e-3              # the page's bound, float32 inside
    other = sample(guided, code, karras_sigmas(12), labels=(labels + 1) % 3)
    assert (other - x0).square().mean().sqrt() > 1e-2
    edit = image_to_image(guided, x0, seeded_noise(range(3, 6), (1, 8, 8)), karras_sigmas(12), 0.4, unipc(3), labels=labels)
    assert edit.shape == x0.shape and edit.isfinite().all()


# ---- slerp ----

shapes = st.sampled_from([(4,), (3, 5), (1, 4, 4)])


@cases
@given(st.integers(0, 10**6), shapes, st.floats(0, 1))
def test_slerp_is_the_great_circle(seed, event, t):
    a, b = torch.randn(2, 6, *event, generator=gen(seed), dtype=f64)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).reshape(6, *[1] * len(event))    # of one length
    r = a.flatten(1).norm(dim=1)
    theta = ((a * b).flatten(1).sum(1) / r**2).clamp(-1, 1).acos()
    def column(v): return v.reshape(6, *[1] * len(event))
    x = slerp(a, b, t)
    want = column(((1 - t) * theta).sin() / theta.sin()) * a + column((t * theta).sin() / theta.sin()) * b
    close(x, want, rtol=1e-9, atol=1e-9)
    close(x.flatten(1).norm(dim=1), r, rtol=1e-10, atol=0)                              # on the sphere
    close(((x * a).flatten(1).sum(1) / r**2).clamp(-1, 1).acos(), t * theta, rtol=1e-6, atol=1e-6)    # at even speed; acos halves the digits
    close(slerp(b, a, 1 - t), x, rtol=1e-10, atol=1e-10)


def test_slerp_at_its_ends_and_between_parallels():
    a, b = torch.randn(2, 5, 3, generator=gen(1), dtype=f64)
    close(slerp(a, b, 0.), a, rtol=0, atol=1e-15), close(slerp(a, b, 1), b, rtol=0, atol=1e-15)
    close(slerp(a, 3 * a, 0.25), 1.5 * a, rtol=0, atol=1e-14)                             # angle 0: lerp
    close(slerp(a, a * (1 + 1e-9) + 1e-9, 0.5), (a + a * (1 + 1e-9) + 1e-9) / 2, rtol=0, atol=1e-14)
    close(slerp(torch.zeros(1, 3), torch.ones(1, 3), 0.25), torch.full((1, 3), 0.25))     # no angle: lerp
    close(slerp(t64([1., 0.]), t64([0., 2.]), 0.5), t64([0.5**0.5, 2**0.5]), rtol=0, atol=1e-14)    # lengths that differ: (5) as it stands


def test_slerp_takes_many_t():
    a, b = torch.randn(2, 3, 1, 2, 2, generator=gen(2), dtype=f64)
    t = t64(0.1, 0.5, 0.9)
    close(slerp(a, b, t), torch.cat([slerp(a[k:k + 1], b[k:k + 1], t[k].item()) for k in range(3)]), rtol=0, atol=1e-15)
    row = slerp(a[:1], b[:1], torch.linspace(0, 1, 7))
    assert row.shape == (7, 1, 2, 2) and row.dtype == f64
    close(row[3:4], slerp(a[:1], b[:1], 0.5), rtol=0, atol=1e-15)
    assert slerp(a.float(), b, 0.5).dtype == torch.float32


@cases
@given(st.floats(0.05, 0.95))
def test_slerp_keeps_the_variance_and_lerp_does_not(t):
    a, b = (seeded_noise(range(k, k + 400), (256,), f64) for k in (0, 400))
    z = slerp(a, b, t)
    assert abs(z.var() - 1) < 5 * (2 / z.numel())**0.5 + 0.01                              # five standard errors; angles near 90 degrees, not at it
    assert abs(((1 - t) * a + t * b).var() - ((1 - t)**2 + t**2)) < 5 * (2 / z.numel())**0.5 + 0.01


# ---- image to image ----

@cases
@given(st.integers(1, 40), st.floats(1e-3, 1))
def test_strength_is_the_share_of_steps(n, strength):
    x0, noise, levels = BLOBS.sample(3, gen(8)), seeded_noise(range(3), (2,), f64), karras_sigmas(n) if n > 1 else t64(5., 0.)
    record, k = Recorder(BLOBS), max(1, round(strength * n))
    found = image_to_image(record, x0, noise, levels, strength, euler)
    assert len(record.calls) == k and abs(k / n - strength) <= max(0.5, 1 - strength * n) / n + 1e-9
    x, sigma, _ = record.calls[0]
    assert sigma == levels[n - k].item()
    close(x, x0 + sigma * noise, rtol=1e-12, atol=1e-12)
    close(found, sample(BLOBS, (x0 + sigma * noise) / sigma, levels[n - k:], euler), rtol=0, atol=1e-12)


@cases
@given(st.integers(0, 10**6), st.floats(0.05, 5), st.floats(0.2, 1.5))
def test_edit_of_a_gaussian(seed, sigma, s):
    p = Gaussian(t64(0.4, -1.), s)
    x0, noise = p.sample(6, gen(seed)), seeded_noise(range(6), (2,), f64)
    levels = torch.cat([torch.linspace(math.log(50.), math.log(sigma), 5, dtype=f64).exp()[:-1], torch.linspace(math.log(sigma), math.log(0.002), 60, dtype=f64).exp(), t64(0.)])
    found = image_to_image(p, x0, noise, levels, 60 / 64, dpm_solver_3)
    close(found, p.mean + s / (s**2 + sigma**2)**0.5 * (x0 + sigma * noise - p.mean), rtol=0, atol=2e-3)    # third order in 59 steps


@pytest.mark.parametrize("sigma", [0.5, 1., 3.])
def test_chance_of_staying_in_the_blob(sigma):
    m, s, n, g = 1., 0.25, 4000, gen(9)
    pair, x0 = Mixture(t64([-m], [m]), s), m + s * torch.randn(n, 1, generator=g, dtype=f64)
    noise, levels = torch.randn(n, 1, generator=g, dtype=f64), torch.cat([torch.linspace(math.log(sigma), math.log(0.002), 40, dtype=f64).exp(), t64(0.)])
    def draw(x, *_): return torch.randn(x.shape, generator=g, dtype=f64)
    v, grid = s**2 + sigma**2, torch.linspace(-60, 60, 60_001, dtype=f64)
    by_ode = ndtr(t64(m / v**0.5)).item()
    by_sde = torch.trapezoid((-(grid - m)**2 / (2 * v)).exp() / (2 * math.pi * v)**0.5 * (2 * m * grid / v).sigmoid(), grid).item()
    for P, step in ((by_ode, heun), (by_sde, dpmpp_2m_sde(draw=draw))):
        found = (image_to_image(pair, x0, noise, levels, 1., step) > 0).double().mean().item()
        assert found == pytest.approx(P, abs=5 * (P * (1 - P) / n)**0.5 + 0.005)    # five standard errors; 40 steps


def test_edits_take_what_sample_takes():
    x0, noise, seen = CLASSES[0].sample(5, gen(10)), seeded_noise(range(5), (2,), f64), []
    labels = torch.tensor([0, 1, 0, 1, -1])
    found = image_to_image(known, x0.float(), noise.float(), karras_sigmas(20), 0.5, heun, labels=labels, churn=Churn(20, 5.), callback=lambda **kw: seen.append(kw["sigma"]))
    assert found.dtype == f64 and len(seen) == 10 and seen[0] > karras_sigmas(20)[10]    # churned up
    one = image_to_image(known, x0[1:2], noise[1:2], karras_sigmas(20), 0.5, labels=labels[1:2])
    close(image_to_image(known, x0, noise, karras_sigmas(20), labels=labels)[1:2], one, rtol=0, atol=1e-12)    # a row alone; 0.5 is the default
    single = x0.float()                                                                 # pictures may be float32 and noise float64: nothing is rounded
    close(image_to_image(known, single, noise, karras_sigmas(20), labels=labels), image_to_image(known, single.double(), noise, karras_sigmas(20), labels=labels), rtol=0, atol=1e-12)
    near = image_to_image(known, x0, noise, karras_sigmas(20), 1e-9, labels=labels)
    close(near, known(x0 + 0.002 * noise, 0.002, labels), rtol=0, atol=1e-12)           # one step at least


# ---- refused ----

X, NOISE, S = torch.zeros(2, 2, dtype=f64), torch.ones(2, 2, dtype=f64), karras_sigmas(8)
NAN = torch.full((2, 2), math.nan)


@pytest.mark.parametrize("make, wanted", [
    (lambda: invert(BLOBS, X, t64(80., 0.)), r"sigmas must hold at least 2 levels above 0, got \[80.0, 0.0\]"),
    (lambda: invert(BLOBS, X, t64(0.)), "sigmas must hold at least 2 values"),
    (lambda: invert(BLOBS, X, S.flip(0)), "sigmas must be finite, decrease"),
    (lambda: invert(BLOBS, X, t64(2., math.nan, 0.)), "sigmas must be finite, decrease"),
    (lambda: invert(BLOBS, NAN, S), "x0 must be a finite floating-point tensor"),
    (lambda: invert(BLOBS, torch.zeros(2, 2, dtype=torch.uint8), S), "x0 must be a finite floating-point tensor .* got torch.uint8"),
    (lambda: invert(BLOBS, X, S, euler_ancestral()), "step must be able to go up, from sigma = 0.002 to"),
    (lambda: invert(BLOBS, X, S, ancestral(heun)), "step must be able to go up"),
    (lambda: invert(BLOBS, X, S, dpmpp_2m_sde()), "step must be able to go up"),
    (lambda: invert(BLOBS, X, S, adaptive()), "step must be able to go up"),
    (lambda: invert(BLOBS, X, S, lambda d, x, a, b, c=None: (d(x, a)[:1], c)), "step must be able to go up"),
    (lambda: invert(lambda x, sigma: x[:1], X, S), r"denoise's answer in step 0 \(sigma = 0.002\) must have shape \(2, 2\), got shape \(1, 2\)"),
    (lambda: invert(lambda x, sigma: x * math.nan if sigma > 1 else BLOBS(x, sigma), X, S), "denoise's answer in step .* must be finite"),
    (lambda: invert(lambda x, sigma: x * (math.nan if sigma == 1 else 0.5), X + 1, LEVELS, euler), r"denoise's answer in step 1 \(sigma = 1\) must be finite"),
    (lambda: slerp(X, NOISE[:1], 0.5), r"b must have shape \(2, 2\), got shape \(1, 2\)"),
    (lambda: slerp(NAN, X, 0.5), "a must be a finite"),
    (lambda: slerp(NOISE, NAN, 0.5), "b must be a finite"),
    (lambda: slerp(NOISE, -2 * NOISE, 0.5), "a and b must not point in opposite directions"),
    (lambda: slerp(X, NOISE, torch.zeros(3)), r"t must be a number or \(2,\), got shape \(3,\)"),
    (lambda: slerp(X, NOISE, torch.zeros(2, 1)), "t must be a number"),
    (lambda: slerp(X, NOISE, math.nan), "t must be finite"),
    (lambda: image_to_image(BLOBS, X, NOISE, S, 0.), "strength must be above 0 and at most 1, got 0.0"),
    (lambda: image_to_image(BLOBS, X, NOISE, S, 1.01), "strength must be above 0 and at most 1, got 1.01"),
    (lambda: image_to_image(BLOBS, X, NOISE, S, -0.5), "strength must be above 0"),
    (lambda: image_to_image(BLOBS, X, NOISE, S, math.nan), "strength must be above 0"),
    (lambda: image_to_image(BLOBS, X, NOISE[:1], S), r"noise must have shape \(2, 2\), got shape \(1, 2\)"),
    (lambda: image_to_image(BLOBS, NAN, NOISE, S), "x0 must be a finite"),
    (lambda: image_to_image(BLOBS, X, NAN, S), "noise must be a finite"),
    (lambda: image_to_image(BLOBS, X, NOISE, t64(0.)), "sigmas must hold at least 2 values"),
    (lambda: image_to_image(BLOBS, X, NOISE, S.flip(0)), "sigmas must be finite, decrease"),
])
def test_refused(make, wanted):
    with pytest.raises(ValueError, match=wanted): make()
