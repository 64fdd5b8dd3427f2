"Consistency functions and their losses: closed forms, pairs of levels, steps, distilled runs, refusals."
import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.consistency import (ConsistencyLoss, Doubling, Flow, ProgressiveLoss, Shrinking, consistency_step, distill, few_levels, is_consistency,
                                  ode_step, renoise, two_in_one)
from ddpm_edm.core import CountNFE, expand, seeded_noise
from ddpm_edm.data import ImageData
from ddpm_edm.guidance import Guided
from ddpm_edm.noise import LogNormal, karras_sigmas
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.solvers import euler, generate, heun, sample
from ddpm_edm.train import Settings, Trainer, load, read_log, train
from ddpm_edm.unet import UNet

P = Mixture(torch.tensor([[-1., 0.], [1., 0.5]], dtype=torch.float64), 0.4)


def full(B, value): return torch.full((B,), float(value), dtype=torch.float64)
def draw(B, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(B, 2, generator=g, dtype=torch.float64), (torch.randn(B, generator=g, dtype=torch.float64)).exp(), torch.randn(B, 2, generator=g, dtype=torch.float64)


def network(dropout=0., labels=2, seed=0):
    torch.manual_seed(seed)
    return EDMPrecond(UNet(1, 32, mults=(1,), attention=(), num_labels=labels, dropout=dropout), 0.7)


def some_data():
    images = torch.randint(256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageData(images, torch.arange(50) % 2)


SMALL = dict(precision="fp32", images=160, batch=16, warmup=30, ema_halflife=40, log_every=60, save_every=50, sample_every=110, progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A diffusion model, barely trained."
    out = tmp_path_factory.mktemp("runs") / "teacher"
    train(network(0.1), some_data(), out, **SMALL)
    return out


# where paths end

@settings(max_examples=10, deadline=None)
@given(st.floats(-2, 2), st.floats(0.2, 3), st.floats(-3, 4.4))
def test_flow_of_a_gaussian(mean, std, log_sigma):
    sigma = math.exp(log_sigma)
    x = mean + torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None] * (std**2 + sigma**2)**0.5
    want = mean + (x - mean) * std / (std**2 + sigma**2)**0.5
    got = Flow(Gaussian(torch.tensor([mean], dtype=torch.float64), std), 128)(x, sigma)
    torch.testing.assert_close(got, want, atol=5e-3 * std, rtol=0)    # second order in 128 steps; largest at small std and large sigma


def test_flow_is_constant_along_a_path_and_takes_a_level_for_each_sample():
    x, seen = seeded_noise(range(5), (2,), torch.float64), []
    end = sample(P, x, karras_sigmas(400), callback=lambda x, sigma, **_: seen.append((x, sigma)))
    points, levels = torch.stack([seen[i][0][0] for i in (0, 100, 200, 300)]), torch.tensor([seen[i][1] for i in (0, 100, 200, 300)])
    torch.testing.assert_close(Flow(P, 400)(points, levels), end[:1].expand(4, 2), atol=2e-3, rtol=0)    # two solvers' errors
    flow = Flow(P, 20)
    torch.testing.assert_close(flow(points, levels)[2:3], flow(points[2:3], levels[2].item()), atol=1e-9, rtol=0)
    torch.testing.assert_close(flow(points, torch.tensor(1.)), flow(points, full(4, 1.)), atol=1e-6, rtol=0)    # 1e-5 ... 1 as float32 shares


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 80), st.floats(0, 0.95), st.integers(0, 1000))
def test_ode_step_is_heuns_and_eulers_at_the_end(sigma, share, seed):
    x, _, _ = draw(4, seed)
    x = x * (1 + sigma)
    got = ode_step(P, x, full(4, sigma), torch.tensor([share * sigma, 0., share * sigma, 0.], dtype=torch.float64))
    for rows, low in (([0, 2], share * sigma), ([1, 3], 0.)):
        torch.testing.assert_close(got[rows], heun(P, x[rows], sigma, low)[0], atol=1e-9 * (1 + sigma / max(share, 1e-3)), rtol=0)


# pairs of levels

