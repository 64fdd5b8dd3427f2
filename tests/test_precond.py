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

from ddpm_edm.core import convert
from ddpm_edm.noise import LogNormal, LogUniform, VPNoise, alpha_bars, cosine_betas, linear_betas, zero_terminal_snr
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.precond import (DenoisingLoss, EDMLoss, EDMPrecond, IDDPMPrecond, LearnedWeight, MinSNRLoss, Precond, VELoss,
                              VEPrecond, VPLoss, VPPrecond)

FOLDER = Path(__file__).parent / "golden"
# OTHERS: coefficients and losses of the VP, VE and iDDPM wrappers of the authors' program
COEFFS, LOSSES, OTHERS = ({k: torch.from_numpy(v) for k, v in np.load(FOLDER / f).items()} for f in ("edm_coeffs.npz", "edm_losses.npz", "precond.npz"))

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_steps_are_told_in_float32_or_better(dtype):
    "bfloat16 would make 1000 of step 999 and 984 of 981."
    told = []
    class Told(nn.Linear):
        def forward(self, x, c_noise): return told.append(c_noise) or super().forward(x)
    for wrap in (VPPrecond, IDDPMPrecond):
        d = wrap(Told(3, 3).to(dtype))
        for sigma in (0.5, 5., 70.):
            want = d.coefs(torch.tensor(sigma, dtype=torch.float64))[3]
            assert d(randn(2, 3), sigma).dtype == torch.float64
            assert told[-1].dtype == torch.promote_types(dtype, torch.float32) and (told[-1] - want).abs().max() <= 1e-7 * want


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


def test_samples_of_numbers():
    "Samples may be single numbers, (B,), as for the exact denoisers."
    p = Gaussian(torch.tensor(0.), 0.5)
    x0, n, sigma = p.sample(8), randn(8, dtype=torch.float32), torch.full((8,), 0.7)
    loss = EDMLoss()(p, x0, sigma=sigma, n=n)
    torch.testing.assert_close(loss, EDMLoss()(Gaussian(torch.zeros(1), 0.5), x0[:, None], sigma=sigma, n=n[:, None]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16, torch.bfloat16])
def test_loss_refuses_dtypes(dtype):
    with pytest.raises(ValueError, match="x0 must be float32 or float64"): EDMLoss()(EDMPrecond(zeros), torch.zeros(2, 3, dtype=dtype))


def test_loss_refuses():
    x0 = randn(4, 3)
    with pytest.raises(ValueError, match=r"n must have shape \(4, 3\)"): EDMLoss()(EDMPrecond(zeros), x0, n=torch.zeros(3))
    with pytest.raises(ValueError, match="denoise's output"): EDMLoss()(lambda x, s: x[:, :1], x0)
    with pytest.raises(ValueError, match="sigma must be positive"): EDMLoss()(lambda x, s: x, x0, sigma=torch.zeros(4))
    with pytest.raises(ValueError, match=r"\(4,\)"): EDMLoss()(lambda x, s: x, x0, sigma=torch.ones(3))


def test_loss_is_a_frozen_value():
    assert EDMLoss() == EDMLoss(LogNormal(), 0.5) and hash(EDMLoss()) == hash(EDMLoss())
    with pytest.raises(AttributeError): EDMLoss().sigma_data = 1.


# The other wrappers

WRAPPERS = {"VP": VPPrecond, "VE": VEPrecond, "iDDPM": IDDPMPrecond}
ALL = {"EDM": EDMPrecond, **WRAPPERS, "VP.D": lambda net: VPPrecond(net, predicts="D"), "VP.v": lambda net: VPPrecond(net, predicts="v"),
       "iDDPM.v": lambda net: IDDPMPrecond(net, linear_betas(), predicts="v"),
       "own": lambda net: Precond(net, lambda s: (1 / (1 + s), s.sqrt(), 1 + 0 * s, s.log()))}
every_wrapper = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


