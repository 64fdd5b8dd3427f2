"core: broadcasting, score and noise from a denoiser, per-sample noise, pictures."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import COLORS, CountNFE, eps_of, expand, image_grid, score_of, seeded_noise, show_images

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


@pytest.mark.parametrize("seeds", [[2**32], [-1], [0, 2**32 + 5], [0.5], [float("1e10")], torch.tensor([-3])])
def test_noise_refuses_seeds_that_would_repeat(seeds):
    with pytest.raises(ValueError, match=r"seeds must be integers from 0 to 2\*\*32 - 1"): seeded_noise(seeds, (2,))


def test_noise_refuses_no_seeds():
    with pytest.raises(ValueError, match="at least one, got none"): seeded_noise([], (2,))


def test_noise_takes_seeds_of_any_integer_kind():
    want = seeded_noise([0, 7, 2**32 - 1], (2,))
    for seeds in (torch.tensor([0, 7, 2**32 - 1]), np.array([0, 7, 2**32 - 1]), iter([0, 7, 2**32 - 1])):
        assert torch.equal(seeded_noise(seeds, (2,)), want)


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
