"Distances, neighbours and judges: against other programs, 50-digit arithmetic, closed forms, and with every wrong input."
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from urllib.error import URLError

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import nn

from ddpm_edm import metrics
from ddpm_edm.data import ImageData, digits
from ddpm_edm.metrics import (Classifier, Features, classifier, density_coverage, evaluate, find_copies, frechet_distance, frechet_infinity,
                              from_moments, inception, kid, kid_subsets, load_statistics, nearest, pixel_features, precision_recall, reference,
                              save_statistics, show_copies, statistics, table, to_uint8, train_classifier, weights_hash)

torch.set_num_threads(1)


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ill(n, F, power, seed=0):
    "Features whose covariance has a condition number of about 10**power, and a mean."
    turn = torch.linalg.qr(normal(F, F, seed=99)).Q
    return normal(n, F, seed=seed) * torch.logspace(0, -power / 2, F, dtype=torch.float64) @ turn.T + 0.1 * seed


def brute_frechet(a, b):
    "The usual form in 60 digits."
    with mpmath.workdps(60):
        def moments(x):
            x = mpmath.matrix(x.tolist())
            mean = mpmath.matrix([[mpmath.fsum(x[:, j]) / x.rows for j in range(x.cols)]])
            c = mpmath.matrix([[x[i, j] - mean[0, j] for j in range(x.cols)] for i in range(x.rows)])
            return mean, c.T * c / (x.rows - 1)
        (m, S), (k, T) = moments(a), moments(b)
        roots = [mpmath.re(mpmath.sqrt(e)) for e in mpmath.eig(S * T, left=False, right=False)]
        d = m - k
        return float((d * d.T)[0, 0] + sum(S[i, i] + T[i, i] for i in range(S.rows)) - 2 * mpmath.fsum(roots))


# --- Fréchet distance

CASES = {"plain": (normal(300, 16), 1.5 * normal(200, 16, seed=1) + 0.3),
         "ill-conditioned": (ill(300, 16, 6), 1.2 * ill(250, 16, 6, seed=1)),
         "few samples": (normal(20, 48), normal(30, 48, seed=1) + 0.2),
         "few and ill": (ill(12, 24, 4), 2 * ill(18, 24, 4, seed=1)),
         "one feature": (normal(50, 1), 2 * normal(40, 1, seed=1))}


@pytest.mark.filterwarnings("ignore:.* samples for .* features")
@pytest.mark.parametrize("case", CASES)
def test_frechet_equals_scipy(case):
    a, b = CASES[case]
    S, T = np.cov(a.T.numpy()).reshape(a.shape[1], -1), np.cov(b.T.numpy()).reshape(a.shape[1], -1)
    root = sqrtm(S) @ sqrtm(T) if case == "one feature" else sqrtm(S @ T)
    theirs = ((a.mean(0) - b.mean(0))**2).sum().item() + np.trace(S) + np.trace(T) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)    # theirs is that exact


@pytest.mark.filterwarnings("ignore:.* samples for .* features")
@pytest.mark.parametrize("case", CASES)
def test_frechet_equals_torchmetrics_and_fidelity(case):
    fid = pytest.importorskip("torchmetrics.image.fid")
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = CASES[case]
    class Same(nn.Module):
        num_features = a.shape[1]
        def forward(self, x): return x
    metric = fid.FrechetInceptionDistance(Same())
    metric.set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=1e-6)
    if a.shape[1] > 1:
        stats = [fidelity.fid_features_to_statistics(x) for x in (a, b)]
        assert frechet_distance(a, b) == pytest.approx(fidelity.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:.* samples for .* features")
@pytest.mark.parametrize("a, b", [(ill(30, 7, 16), 1.01 * ill(30, 7, 16) + 1e-4), (ill(5, 8, 10), ill(6, 8, 10, seed=1)), (normal(4, 6), normal(5, 6, seed=1)),
                                  (ill(20, 6, 24), 1.001 * ill(20, 6, 24)), (normal(20, 5) + 1e5, normal(20, 5, seed=1) + 1e5)])
def test_frechet_equals_sixty_digits(a, b):
    size = frechet_distance(a, torch.zeros_like(a)[:2])
    assert frechet_distance(a, b) == pytest.approx(brute_frechet(a, b), abs=1e-13 * size, rel=1e-9)    # rounding of the trace, and of features at 1e5


@pytest.mark.filterwarnings("ignore:.* samples for .* features")
@pytest.mark.parametrize("n", [2, 10, 63, 64, 65, 500])
def test_distance_to_itself(n):
    x = normal(n, 64)
    assert frechet_distance(x, x) <= 1e-12    # traces of 64 to 1e-15; the root of eigenvalues leaves 1e-6
    assert frechet_distance(x, x + 1) == pytest.approx(64, rel=1e-12)
    assert frechet_distance(x, -3 * x) == pytest.approx(16 * x.mean(0).square().sum().item() + 4 * x.var(0).sum().item(), rel=1e-10)


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_frechet_properties(seed, F, scale):
    a, b, c = normal(40, F, seed=seed), scale * normal(50, F, seed=seed + 1) + 1, normal(30, F, seed=seed + 2)
    turn = torch.linalg.qr(normal(F, F, seed=seed + 3)).Q
    d = frechet_distance(a, b)
    assert d >= 0 and frechet_distance(b, a) == pytest.approx(d, rel=1e-9)
    assert frechet_distance(a @ turn + 5, b @ turn + 5) == pytest.approx(d, rel=1e-9)         # moving both changes nothing
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * d, rel=1e-9)                   # squared units
    assert frechet_distance(a, c)**0.5 <= d**0.5 + frechet_distance(b, c)**0.5 + 1e-9         # the root is a metric


