"The average of a training run: its closed form, half-life, ramp, buffers, order, and what is refused."
import math

import pytest
import torch
from torch import nn

from ddpm_edm.ema import EMA, ema_beta


def moved(net, seed):
    "Move the weights at random, as an optimizer's step would."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.is_floating_point(): p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net


@pytest.mark.parametrize("halflife", [100., 1234.5])
def test_beta_is_a_half_life_for_any_batch(halflife):
    for batch in (1, 7, 64): assert ema_beta(batch, batch, halflife, None)**(halflife / batch) == pytest.approx(0.5, abs=1e-12)
    small, large = ema_beta(16, 16, halflife, None), ema_beta(64, 64, halflife, None)
    assert small**4 == pytest.approx(large, abs=1e-14)                                          # what is left of before
    assert sum((1 - small) * small**i for i in range(4)) == pytest.approx(1 - large, abs=1e-14)    # what is taken in


def test_average_of_a_piecewise_constant_path_does_not_depend_on_the_batch():
    net = nn.Linear(3, 2).double()
    fine, coarse = EMA(net, 500, rampup=None), EMA(net, 500, rampup=None)
    for k in range(10):
        moved(net, k)
        for i in range(8): fine.update(net, 8, 64 * k + 8 * (i + 1))
        coarse.update(net, 64, 64 * (k + 1))
    torch.testing.assert_close(fine.model.weight, coarse.model.weight, atol=1e-12, rtol=0)    # float64 rounding


def test_ramp():
    assert ema_beta(64, 10_000, 4000) == 0.5**(64 / 500)         # 5% of the images seen
    assert ema_beta(64, 80_000, 4000) == 0.5**(64 / 4000)        # where the ramp ends
    assert ema_beta(64, 10_000, 4000, None) == 0.5**(64 / 4000)
    assert ema_beta(64, 64, 4000) == pytest.approx(2**-20, rel=1e-12)    # first step: a millionth of the start is left
    assert ema_beta(64, 64, 0) == ema_beta(64, 64, 0, None) == ema_beta(64, 64, 100, 0) == 0
    assert ema_beta(64, 64, math.inf, None) == 1


def test_ramp_is_a_power_law():
    "A ramp alone: weights made in the first part p of the run keep p^(ln 2 / ramp)."
    for part in (0.5, 0.9):
        kept = math.prod(ema_beta(10, s, math.inf, 0.05) for s in range(int(part * 1e5) + 10, 100_001, 10))
        assert kept == pytest.approx(part**(math.log(2) / 0.05), rel=2e-3)    # sum of 1/j against ln: 1/(2k) = 1e-4, times 14


def test_beta_of_the_class_is_the_function():
    for rampup in (None, 0.05):
        ema = EMA(nn.Linear(1, 1), 300, rampup)
        for seen in (20, 2000, 50_000): assert ema.beta(20, seen) == ema_beta(20, seen, 300, rampup)


