"DDPM: chain, bound, losses and samplers against golden numbers of two other implementations, closed forms and each other."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ddpm_edm.ddpm as module
from ddpm_edm.core import NoiseStream, seeded_noise
from ddpm_edm.ddpm import DDPM, ImportanceSteps, discretized_gaussian_log_likelihood, normal_kl, spaced_timesteps
from ddpm_edm.noise import cosine_betas, linear_betas, scaled_linear_betas, zero_terminal_snr
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.solvers import euler, heun, sample
from ddpm_edm.unet import UNet

FOLDER = Path(__file__).parent / "golden"
GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "ddpm.npz").items()}
MIX = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "mixtures.npz").items() if v.dtype == np.float64}
BETAS = {"linear": linear_betas(), "cosine": cosine_betas(), "squaredcos_cap_v2": cosine_betas()}
WORDS = {"EPSILON": "eps", "START_X": "D", "PREVIOUS_X": "mean"}    # theirs, and ours
KINDS = {"FIXED_SMALL": "small", "FIXED_LARGE": "large", "LEARNED": "learned", "LEARNED_RANGE": "learned_range"}
T, X0, NOISE, STEP = (GOLDEN[f"in.{k}"] for k in ("t", "x0", "noise", "step_noise"))
close = torch.testing.assert_close
cases = settings(max_examples=25, deadline=None, derandomize=True)
def f64(*values): return torch.tensor(values, dtype=torch.float64)
def seeded(seed): return torch.Generator().manual_seed(seed)
def part(v): return v[:, ::2, ::3, ::3]    # of image tensors the golden file keeps every second channel and third pixel
def same(ours, golden): close(ours, golden, rtol=1e-9, atol=1e-9)    # float64 in another order of operations; most agree to 1e-13


def mixture(space): return Mixture(MIX[f"{space}.means"], MIX[f"{space}.stds"], MIX[f"{space}.weights"])


class Recorded:
    "Noise as it was drawn when the golden numbers were made."
    def __init__(self, noise): self.noise = iter(noise)
    def __call__(self, x): return next(self.noise)


def reference_likelihood(x, mean, log_std, levels=256):
    "OpenAI's: the normal CDF by tanh, and probabilities of at least 1e-12."
    cdf = lambda z: (1 + ((2 / math.pi)**0.5 * (z + 0.044715 * z**3)).tanh()) / 2
    high, low = cdf((x - mean + 1 / 255) * (-log_std).exp()), cdf((x - mean - 1 / 255) * (-log_std).exp())
    p = torch.where(x < -0.999, high, torch.where(x > 0.999, 1 - low, high - low))
    return p.clamp(min=1e-12).log()


@pytest.fixture
def as_openai(monkeypatch): monkeypatch.setattr(module, "discretized_gaussian_log_likelihood", reference_likelihood)


def recipe(schedule, kind, word):
    "A chain, x_t, and a network that says what it said when the golden numbers were made."
    chain = DDPM(BETAS[schedule], predicts=WORDS[word], variance=KINDS[kind])
    x_t, eps, v = chain.q_sample(X0, T, NOISE), GOLDEN["in.model_eps"], GOLDEN["in.model_v"]
    said = {"EPSILON": eps, "START_X": X0 + 0.1 * eps, "PREVIOUS_X": x_t - 0.02 * eps}[word]
    log_var = v if kind == "LEARNED_RANGE" else chain.betas.log()[T][:, None, None, None] + 0.1 * v
    out = torch.cat([said, log_var], 1) if kind.startswith("LEARNED") else said
    def net(x, t):
        assert torch.equal(t, T) and torch.equal(x, x_t)
        return out
    return chain, x_t, net


