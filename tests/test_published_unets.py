"DDPM++, NCSN++ and ADM: weights in the published layout against answers recorded from the authors' program, names and counts, strictness."
import gzip
import json
import lzma
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_edm.precond import EDMPrecond, IDDPMPrecond, VEPrecond, VPPrecond
from ddpm_edm.unet import PRESETS, UNet, _edm_names, _edm_turn, edm_settings, from_edm, noise_embedding, to_edm

FOLDER = Path(__file__).parent / "golden"
WRAPPERS = dict(dhariwal=EDMPrecond, iddpm_song=IDDPMPrecond, song_ddpmpp=EDMPrecond, song_ncsnpp=EDMPrecond, ve_song=VEPrecond, vp_song=VPPrecond)
FULL = json.loads(gzip.decompress((FOLDER / "edm_net_full_configs.json.gz").read_bytes()))    # names and shapes of three published networks


@cache
def golden(name):
    "Recorded inputs and answers, configuration, conditioning, and the random weights (float8 and float16, exact in float32)."
    g = {k: v if v.dtype.kind == "U" else torch.from_numpy(v) for k, v in np.load(FOLDER / f"edm_net_{name}.npz").items()}
    cond = {}
    if "class_labels" in g:
        cond["labels"] = g["class_labels"].argmax(1)
        assert (g["class_labels"].sum(1) == 1).all()    # none is unconditional
    if "augment_labels" in g: cond["augment"] = g["augment_labels"]
    weights = load(lzma.decompress((FOLDER / f"edm_net_{name}.safetensors.xz").read_bytes()))
    return g, json.loads(str(g["_config"])), cond, weights


def built(name): return from_edm(golden(name)[3], golden(name)[1])
def error(a, b): return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
def without(cond, key): return {k: v for k, v in cond.items() if k != key}


@pytest.mark.parametrize("name", WRAPPERS)
def test_answers_equal_the_recorded_ones(name):
    "2e-5 in float32, 1e-6 in float64, of the largest value: the tolerances of the recording. Ours reach 4e-6 and 2e-14."
    g, config, cond, _ = golden(name)
    denoise = built(name)
    assert type(denoise) is WRAPPERS[name] and not denoise.training
    assert sum(p.numel() for p in denoise.net.parameters()) == g["n_params"]
    x, sigma = g["x"], g["sigma"]
    with torch.no_grad():
        assert error(denoise(x, sigma, **cond), g["D.f64"]) < 2e-5
        assert error(denoise(x, float(sigma[2]), **cond)[:2], g["D.scalar_sigma"]) < 2e-5
        if "labels" in cond:
            for labels in (None, torch.full((len(x),), -1)):
                assert error(denoise(x, sigma, **cond | dict(labels=labels))[:2], g["D.no_label"]) < 2e-5
        if "augment" in cond:
            for augment in (None, torch.zeros_like(cond["augment"])):
                assert error(denoise(x, sigma, **cond | dict(augment=augment))[:2], g["D.no_augment"]) < 2e-5
        denoise.double()
        assert error(denoise(x.double(), sigma.double(), **cond), g["D.f64"]) < 1e-12    # every step in float64, weights exact