@given(st.lists(st.integers(1, 700), min_size=1, max_size=12), st.integers(1, 5), st.sampled_from([0., 1e6]))
@settings(max_examples=30, deadline=None)
def test_streaming_is_exact(cuts, F, offset):
    x = normal(sum(cuts) + 2, F) + offset
    whole, parts = statistics(x), statistics(iter(x.split([*cuts, 2])))
    for s in (whole, parts):
        assert s.n == len(x) and len(s.root) <= F and s.root.dtype == torch.float64
        torch.testing.assert_close(s.mean, x.mean(0), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(s.cov, x.T.cov().reshape(F, F), rtol=1e-8, atol=1e-9)    # features at 1e6 are rounded to 1e-10


def test_joining_parts():
    x, y = normal(30, 4) + 3, 2 * normal(50, 4, seed=1)
    joined, whole = statistics(x).joined(statistics(y)), statistics(torch.cat([x, y]))
    assert joined.n == 80
    torch.testing.assert_close(joined.cov, whole.cov, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joined.mean, whole.mean, rtol=1e-12, atol=1e-12)
    numpy = statistics(np.float32(torch.cat([x, y])))
    torch.testing.assert_close(numpy.cov, whole.cov, rtol=1e-5, atol=1e-5)    # float32 features


def test_memory_is_bounded(monkeypatch):
    "However many parts come, no more rows are held than the chunk and the root."
    held = []
    folded = metrics._folded
    monkeypatch.setattr(metrics, "_folded", lambda rows: held.append(len(rows)) or folded(rows))
    statistics(normal(64, 600, seed=i).float() for i in range(60))
    assert max(held) <= 2 * 600 + 64 + 600 + 600 + 1 and len(held) < 10    # chunk, root of each, and the row of means; folded rarely
    held.clear()
    statistics(normal(9000, 600))
    assert max(held) <= 2 * 600 + 600 + 1


def test_features_are_not_copied_whole():
    "Neither the check for NaN nor the distances make another table as large as the features."
    script = """import resource, torch
from ddpm_edm.metrics import nearest
many, few = torch.rand(100_000, 1024), torch.rand(100, 1024)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
nearest(many, few), nearest(few, many)
print(peak() - before)"""
    grown = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert grown < 350    # MB: blocks of 1024 rows in float64, and what the allocator keeps (about 200); a copy of the features is 400


def test_from_moments():
    x = normal(200, 6) @ normal(6, 6, seed=1)
    s = from_moments(x.mean(0).numpy(), x.T.cov().numpy(), 200, dict(features="f"))
    assert s.n == 200 and s.about == dict(features="f")
    torch.testing.assert_close(s.cov, x.T.cov(), rtol=1e-10, atol=1e-12)
    y = normal(100, 6, seed=2)
    assert frechet_distance(s, y) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    flat = from_moments(torch.zeros(2), torch.diag(torch.tensor([1., -1e-8])), 10)    # a zero as float32 leaves it
    torch.testing.assert_close(flat.cov, torch.diag(torch.tensor([1., 0.], dtype=torch.float64)), rtol=1e-12, atol=1e-12)
    few = normal(5, 6)
    with pytest.warns(UserWarning, match="comes out too high"):
        few_stats = from_moments(few.mean(0), few.T.cov(), 5)
        assert len(few_stats.root) == 4 and frechet_distance(few_stats, few) < 1e-12    # rounding of zero eigenvalues is dropped


@pytest.mark.parametrize("mean, cov, n, say", [
    (torch.zeros(2), torch.eye(3), 9, "got (2,) and (3, 3)"), (torch.zeros(2), torch.tensor([[1., 1.], [0., 1.]]), 9, "symmetric"),
    (torch.zeros(2), torch.diag(torch.tensor([1., -1.])), 9, "no negative eigenvalue, got -1"), (torch.zeros(2), torch.eye(2), 1, "n must be"),
    (torch.tensor([0., torch.nan]), torch.eye(2), 9, "finite"), (torch.zeros(2), torch.eye(2) * torch.inf, 9, "finite")])
def test_bad_moments(mean, cov, n, say):
    with pytest.raises(ValueError) as e: from_moments(mean, cov, n)
    assert say in str(e.value)


def test_few_samples_warn_and_say_what_that_does():
    with pytest.warns(UserWarning, match="a has 8 samples for 8 features, so its covariance is singular and the Fréchet distance comes out too high"):
        frechet_distance(normal(8, 8), normal(50, 8))
    with pytest.warns(UserWarning, match="b has 3 samples for 8 features"): frechet_distance(normal(50, 8), normal(3, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(normal(9, 8), normal(50, 8))


@pytest.mark.parametrize("bad, say", [
    (torch.zeros(0, 4), "not empty, got shape (0, 4)"), (torch.zeros(5, 0), "not empty"), (torch.zeros(5), "(N, F)"), (torch.zeros(5, 4, 1), "(N, F)"),
    (torch.zeros(5, 4, dtype=torch.uint8), "floating point"), (normal(1, 4), "at least 2 samples, got 1"), (torch.full((5, 4), torch.inf), "5 of 5 rows"),
    (torch.tensor([[1., 2], [torch.nan, 3]]), "1 of 2 rows are not, the first at 1"), (iter([]), "at least 2 samples, got 0"),
    (iter([normal(5, 4), normal(5, 3)]), "all have 4 columns, got 3")])
def test_bad_features(bad, say):
    with pytest.raises(ValueError) as e: statistics(bad)
    assert say in str(e.value)
    if isinstance(bad, torch.Tensor):
        for f in (kid, precision_recall, density_coverage, nearest, find_copies):
            with pytest.raises(ValueError): f(bad, normal(30, 4))


@pytest.mark.parametrize("f", [frechet_distance, kid, precision_recall, density_coverage, nearest, find_copies, kid_subsets])
def test_different_features(f):
    with pytest.raises(ValueError, match="4.*5"): f(normal(30, 4), normal(30, 5))


# --- bias

@pytest.mark.parametrize("F, n", [(1, 50), (6, 300)])
def test_bias_of_white_features(F, n):
    ref = from_moments(torch.zeros(F), torch.eye(F), 10**9)
    found = torch.tensor([frechet_distance(normal(n, F, seed=i), ref) for i in range(400)])
    assert found.mean().item() == pytest.approx(F * (F + 5) / 4 / n, abs=5 * found.std().item() / 20 + 2 * F / n * F * (F + 5) / 4 / n)    # second order in F / n


def test_infinity_takes_the_bias_off():
    ref, truth = from_moments(torch.zeros(6), torch.eye(6), 10**9), 0.25
    found = [frechet_infinity(normal(600, 6, seed=i) + (truth / 6)**0.5, ref) for i in range(100)]
    values, plain = torch.tensor([f.value for f in found]), torch.tensor([f.distances[0] for f in found])
    assert values.mean().item() == pytest.approx(truth, abs=5 * values.std().item() / 10)
    assert plain.mean().item() - truth > 5 * plain.std().item() / 10 > 0


def test_infinity_is_the_line_it_says():
    x, ref = normal(403, 3), normal(200, 3, seed=1)
    e = frechet_infinity(x, ref, parts=3, seed=5)
    assert e.n == [403, 201, 134] and e.distances[0] == pytest.approx(frechet_distance(x, ref), rel=1e-12)
    slope, value = np.polyfit([1 / n for n in e.n], e.distances, 1)
    assert (e.value, e.slope) == (pytest.approx(value, rel=1e-12), pytest.approx(slope, rel=1e-12))
    assert frechet_infinity(x, statistics(ref), parts=3, seed=5).value == pytest.approx(e.value, rel=1e-9) != frechet_infinity(x, ref, parts=3, seed=6).value
    with pytest.raises(ValueError, match="samples must be more than 15 for 4 parts"): frechet_infinity(x[:15], ref)
    with pytest.raises(ValueError, match="parts must be"): frechet_infinity(x, ref, parts=1)
    assert frechet_infinity(x[:16], ref).n == [16, 8, 5, 4]


# --- KID

def brute_kid(a, b):
    k = lambda x, y: (x @ y.T / x.shape[1] + 1)**3
    off = lambda m: (m.sum() - m.trace()) / (len(m) * (len(m) - 1))
    return (off(k(a, a)) + off(k(b, b)) - 2 * k(a, b).mean()).item()


@pytest.mark.parametrize("n, m, F", [(2, 2, 1), (30, 41, 5), (1030, 900, 3)])
def test_kid(n, m, F):
    a, b = normal(n, F), 0.5 * normal(m, F, seed=1) + 1
    found = kid(a, b)
    assert found.value == pytest.approx(brute_kid(a, b), rel=1e-9) and found.error >= 0
    assert kid(b, a) == pytest.approx(found, rel=1e-9)
    assert kid(a.float(), b.numpy()).value == pytest.approx(found.value, rel=1e-5)


def test_kernel_sums_by_blocks():
    a, b = normal(50, 3), normal(40, 3, seed=1)
    for pair in ((a, None), (a, b)):
        for whole, parts in zip(metrics._kernel_sums(*pair), metrics._kernel_sums(*pair, block=7)): torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-9)


def test_kid_equals_torchmetrics_on_the_same_subsets():
    module = pytest.importorskip("torchmetrics.image.kid")
    a, b = normal(80, 12), normal(90, 12, seed=1) + 0.3
    class Same(nn.Module):
        def forward(self, x): return x
    metric = module.KernelInceptionDistance(Same(), subsets=20, subset_size=50)
    metric.update(a, real=True)
    metric.update(b, real=False)
    torch.manual_seed(7)
    mean, spread = metric.compute()
    ours = kid_subsets(a, b, 20, 50, seed=7)
    assert ours.value == pytest.approx(mean.item(), rel=1e-6) and ours.error == pytest.approx(spread.item(), rel=1e-6)
    assert kid(a, b).value == pytest.approx(module.poly_mmd(a[:80], b[:80]).item(), rel=0.5)    # the same kind of number
    assert kid(a, b[:80]).value == pytest.approx(module.poly_mmd(a, b[:80]).item(), rel=1e-9)
    with pytest.raises(ValueError, match="from 2 to the 80 samples there are, got 81"): kid_subsets(a, b, 20, 81)
    with pytest.raises(ValueError, match="subsets must"): kid_subsets(a, b, 0, 10)


@pytest.mark.parametrize("shift, n, m", [(0., 25, 60), (0.5, 40, 30)])
def test_kid_is_unbiased_and_knows_its_error(shift, n, m):
    found = torch.tensor([kid(normal(n, 3, seed=2 * i), normal(m, 3, seed=2 * i + 1) + shift) for i in range(1000)])
    value, error = found[:, 0], found[:, 1]
    if not shift: assert abs(value.mean().item()) < 5 * value.std().item() / 1000**0.5
    ratio = error.square().mean().sqrt().item() / value.std().item()    # heavy tails: the scatter is known to some 5%
    assert 0.85 < ratio < (1.15 if shift else 1.4)                      # for equal distributions the floor makes it longer


# --- neighbours

def test_nearest():
    a, b = normal(1100, 4) + 1000, normal(1500, 4, seed=1) + 1000
    d, rows = nearest(a, b, 4)
    full = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").sort(1)
    torch.testing.assert_close(d, full.values[:, :4], rtol=1e-6, atol=1e-6)
    assert torch.equal(rows, full.indices[:, :4])
    mine = torch.cdist(a, a, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf).sort(1)
    d, rows = nearest(a, k=2)
    torch.testing.assert_close(d, mine.values[:, :2], rtol=1e-6, atol=1e-6)
    assert torch.equal(rows, mine.indices[:, :2])
    assert nearest(a[:3], k=2)[1].sort(1).values.tolist() == [[1, 2], [0, 2], [0, 1]]
    for bad, say in ((lambda: nearest(a[:3], k=3), "from 1 to 2"), (lambda: nearest(a, b, 0), "from 1 to 1500"), (lambda: nearest(a, b, 1501), "got 1501")):
        with pytest.raises(ValueError, match=say): bad()


@pytest.mark.parametrize("n, m, F, k", [(300, 200, 4, 3), (1100, 1200, 20, 5), (30, 50, 60, 1), (40, 40, 2, 10)])
def test_precision_recall_equals_torch_fidelity(n, m, F, k):
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    a, b = normal(n, F), 1.3 * normal(m, F, seed=1)
    assert precision_recall(a, b, k) == pytest.approx(prc.calculate_precision_recall_full(a, b, k), abs=1e-7)
    b[0] *= 50
    assert precision_recall(a, b, k) == pytest.approx(prc.calculate_precision_recall_full(a, b, k), abs=1e-7)


@pytest.mark.parametrize("n, m, F, k", [(300, 200, 4, 3), (1100, 1200, 20, 5), (30, 50, 60, 1)])
def test_density_coverage_by_definition(n, m, F, k):
    a, b = normal(n, F), 1.3 * normal(m, F, seed=1)
    radius = torch.cdist(b, b, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, k]
    inside = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") <= radius
    found = density_coverage(a, b, k)
    assert found.density == pytest.approx(inside.double().sum().item() / (k * n), rel=1e-6)
    assert found.coverage == pytest.approx(inside.any(0).double().mean().item(), rel=1e-6)


def test_a_set_covers_itself():
    x = normal(200, 5)
    assert precision_recall(x, x) == (1, 1) and density_coverage(x, x).coverage == 1
    assert precision_recall(x + 100, x) == (0, 0) and density_coverage(x + 100, x) == (0, 0)


@pytest.mark.parametrize("N, M, k", [(40, 40, 5), (30, 90, 2)])
def test_perfect_samples(N, M, k):
    found = torch.tensor([density_coverage(normal(M, 3, seed=2 * i), normal(N, 3, seed=2 * i + 1), k) for i in range(300)])
    error = found.std(0) / 300**0.5
    assert found[:, 0].mean().item() == pytest.approx(1, abs=5 * error[0].item())
    assert found[:, 1].mean().item() == pytest.approx(1 - math.prod((N - i) / (N + M - i) for i in range(1, k + 1)), abs=5 * error[1].item())


# --- copies

@pytest.mark.parametrize("noise", [0., 0.03])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_images_are_found(noise, seed):
    "Every one of 50 among 1000, none of the honest ones, none in a held-out set, and the right partners."
    train, others = digits().split(700, seed)
    flat = lambda d: d.batch(slice(None))[0].flatten(1)
    planted = torch.randperm(700, generator=torch.Generator().manual_seed(seed))[:50]
    samples = torch.cat([flat(others)[:950], flat(train)[planted] + noise * normal(50, 64).float()])
    found = find_copies(samples, flat(train))
    assert sorted(found.found.tolist()) == list(range(950, 1000)) and torch.equal(found.nearest[950:], planted)
    assert torch.equal(found.ratio[found.found].sort().values, found.ratio[found.found])
    assert len(find_copies(flat(others)[950:], flat(train)).found) == 0
    twice = find_copies(samples, torch.cat([flat(train)] * (2 if noise else 5)))    # doubles of training images hide nothing, nor five of each if the copy is exact
    assert sorted(twice.found.tolist()) == list(range(950, 1000))
    ax = show_copies(samples.reshape(-1, 1, 8, 8), train.batch(slice(None))[0], found, 6)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["sample", "nearest"] and len(ax.get_xticks()) == 6


def test_false_alarms_by_chance():
    ratio = find_copies(torch.rand(8000, 3), torch.rand(8000, 3), k=3).ratio
    for t in (0.1, 0.3, 0.6):
        chance = 1 - (1 - t**3)**2
        assert (ratio < t).double().mean().item() == pytest.approx(chance, abs=5 * (chance / 8000)**0.5 + 0.03 * chance)    # and the rim of the cube


def test_copies_of_one_picture():
    x = torch.zeros(6, 4).double()
    assert find_copies(x, x).ratio.tolist() == [0] * 6
    for bad, say in ((dict(threshold=0.), "between 0 and 1"), (dict(threshold=1.), "between 0 and 1"), (dict(k=1), "k must be"), (dict(k=7), "from 1 to 6")):
        with pytest.raises(ValueError, match=say): find_copies(x, x, **bad)


# --- 8 bits

@pytest.mark.parametrize("levels", [2, 17, 256])
def test_levels(levels):
    x = torch.linspace(-1, 1, levels).reshape(1, 1, 1, -1)
    expected = (torch.arange(levels, dtype=torch.float64) * 255 / (levels - 1)).round().to(torch.uint8)
    assert torch.equal(to_uint8(x, levels).flatten(), expected)
    assert torch.equal(to_uint8((x + 0.98 / (levels - 1)).clamp(max=1.05), levels).flatten(), expected)    # less than half a level
    assert torch.equal(to_uint8(x.clone().mul_(1.09), 2).flatten(), to_uint8(x, 2).flatten())


def test_edms_rounding():
    x = torch.rand(1, 1, 100, 100) * 2.1 - 1.05
    assert torch.equal(to_uint8(x), (x * 127.5 + 128).clip(0, 255).to(torch.uint8))


@pytest.mark.parametrize("x, say", [
    (torch.rand(2, 1, 4, 4), "look like [0, 1]; 2 * x - 1"), (255 * torch.rand(2, 1, 4, 4), "look like [0, 255]"), (3 * torch.randn(2, 3, 9, 9), "beyond 1.1"),
    (torch.full((1, 1, 2, 2), torch.nan), "finite"), (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "floating-point"), (-torch.ones(4, 4), "(N, C, H, W)"),
    (-torch.ones(0, 1, 4, 4), "(N, C, H, W)")])
def test_wrong_range(x, say):
    with pytest.raises(ValueError) as e: to_uint8(x)
    assert say in str(e.value)


@pytest.mark.parametrize("x, say", [
    (torch.zeros(2, 1, 4, 4), "got torch.float32 of shape (2, 1, 4, 4); samples in [-1, 1] go through to_uint8"), (torch.ones(2, 1, 4, 4, dtype=torch.uint8), "lost everything"),
    (torch.zeros(2, 4, 4, dtype=torch.uint8), "(N, C, H, W)"), (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), "not empty"), (np.zeros((2, 1, 4, 4)), "ndarray")])
def test_features_refuse(x, say):
    with pytest.raises(ValueError) as e: pixel_features(x)
    assert say in str(e.value)


# --- judges

def test_names_tell_weights_apart():
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2)]
    one, two = (Features(net, "mine") for net in nets)
    assert one.name == f"mine {weights_hash(nets[0])}" != two.name and Features(nets[0], "mine").name == one.name and repr(one) == one.name
    with torch.no_grad(): nets[0][1].bias[0] += 1e-6
    assert Features(nets[0], "mine").name != one.name
    assert weights_hash(nets[1].bfloat16()) != weights_hash(nets[1].float())
    assert weights_hash(nn.Sequential(nets[0][1])) != weights_hash(nn.Sequential(nn.Identity(), nets[0][1]))    # another place
    for figure in ("Fréchet distance", "Fréchet distance, infinite n", "kernel distance", "precision"):
        assert one.label(figure) == f"{figure} ({one.name})" and "FID" not in one.label(figure)
    official = Features(nets[0], "inception", inception=True)
    assert [official.label(f) for f in ("Fréchet distance", "Fréchet distance, infinite n", "kernel distance")] == ["FID", "FID, infinite n", "KID"]