# ---- golden: OpenAI's guided-diffusion ----

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_golden_tables(schedule):
    chain, rows = DDPM(BETAS[schedule]), GOLDEN["rows"]
    for name, table in (("betas", chain.betas), ("alphas_cumprod", chain.alpha_bars), ("posterior_variance", chain.posterior_variance),
                        ("posterior_mean_coef1", chain.posterior_x0), ("posterior_mean_coef2", chain.posterior_xt)):
        assert table.dtype == torch.float64
        close(table[rows], GOLDEN[f"{schedule}.{name}"], rtol=1e-9, atol=1e-15)
    close(chain._small[rows], GOLDEN[f"{schedule}.posterior_log_variance_clipped"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_golden_forward(schedule):
    chain = DDPM(BETAS[schedule])
    x_t = chain.q_sample(X0, T, NOISE)
    same(part(x_t), GOLDEN[f"{schedule}.q_sample"])
    mean, var = chain.q_posterior(X0, x_t, T)
    same(part(mean), GOLDEN[f"{schedule}.q_posterior.mean"])
    close(var.flatten(), GOLDEN[f"{schedule}.q_posterior.var"], rtol=1e-9, atol=1e-15)
    close(chain.prior_bpd(X0), GOLDEN[f"{schedule}.prior_bpd"], rtol=1e-6, atol=1e-15)    # the cosine's are differences of 1e-9 from 1
    close(part(chain.q_sample(X0, T, 0 * NOISE)), GOLDEN[f"{schedule}.q_mean"], rtol=1e-9, atol=0)
    close(chain.noise[T]**2, GOLDEN[f"{schedule}.q_var"], rtol=1e-9, atol=0)


RECIPES = sorted({tuple(k.split(".")[:3]) for k in GOLDEN if ".clip0." in k})
@pytest.mark.parametrize("schedule, kind, word", RECIPES)
def test_golden_reverse(schedule, kind, word, as_openai):
    chain, x_t, net = recipe(schedule, kind, word)
    compared = 0
    for clip in (0, 1):
        name = f"{schedule}.{kind}.{word}.clip{clip}"
        if f"{name}.mean" not in GOLDEN: continue
        p = chain.p_mean_variance(net, x_t, T, clip=bool(clip))
        same(part(p.mean), GOLDEN[f"{name}.mean"])
        if f"{name}.pred_xstart" in GOLDEN: same(part(p.D), GOLDEN[f"{name}.pred_xstart"])
        same(part(p.log_var) if p.log_var.shape == X0.shape else p.log_var.flatten(), GOLDEN[f"{name}.log_variance"])
        same(chain.vb_terms_bpd(net, X0, x_t, T, clip=bool(clip)), GOLDEN[f"{name}.vb_terms_bpd"])
        compared += 1
    same(part(chain.ancestral_step(net, x_t, T, STEP)[0]), GOLDEN[f"{schedule}.{kind}.{word}.p_sample"])
    assert compared == 1 + (word == "EPSILON" and kind != "LEARNED")


def test_golden_covers_all_words_and_variances():
    assert {(k, w) for _, k, w in RECIPES} >= {(k, "EPSILON") for k in KINDS} | {(k, w) for k in ("FIXED_SMALL", "LEARNED_RANGE") for w in WORDS}
    assert T.tolist() == [0, 0, 1, 10, 250, 500, 900, 999]


@pytest.mark.parametrize("schedule, kind, word", RECIPES)
def test_golden_losses(schedule, kind, word, as_openai):
    chain, x_t, net = recipe(schedule, kind, word)
    compared = 0
    for name, golden in GOLDEN.items():
        if not name.startswith(f"{schedule}.{kind}.{word}.training_losses"): continue
        how, what = name.split(".")[4:]
        if what == "mse": ours = chain.loss(net, X0, t=T, noise=NOISE)
        elif what == "vb": ours = chain.loss(net, X0, t=T, noise=NOISE, kind="vlb") / 1000
        elif how == "RESCALED_KL": ours = chain.loss(net, X0, t=T, noise=NOISE, kind="vlb")
        elif how == "RESCALED_MSE": ours = chain.loss(net, X0, t=T, noise=NOISE, kind="hybrid" if chain.learns else "simple")
        elif how == "MSE": ours = chain.loss(net, X0, t=T, noise=NOISE) + (chain.vb_terms_bpd(net, X0, x_t, T) if chain.learns else 0)
        same(ours, golden)
        compared += 1
    assert compared >= 1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_golden_ddim_steps(schedule):
    chain, x_t, net = recipe(schedule, "FIXED_SMALL", "EPSILON")
    name = f"{schedule}.FIXED_SMALL.EPSILON"
    for eta in ("0", "0.5", "1"):
        same(part(chain.ddim_step(net, x_t, T, STEP, eta=float(eta))[0]), GOLDEN[f"{name}.ddim_sample.eta{eta}"])
    same(part(chain.ddim_reverse_step(net, x_t, T)[0]), GOLDEN[f"{name}.ddim_reverse_sample"])


def test_golden_likelihood_and_divergence():
    x, mean, log_std = (GOLDEN[f"disc_ll.{k}"] for k in ("x", "means", "log_scales"))
    same(normal_kl(mean, log_std, x, 2 * log_std), GOLDEN["normal_kl.out"])
    same(reference_likelihood(x, mean, log_std), GOLDEN["disc_ll.out"])    # so the fixture above is theirs indeed
    ours, size = discretized_gaussian_log_likelihood(x, mean, log_std), GOLDEN["disc_ll.out"].exp()
    assert ((ours.exp() - size).abs() < 4e-4).all()    # their CDF is off by up to 1.8e-4, and two are subtracted
    assert (ours.exp() - size).abs().max() > 1e-6


@pytest.mark.parametrize("name, make", [("25", lambda: spaced_timesteps(1000, 25)), ("ddim25", lambda: spaced_timesteps(1000, 25, "leading")),
                                        ("10,10,20", lambda: spaced_timesteps(1000, [10, 10, 20]))])
def test_golden_respacing(name, make):
    steps = make()
    assert torch.equal(steps, GOLDEN[f"space_timesteps.{name}"])
    for schedule in ("linear", "cosine"):
        chain = DDPM(BETAS[schedule]).respace(steps)
        close(chain.betas, GOLDEN[f"respaced.{name}.{schedule}.betas"], rtol=1e-9, atol=1e-14)
        close(chain.alpha_bars, GOLDEN[f"respaced.{name}.{schedule}.alphas_cumprod"], rtol=1e-9, atol=1e-15)
        assert torch.equal(chain.timesteps, steps)


def test_golden_whole_loops(as_openai):
    "Thirty steps on images with an exact network: sampling, DDIM and the whole bound."
    net, z = DDPM(linear_betas()).network(mixture("img")), GOLDEN["chain.z"]
    steps = spaced_timesteps(1000, 30)
    assert torch.equal(steps, GOLDEN["chain.timesteps"])
    small, large = (DDPM(linear_betas(), variance=v).respace(steps) for v in ("small", "large"))
    same(small.ancestral(net, z, draw=Recorded(GOLDEN["chain.FIXED_SMALL.p_sample_loop.noise"])), GOLDEN["chain.FIXED_SMALL.p_sample_loop.x"])
    same(small.ddim(net, z), GOLDEN["chain.ddim_loop.eta0.x"])
    bits, name = large.bpd(net, GOLDEN["chain.FIXED_LARGE.bpd.x0"], draw=Recorded(GOLDEN["chain.FIXED_LARGE.bpd.noise"])), "chain.FIXED_LARGE.bpd"
    same(bits.terms.flip(1), GOLDEN[f"{name}.vb"])
    same(bits.total, GOLDEN[f"{name}.total_bpd"])
    close(bits.prior, GOLDEN[f"{name}.prior_bpd"], rtol=1e-9, atol=0)


# ---- golden: diffusers, k-diffusion ----

LOOPS = [k[:-2] for k in GOLDEN if k.startswith(("ddpm.", "ddim.")) and k.endswith(".x")]
@pytest.mark.parametrize("name", LOOPS)
def test_golden_diffusers(name):
    """Whole loops of another library, where its steps chain: DDPM always, DDIM with leading and trailing steps that divide T.
    Its clipped DDIM keeps the noise estimate of before clipping, so that one differs."""
    sampler, schedule, *how = name.split(".")
    whole = DDPM(BETAS[schedule], variance="large" if "fixed_large" in how else "small")
    chain, noise, clip = whole.respace(GOLDEN[f"{name}.timesteps"].flip(0)), GOLDEN.get(f"{name}.noise"), "clip" in how
    net, draw = whole.network(mixture("g2")), None if noise is None else Recorded(noise)
    if sampler == "ddpm": x = chain.ancestral(net, GOLDEN["latents"], draw=draw, clip=clip)
    else: x = chain.ddim(net, GOLDEN["latents"], eta=1. if "eta1" in how else 0., draw=draw, clip=clip)
    close(x, GOLDEN[f"{name}.x"], rtol=0, atol=1e-9)    # the trailing ones add noise of variance 1e-20 at the last step


def test_golden_diffusers_covers():
    for word in ("ddpm.linear.fixed_small", "ddpm.linear.fixed_large", "ddpm.squaredcos", "clip", "ddim.linear.leading.eta0", "ddim.linear.leading.eta1", "trailing", "n50"):
        assert any(word in name for name in LOOPS), word


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [10, 20, 50])
def test_golden_spacing(spacing, n):
    assert torch.equal(spaced_timesteps(1000, n, spacing).flip(0), GOLDEN[f"timesteps.ddim.{spacing}.n{n}"])


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_golden_sigma_to_t(schedule):
    chain, sigma = DDPM(BETAS[schedule]), GOLDEN[f"kdiff.{schedule}.sigma"]
    close(chain.sigma_to_t(sigma), GOLDEN[f"kdiff.{schedule}.sigma_to_t"], rtol=1e-9, atol=1e-9)
    close(chain.sigma_to_t(chain.sigmas), torch.arange(1000.).double(), rtol=0, atol=1e-8)
    assert chain.sigma_to_t(1e9) == 999 and chain.sigma_to_t(1e-9) == 0    # held at the ends


# ---- the chain ----

tables = st.one_of(
    st.integers(2, 60).map(linear_betas), st.integers(2, 60).map(cosine_betas), st.integers(2, 60).map(scaled_linear_betas),
    st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=12).map(lambda b: torch.tensor(b, dtype=torch.float64)))


