"Preconditioning and the weighted loss."
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_edm.noise import LogNormal
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.precond import EDMLoss, EDMPrecond

FOLDER = Path(__file__).parent / "golden"
COEFFS, LOSSES = ({k: torch.from_numpy(v) for k, v in np.load(FOLDER / f).items()} for f in ("edm_coeffs.npz", "edm_losses.npz"))

sigmas, sizes = st.floats(1e-3, 1e3), st.floats(0.05, 20)


def seeded(seed): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=seeded(seed), dtype=dtype)
def zeros(x, c_noise, **cond): return torch.zeros_like(x)


class Net(nn.Module):
    "Remembers what it was given."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
    def forward(self, x, c_noise, **cond):
        self.x, self.c_noise, self.cond = x, c_noise, cond
        return self.w * x


# Coefficients

def test_golden_coefficients():
    names = ("c_skip", "c_out", "c_in", "c_noise")
    for name, c in zip(names, EDMPrecond(zeros, 0.5).coefs(COEFFS["sigma"])):
        torch.testing.assert_close(c, COEFFS[f"EDMPrecond.sd0.5.{name}"], rtol=1e-10, atol=1e-14)    # rounding; c_skip falls to 4e-5


def test_golden_weight():
    torch.testing.assert_close(EDMLoss(sigma_data=0.5).weight(COEFFS["sigma"]), COEFFS["EDMLoss.weight.sd0.5"], rtol=1e-10, atol=0)


@settings(max_examples=200, deadline=None)
@given(sigma=sigmas, sd=sizes)
def test_three_demands(sigma, sd):
    s = torch.tensor(sigma, dtype=torch.float64)
    c_skip, c_out, c_in, _ = (c.item() for c in EDMPrecond(zeros, sd).coefs(s))
    assert math.isclose(c_in**2 * (sd**2 + sigma**2), 1, rel_tol=1e-12)                            # unit input
    size = lambda c: (1 - c)**2 * sd**2 + c**2 * sigma**2
    assert math.isclose(size(c_skip), c_out**2, rel_tol=1e-6)                                      # unit target; 1 - c_skip cancels
    assert all(size(c_skip * f) >= size(c_skip) * (1 - 1e-9) for f in (0., 0.9, 0.99, 1.01, 1.1))  # least amplification
    assert math.isclose(EDMLoss(sigma_data=sd).weight(s) * c_out**2, 1, rel_tol=1e-12)             # unit weight on F


@settings(max_examples=50, deadline=None)
@given(sigma=sigmas, sd=sizes, seed=st.integers(0, 1000))
def test_zero_network_is_the_exact_denoiser_of_gaussian_data(sigma, sd, seed):
    x = randn(3, 2, 4, seed=seed) * (sd**2 + sigma**2)**0.5
    exact = Gaussian(torch.zeros(2, 4, dtype=torch.float64), sd)(x, sigma)
    torch.testing.assert_close(EDMPrecond(zeros, sd)(x, sigma), exact, rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None)
@given(sigma=sigmas, sd=sizes)
def test_network_that_says_the_target_gives_the_clean_image(sigma, sd):
    x0, n = randn(4, 3, seed=1) * sd, randn(4, 3, seed=2)
    total = (sigma**2 + sd**2)**0.5
    target = sigma / total * x0 / sd - sd / total * n    # the rotation by arctan(sigma / sd)
    D = EDMPrecond(lambda x, c_noise: target, sd)(x0 + sigma * n, sigma)
    torch.testing.assert_close(D, x0, rtol=0, atol=1e-13 * (sd + sigma))    # rounding of x, whose size is sd + sigma


# The wrapper