def test_features_of_data_and_of_pictures():
    d = digits().take(torch.arange(600))
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    f = Features(lambda x: x.flatten(1) / 255, "p")
    assert torch.equal(f(d), f(to_uint8(d.batch(slice(None))[0], 17))) and f(d).shape == (600, 64)
    assert [len(b) for b in f.batches(d, 250)] == [250, 250, 100]
    wide = torch.arange(2 * 3 * 32 * 24, dtype=torch.int64).reshape(2, 3, 32, 24).remainder(250).to(torch.uint8)
    means = wide.double().unfold(2, 2, 2).mean(-1)    # 32 rows become 16 by pairs, 24 columns by windows of 2 that overlap
    assert pixel_features(wide).shape == (2, 3 * 16 * 16) and pixel_features(wide)[0, 0] == pytest.approx(means[0, 0, 0, :2].mean().item() / 127.5 - 1, abs=1e-6)
    bright = ImageData(torch.full((3, 1, 4, 4), 250, dtype=torch.uint8))    # a data set without dark pixels is one all the same
    assert pixel_features(bright)[0, 0] == pytest.approx(250 / 127.5 - 1)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Dropout(0.5)).train()
    judge = Features(type("Net", (nn.Module,), dict(__init__=lambda s: (nn.Module.__init__(s), setattr(s, "n", linear))[0], forward=lambda s, x: s.n(x.float())))(), "drops")
    assert torch.equal(judge(d), judge(d)) and not judge(d).requires_grad    # evaluation mode
    assert net.training


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    "A file of random weights for torch-fidelity's architecture."
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
    patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    net = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    patch.undo()
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(net.state_dict(), file)
    return file, net