@cases
@given(tables)
def test_chain_is_the_composition_of_its_steps(betas):
    chain, mean, var = DDPM(betas), 1., 0.
    for t, beta in enumerate(betas.tolist()):
        before = mean, var
        mean, var = (1 - beta)**0.5 * mean, (1 - beta) * var + beta
        close(torch.stack([chain.signal[t], chain.noise[t]**2]), f64(mean, var), rtol=1e-12, atol=1e-14)
        close(torch.stack([chain.signal_before[t], chain.noise_before[t]**2]), f64(*before), rtol=1e-12, atol=1e-12)


@cases
@given(tables, st.data())
def test_posterior_is_bayes_rule(betas, data):
    "log q(x_t | y) + log q(y | x0) - log q(x_t | x0) must be the posterior's log density at every y."
    chain = DDPM(betas)
    if chain.T < 2: return
    t = data.draw(st.integers(1, chain.T - 1))
    x0, x_t, y = torch.randn(3, 20, generator=seeded(t), dtype=torch.float64)
    y = y * chain.noise_before[t] + chain.signal_before[t] * x0    # where it is likely
    x_t = x_t * chain.betas[t].sqrt() + (1 - chain.betas[t]).sqrt() * y
    log = lambda x, mean, var: -(x - mean)**2 / (2 * var) - torch.as_tensor(2 * math.pi * var).log() / 2
    bayes = (log(x_t, (1 - betas[t]).sqrt() * y, betas[t]) + log(y, chain.signal_before[t] * x0, chain.noise_before[t]**2)
             - log(x_t, chain.signal[t] * x0, chain.noise[t]**2))
    close(log(y, *chain.q_posterior(x0, x_t, t)), bayes, rtol=1e-6, atol=1e-6)    # 1 - alpha_bar loses digits in short tables


@cases
@given(tables, st.data())
def test_respaced_chain_is_the_same_process(betas, data):
    chain = DDPM(betas)
    rows = sorted(data.draw(st.sets(st.integers(0, chain.T - 1), min_size=1)))
    fewer = chain.respace(rows)
    close(fewer.sigmas, chain.sigmas[rows], rtol=1e-9, atol=0)
    assert fewer.timesteps.tolist() == rows and fewer.T == len(rows) and chain.T == len(betas)    # the old one is left alone
    again = fewer.respace(range(len(rows))) if len(rows) > 1 else fewer
    assert again.timesteps.tolist() == rows
    last = fewer.respace([len(rows) - 1])    # step numbers survive a second respacing
    assert last.timesteps.tolist() == rows[-1:]
    # variances follow the new steps, not the old ones
    close(fewer._large[1:], fewer.betas[1:].log(), rtol=0, atol=0)


def test_every_row_may_have_its_own_step():
    chain, x, n = DDPM(linear_betas(20)), seeded_noise(range(20), (2, 3), torch.float64), seeded_noise(range(20, 40), (2, 3), torch.float64)
    net = chain.network(Gaussian(torch.zeros(2, 3, dtype=torch.float64), 0.5))
    t = torch.arange(20)
    for f in (lambda x, t, n: chain.q_sample(x, t, n), lambda x, t, n: chain.ancestral_step(net, x, t, n)[0], lambda x, t, n: chain.ddim_step(net, x, t, n, eta=0.4)[0],
              lambda x, t, n: chain.ddim_reverse_step(net, x, t)[0], lambda x, t, n: chain.loss(net, x, t=torch.as_tensor(t).expand(len(x)), noise=n),
              lambda x, t, n: chain.vb_terms_bpd(net, x, x, t)):
        together = f(x, t, n)
        for i in (0, 1, 19): close(f(x[i:i + 1], i, n[i:i + 1]), together[i:i + 1], rtol=1e-12, atol=1e-12)
    assert torch.equal(chain.q_sample(x, t.int(), n), chain.q_sample(x, t, n))


# ---- words and variances ----

@cases
@given(tables, st.sampled_from(["D", "v", "mean"]), st.booleans())
def test_all_words_are_one_step(betas, word, clip):
    p, t = mixture("g2"), torch.arange(len(betas))
    chains = [DDPM(betas, predicts=w) for w in ("eps", word)]
    x_t = chains[0].q_sample(p.sample(len(betas), seeded(0)), t, seeded_noise(t.tolist(), (2,), torch.float64))
    for one, other in zip(*(c.p_mean_variance(c.network(p), x_t, t, clip=clip) for c in chains)):
        close(one, other, rtol=1e-7, atol=1e-8)    # x / signal - sigma eps cancels up to four digits


def test_target_is_what_the_network_should_say():
    x0, n, t = X0[:4], NOISE[:4], torch.tensor([0, 3, 500, 999])
    for word in module.PREDICTS:
        chain = DDPM(linear_betas(), predicts=word)
        x_t = chain.q_sample(x0, t, n)
        truth = chain.target(x0, x_t, t, n)
        close(chain.p_mean_variance(lambda x, _: truth, x_t, t).D, x0, rtol=0, atol=1e-7)    # sigma = 157 for eps, 1e-4 divides for the mean
        assert chain.loss(lambda x, _: truth, x0, t=t, noise=n).max() == 0


def test_variances():
    betas, x = linear_betas(50), torch.zeros(50, 1, 2, dtype=torch.float64)
    t = torch.arange(50)
    def log_var(kind, said=0.):
        chain = DDPM(betas, variance=kind)
        return chain.p_mean_variance(lambda x, t: torch.cat([x, torch.full_like(x, said)], 1) if chain.learns else x, x, t).log_var.flatten(1)[:, 0]
    small, large = log_var("small"), log_var("large")
    chain = DDPM(betas)
    close(small[1:].exp(), chain.posterior_variance[1:], rtol=1e-12, atol=0)
    close(large[1:].exp(), betas[1:], rtol=1e-12, atol=0)
    assert small[0] == large[0] == small[1]    # nobody samples with it; the bound's reconstruction uses it
    close(log_var("learned_range", -1.), small, rtol=1e-12, atol=0)
    close(log_var("learned_range", 1.), betas.log(), rtol=1e-12, atol=0)
    close(log_var("learned_range", 0.), (small + betas.log()) / 2, rtol=1e-12, atol=0)
    assert (log_var("learned", -3.) == -3).all()