def recorded(net, size):
    "Modules whose outputs were recorded: published name -> module."
    modules = {}
    for ours, theirs in _edm_names(net, size)[0].items():
        theirs, parts = theirs.removeprefix("model.").rsplit(".", 1)[0], ours.split(".")
        n = {"down": 3, "up": 3, "middle": 2, "halves": 2, "doubles": 2, "image_skip": 2}.get(parts[0], len(parts) - 1)
        if parts[0] in ("down", "up", "middle", "halves", "doubles"): theirs = theirs.rsplit(".", 1)[0]
        modules[theirs] = net.get_submodule(".".join(parts[:n]))
    return modules


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_block_equals_the_recorded_one(name):
    "Mean, spread, first and last value of each block's output, so that two mistakes can't cancel."
    g, config, cond, _ = golden(name)
    net, made = built(name).net, {}
    for published, module in recorded(net, config["kw"]["img_resolution"]).items():
        module.register_forward_hook(lambda m, args, out, published=published: made.update({published: out.double()}))
    c_in = built(name).coefs(g["sigma"][:, None, None, None])[2]
    with torch.no_grad(): out = UNet.forward(net, c_in * g["x"], g["c_noise"], **cond)
    assert error(out[:2], g["F"]) < 5e-5    # steps to 999 and logarithms in float32: 2e-5 in the largest embedding, measured
    names = json.loads(str(g["blk.names"]))
    assert len(names) >= 11 and set(names) <= made.keys()
    for block, print_ in zip(names, g["blk"]):
        o = made[block]
        mine = torch.stack([o.mean(), o.std(), o.flatten()[0], o.flatten()[-1]])
        assert (mine - print_).abs().max() < 5e-5 * o.abs().max(), block
    waves = net.waves(g["c_noise"]) if net.waves is not None else noise_embedding(net.noise_scale * g["c_noise"], net.noise_dim, net.embedding)
    if "Song" in config["kw"]["model_type"]: waves = waves.roll(waves.shape[1] // 2, 1)    # recorded before sines and cosines trade places
    torch.testing.assert_close(waves[:2], g["map_noise"], atol=1e-4, rtol=0)    # c_noise up to 1000 in float32, angles of 1000 radians
    assert error(made["map_layer1"], g["map_layer1"]) < 5e-5


@pytest.mark.parametrize("name", WRAPPERS)
def test_gradients_equal_the_recorded_ones(name):
    "Norm and sum of the gradient of every weight, for the losses of the authors (eq. 2 and Table 1 of EDM)."
    g, config, cond, _ = golden(name)
    denoise, cls = built(name), config["cls"]
    draw, y = g["train.draw"], g["train.y"]
    if cls == "VEPrecond": sigma = 0.02 * 5000**draw
    elif cls == "VPPrecond": sigma = ((9.95 * (t := 1 - draw * (1 - 1e-5))**2 + 0.1 * t).exp() - 1).sqrt()
    else: sigma = (draw * 1.2 - 1.2).exp()
    s = sigma[:, None, None, None]
    weight = 1 / s**2 if cls in ("VEPrecond", "VPPrecond") else (s**2 + 0.25) / (s * 0.5)**2
    (weight * (denoise(y + s * g["train.noise"], sigma, **cond) - y)**2).sum().div(len(y)).backward()
    net, (names, _) = denoise.net, _edm_names(denoise.net, config["kw"]["img_resolution"])
    grads = {names[k]: _edm_turn(net, k, p.grad, back=True).double() for k, p in net.named_parameters()}
    wanted = json.loads(str(g["train.grad_names"]))
    assert set(wanted) == grads.keys()
    for k, norm, total in zip(wanted, g["train.grad_norm"], g["train.grad_sum"]):
        assert abs(grads[k].norm() - norm) <= 1e-3 * norm and abs(grads[k].sum() - total) <= 1e-3 * norm, k


@pytest.mark.parametrize("name", WRAPPERS)
def test_there_and_back(name):
    "Bit for bit, under the same names."
    weights, back = golden(name)[3], to_edm(built(name), golden(name)[1]["kw"]["img_resolution"])
    assert back.keys() == weights.keys()
    assert all(torch.equal(v, weights[k].float()) and v.is_contiguous() for k, v in back.items())    # safetensors writes contiguous ones only


def test_a_network_of_another_kind_is_not_written():
    with pytest.raises(ValueError, match="resamples inside its blocks"): to_edm(EDMPrecond(UNet(1, 32)), 8)


@pytest.mark.parametrize("name, preset", list(zip(FULL, ("cifar10_ddpmpp", "cifar10_ncsnpp", "imagenet64_adm"))))
def test_published_sizes(name, preset):
    "Names, shapes and counts of the networks as published; ours need no memory for that."
    full = FULL[name]
    config = dict(cls=full["cls"], kw=full["kwargs"])
    with torch.device("meta"): denoise, named = EDMPrecond(UNet(**edm_settings(config))), UNet(**PRESETS[preset])
    assert named.config == denoise.net.config
    assert {k: list(v.shape) for k, v in to_edm(denoise, config["kw"]["img_resolution"]).items()} == full["state_dict"]
    count = sum(p.numel() for p in named.parameters())
    assert count == full["n_params"] == {"cifar10_ddpmpp": 55_735_299, "cifar10_ncsnpp": 56_397_827, "imagenet64_adm": 295_899_267}[preset]


@pytest.mark.parametrize("preset, size", dict(digits=8, mnist=28, cifar10_ddpmpp=32, cifar10_ncsnpp=32, imagenet64_adm=64).items())
def test_presets_run_and_rebuild(preset, size):
    "On the meta device: nothing there has a value, so this also proves that none is looked at, for which a GPU's host would wait."
    with torch.device("meta"):
        net = UNet(**PRESETS[preset])
        again = UNet(**json.loads(json.dumps(net.config)))
        cond = dict(labels=torch.zeros(2, dtype=torch.long)) if net.num_labels else {}
        if net.augment_dim: cond["augment"] = torch.zeros(2, net.augment_dim)
        assert again(torch.zeros(2, net.in_channels, size, size), torch.zeros(2), **cond).shape == (2, net.in_channels, size, size)
    assert again.config == net.config and again.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize("name", ["dhariwal", "song_ncsnpp"])
def test_fresh_families_give_zero_and_learn(name):
    "A new network of each family: F = 0, whatever it is told; after a step it is not, and every weight can move in two."
    torch.manual_seed(0)
    net = UNet(**edm_settings(golden(name)[1]) | dict(dropout=0.))
    x, args = torch.randn(2, 3, 16, 16), (torch.randn(2), torch.tensor([1, 2]), torch.randn(2, 9))
    assert not net(x, *args).any()
    before, opt = {k: v.clone() for k, v in net.named_parameters()}, torch.optim.SGD(net.parameters(), 1.)
    for _ in range(8):
        opt.zero_grad(); (net(x, *args) - x).square().mean().backward(); opt.step()
    # A bias of keys adds the same to all scores of a query: softmax drops it, what is left is rounding
    assert [k for k, v in net.named_parameters() if torch.equal(v, before[k])] == []


@pytest.mark.parametrize("name", ["dhariwal", "song_ddpmpp", "song_ncsnpp"])
def test_families_are_not_square_and_take_bfloat16(name):
    net, args = built(name).net.requires_grad_(False), (torch.randn(2, 3, 8, 24), torch.randn(2), torch.tensor([1, -1]), torch.randn(2, 9))
    out = net(*args)
    assert out.shape == (2, 3, 8, 24) and out.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16): low = net(*args)
    assert error(low, out) < 0.1    # 8 bits of mantissa through 10 blocks
    if name == "song_ncsnpp":       # the one with most parts: one graph, without breaks
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*args), out, atol=1e-5, rtol=1e-5)    # the same operations


