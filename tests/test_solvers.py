"The sampling loop and its steps: against golden numbers, closed forms and misuse."
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_edm import solvers
from ddpm_edm.core import CountNFE, seeded_noise
from ddpm_edm.langevin import geometric_sigmas
from ddpm_edm.noise import karras_sigmas, vp_sigmas
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.solvers import _Evaluate, euler, generate, heun, sample, second_order

GOLDEN = Path(__file__).parent / "golden"


def arrays(name): return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / name).items() if v.dtype.kind == "f"}


@pytest.fixture(scope="module")
def mixtures(): return arrays("mixtures.npz")


@pytest.fixture(scope="module")
def golden(): return arrays("edm_sampler.npz")


def mixture(m, space): return Mixture(m[f"{space}.means"], m[f"{space}.stds"], m[f"{space}.weights"])


def rms(a): return a.square().mean().sqrt().item()


class Recorder:
    "A denoiser that keeps what it was called with."
    def __init__(self, denoise): self.denoise, self.x, self.sigma = denoise, [], []
    def __call__(self, x, sigma):
        self.x.append(x)
        self.sigma.append(sigma)
        return self.denoise(x, sigma)


@pytest.fixture
def p(): return Gaussian(torch.tensor([0.3, -0.2], dtype=torch.float64), std=0.5)


@pytest.fixture
def noise(): return seeded_noise(range(5), (2,), dtype=torch.float64)


# --- golden numbers

@pytest.mark.parametrize("n", [5, 18, 40])
@pytest.mark.parametrize("space", ["g2", "img"])
def test_heun_matches_reference(mixtures, golden, space, n):
    denoise, key = Recorder(mixture(mixtures, space)), f"{space}.det.n{n}"
    x = sample(denoise, golden[f"{space}.latents"], karras_sigmas(n))
    # float64 on both sides; a different order of the same operations leaves about 1e-13, 1e-9 allows for amplification
    assert (x - golden[f"{key}.x"]).abs().max() <= 1e-9 * golden[f"{key}.x"].abs().max()
    levels = torch.tensor(denoise.sigma, dtype=torch.float64)
    torch.testing.assert_close(levels, golden[f"{key}.call_sigma"], rtol=1e-12, atol=0)    # rounding of the powers in eq. 5
    if space == "g2":
        want = golden[f"{key}.call_x"]
        torch.testing.assert_close(torch.stack(denoise.x), want, rtol=0, atol=1e-9 * want.abs().max().item())


def test_heun_approaches_ode_solution(mixtures):
    denoise, z, want = mixture(mixtures, "g2"), mixtures["g2.latents"], mixtures["g2.ode_ref.x0_from_sigma80"]
    errors = [rms(sample(denoise, z, karras_sigmas(n)) - want) for n in (64, 128, 256, 512)]
    assert all(b < a / 3 for a, b in zip(errors, errors[1:]))      # order 2 divides by 4; 3 leaves room for higher terms
    fine = sample(denoise, z, karras_sigmas(2048, sigma_min=1e-5))
    assert rms(fine - want) < errors[0] / 200                       # 32 times the steps: 1/1024 by theory


def test_order_of_accuracy(mixtures):
    denoise, z = mixture(mixtures, "g2"), mixtures["g2.latents"]
    want = mixtures["g2.ode_ref.x_at_sigma0.002_from_sigma80"]
    for step, order in ((euler, 1), (heun, 2)):
        errors = [rms(sample(denoise, z, karras_sigmas(n + 1)[:-1], step) - want) for n in (256, 512)]
        assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15    # the next term of the error is a few per cent


# --- closed forms

@pytest.mark.parametrize("n", [5, 18, 40])
@pytest.mark.parametrize("name, make", [
    ("karras7", lambda n: karras_sigmas(n, 0.01, 80.)), ("karras3", lambda n: karras_sigmas(n, 0.01, 80., 3.)),
    ("exponential", lambda n: geometric_sigmas(n, 0.01, 80.)), ("vp", vp_sigmas)])