def test_the_extremes_are_exact():
    "Var[x_{t-1} | x_t] = posterior variance + share of x0^2 Var[x0 | x_t]: 0 for one point, 1 - alpha_bar for N(0, 1)."
    for betas in (linear_betas(), cosine_betas(), scaled_linear_betas(30)):
        chain = DDPM(betas)
        close(chain.posterior_variance + chain.posterior_x0**2 * chain.noise**2, betas, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_another_dtype(dtype):
    "The chain's samplers and losses ask a network in the dtype of its weights, and tell it whole steps."
    chain, net = DDPM(linear_betas()).respace([0, 500, 999]), UNet(1, channels=32, mults=(1,), attention=(), noise_scale=1.).to(dtype).requires_grad_(False)
    x = seeded_noise(range(2), (1, 4, 4))
    assert chain.ddim(net, x).isfinite().all() and chain.loss(net, x).isfinite().all() and chain.denoiser(net)(x, 1.).isfinite().all()


def test_zero_terminal_snr():
    "The last beta may be 1: x_T is pure noise, and networks that say D or v still work, in every method."
    betas = zero_terminal_snr(scaled_linear_betas(40))
    for word in ("D", "v", "mean"):
        chain = DDPM(betas, predicts=word)
        net = lambda x, t: chain.target(torch.full_like(x, 0.25), x, t, (x - chain.signal[t][:, None] * 0.25) / chain.noise[t][:, None])    # data: always 0.25
        x = chain.ancestral(net, seeded_noise(range(5), (2,), torch.float64))
        close(x, torch.full((5, 2), 0.25, dtype=torch.float64), rtol=0, atol=1e-12)
        close(chain.ddim(net, seeded_noise(range(5), (2,))), x, rtol=0, atol=1e-7)
        assert chain.loss(net, x, generator=seeded(0)).max() < 1e-20
        assert chain.bpd(net, x).total.isfinite().all() and (chain.prior_bpd(x) == 0).all()
    t = DDPM(betas, predicts="v").sigma_to_t(f64(1., 1e6))
    assert t[1] == 38 and 0 < t[0] < 38    # sigma is infinite at the last step, so no number belongs to it
    with pytest.raises(ValueError, match="predicts must be 'D', 'v' or 'mean'"): DDPM(betas)
    with pytest.raises(ValueError, match="no denoiser knows sigma = infinity; leave the last step out by respace"): DDPM(betas, predicts="v").network(lambda x, s: 0 * x)
    assert DDPM(betas, predicts="v").respace([0, 20]).network(lambda x, s: 0 * x)(torch.ones(2, 3), torch.tensor([0, 20])).isfinite().all()
    with pytest.raises(ValueError, match="betas"): DDPM(f64(0.1, 1., 0.1), predicts="v")
    assert DDPM(betas, predicts="v").respace([0, 20]).sigmas.isfinite().all()


# ---- the bound ----

@cases
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-3, 2), st.floats(-3, 2))
def test_normal_kl_is_torch_s(m1, m2, l1, l2):
    p, q = (torch.distributions.Normal(f64(m), f64(lv / 2).exp()) for m, lv in ((m1, l1), (m2, l2)))
    close(normal_kl(f64(m1), f64(l1), f64(m2), f64(l2)), torch.distributions.kl_divergence(p, q), rtol=1e-10, atol=1e-12)
    assert normal_kl(f64(m1), f64(l1), f64(m1), f64(l1)) == 0


@cases
@given(st.sampled_from([2, 3, 17, 256]), st.floats(-5, 5), st.floats(-9, 5))
def test_grey_levels_are_a_distribution(levels, mean, log_std):
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    log_p = discretized_gaussian_log_likelihood(x, f64(mean), f64(log_std), levels)
    assert abs(log_p.exp().sum() - 1) < 1e-9 and (log_p <= 0).all()
    edges = torch.cat([f64(-math.inf), (x[1:] + x[:-1]) / 2, f64(math.inf)])
    by_difference = torch.special.ndtr((edges - mean) / math.exp(log_std)).diff()
    close(log_p.exp(), by_difference, rtol=1e-6, atol=1e-12)    # differences of numbers near 1 keep 1e-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_likelihood_of_the_impossible_has_a_gradient(dtype):
    mean = torch.tensor([-1., -0.2, 0., 1., 3.], dtype=dtype, requires_grad=True)
    log_std = torch.full((5,), -6., dtype=dtype, requires_grad=True)
    log_p = discretized_gaussian_log_likelihood(torch.tensor([1., 1., -1., -1., 127 / 255], dtype=dtype), mean, log_std)
    grads = torch.autograd.grad(log_p.sum(), (mean, log_std))
    assert log_p.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert (log_p < -1e4).all() and (grads[0].sign() == torch.tensor([1., 1., -1., -1., -1.])).all()    # towards x
    tails = discretized_gaussian_log_likelihood(torch.tensor([-1., 1.], dtype=dtype), torch.zeros(2, dtype=dtype), torch.full((2,), -1., dtype=dtype))
    assert tails[0] == tails[1]    # both sides alike


def test_bound_is_above_the_entropy_of_known_data():
    grey, betas = torch.linspace(-1, 1, 17, dtype=torch.float64)[:, None], linear_betas()
    probability = Mixture(f64(-0.6, 0.5), f64(0.1, 0.2), f64(0.4, 0.6)).log_prob(grey[:, 0]).softmax(0)
    entropy = -(probability * probability.log2()).sum()
    exact, part = DDPM(betas).network(Mixture(grey, 0., probability)), torch.arange(16).repeat(17)[:, None]
    bound = {}
    for n, variance in ((20, "small"), (20, "large"), (400, "small"), (400, "large")):
        g = seeded(0)
        draw = lambda x: torch.special.ndtri((part + torch.rand(x.shape, generator=g, dtype=x.dtype)) / 16)    # one from each sixteenth
        chain = DDPM(betas, variance=variance).respace(spaced_timesteps(1000, n))
        bits = chain.bpd(exact, grey.repeat_interleave(16, 0), levels=17, draw=draw)
        close(bits.total, bits.prior + bits.terms.sum(1), rtol=1e-12, atol=0)
        bound[n, variance] = (probability.repeat_interleave(16) / 16 @ bits.total).item()
        assert bound[n, variance] > entropy
    assert bound[400, "large"] < bound[20, "large"] and bound[400, "small"] < bound[20, "small"] and min(bound.values()) < entropy + 1


def test_simple_loss_is_the_bound_without_its_weights():
    chain, t = DDPM(linear_betas()), torch.arange(1, 1000)
    p = mixture("g2")
    x0, n = p.sample(999, seeded(0)), seeded_noise(range(999), (2,), torch.float64)
    net = chain.network(p)
    weight = ((chain.sigmas[1:] / chain.sigmas[:-1])**2 - 1) / 2
    terms = chain.vb_terms_bpd(net, x0, chain.q_sample(x0, t, n), t)
    close(weight * chain.loss(net, x0, t=t, noise=n) / math.log(2), terms, rtol=1e-7, atol=1e-12)
    close(chain.loss(net, x0, t=t, noise=n, kind="vlb"), 1000 * terms, rtol=1e-12, atol=0)
    for word, factor in (("D", chain.sigmas[1:]**2), ("v", 1 / (1 + chain.sigmas[1:]**-2))):
        other = DDPM(linear_betas(), predicts=word)
        close(other.loss(other.network(p), x0, t=t, noise=n) , chain.loss(net, x0, t=t, noise=n) * (factor if word == "D" else 1 / (1 - chain.alpha_bars[1:]) * chain.sigmas[1:]**2), rtol=1e-6, atol=1e-12)