@pytest.mark.parametrize("sigma", [0.7, torch.tensor(0.7), torch.tensor([0.7]), torch.full((5,), 0.7)], ids=["float", "0-d", "(1,)", "(B,)"])
def test_what_the_network_gets(sigma):
    net, x, labels = Net(), randn(5, 1, 4, 4), torch.arange(5)
    D = EDMPrecond(net, 0.5)(x, sigma, labels=labels)
    assert net.x.dtype == net.c_noise.dtype == torch.float32 and D.dtype == torch.float64
    assert net.c_noise.shape == (5,) and net.cond["labels"] is labels
    torch.testing.assert_close(net.c_noise, torch.full((5,), math.log(0.7) / 4))
    torch.testing.assert_close(net.x, (x / (0.49 + 0.25)**0.5).float())


def test_each_sample_has_its_own_level():
    x, s = randn(4, 1, 3, 3), torch.tensor([0.01, 0.3, 2., 80.], dtype=torch.float64)
    model = EDMPrecond(lambda x, c_noise: x.tanh() * c_noise.exp().reshape(-1, 1, 1, 1))
    one_by_one = torch.cat([model(x[i:i + 1], s[i].item()) for i in range(4)])
    torch.testing.assert_close(model(x, s), one_by_one, rtol=1e-14, atol=0)


class Bare(nn.Module):
    "A module without parameters, so without a dtype of its own."
    def forward(self, x, c_noise): return x


@pytest.mark.parametrize("net", [zeros, lambda x, c: 0 * x, Bare(), Net()], ids=["function", "lambda", "bare", "module"])
def test_any_callable_is_a_network(net):
    model = copy.deepcopy(EDMPrecond(net)).eval().requires_grad_(False)
    for dtype in (torch.float32, torch.float64): assert model(randn(2, 3, dtype=dtype), 1.).dtype == dtype
    assert model.double()(randn(2, 3, dtype=torch.float32), 1.).dtype == torch.float32    # the state decides, not the network


def test_only_the_network_computes_in_its_dtype():
    x = randn(6, 5, seed=3) * 80
    for sigma in (0.002, 80.):
        exact = EDMPrecond(lambda x, c: x, 0.5)(x, sigma)
        D = EDMPrecond(Net().to(torch.bfloat16), 0.5)(x, sigma)
        c_out, c_in = sigma * 0.5 / (sigma**2 + 0.25)**0.5, 1 / (sigma**2 + 0.25)**0.5
        # F = c_in x rounded to bfloat16's 8 bits, so D is off by c_out times that and no more
        assert ((D - exact).abs() <= 2**-8 * c_out * c_in * x.abs() + 1e-12).all() and (D != exact).any()


def test_gradients_reach_network_and_input():
    model, x = EDMPrecond(Net()), randn(2, 3).requires_grad_()
    model(x, 0.5).sum().backward()
    c_skip, c_out, c_in, _ = model.coefs(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(x.grad, (c_skip + c_out * c_in).expand(2, 3), rtol=1e-6, atol=0)    # the network's share is float32
    assert model.net.w.grad is not None


def test_no_value_is_looked_at_on_a_device():
    "Tensors on the meta device hold no values, so anything that would make a GPU answer fails there."
    model, x = EDMPrecond(Net()).to("meta"), torch.zeros(3, 1, 4, 4, device="meta")
    sigma = torch.ones(3, device="meta")
    assert model(x, sigma).shape == x.shape
    assert EDMLoss()(model, x, sigma=sigma).shape == EDMLoss()(model, x).shape == (3,)


def test_works_inside_vmap_and_compile():
    model, x, s = EDMPrecond(lambda x, c: x.tanh()), randn(4, 3), torch.tensor([0.1, 0.5, 1., 9.], dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(lambda x, s: model(x[None], s)[0])(x, s), model(x, s))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x, s: model(x[None], s)[0]))(x, s)
    assert jacobian.shape == (4, 3, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)    # a look at a value would break the graph
    torch.testing.assert_close(compiled(x, s), model(x, s))


