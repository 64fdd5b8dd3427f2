"Stable targets: against the exact denoiser, in the mean over what may have been there, with labels, under autocast and in a training that is resumed."
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_edm.augment import Augment
from ddpm_edm.core import expand, seeded_noise
from ddpm_edm.data import MappedData, digits
from ddpm_edm.noise import LogNormal
from ddpm_edm.oracle import Empirical, Mixture
from ddpm_edm.precond import DenoisingLoss, EDMLoss, EDMPrecond, LearnedWeight
from ddpm_edm.targets import StableTargetLoss
from ddpm_edm.train import Settings, Trainer, _restore, _state, train
from ddpm_edm.unet import UNet

torch.set_num_threads(1)

PLAIN = EDMLoss(LogNormal(), 0.5)


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Line(nn.Module):
    "A denoiser with weights."
    def __init__(self, d):
        super().__init__()
        self.w = nn.Parameter(normal(d, d, seed=9))
    def forward(self, x, sigma, **cond): return torch.tanh(x @ self.w.to(x)) / (1 + expand(sigma, x))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 5), st.floats(0.05, 20), st.integers(0, 99))
def test_its_gradient_is_the_mean_over_all_that_may_have_been_there(N, d, sigma, seed):
    data, x, net = normal(N, d, seed=seed), normal(1, d, seed=seed + 1) * (1 + sigma), Line(d)
    levels = torch.tensor([sigma], dtype=torch.float64)
    r = (-(x - data).square().sum(1) / (2 * sigma**2)).softmax(0)
    def gradient(loss, x0): return torch.autograd.grad(loss(net, x0, sigma=levels, n=(x - x0) / sigma).sum(), net.w)[0]
    each = torch.stack([gradient(PLAIN, data[i:i + 1]) for i in range(N)])
    stable = [gradient(StableTargetLoss(PLAIN, Empirical(data)), data[i:i + 1]) for i in range(N)]
    size = each.abs().max().item() + 1e-3
    for g in stable: torch.testing.assert_close(g, torch.einsum("i,ijk->jk", r, each), rtol=0, atol=1e-10 * size)    # x is x0 + sigma (x - x0) / sigma but for rounding


def test_a_perfect_denoiser_has_no_loss():
    "Of a data set and of a mixture, at all levels; the plain loss leaves the posterior variance."
    data = normal(30, 1, 4, 4)
    for exact, x0 in ((Empirical(data), data), (mix := Mixture(normal(3, 2), 0.3), mix.sample(200, torch.Generator().manual_seed(0)))):
        how = dict(sigma=LogNormal().sample(len(x0), torch.Generator().manual_seed(1)).double(), n=normal(*x0.shape, seed=2))
        assert not StableTargetLoss(PLAIN, exact)(exact, x0, **how).any()
        assert PLAIN(exact, x0, **how).mean() > 0.05
        other = lambda x, sigma: exact(x, sigma) + 0.1
        lam = PLAIN.weight(how["sigma"])
        torch.testing.assert_close(StableTargetLoss(PLAIN, exact)(other, x0, **how), 0.01 * lam, rtol=1e-9, atol=0)


def test_draws_and_weights_are_those_of_the_loss():
    "Where the target is the sample itself, nothing is left to tell the two apart."
    x0, g = normal(6, 3), lambda: torch.Generator().manual_seed(0)
    same = lambda x, sigma: x0
    for loss in (PLAIN, DenoisingLoss(LogNormal(0., 1.), lambda sigma: 1 + sigma)):
        assert torch.equal(StableTargetLoss(loss, same)(Line(3), x0, generator=g()), loss(Line(3), x0, generator=g()))
    weighed = LearnedWeight(StableTargetLoss(PLAIN, same)).double()
    assert torch.equal(weighed(Line(3), x0, generator=g()), LearnedWeight(PLAIN).double()(Line(3), x0, generator=g()))


def test_labels_choose_what_may_have_been_there():
    data, labels = normal(20, 3), torch.arange(20) % 4
    loss = StableTargetLoss(PLAIN, Empirical(data, labels))
    x, sigma, asked = normal(5, 3, seed=1), torch.full((5,), 2., dtype=torch.float64), torch.tensor([0, 3, -1, 3, 2])
    target = loss.target(x, x, sigma, labels=asked)
    for i, label in enumerate(asked):
        known = data if label < 0 else data[labels == label]
        torch.testing.assert_close(target[i:i + 1], Empirical(known)(x[i:i + 1], 2.), rtol=1e-12, atol=1e-12)


def test_nothing_learns_through_the_target():
    teacher, student, x0 = Line(3), Line(3), normal(4, 3)
    with torch.no_grad(): teacher.w.mul_(2)
    StableTargetLoss(PLAIN, teacher)(student, x0, generator=torch.Generator().manual_seed(0)).sum().backward()
    assert teacher.w.grad is None and student.w.grad.abs().max() > 0