def test_hybrid_teaches_the_variance_alone():
    chain = DDPM(linear_betas(50), variance="learned_range")
    said = torch.full((4, 2, 8), 0.1, dtype=torch.float64, requires_grad=True)
    x0, n, t = torch.zeros(4, 1, 8, dtype=torch.float64), seeded_noise(range(4), (1, 8), torch.float64), torch.tensor([0, 1, 20, 49])
    grads = {kind: torch.autograd.grad(chain.loss(lambda x, t: said, x0, kind=kind, t=t, noise=n).sum(), said)[0] for kind in ("simple", "hybrid", "vlb")}
    assert torch.equal(grads["hybrid"][:, :1], grads["simple"][:, :1]) and (grads["simple"][:, 1:] == 0).all()
    close(grads["hybrid"][:, 1:], grads["vlb"][:, 1:] / 1000, rtol=1e-12, atol=0)
    assert (grads["vlb"][:, :1] != grads["simple"][:, :1]).any() and (grads["hybrid"][:, 1:] != 0).all()


def test_loss_draws():
    chain, p = DDPM(linear_betas(30)), mixture("g2")
    net, x0 = chain.network(p), p.sample(64, seeded(1))
    state = torch.get_rng_state()
    one, again = (chain.loss(net, x0, generator=seeded(3)) for _ in range(2))
    assert torch.equal(one, again) and torch.equal(torch.get_rng_state(), state) and one.shape == (64,)
    assert not torch.equal(one, chain.loss(net, x0, generator=seeded(4)))
    seen = []
    chain.loss(lambda x, t: seen.append(t) or x, p.sample(20_000, seeded(1)), generator=seeded(0))
    counts = seen[0].bincount(minlength=30)
    assert len(counts) == 30 and (counts - 20_000 / 30).abs().max() < 5 * (20_000 / 30)**0.5    # uniform, five standard errors


def test_float32_loses_little():
    "Tables are made in float64 and rounded last: float32 losses and steps agree with float64 ones."
    x0, n = X0, NOISE
    for word in module.PREDICTS:
        chain = DDPM(linear_betas(), predicts=word, variance="learned_range")
        said = torch.cat([chain.target(x0, chain.q_sample(x0, T, n), T, n), 0 * x0], 1) + 0.1 * torch.cat([GOLDEN["in.model_eps"] * (1e-3 if word == "mean" else 1), GOLDEN["in.model_v"]], 1)
        for kind in ("simple", "hybrid"):
            exact, rough = (chain.loss(lambda x, t: said.to(d), x0.to(d), kind=kind, t=T, noise=n.to(d)) for d in (torch.float64, torch.float32))
            assert rough.dtype == torch.float32
            close(rough.double(), exact, rtol=2e-3, atol=1e-6)    # means that differ by their variance's root 0.007 keep four digits
    x = DDPM(linear_betas()).q_sample(x0.float(), T, n.float())
    close(x.double(), DDPM(linear_betas()).q_sample(x0, T, n), rtol=1e-6, atol=3e-7)


# ---- importance ----

def test_importance_is_unbiased_and_quieter():
    size, g = torch.logspace(0, 3, 40, dtype=torch.float64), seeded(0)
    chooser = ImportanceSteps(40, history=3)
    every = torch.arange(40)
    def losses(t): return size[t] * (1 + 0.1 * torch.randn(len(t), generator=g, dtype=torch.float64))
    for _ in range(3):
        assert (chooser.probabilities() == 1 / 40).all()    # not before all have their history
        chooser.update(every, losses(every))
    p = chooser.probabilities()
    assert abs(p.sum() - 1) < 1e-12 and p.min() >= 0.001 / 40
    close(p[1:] / p[:-1], size[1:] / size[:-1], rtol=0.3, atol=0)
    t, weight = chooser.sample(20_000, g)
    estimate = weight * losses(t)
    assert abs(estimate.mean() - size.mean()) < 5 * estimate.std() / 20_000**0.5    # five standard errors
    assert estimate.std() < losses(torch.randint(40, (20_000,), generator=g)).std() / 5
    close(weight, 1 / (40 * p[t]), rtol=1e-12, atol=0)
    chooser.update(torch.tensor([5, 5, 5, 5]), torch.tensor([9., 1., 2., 3.], requires_grad=True))    # the last three stay
    assert sorted(chooser.losses[5].tolist()) == [1., 2., 3.]


def test_importance_goes_by_the_root_mean_square():
    "Losses that are positive and negative in turn have mean zero, and matter."
    chooser = ImportanceSteps(2, history=2)
    for sign in (1., -1.): chooser.update(torch.arange(2), sign * f64(3., 1.))
    close(chooser.probabilities(), 0.999 * f64(0.75, 0.25) + 0.0005, rtol=1e-12, atol=0)


def test_importance_with_nothing_to_lose():
    chooser = ImportanceSteps(4, history=1)
    chooser.update(torch.arange(4), torch.zeros(4))
    assert (chooser.probabilities() == 0.25).all()
    chooser.update(torch.arange(4), torch.tensor([1., math.inf, 1., 1.]))
    assert (chooser.probabilities() == 0.25).all()    # a loss that is not finite must not decide
    chooser.update(torch.tensor([1]), torch.tensor([math.nan]))
    assert (chooser.probabilities() == 0.25).all()


# ---- samplers ----

def variance_of(chain, sampler, std=1., **how):
    "Exact variance of samples of N(0, std^2) data: the sampler is linear in its noise, so add the squares of its answers to unit impulses."
    unit = torch.eye(chain.T + 1, dtype=torch.float64)
    impulses = iter(unit[1:])
    net = DDPM(linear_betas()).network(Gaussian(f64(0.)[0], std))
    return getattr(chain, sampler)(net, unit[0], draw=lambda x: next(impulses), **how).square().sum().item()


def test_variance_of_samples():
    large, small = (DDPM(linear_betas(), variance=v) for v in ("large", "small"))
    assert abs(variance_of(large, "ancestral") - (1 - 1e-4)) < 1e-9     # noise at the last step would give 1 - 4.5e-5
    assert abs(variance_of(small, "ancestral") - 0.99107) < 5e-6
    short = small.respace(spaced_timesteps(1000, 25))
    assert abs(variance_of(short, "ddim", 0.5, eta=1.) - variance_of(short, "ancestral", 0.5)) < 1e-12


