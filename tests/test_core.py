"core: broadcasting, words for predictions and scales for noise, per-sample noise, pictures."
import decimal
import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import (COLORS, NOISE_SCALES, PREDICTIONS, CountNFE, NoiseStream, as_denoiser, as_state, check_count, check_falling, check_like, check_sigma, convert, convert_noise, eps_of,
                           expand, image_grid, score_of, seeded_noise, show_images)

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "conventions.npz").items() if v.dtype == np.float64}
U = 2.0**-53    # float64 rounds by up to this share
close = torch.testing.assert_close
PAIRS = [(a, b) for a in PREDICTIONS for b in PREDICTIONS]
SCALE_PAIRS = [(a, b) for a in NOISE_SCALES for b in NOISE_SCALES]
SEED = st.integers(0, 2**32 - 1)
SHAPE = st.lists(st.integers(1, 5), max_size=3)
cases = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 1, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expand_shapes_and_dtype(shape, dtype):
    x, ones = torch.zeros(shape, dtype=dtype), (1,) * (len(shape) - 1)
    for one in (2, 0.5, np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5])):
        s = expand(one, x)
        assert s.shape == (1, *ones) and s.dtype == dtype and s.item() == float(one)
    s = expand(torch.tensor([1, 2, 3]), x)
    assert s.shape == (3, *ones) and s.dtype == dtype and s.flatten().tolist() == [1, 2, 3]
    for i in range(3): assert ((x + s)[i] == i + 1).all()    # one level for each sample, not for each column


def test_expand_keeps_gradients():
    sigma = torch.tensor([1., 2.], requires_grad=True)
    (expand(sigma, torch.ones(2, 3)) * torch.ones(2, 3)).sum().backward()
    assert sigma.grad.tolist() == [3, 3]


@pytest.mark.parametrize("sigma", [torch.ones(2), torch.ones(4), torch.ones(3, 1), torch.ones(1, 1), torch.ones(0)])
def test_expand_refuses_a_wrong_shape(sigma):
    with pytest.raises(ValueError, match=r"sigma must be .*\(3,\)"): expand(sigma, torch.zeros(3, 2))


def test_expand_refuses_integer_samples():
    # the level would be rounded to an integer: 0.5 becomes 0
    with pytest.raises(ValueError, match="x must be floating point"): expand(0.5, torch.zeros(3, 2, dtype=torch.uint8))


@pytest.mark.parametrize("sigma", [1e-30, 0.002, 80, 1e30, torch.tensor([1, 2]), torch.tensor([[0.5], [2.]]), torch.tensor(3.), np.float64(2)])
def test_check_sigma_lets_levels_pass(sigma): check_sigma(sigma)


@pytest.mark.parametrize("bad", [0, -1, -0.5, math.nan, math.inf, -math.inf, np.float64(0)])
def test_check_sigma_refuses(bad):
    with pytest.raises(ValueError, match="sigma must be positive and finite, got"): check_sigma(bad)
    with pytest.raises(ValueError, match="sigma must be positive and finite, got"): check_sigma(torch.tensor(bad))
    with pytest.raises(ValueError, match=r"got \["): check_sigma(torch.tensor([1., bad, 2.]))
    if bad == 0: check_sigma(bad, zero=True), check_sigma(torch.tensor([0., 1.]), zero=True)
    else:
        for t in (bad, torch.tensor([0., bad])):
            with pytest.raises(ValueError, match="sigma must be 0 or more and finite, got"): check_sigma(t, zero=True)


def test_check_sigma_names_the_first_offenders_only():
    with pytest.raises(ValueError, match=r"got -2$"): check_sigma(-2)
    with pytest.raises(ValueError, match=r"got \[-1\.0, 0\.0, -3\.0\]$"): check_sigma(torch.tensor([1., -1., 0., 2., -3., -4.]))


