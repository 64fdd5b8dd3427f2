"Augmentation: golden numbers of EDM's pipeline, exact moves, the filter's algebra, draws, labels and faults."
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ddpm_edm import augment
from ddpm_edm.augment import SYM6, Augment, colours, downsample, move_pixels, recolour, rotation, scaling, translation, upsample, warp

GOLDEN = np.load(ROOT / "tests/golden/edm_augment.npz")
CASES = json.loads(str(GOLDEN["_meta"]))
THEIR_NAMES = dict(rotate_int="rotate90", translate_int="shift", rotate_frac="rotate", aniso="stretch", translate_frac="translate")
NAMES = list(augment._OPERATIONS)
COLOUR = NAMES[8:]
torch.set_num_threads(1)


def gen(seed=0): return torch.Generator().manual_seed(seed)
def images(B=3, C=3, H=9, W=9, seed=0, dtype=torch.float64): return torch.rand(B, C, H, W, generator=gen(seed), dtype=dtype) * 2 - 1
def eye(B=1, n=3): return torch.eye(n, dtype=torch.float64).expand(B, n, n)
def close(a, b, atol): assert a.shape == b.shape and (a - b).abs().max() <= atol, (a - b).abs().max()


# --- golden numbers

def recorded(case):
    "The pipeline of a recorded run, and its draws as our parameters."
    kw = dict(CASES[case]["kwargs"])
    p = kw.pop("p", 1)
    pipe = Augment(**{THEIR_NAMES.get(k, k): min(p * v, 1.) for k, v in kw.items()})
    draws = iter([torch.as_tensor(GOLDEN[k]).double() for k in sorted(GOLDEN.files) if k.startswith(f"{case}.draw")])
    params = {}
    for name in pipe.names:
        kind, v = augment._OPERATIONS[name][0], next(draws).reshape(-1, 6).T
        if kind == "uniform": v = 2 * v - 1
        if kind == "stretch": angle = 2 * next(draws)[:, None] - 1
        params[name] = v * (next(draws).reshape(6, 1) < getattr(pipe, name))
        if kind == "stretch": params[name] = torch.cat([params[name], angle * (next(draws)[:, None] < 0.5)], dim=1)
    assert next(draws, None) is None
    x0 = torch.as_tensor(GOLDEN["images"])
    return pipe, params, x0.mean(1, keepdim=True) if GOLDEN[f"{case}.out"].shape[1] == 1 else x0


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    pipe, params, x0 = recorded(case)
    x, told = pipe(x0, params)
    close(x, torch.as_tensor(GOLDEN[f"{case}.out"]), atol=1e-6)        # their taps are rounded to float32
    close(told, torch.as_tensor(GOLDEN[f"{case}.labels"]), atol=1e-6)
    assert told.dtype == torch.float32 and told.shape == (6, pipe.dim)


@pytest.mark.parametrize("case", CASES)
def test_golden_with_their_taps(case, monkeypatch):
    monkeypatch.setattr(augment, "SYM6", torch.tensor(SYM6).tolist())
    pipe, params, x0 = recorded(case)
    x, wanted = pipe(x0, params)[0], torch.as_tensor(GOLDEN[f"{case}.out"])
    geometry = [params[k][:, :1 if k == "stretch" else None] for k in ("scale", "rotate", "stretch", "translate") if k in params]
    read = torch.cat(geometry, dim=1).ne(0).any(1) if geometry else torch.ones(6, dtype=torch.bool)
    close(x[read], wanted[read], atol=1e-12)
    # pictures that nothing moves are filtered there all the same, which rounded taps don't quite undo; here they are left alone
    if (~read).any(): close(x[~read], wanted[~read], atol=2e-7)


def test_golden_taps(): assert np.abs(GOLDEN["wavelet_sym6"] - SYM6).max() < 1e-11     # published to 1e-12


# --- the filter

def test_taps_are_orthogonal_to_their_even_shifts():
    h = np.array(SYM6)
    assert [h[:12 - 2 * m] @ h[2 * m:] for m in range(6)] == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-13)
    for m in range(6): assert abs(((-1.)**np.arange(12) * (np.arange(12) / 12)**m) @ h) < 1e-12     # six zeros at the finest wave


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_halving_is_the_transpose_of_doubling_and_undoes_it(H, W, C):
    x, y = images(2, C, H, W), images(2, C, 2 * H + 10, 2 * W + 10, seed=1)
    assert upsample(x).shape == (2, C, 2 * H, 2 * W) and downsample(y).shape == (2, C, H, W)
    whole = F.pad(x, (5, 5, 5, 5))                                          # so that no tail of the filter is cut
    close(downsample(upsample(whole)[..., 5:-5, 5:-5]), x, atol=1e-13)
    left, right = (upsample(whole)[..., 5:-5, 5:-5] * y).sum(), (x * downsample(y)).sum()
    assert left.item() == pytest.approx(right.item(), abs=1e-11)


