"The autoencoder's two terms against closed forms, its units, its files, and latents as data of the trainer."
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ddpm_edm.data import ImageData, MappedData, digits, recipe
from ddpm_edm.guidance import Guided
from ddpm_edm.latent import Autoencoder, LatentData, kl_divergence, load_autoencoder, save_autoencoder, train_autoencoder, vae_terms
from ddpm_edm.metrics import pixel_features, weights_hash
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.solvers import dpmpp_2m, generate
from ddpm_edm.train import load, save_denoiser, train
from ddpm_edm.unet import UNet

QUIET = dict(log_every=10**6, save_every=10**6, sample_every=10**6, progress=False)


def made(latent_channels=2, channels=8, mults=(1,), in_channels=1, seed=0):
    torch.manual_seed(seed)
    return Autoencoder(in_channels, latent_channels, channels, mults)


@pytest.fixture(scope="module")
def data(): return digits().take(torch.arange(300))


@pytest.fixture(scope="module")
def trained(data):
    ae = made()
    return ae, train_autoencoder(ae, data, images=4_000, batch=32, progress=False)


# the two terms

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 1000))
def test_kl_is_that_of_torch(B, shape, seed):
    g = torch.Generator().manual_seed(seed)
    m, log_v = (2 * torch.randn(B, *shape, generator=g, dtype=torch.float64) for _ in range(2))
    q, p = torch.distributions.Normal(m, (log_v / 2).exp()), torch.distributions.Normal(torch.zeros_like(m), torch.ones_like(m))
    wanted = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(m, log_v), wanted, rtol=1e-12, atol=1e-12)    # float64 rounding of a few terms
    assert (kl_divergence(m, log_v) > 0).all() and (kl_divergence(0 * m, 0 * log_v) == 0).all()


class Linear:
    "z = a x + noise of variance v, g(z) = w z, for one number."
    def __init__(self, a, w, v): self.a, self.w, self.v = a, w, v
    def posterior(self, x): return self.a * x, torch.full_like(x, math.log(self.v))
    def decoder(self, z): return self.w * z


@pytest.mark.parametrize("lam, s", [(1., 0.3), (4., 1.5), (0.2, 0.6)])
def test_terms_of_the_linear_optimum_are_water_filling(lam, s):
    "Distortion min(lam, s^2) and rate max(ln(lam / s^2) / 2, 0), with w^2 = max(lam - s^2, 0) and the exact posterior."
    w2, N = max(lam - s**2, 0), 200_000
    g = torch.Generator().manual_seed(1)
    x, n = (torch.randn(N, 1, generator=g, dtype=torch.float64) for _ in range(2))
    error, rate = vae_terms(Linear(w2**0.5 / (s**2 + w2), w2**0.5, s**2 / (s**2 + w2)), lam**0.5 * x, n)
    for drawn, wanted in ((error, min(lam, s**2)), (rate, max(math.log(lam / s**2) / 2, 0))):
        assert drawn.shape == (N,)
        assert abs(drawn.mean() - wanted) < 5 * drawn.std() / N**0.5 + 1e-9    # five standard errors


def test_terms_are_sums_over_each_picture_and_pass_gradients():
    ae, g = made(), torch.Generator().manual_seed(0)
    x, n = torch.randn(3, 1, 8, 8, generator=g), torch.randn(3, 2, 4, 4, generator=g)
    error, rate = vae_terms(ae, x, n)
    m, log_v = ae.encoder(x).chunk(2, 1)
    for i in range(3):    # each picture by itself
        back = ae.decoder((m + torch.exp(log_v) ** 0.5 * n)[i:i + 1])
        torch.testing.assert_close(error[i], ((x[i] - back[0])**2).sum(), rtol=1e-4, atol=1e-5)    # float32 convolutions
        torch.testing.assert_close(rate[i], ((m[i]**2 + log_v[i].exp() - 1 - log_v[i]) / 2).sum(), rtol=1e-4, atol=1e-5)
    error.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in ae.encoder[-1].parameters())    # the noise is not in the way


# the network