@pytest.mark.parametrize("name", WRAPPERS)
def test_golden_coefficients_of_others(name):
    found = WRAPPERS[name](zeros).coefs(OTHERS["sigma"])
    for k, c in zip(("c_skip", "c_out", "c_in", "c_noise"), found):
        torch.testing.assert_close(c, OTHERS[f"{name}Precond.{k}"], rtol=1e-10, atol=1e-10)    # rounding; their ln(1 + sigma^2) cancels at small sigma


def test_golden_table_of_iddpm():
    model, s = IDDPMPrecond(zeros), OTHERS["sigma"]
    torch.testing.assert_close(model.u, OTHERS["iDDPMPrecond.u"], rtol=1e-10, atol=0)    # from 20291 to 0.0064 and 0
    assert torch.equal(model.nearest(s), OTHERS["iDDPMPrecond.round_index"])
    torch.testing.assert_close(model.round_sigma(s), OTHERS["iDDPMPrecond.round_sigma"], rtol=1e-10, atol=0)


def test_table_as_the_paper_writes_it():
    M, C_1, C_2 = 200, 0.01, 0.02    # another table than the default
    bar = lambda j: math.sin(math.pi / 2 * j / (M * (C_2 + 1)))**2
    u = [0.]
    for j in range(M, 0, -1): u.append(math.sqrt((u[-1]**2 + 1) / max(bar(j - 1) / bar(j), C_1) - 1))
    found = IDDPMPrecond(zeros, cosine_betas(M, s=C_2, max_beta=1 - C_1)).u
    torch.testing.assert_close(found, torch.tensor(u[::-1], dtype=torch.float64), rtol=1e-9, atol=0)    # 200 roundings, cancelling at the end


@pytest.mark.parametrize("name", ["VPLoss", "VELoss"])
def test_golden_weights_of_others(name):
    weight = {"VPLoss": VPLoss, "VELoss": VELoss}[name]().weight(OTHERS["sigma"])
    torch.testing.assert_close(weight, OTHERS[f"{name}.weight"], rtol=1e-10, atol=0)


RUNS = {"VPLoss": VPLoss(), "VPLoss_alt": VPLoss(VPNoise(1e-3, 15., 0.2)), "VELoss": VELoss(), "VELoss_alt": VELoss(LogUniform(0.01, 50.))}


@pytest.mark.parametrize("run", RUNS)
def test_golden_losses_of_others(run, monkeypatch):
    p = Mixture(LOSSES["img.means"], LOSSES["img.stds"], LOSSES["img.weights"])
    sigma = OTHERS[f"{run}.sigma"]
    found = RUNS[run](p, LOSSES["y"][:4], sigma=sigma[:4], n=OTHERS[f"{run}.noise"])
    torch.testing.assert_close(found, OTHERS[f"{run}.loss"], rtol=1e-10, atol=0)
    monkeypatch.setattr(torch, "rand", lambda n, generator=None, dtype=None: OTHERS[f"{run}.draw"])
    torch.testing.assert_close(RUNS[run].noise.sample(12).double(), sigma, rtol=1e-7, atol=0)    # samples are float32


@settings(max_examples=60, deadline=None)
@given(sigma=sigmas, predicts=st.sampled_from(["eps", "D", "v"]), seed=st.integers(0, 100))
def test_predictions_agree_with_convert(sigma, predicts, seed):
    x, answer = randn(3, 4, seed=seed) * (1 + sigma), randn(3, 4, seed=seed + 1)
    for make in (VPPrecond, IDDPMPrecond):
        D = make(lambda x, c: answer, predicts=predicts)(x, sigma)
        torch.testing.assert_close(D, convert(answer, x, sigma, predicts, "D"), rtol=0, atol=1e-12 * (1 + sigma))    # size of x
    D = VEPrecond(lambda x, c: answer)(x, sigma)
    torch.testing.assert_close(D, convert(answer / sigma, x, sigma, "score", "D"), rtol=0, atol=1e-12 * (1 + sigma))


