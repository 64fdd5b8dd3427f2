"Multistep, exponential, UniPC and adaptive steps: against k-diffusion's and diffusers' numbers, theory and misuse."
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import CountNFE, seeded_noise
from ddpm_edm.edm import Churn
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.solvers import (
    _moments, _weights, adams_bashforth, adaptive, deis, dpm_multistep, dpm_solver, dpm_solver_2, dpm_solver_3, dpmpp_2m, dpmpp_2s,
    dpmpp_3m, euler, exp_multistep, heun, sample, unipc,
)

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    data = np.load(GOLDEN / name)
    return {k: torch.from_numpy(data[k]) for k in data if data[k].dtype.kind == "f"}, json.loads(str(data["_meta"]))


M = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "mixtures.npz").items() if v.dtype.kind == "f"}
KDIFF, KDIFF_META = load("kdiff_solvers.npz")
DIFFUSERS, DIFFUSERS_META = load("diffusers_solvers.npz")
MIXTURES = {space: Mixture(M[f"{space}.means"], M[f"{space}.stds"], M[f"{space}.weights"]) for space in ("g2", "img")}

# name: step, order of accuracy, evaluations in each step but the last
MEMORY = {
    "adams_bashforth(1)": (adams_bashforth(1), 1, 1), "adams_bashforth(2)": (adams_bashforth(2), 2, 1),
    "adams_bashforth(3)": (adams_bashforth(3), 3, 1), "adams_bashforth(4)": (adams_bashforth(), 4, 1),
    "exp_multistep(2)": (exp_multistep(2), 2, 1), "exp_multistep(3)": (exp_multistep(), 3, 1), "exp_multistep(4)": (exp_multistep(4), 4, 1),
    "deis(2)": (deis(2), 2, 1), "deis(3)": (deis(), 3, 1), "deis(4)": (deis(4), 4, 1),
    "dpmpp_2m": (dpmpp_2m, 2, 1), "dpmpp_3m": (dpmpp_3m, 2, 1), "dpm_multistep(2, eps)": (dpm_multistep(2, "eps"), 2, 1),
    "dpm_multistep(3, eps)": (dpm_multistep(3, "eps"), 2, 1), "unipc(1)": (unipc(1), 2, 1), "unipc(2)": (unipc(2), 3, 1),
    "unipc(2, bh1)": (unipc(2, "bh1"), 3, 1), "unipc(3)": (unipc(), 4, 1), "unipc(3, eps)": (unipc(3, predicts="eps"), 4, 1)}
SINGLE = {
    "dpm_solver(1)": (dpm_solver(1), 1, 1), "dpm_solver_2": (dpm_solver_2, 2, 2), "dpm_solver_3": (dpm_solver_3, 3, 3),
    "dpm_solver(3, r1=1/2)": (dpm_solver(3, r1=1 / 2), 3, 3), "dpm_solver(3, r2=1/2)": (dpm_solver(3, r2=1 / 2), 2, 3),
    "dpm_solver(2, r1=1)": (dpm_solver(2, r1=1), 2, 2), "dpmpp_2s": (dpmpp_2s, 2, 2), "dpmpp_3s": (dpm_solver(3, "x0"), 3, 3)}
METHODS = MEMORY | SINGLE
STEPS = {name: method[0] for name, method in METHODS.items()} | {"adaptive(2)": adaptive(2), "adaptive(3)": adaptive()}


def rms(a): return a.square().mean().sqrt().item()
def f64(*values): return torch.tensor(values, dtype=torch.float64)
def named(table): return pytest.mark.parametrize("name", table)


def close(x, want, eps=1e-9):
    # float64 on both sides: the same operations in another order leave about 1e-13, 1e-9 allows for amplification along the path
    assert x.shape == want.shape and (x - want).abs().max() <= eps * max(1, want.abs().max())


class Recorder:
    "A denoiser that keeps the levels it was called at."
    def __init__(self, denoise): self.denoise, self.sigma = denoise, []
    def __call__(self, x, sigma):
        self.sigma.append(sigma)
        return self.denoise(x, sigma)


def in_turn(steps):
    "One step of the loop from each of these steps; they share their memory."
    steps = iter(steps)
    return lambda *args: next(steps)(*args)


@pytest.fixture
def p(): return Gaussian(f64(0.3, -0.2), std=0.5)