@settings(max_examples=60, deadline=None)
@given(st.floats(-12, 8), st.floats(0, 1), st.integers(1, 12), st.integers(0, 5))
def test_doubling_brackets(log_sigma, progress, first, doublings):
    pairs, sigma = Doubling(first, first * 2**doublings), torch.tensor([log_sigma]).exp()
    upper, lower = pairs(sigma, progress)
    levels = pairs.levels(progress).float()
    i = (levels == upper).nonzero().item()
    assert levels[i - 1] == lower >= 0 and (levels.diff() > 0).all() and len(levels) - 1 == pairs.steps(progress)
    assert upper >= sigma or i == len(levels) - 1
    assert lower < sigma or sigma > 80


def test_doubling_takes_equal_parts_of_the_training():
    assert [Doubling(10, 80).steps(p) for p in (0, 0.2499, 0.25, 0.5, 0.75, 1)] == [10, 10, 20, 40, 80, 80]
    assert {Doubling(7, 7).steps(p) for p in (0, 0.5, 1)} == {7}


@settings(max_examples=60, deadline=None)
@given(st.floats(-6, 4.4), st.floats(0, 1), st.integers(1, 9), st.floats(1.5, 5))
def test_shrinking_narrows(log_sigma, progress, stages, q):
    pairs, sigma = Shrinking(stages, q), torch.tensor([log_sigma], dtype=torch.float64).exp()
    same, r = pairs(sigma, progress)
    a = min(math.floor(progress * stages) + 1, stages)
    want = max(0., 1 - (1 + 8 / (1 + math.exp(sigma.item()))) / q**a)
    assert same is sigma and 0 <= r < sigma
    torch.testing.assert_close(r, sigma * want)
    assert pairs(sigma, 0.)[1] <= r <= pairs(sigma, 1.)[1]


# the loss

def by_hand(f, x0, n, upper, lower, teacher=None, c=0.00054):
    x = x0 + upper[:, None] * n
    x_r = x0 + lower[:, None] * n if teacher is None else torch.cat([heun(teacher, x[i:i + 1], upper[i].item(), lower[i].item())[0] for i in range(len(x))])
    target = torch.cat([f(x_r[i:i + 1], lower[i:i + 1]) if lower[i] > 0 else x_r[i:i + 1] for i in range(len(x))]).detach()
    d2 = (f(x, upper) - target).square().sum(1)
    return ((d2 + c**2 * x0.shape[1]).sqrt() - c * x0.shape[1]**0.5) / (upper - lower)


@pytest.mark.parametrize("teacher", [None, P])
@pytest.mark.parametrize("pairs", [Doubling(4, 8), Shrinking(3)])
def test_loss_by_hand(pairs, teacher):
    x0, _, n = draw(30)
    sigma, a = LogNormal(-1.1, 2.).sample(30, torch.Generator().manual_seed(0)).double(), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    def f(x, sigma, asked=None): return a * P(x, sigma) + (1 - a) * torch.sin(x)
    loss = ConsistencyLoss(pairs, teacher).at(0.6)
    upper, lower = pairs(sigma, 0.6)
    assert (lower == 0).any() == isinstance(pairs, Doubling) or (lower > 0).any()
    got, want = loss(f, x0, sigma=sigma, n=n), by_hand(f, x0, n, upper, lower, teacher)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)    # rounding
    got_grad, = torch.autograd.grad(got.sum(), a)
    torch.testing.assert_close(got_grad, torch.autograd.grad(want.sum(), a)[0], rtol=1e-8, atol=1e-9)    # none through the target
    unit = upper * 0.7 / (upper**2 + 0.49).sqrt()
    torch.testing.assert_close(ConsistencyLoss(pairs, teacher, sigma_data=0.7).at(0.6)(f, x0, sigma=sigma, n=n), want * (upper - lower) / unit, atol=1e-9, rtol=1e-9)


def test_loss_never_asks_at_zero_and_hands_conditions_on():
    asked = []
    def f(x, sigma, labels): return asked.append((sigma, labels)) or x
    x0, sigma, n = draw(6)
    labels = torch.arange(6)
    ConsistencyLoss(Doubling(1, 1), f)(f, x0, sigma=sigma, n=n, labels=labels)
    assert len(asked) == 4    # two of the teacher, two of the student
    assert all((s > 0).all() and torch.equal(l, labels) for s, l in asked)


