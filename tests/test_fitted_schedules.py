"`fit_sigmas` against golden ends, fixed schedules, small cases by brute force, and misuse; the benchmark's command."
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import CountNFE, seeded_noise
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.oracle import Mixture
from ddpm_edm.solvers import (
    _downhill, _gaps_of, _hats, _jacobian, _levels_of, _walk, dpmpp_2m, dpmpp_3m, euler, exp_multistep, fit_sigmas, heun,
    sample, unipc,
)

GOLDEN = np.load(Path(__file__).parent / "golden/mixtures.npz")
G2 = Mixture(*(torch.from_numpy(GOLDEN[f"g2.{k}"]) for k in ("means", "stds", "weights")))
BEST_OF_PEERS = {8: 0.140, 12: 0.055}    # on g2; the goals of benchmarks/solvers.py


def noise_of(first, n): return seeded_noise(range(first, first + n), (2,), torch.float64)
def exact(noise): return sample(G2, noise, karras_sigmas(600, 1e-4), exp_multistep(4))
def error(sigmas, step, noise, ends): return (sample(G2, noise, sigmas, step) - ends).norm(dim=1).mean().item()


@pytest.fixture(scope="module")
def train():
    noise = noise_of(0, 256)
    return noise, exact(noise)


@pytest.fixture(scope="module")
def fresh():
    noise = noise_of(10_000, 2000)
    return noise, exact(noise)


def check_schedule(sigmas, n, top=80.):
    assert sigmas.dtype == torch.float64 and sigmas.shape == (n + 1,)
    assert sigmas[0] == top and sigmas[-1] == 0 and (sigmas.diff() < 0).all() and sigmas.isfinite().all()


# --- the whole

def test_reference_is_exact():
    "The ends that the other tests trust."
    want = torch.from_numpy(GOLDEN["g2.ode_ref.x0_from_sigma80"])
    ends = exact(torch.from_numpy(GOLDEN["g2.latents"]))
    assert (ends - want).norm(dim=1).max() < 1e-5    # fourth order, 600 steps; a thousandth of the errors below


@pytest.mark.parametrize("n, step", [(8, unipc(2)), (8, dpmpp_3m), (12, unipc(2))], ids=["unipc-8", "3m-8", "unipc-12"])
def test_a_third_of_the_peers_on_fresh_starts(train, fresh, n, step):
    sigmas = fit_sigmas(G2, train[0], n, step, x0=train[1])
    check_schedule(sigmas, n)
    assert error(sigmas, step, *fresh) < BEST_OF_PEERS[n] / 3


@pytest.mark.parametrize("step", [euler, heun, dpmpp_2m], ids=["euler", "heun", "2m"])
def test_never_worse_than_its_starts(train, step):
    starts = [karras_sigmas(5, 0.01, rho=7), karras_sigmas(5, 0.1, rho=20)]
    found = fit_sigmas(G2, train[0], 5, step, x0=train[1], starts=starts, rounds=2)
    check_schedule(found, 5)
    assert error(found, step, *train) < min(error(s, step, *train) for s in starts)
    again = fit_sigmas(G2, train[0], 5, step, x0=train[1], starts=[found])
    assert error(again, step, *train) <= error(found, step, *train) * (1 + 1e-9)    # rounding of log and exp


def test_ends_at_one_place_wherever_it_starts(train):
    "From coarse to fine; with all gaps free from the beginning the same starts end a third apart."
    places = karras_sigmas(12, 0.02, rho=7), karras_sigmas(12, 0.002, rho=7)
    one, two = (error(fit_sigmas(G2, train[0], 12, dpmpp_3m, x0=train[1], starts=[s]), dpmpp_3m, *train) for s in places)
    assert abs(math.log(one / two)) < math.log(1.1)    # the descent stops when it gains less than 0.1 % at a time


def test_two_steps_by_brute_force(train):
    "One free level: no level of a fine grid is better."
    noise, ends = train
    found = fit_sigmas(G2, noise, 2, dpmpp_2m, x0=ends)
    check_schedule(found, 2)
    grid = torch.logspace(-2.5, 1.8, 300, dtype=torch.float64).tolist()
    assert error(found, dpmpp_2m, noise, ends) < min(error([80., s, 0.], dpmpp_2m, noise, ends) for s in grid) + 1e-4


def test_one_step_is_its_only_schedule(train):
    assert fit_sigmas(G2, train[0], 1, heun, x0=train[1]).tolist() == [80., 0.]
    assert fit_sigmas(G2, train[0], 1, euler, sigma_max=3.).tolist() == [3., 0.]