@pytest.mark.parametrize("sigma", [0., -1., math.nan, math.inf, 0, torch.tensor(0.), torch.tensor([1., -1.]), torch.tensor([math.nan, 1.]), torch.tensor([1., math.inf])], ids=str)
def test_wrapper_refuses_sigma(sigma):
    with pytest.raises(ValueError, match="sigma"): EDMPrecond(zeros)(randn(2, 3), sigma)


@pytest.mark.parametrize("make", [lambda sd: EDMPrecond(zeros, sd), lambda sd: EDMLoss(sigma_data=sd)], ids=["wrapper", "loss"])
@pytest.mark.parametrize("sd", [0., -0.5, math.nan, math.inf])
def test_refuses_sigma_data(make, sd):
    with pytest.raises(ValueError, match="sigma_data"): make(sd)


def test_wrapper_refuses_integers_and_wrong_shapes():
    with pytest.raises(ValueError, match="uint8"): EDMPrecond(zeros)(torch.zeros(2, 3, dtype=torch.uint8), 1.)
    with pytest.raises(ValueError, match=r"\(2, 1\)"): EDMPrecond(lambda x, c: x[:, :1])(randn(2, 3), 1.)
    with pytest.raises(ValueError, match="sigma"): EDMPrecond(zeros)(randn(2, 3), torch.ones(3))


# The loss

@pytest.mark.parametrize("run, sd", [("EDMLoss", 0.5), ("EDMLoss_alt", 0.7)])
def test_golden_loss(run, sd):
    p = Mixture(LOSSES["img.means"], LOSSES["img.stds"], LOSSES["img.weights"])
    found = EDMLoss(sigma_data=sd)(p, LOSSES["y"], sigma=LOSSES[f"{run}.sigma"], n=LOSSES[f"{run}.noise"])
    torch.testing.assert_close(found, LOSSES[f"{run}.loss"].flatten(1).mean(1), rtol=1e-10, atol=0)    # golden: per pixel


@pytest.mark.parametrize("run, noise", [("EDMLoss", LogNormal()), ("EDMLoss_alt", LogNormal(-0.6, 1.5))])
def test_golden_noise_levels(run, noise, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda n, generator=None: LOSSES[f"{run}.draw"])
    torch.testing.assert_close(noise.sample(12), LOSSES[f"{run}.sigma"], rtol=1e-12, atol=0)


def test_loss_by_hand():
    x0, n, sigma = torch.tensor([[1., 3.], [0., 0.]]), torch.tensor([[2., 0.], [1., 1.]]), torch.tensor([1., 2.])
    found = EDMLoss(sigma_data=0.5)(lambda x, s: x, x0, sigma=sigma, n=n)
    # weights (1 + .25) / .25 = 5 and (4 + .25) / 1 = 4.25; mean squares of sigma n: 2 and 4
    assert found.tolist() == pytest.approx([10., 17.], rel=1e-6)


def test_fresh_network_has_loss_one():
    "At every level, for any data of mean 0 and standard deviation sigma_data: here +-0.8, far from Gaussian."
    x0 = 0.8 * torch.randint(0, 2, (40_000, 4), generator=seeded(0)).double().mul(2).sub(1)
    for sigma in (0.002, 0.1, 0.8, 5., 80.):
        losses = EDMLoss(sigma_data=0.8)(EDMPrecond(zeros, 0.8), x0, sigma=torch.full((len(x0),), sigma), generator=seeded(1))
        assert abs(losses.mean() - 1) < 5 * losses.std() / len(x0)**0.5 + 1e-6    # 5 standard errors; the levels are float32


def test_data_with_a_mean():
    x0, sd, mean = 0.5 * randn(100_000, 2, seed=4) + 0.3, 0.5, 0.3
    for sigma in (0.01, 0.5, 20.):
        losses = EDMLoss(sigma_data=sd)(EDMPrecond(zeros, sd), x0, sigma=torch.full((len(x0),), sigma), generator=seeded(1))
        expected = 1 + sigma**2 / (sigma**2 + sd**2) * (mean / sd)**2
        assert abs(losses.mean() - expected) < 5 * losses.std() / len(x0)**0.5 + 1e-6