def test_exact_f_of_the_widest_gap_is_the_denoiser():
    # with squared error (large c) and the pair (80, 0) no other function of x does better than the posterior mean
    g = torch.Generator().manual_seed(0)
    x0, n = P.sample(4000, g), torch.randn(4000, 2, generator=g, dtype=torch.float64)
    loss, sigma = ConsistencyLoss(Doubling(1, 1, sigma_max=1.), c=1e4), full(4000, 1.)
    best = loss(P, x0, sigma=sigma, n=n).mean()
    for other in (Flow(P, 20), lambda x, sigma: P(x, sigma) + 0.2, lambda x, sigma: 0.8 * P(x, sigma)): assert loss(other, x0, sigma=sigma, n=n).mean() > 1.02 * best


def test_both_answers_see_the_same_dropout():
    net, g = network(0.5, labels=0), torch.Generator().manual_seed(0)
    for q in net.parameters(): torch.nn.init.normal_(q, std=0.1, generator=g)
    x0, n, level = torch.randn(4, 1, 4, 4, generator=g), torch.randn(4, 1, 4, 4, generator=g), torch.ones(4)
    near = ConsistencyLoss(lambda sigma, progress: (level, 0.9999 * level))(net, x0, sigma=level, n=n) * 1e-4
    torch.manual_seed(1)
    apart = (net(x0, level) - net(x0, level)).flatten(1).norm(dim=1)
    assert near.max() < 0.02 * apart.min()
    torch.manual_seed(2); ConsistencyLoss()(net, x0, sigma=level, n=n); after = torch.rand(())
    torch.manual_seed(2); net(x0, level)
    assert torch.rand(()) == after    # the target's draws leave no trace


def test_name_of_a_loss_is_text_that_changes_with_the_teacher():
    one, two = (repr(ConsistencyLoss(Doubling(3, 3), network(seed=k))) for k in (0, 1))
    assert one != two and one == repr(ConsistencyLoss(Doubling(3, 3), network(seed=0)).at(0.5)) and "0x" not in one and len(one) < 300
    assert repr(ConsistencyLoss()) == "ConsistencyLoss(pairs=Doubling(first=10, last=1280, sigma_min=0.002, sigma_max=80.0, rho=7.0), teacher=None, c=0.00054, sigma_data=None)"


# sampling

def test_samples_are_repeatable_and_alone():
    noise, levels = seeded_noise(range(7), (2,), torch.float64), few_levels(3)
    x = sample(P, noise, levels, consistency_step)
    assert torch.equal(x, sample(P, noise, levels, consistency_step))
    assert torch.equal(x[3:5], sample(P, noise[3:5], levels, consistency_step))
    torch.testing.assert_close(generate(P, range(7), (2,), levels, consistency_step, batch=3), generate(P, range(7), (2,), levels, consistency_step), atol=0, rtol=0)


def test_step_is_answer_plus_fresh_noise():
    counted, noise, seen = CountNFE(P), seeded_noise(range(4000), (2,), torch.float64), []
    sample(counted, noise, few_levels(3), consistency_step, callback=lambda x, sigma, D, i: seen.append((x, sigma, D)))
    assert counted.nfe == 3
    fresh = [(seen[i + 1][0] - seen[i][2]) / seen[i + 1][1] for i in (0, 1)]
    for z in fresh:
        assert z.mean().abs() < 5 / 8000**0.5 and abs(z.var() - 1) < 5 * (2 / 8000)**0.5    # five standard errors
        assert (z * noise).mean().abs() < 5 / 8000**0.5
    assert (fresh[0] * fresh[1]).mean().abs() < 5 / 8000**0.5
    x, _ = renoise(lambda x, sigma, sigma_next: 0 * x + sigma_next)(P, noise[:3], 2., 0.5)
    torch.testing.assert_close(x, P(noise[:3], 2.) + 0.25)
    torch.testing.assert_close(consistency_step(P, noise[:3], 2., 0.)[0], P(noise[:3], 2.))    # no noise at the end