@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 2), st.integers(1, 3))
def test_shapes(in_channels, latent_channels, mults, h, w):
    ae = made(latent_channels, 4, mults, in_channels)
    factor = 2**len(mults)
    assert ae.factor == factor
    x = torch.randn(2, in_channels, h * factor, w * factor)
    with torch.no_grad(): z = ae.encode(x)
    assert z.shape == (2, latent_channels, h, w) and all(t.shape == z.shape for t in ae.posterior(x))
    with torch.no_grad(): assert ae.decode(z).shape == x.shape
    again = Autoencoder(**json.loads(json.dumps(ae.config)))
    again.load_state_dict(ae.state_dict())
    with torch.no_grad(): assert torch.equal(again.encode(x), z)


def test_pictures_of_a_batch_do_not_meet():
    ae, x = made(mults=(1, 2)), torch.randn(4, 1, 8, 8)
    with torch.no_grad(): torch.testing.assert_close(ae.encode(x)[2:3], ae.encode(x[2:3]), rtol=1e-4, atol=1e-5)    # float32, another batch size


GOLDEN = [0.030641, 0.174300, 0.384429, 0.096647, -0.155277]


def test_golden():
    "Numbers of the first version; float32 convolutions differ by 1e-6 between machines."
    ae = made(mults=(1, 2))
    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    with torch.no_grad(): (m, log_v), y = ae.posterior(x), ae.decode(torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2))
    torch.testing.assert_close(torch.stack([m.flatten()[0], m.flatten()[-1], log_v.flatten()[0], y.flatten()[0], y.flatten()[-1]]),
                               torch.tensor(GOLDEN), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kw, message", [
    (dict(in_channels=0), "in_channels must be a whole number and at least 1, got 0"),
    (dict(in_channels=1, latent_channels=0), "latent_channels must be"),
    (dict(in_channels=1, channels=2.5), "channels must be a whole number and at least 1, got 2.5"),
    (dict(in_channels=1, mults=()), "mults must hold one number per level, got none"),
    (dict(in_channels=1, mults=(1, 0)), r"mults\[1\] must be"),
])
def test_networks_that_cannot_be(kw, message):
    with pytest.raises(ValueError, match=message): Autoencoder(**kw)


@pytest.mark.parametrize("call, message", [
    (lambda ae: ae.encode(torch.zeros(1, 3, 8, 8)), r"x must be \(B, 1, H, W\), got shape \(1, 3, 8, 8\)"),
    (lambda ae: ae.encode(torch.zeros(1, 8, 8)), r"x must be \(B, 1, H, W\)"),
    (lambda ae: ae.encode(torch.zeros(0, 1, 8, 8)), r"x must be \(B, 1, H, W\)"),
    (lambda ae: ae.encode(torch.zeros(1, 1, 9, 8)), "height and width of x must be multiples of 2, got 9 x 8"),
    (lambda ae: ae.posterior(torch.zeros(1, 1, 8, 7)), "height and width of x must be multiples of 2, got 8 x 7"),
    (lambda ae: ae.decode(torch.zeros(1, 1, 4, 4)), r"z must be \(B, 2, H, W\), got shape \(1, 1, 4, 4\)"),
])
def test_pictures_and_latents_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message): call(made())


# units

def test_measured_latents_are_standard_and_decoding_does_not_notice(data, trained):
    ae, _ = trained
    x = data.batch(slice(None))[0]
    with torch.no_grad(): z, m, back = ae.encode(x), ae.posterior(x)[0], ae.decode(ae.encode(x))
    assert z.mean((0, 2, 3)).abs().max() < 1e-5 and abs(z.std(correction=0) - 1) < 1e-5    # float32; measured on these pictures
    with torch.no_grad(): torch.testing.assert_close(back, ae.decoder(m), rtol=1e-3, atol=1e-4)
    # one scale for all channels: they keep their proportions
    torch.testing.assert_close(z.std((0, 2, 3)) / z.std((0, 2, 3))[0], m.std((0, 2, 3)) / m.std((0, 2, 3))[0], rtol=1e-4, atol=0)
    assert (m.std((0, 2, 3)) / m.std((0, 2, 3))[0] - 1).abs().max() > 1e-2    # which would not be seen if they were equal