@settings(max_examples=50, deadline=None)
@given(sigma=sigmas)
def test_v_is_edm_of_unit_variance(sigma):
    s = torch.tensor(sigma, dtype=torch.float64)
    v, edm = VPPrecond(zeros, predicts="v").coefs(s), EDMPrecond(zeros, 1.).coefs(s)
    torch.testing.assert_close(torch.stack(v[:3]), torch.stack([edm[0], -edm[1], edm[2]]), rtol=1e-12, atol=0)


@every_wrapper
@settings(max_examples=15, deadline=None)
@given(sigma=st.floats(0.01, 50))
def test_network_that_says_its_effective_target_gives_the_clean_image(make, sigma):
    x0, n = 0.5 * randn(4, 3, seed=1), randn(4, 3, seed=2)
    c_skip, c_out, c_in, _ = make(zeros).coefs(torch.tensor(sigma, dtype=torch.float64))
    x = x0 + sigma * n
    def net(scaled, c_noise):
        torch.testing.assert_close(scaled, c_in * x, rtol=1e-12, atol=0)
        return (x0 - c_skip * x) / c_out
    torch.testing.assert_close(make(net)(x, sigma), x0, rtol=0, atol=1e-13 * (1 + sigma))    # rounding of x


@every_wrapper
def test_every_wrapper_keeps_the_rules(make):
    net, x, s = Net(), randn(4, 1, 3, 3), torch.tensor([0.01, 0.3, 2., 80.], dtype=torch.float64)
    model = make(net)
    assert list(model.state_dict()) == ["net.w"]
    D = model(x, s, labels=torch.arange(4))
    assert D.dtype == torch.float64 and D.shape == x.shape and net.x.dtype == net.c_noise.dtype == torch.float32
    assert net.c_noise.shape == (4,) and net.cond["labels"].tolist() == [0, 1, 2, 3]
    one_by_one = torch.cat([model(x[i:i + 1], s[i].item()) for i in range(4)])
    torch.testing.assert_close(D, one_by_one, rtol=1e-6, atol=1e-6)    # the network computes in float32
    assert copy.deepcopy(model).half()(x, 1.).dtype == torch.float64
    assert make(Net()).to("meta")(torch.zeros(2, 3, device="meta"), torch.ones(2, device="meta")).shape == (2, 3)
    with pytest.raises(ValueError, match="sigma"): model(x, 0.)
    with pytest.raises(ValueError, match=r"\(4, 1\)"): make(lambda x, c: x[:, 0, 0, :1])(x, 1.)


@every_wrapper
def test_every_wrapper_works_inside_vmap_and_compile(make):
    model, x, s = make(lambda x, c: x.tanh()), randn(4, 3), torch.tensor([0.1, 0.5, 1., 9.], dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(lambda x, s: model(x[None], s)[0])(x, s), model(x, s))
    torch.compiler.reset()    # all wrappers share one forward, and so one limit of recompilations
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x, s), model(x, s))


@settings(max_examples=50, deadline=None)
@given(time=st.floats(1e-3, 1), beta_d=st.floats(1, 30), beta_min=st.floats(0.01, 1), M=st.integers(2, 2000))
def test_vp_time(time, beta_d, beta_min, M):
    sigma = math.sqrt(math.expm1(beta_d / 2 * time**2 + beta_min * time))    # Karras et al. 2022, Table 1
    c_noise = VPPrecond(zeros, beta_d, beta_min, M).coefs(torch.tensor(sigma, dtype=torch.float64))[3]
    assert c_noise.item() == pytest.approx((M - 1) * time, rel=1e-9)    # the logarithm of a large sigma loses digits


def test_half_precision_leaves_the_table_alone():
    model = IDDPMPrecond(Net()).half()
    assert model.u.dtype == torch.float64 and torch.equal(model.u, IDDPMPrecond(zeros).u)