def test_autocast_does_not_reach_the_target():
    "Pictures of 256 levels, which bfloat16 can't tell apart: the same target, bit for bit, as without."
    fine = torch.randint(256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    exact, sigma = Empirical(fine), torch.full((50,), 0.3)
    loss, x = StableTargetLoss(PLAIN, exact), fine + 0.3 * seeded_noise(range(50), (1, 4, 4))
    want = loss.target(fine, x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss.target(fine, x, sigma), want)
        assert not torch.equal(exact(x, sigma), want)    # so there was something to keep out


@pytest.mark.parametrize("make, message", [
    (lambda: StableTargetLoss(lambda *a: 0, Empirical(normal(3, 2))), "loss must be a DenoisingLoss, such as EDMLoss"),
    (lambda: StableTargetLoss(PLAIN, normal(3, 2)), "exact must be a denoiser, such as Empirical"),
    (lambda: StableTargetLoss(PLAIN, Empirical(normal(3, 2)))(Line(2), normal(3, 2), labels=torch.zeros(3, dtype=torch.int64)), "the data have none"),
    (lambda: StableTargetLoss(PLAIN, Empirical(normal(3, 2)))(Line(2), normal(3, 2), augment=torch.zeros(3, 9)), "augment must be None"),
    (lambda: StableTargetLoss(PLAIN, Empirical(normal(3, 2)))(Line(4), normal(3, 4)), r"x must be \(B, \*event\) with event \(2,\)"),
    (lambda: StableTargetLoss(PLAIN, lambda x, sigma: x[:1])(Line(2), normal(3, 2)), "exact's output must"),
])
def test_what_can_not_be(make, message):
    with pytest.raises(ValueError, match=message): make()


def trainer(seed=0, steps=0, **changes):
    data = digits().take(torch.arange(100))
    torch.manual_seed(seed)
    how = dict(images=2000, batch=16, lr=1e-3, lr_end=0.02, warmup=0, ema_halflife=100, label_dropout=0.3, noise=LogNormal(-0.6), seed=0, precision="fp32", stable_targets=True)
    t = Trainer(EDMPrecond(UNet(1, channels=16, num_labels=10), data.stats().std), data, Settings(**how | changes))
    for _ in range(steps): t.step()
    return t


def test_resumed_training_is_the_same():
    "With labels, some of which are withheld."
    a, b, c = trainer(steps=6), trainer(steps=3), trainer(7)
    _restore(c, {k: v.clone() for k, v in _state(b).items()})
    for _ in range(3): c.step()
    for name, value in _state(a).items(): assert torch.equal(value, _state(c)[name]), name


def test_the_setting_is_the_loss():
    "Around the trainer's own loss or a given one; and it is not the plain one."
    data = digits().take(torch.arange(100))
    plain = EDMLoss(LogNormal(-0.6), data.stats().std)
    by_hand = trainer(steps=3, stable_targets=False, loss=StableTargetLoss(plain, Empirical(*data.batch(slice(None)))))
    for changes, same in ((dict(), True), (dict(loss=plain), True), (dict(stable_targets=False), False), (dict(loss=DenoisingLoss(LogNormal(), torch.ones_like)), False)):
        other = trainer(steps=3, **changes)
        assert all(torch.equal(p, q) for p, q in zip(by_hand.denoiser.parameters(), other.denoiser.parameters())) == same


def test_a_run_knows_its_loss(tmp_path):
    "By words that are the same in every process, so that it can be resumed in another."
    data = digits().take(torch.arange(100))
    loss = StableTargetLoss(EDMLoss(LogNormal(-0.6), data.stats().std), Empirical(*data.batch(slice(None))))
    for out, how in dict(loss=dict(loss=loss), setting=dict(stable_targets=True)).items():
        train(EDMPrecond(UNet(1, channels=16, num_labels=10), data.stats().std), data, tmp_path / out, images=32, batch=16, precision="fp32", progress=False, **how)
    kept, chosen = (json.loads((tmp_path / out / "config.json").read_text())["training"] for out in ("loss", "setting"))
    assert kept["loss"] == f"StableTargetLoss(EDMLoss(noise=LogNormal(P_mean=-0.6, P_std=1.2), sigma_data={data.stats().std}), Empirical)"
    assert chosen["stable_targets"] is True and chosen["loss"] is None


def test_what_a_training_refuses(tmp_path):
    data = digits()
    with pytest.raises(ValueError, match="stable_targets must be False with augment"): trainer(augment=Augment())
    with pytest.raises(ValueError, match="loss must be a DenoisingLoss"): trainer(loss=lambda denoise, x0, **how: x0.flatten(1).mean(1))
    mapped = MappedData(data.images.numpy(), name="large")
    with pytest.raises(ValueError, match="stable_targets needs the data in memory, .* large stays on disk"):
        train(EDMPrecond(UNet(1, channels=16), 0.5), mapped, tmp_path / "run", stable_targets=True, images=16, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    data, labels = normal(50, 1, 4, 4).float(), torch.arange(50) % 5
    here, there = (StableTargetLoss(PLAIN, Empirical(data.to(d), labels.to(d))) for d in ("cpu", "cuda"))
    sigma = torch.full((50,), 0.7)
    torch.testing.assert_close(there.target(data.cuda(), data.cuda(), sigma.cuda(), labels=labels.cuda()).cpu(), here.target(data, data, sigma, labels=labels), rtol=1e-5, atol=1e-5)