def test_measure_looks_at_no_more_than_told(data):
    a, b = made(), made()
    a.measure(data)
    b.measure(data, most=20)
    assert not torch.equal(a.scale, b.scale) and 0.5 < a.scale / b.scale < 2
    c = made()
    c.measure(data, most=20)
    assert torch.equal(b.scale, c.scale)    # the draw is always the same


def test_latents_that_are_all_alike_have_no_scale():
    flat = ImageData(torch.full((5, 1, 8, 8), 3, dtype=torch.uint8), name="flat")
    ae = made()
    nn.init.zeros_(ae.encoder[-1].weight)
    with pytest.raises(ValueError, match="latents of flat must differ from each other, got a standard deviation of 0"): ae.measure(flat)


# training

def test_training_lowers_the_error_and_repeats(data, trained):
    ae, log = trained
    assert log.shape == (125, 2) and log.isfinite().all()
    assert log[-10:, 0].mean() < 0.4 * log[:5, 0].mean()    # measured: 0.29
    again, before = made(), torch.get_rng_state()
    log_again = train_autoencoder(again, data, images=4_000, batch=32, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(log, log_again) and all(torch.equal(a, b) for a, b in zip(ae.state_dict().values(), again.state_dict().values()))
    other = made()
    assert not torch.equal(log, train_autoencoder(other, data, images=64, batch=32, seed=1, progress=False)[:125])


def test_a_dear_bit_is_not_bought(data):
    rates = [train_autoencoder(made(), data, s=s, images=2_500, batch=32, progress=False)[-10:].mean(0) for s in (0.05, 0.3, 3.)]
    assert rates[0][1] > 1.3 * rates[1][1] > 1.3 * rates[2][1]
    assert rates[2][1] < 5 and rates[0][0] < rates[2][0]    # errors of 3 are larger than anything there is


def test_one_step_is_one_of_equation_1(data):
    "The gradient that AdamW sees, against eq. 1 written out."
    seen = {}
    class Watched(torch.optim.AdamW):
        def step(self):
            seen["grads"] = [p.grad.clone() for group in self.param_groups for p in group["params"]]
            seen["lr"] = self.param_groups[0]["lr"]
            return super().step()
    ae, s, g = made(), 0.7, torch.Generator().manual_seed(3)
    x = data.batch(torch.randint(len(data), (8,), generator=g))[0]
    error, rate = vae_terms(ae, x, torch.randn(8, 2, 4, 4, generator=g))
    wanted = torch.autograd.grad(((error / (2 * s**2)) + rate).mean() / 64, list(ae.parameters()))
    length = torch.stack([d.norm() for d in wanted]).norm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        log = train_autoencoder(ae, data, s=s, images=8, batch=8, seed=3, progress=False)
    for got, d in zip(seen["grads"], wanted): torch.testing.assert_close(got, d / length.clamp(min=1), rtol=1e-4, atol=1e-6)    # float32
    torch.testing.assert_close(log[0], torch.stack([error.mean() / 64, rate.mean()]).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kw, message", [
    (dict(s=0.), "s must be positive and finite, got 0"), (dict(s=math.nan), "s must be positive"), (dict(s=math.inf), "s must be positive"),
    (dict(images=0), "images must be"), (dict(batch=0), "batch must be"), (dict(images=2.5), "images must be a whole number"),
])
def test_trainings_that_cannot_be(data, kw, message):
    with pytest.raises(ValueError, match=message): train_autoencoder(made(), data, progress=False, **kw)


def test_data_that_does_not_fit(data):
    with pytest.raises(ValueError, match=r"data must be \(B, 3, H, W\), got shape \(1, 1, 8, 8\)"): train_autoencoder(made(in_channels=3), data, progress=False)
    with pytest.raises(ValueError, match="height and width of data must be multiples of 16, got 8 x 8"): train_autoencoder(made(mults=(1,) * 4), data, progress=False)


def test_a_training_that_ran_away_says_so(data):
    with pytest.raises(FloatingPointError, match="at step .* try a lower lr"): train_autoencoder(made(), data, lr=1e20, images=640, progress=False)


# files