def test_inception_is_torch_fidelitys(random_inception, monkeypatch):
    file, net = random_inception
    x = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8)
    judge = inception(file)
    assert torch.equal(judge(x), net(x)[0]) and judge(x).shape == (3, 2048)
    assert torch.equal(judge(x[:, :1]), net(x[:, :1].expand(-1, 3, -1, -1))[0])    # grey
    assert judge.name.startswith("inception with other weights ") and "FID" not in judge.label("Fréchet distance")
    assert "299" in judge.preprocessing and "TensorFlow" in judge.preprocessing
    with pytest.raises(ValueError, match="1 or 3 channels"): judge(x.repeat(1, 2, 1, 1))
    import hashlib
    monkeypatch.setattr(metrics, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    assert inception(file).label("Fréchet distance") == "FID" and inception(file).name.startswith("inception ")


def test_inceptions_weights(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    with pytest.raises(FileNotFoundError, match="no weights at"): inception(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="holds no weights"): inception(tmp_path / "text.pth")
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "executed"),)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(ValueError, match="holds no weights"): inception(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    asked = []
    def offline(url, dst, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        raise URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match="could not be downloaded from https.*6726825d.pth .*give its path as weights"): inception()
    assert asked == [(metrics.INCEPTION_URL, metrics.INCEPTION_SHA256)] and len(metrics.INCEPTION_SHA256) == 64
    assert not list((tmp_path / "hub").rglob("*.pth"))


@pytest.fixture(scope="module")
def small(): return digits().take(torch.arange(400))


@pytest.fixture(scope="module")
def judge(small, tmp_path_factory):
    file = tmp_path_factory.mktemp("judges") / "judge.safetensors"
    return classifier(small, file, images=1500), file


def test_classifier(judge, small, tmp_path):
    features, file = judge
    torch.manual_seed(3)
    before = torch.get_rng_state()
    net, right = train_classifier(small, images=1500)
    assert torch.equal(before, torch.get_rng_state())                    # the caller's random numbers
    assert features.name == f"classifier of digits {weights_hash(net)}" and right > 0.6    # chance is 0.1
    again = classifier(small, file)
    assert again.name == features.name and torch.equal(again(small), features(small)) and features(small).shape == (400, 64)
    assert train_classifier(small, images=64, seed=1)[0].head.weight.ne(train_classifier(small, images=64, seed=2)[0].head.weight).any()
    with pytest.raises(ValueError, match="is of other data"): classifier(digits().take(torch.arange(300)), file)
    with pytest.raises(ValueError, match="needs labels"): classifier(ImageData(small.images))
    whole = file.read_bytes()
    for cut in (whole[:100], whole[:-10], b"text", whole[:-50] + bytes(50)):
        (tmp_path / "cut.safetensors").write_bytes(cut)
        with pytest.raises(ValueError, match="damaged"): classifier(small, tmp_path / "cut.safetensors")


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 28, 28), (3, 32, 20), (1, 65, 65)])
def test_classifier_fits_any_size(shape):
    net = Classifier(shape[0], min(shape[1:]), 7)
    assert net(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, 64)