def test_schedules_match_k_diffusion(name, make, n):
    torch.testing.assert_close(make(n), arrays("kdiff_sigmas.npz")[f"{name}.n{n}"], rtol=1e-12, atol=1e-12)    # float64 on both sides


@pytest.mark.parametrize("alpha", [0.3, 0.5, 2 / 3, 1.])
def test_second_order_family(mixtures, alpha):
    data, noise = mixture(mixtures, "g2"), mixtures["g2.latents"]
    def run(step, n): return sample(data, noise, torch.linspace(2, 0.25, n + 1), step)
    truth, step = run(heun, 4000), second_order(alpha)
    errors = [rms(run(step, n) - truth) for n in (64, 128)]
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.15    # higher terms of the error at these n
    assert alpha < 1 or (run(step, 20) - run(heun, 20)).abs().max() < 1e-12    # rounding: the same rule in another order


def test_second_order_looks_where_it_says(p, noise):
    denoise = Recorder(p)
    second_order(0.4)(denoise, noise, 2., 1.)
    assert denoise.sigma == pytest.approx([2., 1.6], abs=1e-15)


@pytest.mark.parametrize("alpha", [0., -1., 1.1, math.nan])
def test_second_order_refuses(alpha):
    with pytest.raises(ValueError, match="alpha must be above 0 and at most 1, got"): second_order(alpha)


def test_gaussian_closed_form(p, noise):
    want = p.mean + p.std / (p.std**2 + 80**2).sqrt() * (80 * noise - p.mean)
    # 1000 steps of order 2 leave about 1e-5, the last Euler step 1e-8
    torch.testing.assert_close(sample(p, noise, karras_sigmas(1000, sigma_min=1e-4)), want, rtol=0, atol=5e-5)


@pytest.mark.parametrize("step", [euler, heun])
def test_one_step_looks_once_and_lands_on_D(p, noise, step):
    count = CountNFE(p)
    x = sample(count, noise, karras_sigmas(1), step)
    torch.testing.assert_close(x, p(80 * noise, 80.), rtol=0, atol=1e-12)    # rounding of numbers near 80
    assert count.nfe == 1


@pytest.mark.parametrize("step, nfe", [(euler, 18), (heun, 35)])
def test_number_of_evaluations(p, noise, step, nfe):
    count = CountNFE(p)
    sample(count, noise, karras_sigmas(18), step)
    assert count.nfe == nfe


def test_euler_is_ddim(p, noise):
    def ddim(denoise, x, sigma, sigma_next, carry):
        a, a_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
        D = denoise(x, sigma)
        n_hat = (a**0.5 * x - a**0.5 * D) / (1 - a)**0.5
        return (a_next**0.5 * D + (1 - a_next)**0.5 * n_hat) / a_next**0.5, carry
    # the same update in other coordinates: rounding of numbers up to 80 over 18 steps
    x, want = (sample(p, noise, karras_sigmas(18), step) for step in (ddim, euler))
    torch.testing.assert_close(x, want, rtol=0, atol=1e-11)


# --- the loop

def test_callback_gets_state_level_first_D_and_number(p, noise):
    seen, sigmas = [], karras_sigmas(6)
    x = sample(p, noise, sigmas, callback=lambda x, sigma, D, i: seen.append((x, sigma, D, i)))
    assert [s[3] for s in seen] == list(range(6))
    assert [s[1] for s in seen] == sigmas[:-1].tolist()
    assert torch.equal(seen[0][0], 80 * noise)
    for x_i, sigma, D, _ in seen: assert torch.equal(D, p(x_i, sigma))    # the first evaluation, not Heun's second
    for (x_i, sigma, _, i), after in zip(seen, [*[s[0] for s in seen[1:]], x]):
        assert torch.equal(heun(p, x_i, sigma, sigmas[i + 1].item())[0], after)