def test_file_gives_the_autoencoder_back(tmp_path, data, trained):
    ae, _ = trained
    file = tmp_path / "run" / "autoencoder.safetensors"
    save_autoencoder(ae, file)
    assert [f.name for f in file.parent.iterdir()] == [file.name]    # nothing is left beside it
    x = data.batch(slice(0, 9))[0]
    for path in (file, str(file), file.parent):
        again = load_autoencoder(path)
        assert not again.training and not any(p.requires_grad for p in again.parameters()) and again.config == ae.config
        with torch.no_grad(): assert torch.equal(again.encode(x), ae.encode(x)) and torch.equal(again.decode(ae.encode(x)), ae.decode(ae.encode(x)))
    assert weights_hash(again) == weights_hash(ae)


def altered(file, **change):
    with safe_open(file, "pt") as f: about = f.metadata()
    save_file(load_file(file) | {k: v for k, v in change.items() if v is not None}, file, about)
    if None in change.values(): save_file({k: v for k, v in load_file(file).items() if change.get(k, 0) is not None}, file, about)


SPOILED = {
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-100]), "empty": lambda f: f.write_bytes(b""), "text": lambda f: f.write_text("hello"),
    "no settings": lambda f: save_file(load_file(f), f), "other settings": lambda f: save_file(load_file(f), f, {"autoencoder": json.dumps(dict(in_channels=1, depth=4))}),
    "another network's settings": lambda f: save_file(load_file(f), f, {"autoencoder": json.dumps(made(channels=16).config)}),
    "a weight is missing": lambda f: altered(f, **{"decoder.0.bias": None}), "a weight too many": lambda f: altered(f, extra=torch.zeros(1)),
    "scale of zero": lambda f: altered(f, scale=torch.zeros(())), "scale of nan": lambda f: altered(f, scale=torch.tensor(math.nan)),
    "a denoiser": lambda f: save_denoiser(EDMPrecond(UNet(1, 8, (1,), attention=(), head_dim=8), 0.5), f),
}


@pytest.mark.parametrize("how", SPOILED)
def test_damaged_and_foreign_files(how, tmp_path):
    file = tmp_path / "ae.safetensors"
    save_autoencoder(made(), file)
    SPOILED[how](file)
    with pytest.raises(ValueError, match="ae.safetensors is damaged or holds no autoencoder of this library"): load_autoencoder(file)


def test_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(FileNotFoundError, match="no autoencoder at .*need a safetensors file, or a folder"): load_autoencoder(path)


# latents as data

def test_latents_answer_what_images_answer(data, trained):
    ae, _ = trained
    z = LatentData.of(ae, data)
    assert (len(z), z.shape, z.num_labels, z.classes) == (300, (2, 4, 4), 10, data.classes)
    assert z.name == f"digits in latents {weights_hash(ae)}" and repr(z).endswith("300 images 2 x 4 x 4, 10 classes")
    x, labels = z.batch(torch.tensor([5, 2]))
    with torch.no_grad(): torch.testing.assert_close(x, ae.encode(data.batch(torch.tensor([5, 2]))[0]), rtol=1e-4, atol=1e-5)    # other batch size
    assert x.dtype == torch.float32 and torch.equal(labels, data.labels[[5, 2]])
    torch.testing.assert_close(torch.tensor(z.stats()), torch.tensor([0., 1.]), rtol=0, atol=1e-5)
    few = z.take(torch.tensor([5, 2]))
    assert torch.equal(few.images, x) and torch.equal(few.labels, labels) and few.classes == z.classes
    part, rest = z.split(100)
    assert (len(part), len(rest)) == (100, 200) and isinstance(part, LatentData)
    assert torch.equal(z.to("cpu").images, z.images)
    assert not LatentData.of(ae, ImageData(data.images, max_value=16)).num_labels


def test_batch_size_and_place_of_the_pictures_do_not_matter(data, trained):
    ae, _ = trained
    x = (data.pixels(slice(None)).float() * 255 / 16).round().to(torch.uint8)
    a, b = LatentData.of(ae, ImageData(x), batch=7), LatentData.of(ae, MappedData(np.ascontiguousarray(x.numpy())))
    torch.testing.assert_close(a.images, b.images, rtol=1e-4, atol=1e-5)    # float32, other batch sizes