@settings(max_examples=25, deadline=None)
@given(sigma=st.floats(0.05, 3), amount=st.floats(0.05, 0.3), kind=st.sampled_from(["scale", "shift", "wave", "sigma"]))
def test_exact_denoiser_is_the_minimiser(sigma, amount, kind):
    p = Mixture(torch.tensor([[-0.6, 0.], [0.6, 0.3]], dtype=torch.float64), 0.15)
    other = {"scale": lambda x, s: (1 + amount) * p(x, s), "shift": lambda x, s: p(x, s) + amount,
             "wave": lambda x, s: p(x, s) + amount * (3 * x).sin(), "sigma": lambda x, s: p(x, (1 + 3 * amount) * s)}[kind]
    x0, n = p.sample(20_000, seeded(0)), randn(20_000, 2, seed=1)
    level = torch.full((len(x0),), sigma, dtype=torch.float64)
    loss = EDMLoss()
    extra = loss(other, x0, sigma=level, n=n) - loss(p, x0, sigma=level, n=n)
    x = x0 + sigma * n
    price = loss.weight(level) * (other(x, sigma) - p(x, sigma)).square().mean(1)
    assert (extra - price).mean().abs() < 6 * (extra - price).std() / len(x0)**0.5    # 6 standard errors of the cross term
    assert price.mean() > 0


def test_random_draws_can_be_repeated_and_injected():
    p, x0 = Mixture(torch.zeros(1, 3), 0.5), randn(6, 3, dtype=torch.float32)
    loss, state = EDMLoss(), torch.get_rng_state()
    a = loss(p, x0, generator=seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, loss(p, x0, generator=seeded(5))) and not torch.equal(a, loss(p, x0, generator=seeded(6)))
    g = seeded(5)    # sigma is drawn first, then n
    sigma = loss.noise.sample(6, g)
    n = torch.randn(x0.shape, generator=g)
    assert torch.equal(a, loss(p, x0, sigma=sigma, n=n)) and a.shape == (6,)


def test_conditioning_reaches_the_denoiser():
    seen = {}
    def denoise(x, sigma, **cond):
        seen.update(cond, sigma=sigma)
        return x
    EDMLoss()(denoise, randn(4, 2, dtype=torch.float32), labels=torch.arange(4))
    assert seen["labels"].tolist() == [0, 1, 2, 3] and seen["sigma"].shape == (4,)


def test_a_bad_pixel_spoils_its_own_sample_alone():
    x0 = randn(4, 1, 3, 3)
    x0[2, 0, 1, 1] = math.nan
    assert EDMLoss()(EDMPrecond(Net()), x0).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16])
def test_loss_refuses_dtypes(dtype):
    with pytest.raises(ValueError, match="x0 must be float32 or float64"): EDMLoss()(EDMPrecond(zeros), torch.zeros(2, 3, dtype=dtype))


def test_loss_refuses():
    x0 = randn(4, 3)
    with pytest.raises(ValueError, match=r"n must have x0's shape \(4, 3\)"): EDMLoss()(EDMPrecond(zeros), x0, n=torch.zeros(3))
    with pytest.raises(ValueError, match="denoise's output"): EDMLoss()(lambda x, s: x[:, :1], x0)
    with pytest.raises(ValueError, match="sigma must be positive"): EDMLoss()(lambda x, s: x, x0, sigma=torch.zeros(4))
    with pytest.raises(ValueError, match=r"\(4,\)"): EDMLoss()(lambda x, s: x, x0, sigma=torch.ones(3))


def test_loss_is_a_frozen_value():
    assert EDMLoss() == EDMLoss(LogNormal(), 0.5) and hash(EDMLoss()) == hash(EDMLoss())
    with pytest.raises(AttributeError): EDMLoss().sigma_data = 1.
