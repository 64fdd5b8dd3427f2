"Guided denoisers against autograd of exact densities, closed forms of what they sample, and what they refuse."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_edm.core import CountNFE, expand, score_of, seeded_noise
from ddpm_edm.edm import Churn
from ddpm_edm.guidance import ClassifierGuided, Guided, Thresholded
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.oracle import Gaussian, Mixture
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.solvers import deis, dpmpp_2m, euler, euler_ancestral, generate, heun, sample, unipc
from ddpm_edm.unet import UNet


def f64(*values): return torch.tensor(values, dtype=torch.float64)


class World:
    "Two classes of two blobs each, with equal shares, known exactly."
    def __init__(self):
        self.classes = Mixture(f64([-1, 0], [-0.5, 1.]), f64(0.3, 0.2)), Mixture(f64([0.2, -0.3], [1, 0.5]), f64(0.25, 0.4), f64(0.7, 0.3))
        self.whole = Mixture(torch.cat([c.means for c in self.classes]), torch.cat([c.stds for c in self.classes]), torch.cat([c.weights for c in self.classes]) / 2)

    def __call__(self, x, sigma, labels=None):
        sigma = expand(sigma, x).flatten().expand(len(x))
        D = self.whole(x, sigma)
        for k, c in enumerate(self.classes):
            if labels is not None and (labels == k).any(): D[labels == k] = c(x[labels == k], sigma[labels == k])
        return D

    def classifier(self, x, sigma): return torch.stack([c.log_prob(x, sigma) for c in self.classes], 1)


WORLD = World()
def draw(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, 2, generator=g, dtype=torch.float64), torch.rand(n, generator=g, dtype=torch.float64) * 2 + 0.1, torch.randint(2, (n,), generator=g)


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 10), st.integers(0, 1000))
def test_score_is_the_gradient_of_the_log_density(w, seed):
    x, sigma, labels = draw(20, seed)
    y = x.clone().requires_grad_()
    log_p = WORLD.whole.log_prob(y, sigma) + w * WORLD.classifier(y, sigma).log_softmax(1)[torch.arange(20), labels]
    wanted = torch.autograd.grad(log_p.sum(), y)[0]
    scale = wanted.abs().max().item() + 1
    for guided in (Guided(WORLD, w), ClassifierGuided(WORLD.whole, WORLD.classifier, w)):
        torch.testing.assert_close(score_of(guided(x, sigma, labels), x, sigma), wanted, atol=1e-9 * scale, rtol=0)    # float64, divided by sigma^2 >= .01


def test_one_call_and_one_estimate_where_that_is_enough():
    x, _, labels = draw(5)
    for guided, sigma, calls, images in ((Guided, 1., 1, 10), (lambda d, w: Guided(d, 1.), 1., 1, 5), (lambda d, w: Guided(d, w, interval=(2, 3)), 1., 1, 5)):
        sizes = []
        def watched(x, sigma, labels): return sizes.append(len(x)) or WORLD(x, sigma, labels)
        guided(watched, 2.)(x, sigma, labels)
        assert (len(sizes), sum(sizes)) == (calls, images)


def test_guide_of_its_own_gets_labels_only_if_there_are_any():
    x, sigma, labels = draw(6)
    seen = []
    def guide(x, sigma, **cond): return seen.append(cond) or torch.zeros_like(x)
    D = Guided(WORLD, 3., guide)(x, sigma, labels)
    torch.testing.assert_close(D, 3 * WORLD(x, sigma, labels), atol=1e-12, rtol=0)
    D = Guided(lambda x, sigma: WORLD(x, sigma), 3., guide)(x, sigma)
    torch.testing.assert_close(D, 3 * WORLD(x, sigma), atol=1e-12, rtol=0)
    assert [sorted(s) for s in seen] == [["labels"], []]


