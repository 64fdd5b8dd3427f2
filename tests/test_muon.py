"Muon: against decompositions and torch's own, what it leaves alone, and in a training that is resumed, broken or kept in channels last."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_edm.data import digits
from ddpm_edm.muon import Muon, is_matrix, orthogonalize
from ddpm_edm.noise import LogNormal
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.train import Settings, Trainer, _restore, _state
from ddpm_edm.unet import UNet

torch.set_num_threads(1)


def normal(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.floats(-6, 6))
def test_orthogonalize_keeps_directions(m, k, seed, power):
    "U and V stay; every singular value above a hundredth of the Frobenius norm ends between .68 and 1.13, as on the page; asserted with a margin."
    x = normal(m, k, seed=seed) * 10**power
    got, (U, s, Vh) = orthogonalize(x), torch.linalg.svd(x, full_matrices=False)
    inner = U.T @ got @ Vh.T
    torch.testing.assert_close(inner, torch.diag(inner.diag()), rtol=0, atol=1e-9)    # rounding of five rounds
    large = s > 0.01 * x.norm() + 1e-6    # the 1e-7 beside the norm must not matter
    assert ((inner.diag()[large] > 0.65) & (inner.diag()[large] < 1.25)).all()


def test_equals_torchs_muon_on_matrices():
    "torch orthogonalizes in bfloat16, so a step agrees to about 2^-8 of its size."
    theirs = getattr(torch.optim, "Muon", None)
    if theirs is None: pytest.skip("torch has Muon from 2.9 on")
    for shape in ((32, 80), (80, 32), (16, 16)):
        a, b = (nn.Parameter(normal(*shape).float()) for _ in range(2))
        one, two = Muon([a], 0.05, weight_decay=0.1), theirs([b], 0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for seed in range(4):
            before = a.detach().clone()
            a.grad, b.grad = (normal(*shape, seed=seed).float() for _ in range(2))
            one.step(), two.step()
            assert (a - b).norm() < 0.02 * (seed + 1) * (a - before).norm()    # differences of the steps add up


def test_what_is_no_matrix_goes_by_adamw():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3), nn.GroupNorm(4, 32), nn.Conv2d(32, 3, 1))
    a, b = model(), model()
    assert [is_matrix(p) for p in a.parameters()] == [False, False, True, False, False, False, False, False]
    small = [p for p in b.parameters() if not is_matrix(p)]
    one, two = Muon(a.parameters(), 0.01, fused=True), torch.optim.AdamW(small, 0.01, betas=(0.9, 0.99), fused=True)
    for seed in range(3):
        for p, q in zip(a.parameters(), b.parameters()): p.grad = q.grad = normal(*p.shape, seed=seed).float()
        one.step(), two.step()
    for p, q in zip(a.parameters(), b.parameters()): assert torch.equal(p, q) != is_matrix(p)


def test_scale_and_what_is_not_finite():
    "As torch's GradScaler tells it: a gradient is divided by its scale; after an overflow nothing changes, not even the average."
    def moved(grad, **told):
        p = nn.Parameter(normal(16, 20))
        o = Muon([p], 0.1, weight_decay=0.5)
        for name, value in told.items(): setattr(o, name, torch.tensor(value))
        p.grad = grad
        o.step()
        return p.detach(), o.state[p]["momentum"]
    grad = normal(16, 20, seed=1)
    for got, want in zip(moved(1024 * grad, grad_scale=1024.), moved(grad)): torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    broken = grad.clone()
    broken[0, 0] = math.inf
    p, momentum = moved(broken, found_inf=1.)
    assert torch.equal(p, normal(16, 20)) and not momentum.any()
    p, momentum = moved(broken)
    assert not p.isfinite().all()    # without a scaler nothing is hidden


def test_parameters_without_gradients_stay():
    p, q = nn.Parameter(normal(16, 16)), nn.Parameter(normal(16, 16))
    q.grad = torch.ones_like(q)
    Muon([p, q], 0.1).step()
    assert torch.equal(p, normal(16, 16)) and not torch.equal(q, normal(16, 16))


def test_closure():
    p = nn.Parameter(normal(16, 16))
    o = Muon([p], 0.1)
    def loss():
        o.zero_grad()
        value = p.square().sum()
        value.backward()
        return value
    first = o.step(loss)
    assert o.step(loss) < first


@pytest.mark.parametrize("bad, name", [(dict(momentum=1.), "momentum"), (dict(momentum=-0.1), "momentum"), (dict(lr=-1.), "learning rate")])
def test_bad_settings(bad, name):
    with pytest.raises(ValueError, match=name): Muon([nn.Parameter(normal(16, 16))], **bad)


# ---- in training ----

def trainer(seed=0, steps=0, **changes):
    data = digits()
    torch.manual_seed(seed)
    how = dict(images=2000, batch=16, lr=1e-3, lr_end=0.02, warmup=0, ema_halflife=100, label_dropout=0.1, noise=LogNormal(), seed=0,
               precision="fp32", optimizer="muon")
    t = Trainer(EDMPrecond(UNet(1, channels=16, num_labels=10), data.stats().std), data, Settings(**how | changes))
    for _ in range(steps): t.step()
    return t


@pytest.mark.parametrize("channels_last", [False, True])
def test_resumed_training_is_the_same(channels_last):
    a, b, c = trainer(steps=6, channels_last=channels_last), trainer(steps=3, channels_last=channels_last), trainer(7, channels_last=channels_last)
    _restore(c, {k: v.clone() for k, v in _state(b).items()})
    for _ in range(3): c.step()
    assert any(k.endswith("/momentum") for k in _state(a))
    for name, value in _state(a).items(): assert torch.equal(value, _state(c)[name]), name


def test_memory_layout_does_not_matter():
    a, b = trainer(steps=4), trainer(steps=4, channels_last=True)
    for p, q in zip(a.denoiser.parameters(), b.denoiser.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=2e-4)    # rounding, times the rate


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_not_finite_moves_nothing(precision):
    "Also if only the first layer, which is AdamW's, or only a matrix has it."
    for which in (0, None):
        t = trainer(steps=2, precision=precision)
        before = {k: v.clone() for k, v in _state(t).items() if k.startswith(("model/", "opt/"))}
        bad = next(p for p in t.denoiser.parameters() if is_matrix(p) == (which is None) and p.ndim > 1)
        update = t._update
        def broken():
            bad.grad.view(-1)[0] = math.nan
            update()
        t._update = broken
        t.step()
        after = _state(t)
        for name, value in before.items():
            assert torch.equal(value, after[name]) or name.endswith("/step"), name
        assert int(t.skipped) == 1
        t._update = update
        t.step()
        assert any(not torch.equal(value, _state(t)[name]) for name, value in before.items() if name.startswith("model/"))