def test_exact_f_samples_the_data_in_any_number_of_evaluations():
    def f(x, sigma): return 1 + (x - 1) * 0.5 / (0.25 + expand(sigma, x)**2).sqrt()    # of N(1, 0.5^2)
    noise = seeded_noise(range(4000), (1,), torch.float64)
    for steps in (1, 2, 5):
        x = sample(f, noise, few_levels(steps), consistency_step)
        assert abs(x.mean() - 1) < 0.01 + 5 * 0.5 / 4000**0.5 and abs(x.std() - 0.5) < 5 * 0.5 / 8000**0.5


def test_few_levels():
    assert few_levels(1).tolist() == [80, 0]
    torch.testing.assert_close(few_levels(3, 100., 1.), torch.tensor([100, 10, 1, 0], dtype=torch.float64))
    assert few_levels().tolist() == pytest.approx([80, 0.8, 0], rel=1e-12)


# progressive distillation

@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 80), st.floats(0.05, 0.95), st.floats(0, 0.9), st.integers(0, 1000))
def test_one_step_for_two(sigma, share, share_next, seed):
    x, middle = draw(3, seed)[0] * (1 + sigma), share * sigma
    low = middle * share_next if share_next > 0.05 else 0.
    two = euler(P, euler(P, x, sigma, middle)[0], middle, low)[0]
    D = two_in_one(P, x, full(3, sigma), full(3, middle), full(3, low))
    torch.testing.assert_close(euler(lambda *_: D, x, sigma, low)[0], two, atol=1e-9 * (1 + sigma), rtol=0)


def test_progressive_loss_by_hand():
    levels, (x0, _, n) = karras_sigmas(6), draw(5)
    loss, rising = ProgressiveLoss(P, levels), levels.flip(0)
    sigma = torch.tensor([1e-3, 0.003, rising[2] + 1e-3, rising[4] + 1e-3, 100.], dtype=torch.float64)
    upper, middle, low = (rising[torch.tensor([2, 2, 4, 6, 6]) - k] for k in (0, 1, 2))
    x = x0 + upper[:, None] * n
    want = (0.9 * P(x, upper) - two_in_one(P, x, upper, middle, low)).square().mean(1) * (1 / upper**2).clamp(min=1)
    torch.testing.assert_close(loss(lambda x, sigma: 0.9 * P(x, sigma), x0, sigma=sigma, n=n), want, rtol=1e-9, atol=1e-12)
    assert (how := loss.sampling(0.01, 5.))["step"] is euler and torch.equal(how["sigmas"], levels[::2])    # its own levels, wherever the run begins


# runs

def weights(folder): return (folder / "model.safetensors").read_bytes(), (folder / "state" / "latest.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["distillation", "tuning"])
def test_distilled_run(run, tmp_path, method):
    before = (run / "model.safetensors").read_bytes()
    student = distill(run, some_data(), tmp_path / "s", method=method, steps=5, **SMALL)
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert is_consistency(student) and is_consistency(load(tmp_path / "s")) and not is_consistency(load(run)) and not is_consistency(P)
    assert config["training"]["loss"].startswith("ConsistencyLoss(pairs=Doubling(first=5, last=5" if method == "distillation" else "ConsistencyLoss(pairs=Shrinking(") and config["training"]["noise"] == "LogNormal(P_mean=-1.1, P_std=2.0)"
    assert (run / "model.safetensors").read_bytes() == before and all(m["skipped"] == 0 for m in read_log(tmp_path / "s"))
    with pytest.raises(ValueError, match="run must hold a diffusion model"): distill(tmp_path / "s", some_data(), tmp_path / "t")


def test_student_begins_as_its_teacher(run, tmp_path, monkeypatch):
    begun = []
    def stop(self): begun.append((self, copy.deepcopy(self.denoiser.state_dict()))) or (_ for _ in ()).throw(InterruptedError())
    monkeypatch.setattr(Trainer, "step", stop)
    with pytest.raises(InterruptedError): distill(run, some_data(), tmp_path / "s", **SMALL)
    trainer, first = begun[0]
    for name, value in load(run).state_dict().items(): assert torch.equal(first[name], value)
    assert trainer.loss.teacher is not trainer.denoiser and not trainer.loss.teacher.training and trainer.denoiser.training
    assert not any(q.requires_grad for q in trainer.loss.teacher.parameters())


@pytest.mark.parametrize("loss", [ConsistencyLoss(Doubling(2, 16)), ConsistencyLoss(Shrinking(5), P), "teacher"], ids=["training", "tuning", "distillation"])
def test_resumed_run_is_the_run(run, tmp_path, loss):
    if not isinstance(loss, str) and loss.teacher is P: loss = ConsistencyLoss(Shrinking(5), network(0.1).eval())
    if loss == "teacher": loss = ConsistencyLoss(Doubling(6, 6), load(run), sigma_data=0.7)
    how = SMALL | dict(sample_every=10**6, loss=loss)
    train(network(0.3), some_data(), tmp_path / "a", **how)
    step = Trainer.step
    def broken(self):
        if self.seen == 80: raise InterruptedError
        step(self)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Trainer, "step", broken)
        with pytest.raises(InterruptedError): train(network(0.3), some_data(), tmp_path / "b", **how)
    train(network(0.3, seed=5), some_data(), tmp_path / "b", resume=True, **how)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    with pytest.raises(ValueError, match="training.loss is"): train(network(0.3), some_data(), tmp_path / "b", resume=True, **how | dict(loss=None))