@pytest.fixture
def noise(): return seeded_noise(range(5), (2,), dtype=torch.float64)


# --- golden numbers

def kdiff(*samplers): return pytest.mark.parametrize("key", [key for key, m in KDIFF_META.items() if m["sampler"] in samplers])


@kdiff("euler", "heun", "dpm_2", "lms", "dpmpp_2m", "dpmpp_2s_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")
def test_kdiffusion(key):
    m, space = KDIFF_META[key], key.split(".")[0]
    assert m.get("eta", 0) == 0
    step = {"euler": euler, "heun": heun, "dpm_2": dpm_solver_2, "lms": adams_bashforth(m.get("order", 4)), "dpmpp_2m": dpmpp_2m,
            "dpmpp_2s_ancestral": dpmpp_2s, "dpmpp_2m_sde": dpmpp_2m, "dpmpp_3m_sde": dpmpp_3m}[m["sampler"]]
    levels = karras_sigmas(m["n"], 0.01, 80.) if m["sigmas"] == "karras" else [*np.geomspace(80., 0.01, m["n"]), 0.]
    denoise = Recorder(MIXTURES[space])
    close(sample(denoise, KDIFF[f"{space}.latents"], levels, step), KDIFF[f"{key}.x"])
    torch.testing.assert_close(f64(*denoise.sigma), KDIFF[f"{key}.call_sigma"], rtol=1e-12, atol=0)    # rounding of powers and logarithms