def test_fingerprint_sees_every_change(data, trained):
    z = LatentData.of(trained[0], data)
    first, other, labels = z.fingerprint(), z.images.clone(), z.labels.clone()
    other[7, 1, 2, 3] += 1e-6
    labels[9] = (labels[9] + 1) % 10
    changed = [LatentData(other, z.labels, z.classes), LatentData(z.images, labels, z.classes), LatentData(z.images, z.labels, [*"abcdefghij"]), LatentData(z.images), z.take(torch.arange(299))]
    assert len({first, *(c.fingerprint() for c in changed)}) == 6
    assert LatentData(z.images.clone(), z.labels, z.classes, "other name").fingerprint() == first and len(first) == 16


@pytest.mark.parametrize("args, message", [
    ((torch.zeros(2, 3, 4),), r"latents must be \(N, c, h, w\) and not empty, got shape \(2, 3, 4\)"),
    ((torch.zeros(0, 3, 4, 4),), r"latents must be \(N, c, h, w\) and not empty"),
    ((torch.zeros(2, 3, 4, 4, dtype=torch.uint8),), "latents must be a finite floating-point tensor"),
    ((torch.tensor([1., math.inf]).reshape(2, 1, 1, 1),), "latents must be a finite floating-point tensor"),
    ((torch.zeros(2, 1, 4, 4), torch.tensor([0, 1, 2])), "labels must be 2 integers"),
    ((torch.zeros(2, 1, 4, 4), torch.tensor([0, 5]), ["a", "b"]), "labels must be from 0 to 1, got 5 at 1"),
    ((torch.zeros(2, 1, 4, 4), None, ["a"]), "classes need labels"),
])
def test_latents_that_cannot_be(args, message):
    with pytest.raises(ValueError, match=message): LatentData(*args)


def test_latents_are_not_taken_for_pictures(data, trained):
    z = LatentData.of(trained[0], data)
    for use in (recipe, pixel_features):
        with pytest.raises(ValueError, match="latents without pixel values; decode them first"): use(z)


def test_the_trainer_takes_latents_and_goes_on_exactly(tmp_path, data, trained):
    ae, _ = trained
    z = LatentData.of(ae, data)
    def network():
        torch.manual_seed(0)
        return EDMPrecond(UNet(2, 8, (1,), attention=(), num_labels=10, head_dim=8), z.stats().std)
    how = dict(images=320, batch=32, precision="fp32", **QUIET)
    whole = train(network(), z, tmp_path / "whole", **how)
    class Enough(Exception): pass
    class Cut(LatentData):
        "Latents that are gone after four steps."
        def to(self, device): return self
        def batch(self, index):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls > 5: raise Enough    # the first is the trainer's look at whether they fit
            return super().batch(index)
    with pytest.raises(Enough): train(network(), Cut(z.images, z.labels, z.classes, z.name), tmp_path / "parts", **how | dict(save_every=64))
    parts = train(network(), z, tmp_path / "parts", resume=True, **how | dict(save_every=64))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["shape"] == [2, 4, 4] and weights_hash(ae) in config["data"]["name"]
    # a run and its autoencoder in one folder, sampled with guidance by any solver, decoded
    save_autoencoder(ae, tmp_path / "whole" / "autoencoder.safetensors")
    denoiser, decoder = load(tmp_path / "whole"), load_autoencoder(tmp_path / "whole")
    drawn = generate(Guided(denoiser, 2., interval=(0.1, 5.)), range(3), z.shape, karras_sigmas(4), dpmpp_2m, labels=torch.tensor([0, 1, 2]))
    with torch.no_grad(): x = decoder.decode(drawn)
    assert x.shape == (3, *data.shape) and x.isfinite().all()


def test_another_autoencoder_is_another_run(tmp_path, data, trained):
    z, other = LatentData.of(trained[0], data), made(seed=5)
    other.measure(data)
    def network(): return EDMPrecond(UNet(2, 8, (1,), attention=(), head_dim=8), 1.)
    how = dict(images=32, batch=32, precision="fp32", **QUIET)
    train(network(), z, tmp_path / "run", **how)
    with pytest.raises(ValueError, match="holds another run .*data.name is"): train(network(), LatentData.of(other, data), tmp_path / "run", resume=True, **how)
