"What recipe measures on a data set, and the settings that follow."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.data import ImageData, diameter, digits, gain_centre, linear_gain, recipe, spectrum
from ddpm_edm.noise import LogNormal, karras_sigmas
from ddpm_edm.oracle import Gaussian
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.train import train
from ddpm_edm.unet import UNet

LEVELS = torch.logspace(-3, 2, 40, dtype=torch.float64)


def random_set(n=60, shape=(3, 6, 10), seed=0, **kw):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=g) * torch.rand(shape, generator=g) + 0.3 * torch.rand(n, 1, 1, 1, generator=g)
    return ImageData((x * 190).to(torch.uint8), **kw)


def pixels(data): return data.batch(slice(None))[0].double()


# --- spectrum

def test_spectrum_is_the_covariance_seen_in_other_axes():
    "Waves of one channel by scipy's DCT."
    from scipy.fft import dctn
    x = pixels(digits())
    expected = torch.from_numpy(dctn((x - x.mean(0)).numpy(), axes=(2, 3), norm="ortho")).square().mean(0)
    assert torch.allclose(spectrum(digits()), expected, rtol=1e-10, atol=1e-12)    # float64 rounding


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 6, 10), (4, 5, 3), (2, 1, 7)])
def test_spectrum_keeps_the_total_variance(shape):
    d = random_set(shape=shape)
    lam = spectrum(d)
    assert lam.shape == shape and (lam >= 0).all()
    assert lam.sum().item() == pytest.approx(pixels(d).var(0, correction=0).sum().item(), rel=1e-10)    # a rotation


def test_spectrum_of_one_wave():
    "Pictures of a single wave in a single colour have a single entry."
    k = torch.arange(8) + 0.5
    wave = (math.pi / 8 * 3 * k).cos()[:, None] * (math.pi / 16 * 5 * (torch.arange(16) + 0.5)).cos()
    colour = torch.tensor([1., 0.5, -0.2])
    g = torch.Generator().manual_seed(0)
    x = torch.rand(50, 1, 1, 1, generator=g) * colour[:, None, None] * wave
    lam = spectrum(ImageData.from_float(x))
    assert lam.argmax().item() == 3 * 16 + 5    # the first channel is the strongest colour
    assert lam[0, 3, 5] > 0.995 * lam.sum()     # the rest is rounding to bytes


def test_spectrum_in_parts_and_any_order(monkeypatch):
    d = digits()
    lam = spectrum(d)
    from ddpm_edm import data as module
    prod = math.prod
    monkeypatch.setattr(module.math, "prod", lambda s: prod(s) * 500)    # parts of a few images
    assert torch.allclose(spectrum(d), lam, rtol=1e-11, atol=1e-13)
    assert torch.allclose(spectrum(d.take(torch.randperm(1797))), lam, rtol=1e-11, atol=1e-13)


# --- gain

@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_gain_is_a_share_and_vanishes_at_both_ends(lam):
    lam = torch.tensor(lam, dtype=torch.float64)
    w = linear_gain(lam, LEVELS)
    assert (w >= -1e-12).all() and (w < 1).all()    # Jensen; rounding of numbers near 1
    assert linear_gain(lam, torch.tensor([1e-7, 1e7], dtype=torch.float64)).abs().max() < 1e-7    # noise^2 1e-14 against 1e-6
    assert linear_gain(lam.mean().repeat(9), LEVELS).abs().max() < 1e-12


@pytest.mark.parametrize("sigma", [0.05, 0.4, 3.])
def test_gain_is_that_of_exact_denoisers(sigma):
    "For Gaussian waves shrinking is the exact denoiser, so its error is known and can be drawn."
    lam = torch.tensor([4., 1., 0.25, 0.01], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    true, fresh = Gaussian(torch.zeros(4).double(), lam.sqrt()), Gaussian(torch.zeros(4).double(), lam.mean().sqrt().repeat(4))
    x0 = true.sample(400_000, g)
    x = x0 + sigma * torch.randn(x0.shape, generator=g, dtype=x0.dtype)
    measured = 1 - (true(x, sigma) - x0).square().mean() / (fresh(x, sigma) - x0).square().mean()
    assert measured.item() == pytest.approx(linear_gain(lam, torch.tensor([sigma])).item(), abs=0.006)    # 5 standard errors of 1.6 million squares


def test_golden_numbers():
    d = digits()
    lam = spectrum(d)
    assert gain_centre(lam, 0.002, 80) == pytest.approx((-0.7354, 0.9841), abs=2e-3)    # float64; 512 points of a smooth integrand
    assert recipe(d).train["noise"] == LogNormal(-0.72, 1.2)
    assert diameter(d) == pytest.approx((9.6307, 9.6307), abs=2e-3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 4), min_size=2, max_size=12), st.floats(0.2, 5))
def test_scaling_the_data_shifts_the_centre(lam, c):
    lam = torch.tensor(lam, dtype=torch.float64)
    if lam.max() < 1.05 * lam.min(): return    # no gain, no centre
    (a, wa), (b, wb) = gain_centre(lam, 1e-5, 1e5), gain_centre(c**2 * lam, 1e-5, 1e5)
    assert b - a == pytest.approx(math.log(c), abs=0.01) and wb == pytest.approx(wa, abs=0.01)    # the ends of the range; grid steps of 0.045


def test_centre_of_nearly_white_data():
    centre, width = gain_centre(torch.tensor([0.98, 1.02]) * 0.09, 1e-4, 1e4)
    assert centre == pytest.approx(math.log(0.3), abs=1e-3)
    assert width == pytest.approx(math.pi / 12**0.5, abs=1e-3)    # w ~ 1 / cosh(ln(sigma / s))^2: the logistic density's width, pi / sqrt(3), halved