def test_callback_that_raises_stops_the_run(p, noise):
    def stop(x, sigma, D, i):
        if i == 2: raise KeyboardInterrupt("enough")
    count = CountNFE(p)
    with pytest.raises(KeyboardInterrupt, match="enough"): sample(count, noise, karras_sigmas(9), euler, callback=stop)
    assert count.nfe == 3


def test_carry_is_handed_from_step_to_step(p, noise):
    got = []
    def step(denoise, x, sigma, sigma_next, carry):
        got.append(carry)
        return euler(denoise, x, sigma, sigma_next)[0], sigma
    sample(p, noise, [3., 2., 1., 0.], step)
    assert got == [None, 3., 2.]


def test_conditioning_reaches_every_evaluation(noise):
    got = []
    def denoise(x, sigma, labels=None, scale=None):
        got.append((labels, scale))
        return x / (1 + sigma**2)
    labels = torch.arange(5)
    sample(denoise, noise, karras_sigmas(3), labels=labels, scale=2)
    assert len(got) == 5 and all(l is labels and s == 2 for l, s in got)


def test_levels_reach_the_denoiser_as_floats(p, noise):
    record = Recorder(p)
    sample(record, noise.float(), karras_sigmas(3))
    assert all(type(s) is float for s in record.sigma)     # tensors on a GPU would make the host wait at each step
    assert all(x.dtype == torch.float64 for x in record.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_has_the_dtype_asked_for(p, noise, dtype):
    for answer in (torch.bfloat16, torch.float32, torch.float64):    # whatever the network computes in
        def network(x, sigma, answer=answer): return p(x, sigma).to(answer)
        assert sample(network, noise, karras_sigmas(3), dtype=dtype).dtype == dtype


def test_noise_is_not_changed_and_no_graph_is_kept(p, noise):
    before = noise.clone()
    x = sample(p, noise.requires_grad_(), karras_sigmas(3))
    assert torch.equal(noise, before) and not x.requires_grad


def test_progress_changes_nothing_but_the_screen(p, noise, capsys):
    quiet = sample(p, noise, karras_sigmas(3))
    assert capsys.readouterr().err == ""
    assert torch.equal(sample(p, noise, karras_sigmas(3), progress=True), quiet)
    assert "0/3" in capsys.readouterr().err    # steps this fast end before the bar's first refresh


def test_sigmas_may_be_a_list_and_end_above_zero(p, noise):
    want = heun(p, 2 * noise, 2., 1.)[0]
    assert torch.equal(sample(p, noise, [2., 1.]), want)
    assert torch.equal(sample(p, noise, torch.tensor([2, 1])), want)


# --- misuse

@pytest.mark.parametrize("sigmas, message", [
    ([0., 1., 2.], "decrease"),
    ([2., 1., 1., 0.], "got 1 at index 2 after 1"),
    ([2., 1., 0., 0.], "got 0 at index 3 after 0"),
    ([2., 1., -1.], "at 0 or above"),
    ([math.nan, 1., 0.], "finite"),
    ([2., math.nan, 0.], "finite"),
    ([2., 1., math.nan], "finite"),
    ([math.inf, 1., 0.], "finite"),
    ([1.], r"at least 2 values in one axis, got shape \(1,\)"),
    ([], r"got shape \(0,\)"),
    (3., r"got shape \(\)"),
    ([[2., 1., 0.]], r"got shape \(1, 3\)"),
])
def test_bad_sigmas(p, noise, sigmas, message):
    count = CountNFE(p)
    with pytest.raises(ValueError, match=message): sample(count, noise, sigmas)
    assert count.nfe == 0                                                              # refused before any work


def test_bad_noise(p, noise):
    with pytest.raises(ValueError, match="noise must be a finite floating-point tensor.*int64"): sample(p, noise.long(), karras_sigmas(3))
    for bad in (math.nan, math.inf):
        spoilt = noise.clone()
        spoilt[1, 0] = bad
        with pytest.raises(ValueError, match="noise .*finite.* 1 values"): sample(p, spoilt, karras_sigmas(3))


@pytest.mark.parametrize("wrong", [lambda x: x[:1], lambda x: x[0], lambda x: x[..., None], lambda x: x.sum()])
def test_denoiser_of_wrong_shape(noise, wrong):
    with pytest.raises(ValueError, match=r"denoise's answer in step 0 \(sigma = 80\) must have shape \(5, 2\), got shape"):
        sample(lambda x, sigma: wrong(x), noise, karras_sigmas(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_denoiser_that_is_not_finite(p, noise, bad):
    def breaks_down(x, sigma):
        D = p(x, sigma)
        if sigma < 1: D[3, 1] = bad
        return D
    sigmas = [4., 2., 0.5, 0.]
    count = CountNFE(breaks_down)
    with pytest.raises(ValueError, match=r"denoise's answer in step 1 \(sigma = 0.5\) must be finite"): sample(count, noise, sigmas)
    assert count.nfe == 4                                  # on the CPU nothing follows the bad answer
    with pytest.raises(ValueError, match=r"step 2 \(sigma = 0.5\) must be finite"): sample(breaks_down, noise, sigmas, euler)


def test_denoiser_that_is_not_finite_is_found_at_the_end_where_looking_is_costly(p, noise):
    evaluate = _Evaluate(p, {})
    for evaluate.i, total in enumerate((1., math.nan, math.inf)): evaluate.sums.append((torch.tensor(total), evaluate.i, 9. - evaluate.i))
    with pytest.raises(ValueError, match=r"step 1 \(sigma = 8\) must be finite"): evaluate.check()


def test_answers_are_looked_at_in_every_evaluation_and_at_the_end(p, noise, monkeypatch):
    looks, check = [], _Evaluate.check
    def watched(self):
        looks.append(len(self.sums))
        check(self)
    monkeypatch.setattr(_Evaluate, "check", watched)
    sample(p, noise, karras_sigmas(3), euler)
    assert looks == [1, 1, 1, 0]                           # each answer once; the last look is the only one on a GPU


def test_churn_moves_what_the_step_begins_with(p, noise):
    seen, sigmas = [], [4., 2., 1., 0.]
    def churn(x, sigma, i):
        assert i == len(seen)
        return x + i, sigma * 1.5
    x = sample(p, noise, sigmas, euler, churn=churn, callback=lambda x, sigma, D, i: seen.append((x, sigma, D)))
    want = 4 * noise
    for i, sigma_next in enumerate(sigmas[1:]):
        assert torch.equal(seen[i][0], want + i) and seen[i][1] == sigmas[i] * 1.5
        assert torch.equal(seen[i][2], p(want + i, sigmas[i] * 1.5))
        want = euler(p, want + i, sigmas[i] * 1.5, sigma_next)[0]
    assert torch.equal(x, want)


def test_churn_drops_what_the_step_remembered(p, noise):
    carries = []
    def step(denoise, x, sigma, sigma_next, carry=None):
        carries.append(carry)
        return x, sigma_next
    def churn(x, sigma, i): return x, sigma * (1.1 if i == 2 else 1)
    sample(p, noise, [8., 4., 2., 1., 0.], step, churn=churn)
    assert carries == [None, 4., None, 1.]


def test_step_that_forgets_carry(p, noise):
    def forgetful(*args): return euler(*args)[0]
    # with a batch of two Python would unpack the batch into (x, carry) and go on
    with pytest.raises(ValueError, match=r"step must return \(x, carry\)"):
        sample(p, noise[:2], karras_sigmas(3), forgetful)


# --- generate

def test_sample_does_not_depend_on_its_batch(mixtures):
    denoise = mixture(mixtures, "g2")
    whole = generate(denoise, range(10), (2,), karras_sigmas(8))
    assert whole.dtype == torch.float32 and whole.shape == (10, 2)
    for batch in (1, 3, 10, 99):
        # matrix products of another size may round differently in float64: the last place of float32 at most
        parts = generate(denoise, range(10), (2,), karras_sigmas(8), batch=batch)
        torch.testing.assert_close(parts, whole, rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(generate(denoise, [7, 3], (2,), karras_sigmas(8)), whole[[7, 3]], rtol=2e-7, atol=1e-7)


def test_generate_is_exact_for_a_denoiser_that_treats_samples_alike(p):
    whole = generate(p, range(10), (2,), karras_sigmas(8))
    assert torch.equal(generate(p, range(10), (2,), karras_sigmas(8), batch=3), whole)    # elementwise: no rounding differs
    assert torch.equal(whole, sample(p, seeded_noise(range(10), (2,)), karras_sigmas(8)).float())
    assert torch.equal(generate(p, (s for s in range(10)), (2,), karras_sigmas(8)), whole)


def test_generate_uses_its_step_and_splits_labels_like_seeds():
    got = []
    def denoise(x, sigma, labels):
        got.append(labels.tolist())
        return labels[:, None].to(x).expand_as(x)
    x = generate(denoise, range(5), (2,), karras_sigmas(2), euler, labels=torch.arange(5), batch=2)
    assert got == [[0, 1], [0, 1], [2, 3], [2, 3], [4], [4]]
    torch.testing.assert_close(x, torch.arange(5.)[:, None].expand(5, 2), rtol=0, atol=1e-5)   # lands on D = label


def test_generate_begins_from_a_clean_sample(p):
    x0, sigmas = torch.tensor([0.5, -1.]), karras_sigmas(6, sigma_max=0.7)
    want = sample(p, (x0 + 0.7 * seeded_noise(range(5), (2,))) / 0.7, sigmas).float()
    for batch in (2, 256):
        torch.testing.assert_close(generate(p, range(5), (2,), sigmas, x0=x0, batch=batch), want, rtol=0, atol=1e-6)    # float32 start, of size 3 / 0.7
    assert not torch.allclose(generate(p, range(5), (2,), sigmas), want)
    with pytest.raises(ValueError, match=r"x0 must be one sample of shape \(2,\), got shape \(5, 2\)"):
        generate(p, range(5), (2,), sigmas, x0=torch.zeros(5, 2))


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), ()])
def test_generate_refuses_labels_of_wrong_length(p, shape):
    labels = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must be \(4,\)"):
        generate(p, range(4), (2,), karras_sigmas(3), labels=labels)


def test_generate_refuses_empty_seeds_and_batches(p):
    for seeds in ([], range(0), iter(())):
        with pytest.raises(ValueError, match="seeds"): generate(p, seeds, (2,), karras_sigmas(3))
    for batch in (0, -1):
        with pytest.raises(ValueError, match="batch must be at least 1"):
            generate(p, range(4), (2,), karras_sigmas(3), batch=batch)


# --- every step of the module

STEPS = {"euler": euler, "heun": heun, "midpoint": second_order(1 / 2), "adams_bashforth": solvers.adams_bashforth(4),
         "exp_multistep": solvers.exp_multistep(3), "deis": solvers.deis(3), "dpm_multistep": solvers.dpm_multistep(3, "eps"),
         "dpmpp_2m": solvers.dpmpp_2m, "dpmpp_3m": solvers.dpmpp_3m, "dpm_solver_2": solvers.dpm_solver_2,
         "dpm_solver_3": solvers.dpm_solver_3, "dpmpp_2s": solvers.dpmpp_2s, "unipc": solvers.unipc(3),
         **{name: getattr(solvers, name)() for name in ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")}}


@pytest.mark.parametrize("name", STEPS)
def test_steps_never_look_at_values(name):
    "Looking makes a processor wait for its GPU. Tensors of the device `meta` have no values: `.item()`, `if x > 0` and the like raise."
    x, carry, levels = torch.empty(2, 3, device="meta", dtype=torch.float64), None, [8., 5., 3., 2., 1., 0.5, 0.]
    for sigma, sigma_next in zip(levels, levels[1:]): x, carry = STEPS[name](lambda x, sigma: x / (1 + sigma**2), x, sigma, sigma_next, carry)
    assert x.shape == (2, 3)