@pytest.mark.parametrize("rampup", [None, 0.05])
def test_closed_form(rampup):
    net = nn.Linear(3, 2).double()
    ema, path, betas = EMA(net, 300, rampup), [net.weight.detach().clone()], []
    for k in range(1, 31):
        ema.update(moved(net, k), 20, 20 * k)
        path.append(net.weight.detach().clone())
        betas.append(ema_beta(20, 20 * k, 300, rampup))
    shares = [math.prod(betas)] + [(1 - b) * math.prod(betas[i + 1:]) for i, b in enumerate(betas)]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(ema.model.weight, sum(s * w for s, w in zip(shares, path)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("halflife, rampup", [(0, None), (0, 0.05), (100, 0), (1e-9, None)])
def test_no_lag(halflife, rampup, dtype):
    "With half-life 0 the average is the weights, in every bit, after each update."
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    ema = EMA(net, halflife, rampup)
    for k in range(1, 6):
        ema.update(moved(net, k), 1, k)
        assert all(torch.equal(a, b) for a, b in zip(ema.model.parameters(), net.parameters()))


def test_variance_of_independent_weights():
    net, beta, values = nn.Linear(2000, 1, bias=False).double(), ema_beta(1, 1, 10, None), []
    ema = EMA(net, 10, None)
    g = torch.Generator().manual_seed(0)
    for k in range(1, 401):
        with torch.no_grad(): net.weight.copy_(torch.randn(1, 2000, generator=g, dtype=torch.float64))
        ema.update(net, 1, k)
        if k > 100: values.append(ema.model.weight.clone())
    wanted = (1 - beta) / (1 + beta)
    # 2000 chains of 300 steps with about 30 steps of memory: 20,000 independent values, relative deviation 1%
    assert torch.stack(values).square().mean().item() == pytest.approx(wanted, rel=0.05)


class Odd(nn.Module):
    "Every kind of tensor that a network can hold."
    def __init__(self):
        super().__init__()
        self.layer, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.whole = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
        self.wave = nn.Parameter(torch.tensor([1 + 2j]))
        self.frozen = nn.Parameter(torch.tensor([0.1, 0.7]), requires_grad=False)
        self.tied = self.layer.weight
        self.register_buffer("table", torch.arange(1000))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("coarse", torch.tensor([0.1], dtype=torch.bfloat16))

    def forward(self, x): return self.bn(self.layer(x))


def test_buffers_are_copied_and_integers_kept():
    net = Odd()
    ema = EMA(net, 1000, None)
    weight, wave = net.layer.weight.detach().clone(), net.wave.detach().clone()
    for k in range(1, 31):
        net(torch.randn(8, 4, generator=torch.Generator().manual_seed(k)))    # BatchNorm counts and gathers
        with torch.no_grad():
            net.layer.weight += 1; net.wave += 1j; net.whole += 1
            net.scratch += 0.5; net.mask.logical_not_()
        ema.update(net, 20, 20 * k)
    for (name, mine), its in zip(ema.model.named_buffers(), net.buffers()):
        assert torch.equal(mine, its) and mine.dtype == its.dtype, name
    assert ema.model.bn.num_batches_tracked == 30
    assert torch.equal(ema.model.whole, torch.tensor([31, 32]))
    assert torch.equal(ema.model.frozen, net.frozen)               # lerp between equal numbers is exact
    assert ema.model.tied is ema.model.layer.weight                # averaged once, not twice
    beta = 0.5**(20 / 1000)
    late = 30 - sum((1 - beta) * beta**(30 - k) * k for k in range(1, 31))
    torch.testing.assert_close(ema.model.layer.weight, weight + 30 - late, atol=1e-4, rtol=0)    # float32
    torch.testing.assert_close(ema.model.wave, wave + (30 - late) * 1j, atol=1e-4, rtol=0)


def test_model_is_a_copy_in_evaluation_mode_without_gradients():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    ema = EMA(net, 100)
    net(torch.ones(1, 4)).sum().backward()
    kept = [p.clone() for p in net.parameters()]
    ema.update(net, 10, 10)
    assert net.training and all(p.requires_grad and p.grad is not None for p in net.parameters())    # the network is left alone
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), kept))
    assert not any(m.training for m in ema.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in ema.model.parameters())
    assert not {p.data_ptr() for p in ema.model.parameters()} & {p.data_ptr() for p in net.parameters()}


def test_precision_must_be_enough():
    with pytest.raises(ValueError, match="1.weight is torch.bfloat16"): EMA(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()), 10)
    with pytest.raises(ValueError, match="float16"): EMA(nn.Linear(2, 2).half(), 10)


@pytest.mark.parametrize("settings, wanted", [(dict(halflife=-1), "halflife must be 0 or more"), (dict(halflife=math.nan), "halflife"),
                                              (dict(halflife=1, rampup=-0.1), "rampup must be 0 or more"), (dict(halflife=1, rampup=math.nan), "rampup")])
def test_settings_refused(settings, wanted):
    with pytest.raises(ValueError, match=wanted): EMA(nn.Linear(2, 2), **settings)
    with pytest.raises(ValueError, match=wanted): ema_beta(1, 1, **settings)


@pytest.mark.parametrize("batch, seen, wanted", [(0, 10, "batch must be at least 1, got 0"), (-1, 10, "batch"), (10, 0, "at least 10, got 0"), (10, 9, "at least 10, got 9")])
def test_updates_refused(batch, seen, wanted):
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=wanted): EMA(net, 100).update(net, batch, seen)


@pytest.mark.parametrize("other", [nn.Linear(4, 1), nn.Linear(4, 4, bias=False), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.BatchNorm1d(4)])
def test_other_networks_refused_and_nothing_changed(other):
    ema = EMA(nn.Linear(4, 4), 0)
    before = ema.model.weight.clone()
    with pytest.raises(ValueError, match="network that was copied"): ema.update(other, 1, 1)
    assert torch.equal(ema.model.weight, before)