def test_repeatable_and_leaves_its_input_alone(train):
    noise, ends = (t.clone() for t in train)
    start = karras_sigmas(4)
    one, two = (fit_sigmas(G2, noise, 4, unipc(2), x0=ends, starts=[start]) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(noise, train[0]) and torch.equal(ends, train[1]) and torch.equal(start, karras_sigmas(4))


def test_default_reference_and_sigma_max(train):
    "Without x0 the ends come from a fine run, from the sigma_max that is asked for."
    noise = train[0][:64]
    found = fit_sigmas(G2, noise, 4, dpmpp_2m, sigma_max=20.)
    check_schedule(found, 4, 20.)
    ends = sample(G2, noise, karras_sigmas(600, 1e-4, 20.), exp_multistep(4))
    same = fit_sigmas(G2, noise, 4, dpmpp_2m, sigma_max=20., x0=ends)
    assert (found / same - 1)[:-1].abs().max() < 0.01    # both references are 1e-5 off at most, so the fits agree closely
    assert error(found, dpmpp_2m, noise, ends) < 0.8 * error(karras_sigmas(4, 0.1, 20.), dpmpp_2m, noise, ends)


def test_fits_the_mean_distance_not_the_squares(train):
    "Moving single levels of what was found makes the mean distance larger, whatever it does to the squares."
    noise, ends = train
    found = fit_sigmas(G2, noise, 4, dpmpp_2m, x0=ends)
    least = error(found, dpmpp_2m, noise, ends)
    for i in range(1, 4):
        for factor in (0.93, 1.07):
            moved = found.clone()
            moved[i] *= factor
            assert error(moved, dpmpp_2m, noise, ends) > least


def test_cond_and_network_in_float32(train):
    "A denoiser that needs a label and answers in float32, with gradients that must not be kept."
    weight = torch.nn.Parameter(torch.ones(()))
    seen = set()

    def network(x, sigma, labels):
        assert not torch.is_grad_enabled()
        seen.add(tuple(labels.shape))
        return G2(x, sigma).float() * weight

    noise, ends = train[0][:64].float(), train[1][:64]
    labels = torch.zeros(64, dtype=torch.int64)
    found = fit_sigmas(network, noise, 5, dpmpp_3m, labels=labels)
    check_schedule(found, 5)
    assert seen == {(64,)} and not found.requires_grad
    exact_fit = fit_sigmas(G2, noise.double(), 5, dpmpp_3m, x0=ends)
    assert error(found, dpmpp_3m, noise.double(), ends) < 1.1 * error(exact_fit, dpmpp_3m, noise.double(), ends)


def test_log_and_cost(train):
    counted, log = CountNFE(G2), []
    found = fit_sigmas(counted, train[0], 8, dpmpp_3m, starts=[karras_sigmas(8)], log=lambda levels, e: log.append((levels, e)))
    errors = [e for _, e in log]
    assert errors == sorted(errors, reverse=True) and torch.equal(log[-1][0], found)
    # the reference and three runs; in each descent columns of half a run (7 knots at most) and up to 8 tries
    assert counted.nfe <= 512 + 3 * 8 + len(log) * (7 * 9 // 2 + 8 * 8)


# --- its parts

@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.floats(0.01, 1e4))
def test_levels_fall_whatever_theta_is(theta, top):
    levels = _levels_of(torch.tensor(theta, dtype=torch.float64), top)
    assert levels[0] == top and levels[-1] == 0 and len(levels) == len(theta) + 2
    assert all(a > b or b < 1e-300 for a, b in zip(levels, levels[1:]))    # 40 gaps of e^3 leave float64's range


@given(st.integers(2, 60), st.floats(1, 30))
def test_gaps_and_levels_are_inverse(n, rho):
    levels = karras_sigmas(n, rho=rho).tolist()
    if min(math.log(a / b) for a, b in zip(levels, levels[1:-1])) < 1.01e-3: return    # below the smallest gap allowed
    assert np.allclose(_levels_of(_gaps_of(levels), 80.), levels, rtol=1e-10, atol=0)    # rounding, summed over the gaps


@given(st.integers(3, 60), st.integers(2, 30))
def test_hats(m, knots):
    hats = _hats(m, knots)
    assert hats.shape == (m, knots)
    assert torch.allclose(hats.sum(1), torch.ones(m, dtype=torch.float64), atol=1e-12)
    line = torch.linspace(-1, 2, knots, dtype=torch.float64)
    assert torch.allclose(hats @ line, torch.linspace(-1, 2, m, dtype=torch.float64), atol=1e-12)    # a straight line stays one


@pytest.mark.parametrize("step", [euler, heun, dpmpp_3m, unipc(3)], ids=["euler", "heun", "3m", "unipc"])
def test_taking_up_a_run_changes_nothing(step):
    noise, levels = noise_of(3, 8), karras_sigmas(7).tolist()
    states = _walk(step, G2, levels, [(noise * 80., None)])
    assert torch.equal(states[-1][0], sample(G2, noise, karras_sigmas(7), step))
    for known in range(1, 8): assert torch.equal(_walk(step, G2, levels, states[:known])[-1][0], states[-1][0])


def test_jacobian_by_central_differences():
    noise, theta = noise_of(3, 8), _gaps_of(karras_sigmas(7).tolist())
    def end(theta): return sample(G2, noise, torch.tensor(_levels_of(theta, 80.)), dpmpp_3m)
    def walk(levels, states=None): return _walk(dpmpp_3m, G2, levels, states or [(noise * 80., None)])
    for basis in (torch.eye(6, dtype=torch.float64), _hats(6, 3)):
        J = _jacobian(walk, walk(_levels_of(theta, 80.)), theta, basis, 80., delta=1e-6)
        want = torch.stack([(end(theta + 1e-4 * move) - end(theta - 1e-4 * move)) / 2e-4 for move in basis.T])
        assert (J - want).abs().max() < 1e-3 * want.abs().max()    # Taylor's rest of both, and rounding at 80 / 1e-6


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_downhill_finds_the_geometric_median(seed):
    points = torch.randn(15, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points[0] *= 50
    at, J = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[:, None].expand(3, 15, 3)
    for _ in range(200): at = at + _downhill(J, at - points, 0.)
    distance = lambda at: (at - points).norm(dim=1).mean()
    assert distance(at) < distance(points.mean(0))
    for move in torch.eye(3, dtype=torch.float64):    # the smoothing keeps it near the median, not on it
        assert distance(at) < min(distance(at + 0.5 * move), distance(at - 0.5 * move))


def test_downhill_survives_nothing_to_do():
    assert torch.equal(_downhill(torch.zeros(2, 5, 3), torch.zeros(5, 3), 1e-2).abs(), torch.zeros(2, dtype=torch.float64))
    assert _downhill(torch.zeros(2, 5, 3), torch.ones(5, 3), 1e-2).isfinite().all()


# --- misuse

@pytest.mark.parametrize("change, message", [
    (dict(n=0), "n must be"), (dict(n=2.5), "n must be"), (dict(knots=1), "knots must be"), (dict(rounds=0), "rounds must be"),
    (dict(sigma_max=0.), "sigma_max must be"), (dict(sigma_max=math.inf), "sigma_max must be"),
    (dict(noise=torch.full((4, 2), math.nan)), "noise must be"), (dict(noise=torch.ones(4, 2, dtype=torch.int64)), "noise must be"),
    (dict(x0=torch.zeros(3, 2)), "x0 must have shape"), (dict(x0=torch.full((4, 2), math.inf, dtype=torch.float64)), "x0 must be"),
    (dict(starts=[]), "starts must hold"), (dict(starts=[karras_sigmas(4)]), r"n \+ 1 = 4"),
    (dict(starts=[karras_sigmas(4)[:-1]]), "to 0"), (dict(starts=[karras_sigmas(3), karras_sigmas(3, sigma_max=50.)]), "one sigma_max"),
    (dict(starts=[[80., 1., 2., 0.]]), r"starts\[0\]"),
    (dict(denoise=lambda x, sigma: x[:1]), "must have shape"), (dict(denoise=lambda x, sigma: x * math.nan), "must be finite"),
    (dict(step=lambda f, x, s, t, c: (f(x, s) + torch.randn_like(x), c)), "deterministic"),
], ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_misuse_is_named(change, message):
    good = dict(denoise=G2, noise=noise_of(0, 4), n=3, step=euler, x0=torch.zeros(4, 2))
    with pytest.raises(ValueError, match=message): fit_sigmas(**good | change)


# --- the command

def test_benchmark_runs_without_peers():
    text = run(sys.executable, "benchmarks/solvers.py", "--parts", "g2", "--nfe", "3", "8", "--starts", "64", "--fit-starts", "32",
               "--no-peers", "--no-fits", OMP_NUM_THREADS="1")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| fixed | deis(3)")]
    assert len(rows) == 1 and 0 < float(rows[0][4].split()[0].strip("*")) < 0.2    # 8 evaluations; 0.05 on many starts
    assert "| 8 | 0.14 |" in text and "peer" not in text.split("Targets")[0].split("###")[1]