def test_no_noise_at_the_last_step():
    chain, p, calls = DDPM(linear_betas(7), variance="large"), mixture("g2"), []
    net, z = chain.network(p), seeded_noise(range(6), (2,), torch.float64)
    def draw(x): calls.append(1); return torch.randn(x.shape, generator=seeded(len(calls)), dtype=x.dtype)
    seen = []
    x = chain.ancestral(net, z, draw=draw, callback=lambda **k: seen.append(k))
    assert len(calls) == 6
    close(x, seen[-1]["D"], rtol=1e-12, atol=0)    # the mean of the last step is D, up to rounding of 1 - (1 - beta)
    assert [k["t"] for k in seen] == list(range(6, -1, -1)) and [k["i"] for k in seen] == list(range(7))
    assert torch.equal(seen[0]["x"], z) and seen[0]["sigma"] == chain.sigmas[-1].item()
    close(chain.ancestral_step(net, seen[-1]["x"], 0, 1e6 * torch.ones_like(z))[0], x, rtol=0, atol=0)
    calls.clear()
    chain.ddim(net, z, draw=draw)
    assert not calls                        # eta = 0 draws nothing
    chain.ddim(net, z, eta=0.5, draw=draw)
    assert len(calls) == 6


@pytest.mark.parametrize("betas", [linear_betas(), cosine_betas()])
@pytest.mark.parametrize("n", [1, 5, 30])
def test_ddim_is_euler(betas, n):
    whole, p, z = DDPM(betas), mixture("g2"), seeded_noise(range(20), (2,), torch.float64)
    rows = spaced_timesteps(int((whole.sigmas < 100).sum()), n)    # beyond, sigma eps leaves few digits of x0
    chain, net = whole.respace(rows), whole.network(p)
    sigmas = torch.cat([chain.sigmas.flip(0), f64(0.)])
    start = z * (1 + sigmas[0]**2).sqrt() / sigmas[0]
    close(chain.ddim(net, z), sample(p, start, sigmas, euler), rtol=0, atol=1e-10)


@cases
@given(tables, st.floats(0, 1), st.data())
def test_ddim_keeps_the_jumps(betas, eta, data):
    "With x0 known, x_t ~ q(x_t | x0) must lead to q(x_{t-1} | x0) for every eta; eta = 1 is the posterior."
    chain, x0 = DDPM(betas, predicts="D"), f64(0.7).expand(3, 1)
    t, unit = data.draw(st.integers(0, chain.T - 1)), torch.eye(3, dtype=torch.float64)
    x_t, net = chain.q_sample(x0, t, unit[:, 1:2]), lambda x, t: x0
    x, D = chain.ddim_step(net, x_t, t, unit[:, 2:], eta=eta)
    close(x[0], chain.signal_before[t] * x0[0], rtol=1e-12, atol=1e-12)
    close((x[1:] - x[0]).square().sum(), chain.noise_before[t]**2, rtol=1e-9, atol=1e-12)
    mean, var = chain.q_posterior(x0, x_t, t)
    close(chain.ddim_step(net, x_t, t, unit[:, 2:], eta=1.)[0], mean + var.sqrt() * unit[:, 2:], rtol=1e-9, atol=1e-9)
    assert torch.equal(D, x0)


def test_encode_is_the_inverse_to_first_order():
    whole, p = DDPM(linear_betas()), mixture("g2")
    net, x0, error = whole.network(p), p.sample(50, seeded(0)), {}
    for n in (100, 200, 400):
        chain = whole.respace(spaced_timesteps(1000, n))
        error[n] = (chain.ddim(net, chain.ddim_encode(net, x0)) - x0).square().mean().sqrt()
    assert 1.5 < error[100] / error[200] < 2.6 and 1.5 < error[200] / error[400] < 2.6 and error[400] < 0.05
    # one Gaussian: the code is known, x0 scaled to unit variance, up to the error of Euler's steps
    gauss = Gaussian(f64(0., 0.), 0.5)
    code = whole.ddim_encode(whole.network(gauss), x0)
    close(code, x0 / 0.5, rtol=0.02, atol=1e-3)
    calls = []
    whole.respace([0, 500, 999]).ddim_encode(lambda x, t: calls.append(t[0].item()) or x, x0)
    assert calls == [0, 0, 500]    # the first step has no network of its own level 0


def test_ddim_reverse_step_walks_the_same_line():
    "Told x0, a step up and the step down from there are inverse."
    chain = DDPM(linear_betas(30), predicts="D")
    x0, x = torch.full((4, 2), 0.3, dtype=torch.float64), seeded_noise(range(4), (2,), torch.float64)
    for t in (0, 5, 28):
        up, _ = chain.ddim_reverse_step(lambda x, t: x0, x, t)
        close(chain.ddim_step(lambda x, t: x0, up, t + 1)[0], x, rtol=0, atol=1e-12)
    first = DDPM(f64(0.3), predicts="D").ddim_encode(lambda x, t: x0, x)    # one row: x + sigma eps with sigma eps = x - D
    close(first, 0.7**0.5 * (2 * x - x0), rtol=0, atol=1e-12)
    up, _ = chain.ddim_reverse_step(lambda x, t: x0, x, 29)
    close(up, (x - chain.signal[29] * x0) / chain.noise[29], rtol=0, atol=1e-12)    # pure noise


def test_clip():
    chain, z = DDPM(linear_betas(20)), seeded_noise(range(50), (1, 4), torch.float64)
    net = chain.network(Gaussian(torch.zeros(1, 4, dtype=torch.float64), 2.))
    seen = []
    for how in (dict(), dict(eta=1.)): assert chain.ddim(net, z, clip=True, callback=lambda D, **k: seen.append(D), **how).abs().max() <= 1 + 1e-12
    chain.ancestral(net, z, clip=True, callback=lambda D, **k: seen.append(D))
    assert torch.stack(seen).abs().max() == 1 and chain.ddim(net, z).abs().max() > 1.5
    x0 = z.clamp(-1, 1)
    assert not torch.equal(chain.bpd(net, x0, draw=lambda x: x, clip=True).total, chain.bpd(net, x0, draw=lambda x: x).total)


def test_samples_do_not_depend_on_the_batch():
    chain, p = DDPM(linear_betas(20)), mixture("g2")
    net = chain.network(p)
    def draw(seeds): return chain.ancestral(net, seeded_noise(seeds, (2,), torch.float64), draw=NoiseStream(seeds))
    close(draw([3, 4, 5]), torch.cat([draw([3]), draw([4, 5])]), rtol=0, atol=1e-12)


# ---- bridges ----

class Told(nn.Module):
    "A network in float32 that notes what it is given."
    def __init__(self, channels=1): super().__init__(); self.scale, self.channels, self.seen = nn.Parameter(torch.tensor(0.5)), channels, []
    def forward(self, x, t, labels=None):
        self.seen.append((x.dtype, t.clone(), labels))
        return torch.cat([self.scale * x] * self.channels, 1)