@settings(max_examples=20, deadline=None)
@given(st.floats(1, 8), st.floats(0, 1), st.integers(0, 1000))
def test_rescaled_spread_lies_between(w, rescale, seed):
    "At 1 each picture has the spread of D_c, and in between the spread is in proportion; nothing happens outside the interval."
    g = torch.Generator().manual_seed(seed)
    D_c, D_u = torch.randn(2, 3, 1, 4, 4, generator=g, dtype=torch.float64)
    def spread(D): return D.flatten(1).std(1, correction=0)
    def guided(rescale, sigma=1.): return Guided(lambda x, sigma: D_c, w, guide=lambda x, sigma: D_u, interval=(0.5, 2), rescale=rescale)(D_c, sigma)
    plain = guided(0.)
    torch.testing.assert_close(spread(guided(1.)), spread(D_c), atol=1e-12, rtol=0)
    torch.testing.assert_close(spread(guided(rescale)), (1 - rescale) * spread(plain) + rescale * spread(D_c), atol=1e-12, rtol=0)
    torch.testing.assert_close(guided(1., 3.), D_c, atol=0, rtol=0)
    torch.testing.assert_close(guided(1., torch.tensor([0.1, 1., 3.]))[[0, 2]], D_c[[0, 2]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("rescale", [-0.1, 1.1, math.nan])
def test_refuses_a_rescale_outside_0_and_1(rescale):
    with pytest.raises(ValueError, match="rescale must be from 0 to 1"): Guided(WORLD, 2., rescale=rescale)


def test_rescaling_a_flat_estimate_is_finite():
    assert Guided(lambda x, sigma: 0 * x, 3., guide=lambda x, sigma: 0 * x, rescale=1.)(torch.ones(2, 3), 1.).isfinite().all()


@pytest.mark.parametrize("sigma", [0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((4,), 0.3)])
def test_sigma_in_any_form(sigma):
    x, _, labels = draw(4)
    want = Guided(WORLD, 2.5)(x, torch.full((4,), 0.3, dtype=torch.float64), labels)
    torch.testing.assert_close(Guided(WORLD, 2.5)(x, sigma, labels), want, atol=1e-6, rtol=0)    # 0.3 in float32
    assert torch.equal(Guided(WORLD, 2.5, interval=(0.5, 1))(x, sigma, labels), WORLD(x, sigma, labels))


def test_interval_is_open_below_and_closed_above():
    x, _, labels = draw(3)
    guided, sigma = Guided(WORLD, 3., interval=(0.5, 1.)), f64(0.5, 1., 1.01)
    whole = Guided(WORLD, 3.)
    for s, inside in zip(sigma.tolist(), (False, True, False)):
        wanted = (whole if inside else WORLD)(x, s, labels)
        torch.testing.assert_close(guided(x, s, labels), wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(guided(x, sigma, labels), torch.where(torch.tensor([[False], [True], [False]]), whole(x, sigma, labels), WORLD(x, sigma, labels)), atol=1e-12, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 5), st.floats(0.2, 0.9), st.sampled_from([(0., math.inf), (0.1, 2.), (0.5, 5.), (0., 0.4)]))
def test_spread_of_a_guided_gaussian(w, s, interval):
    "The closed form of the page: [(s^2+low^2)/(1+low^2) (1+high^2)/(s^2+high^2)]^((w-1)/2) times s."
    one, everything = Gaussian(f64(0.7), s), Gaussian(f64(0.), 1.)
    sigmas = torch.cat([karras_sigmas(400, 1e-3, 200.)[:-1], f64(*(t for t in interval if 0 < t < 200))]).unique().flip(0)    # steps end at the edges
    # just above an edge, so that no step crosses it: the interval is open below
    D = Guided(lambda x, sigma, **_: one(x, sigma), w, lambda x, sigma, **_: everything(x, sigma), interval)
    z = f64([-1.], [1.])
    def width(levels):
        x = sample(D, z, torch.cat([levels, f64(0.)]), unipc(3)) if interval == (0., math.inf) else sample(D, z, torch.cat([levels, f64(0.)]), heun)
        return (x[1] - x[0]).item() / 2
    low, high = interval
    factor = ((s**2 + low**2) / (1 + low**2) * ((1 + high**2) / (s**2 + high**2) if high < math.inf else 1)) ** ((w - 1) / 2)
    assert width(sigmas) == pytest.approx(s * factor, rel=0.03 + 0.02 * abs(w - 1))    # an edge costs Heun half a step of the push, (w - 1) ln(1/s) h / sigma, with h about 2% of sigma


def test_any_solver_churn_and_threshold_compose():
    noise, labels = seeded_noise(range(40), (2,), torch.float64), torch.arange(40) % 2
    D = Guided(WORLD, 2., interval=(0.2, 3.))
    fine = sample(Guided(WORLD, 2.), noise, karras_sigmas(200), heun, labels=labels)
    for step, n in ((euler, 2000), (deis(3), 100), (dpmpp_2m, 200), (unipc(3), 100)):
        x = sample(Guided(WORLD, 2.), noise, karras_sigmas(n), step, labels=labels)
        torch.testing.assert_close(x, fine, atol=0.03, rtol=0)    # Euler's first order at 2000 steps; a start near a ridge parts easily
    for more in (dict(step=euler_ancestral()), dict(churn=Churn(20, 10.))):
        x = sample(Thresholded(D), noise, karras_sigmas(20), labels=labels, **more)
        assert x.abs().max() <= 1.5 and x.isfinite().all()


def test_samples_do_not_depend_on_the_batch():
    D, labels = Guided(WORLD, 2.), torch.arange(12) % 2
    a, b = (generate(D, range(12), (2,), karras_sigmas(12), labels=labels, batch=n) for n in (12, 5))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_network_with_labels_is_asked_once_with_all_it_needs():
    torch.manual_seed(0)
    net = EDMPrecond(UNet(1, channels=32, num_labels=3, augment_dim=2), 0.5).eval()
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.02 * torch.randn_like(p))    # a fresh network answers 0 to everybody
    x, labels, augment = torch.randn(4, 1, 8, 8), torch.tensor([0, 2, 1, -1]), torch.randn(4, 2)
    count = CountNFE(net)
    D_c, D_u = net(x, 0.7, labels=labels, augment=augment), net(x, 0.7, augment=augment)
    D = Guided(count, 3.)(x, 0.7, labels, augment=augment)
    torch.testing.assert_close(D, D_u + 3 * (D_c - D_u), atol=1e-4, rtol=0)    # float32, other batch size, times 3
    torch.testing.assert_close(D[3], D_u[3], atol=1e-4, rtol=0)               # label -1: nothing to push towards
    assert count.nfe == 1 and next(Guided(net, 2.).parameters()).device == x.device


def test_classifier_need_not_be_the_only_gradient():
    x, sigma, labels = draw(4)
    with torch.no_grad(): D = ClassifierGuided(WORLD.whole, WORLD.classifier, 2.)(x, sigma, labels)
    torch.testing.assert_close(D, Guided(WORLD, 2.)(x, sigma, labels), atol=1e-9, rtol=0)
    assert not D.requires_grad
    none = torch.full((4,), -1)
    assert torch.equal(ClassifierGuided(WORLD.whole, WORLD.classifier, 2.)(x, sigma, none), WORLD.whole(x, sigma))


@settings(max_examples=20, deadline=None)
@given(st.floats(0.5, 1), st.floats(0.1, 10))
def test_threshold(quantile, size):
    x = size * torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    D = Thresholded(lambda x, sigma: x, quantile)(x, 1.)
    assert D.abs().max() <= 1 + 1e-6 or torch.equal(D, x.clamp(-1, 1)) and size < 1
    for before, after in zip(x, D):
        s = max(before.abs().flatten().quantile(quantile).item(), 1.)
        torch.testing.assert_close(after, before.clamp(-s, s) / s)


@pytest.mark.parametrize("make, wanted", [
    (lambda: Guided(WORLD, math.nan), "w must be a finite number, got nan"),
    (lambda: ClassifierGuided(WORLD, WORLD.classifier, math.inf), "w must be a finite number, got inf"),
    (lambda: Guided(WORLD, 2., interval=(1., 1.)), r"interval must be \(low, high\) with 0 <= low < high, got \(1.0, 1.0\)"),
    (lambda: Guided(WORLD, 2., interval=(-1., 1.)), "0 <= low < high"),
    (lambda: Guided(WORLD, 2., interval=(0.5, math.nan)), "0 <= low < high"),
    (lambda: Guided(EDMPrecond(UNet(1, 32), 0.5), 2.), "num_labels=0; a worse model can be its guide"),
    (lambda: Guided(WORLD, 2.)(torch.zeros(2, 2), 1.), "labels must be given to a guided denoiser"),
    (lambda: Guided(WORLD, 2.)(torch.zeros(2, 2), 1., torch.zeros(3, dtype=torch.int64)), r"labels must be \(2,\), one for each sample, got shape \(3,\)"),
    (lambda: ClassifierGuided(WORLD, WORLD.classifier)(torch.zeros(2, 2), 1., None), "labels must be given"),
    (lambda: ClassifierGuided(WORLD.whole, WORLD.classifier)(torch.zeros(2, 2), 1., torch.tensor([0, 2])), r"labels must be -1 \(none\) to 1, got \[2\]"),
    (lambda: ClassifierGuided(WORLD.whole, WORLD.classifier)(torch.zeros(2, 2), 1., torch.tensor([-2, 0])), r"to 1, got \[-2\]"),
    (lambda: Guided(WORLD, 2.)(torch.zeros(2, 2), 1., torch.zeros(2)), "labels must be integers, got torch.float32"),
    (lambda: Thresholded(WORLD, 0.), "quantile must be above 0 and at most 1, got 0"),
    (lambda: Thresholded(WORLD, 1.5), "quantile must be above 0 and at most 1, got 1.5"),
])
def test_refused(make, wanted):
    with pytest.raises(ValueError, match=wanted): make()
