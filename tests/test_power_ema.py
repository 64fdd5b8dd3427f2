"Power-function averages: closed forms, exact profiles, reconstruction against direct averages, memory, files, and what is refused."
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from ddpm_edm.ema import (EMA, PowerEMA, ema_misfit, ema_snapshots, ema_weights, posthoc_ema, power_beta, power_gamma, power_sigma_rel,
                          reconstruct, snapshot_path)

cases = settings(max_examples=50, deadline=None, derandomize=True)
NODES, QUADRATURE = np.polynomial.legendre.leggauss(400)
WIDTHS = st.floats(0.005, 0.285)
TWO = (0.05, 0.1)
GOLDEN = {0.01: 96.994897823709829, 0.05: 16.9721986023034502, 0.1: 6.93720393760180752, 0.2: 1.82621377989583936, 0.28: 0.169343993769499284}


def times(n, end=64_000, widths=TWO): return [(w, end * (k + 1) // n) for w in widths for k in range(n)]
def profile(tau, sigma_rel, t): return (power_gamma(sigma_rel) + 1) / t * np.clip(tau / t, 0, 1)**power_gamma(sigma_rel) * (tau <= t)


def overlap(a, ta, b, tb):
    "Inner product of two profiles by Gauss-Legendre quadrature on the logarithm of time, where powers are exponentials."
    end = min(ta, tb)
    low = -80 / (power_gamma(a) + power_gamma(b) + 1)    # e^-80 of the integral lies below
    tau = end * np.exp(low * (1 - NODES) / 2)
    return float((QUADRATURE * -low / 2 * tau * profile(tau, a, ta) * profile(tau, b, tb)).sum())


# ---- one profile ----

def test_golden_exponents():
    "Solved with 50 digits in another program: u^3 + u^2 + (1 - u) / sigma^2 = 0, gamma = u - 2."
    for width, gamma in GOLDEN.items(): assert power_gamma(width) == pytest.approx(gamma, rel=1e-13)    # a few roundings
    assert power_sigma_rel(0) == pytest.approx(1 / math.sqrt(12), abs=1e-16)
    assert power_sigma_rel(1) == pytest.approx(math.sqrt(1 / 18), abs=1e-16)    # triangle on [0, 1]


@cases
@given(WIDTHS)
def test_width_and_exponent_are_inverse(width):
    gamma = power_gamma(width)
    assert gamma > 0
    assert power_sigma_rel(gamma) == pytest.approx(width, rel=1e-12)
    roots = np.roots([1, 1, -1 / width**2, 1 / width**2])
    assert gamma == pytest.approx(max(roots.real) - 2, abs=1e-8 * (2 + gamma))    # a companion matrix's rounding


@cases
@given(WIDTHS, st.floats(1, 1e9))
def test_width_is_the_standard_deviation(width, t):
    tau = t * np.exp(-80 / (power_gamma(width) + 1) * (1 - NODES) / 2)
    p = profile(tau, width, t) * tau * 40 / (power_gamma(width) + 1) * QUADRATURE
    mean = (p * tau).sum() / t
    assert p.sum() == pytest.approx(1, abs=1e-9)    # quadrature of 400 nodes
    assert (p * (tau / t - mean)**2).sum()**0.5 == pytest.approx(width, rel=1e-6)


@cases
@given(WIDTHS, st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_betas_follow_the_profile_for_any_batches(width, batches):
    clock = np.cumsum(batches)
    betas = [power_beta(b, int(t), width) for b, t in zip(batches, clock)]
    shares = [(1 - b) * math.prod(betas[i + 1:]) for i, b in enumerate(betas)]
    wanted = np.diff((clock / clock[-1])**(power_gamma(width) + 1), prepend=0)
    assert np.allclose(shares, wanted, rtol=0, atol=1e-12)
    assert betas[0] == 0 and sum(shares) == pytest.approx(1, abs=1e-12)    # nothing is left of the start


def test_beta_in_steps_is_the_paper_s():
    for k in (1, 2, 10, 1000): assert power_beta(1, k, 0.1) == pytest.approx((1 - 1 / k)**(power_gamma(0.1) + 1), abs=1e-15)
    assert power_beta(64, 640, 0.1) == power_beta(1, 10, 0.1)    # the batch cancels where all are alike


class Net(nn.Module):
    "What a network can hold."
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.wave = nn.Parameter(torch.tensor([1 + 2j]))
        self.register_buffer("table", torch.linspace(0, 1, 7))
        self.register_buffer("count", torch.tensor(0))


def test_class_is_the_weighted_sum():
    torch.manual_seed(0)
    net = Net().double()
    ema, made, clock, betas = PowerEMA(net, 0.12), [], 0, []
    assert isinstance(ema, EMA) and ema.sigma_rel == 0.12
    for batch in (5, 30, 8, 64, 1, 100):
        clock += batch
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn(p.shape, dtype=p.dtype))
        net.count += 1
        ema.update(net, batch, clock)
        if len(made) == 0: assert torch.equal(ema.model.layer.weight, net.layer.weight)    # the start is gone at once
        made.append([p.detach().clone() for p in net.parameters()])
        betas.append(power_beta(batch, clock, 0.12))
    shares = [(1 - b) * math.prod(betas[i + 1:]) for i, b in enumerate(betas)]
    for i, p in enumerate(ema.model.parameters()):
        torch.testing.assert_close(p, sum(s * m[i] for s, m in zip(shares, made)), atol=1e-12, rtol=0)
    assert ema.model.count == 6 and torch.equal(ema.model.table, net.table)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


# ---- coefficients ----

@cases
@given(WIDTHS, WIDTHS, st.floats(0.05, 1), st.floats(0.05, 1))
def test_two_snapshots_against_quadrature(a, b, ta, tb):
    "With two profiles and sum 1 the best share is a quotient of integrals; so is the misfit."
    wanted, stored, end = 0.08, [(a, round(1e6 * ta)), (b, round(1e6 * tb))], round(1e6 * max(ta, tb))
    aa, bb, ab = (overlap(*stored[i], *stored[j]) for i, j in ((0, 0), (1, 1), (0, 1)))
    aq, bq = (overlap(*s, wanted, end) for s in stored)
    qq, spread = overlap(wanted, end, wanted, end), aa + bb - 2 * ab
    if spread < 1e-3 * (aa + bb): return    # nearly one profile: the quotient is rounding
    share = (bb - ab + aq - bq) / spread
    c = ema_weights(stored, wanted, end)
    assert c.dtype == torch.float64 and c.tolist() == pytest.approx([share, 1 - share], abs=1e-6 * (1 + abs(share)))    # quadrature
    square = share**2 * aa + (1 - share)**2 * bb + qq + 2 * (share * (1 - share) * ab - share * aq - (1 - share) * bq)
    assert ema_misfit(stored, wanted, end)**2 == pytest.approx(square / qq, rel=1e-5, abs=1e-8)


@cases
@given(WIDTHS, st.integers(1, 16), st.data())
def test_coefficients_are_the_minimum(width, n, data):
    "No shift that keeps the sum comes nearer; and the sum is 1."
    stored = times(n)
    c = ema_weights(stored, width)
    assert c.sum().item() == pytest.approx(1, abs=1e-9)
    tau = (np.arange(40_000) + 0.5) * 64_000 / 40_000
    P, q = np.stack([profile(tau, *s) for s in stored]), profile(tau, width, 64_000)
    shift = np.array(data.draw(st.lists(st.floats(-1, 1), min_size=len(stored), max_size=len(stored))))
    shift -= shift.mean()
    size = np.sqrt(((shift @ P)**2).sum())
    slope = (c.numpy() @ P - q) @ (shift @ P)
    assert abs(slope) <= 5e-3 * size * np.sqrt((q**2).sum())    # stationary, to the quadrature's step at the ends, times gamma
    misfit = np.sqrt(((c.numpy() @ P - q)**2).sum() / (q**2).sum())
    assert ema_misfit(stored, width) == pytest.approx(misfit, rel=0.05, abs=2e-3)


@cases
@given(st.integers(1, 16), st.sampled_from(TWO), st.data())
def test_a_stored_average_is_found(n, width, data):
    k = data.draw(st.integers(1, n))
    c = ema_weights(times(n), width, 64_000 * k // n)
    wanted = torch.tensor([float(s == (width, 64_000 * k // n)) for s in times(n)], dtype=torch.float64)
    torch.testing.assert_close(c, wanted, atol=1e-8, rtol=0)    # condition of the system, about 1e4, times rounding
    assert ema_misfit(times(n), width, 64_000 * k // n) < 1e-6


def test_coefficients_do_not_depend_on_the_unit_of_time_or_the_order():
    a, b = ema_weights(times(8), 0.07), ema_weights([(w, 1000 * t) for w, t in times(8)], 0.07)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    torch.testing.assert_close(ema_weights(times(8)[::-1], 0.07), a.flip(0), atol=1e-10, rtol=0)
    assert torch.equal(ema_weights(times(8), 0.07, 64_000), a)    # the last is the default
    twice = ema_weights(times(8) * 2, 0.07)                       # the same snapshots again: still one answer
    torch.testing.assert_close(twice[:16] + twice[16:], a, atol=1e-8, rtol=0)


def test_misfit_falls_with_the_square_of_the_spacing():
    for width in (0.03, 0.07, 0.15):
        errors = [ema_misfit(times(n), width) for n in (16, 32, 64)]
        assert all(3 < coarse / fine < 5 for coarse, fine in zip(errors, errors[1:]))
    assert ema_misfit(times(16), 0.07) < 5e-3 < 0.1 < ema_misfit(times(16), 0.02)    # inside, and far outside
    assert 0.1 < ema_misfit(times(16), 0.07, 62_000)                                 # between two snapshots


# ---- weights ----

class Wander(nn.Module):
    "Weights that jitter, and weights that walk, around 1."
    def __init__(self):
        super().__init__()
        self.jitter, self.walk = (nn.Parameter(torch.ones(2000, dtype=torch.float64)) for _ in range(2))

    @torch.no_grad()
    def step(self, g):
        self.jitter.copy_(1 + torch.randn(2000, generator=g, dtype=torch.float64))
        self.walk.add_(torch.randn(2000, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("seen", [32_000, 24_000])
def test_reconstruction_is_the_direct_average_to_the_predicted_error(seen):
    g, net, steps, batch = torch.Generator().manual_seed(1), Wander(), 400, 80
    direct, stored = {w: PowerEMA(net, w) for w in (0.03, 0.07, 0.2)}, [PowerEMA(net, w) for w in TWO]
    snapshots, wanted = [], {}
    for k in range(1, steps + 1):
        net.step(g)
        for e in (*direct.values(), *stored): e.update(net, batch, k * batch)
        if k % 50 == 0: snapshots += [(e.sigma_rel, k * batch, {n: p.clone() for n, p in e.model.state_dict().items()}) for e in stored]
        if k * batch == seen: wanted = {w: {n: p.clone() for n, p in e.model.state_dict().items()} for w, e in direct.items()}

    def by_step(width, t): return torch.tensor(np.diff(np.clip(np.arange(steps + 1) * batch / t, 0, 1)**(power_gamma(width) + 1)))
    for width, model in wanted.items():
        made = posthoc_ema(snapshots, width, seen)
        r = sum(c * by_step(w, t) for c, (w, t, _) in zip(ema_weights(snapshots, width, seen), snapshots)) - by_step(width, seen)
        # 5 standard errors of a spread of 2000 numbers: 8%
        assert (made["jitter"] - model["jitter"]).square().mean().sqrt().item() == pytest.approx(r.norm().item(), rel=0.08)
        assert (made["walk"] - model["walk"]).square().mean().sqrt().item() == pytest.approx(r.flip(0).cumsum(0).norm().item(), rel=0.08)
        assert r.norm().item() / by_step(width, seen).norm().item() == pytest.approx(ema_misfit(snapshots, width, seen), abs=0.02)
        assert made["jitter"].mean().item() == pytest.approx(model["jitter"].mean().item(), abs=5 * r.norm().item() / 2000**0.5)


def states(n, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    table = torch.rand(5, generator=g)
    return [dict(weight=torch.randn(6, 4, generator=g).to(dtype), wave=torch.randn(3, generator=g, dtype=torch.complex64),
                 table=table.clone(), mask=torch.tensor([True, i > 1]), count=torch.tensor(10 * i)) for i in range(n)]


@cases
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_reconstruct_is_the_weighted_sum(free):
    shares = [*free, 1 - sum(free)]
    given = states(len(shares))
    made = reconstruct([(0.1, i + 1, s) for i, s in enumerate(given)], torch.tensor(shares, dtype=torch.float64))
    size = sum(abs(c) for c in shares)
    for k in ("weight", "wave"):
        wanted = sum(c * s[k].to(torch.complex128 if k == "wave" else torch.float64) for c, s in zip(shares, given))
        torch.testing.assert_close(made[k].to(wanted), wanted, atol=1e-5 * size, rtol=0)    # float32 rounding, at most 9 steps of size
        assert made[k].dtype == given[0][k].dtype
    most = max(range(len(shares)), key=lambda i: shares[i])
    assert torch.equal(made["table"], given[0]["table"])                                     # the same everywhere: bit for bit
    assert shares.count(max(shares)) > 1 or torch.equal(made["count"], given[most]["count"]) and torch.equal(made["mask"], given[most]["mask"])


def test_float64_stays_exact_and_half_becomes_float32():
    exact = states(3, dtype=torch.float64)
    made = reconstruct([(0.1, i, s) for i, s in enumerate(exact)], [-0.4, 0.9, 0.5])
    torch.testing.assert_close(made["weight"], -0.4 * exact[0]["weight"] + 0.9 * exact[1]["weight"] + 0.5 * exact[2]["weight"], atol=1e-14, rtol=0)
    for dtype in (torch.float16, torch.bfloat16):
        coarse = states(3, dtype=dtype)
        made = reconstruct([(0.1, i, s) for i, s in enumerate(coarse)], [-0.4, 0.9, 0.5])["weight"]
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, sum(c * s["weight"].float() for c, s in zip((-0.4, 0.9, 0.5), coarse)), atol=1e-6, rtol=0)


def test_snapshots_are_left_as_they_were():
    given = states(3)
    before = [{k: v.clone() for k, v in s.items()} for s in given]
    made = reconstruct([(0.1, i, s) for i, s in enumerate(given)], [0.5, 0.2, 0.3])
    for s, b in zip(given, before): assert all(torch.equal(s[k], b[k]) for k in s)
    assert not {v.data_ptr() for v in made.values()} & {v.data_ptr() for s in given for v in s.values()}


def test_two_networks_in_memory_however_many_snapshots():
    alive, counts, loaded = weakref.WeakSet(), [], []
    def loader(i):
        def load():
            tensor = torch.full((1000,), float(i))
            alive.add(tensor)
            counts.append(len(alive))
            loaded.append(i)
            return {"weight": tensor}
        return load
    made = posthoc_ema([(w, t, loader(i)) for i, (w, t) in enumerate(times(24))], 0.07)
    assert max(counts) == 1 and len(alive) == 0    # one besides the mean
    assert len(set(loaded)) == len(loaded) <= 48   # each read once at most
    wanted = (ema_weights(times(24), 0.07) * torch.arange(48)).sum().item()
    assert made["weight"][0].item() == pytest.approx(wanted, abs=1e-4)


def test_nothing_is_read_that_does_not_count():
    def never(): raise AssertionError("read")
    stored = [(w, t, (lambda: {"weight": torch.ones(2)}) if (w, t) == (0.05, 64_000) else never) for w, t in times(8)]
    assert torch.equal(posthoc_ema(stored, 0.05)["weight"], torch.ones(2))


# ---- files ----

def test_files(tmp_path):
    given = [(w, t, s) for (w, t), s in zip(times(3, 300), states(6))]
    for w, t, s in given:
        path = snapshot_path(tmp_path, w, t)
        path.parent.mkdir(exist_ok=True)
        save_file(s | {"wave": torch.view_as_real(s["wave"])}, path)
    assert snapshot_path(tmp_path, 0.05, 64_000) == tmp_path / "ema" / "0.05-000064000.safetensors"
    assert snapshot_path(tmp_path, np.float64(0.05), 64_000) == tmp_path / "ema" / "0.05-000064000.safetensors"
    (tmp_path / "ema/.0.1-000000400.safetensors.tmp.safetensors").write_bytes(b"half")    # as a killed training leaves
    found = ema_snapshots(str(tmp_path))
    assert [s[:2] for s in found] == [(w, t) for t in (100, 200, 300) for w in TWO]
    made, direct = posthoc_ema(tmp_path, 0.08, 200), posthoc_ema(given, 0.08, 200)
    torch.testing.assert_close(made["weight"], direct["weight"], atol=1e-5, rtol=0)       # float32, in another order
    assert torch.equal(posthoc_ema(str(tmp_path), 0.08, 200)["weight"], made["weight"])
    snapshot_path(tmp_path, 0.1, 200).write_bytes(b"torn")
    with pytest.raises(ValueError, match="0.1-000000200.safetensors is damaged"): posthoc_ema(tmp_path, 0.08, 200)
    (tmp_path / "ema/last.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="last.safetensors must be named sigma_rel-seen"): ema_snapshots(tmp_path)


def test_widths_survive_their_file_names(tmp_path):
    (tmp_path / "ema").mkdir()
    widths = [0.05, 0.1, 1 / 30, 2e-5, 0.28867]
    for w in widths: save_file({"a": torch.zeros(1)}, snapshot_path(tmp_path, w, 1_234_567_890))
    assert [s[:2] for s in ema_snapshots(tmp_path)] == [(w, 1_234_567_890) for w in sorted(widths)]


# ---- what is refused ----

@pytest.mark.parametrize("bad", [0, -0.1, 0.289, 1, math.nan, math.inf, 12**-0.5])
def test_widths_refused(bad):
    for f in (power_gamma, lambda w: power_beta(1, 1, w), lambda w: PowerEMA(nn.Linear(2, 2), w), lambda w: ema_weights(times(4), w),
              lambda w: ema_misfit(times(4), w), lambda w: posthoc_ema([(w, 100, states(1)[0])], 0.1)):
        with pytest.raises(ValueError, match=r"sigma_rel must be above 0 and below 1/sqrt\(12\) = 0.2887.*got " + str(bad)): f(bad)


def test_exponents_refused():
    for bad in (-0.1, math.nan):
        with pytest.raises(ValueError, match="gamma must be 0 or more"): power_sigma_rel(bad)


@pytest.mark.parametrize("batch, seen, wanted", [(0, 10, "batch must be at least 1, got 0"), (10, 9, "at least 10, got 9"), (1, 0, "at least 1, got 0")])
def test_clocks_refused(batch, seen, wanted):
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=wanted): power_beta(batch, seen, 0.1)
    with pytest.raises(ValueError, match=wanted): PowerEMA(net).update(net, batch, seen)


def test_precision_and_other_networks_refused():
    with pytest.raises(ValueError, match="weight is torch.bfloat16, too coarse"): PowerEMA(nn.Linear(2, 2).bfloat16())
    with pytest.raises(ValueError, match="network that was copied"): PowerEMA(nn.Linear(2, 2)).update(nn.Linear(2, 1), 1, 1)


@pytest.mark.parametrize("seen", [0, 15_999, 64_001, -1, math.nan])
def test_ends_refused(seen):
    for f in (ema_weights, ema_misfit):
        with pytest.raises(ValueError, match=f"between the first and the last snapshot, at 16000 and 64000 images, got {seen}"): f(times(4), 0.07, seen)


def test_snapshots_refused(tmp_path):
    for f in (ema_weights, ema_misfit, posthoc_ema):
        with pytest.raises(ValueError, match="no snapshots of an average are given"): f([], 0.07)
    with pytest.raises(ValueError, match="must have seen images, got one of 0"): ema_weights([(0.1, 0), (0.1, 10)], 0.07)
    with pytest.raises(FileNotFoundError, match="no snapshots of averages in .*ema"): posthoc_ema(tmp_path, 0.07)
    good = [(0.1, 100, s) for s in states(2)]
    with pytest.raises(ValueError, match="one per snapshot, 2, got 1"): reconstruct(good, [1.])
    for bad in ([0.5, 0.4], [math.nan, 1]):
        with pytest.raises(ValueError, match="must sum to 1"): reconstruct(good, bad)


@pytest.mark.parametrize("change, wanted", [(dict(weight=torch.zeros(6, 5)), r"weight is \(6, 5\) in that of sigma_rel 0.1 at 200 images, and \(6, 4\)"),
                                            (dict(more=torch.zeros(1)), r"more is \(1,\) in that of sigma_rel 0.1 at 200 images, and missing")])
def test_other_networks_among_snapshots_refused(change, wanted):
    a, b = states(2)
    with pytest.raises(ValueError, match=wanted): reconstruct([(0.05, 100, a), (0.1, 200, b | change)], [0.7, 0.3])
    with pytest.raises(ValueError, match="count is missing in that of"): reconstruct([(0.05, 100, a), (0.1, 200, {k: v for k, v in b.items() if k != "count"})], [0.7, 0.3])