# --- files

def test_reference_files(small, tmp_path, monkeypatch):
    file = tmp_path / "deep" / "ref.safetensors"
    made = reference(small, pixel_features, file)
    assert made.about == dict(features="pixels", preprocessing="averaged to at most 16 x 16, 17 levels", data="digits", images=400, split="train", fingerprint=small.fingerprint())
    monkeypatch.setattr(metrics, "statistics", None)                     # not computed again
    kept = reference(small, pixel_features, file)
    assert torch.equal(kept.root, made.root) and torch.equal(kept.mean, made.mean) and (kept.n, kept.about) == (400, made.about)
    other = Features(lambda x: x.flatten(1) / 255, "other")
    sharp = Features(pixel_features.net, "pixels", "resized")
    fewer = small.take(torch.arange(399))
    swapped = small.take(torch.arange(399, -1, -1))
    for call, say in ((lambda: reference(small, other, file), "features is 'pixels' there and 'other' here"),
                      (lambda: reference(small, sharp, file), "preprocessing is"), (lambda: reference(fewer, pixel_features, file), "images is 400 there and 399 here"),
                      (lambda: reference(swapped, pixel_features, file), "fingerprint is"), (lambda: reference(small, pixel_features, file, "test"), "split is 'train' there and 'test' here"),
                      (lambda: reference(ImageData(small.images * 15, small.labels), pixel_features, file), "256 levels")):
        with pytest.raises(ValueError, match="holds other statistics") as e: call()
        assert say in str(e.value)


