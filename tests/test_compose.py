"Guidance, its interval, a measurement and any solver in one call: pieces that know nothing of each other."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.consistency import consistency_step
from ddpm_edm.core import seeded_noise
from ddpm_edm.edm import Churn
from ddpm_edm.guidance import Guided, Thresholded
from ddpm_edm.inverse import Downsample, Mask, Matrix, PiGDM, Posterior, Replaced, Tweedie, dps, keep, repaint
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.solvers import (adams_bashforth, deis, dpm_solver, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, dpmpp_sde, euler, euler_ancestral,
                              generate, heun, sample, second_order, unipc)
from ddpm_edm.unet import UNet

ODE = {"euler": euler, "heun": heun, "midpoint": second_order(0.5), "adams_bashforth": adams_bashforth(3), "dpmpp_2m": dpmpp_2m, "dpmpp_3m": dpmpp_3m,
       "deis": deis(3), "unipc": unipc(3), "dpm_solver": dpm_solver(2)}
RANDOM = {"ancestral": euler_ancestral(), "dpmpp_2m_sde": dpmpp_2m_sde(), "dpmpp_3m_sde": dpmpp_3m_sde(), "dpmpp_sde": dpmpp_sde(), "repaint": repaint(euler_ancestral(), 2),
          "consistency": consistency_step}
METHODS = {"Replaced": Replaced, "PiGDM": PiGDM, "Tweedie": Tweedie}


@pytest.fixture(scope="module")
def net():
    "A small conditional network with random weights in float32."
    torch.manual_seed(0)
    net = EDMPrecond(UNet(1, 32, mults=(1,), attention=[], num_labels=3), 0.5)
    for p in net.parameters(): p.data += 0.03 * torch.randn_like(p)
    return net.eval().requires_grad_(False)


def restored(net, method, op, y, w, interval): return METHODS[method](Thresholded(Guided(net, w, interval=interval)), op, y)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(ODE | RANDOM)), st.sampled_from(sorted(METHODS)), st.floats(0, 4), st.sampled_from([(0, 100), (0.1, 5), (0.5, 0.6)]), st.integers(0, 2**16), st.integers(1, 6))
def test_known_pixels_are_bit_equal_and_the_rest_is_drawn(net, solver, method, w, interval, seed, steps):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(8, 8, generator=g) < 0.5
    mask[0, 0], mask[7, 7] = True, False
    y, labels = torch.rand(1, 1, 8, 8, generator=g) * 2 - 1, torch.tensor([0, -1, 2])
    op = Mask(mask)
    D, step = restored(net, method, op, y, w, interval), keep((ODE | RANDOM)[solver], op, y)
    torch.manual_seed(seed)    # for the solvers that draw
    x = generate(D, [3, 1, 4], (1, 8, 8), karras_sigmas(steps), step, labels=labels)
    assert torch.equal(x[..., mask], y[..., mask].expand(3, 1, -1))
    assert x.isfinite().all() and (x[0] - x[2])[0, ~mask].abs().max() > 1e-6
    if solver in ODE:    # the batch does not matter; float32 networks round differently in another one, and guidance amplifies it
        torch.testing.assert_close(generate(D, [3, 1, 4], (1, 8, 8), karras_sigmas(steps), step, labels=labels, batch=2), x, atol=2e-3, rtol=0)


@pytest.mark.parametrize("solver", sorted(ODE))
@pytest.mark.parametrize("method", sorted(METHODS))
def test_small_picture_is_kept_by_super_resolution(net, solver, method):
    op, y = Downsample(2), torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5
    D = restored(net, method, op, y, 2., (0.1, 5.))
    x = sample(D, seeded_noise([0, 1], (1, 8, 8)), karras_sigmas(5), keep(ODE[solver], op, y), labels=torch.tensor([1, 2]))
    torch.testing.assert_close(op(x), y.double(), atol=1e-6, rtol=0)    # float64 state, float32 y


def test_dps_is_a_step_that_takes_a_guided_denoiser(net):
    mask = torch.arange(64).reshape(8, 8) % 3 > 0
    op, y = Mask(mask), torch.zeros(1, 1, 8, 8)
    x = sample(Guided(net, 2., interval=(0.1, 5.)), seeded_noise([0, 1], (1, 8, 8)), karras_sigmas(6), keep(dps(heun, op, y, 0.1), op, y), labels=torch.tensor([1, -1]))
    assert torch.equal(x[..., mask], torch.zeros_like(x[..., mask])) and x.isfinite().all()


def test_guidance_and_measurement_are_exact_together():
    "Classes that are Gaussian: w = 1 picks the class, and Tweedie's covariance makes the posterior of that class exact."
    classes = [Gaussian(torch.tensor(m, dtype=torch.float64), s) for m, s in (([0., 1., 0.], 0.5), ([2., 0., -1.], 0.8))]
    mixture = Mixture(torch.stack([c.mean for c in classes]), torch.tensor([0.5, 0.8], dtype=torch.float64))
    def denoise(x, sigma, labels):
        D = mixture(x, sigma)
        for k, c in enumerate(classes): D = torch.where(labels[:, None] == k, c(x, sigma), D)
        return D
    op = Matrix(torch.tensor([[1., 2., -1.], [0., 1., 1.]], dtype=torch.float64), (3,), noise=0.3)
    y, x, labels = torch.tensor([[0.4, -0.7]], dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    both = Tweedie(Guided(denoise, 1.), op, y, iterations=3)(x, 0.9, labels=labels)
    for k, c in enumerate(classes):
        exact = Posterior(Mixture(c.mean[None], c.std[0]), op, y)(x, 0.9)
        torch.testing.assert_close(both[labels == k], exact[labels == k], atol=1e-8, rtol=0)


@pytest.mark.parametrize("solver", sorted(ODE))
def test_churn_guidance_and_measurement(net, solver):
    op, y = Mask(torch.arange(64).reshape(8, 8) % 3 > 0), torch.zeros(1, 1, 8, 8)
    D = restored(net, "PiGDM", op, y, 2., (0.1, 5.))
    x = sample(D, seeded_noise([0, 1], (1, 8, 8)), karras_sigmas(6), keep(ODE[solver], op, y), churn=Churn(6, 3.), labels=torch.tensor([1, -1]))
    assert torch.equal(x[..., op.mask], torch.zeros_like(x[..., op.mask])) and x.isfinite().all()