def test_check_sigma_does_not_look_where_it_would_cost_or_fail():
    check_sigma(torch.full((3,), -1., device="meta"))    # as on a GPU; a meta tensor has no values at all
    torch.vmap(lambda s: (check_sigma(s), s)[1])(torch.tensor([-1., 1.]))
    with pytest.raises(ValueError, match="sigma must be positive"):    # autograd's transforms do not hide values
        torch.func.jacrev(lambda s: (check_sigma(s), s)[1])(torch.tensor([-1., 1.]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nothing_waits_for_a_gpu():
    x = torch.ones(2, 3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sigma in (0.5, torch.full((2,), 0.5, device="cuda")):
            for a, b in PAIRS: convert(x, x, sigma, a, b)
        for a, b in SCALE_PAIRS: convert_noise(torch.full((2,), 0.5, device="cuda"), a, b)
        check_sigma(torch.full((2,), -1., device="cuda"))
    finally: torch.cuda.set_sync_debug_mode("default")


def row(word, s, c):
    "alpha and beta in word = alpha D + beta eps, from the definitions: v = dx_t / dphi, and D = c_skip x + c_out F."
    if word in ("D", "eps"): return (torch.ones_like(s), 0 * s) if word == "D" else (0 * s, torch.ones_like(s))
    if word == "score": return 0 * s, -1 / s
    c = torch.full_like(s, 1. if word == "v" else c)
    sin, cos = s / torch.hypot(s, c), c / torch.hypot(s, c)
    return (-sin, cos) if word == "v" else (sin / c, -cos)    # (1 - c_skip) / c_out and -c_skip s / c_out


LEVELS = st.floats(-6, 6).map(lambda e: 10.0**e)    # sigma from 1e-6 to 1e6


@settings(cases, max_examples=150)
@given(SEED, LEVELS, LEVELS, st.booleans(), st.sampled_from([0.05, 0.5, 1., 20.]))
def test_every_pair_of_words_to_rounding(seed, sigma, other, per_sample, c):
    D, eps = seeded_noise([seed, seed ^ 1], (2, 5), torch.float64)
    sigma = torch.tensor([sigma, other], dtype=torch.float64) if per_sample else sigma
    s = expand(sigma, D)
    x = D + s * eps
    rows = {w: row(w, s, c) for w in PREDICTIONS}
    said, size, delta = {}, {}, {}
    for w, (a, b) in rows.items(): said[w], size[w], delta[w] = a * D + b * eps, (a * D).abs() + (b * eps).abs(), (b - s * a).abs()
    for w, w2 in PAIRS:
        (a, b), (a2, b2) = rows[w], rows[w2]
        # x and the value are rounded before, each product and quotient again: 16 units of each term of the formula, divided by its denominator
        terms = ((a2 * b).abs() + (a * b2).abs()) * (D.abs() + s * eps.abs()) + delta[w2] * size[w]
        assert ((convert(said[w], x, sigma, w, w2, c) - said[w2]).abs() <= 16 * U * (terms / delta[w] + size[w2])).all(), (w, w2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.3, 1., torch.tensor(0.3), torch.tensor([0.2, 1., 5.])])
def test_round_trips_of_words(dtype, sigma):
    x, value = seeded_noise([1, 2], (3, 2, 2), dtype)
    for a, b in PAIRS:
        there = convert(value, x, sigma, a, b, 0.7)
        assert there.dtype == dtype and there.shape == x.shape
        close(convert(there, x, sigma, b, a, 0.7), value, rtol=0, atol=400 * torch.finfo(dtype).eps)    # numbers up to 50, over sigma = 0.2


@cases
@given(SEED, LEVELS, st.sampled_from([0.1, 1., 3.]))
def test_words_agree_with_what_they_mean(seed, sigma, c):
    x, D = seeded_noise([seed, seed ^ 1], (4, 3), torch.float64)
    rtol = dict(rtol=64 * U, atol=64 * U * (1 + 1 / sigma)**2 * (1 + sigma))    # x - D over sigma^2, with coefficients up to 4
    close(convert(D, x, sigma, "D", "score"), score_of(D, x, sigma), **rtol)
    close(convert(D, x, sigma, "D", "eps"), eps_of(D, x, sigma), **rtol)
    close(convert(D, x, sigma, "D", "F", 1.), -convert(D, x, sigma, "D", "v"), **rtol)
    one = torch.ones_like(x)    # the two coefficients of EDM's wrapper
    close(convert(0 * x, one, sigma, "F", "D", c), one * c**2 / (sigma**2 + c**2), rtol=16 * U, atol=0)
    close(convert(one, 0 * x, sigma, "F", "D", c), one * sigma * c / (sigma**2 + c**2)**0.5, rtol=16 * U, atol=0)


def test_score_and_eps_never_touch_x():
    eps = seeded_noise([0], (6,), torch.float64)
    for x in (eps, 1e30 * eps):
        for sigma in (1e-9, 1., 1e9): assert torch.equal(convert(eps, x, sigma, "eps", "score") / (-1 / sigma), eps / (-1 / sigma) * (-1 / sigma))
    eps = eps.float()
    back = convert(convert(eps, 1 + eps, 1e-6, "eps", "score"), 1 + eps, 1e-6, "score", "eps")
    close(back, eps, rtol=2e-7, atol=0)    # float32 rounding, where going through D would leave one digit


def test_no_digits_lost_at_either_end():
    "v and F determine image and noise at any level: errors stay at the size of what is asked."
    D, eps = seeded_noise([3, 4], (50,), torch.float64)
    for sigma in (1e-8, 1e-4, 1., 1e4, 1e8):
        x, s = D + sigma * eps, torch.tensor(sigma, dtype=torch.float64)
        for word in ("v", "F"):
            a, b = row(word, s, 0.5)
            close(convert(a * D + b * eps, x, sigma, word, "D"), D, rtol=0, atol=1e-14)
            close(convert(a * D + b * eps, x, sigma, word, "eps"), eps, rtol=0, atol=1e-14)


def test_equal_words_give_back_the_value():
    x, value = seeded_noise([0, 1], (3,))
    for word in PREDICTIONS: assert convert(value, x, 0.5, word, word) is value
    low = value.bfloat16()
    for word in PREDICTIONS: assert convert(low, x, 0.5, word, "D").dtype == convert(low, x, 0.5, "eps", word).dtype == torch.float32


def test_convert_inside_vmap_and_jacrev():
    x, value = seeded_noise([0, 1], (4, 3), torch.float64)
    sigma = torch.tensor([0.1, 1., 3., 10.], dtype=torch.float64)
    for a, b in PAIRS:
        one = lambda value, x, s: convert(value[None], x[None], s, a, b)[0]
        close(torch.vmap(one)(value, x, sigma), convert(value, x, sigma, a, b), rtol=1e-14, atol=0)
        J = torch.func.jacrev(lambda v: convert(v[None], x[:1], sigma[1], a, b)[0])(value[0])
        (p, q), (p2, q2) = row(a, sigma[1], 0.5), row(b, sigma[1], 0.5)
        close(J, torch.eye(3, dtype=torch.float64) * (q2 - sigma[1] * p2) / (q - sigma[1] * p), rtol=1e-14, atol=1e-15)    # delta' / delta
        torch.vmap(torch.func.jacrev(lambda x, s: convert(2 * x[None], x[None], s, a, b)[0], argnums=(0, 1)))(x, sigma)


@pytest.mark.parametrize("kw, message", [
    (dict(source="x0"), r"source must be one of \('D', 'eps', 'score', 'v', 'F'\), got 'x0'"),
    (dict(target="epsilon"), r"target must be one of \('D', 'eps', 'score', 'v', 'F'\), got 'epsilon'"),
    (dict(value=torch.zeros(1, 2)), r"value must have shape \(3, 2\), got shape \(1, 2\)"),
    (dict(sigma_data=0.), "sigma_data must be positive and finite, got 0.0"),
    (dict(sigma_data=math.nan), "sigma_data must be positive and finite, got nan"),
    (dict(sigma=0.), "sigma must be positive and finite, got 0.0"),
    (dict(sigma=torch.tensor([1., -1., 1.])), r"sigma must be positive and finite, got \[-1.0\]"),
    (dict(sigma=torch.ones(2)), r"sigma must be a float, 0-d or \(3,\)"),
    (dict(sigma=torch.ones(2), target="eps"), r"sigma must be a float, 0-d or \(3,\)"),
])
def test_convert_refuses(kw, message):
    good = dict(value=torch.zeros(3, 2), x=torch.zeros(3, 2), sigma=1., source="eps", target="D")
    convert(**good)
    with pytest.raises(ValueError, match=message): convert(**good | kw)


@pytest.mark.parametrize("word", PREDICTIONS)
def test_a_model_that_speaks_any_word_is_a_denoiser(word):
    seen = []
    def exact(x, sigma): return x / (1 + expand(sigma, x)**2)    # for N(0, 1) data
    def model(x, sigma, **cond):
        seen.append(cond)
        return convert(exact(x, sigma), x, sigma, "D", word, 0.7)
    x = seeded_noise([0, 1, 2], (2, 2), torch.float64)
    for sigma in (0.5, torch.tensor([0.1, 1., 10.])):
        close(as_denoiser(model, word, 0.7)(x, sigma, labels=7), exact(x, sigma), rtol=0, atol=1e-13)    # rounding over sigma = 0.1
    assert seen == [dict(labels=7)] * 2
    counted = CountNFE(as_denoiser(model, word, 0.7))
    counted(x, 1.)
    assert counted.nfe == 1


def test_as_denoiser_refuses():
    with pytest.raises(ValueError, match=r"predicts must be one of \('D', 'eps', 'score', 'v', 'F'\), got 'noise'"): as_denoiser(lambda x, s: x, "noise")
    with pytest.raises(ValueError, match="value must have shape"): as_denoiser(lambda x, s: x[:1], "D")(torch.zeros(2, 3), 1.)
    with pytest.raises(ValueError, match="sigma must be positive"): as_denoiser(lambda x, s: x, "eps")(torch.zeros(2, 3), 0.)


def exact_noise(sigma, beta_d=19.9, beta_min=0.1):
    "The same amount of noise on every scale, with 60 digits."
    with decimal.localcontext() as ctx:
        ctx.prec, s, d, m = 60, Decimal(sigma), Decimal(beta_d), Decimal(beta_min)
        B = (1 + s * s).ln()
        return {"sigma": s, "alpha_bar": 1 / (1 + s * s), "log_snr": -2 * s.ln(), "vp_time": ((m * m + 2 * d * B).sqrt() - m) / d}


def conditioning(sigma):
    "Relative error of sigma for a relative error 1 of the value, at most. For alpha-bar near 1 it is 1 / 2 (1 - alpha-bar)."
    inverse = 1 + 1 / sigma**2
    return {"sigma": 1., "log_snr": abs(math.log(sigma)), "alpha_bar": inverse / 2, "vp_time": math.log1p(sigma**2) * inverse}


@settings(cases, max_examples=200)
@given(st.floats(-5, 6).map(lambda e: 10.0**e), st.sampled_from(SCALE_PAIRS), st.sampled_from([(19.9, 0.1), (3., 2.), (0.5, 1e-3)]))
def test_every_pair_of_scales_against_60_digits(sigma, pair, betas):
    want, bad = exact_noise(sigma, *betas), conditioning(sigma)
    source, target = pair
    got = float(Decimal(convert_noise(float(want[source]), source, target, *betas).item()) - want[target])
    # the source is rounded (its conditioning), log SNR again (its own), and a dozen operations
    relative = 12 * U * (1 + bad[source] + bad["log_snr"])
    if target == "log_snr": assert abs(got) <= 2 * relative    # d(log SNR) = -2 d(ln sigma)
    else: assert abs(got) <= relative * {"sigma": 1, "alpha_bar": 2, "vp_time": 2}[target] * float(want[target])    # sigma's relative error at most doubles


@settings(cases, max_examples=100)
@given(st.floats(-5, 6).map(lambda e: 10.0**e), st.sampled_from(SCALE_PAIRS))
def test_round_trips_of_scales(sigma, pair):
    bad = conditioning(sigma)
    a, b = pair
    there = convert_noise(convert_noise(sigma, "sigma", a), a, b)
    assert there.dtype == torch.float64 and there.shape == ()
    # log SNR is passed three times
    assert abs(convert_noise(there, b, "sigma").item() / sigma - 1) <= 12 * U * (1 + bad[a] + bad[b] + 3 * bad["log_snr"])


def test_float32_alpha_bar_forgets_small_noise():
    "The warning of the page: half a unit of the last place, times the conditioning."
    sigma = torch.logspace(-3, 1, 60, dtype=torch.float64)
    lost = {s: (convert_noise(convert_noise(sigma, "sigma", s).float().double(), s, "sigma") / sigma - 1).abs() for s in NOISE_SCALES}
    assert lost["alpha_bar"][0] > 1e-3 and (lost["alpha_bar"] < 1.1 * 2**-24 * (1 + 1 / sigma**2) / 2).all()
    for s in ("sigma", "log_snr", "vp_time"): assert (lost[s] < 2**-24 * 8).all()    # conditioning below 8 in this range
    tiny = convert_noise(torch.tensor(1e-4), "sigma", "alpha_bar")
    assert tiny.dtype == torch.float32 and tiny == 1 and convert_noise(tiny, "alpha_bar", "sigma") == 0


@pytest.mark.parametrize("a, b", SCALE_PAIRS)
def test_ends_of_the_scales(a, b):
    none = {"sigma": 0., "alpha_bar": 1., "log_snr": math.inf, "vp_time": 0.}
    only = {"sigma": math.inf, "alpha_bar": 0., "log_snr": -math.inf, "vp_time": math.inf}
    for end in (none, only): assert convert_noise(end[a], a, b).item() == end[b]
    for sigma in (1e-20, 1e20, 1e-150, 1e150):    # no overflow, no nan on the way
        value = convert_noise(sigma, "sigma", a)
        if a != "alpha_bar": assert convert_noise(value, a, "sigma").item() == pytest.approx(sigma, rel=1e-10, abs=0)    # log SNR up to 700 units
        assert not convert_noise(value, a, b).isnan()


def test_late_times_do_not_overflow():
    "e^B would, in float32 at B = 89.9, in float64 at 996; sigma = e^(B / 2) does not."
    assert convert_noise(torch.tensor(3.), "vp_time", "sigma").item() == pytest.approx(math.exp(89.85 / 2), rel=1e-4)    # float32 rounding times 45
    assert convert_noise(10., "vp_time", "log_snr").item() == pytest.approx(-996, rel=1e-14)
    assert convert_noise(10., "vp_time", "sigma").item() == pytest.approx(math.exp(498), rel=1e-12)


@pytest.mark.parametrize("a, b", SCALE_PAIRS)
def test_scales_keep_shape_and_dtype(a, b):
    value = convert_noise(torch.tensor([[0.5, 1.], [2., 3.]]), "sigma", a)
    got = convert_noise(value, a, b)
    assert got.shape == (2, 2) and got.dtype == torch.float32
    close(got, convert_noise(value.double(), a, b).float(), rtol=1e-5, atol=1e-6)    # float32 rounding, conditioning below 10
    assert convert_noise(1, a, b).dtype == convert_noise(torch.tensor(1), a, b).dtype == torch.float64
    assert torch.equal(torch.vmap(lambda v: convert_noise(v, a, b))(value), got)
    assert (convert_noise(value, a, b) is value) == (a == b)
    assert convert_noise(torch.ones(2, device="meta"), a, b).shape == (2,)


def test_scales_are_differentiable():
    sigma = torch.tensor([0.01, 1., 30.], dtype=torch.float64, requires_grad=True)
    for scale, slope in {"log_snr": -2 / sigma, "alpha_bar": -2 * sigma / (1 + sigma**2)**2}.items():
        auto, = torch.autograd.grad(convert_noise(sigma, "sigma", scale).sum(), sigma)
        close(auto, slope, rtol=1e-12, atol=0)
    t = convert_noise(sigma, "sigma", "vp_time")
    auto, = torch.autograd.grad(t.sum(), sigma)
    close(auto, 2 * sigma / (1 + sigma**2) / (0.1 + 19.9 * t), rtol=1e-12, atol=0)    # 2 sigma dsigma / (1 + sigma^2) = beta(t) dt


@pytest.mark.parametrize("args, message", [
    ((1., "t", "sigma"), r"source must be one of \('sigma', 'alpha_bar', 'log_snr', 'vp_time'\), got 't'"),
    ((1., "sigma", "snr"), r"target must be one of \('sigma', 'alpha_bar', 'log_snr', 'vp_time'\), got 'snr'"),
    ((-1., "sigma", "vp_time"), r"value must be from 0 to inf on the scale sigma, got \[-1.0\]"),
    ((1.5, "alpha_bar", "sigma"), r"value must be from 0 to 1 on the scale alpha_bar, got \[1.5\]"),
    ((torch.tensor([0.5, -0.1, math.nan]), "alpha_bar", "sigma"), r"value must be from 0 to 1 on the scale alpha_bar, got \[-0.1.*, nan\]"),
    ((math.nan, "log_snr", "sigma"), r"value must be from -inf to inf on the scale log_snr, got \[nan\]"),
    ((-1e-9, "vp_time", "vp_time"), "value must be from 0 to inf on the scale vp_time"),
    ((1., "sigma", "vp_time", 0., 0.1), "beta_d and beta_min must be positive and finite, got 0.0 and 0.1"),
    ((1., "sigma", "vp_time", 19.9, math.nan), "beta_d and beta_min must be positive and finite, got 19.9 and nan"),
])
def test_convert_noise_refuses(args, message):
    with pytest.raises(ValueError, match=message): convert_noise(*args)


def test_golden_edm():
    "NVlabs' EDMPrecond and VPPrecond, their own numbers."
    g, one = {k[4:]: v for k, v in GOLDEN.items() if k.startswith("edm.")}, torch.ones(41, 1, dtype=torch.float64)
    close(convert(0 * one, one, g["sigma"], "F", "D")[:, 0], g["c_skip"], rtol=1e-14, atol=0)
    close(convert(one, 0 * one, g["sigma"], "F", "D")[:, 0], g["c_out"], rtol=1e-14, atol=2e-16)    # theirs was read off a D of size 1
    close(convert_noise(g["vp_time"], "vp_time", "sigma"), g["vp_sigma"], rtol=1e-10, atol=0)    # theirs is sqrt(e^B - 1): rounding over B = 1e-6
    close(convert_noise(g["sigma"], "sigma", "vp_time"), g["vp_time_of_sigma"], rtol=1e-10, atol=0)    # theirs is ln(1 + sigma^2): rounding over 4e-6


def test_golden_kdiffusion():
    "VDenoiser: its c_skip and c_out are ours of v, its t is the angle of v in units of a right angle."
    g, one = {k[11:]: v for k, v in GOLDEN.items() if k.startswith("kdiffusion.")}, torch.ones(41, 1, dtype=torch.float64)
    close(convert(0 * one, one, g["sigma"], "v", "D")[:, 0], g["c_skip"], rtol=1e-14, atol=0)
    close(convert(one, 0 * one, g["sigma"], "v", "D")[:, 0], g["c_out"], rtol=1e-14, atol=0)
    close(convert_noise(g["sigma"], "sigma", "alpha_bar"), (g["sigma_to_t"] * math.pi / 2).cos()**2, rtol=1e-12, atol=0)    # 1 - t down to 0.008


def test_golden_diffusers():
    "add_noise and get_velocity of diffusers, at steps 0, 37, 500 and 999."
    x0, n, x_t, v, ab = (GOLDEN[f"diffusers.{k}"] for k in ("x0", "noise", "x_t", "velocity", "alpha_bar"))
    sigma = convert_noise(ab, "alpha_bar", "sigma")
    x = x_t / expand(ab.sqrt(), x_t)
    said = {"D": x0, "eps": n, "v": v}
    for a in said:
        for b in said: close(convert(said[a], x, sigma, a, b), said[b], rtol=0, atol=1e-11)    # x is up to 600, or sigma down to 0.01


def test_golden_guided_diffusion():
    "pred_xstart of OpenAI's GaussianDiffusion for a model that says eps."
    x_t, eps, D, ab = (GOLDEN[f"guided_diffusion.{k}"] for k in ("x_t", "eps", "pred_xstart", "alpha_bar"))
    got = convert(eps, x_t / expand(ab.sqrt(), x_t), convert_noise(ab, "alpha_bar", "sigma"), "eps", "D")
    close(got, D, rtol=1e-12, atol=1e-12)    # numbers up to 500


@cases
@given(SEED, st.floats(1e-3, 1e3), st.booleans())
def test_score_and_eps_lead_back_to_the_denoiser(seed, sigma, per_sample):
    x, D = seeded_noise([seed, seed ^ 1], (4, 3, 2), torch.float64)
    if per_sample: sigma = torch.tensor([sigma, 2 * sigma, 3 * sigma, 0.5 * sigma], dtype=torch.float64)
    s = expand(sigma, x)
    # float64 rounding of numbers below 10
    torch.testing.assert_close(x + s**2 * score_of(D, x, sigma), D, rtol=0, atol=1e-14)
    torch.testing.assert_close(x - s * eps_of(D, x, sigma), D, rtol=0, atol=1e-14)
    torch.testing.assert_close(-eps_of(D, x, sigma) / s, score_of(D, x, sigma), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma", [0.1, 1., 10.])
def test_tweedie_by_autograd(sigma):
    # x0 = -1 or +1: the posterior mean is tanh(x / sigma^2), the density a sum of two Gaussians
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    log_p = torch.logaddexp(-(x - 1)**2 / (2 * sigma**2), -(x + 1)**2 / (2 * sigma**2))
    auto, = torch.autograd.grad(log_p.sum(), x)
    x = x.detach()
    torch.testing.assert_close(score_of((x / sigma**2).tanh(), x, sigma), auto, rtol=0, atol=1e-12)    # scores up to 200


def test_count_nfe():
    seen = []
    def denoise(x, sigma, **cond):
        seen.append((sigma, cond))
        return x / 2
    counted = CountNFE(denoise)
    assert counted.nfe == 0
    x = torch.ones(5, 2)
    for i in range(3): assert torch.equal(counted(x, 0.1 * i, labels=i), x / 2)
    assert counted.nfe == 3 and seen == [(0.1 * i, {"labels": i}) for i in range(3)]


@cases
@given(st.lists(SEED, min_size=1, max_size=6), SHAPE, st.data())
def test_a_row_of_noise_depends_on_its_seed_alone(seeds, shape, data):
    whole = seeded_noise(seeds, shape)
    assert whole.shape == (len(seeds), *shape)
    cut = data.draw(st.integers(0, len(seeds) - 1))
    parts = [seeded_noise(part, shape) for part in (seeds[:cut], seeds[cut:]) if part]
    assert torch.equal(torch.cat(parts), whole)
    order = data.draw(st.permutations(range(len(seeds))))
    assert torch.equal(seeded_noise([seeds[i] for i in order], shape), whole[list(order)])


@cases
@given(SEED, SHAPE, st.integers(0, 100))
def test_noise_is_drawn_in_float64_and_leaves_the_global_generator_alone(seed, shape, other):
    torch.manual_seed(other)
    before = torch.get_rng_state()
    exact = seeded_noise([seed], shape, torch.float64)
    assert exact.dtype == torch.float64 and torch.equal(torch.get_rng_state(), before)
    for dtype in (torch.float32, torch.bfloat16): assert torch.equal(seeded_noise([seed], shape, dtype), exact.to(dtype))


@cases
@given(SEED, SEED)
def test_different_seeds_differ(a, b):
    x, y = seeded_noise([a, b], (32,))
    assert torch.equal(x, y) == (a == b)


def test_noise_is_unit_normal_and_rows_are_independent():
    z = seeded_noise(range(200), (2000,), torch.float64)
    assert abs(z.mean()) < 5 / 400_000**0.5                # five standard errors each
    assert abs(z.var() - 1) < 5 * (2 / 400_000)**0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / 400_000)**0.5
    off = torch.corrcoef(z)[~torch.eye(200, dtype=torch.bool)]
    assert abs(off.square().mean() * 2000 - 1) < 5 * (2 / 19_900)**0.5


def test_torch_keeps_only_32_bits_of_a_seed():
    # why larger seeds are refused; should this ever fail, they can be allowed
    draw = lambda seed: torch.randn(8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(5), draw(2**32 + 5))


@pytest.mark.parametrize("seeds", [[2**32], [-1], [0, 2**32 + 5], [0.5], [float("1e10")], [math.nan], [math.inf], torch.tensor([-3])])
def test_noise_refuses_seeds_that_would_repeat(seeds):
    with pytest.raises(ValueError, match=r"seeds must be integers from 0 to 2\*\*32 - 1"): seeded_noise(seeds, (2,))


def test_noise_refuses_no_seeds():
    with pytest.raises(ValueError, match="at least one, got none"): seeded_noise([], (2,))


def test_noise_takes_seeds_of_any_integer_kind():
    want = seeded_noise([0, 7, 2**32 - 1], (2,))
    for seeds in (torch.tensor([0, 7, 2**32 - 1]), np.array([0, 7, 2**32 - 1]), iter([0, 7, 2**32 - 1])):
        assert torch.equal(seeded_noise(seeds, (2,)), want)


@cases
@given(st.lists(SEED, min_size=2, max_size=5), SHAPE, st.data())
def test_a_row_of_a_stream_depends_on_its_seed_and_the_call_alone(seeds, shape, data):
    def calls(seeds):
        stream = NoiseStream(seeds)
        return [stream(torch.zeros(len(seeds), *shape)) for _ in range(3)]
    whole, cut = calls(seeds), data.draw(st.integers(1, len(seeds) - 1))
    for k, (left, right) in enumerate(zip(calls(seeds[:cut]), calls(seeds[cut:]))): assert torch.equal(torch.cat([left, right]), whole[k])
    order = data.draw(st.permutations(range(len(seeds))))
    for k, z in enumerate(calls([seeds[i] for i in order])): assert torch.equal(z, whole[k][list(order)])


@cases
@given(SEED, SHAPE, st.integers(0, 100))
def test_a_stream_goes_on_after_seeded_noise(seed, shape, other):
    torch.manual_seed(other)
    before = torch.get_rng_state()
    stream, g = NoiseStream([seed]), torch.Generator().manual_seed(seed)
    draws = [torch.randn(shape, dtype=torch.float64, generator=g) for _ in range(4)]
    assert torch.equal(seeded_noise([seed], shape, torch.float64)[0], draws[0])
    for k, dtype in enumerate([torch.float64, torch.float32, torch.bfloat16], 1):
        z = stream(torch.zeros(1, *shape, dtype=dtype))
        assert z.dtype == dtype and torch.equal(z[0], draws[k].to(dtype))    # drawn in float64 whatever is asked
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_never_repeats_itself_or_the_start():
    seeds, n = [0, 1, 2**32 - 1], 2000
    stream = NoiseStream(seeds)
    draws = torch.cat([seeded_noise(seeds, (n,), torch.float64), *(stream(torch.zeros(3, n, dtype=torch.float64)) for _ in range(20))])
    assert abs(draws.mean()) < 5 / draws.numel()**0.5 and abs(draws.var() - 1) < 5 * (2 / draws.numel())**0.5    # five standard errors
    assert (torch.corrcoef(draws) - torch.eye(63)).abs().max() < 6 / n**0.5    # the largest of 1953 correlations


def test_a_stream_follows_the_device_and_refuses_another_batch():
    assert NoiseStream([0, 1])(torch.zeros(2, 3, device="meta")).device.type == "meta"
    stream = NoiseStream([0, 1])
    with pytest.raises(ValueError, match=r"x must hold one sample for each of the 2 seeds, got shape \(3, 4\)"): stream(torch.zeros(3, 4))
    assert torch.equal(stream(torch.zeros(2, 4)), NoiseStream([0, 1])(torch.zeros(2, 4)))    # the refused call drew nothing
    with pytest.raises(ValueError, match="at least one, got none"): NoiseStream([])
    with pytest.raises(ValueError, match=r"seeds must be integers from 0 to 2\*\*32 - 1"): NoiseStream([2**32])


@cases
@given(B=st.integers(1, 7), C=st.sampled_from([1, 3, 4]), H=st.integers(1, 4), W=st.integers(1, 4),
       ncols=st.none() | st.integers(1, 9), scale=st.integers(1, 4), gap=st.integers(0, 3), seed=st.integers(0, 99))
def test_grid_repeats_every_pixel_exactly(B, C, H, W, ncols, scale, gap, seed):
    values = torch.randint(0, 255, (B, C, H, W), generator=torch.Generator().manual_seed(seed))    # 255 is the gap
    picture = np.array(image_grid(values / 127.5 - 1, ncols, scale, gap)).reshape(-1, 1 if C == 1 else C)
    ncols = min(B, ncols or math.ceil(B**0.5))
    nrows = math.ceil(B / ncols)
    want = np.full((nrows * (H + gap) - gap, ncols * (W + gap) - gap, C), 255)
    for i in range(B):
        r, c = i // ncols * (H + gap), i % ncols * (W + gap)
        want[r:r + H, c:c + W] = values[i].permute(1, 2, 0)
    want = want.repeat(scale, 0).repeat(scale, 1)
    assert np.array_equal(picture, want.reshape(-1, C))


def test_grid_size_mode_and_clipping():
    x = torch.tensor([-9., -1., 0., 1., 9.]).reshape(5, 1, 1, 1)
    picture = image_grid(x, ncols=5, scale=2, gap=1)
    assert picture.mode == "L" and picture.size == (18, 2)
    assert np.array(picture)[0, ::4].tolist() == [0, 0, 128, 255, 255]
    assert [image_grid(torch.zeros(1, C, 2, 2)).mode for C in (3, 4)] == ["RGB", "RGBA"]


@pytest.mark.parametrize("x", [torch.zeros(8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(0, 1, 8, 8), torch.zeros(1, 1, 0, 8)])
def test_grid_refuses_what_is_no_image(x):
    with pytest.raises(ValueError, match="x must be images"): image_grid(x)


@pytest.mark.parametrize("x, got", [(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "torch.uint8"), (np.zeros((1, 1, 2, 2)), "ndarray")])
def test_images_are_floating_point(x, got):
    for draw in (image_grid, show_images):
        with pytest.raises(ValueError, match=rf"x must be a floating-point tensor in \[-1, 1\], got {got}"): draw(x)


@pytest.mark.parametrize("kw", [dict(ncols=0), dict(ncols=-1), dict(scale=0), dict(gap=-1)])
def test_grid_refuses_impossible_sizes(kw):
    with pytest.raises(ValueError, match="ncols and scale must be at least 1 and gap at least 0"): image_grid(torch.zeros(2, 1, 2, 2), **kw)


def test_show_images_puts_labels_at_the_tiles():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ax = show_images(torch.zeros(6, 1, 8, 8), 3, "title", ["a", "b"], ["p", "q", "r"])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["p", "q", "r"] and ax.get_title() == "title"
    assert ax.get_xticks().tolist() == [3.5, 12.5, 21.5] and ax.get_yticks().tolist() == [3.5, 12.5]    # tile centres, gap 1
    assert ax.images[0].get_interpolation() == "nearest" and ax.images[0].get_array().shape == (17, 26)    # the grid with that gap
    assert show_images(torch.zeros(2, 3, 4, 4), ax=ax) is ax
    plt.close("all")


def test_colours_are_distinct():
    assert len(set(COLORS.values())) == len(COLORS)


def test_import_is_light():
    import subprocess
    import sys
    code = "import sys, ddpm_edm.core, ddpm_edm.oracle; print([m for m in ('matplotlib', 'PIL', 'sklearn', 'torchvision', 'accelerate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- what a sampler is handed ----

@cases
@given(st.lists(st.floats(0, 1e6, allow_nan=False), min_size=2, max_size=8, unique=True))
def test_a_falling_schedule_passes_as_it_is(levels):
    levels = sorted(levels, reverse=True)
    assert check_falling("sigmas", torch.tensor(levels, dtype=torch.float64)) == check_falling("sigmas", levels) == levels
    assert check_falling("sigmas", levels[:1], least=1) == levels[:1]


@pytest.mark.parametrize("sigmas, message", [
    ([2., 2.], "got 2 at index 1 after 2"), ([1., 2.], "got 2 at index 1 after 1"), ([2., 1., -1.], "got -1 at index 2 after 1"),
    ([math.inf, 1.], "got inf at index 0$"), ([math.nan, 1.], "got nan at index 0$"), ([1., math.nan], "got nan at index 1"),
    ([1.], r"sigmas must hold at least 2 values in one axis, got shape \(1,\)"), ([], r"got shape \(0,\)"), ([[1., 0.]], r"got shape \(1, 2\)"), (1., r"got shape \(\)")])
def test_a_schedule_that_does_not_fall_is_refused(sigmas, message):
    with pytest.raises(ValueError, match=message): check_falling("sigmas", sigmas)


@pytest.mark.parametrize("noise, message", [
    (torch.tensor([0., math.nan, math.inf]), r"float32 of shape \(3,\), 2 values not finite"), (torch.zeros(2, dtype=torch.int64), "int64"),
    (torch.tensor(1.), r"shape \(\)"), ([0., 1.], "list")])
def test_a_start_that_is_not_finite_is_refused(noise, message):
    with pytest.raises(ValueError, match=r"noise must be a finite floating-point tensor \(B, \*\), got .*" + message): as_state(noise)


def test_a_start_becomes_the_state():
    assert as_state(torch.ones(2)).dtype == torch.float64 and as_state(torch.ones(2), torch.float32).dtype == torch.float32


def test_counts_and_answers_are_checked():
    for n in (1, np.int64(3), True): check_count("n", n)
    check_count("n", 0, 0)
    for n, got in ((0, "0"), (2.5, "2.5"), (2., "2.0"), ("3", "'3'"), (-1, "-1")):
        with pytest.raises(ValueError, match=f"n must be a whole number and at least 1, got {got}"): check_count("n", n)
    x = torch.zeros(2, 3)
    assert check_like("D", torch.ones(2, 3, dtype=torch.float64), x).dtype == torch.float32
    for value, got in ((torch.ones(3), r"shape \(3,\)"), (torch.ones(2, 1), r"shape \(2, 1\)"), (None, "NoneType"), (1., "float")):
        with pytest.raises(ValueError, match=r"D must have shape \(2, 3\), got " + got): check_like("D", value, x)