def test_damaged_reference(small, tmp_path):
    stats = statistics(normal(50, 3), dict(features="f"))
    file = tmp_path / "s.safetensors"
    save_statistics(stats, file)
    whole = file.read_bytes()
    for cut in (b"", whole[:20], whole[:-4], b"text"):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match="damaged or holds no statistics"): load_statistics(file)
    classifier(small, tmp_path / "c.safetensors", images=64)
    with pytest.raises(ValueError, match="no statistics: 'n' is missing"): load_statistics(tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError): load_statistics(tmp_path / "none.safetensors")


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "s.safetensors"
    save_statistics(statistics(normal(50, 3)), file)
    before = file.read_bytes()
    def killed(fd): raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt): save_statistics(statistics(normal(60, 3)), file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("key", ["features", "preprocessing"])
def test_other_statistics_are_refused(key):
    about = dict(features="f", preprocessing="p")
    a, b, c = (statistics(normal(50, 3), about | more) for more in ({}, {key: "x"}, dict(data="other data is what a distance is for")))
    with pytest.raises(ValueError, match=f"a and b can't be compared, their {key} differ: {about[key]} and x"): frechet_distance(a, b)
    assert frechet_distance(a, c) < 1e-12 and frechet_distance(a, normal(50, 3)) < 1e-12    # arrays don't say what they are


# --- the table

def test_evaluate(small, judge):
    features, _ = judge
    samples = to_uint8(digits().take(torch.arange(400, 800)).batch(slice(None))[0], 17)
    samples[7] = to_uint8(small.batch(slice(3, 4))[0], 17)[0]
    report = evaluate(samples, small, features)
    assert json.loads(json.dumps(report)) == report and (report["copies"]["found"], report["copies"]["of"], report["copies"]["among"]) == ([7], [3], 400)
    assert report["features"] == features.name and report["data"] == dict(name="digits", images=400, fingerprint=small.fingerprint())
    rows = report["figures"]
    assert len(rows) == 7 and all(name.endswith(f"({features.name})") for name in rows)
    a, b = features(samples), features(small)
    value = lambda name: rows[f"{name} ({features.name})"]
    assert value("Fréchet distance")["value"] == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert value("Fréchet distance, infinite n")["value"] == pytest.approx(frechet_infinity(a, b).value, rel=1e-9)
    assert (value("kernel distance")["value"], value("kernel distance")["error"]) == pytest.approx(tuple(kid(a, b)), rel=1e-9)
    assert (value("precision")["value"], value("recall")["value"]) == precision_recall(a, b) and value("coverage")["value"] == density_coverage(a, b).coverage
    text = table(report)
    assert "FID" not in text and "KID" not in text and text.count(features.name) == 7 and "1 of 400" in text
    assert text.splitlines()[0] == "400 samples against 400 images of digits; uint8 as it is, 17 levels"
    few = evaluate(samples[:200], small, features)
    assert few["figures"][f"Fréchet distance, infinite n ({features.name})"]["value"] is None and " - " in table(few)    # parts of 50 for 64 features
    same = evaluate(samples, small, features, most=150)
    assert same["copies"]["among"] == 150 and same["figures"][f"Fréchet distance ({features.name})"]["value"] == pytest.approx(value("Fréchet distance")["value"], rel=1e-9)


def test_halves_are_drawn_at_random():
    "Data sorted by class must not be cut between the classes."
    d = digits()
    halves = evaluate(to_uint8(d.batch(slice(0, 300))[0], 17), d.take(d.labels.argsort()), pixel_features)["figures"]["Fréchet distance (pixels)"]["halves"]
    assert halves < 1


def test_evaluate_refuses(small, tmp_path):
    reference(small, Features(pixel_features.net, "others"), tmp_path / "f")
    good = to_uint8(small.batch(slice(0, 50))[0], 17)
    for call, say in ((lambda: evaluate(good.float(), small, pixel_features), "go through to_uint8"), (lambda: evaluate(good[:, :, :4], small, pixel_features), "1 x 8 x 8 like digits"),
                      (lambda: evaluate(good[:9], small, pixel_features), "at least 10, got 9"),
                      (lambda: evaluate(good, small, pixel_features, tmp_path / "f"), "features is 'others' there and 'pixels' here")):
        with pytest.raises(ValueError) as e: call()
        assert say in str(e.value)


def test_evaluate_keeps_and_uses_statistics(small, tmp_path, monkeypatch):
    samples = to_uint8(small.batch(slice(0, 100))[0], 17)
    first = evaluate(samples, small, pixel_features, tmp_path / "f")
    kept = load_statistics(tmp_path / "f")
    again = evaluate(samples, small, pixel_features, tmp_path / "f")
    numbers = lambda report: {(name, k): math.nan if v is None else v for name, row in report["figures"].items() for k, v in row.items()}
    assert again | dict(figures=None) == first | dict(figures=None)
    assert numbers(again) == pytest.approx(numbers(first), rel=1e-9, nan_ok=True)    # a matrix product may round by where its factors lie in memory
    kept.mean += 1
    save_statistics(kept, tmp_path / "f")
    moved = evaluate(samples, small, pixel_features, tmp_path / "f")["figures"]["Fréchet distance (pixels)"]["value"]
    assert moved > first["figures"]["Fréchet distance (pixels)"]["value"] + 10    # the file is what counts