def test_progress_reaches_the_loss_and_every_part_of_a_batch(tmp_path):
    class Told:
        seen = []
        def at(self, progress): self.seen.append(progress); return lambda denoise, x0, sigma, n, **cond: (denoise(x0 + expand(sigma, x0) * n, sigma, **cond) - x0).square().flatten(1).mean(1)
        def __call__(self, *args, **kw): raise AssertionError("the loss of a moment is asked for by `at`")
        def __repr__(self): return "Told()"
    train(network(), some_data(), tmp_path / "r", loss=Told(), accumulate=2, **SMALL | dict(sample_every=10**6))
    assert Told.seen[1:] == [k / 160 for k in range(0, 160, 16) for _ in range(2)]    # the first is a trial
    assert json.loads((tmp_path / "r" / "config.json").read_text())["training"]["loss"] == "Told()"


def test_pictures_of_a_student_are_drawn_its_way(run, tmp_path, monkeypatch):
    import ddpm_edm.train as module
    calls, real = [], module.generate
    monkeypatch.setattr(module, "generate", lambda *args, **kw: calls.append(args[3:]) or real(*args, **kw))
    distill(run, some_data(), tmp_path / "s", **SMALL)
    assert calls and all(torch.equal(sigmas, few_levels(2)) and step is consistency_step for sigmas, step in calls)
    calls.clear()
    short = SMALL | dict(images=32, sample_every=16)
    train(network(), some_data(), tmp_path / "t", **short, sigma_min=0.01, sigma_max=20.)
    assert calls and all(len(sigmas) == 19 and step is heun for sigmas, step in calls)
    for method in ("distillation", "tuning"):    # from where its teacher is drawn, unless told
        calls.clear()
        student = distill(tmp_path / "t", some_data(), tmp_path / method, method=method, **short)
        assert student.config["sigmas"] == dict(sigma_min=0.01, sigma_max=20.)
        assert calls and all(torch.equal(sigmas, few_levels(2, 20.)) for sigmas, step in calls)
        assert ("sigma_min=0.01, sigma_max=20.0" in student.config["training"]["loss"]) == (method == "distillation")
    assert distill(tmp_path / "t", some_data(), tmp_path / "told", **short, sigma_max=30.).config["sigmas"]["sigma_max"] == 30
    with pytest.raises(ValueError, match=r"sigma_max must be above 0.8, the last level above zero .sigma_mid., and both above 0, got 0.5"): distill(tmp_path / "t", some_data(), tmp_path / "low", method="tuning", **short, sigma_max=0.5)
    assert not (tmp_path / "low").exists()    # before anything is written