def test_table_rounds_to_its_own_levels():
    model = IDDPMPrecond(zeros, linear_betas(100))
    sigma = ((1 - alpha_bars(linear_betas(100))) / alpha_bars(linear_betas(100))).sqrt()    # step 0, ..., 99
    torch.testing.assert_close(model.c_noise(sigma), torch.arange(100, dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(model.round_sigma(1.001 * sigma), sigma, rtol=1e-9, atol=0)    # no two levels so near
    assert model.c_noise(sigma[:1] / 3).item() == -1                                          # no noise is nearer
    assert model.c_noise(sigma.reshape(4, 25, 1)).shape == (4, 25, 1)


def test_table_that_ends_in_pure_noise():
    model = IDDPMPrecond(zeros, zero_terminal_snr(linear_betas(100)))
    assert model.u[0] == math.inf and model.c_noise(torch.tensor([1e4, 1.])).tolist()[0] == 98
    assert model(randn(2, 3), 80.).isfinite().all()


def test_wrappers_refuse():
    with pytest.raises(ValueError, match="coefs must be a function of sigma"): Precond(zeros)
    for make in (VPPrecond, IDDPMPrecond):
        with pytest.raises(ValueError, match="predicts must be 'eps', 'D' or 'v', got 'x0'"): make(zeros, predicts="x0")
    with pytest.raises(ValueError, match="M must be a whole number.*got 0"): VPPrecond(zeros, M=0)
    for beta_d, beta_min in ((0., 0.1), (19.9, -1.), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="beta_d and beta_min"): VPPrecond(zeros, beta_d, beta_min)
    with pytest.raises(ValueError, match="betas must be"): IDDPMPrecond(zeros, torch.tensor([0.1, 1.5]))


# The other losses

def test_weights_by_hand():
    s = torch.tensor([0.1, 0.5, 2.], dtype=torch.float64)
    assert VPLoss().weight(s).tolist() == VELoss().weight(s).tolist() == pytest.approx([100, 4, 0.25])
    assert MinSNRLoss().weight(s).tolist() == pytest.approx([5, 4, 0.25])
    assert MinSNRLoss(gamma=1.).weight(s).tolist() == pytest.approx([1, 1, 0.25])
    assert VPLoss().noise == MinSNRLoss().noise == VPNoise() and VELoss().noise == LogUniform()


@settings(max_examples=30, deadline=None)
@given(sigma=st.floats(0.01, 50), gamma=st.floats(0.5, 20))
def test_losses_in_terms_of_the_network(sigma, gamma):
    x0, n, says, level = randn(5, 3, seed=1), randn(5, 3, seed=2), randn(5, 3, seed=3), torch.full((5,), sigma, dtype=torch.float64)
    net, by_noise = lambda x, c: says, (says - n).square().mean(1)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=0)    # D - x0 cancels in x of size sigma
    close(VPLoss()(VPPrecond(net), x0, sigma=level, n=n), by_noise)                                     # Ho et al.'s simplified loss
    close(VELoss()(VEPrecond(net), x0, sigma=level, n=n), (says + n).square().mean(1))
    close(MinSNRLoss(gamma=gamma)(VPPrecond(net), x0, sigma=level, n=n), min(1, gamma * sigma**2) * by_noise)
    own = DenoisingLoss(LogNormal(), lambda s: s**3)
    close(own(lambda x, s: says, x0, sigma=level, n=n), sigma**3 * (says - x0).square().mean(1))


@pytest.mark.parametrize("loss", [VPLoss(), VELoss(), MinSNRLoss(), DenoisingLoss(LogUniform(), torch.ones_like)], ids=["VP", "VE", "MinSNR", "own"])
def test_losses_draw_from_their_density(loss):
    x0, seen = randn(4, 2, 3), {}
    def denoise(x, sigma, **cond):
        seen.update(cond, x=x, sigma=sigma)
        return x
    a = loss(denoise, x0, generator=seeded(5), labels=1)
    g = seeded(5)
    sigma = loss.noise.sample(4, g).double()
    n = torch.randn(x0.shape, generator=g, dtype=x0.dtype)
    assert torch.equal(seen["sigma"], sigma) and torch.equal(seen["x"], x0 + sigma[:, None, None] * n) and seen["labels"] == 1
    torch.testing.assert_close(a, (loss.weight(sigma)[:, None, None] * (sigma[:, None, None] * n)**2).flatten(1).mean(1))


def test_losses_refuse():
    for gamma in (0., -1., math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma must be positive"): MinSNRLoss(gamma=gamma)
    with pytest.raises(ValueError, match="noise must have a method sample"): DenoisingLoss(1., torch.ones_like)
    with pytest.raises(ValueError, match="weight must be a function"): DenoisingLoss(LogNormal(), 1.)
    with pytest.raises(ValueError, match="sigma must be positive"): VPLoss()(lambda x, s: x, randn(2, 3), sigma=torch.zeros(2))


# The learned weight

def test_learned_weight_starts_as_the_loss_itself():
    p, x0 = Mixture(torch.zeros(1, 3), 0.5), randn(6, 3, dtype=torch.float32)
    state = torch.get_rng_state()
    learned = LearnedWeight(EDMLoss())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(learned(p, x0, generator=seeded(5)), EDMLoss()(p, x0, generator=seeded(5)))
    assert torch.equal(learned.freqs, LearnedWeight(EDMLoss()).freqs)
    assert learned.u(torch.rand(2, 3) + 0.1).shape == (2, 3) and [n for n, _ in learned.named_parameters()] == ["weights"]


def test_learned_weight_by_hand():
    learned, x0, n = LearnedWeight(EDMLoss(), features=7), randn(5, 3, seed=1), randn(5, 3, seed=2)
    nn.init.normal_(learned.double().weights, generator=seeded(1))
    sigma = torch.tensor([0.01, 0.1, 1., 5., 80.], dtype=torch.float64)
    u = sum((2 / 7)**0.5 * w * (2 * math.pi * (f * sigma.log() / 4 + q)).cos() for f, q, w in zip(learned.freqs, learned.phases, learned.weights))
    base = EDMLoss()(lambda x, s: 0 * x, x0, sigma=sigma, n=n)
    torch.testing.assert_close(learned(lambda x, s: 0 * x, x0, sigma=sigma, n=n), base * (-u).exp() + u)


def test_learned_weight_finds_the_loss():
    "Two noise levels whose losses are 0.2 and 3 exactly: u must become their logarithms, and the divided loss 1."
    sigma = torch.tensor([0.1, 2.], dtype=torch.float64)
    learned = LearnedWeight(DenoisingLoss(LogNormal(), lambda s: torch.where(s < 1, 0.2, 3.))).double()
    x0 = torch.zeros(2, 3, dtype=torch.float64)
    opt = torch.optim.LBFGS(learned.parameters(), max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    def closure():
        opt.zero_grad()
        value = learned(lambda x, s: torch.ones_like(x), x0, sigma=sigma).mean()
        value.backward()
        return value
    opt.step(closure)
    torch.testing.assert_close(learned.u(sigma).exp(), torch.tensor([0.2, 3.], dtype=torch.float64), rtol=1e-4, atol=0)    # the optimizer's tolerance


def test_learned_weight_trains_the_denoiser_too():
    learned, net = LearnedWeight(EDMLoss()), Net()
    learned(EDMPrecond(net), randn(4, 3), generator=seeded(0)).sum().backward()
    assert learned.weights.grad.abs().sum() > 0 and net.w.grad.abs().sum() > 0
    assert learned(EDMPrecond(net), randn(4, 3), sigma=torch.ones(4)).shape == (4,)
    with pytest.raises(ValueError, match="features must be a whole number"): LearnedWeight(EDMLoss(), 0)
    with pytest.raises(ValueError, match="sigma must be positive"): learned(EDMPrecond(net), randn(4, 3), sigma=torch.zeros(4))