@pytest.mark.parametrize("word", ["eps", "D", "v"])
@pytest.mark.parametrize("variance", ["small", "learned_range"])
def test_denoiser_reads_the_network(word, variance):
    chain = DDPM(cosine_betas(), predicts=word, variance=variance)
    net = Told(2 if chain.learns else 1)
    denoise, x, labels = chain.denoiser(net), seeded_noise(range(3), (1, 4, 4), torch.float64), torch.tensor([1, 2, 3])
    for sigma in (0.02, 1., 50.):
        D = denoise(sigma * x, sigma, labels=labels)
        dtype, t, told = net.seen[-1]
        assert dtype == torch.float32 and t.shape == (3,) and t.dtype == torch.float32 and torch.equal(told, labels) and D.dtype == torch.float64
        a = 1 / (1 + sigma**2)**0.5
        x_t, said = a * sigma * x, 0.5 * a * sigma * x
        expected = {"eps": (x_t - a * sigma * said) / a, "D": said, "v": a * x_t - a * sigma * said}[word]
        close(D, expected, rtol=1e-5, atol=1e-5)    # the network answers in float32
        close(chain.sigma_to_t(sigma).float().expand(3), t, rtol=1e-6, atol=0)
    per_sample = denoise(x, f64(0.02, 1., 50.))
    for i, sigma in enumerate((0.02, 1., 50.)): close(per_sample[i:i + 1], denoise(x[i:i + 1], sigma), rtol=1e-6, atol=1e-6)
    per_sample.sum().backward()
    assert net.scale.grad is not None and next(denoise.parameters()) is net.scale


@pytest.mark.parametrize("word", ["eps", "D", "v"])
def test_there_and_back(word):
    chain, p = DDPM(linear_betas(), predicts=word), mixture("img")
    net = chain.network(p)
    again = chain.denoiser(lambda x, t: net(x, t.round().long()))
    for t in (0, 100, 600, 999):
        s = chain.sigmas[t].item()
        x = p.sample(2, seeded(t)) + s * seeded_noise(range(2), (3, 8, 8), torch.float64)
        close(again(x, s), p(x, s), rtol=0, atol=1e-8)    # sigma = 157 times eps, rounded


def test_respaced_network_hears_the_old_step_numbers():
    net, chain = Told(), DDPM(linear_betas()).respace([3, 700, 999])
    z = seeded_noise(range(2), (1, 4, 4))
    for run in (chain.ancestral, chain.ddim):
        net.seen.clear()
        steps = []
        x = run(net, z, labels=torch.tensor([1, 2]), callback=lambda t, **_: steps.append(t))
        assert steps == [999, 700, 3]
        assert [t.tolist() for _, t, _ in net.seen] == [[999] * 2, [700] * 2, [3] * 2] and x.dtype == torch.float64
        assert all(dtype == torch.float32 and t.dtype == torch.int64 and labels.tolist() == [1, 2] for dtype, t, labels in net.seen)
    close(chain.sigma_to_t(chain.sigmas), f64(3., 700., 999.), rtol=1e-12, atol=1e-9)


def test_every_sampler_runs_every_network():
    "An exact denoiser through DDPM's samplers, and a DDPM network through the ODE's: right shares of the blobs and the right spread."
    p, z = mixture("g2"), seeded_noise(range(2000), (2,), torch.float64)
    whole = DDPM(linear_betas())
    chain, net = whole.respace(spaced_timesteps(1000, 100)), whole.network(p)
    denoise = whole.denoiser(lambda x, t: net(x, t.round().long()))
    levels = whole.sigmas[spaced_timesteps(1000, 60)].flip(0)
    by_heun = sample(denoise, z, torch.cat([levels, f64(0.)]), heun)
    truth = p.sample(20_000, seeded(0))
    g = seeded(1)
    for x in (chain.ancestral(net, z, draw=lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype)), chain.ddim(net, z), by_heun):
        # five standard errors, and a tenth for 100 steps
        assert ((x.mean(0) - truth.mean(0)).abs() < 5 * truth.std(0) / 2000**0.5 + 0.05).all()
        assert ((x.std(0) / truth.std(0) - 1).abs() < 0.1).all()


def test_learned_variance_networks_sample():
    chain = DDPM(linear_betas(20), variance="learned_range")
    net = Told(2)
    x = chain.ancestral(net, seeded_noise(range(2), (1, 4, 4)), draw=NoiseStream(range(2)))
    assert x.shape == (2, 1, 4, 4) and x.isfinite().all()
    for kind in ("simple", "hybrid", "vlb"): assert chain.loss(net, x.float().clamp(-1, 1), kind=kind, generator=seeded(0)).shape == (2,)


def test_any_event_shape_and_one_step():
    for event in ((), (3,), (1, 2, 2)):
        p = Gaussian(torch.zeros(event, dtype=torch.float64), 0.5)
        for chain in (DDPM(linear_betas(5)), DDPM(linear_betas()).respace([999]), DDPM(f64(0.5))):
            net, z = chain.network(p), seeded_noise(range(4), event, torch.float64)
            for x in (chain.ancestral(net, z), chain.ddim(net, z), chain.ddim(net, z, eta=1.), chain.ddim_encode(net, z)): assert x.shape == z.shape and x.isfinite().all()
            assert chain.bpd(net, z.clamp(-1, 1)).total.shape == (4,) and chain.bpd(net, z.clamp(-1, 1)).terms.shape == (4, chain.T)
            assert chain.denoiser(lambda x, t: 0 * x)(z, 1.).shape == z.shape


def test_a_step_can_be_differentiated():
    chain, x = DDPM(linear_betas()), seeded_noise(range(2), (2,), torch.float64).requires_grad_()
    net = chain.network(mixture("g2"))
    for out in (chain.ancestral_step(net, x, 500, torch.zeros_like(x))[0], chain.ddim_step(net, x, 500)[0]):
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
    assert not chain.ddim(net, x).requires_grad    # the loops are for sampling


# ---- spacing ----