def edited(name, **kw): return dict(golden(name)[1], kw=golden(name)[1]["kw"] | kw)


@pytest.mark.parametrize("change, wanted", [
    (dict(encoder_type="skip"), "encoder_type must be 'standard' or 'residual', got 'skip'"),
    (dict(decoder_type="skip"), "decoder_type must be 'standard', got 'skip'"),
    (dict(embedding_type="learned"), "embedding_type must be 'positional' or 'fourier', got 'learned'"),
    (dict(model_type="Transformer"), "model_type must be 'SongUNet' or 'DhariwalUNet', got 'Transformer'"),
    (dict(channel_mult_emb=2), "channel_mult_emb must be 4, got 2"),
    (dict(depth=3, wide=True), "EDMPrecond with SongUNet does not know: depth, wide"),
    (dict(img_resolution=None), "kw must hold img_resolution"),
])
def test_settings_refused(change, wanted):
    with pytest.raises(ValueError, match=wanted): from_edm(golden("song_ddpmpp")[3], edited("song_ddpmpp", **change))


def test_wrapper_refused():
    with pytest.raises(ValueError, match="cls must be 'EDMPrecond' or .*, got 'os.system'"): edm_settings(dict(cls="os.system", kw={}))
    with pytest.raises(ValueError, match="cls must be .*, got None"): edm_settings({})
    with pytest.raises(ValueError, match="does not know: sigma_data"): edm_settings(edited("vp_song", sigma_data=0.5))


@pytest.mark.parametrize("spoil, wanted", [
    (lambda w: {k: v for k, v in w.items() if "out_conv" not in k}, "missing are model.out_conv.bias, model.out_conv.weight$"),
    (lambda w: w | {"model.map_noise.freqs": torch.zeros(16)}, "unexpected are model.map_noise.freqs$"),
    (lambda w: w | {"model.out_norm.bias": torch.zeros(3)}, "of another shape are model.out_norm.bias$"),
    (lambda w: {k: v for k, v in w.items() if "norm" not in k}, "missing are .*, .*, .* and more$"),
    (lambda w: w | {"model.enc.8x8_down.skip.resample_filter": torch.ones(1, 1, 2, 2)}, "model.enc.8x8_down.skip.resample_filter in state_dict is not what config asks for"),
])
def test_weights_refused(spoil, wanted):
    _, config, _, weights = golden("dhariwal")
    with pytest.raises(ValueError, match=wanted): from_edm(spoil(dict(weights)), config)


def test_what_trainers_and_samplers_alone_use_changes_nothing():
    weights = golden("dhariwal")[3]
    a, b = from_edm(weights, golden("dhariwal")[1]), from_edm(weights, edited("dhariwal", use_fp16=True, sigma_min=0.1, sigma_max=9, label_dropout=0.2))
    assert a.net.config == b.net.config and a.sigma_data == b.sigma_data
    assert from_edm(weights, edited("dhariwal", sigma_data=0.7)).sigma_data == 0.7


def test_weights_are_copied_not_shared():
    weights = {k: v.float() for k, v in golden("vp_song")[3].items()}
    denoise, name = from_edm(weights, golden("vp_song")[1]), "model.map_layer0.bias"
    before = weights[name].clone()
    with torch.no_grad(): denoise.net.embed_noise[0].bias.add_(1)
    assert torch.equal(weights[name], before)