# --- distances

@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [2, 3, 60])
def test_diameter_is_the_largest_distance(n, seed):
    d = random_set(n, seed=seed)
    x = pixels(d).flatten(1)
    brute = torch.cdist(x, x).max().item()
    assert diameter(d) == pytest.approx((brute, brute), rel=1e-5)    # float32
    low, high = diameter(d, most=1)
    assert low <= brute * (1 + 1e-5) and high >= brute * (1 - 1e-5) and low > 0.8 * brute


def test_diameter_of_a_hard_set():
    "The farthest pair isn't found by walking: it must come from comparing all that are left."
    d = digits()
    x = pixels(d).flatten(1)
    low, high = diameter(d, most=1)
    assert low < diameter(d)[0] - 0.1 < high and diameter(d)[0] == pytest.approx(torch.cdist(x, x).max().item(), rel=1e-5)


def test_diameter_of_equal_images(): assert diameter(ImageData(torch.full((5, 1, 4, 4), 7, dtype=torch.uint8))) == (0, 0)


# --- the recipe

def test_recipe_of_digits():
    d = digits()
    r = recipe(d)
    assert r.sigma_data == pytest.approx(d.stats().std, abs=1e-4)
    assert r.sigmas == dict(sigma_min=0.036, sigma_max=9.63)
    assert r.net == dict(in_channels=1, channels=64, mults=[1, 1], blocks=1, attention=[1], num_labels=10, dropout=0.)
    assert r.train["images"] == 240_000 and r.train["batch"] == 64 and r.train["ema_halflife"] == 8000
    text = str(r)
    for name in ("sigma_data", *r.sigmas, *r.net, *r.train): assert f"\n{name} " in "\n" + text
    assert set(r.reasons) <= {"sigma_data", *r.sigmas, *r.net, *r.train}
    assert all(why.startswith(("measured: ", "convention: ", "the data's")) for why in r.reasons.values())
    assert recipe(d) == r


def test_parts_plug_in(tmp_path):
    d = random_set(shape=(3, 8, 4), labels=[0, 1, 2] * 20)
    r = recipe(d)
    denoiser = EDMPrecond(UNet(**(r.net | dict(channels=32))), r.sigma_data)
    out = train(denoiser, d, tmp_path / "run", **(r.train | dict(images=16, batch=8)), progress=False)
    assert out.net.num_labels == 3 and karras_sigmas(5, **r.sigmas)[0].item() == pytest.approx(r.sigmas["sigma_max"])


@pytest.mark.parametrize("shape, mults, attention, blocks", [((1, 28, 28), [1, 1, 2], [1, 2], 2), ((3, 32, 32), [1, 1, 2, 2], [1, 2, 3], 2),
    ((3, 64, 64), [1, 1, 2, 2, 2], [2, 3, 4], 3), ((4, 17, 17), [1], [], 2), ((1, 8, 12), [1, 1], [1], 1), ((2, 5, 3), [1], [], 1)])
def test_network_fits_any_size(shape, mults, attention, blocks):
    r = recipe(random_set(20, shape))
    assert (r.net["mults"], r.net["attention"], r.net["blocks"], r.net["in_channels"]) == (mults, attention, blocks, shape[0])
    with torch.device("meta"): assert UNet(**r.net)(torch.zeros(1, *shape), torch.zeros(1)).shape == (1, *shape)


def test_width_and_dropout_follow_the_number():
    from ddpm_edm.data import _net_for
    found = [(_net_for((3, 32, 32), n, 0)["channels"], _net_for((3, 32, 32), n, 0)["dropout"]) for n in (5000, 20_000, 50_000, 10**6)]
    assert found == [(64, 0.25), (128, 0.25), (128, 0.13), (128, 0.1)]


def test_empty_waves_do_not_pull_below_the_limit():
    x = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(pixels(digits()), 2), scale_factor=2, mode="bicubic").clamp(-1, 1)
    smooth = ImageData.from_float(x)
    r = recipe(smooth)
    assert gain_centre(spectrum(smooth), 0.002, 80)[0] < -1.8
    assert r.train["noise"].P_mean == round(math.log(smooth.stats().std) - 0.5, 2) and "is lower" in r.reasons["noise"]


def test_part_of_a_large_set_is_said():
    d = random_set(300)
    r = recipe(d, most=100)
    assert "of 100 images drawn" in r.reasons["sigma_data"] and "drawn" in r.reasons["sigma_max"]
    assert r == recipe(d, most=100) and r != recipe(d, most=100, seed=1)
    assert r.sigma_data == pytest.approx(recipe(d).sigma_data, rel=0.05)
    assert "drawn" not in str(recipe(d))


def test_bound_is_said(monkeypatch):
    from ddpm_edm import data as module
    whole = recipe(digits())
    monkeypatch.setattr(module.diameter, "__defaults__", (1,))
    r = recipe(digits())
    assert r.sigmas["sigma_max"] > whole.sigmas["sigma_max"] and "bound on the distance" in r.reasons["sigma_max"] and "occurs" in r.reasons["sigma_max"]


@pytest.mark.parametrize("data, message", [
    (ImageData(torch.zeros(1, 1, 4, 4, dtype=torch.uint8)), "at least 2 images, got 1"),
    (ImageData(torch.full((5, 1, 4, 4), 9, dtype=torch.uint8), name="flat"), "the 5 of flat are all alike"),
])
def test_refused(data, message):
    with pytest.raises(ValueError, match=message): recipe(data)