def test_guided_teacher_low_precision_and_progressive(run, tmp_path):
    for k, (loss, how) in enumerate(((ConsistencyLoss(Doubling(4, 4), Guided(load(run), 2.)), {}), (ConsistencyLoss(), dict(precision="bf16")), (ProgressiveLoss(load(run), karras_sigmas(4)), {}))):
        student = train(network(), some_data(), tmp_path / str(k), **SMALL | how | dict(loss=loss))
        x = generate(student, range(3), (1, 4, 4), **loss.sampling(), labels=torch.tensor([0, 1, -1]))
        assert x.isfinite().all() and all(math.isfinite(m["loss"]) for m in read_log(tmp_path / str(k)))


def test_a_student_learns_the_ends_of_paths(tmp_path):
    # one image only: every path ends there, from everywhere; a denoiser of one image knows that too, so start from a fresh network
    data = ImageData(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8))
    loss = ConsistencyLoss(Doubling(4, 4), lambda x, sigma, **_: torch.ones_like(x), c=0.1, sigma_data=0.7)
    student = train(network(labels=0), data, tmp_path / "r", loss=loss, noise=LogNormal(0., 2.), **SMALL | dict(images=1600, lr=1e-2, log_every=1600, save_every=1600, sample_every=10**6))
    fresh = generate(network(labels=0).eval(), range(8), (1, 4, 4), few_levels(1), consistency_step)
    ends = generate(student, range(8), (1, 4, 4), few_levels(1), consistency_step)
    assert (ends - 1).square().mean() < 0.2 * (fresh - 1).square().mean()


# refusals

@pytest.mark.parametrize("call, why", [
    (lambda: Doubling(0), "first must be a whole number and at least 1, got 0"),
    (lambda: Doubling(8, 4), "last must be a whole number and at least 8, got 4"),
    (lambda: Doubling(sigma_min=0.), "sigma_min"),
    (lambda: Shrinking(0), "stages must be a whole number and at least 1, got 0"),
    (lambda: Shrinking(q=1.), "q must be above 1, k and b 0 or more, all finite, got 1.0"),
    (lambda: Shrinking(k=math.nan), "q must be above 1, k and b 0 or more"),
    (lambda: ConsistencyLoss(c=0.), "c must be positive and finite, got 0.0"),
    (lambda: ConsistencyLoss(c=math.nan), "c must be positive and finite, got nan"),
    (lambda: ConsistencyLoss(sigma_data=-1.), "sigma_data must be positive and finite, got -1.0"),
    (lambda: ConsistencyLoss(teacher="x"), "teacher must be a denoiser, got 'x'"),
    (lambda: ConsistencyLoss()(P, torch.zeros(2, 2), sigma=torch.ones(2), n=torch.zeros(2, 3)), r"n must have shape \(2, 2\), got shape \(2, 3\)"),
    (lambda: ProgressiveLoss(P, karras_sigmas(5)), "levels must be of an even number of steps and end in 0, got 5 steps"),
    (lambda: ProgressiveLoss(P, karras_sigmas(4)[:3]), "levels must be of an even number of steps and end in 0, got 2 steps"),
    (lambda: ProgressiveLoss(P, karras_sigmas(4).flip(0)), "levels must be finite, decrease"),
    (lambda: ProgressiveLoss(None, karras_sigmas(4)), "teacher must be a denoiser, got None"),
    (lambda: few_levels(0), "steps must be a whole number and at least 1, got 0"),
    (lambda: few_levels(2, 1., 2.), "sigma_max must be above 2, the last level above zero .sigma_mid., and both above 0, got 1"),
    (lambda: Flow(P)(torch.zeros(2, 2), -1.), "sigma must be positive and finite, got -1.0"),
    (lambda: Flow(P, 0), "n must be"),
    (lambda: renoise(lambda x, *_: x[:1])(P, torch.zeros(2, 2), 2., 1.), r"draw's noise must have shape \(2, 2\)"),
    (lambda: distill("nowhere", some_data(), "x", method="magic"), 'method must be "distillation" or "tuning", got \'magic\''),
    (lambda: Settings(16, 16, 1e-3, 0.1, 0, 10., 0., LogNormal(), 0, "fp32", loss=3), "loss must be a function, such as EDMLoss"),
])
def test_refused(call, why):
    with pytest.raises(ValueError, match=why): call()


def test_nowhere_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at"): distill(tmp_path / "nowhere", some_data(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