# --- geometry

def test_matrices():
    q = torch.tensor([1., 0, 1], dtype=torch.float64)
    assert (scaling(2, 3) @ q).tolist() == [2, 0, 1] and (translation(2, 3) @ q).tolist() == [3, 3, 1]
    assert (rotation(math.pi / 2) @ q).tolist() == pytest.approx([0, 1, 1])
    assert scaling(torch.ones(4), 2).shape == (4, 3, 3) and rotation(torch.zeros(4)).shape == (4, 3, 3)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_exact_moves_undo_themselves(H, W, C, seed):
    x = images(2, C, H, W, seed)
    for M, same in ((scaling(-1, 1), x.flip(3)), (scaling(1, -1), x.flip(2)), (scaling(-1, -1), x.flip(2, 3))):
        assert torch.equal(move_pixels(x, M.expand(2, 3, 3)), same)
        assert torch.equal(move_pixels(same, M.expand(2, 3, 3)), x)
    assert torch.equal(move_pixels(x, eye(2)), x)


@pytest.mark.parametrize("n, k", list(itertools.product((4, 5), range(4))))
def test_quarter_turns(n, k):
    x = images(2, 2, n, n)
    assert torch.equal(move_pixels(x, rotation(torch.full((2,), k * math.pi / 2)).round()), x.rot90(k, (2, 3)))


@given(st.integers(2, 8), st.integers(2, 8), st.integers(-20, 20), st.integers(-20, 20))
@settings(max_examples=40, deadline=None)
def test_shift_mirrors_what_comes_in(H, W, dx, dy):
    x = images(1, 1, H, W)
    def at(i, n): return np.pad(np.arange(n), 40, mode="reflect")[40 + i:40 + i + n]
    assert torch.equal(move_pixels(x, translation(dx, dy)[None]), x[:, :, at(dy, H)][..., at(dx, W)])


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_warp_by_nothing_is_nothing(H, W, C):
    x = images(2, C, H, W)
    close(warp(x, eye(2)), x, atol=1e-12)


def test_warp_is_linear_and_each_picture_has_its_own_matrix():
    x, y = images(2, 3, 10, 12), images(2, 3, 10, 12, seed=1)
    M = rotation(torch.tensor([0.3, -1.])) @ translation(torch.tensor([0.4, -2.]), 0.7)
    close(warp(2 * x - y, M), 2 * warp(x, M) - warp(y, M), atol=1e-12)
    alone = torch.cat([warp(x[i:i + 1], M[i:i + 1]) for i in range(2)])
    close(warp(x, M), alone, atol=1e-5)                                    # a margin made for two leaves a longer tail at the corners


def test_warp_moves_where_it_says():
    "A broad bump, read at M q: no half pixels lost, x right and y down, also where the picture is not square."
    H, W = 24, 32
    q = torch.stack([torch.arange(W).expand(H, W) - (W - 1) / 2, torch.arange(H)[:, None].expand(H, W) - (H - 1) / 2, torch.ones(H, W)]).flatten(1).double()
    def bump(M):
        x, y, _ = M @ q
        return torch.exp(-((x - 3)**2 + 2 * (y + 2)**2) / 18).reshape(1, 1, H, W)
    for M in (translation(1.5, -2.25), rotation(0.5), scaling(0.8, 1.3), rotation(torch.tensor(-0.7)) @ scaling(1.2, 0.9) @ translation(1., 0.5)):
        x, y, _ = M @ q
        inside = ((x.abs() < W / 2 - 2) & (y.abs() < H / 2 - 2)).reshape(1, 1, H, W)    # elsewhere the mirror
        close(warp(bump(eye()[0]), M[None])[inside], bump(M)[inside], atol=0.03)      # bilinear on the doubled picture, and 0.1 pixel of centre
        assert (bump(eye()[0]) - bump(M)).abs().max() > 0.15


# --- colour

def test_colours():
    u = torch.ones(3, dtype=torch.float64) / 3**0.5
    for luma, chroma, hue, shift in ((1, 1, 0, 0.3), (2, 2, 0, 0), (-1, 1, 0, 0), (1, 1, 1., 0), (1, 3, 0, 0), (0.5, 2, -2., 0.1)):
        M = colours(luma, chroma, hue, shift)
        A, b = M[:3, :3], M[:3, 3]
        close(A @ u, luma * u, atol=1e-14)
        v = torch.tensor([1., -1, 0], dtype=torch.float64)
        assert (A @ v).norm().item() == pytest.approx(chroma * v.norm().item()) and abs((A @ v) @ u) < 1e-14
        assert ((A @ v) @ v / (A @ v).norm() / v.norm()).item() == pytest.approx(math.cos(hue))
        assert b.tolist() == [shift] * 3 and M[3].tolist() == [0, 0, 0, 1]
        if hue: assert (torch.linalg.cross(v, A @ v) @ u).item() * hue > 0
    assert colours(torch.ones(5), 2.).shape == (5, 4, 4)