@kdiff("dpm_fast")
def test_kdiffusion_dpm_fast(key):
    nfe, space = KDIFF_META[key]["nfe"], key.split(".")[0]
    orders = [3] * (nfe // 3 - 1) + [2, 1] if nfe % 3 == 0 else [3] * (nfe // 3) + [nfe % 3]
    denoise, steps = Recorder(MIXTURES[space]), {1: euler, 2: dpm_solver_2, 3: dpm_solver_3}
    x = sample(denoise, KDIFF[f"{space}.latents"], np.geomspace(80., 0.01, len(orders) + 1), in_turn([steps[k] for k in orders]))
    close(x, KDIFF[f"{key}.x"])
    torch.testing.assert_close(f64(*denoise.sigma), KDIFF[f"{key}.call_sigma"], rtol=1e-12, atol=0)


@kdiff("dpm_adaptive")
def test_kdiffusion_dpm_adaptive(key):
    m, space = KDIFF_META[key], key.split(".")[0]
    denoise = Recorder(MIXTURES[space])
    options = {k: m[k] for k in ("rtol", "atol", "pcoeff", "icoeff") if k in m}
    x = sample(denoise, KDIFF[f"{space}.latents"], [80., 0.01], adaptive(m["order"], **options))
    # steps depend on the state through the controller, which amplifies rounding: 1e-12 measured
    close(x, KDIFF[f"{key}.x"])
    attempts = KDIFF[f"{key}.call_sigma"].reshape(-1, m["order"]).tolist()
    want = [s for before, now in zip([[None]], attempts) for s in now]
    for before, now in zip(attempts, attempts[1:]): want += now[now[0] == before[0]:]    # after a rejection the first look is kept
    torch.testing.assert_close(f64(*denoise.sigma), f64(*want), rtol=1e-9, atol=0)
    assert len(denoise.sigma) == m["info"]["nfe"] - m["info"]["n_reject"]


def diffusers(*classes): return pytest.mark.parametrize("key", [key for key, m in DIFFUSERS_META.items() if m["cls"] in classes])


def diffusers_case(key):
    "Mixture, unit noise for `sample`, levels, wanted x in coordinates with alpha = 1, number of steps, configuration."
    m, space, twin = DIFFUSERS_META[key], key.split(".")[0], key.replace("img.", "g2.")
    z, s, x = DIFFUSERS[f"{space}.latents"], DIFFUSERS[f"{twin}.sched_sigmas"], DIFFUSERS[f"{key}.x"]
    if m["cls"].startswith("EDM"): return MIXTURES[space], z * 80 / s[0], s, x, m["n"], m["cfg"]
    if m["cls"].startswith("Heun"): return MIXTURES[space], z, torch.cat([s[:1], s[1::2]]), x, m["n"], m["cfg"]
    return MIXTURES[space], z * (1 + s[0]**2).sqrt() / s[0], s, x * (1 + s[-1]**2).sqrt(), m["n"], m["cfg"]


@diffusers("HeunDiscreteScheduler")
def test_diffusers_heun(key):
    denoise, z, levels, want, n, _ = diffusers_case(key)
    assert len(levels) == n + 1
    close(sample(denoise, z, levels, heun), want)


@diffusers("UniPCMultistepScheduler")
def test_diffusers_unipc(key):
    denoise, z, levels, want, n, cfg = diffusers_case(key)
    options = cfg.get("solver_type", "bh2"), "x0" if cfg.get("predict_x0", True) else "eps"
    orders = [min(cfg.get("solver_order", 2), n - i) for i in range(n)]    # it lowers the order towards the end
    denoise = Recorder(denoise)
    close(sample(denoise, z, levels, in_turn([unipc(k, *options) for k in orders])), want)
    torch.testing.assert_close(f64(*denoise.sigma), DIFFUSERS[key.replace("img.", "g2.") + ".sigma"], rtol=1e-12, atol=0)


@diffusers("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler")
def test_diffusers_dpm_multistep(key):
    denoise, z, levels, want, n, cfg = diffusers_case(key)
    predicts = "x0" if cfg.get("algorithm_type", "dpmsolver++") == "dpmsolver++" else "eps"
    orders = [min(cfg.get("solver_order", 2), i + 1) for i in range(n)]
    if n < 15 and cfg.get("lower_order_final", True): orders[-2:] = min(orders[-2], 2), 1
    steps = {k: dpm_multistep(k, predicts) for k in (1, 2, 3)}
    if cfg.get("solver_type") == "heun": steps[2] = exp_multistep(2, predicts)
    close(sample(denoise, z, levels, in_turn([steps[k] for k in orders])), want)    # 3M starts with 2M here, with w1 in k-diffusion


@diffusers("DPMSolverSinglestepScheduler")
def test_diffusers_dpm_singlestep(key):
    denoise, z, levels, want, n, cfg = diffusers_case(key)
    order, predicts = cfg["solver_order"], "x0" if cfg["algorithm_type"] == "dpmsolver++" else "eps"
    if n % order == 0: sizes = [order] * (n // order - 1) + ([1, 1] if order == 2 else [2, 1])
    else: sizes = [order] * (n // order) + [n % order]
    ends, clock, steps = np.cumsum([0, *sizes]), -levels.log(), []
    for a, b in zip(ends, ends[1:]):    # its looks lie at the schedule's levels
        parts = [((clock[j] - clock[a]) / (clock[b] - clock[a])).item() for j in range(a + 1, b)]
        steps.append(third_look_from_second_order(predicts, *parts) if len(parts) == 2 else dpm_solver(b - a, predicts, *parts))
    close(sample(denoise, z, levels[ends], in_turn(steps)), want)


def third_look_from_second_order(predicts, r1, r2):
    "dpm_solver(3) as diffusers has it: the third look is made where a second-order step of the first two looks leads."
    def step(denoise, x, sigma, sigma_next, carry):
        answers = []
        def look(at, level):
            if len(answers) < 2: answers.append(denoise(at, level))
            else:
                again = iter(answers)
                other = dpm_solver(2, predicts, r1 / r2)(lambda *_: next(again), x, sigma, level)[0]
                D = denoise(other, level)
                answers.append(D if predicts == "x0" else at - (other - D))    # the same estimate of the noise, as seen from `at`
            return answers[-1]
        return dpm_solver(3, predicts, r1, r2)(look, x, sigma, sigma_next, carry)
    return step


# --- order and exactness

BLOBS = Mixture(f64([-1.2, 0.], [1., 1.], [0.9, -1.]), stds=f64(0.35, 0.2, 0.3), weights=f64(0.5, 0.2, 0.3))
Z = seeded_noise(range(32), (2,), dtype=torch.float64)


@pytest.fixture(scope="module")
def reference():
    "The blobs of the page at sigma = 0.5, where the paths separate."
    x, other = (sample(BLOBS, Z, gently(n), step) for n, step in ((5000, exp_multistep(5)), (4500, deis(5))))
    assert rms(x - other) < 1e-11
    return x


def gently(n):
    "n steps from 80 to 0.5, the first divided into parts that double in length: the low order of a method's start leaves no trace."
    first, second, *rest = karras_sigmas(n + 1, sigma_min=0.5)[:-1].tolist()
    return [first, *(first * (second / first)**0.5**j for j in range(10, -1, -1)), *rest]


@named(METHODS)
def test_order_of_accuracy(reference, name):
    step, order, _ = METHODS[name]
    errors = [rms(sample(BLOBS, Z, gently(n), step) - reference) for n in (512, 1024)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15    # the next term of the error is a few per cent


def test_third_multistep_leaves_out_half_of_the_quadratic_term(noise):
    "D = lambda^2 from three answers: exp_multistep(3) is exact, 3M off by half of w2 h^2."
    levels = [9., 5., 3.]
    def D(x, s): return torch.full_like(x, math.log(s)**2)
    carry = [(s, D(noise, s)) for s in levels[1::-1]]
    x, (_, w0, w1, w2), h = {}, _moments("x0", 3., 1.), math.log(3)
    for step in (dpmpp_3m, exp_multistep(3)): x[step], _ = step(D, noise, 3., 1., carry)
    published, exact = x.values()
    want = noise / 3 + w0 * math.log(3)**2 - 2 * w1 * h * math.log(3) + w2 * h**2
    close(exact, want, eps=1e-13)
    close(published, want - w2 / 2 * h**2, eps=1e-13)


levels_strategy = st.lists(st.floats(0.05, 1.5), min_size=5, max_size=8).map(lambda h: (50. * np.exp(-np.cumsum([0, *h]))).tolist())
coefs_strategy = st.lists(st.floats(-2, 2), min_size=1, max_size=4)


def solution(coefs, predicts):
    "D(x, sigma) whose f is a polynomial in lambda = -log sigma, and a path x(sigma)."
    f, L = np.polynomial.Polynomial(coefs), lambda s: -math.log(s)
    if predicts == "x0":      # dx/dlambda = f - x
        x = f - f.deriv() + f.deriv(2) - f.deriv(3)
        return lambda _, s: f64([f(L(s))]), lambda s: f64([x(L(s)) + 2 * s])
    g = f + f.deriv() + f.deriv(2) + f.deriv(3)    # dx/dlambda = -sigma f has the solution sigma (f + f' + ...)
    return lambda x, s: x - s * f(L(s)), lambda s: f64([s * g(L(s)) + 0.7])


@pytest.mark.parametrize("predicts", ["x0", "eps"])
@given(levels=levels_strategy, coefs=coefs_strategy)
@settings(max_examples=40, deadline=None)
def test_exponential_multistep_is_exact_for_polynomials(predicts, levels, coefs):
    denoise, path = solution(coefs, predicts)
    step, k = exp_multistep(4, predicts), 3
    carry = []
    for i in range(k): carry = step(denoise, path(levels[i]), levels[i], levels[i + 1], carry)[1]
    x = path(levels[k])
    for s, s_next in zip(levels[k:], levels[k + 1:]): x, carry = step(denoise, x, s, s_next, carry)
    # extrapolation multiplies rounding by up to (h / shortest step)^3 = 3e4
    torch.testing.assert_close(x, path(levels[-1]), rtol=0, atol=1e-9)


@given(levels=levels_strategy, coefs=coefs_strategy)
@settings(max_examples=40, deadline=None)
def test_adams_bashforth_is_exact_for_polynomials(levels, coefs):
    slope = np.polynomial.Polynomial(coefs) * 1e-2
    path, step, carry = slope.integ(), adams_bashforth(4), []
    def denoise(x, s): return x - s * slope(s)
    for i in range(3): carry = step(denoise, f64([path(levels[i])]), levels[i], levels[i + 1], carry)[1]
    x = f64([path(levels[3])])
    for s, s_next in zip(levels[3:], [*levels[4:], 0.]): x, carry = step(denoise, x, s, s_next, carry)
    torch.testing.assert_close(x, f64([path(0.)]), rtol=0, atol=1e-6 * abs(path(50.)) + 1e-9)    # rounding of cancelling numbers of that size


@pytest.mark.parametrize("predicts", ["x0", "eps"])
@pytest.mark.parametrize("B", ["bh1", "bh2"])
@given(levels=levels_strategy, coefs=coefs_strategy, off=st.floats(-1, 1))
@settings(max_examples=20, deadline=None)
def test_unipc_corrects_with_one_more_node(B, predicts, levels, coefs, off):
    "From an exact start and three exact answers the fourth, made at a wrong x, corrects x exactly for cubics; B plays no part."
    denoise, path = solution(coefs, predicts)
    carry, step = None, unipc(3, B, predicts)
    for i in range(3): carry = step(denoise, path(levels[i]), levels[i], levels[i + 1], (path(levels[i - 1]), carry[1]) if carry else None)[1]
    carry = path(levels[2]), carry[1]
    # in the noise form D follows x, so that eps is right although x is wrong
    _, (corrected, _) = step(denoise, path(levels[3]) + off, levels[3], levels[4], carry)
    torch.testing.assert_close(corrected, path(levels[3]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("predicts", ["x0", "eps"])
@pytest.mark.parametrize("order", [2, 3])
def test_singlestep_with_exact_weights_is_exact_for_linear(predicts, order):
    denoise, path = solution([0.4, -0.3], predicts)
    x, _ = dpm_solver(order, predicts)(denoise, path(5.), 5., 2., None)
    if order == 3: torch.testing.assert_close(x, path(2.), rtol=0, atol=1e-13)
    else:    # w0 / 2 in place of w1
        _, w0, w1, _ = _moments(predicts, 5., 2.)
        torch.testing.assert_close(x - path(2.), f64([(w0 / 2 - w1) * math.log(5 / 2) * -0.3]), rtol=0, atol=1e-13)


@given(sigma=st.floats(0.01, 80), h=st.floats(1e-3, 8), nodes=st.lists(st.floats(0.1, 2), min_size=2, max_size=2))
@settings(max_examples=50, deadline=None)
def test_moments_and_weights_agree(sigma, h, nodes):
    nodes, after = np.array([0., -nodes[0], -nodes[0] - nodes[1]]), sigma * math.exp(-h)
    for predicts, density in (("x0", lambda s: np.exp(s - h)), ("eps", lambda s: -sigma * np.exp(-s))):
        w = np.array(_weights(nodes.tolist(), 0., h, density))
        for k, moment in enumerate(_moments(predicts, sigma, after)[1:]):
            # the recursion divides rounding by h^k, and it is multiplied by h^k again where it is used
            assert abs(w @ nodes**k - moment * h**k) <= 1e-10 * max(1, sigma) * max(1, h**2)


@pytest.mark.parametrize("step", [adams_bashforth(1), exp_multistep(1), deis(1), dpm_multistep(1), dpm_multistep(1, "eps"), dpm_solver(1), dpm_solver(1, "x0")])
def test_first_order_is_euler(noise, step):
    x, want = (sample(MIXTURES["g2"], noise, karras_sigmas(18), s) for s in (step, euler))
    torch.testing.assert_close(x, want, rtol=0, atol=1e-11)    # the same update in another order: rounding of numbers up to 80


@pytest.mark.parametrize("predicts", ["x0", "eps"])
@pytest.mark.parametrize("B", ["bh1", "bh2"])
def test_unipc_of_two_answers_has_half_of_B(noise, B, predicts):
    "UniP-2 in the paper's words: the first-order step plus B(h) / 2 times the divided difference, in units of h."
    g, (before, sigma, after) = MIXTURES["g2"], (4., 3., 1.)
    _, carry = unipc(2, B, predicts)(g, 4 * noise, before, sigma, None)
    x, h = 3 * noise, math.log(sigma / after)
    got, (corrected, known) = unipc(2, B, predicts)(g, x, sigma, after, carry)
    (_, f), (_, f_before) = known
    a, euler_weight = (after / sigma, 1 - math.exp(-h)) if predicts == "x0" else (1, after - sigma)
    half = {"bh1": h, "bh2": 1 - math.exp(-h) if predicts == "x0" else math.exp(h) - 1}[B] / 2 * (1 if predicts == "x0" else -after)
    close(got, a * corrected + euler_weight * f + half * (f - f_before) * h / math.log(before / sigma), eps=1e-13)


# --- every method

@named(STEPS)
def test_one_step_looks_once_and_lands_on_D(p, noise, name):
    count = CountNFE(p)
    x = sample(count, noise, karras_sigmas(1), STEPS[name])
    torch.testing.assert_close(x, p(80 * noise, 80.), rtol=0, atol=1e-12)    # rounding of numbers near 80
    assert count.nfe == 1


@named(METHODS)
@pytest.mark.parametrize("n", [2, 3, 18])
def test_number_of_evaluations(p, noise, name, n):
    step, _, evaluations = METHODS[name]
    count = CountNFE(p)
    sample(count, noise, karras_sigmas(n), step)
    assert count.nfe == evaluations * (n - 1) + 1


TRANSFORMED = {name: step for name, step in STEPS.items() if "adaptive" not in name}    # its tolerances have a scale


@named(TRANSFORMED)
@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5), angle=st.floats(0, 6.3))
@settings(max_examples=5, deadline=None)
def test_solvers_commute_with_scaling_shifts_and_rotations_of_the_data(name, scale, shift, angle):
    step, g, z = STEPS[name], MIXTURES["g2"], M["g2.latents"][:4]
    R = f64([math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)])
    def move(x): return scale * x @ R + shift
    moved, levels = Mixture(move(g.means), scale * g.stds, g.weights), karras_sigmas(12)
    want = move(sample(g, z, levels, step))
    x = sample(moved, move(80 * z) / (80 * scale), scale * levels, step)
    torch.testing.assert_close(x, want, rtol=0, atol=1e-8 * max(1, scale))    # rounding, amplified along unstable paths


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_commutes_with_scaling_of_the_data_and_the_tolerance(order):
    g, z = MIXTURES["g2"], M["g2.latents"]
    want = sample(g, z, [80., 0.01], adaptive(order, atol=0.01))
    x = sample(Mixture(2 * g.means, 2 * g.stds, g.weights), z, [160., 0.02], adaptive(order, atol=0.02))
    torch.testing.assert_close(x, 2 * want, rtol=0, atol=1e-10)    # rounding, amplified by the controller


@named(STEPS)
def test_nothing_handed_over_is_changed(noise, name):
    g, step, carry, seen = MIXTURES["g2"], STEPS[name], None, []
    def denoise(x, sigma):
        D = g(x, sigma)
        seen.extend([(x, x.clone()), (D, D.clone())])
        return D
    x = 80 * noise
    for sigma, sigma_next in zip([80., 30., 9., 3., 1.], [30., 9., 3., 1., 0.]):
        seen.append((x, x.clone()))
        x, carry = step(denoise, x, sigma, sigma_next, carry)
    for now, before in seen: assert torch.equal(now, before)


@named(STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_keeps_its_dtype(noise, name, dtype):
    x = sample(MIXTURES["g2"], noise, karras_sigmas(8), STEPS[name], dtype=dtype)
    assert x.dtype == dtype and x.isfinite().all()


@named(METHODS)    # an adaptive step's lengths depend on x and are not differentiated
def test_gradients_pass(noise, name):
    "The derivative of four steps with respect to the start, against differences."
    g, step, levels = MIXTURES["g2"], STEPS[name], [9., 5., 3., 1., 0.5]
    def run(x):
        carry = None
        for s, s_next in zip(levels, levels[1:]): x, carry = step(g, x, s, s_next, carry)
        return x
    assert torch.autograd.gradcheck(run, (9 * noise[:1]).requires_grad_(), eps=1e-5, atol=1e-6)


@named(STEPS)
def test_denoiser_of_wrong_shape_and_not_finite(p, noise, name):
    levels = [4., 2., 0.5, 0.]
    with pytest.raises(ValueError, match=r"denoise's answer in step 0 \(sigma = 4\) must have shape \(5, 2\)"):
        sample(lambda x, s: x[:1], noise, levels, STEPS[name])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"denoise's answer in step \d \(sigma = [\d.]+\) must be finite"):
            sample(lambda x, s: p(x, s) * (bad if s < 1 else 1), noise, levels, STEPS[name])


@named(STEPS)
def test_repeated_levels_are_refused_before_any_work(p, noise, name):
    for levels, message in (([2., 1., 1., 0.], "got 1 at index 2 after 1"), ([2., 2.], "got 2 at index 1 after 2"), ([1., 2., 0.], "decrease")):
        count = CountNFE(p)
        with pytest.raises(ValueError, match=message): sample(count, noise, levels, STEPS[name])
        assert count.nfe == 0


@named(STEPS)
def test_callback_that_raises_stops_the_run_and_sees_the_first_answer(p, noise, name):
    seen = []
    def stop(x, sigma, D, i):
        seen.append(torch.equal(D, p(x, sigma)))
        if i == 2: raise KeyboardInterrupt("enough")
    with pytest.raises(KeyboardInterrupt, match="enough"): sample(p, noise, karras_sigmas(9), STEPS[name], callback=stop)
    assert seen == [True] * 3


# --- memory

@named([name for name in MEMORY if "unipc" not in name])
def test_memory_is_a_list_of_pairs_newest_first(noise, name):
    step, g = MEMORY[name][0], MIXTURES["g2"]
    levels, carry, x = [80., 30., 9., 3., 1., 0.3, 0.1], None, 80 * noise
    most = next(int(c) for c in name if c.isdigit())
    for i, (s, s_next) in enumerate(zip(levels, levels[1:])):
        D = g(x, s)
        want = D if name.startswith(("exp", "dpmpp")) else (x - D) / s
        x, carry = step(g, x, s, s_next, carry)
        assert isinstance(carry, list) and [level for level, _ in carry] == levels[max(0, i + 1 - most):i + 1][::-1]
        assert torch.equal(carry[0][1], want)
    plain, _ = step(g, x, 0.1, 0.05, list(carry))    # a list made by hand will do
    assert torch.equal(plain, step(g, x, 0.1, 0.05, carry)[0])


def churn(n, amount, **options):
    g = torch.Generator().manual_seed(0)
    return Churn(n, amount, draw=lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype), **options)


@named(MEMORY)
def test_memory_does_not_survive_fresh_noise(noise, name):
    levels = karras_sigmas(40)
    x, want = (sample(MIXTURES["g2"], noise, levels, step, churn=churn(40, 16.)) for step in (MEMORY[name][0], euler))
    torch.testing.assert_close(x, want, rtol=0, atol=1e-9)    # without memory every one of them is Euler


@named(STEPS)
def test_churn_of_nothing_changes_nothing(noise, name):
    levels, g = karras_sigmas(12), MIXTURES["g2"]
    assert torch.equal(sample(g, noise, levels, STEPS[name], churn=churn(12, 0.)), sample(g, noise, levels, STEPS[name]))


@named(MEMORY)
def test_memory_serves_again_below_S_min(noise, name):
    "Churn above 2 only: below, a run goes on as one that started there."
    levels, g, kept = karras_sigmas(12), MIXTURES["g2"], {}
    def keep(x, sigma, **_): kept[sigma] = x
    x = sample(g, noise, levels, MEMORY[name][0], churn=churn(12, 4., S_min=2.), callback=keep)
    last = next(s for s in kept if s not in levels and s / (1 + churn(12, 4.).gamma(2.)) < 4)    # the last level that was raised
    rest = [last, *(s for s in levels.tolist() if s < 2)]
    torch.testing.assert_close(sample(g, kept[last] / last, rest, MEMORY[name][0]), x, rtol=0, atol=1e-12)


# --- adaptive

def test_a_smaller_tolerance_costs_more_and_gives_less_error(reference):
    nfes, errors = [], []
    for tol in (0.1, 0.01, 1e-3, 1e-4):
        count = CountNFE(BLOBS)
        errors.append(rms(sample(count, Z, [80., 0.5], adaptive(rtol=tol, atol=tol / 10)) - reference))
        nfes.append(count.nfe)
    assert nfes == sorted(set(nfes)) and errors == sorted(set(errors), reverse=True)
    assert errors[-1] < 1e-3 and errors[-1] < errors[0] / 30    # a thousandth of the tolerance; order 2 to 3 of the pair


@pytest.mark.parametrize("P, I, D", [(0.3, 0.8, 0.), (0.1, 0.9, 0.1), (0., 0.7, 0.2)])
@pytest.mark.parametrize("order", [2, 3])
def test_step_sizes_follow_the_pid_rule(order, P, I, D):
    g, x, sigma, h, past, before = MIXTURES["g2"], 20 * M["g2.latents"], 20., 0.05, [], 20 * M["g2.latents"]
    record = Recorder(g)
    got, (h_last, _) = adaptive(order, pcoeff=P, icoeff=I, dcoeff=D)(record, x, 20., 1.)
    starts, rejected = {20.}, 0
    while sigma > 1:
        target = max(1., sigma * math.exp(-h))
        low, high = (dpm_solver(k, r1=1 / order)(g, x, sigma, target)[0] for k in (order - 1, order))
        E = rms((low - high) / torch.maximum(torch.tensor(0.0078), 0.05 * torch.maximum(low.abs(), before.abs()))) + 1e-8    # never 0
        E_1, E_2 = (past + [E, E])[:2] if past else (E, E)
        change = 1 + math.atan(E**(-(P + I + D) / order) * E_1**((P + 2 * D) / order) * E_2**(-D / order) - 1)
        if change >= 0.81: x, before, sigma, past = high, low, target, [E, E_1]
        else: rejected += 1
        h *= change
        starts.add(sigma)
    close(got, x)
    assert h_last == pytest.approx(h, rel=1e-6)
    assert len(record.sigma) == order * (len(starts) - 1) + (order - 1) * rejected


def test_adaptive_meets_every_level_and_carries_its_step_size(noise):
    seen, carries, step = [], [], adaptive()
    def spy(denoise, x, sigma, sigma_next, carry):
        carries.append(carry)
        return step(denoise, x, sigma, sigma_next, carry)
    sample(MIXTURES["g2"], noise, [80., 9., 1., 0.], spy, callback=lambda x, sigma, **_: seen.append(sigma))
    assert seen == [80., 9., 1.] and carries[0] is None
    assert all(h > 0 and len(past) == 2 for h, past in carries[1:])


def test_adaptive_leaves_no_crumb_of_a_step(noise):
    count = CountNFE(MIXTURES["g2"])
    for crumb in (1e-16, 1e-13, 1e-9):
        x, _ = adaptive(h_init=0.05)(count, 3 * noise, 3., 3 * math.exp(-0.05) * (1 - crumb))
        assert x.isfinite().all()
    assert count.nfe == 9


def test_adaptive_refuses_what_it_can_not_solve(p, noise):
    g = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"can't be met at sigma = 9"):
        sample(lambda x, s: 1e9 * torch.randn(x.shape, generator=g, dtype=x.dtype) * (2 + x), noise, [9., 1., 0.], adaptive())
    for bad in (math.nan, math.inf):    # on a GPU the loop looks at answers only at the end: this must not go on for ever
        with pytest.raises(ValueError, match="must be finite, got nan or infinity in the step from sigma = 9"):
            adaptive()(lambda x, s: p(x, s) * bad, 9 * noise, 9., 1.)


# --- misuse

@pytest.mark.parametrize("make, message", [
    (lambda: adams_bashforth(0), "order must be a whole number and at least 1, got 0"),
    (lambda: adams_bashforth(2.5), "order must be a whole number"),
    (lambda: exp_multistep(0), "order must be a whole number and at least 1, got 0"),
    (lambda: exp_multistep(2, "D"), "predicts must be \"x0\" or \"eps\", got 'D'"),
    (lambda: deis(-1), "order must be a whole number and at least 1, got -1"),
    (lambda: dpm_multistep(4), "order must be 1, 2 or 3, got 4"),
    (lambda: dpm_multistep(2, "v"), "predicts must be"),
    (lambda: dpm_solver(0), "order must be 1, 2 or 3, got 0"),
    (lambda: dpm_solver(2, "score"), "predicts must be"),
    (lambda: dpm_solver(2, r1=0.), "r1 must be above 0 and at most 1, got 0"),
    (lambda: dpm_solver(2, r1=1.1), "r1 must be above 0 and at most 1, got 1.1"),
    (lambda: dpm_solver(3, r2=-0.5), "r2 must be above 0 and at most 1, got -0.5"),
    (lambda: dpm_solver(3, r2=math.nan), "r2 must be"),
    (lambda: unipc(4), "order must be 1, 2 or 3, got 4"),
    (lambda: unipc(3, "bh3"), "B must be \"bh1\" or \"bh2\", got 'bh3'"),
    (lambda: unipc(3, predicts="F"), "predicts must be"),
    (lambda: adaptive(1), "order must be 2 or 3, got 1"),
    (lambda: adaptive(rtol=0.), "rtol must be positive and finite, got 0"),
    (lambda: adaptive(atol=-1.), "atol must be positive and finite, got -1"),
    (lambda: adaptive(rtol=math.nan), "rtol must be positive"),
    (lambda: adaptive(h_init=math.inf), "h_init must be positive and finite, got inf"),
    (lambda: adaptive(dcoeff=math.nan), "dcoeff must be finite"),
    (lambda: adaptive(accept_safety=3.), "accept_safety must be above 0 and below 1, got 3"),
])
def test_bad_options_are_refused_when_the_step_is_made(make, message):
    with pytest.raises(ValueError, match=message): make()