@cases
@given(st.integers(1, 300), st.data())
def test_spacing(total, data):
    n, spacing = data.draw(st.integers(1, total)), data.draw(st.sampled_from(["linspace", "trailing", "leading"]))
    rows = spaced_timesteps(total, n, spacing)
    assert len(rows) == n and (rows.diff() > 0).all() and rows[0] >= 0 and rows[-1] < total
    if spacing != "leading": assert rows[-1] == total - 1    # where sampling starts
    if spacing == "leading" or (spacing == "linspace" and n > 1): assert rows[0] == 0
    assert torch.equal(spaced_timesteps(total, total, spacing), torch.arange(total))
    sections = data.draw(st.integers(1, min(4, total)))
    counts = [data.draw(st.integers(1, total // sections)) for _ in range(sections)]
    rows = spaced_timesteps(total, counts)
    assert len(rows) == sum(counts) and (rows.diff() > 0).all() and rows[-1] == total - 1


# ---- faults ----

CHAIN, Z = DDPM(linear_betas(10)), torch.zeros
def said(shape): return lambda x, t, **cond: Z(shape)
@pytest.mark.parametrize("make, message", [
    (lambda: DDPM([]), "betas must be"), (lambda: DDPM(0.1), "betas must be"), (lambda: DDPM([[0.1]]), "betas must be"),
    (lambda: DDPM([0.1, 0.]), r"betas must be \(T,\), each above 0 and below 1"), (lambda: DDPM([0.1, 1.2]), r"with \[1.2"),
    (lambda: DDPM([-0.1, 0.2]), "betas must be"), (lambda: DDPM([0.1, float("nan")]), "betas must be"), (lambda: DDPM([1., 0.2], predicts="v"), "betas must be"),
    (lambda: DDPM([0.1, 0.2], predicts="noise"), "predicts must be one of"), (lambda: DDPM([0.1, 0.2], variance="fixed"), "variance must be one of"),
    (lambda: DDPM([0.1, 0.2], timesteps=[0]), r"timesteps must be \(2,\)"), (lambda: DDPM([0.1, 0.2], timesteps=[5, 5]), "timesteps must be"),
    (lambda: DDPM([0.1, 0.2], timesteps=[0.5, 1.5]), "timesteps must be"),
    (lambda: CHAIN.q_sample(Z(2, 3), 10, Z(2, 3)), r"t must be from 0 to 9, the paper's t less one, got \[10\]"),
    (lambda: CHAIN.q_sample(Z(2, 3), torch.tensor([0, -1]), Z(2, 3)), r"t must be from 0 to 9.*got \[-1\]"),
    (lambda: CHAIN.q_sample(Z(2, 3), 0.5, Z(2, 3)), "t must be one whole number"), (lambda: CHAIN.q_sample(Z(2, 3), True, Z(2, 3)), "t must be one whole number"),
    (lambda: CHAIN.q_sample(Z(2, 3), torch.tensor([1, 2, 3]), Z(2, 3)), r"t must be one whole number or \(2,\)"),
    (lambda: CHAIN.q_sample(Z(2, 3), 1, Z(2, 1)), r"noise must have shape \(2, 3\), got shape \(2, 1\)"),
    (lambda: CHAIN.q_posterior(Z(1, 3), Z(2, 3), 1), "x0 must have shape"),
    (lambda: CHAIN.p_mean_variance(said((2, 1)), Z(2, 3), 1), r"net must return \(2, 3\) for variance='small', got \(2, 1\)"),
    (lambda: DDPM([0.1, 0.2], variance="learned").p_mean_variance(said((2, 3)), Z(2, 3), 1), r"net must return \(2, 6\).*3 channels of prediction and as many of variance, got \(2, 3\)"),
    (lambda: DDPM([0.1, 0.2], variance="learned_range").loss(said((2, 3)), Z(2, 3)), "as many of variance"),
    (lambda: CHAIN.p_mean_variance(said((2, 6)), Z(2, 3), 1), r"net must return \(2, 3\)"),
    (lambda: CHAIN.loss(said((2, 3)), Z(2, 3), kind="mse"), "kind must be"), (lambda: CHAIN.loss(said((2, 3)), Z(2, 3), kind="hybrid"), "needs a learned variance"),
    (lambda: CHAIN.loss(said((2, 3)), Z(2, 3, dtype=torch.uint8)), "x0 must be float32 or float64"), (lambda: CHAIN.loss(said((2, 3)), Z(2, 3), noise=Z(2, 1)), "noise must have"),
    (lambda: CHAIN.ddim_step(said((2, 3)), Z(2, 3), 1, eta=1.5), "eta must be from 0 to 1, got 1.5"), (lambda: CHAIN.ddim(said((2, 3)), Z(2, 3), eta=-0.1), "eta must be"),
    (lambda: CHAIN.ddim_step(said((2, 3)), Z(2, 3), 1, eta=0.5), "noise must be given"),
    (lambda: CHAIN.ancestral(said((2, 3)), Z(2, 3) + math.nan), "noise must be a finite floating-point"), (lambda: CHAIN.ancestral(said((2, 3)), Z(2, 3).long()), "noise must be a finite floating"),
    (lambda: CHAIN.ancestral(said((2, 3)), Z(2, 3), draw=lambda x: x[:1]), "noise must have shape"),
    (lambda: CHAIN.respace([3, 2]), "rows must be"), (lambda: CHAIN.respace([0, 10]), r"rows must be .* from 0 to 9"), (lambda: CHAIN.respace([]), "rows must be"), (lambda: CHAIN.respace([0.5]), "rows must be"),
    (lambda: CHAIN.respace(range(11)), "rows must be"),
    (lambda: spaced_timesteps(10, 11), "n must be from 1 to 10 steps"), (lambda: spaced_timesteps(10, 0), "n must be"), (lambda: spaced_timesteps(10, [6, 2]), "n must be"), (lambda: spaced_timesteps(10, []), "n must be"),
    (lambda: spaced_timesteps(10, 2.5), "n must be"), (lambda: spaced_timesteps(10, 2, "uniform"), "spacing must be"), (lambda: spaced_timesteps(10, [2, 2], "leading"), "sections need"),
    (lambda: DDPM([0.1, 0.2], predicts="mean").denoiser(said((2, 3))), "a mean belongs to the steps of its chain"),
    (lambda: CHAIN.denoiser(said((2, 3)))(Z(2, 3), 0.), "sigma must be positive"), (lambda: CHAIN.denoiser(said((2, 1)))(Z(2, 3), 1.), r"net must return \(2, 3\)"),
    (lambda: DDPM([0.1, 0.2], variance="learned").denoiser(said((2, 3)))(Z(2, 3), 1.), r"net must return \(2, 6\)"),
    (lambda: DDPM([0.1, 0.2], variance="learned").network(said((2, 3))), "a denoiser knows none"),
    (lambda: CHAIN.respace([2, 5]).network(lambda x, s: x)(Z(2, 3), torch.tensor([2, 3])), r"among this chain's 2 timesteps, got \[3\]"),
    (lambda: discretized_gaussian_log_likelihood(Z(2), Z(2), Z(2), levels=1), "levels must be at least 2"),
    (lambda: ImportanceSteps(0), "T and history"), (lambda: ImportanceSteps(5, uniform=0.), "uniform above 0"), (lambda: ImportanceSteps(5).update(torch.arange(2), Z(3)), "loss must have t's shape"),
])
def test_refused(make, message):
    with pytest.raises(ValueError, match=message): make()


def test_on_a_gpu():
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    chain, p = DDPM(linear_betas(), variance="learned_range"), mixture("g2")
    plain = DDPM(linear_betas())
    x0 = p.sample(16, seeded(0))
    on = lambda device: plain.loss(plain.network(p), x0.to(device), generator=seeded(1)).cpu()
    close(on("cuda"), on("cpu"), rtol=1e-9, atol=1e-9)
    z = seeded_noise(range(16), (2,), torch.float64)
    short = plain.respace(spaced_timesteps(1000, 20))
    close(short.ddim(plain.network(p), z.cuda()).cpu(), short.ddim(plain.network(p), z), rtol=0, atol=1e-9)
    assert chain.denoiser(Told(2).cuda())(Z(2, 1, 4, 4).cuda(), 1.).device.type == "cuda"