def test_grey_is_three_equal_colours():
    x, M = images(4, 1), colours(torch.rand(4, generator=gen()) + 1, torch.rand(4, generator=gen(1)), torch.rand(4, generator=gen(2)), 0.2)
    close(recolour(x, M), recolour(x.expand(-1, 3, -1, -1), M).mean(1, keepdim=True), atol=1e-14)


# --- draws and labels

probabilities = st.sampled_from([0., 0.1, 0.5, 1.])
pipes = st.fixed_dictionaries({name: probabilities for name in NAMES}).map(lambda kw: Augment(**kw))


@given(pipes, st.integers(0, 5), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_draws_are_seeded_and_fit(pipe, B, seed):
    params, again, other = pipe.draw(B, gen(seed)), pipe.draw(B, gen(seed)), pipe.draw(B, gen(seed + 1))
    assert list(params) == pipe.names == [name for name in NAMES if getattr(pipe, name)]
    for name, v in params.items():
        assert v.shape == (B, augment._OPERATIONS[name][1]) and v.dtype == torch.float64 and torch.equal(v, again[name])
    x0 = images(B, 3, 6, 6)
    x, told = pipe(x0, params)
    assert x.shape == x0.shape and x.dtype == x0.dtype and x.isfinite().all()
    assert told.shape == (B, pipe.dim) and told.dtype == torch.float32
    untouched = torch.cat([torch.zeros(B, 1)] + [v for v in params.values()], dim=1).eq(0).all(1)
    assert torch.equal(x[untouched], x0[untouched]) and not told[untouched].any()
    assert Augment(**pipe.config) == pipe
    if B and any(v.abs().sum() > 0 for k, v in params.items() if k in ("scale", "translate", "brightness")):
        assert any(not torch.equal(v, other[k]) for k, v in params.items())


@given(pipes, st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=20, deadline=None)
def test_nothing_drawn_is_nothing_done(pipe, dtype):
    x0 = images(2, 3, 7, 7, dtype=dtype)
    for params in ({}, {name: torch.zeros_like(v) for name, v in pipe.draw(2).items()}):
        x, told = pipe(x0, params)
        assert torch.equal(x, x0) and torch.equal(told, torch.zeros(2, pipe.dim))


def test_no_operation():
    x0 = images()
    x, told = Augment()(x0, Augment().draw(3))
    assert torch.equal(x, x0) and told.shape == (3, 0) and Augment().dim == 0


def test_how_often_and_how_much():
    n, p = 20_000, 0.3
    params = Augment(**dict.fromkeys(NAMES, p)).draw(n, gen())
    share = lambda v: (v[:, 0] != 0).double().mean().item()
    for name, v in params.items():
        hit = dict(coin=1 / 2, quarter=3 / 4).get(augment._OPERATIONS[name][0], 1.) * p
        assert abs(share(v) - hit) < 5 * (hit * (1 - hit) / n)**0.5, name          # five standard errors
        on = v[v[:, 0] != 0]
        kind = augment._OPERATIONS[name][0]
        values = on[:, :1] if kind == "stretch" else on
        if kind == "coin": assert (values == 1).all()
        elif kind == "quarter": assert values.unique().tolist() == [1, 2, 3]
        elif kind == "uniform":
            assert values.abs().max() <= 1
            assert values.square().mean().item() == pytest.approx(1 / 3, abs=5 * (4 / 45 / len(values))**0.5)
        else: assert values.square().mean().item() == pytest.approx(1, abs=5 * (2 / len(values))**0.5)
    turned = params["stretch"][params["stretch"][:, 0] != 0][:, 1]
    assert abs((turned != 0).double().mean() - 0.5) < 5 * 0.5 / len(turned)**0.5 and turned.abs().max() <= 1
    assert Augment(stretch=1., stretch_turn=0.).draw(99, gen())["stretch"][:, 1].eq(0).all()


def test_strengths_act():
    x0, two = images(1, 3, 16, 16), torch.full((1, 2), 0.5, dtype=torch.float64)
    half = dict(shift_max=0.25, scale_std=0.1, rotate_max=0.5, stretch_std=0.1, translate_std=0.05, brightness_std=0.1, contrast_std=0.25, hue_max=0.5, saturation_std=0.5)
    for name, value in half.items():
        op = name.rsplit("_", 1)[0]
        params = {op: two[:, :augment._OPERATIONS[op][1]]}
        (a, _), (b, _) = (Augment(**{op: 1.}, **kw)(x0, params) for kw in ({}, {name: value}))
        assert not torch.equal(a, b), name
        if name not in ("shift_max", "translate_std"):                              # twice the draw at half the strength
            doubled = {op: params[op] * torch.tensor([[2., 1.]])[:, :params[op].shape[1]]}
            close(Augment(**{op: 1.}, **{name: value})(x0, doubled)[0], a, atol=1e-12)


def test_edm():
    pipe = Augment.edm()
    assert pipe.names == ["xflip", "yflip", "scale", "rotate", "stretch", "translate"] and pipe.dim == 9
    assert pipe.xflip == 1 and pipe.yflip == pipe.translate == 0.12 and Augment.edm(0.15).scale == 0.15


@pytest.mark.parametrize("C", [1, 2, 5])
def test_geometry_for_any_channels_and_shape(C):
    pipe = Augment(**dict.fromkeys(["xflip", "yflip", "shift", "scale", "rotate", "stretch", "translate"], 1.))
    params, x0 = pipe.draw(4, gen()), images(4, C, 6, 11)
    x, _ = pipe(x0, params)
    for c in range(C): close(pipe(x0[:, c:c + 1], params)[0], x[:, c:c + 1], atol=1e-12)


def test_pictures_do_not_depend_on_their_batch():
    pipe, x0 = Augment(**dict.fromkeys(NAMES, 0.7)), images(6, 3, 12, 12)
    params = pipe.draw(6, gen(3))
    x, told = pipe(x0, params)
    for i in range(6):
        alone, label = pipe(x0[i:i + 1], {k: v[i:i + 1] for k, v in params.items()})
        close(alone, x[i:i + 1], atol=1e-4)                                        # a longer margin changes the last tail of the filter at the corners
        assert torch.equal(label, told[i:i + 1])


def test_float32_is_near():
    pipe, x0 = Augment(**dict.fromkeys(NAMES, 1.)), images(6, 3, 12, 12)
    params = pipe.draw(6, gen(4))
    close(pipe(x0.float(), params)[0].double(), pipe(x0, params)[0], atol=2e-4)     # contrast and saturation amplify rounding


# --- faults

@pytest.mark.parametrize("kw, message", [
    (dict(xflip=1.5), "xflip must be a probability, from 0 to 1, got 1.5"),
    (dict(hue=-0.1), "hue must be a probability, from 0 to 1, got -0.1"),
    (dict(scale=float("nan")), "scale must be a probability, from 0 to 1, got nan"),
    (dict(stretch_turn=2.), "stretch_turn must be a probability, from 0 to 1, got 2"),
    (dict(scale_std=0.), "scale_std must be positive and finite, got 0"),
    (dict(rotate_max=math.inf), "rotate_max must be positive and finite, got inf"),
])
def test_bad_settings(kw, message):
    with pytest.raises(ValueError, match=message): Augment(**kw)


@pytest.mark.parametrize("pipe, x0, params, message", [
    (Augment(), torch.zeros(3, 8, 8), {}, r"x0 must be \(B, C, H, W\), float32 or float64, got \(3, 8, 8\)"),
    (Augment(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {}, "x0 must be .*uint8"),
    (Augment(hue=1.), torch.zeros(1, 1, 8, 8), {}, "hue and saturation need images with 3 channels, got 1"),
    (Augment(contrast=1.), torch.zeros(1, 2, 8, 8), {}, "contrast need.? images with 1 or 3 channels, got 2"),
    (Augment(rotate90=1.), torch.zeros(1, 3, 8, 6), {}, "rotate90 needs square images, got 8 x 6"),
    (Augment(scale=1.), torch.zeros(1, 3, 8, 8), dict(rotate=torch.zeros(1, 1)), "params must be of operations in use, scale, got rotate"),
    (Augment(scale=1.), torch.zeros(2, 3, 8, 8), dict(scale=torch.zeros(1, 1)), r"params\['scale'\] must be \(2, 1\) on the cpu, got \(1, 1\)"),
    (Augment(scale=1.), torch.zeros(2, 3, 8, 8), dict(scale=torch.zeros(2, 1, device="meta")), r"params\['scale'\] must be \(2, 1\) on the cpu, got \(2, 1\) on meta"),
])
def test_bad_images_and_params(pipe, x0, params, message):
    with pytest.raises(ValueError, match=message): pipe(x0, params)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_is_not_waited_for():
    pipe, x0 = Augment(**dict.fromkeys(NAMES, 0.5)), images(8, 3, 12, 12)
    params = pipe.draw(8, gen())
    on_gpu = x0.cuda()
    pipe(on_gpu, params)
    torch.cuda.set_sync_debug_mode("error")
    try: x, told = pipe(on_gpu, params)
    finally: torch.cuda.set_sync_debug_mode("default")
    close(x.cpu(), pipe(x0, params)[0], atol=1e-9)
