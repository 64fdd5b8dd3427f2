"The U-Net: every layer against its formula, what a fresh network is, labels, sizes, settings."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_edm.dit import DiT
from ddpm_edm.precond import EDMLoss, EDMPrecond
from ddpm_edm.unet import Attention, Fourier, ResBlock, Resample, Stage, UNet, fir, noise_embedding, norm, shrink

GOLDEN = Path(__file__).parent / "golden" / "unet_embedding.npz"
ROUNDING = dict(atol=1e-10, rtol=1e-10)    # float64, sums of thousands of terms of order 1


def awake(module, seed=0):
    "float64, with random weights in every convolution, those that start at zero too."
    torch.manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.Conv2d): m.reset_parameters()
    return module.double().eval().requires_grad_(False)


def rand(*shape, seed=1): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_noise_embedding_equals_reference():
    "The features of EDM's ADM network, recorded from the reference in float64, for ln(sigma)/4 and for large numbers."
    golden = np.load(GOLDEN)
    e = noise_embedding(torch.from_numpy(golden["sigma"]).log() / 4, 32)
    np.testing.assert_allclose(e, golden["features"], atol=2e-7)    # the reference's frequencies are float32
    steps = noise_embedding(torch.linspace(0, 999, 10, dtype=torch.float64), 32)
    np.testing.assert_allclose(steps, golden["steps"], atol=1e-4)    # 999 times float32 rounding of a frequency, 6e-8
    assert e.dtype == torch.float64


def test_noise_embedding_similarity_depends_on_the_ratio_alone():
    c = torch.linspace(-1.6, 1.1, 20, dtype=torch.float64)
    e = noise_embedding(c, 64)
    freqs = 10_000.**(-torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(e @ e.T, ((c[:, None] - c)[..., None] * freqs).cos().sum(-1), **ROUNDING)


@pytest.mark.parametrize("c, dim, wanted", [(torch.zeros(2, 1), 8, r"\(B,\)"), (torch.zeros(2), 7, "even"), (torch.zeros(2), 0, "positive")])
def test_noise_embedding_refuses(c, dim, wanted):
    with pytest.raises(ValueError, match=wanted): noise_embedding(c, dim)


def test_kinds_of_embedding():
    c, k = torch.linspace(-1.6, 1.1, 20, dtype=torch.float64), torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(noise_embedding(c, 16, "ddpm"), torch.cat([(c[:, None] * 1e-4**(k / 7)).sin(), (c[:, None] * 1e-4**(k / 7)).cos()], 1), **ROUNDING)
    assert noise_embedding(c, 2, "ddpm").isfinite().all()    # one frequency: its row has no steps
    with pytest.raises(ValueError, match="kind must be 'adm' or 'ddpm', got 'x'"): noise_embedding(c, 4, "x")


def test_fourier_features():
    torch.manual_seed(0)
    waves = Fourier(40_000, scale=3.).double()
    assert abs(waves.freqs.std() - 3) < 0.08 and abs(waves.freqs.mean()) < 0.11    # 20,000 draws: 3 / sqrt(40,000), 3 / sqrt(20,000), five of them
    c = torch.tensor([0.3, 0.31, 0.34, 0.5], dtype=torch.float64)
    bell = (-(2 * torch.pi * 3 * (c - c[0]))**2 / 2).exp()
    torch.testing.assert_close(waves(c) @ waves(c)[0] / 20_000, bell, atol=0.025, rtol=0)    # 20,000 cosines of variance 1/2 or less
    assert torch.equal(waves(c)[:, :20_000], (2 * torch.pi * c[:, None] * waves.freqs).sin())
    assert "waves.freqs" in UNet(1, 32, embedding="fourier").state_dict()                    # drawn once, saved with the weights
    assert UNet(1, 32, embedding="fourier", noise_scale=1e-9).waves.freqs.abs().max() < 1e-7


@settings(max_examples=30, deadline=None)
@given(taps=st.lists(st.integers(1, 9), min_size=1, max_size=3), h=st.integers(1, 4), w=st.integers(1, 4), seed=st.integers(0, 99))
def test_resampling_is_its_definition(taps, h, w, seed):
    "Halving: zeros around, weighted means of a window at every second pixel. Doubling: 4 times the transpose, so means stay."
    taps = taps + taps[::-1]
    n, k = len(taps) // 2 - 1, torch.tensor(taps, dtype=torch.float64) / sum(taps)
    x = rand(1, 2, 2 * h, 2 * w, seed=seed)
    padded = nn.functional.pad(x, [n] * 4)
    wanted = torch.stack([torch.stack([k @ padded[0, :, 2 * i:2 * i + len(k), 2 * j:2 * j + len(k)] @ k for j in range(w)], -1) for i in range(h)], -2)
    down, up = (Resample(u, taps).double() for u in (False, True))
    torch.testing.assert_close(down(x)[0], wanted, atol=1e-6, rtol=0)    # the filter is kept in float32
    y = rand(1, 2, h, w, seed=seed + 1)
    assert up(y).shape == x.shape
    torch.testing.assert_close((up(y) * x).sum(), 4 * (y * down(x)).sum(), atol=1e-5, rtol=0)
    assert abs(fir(taps).sum() - 1) < 1e-6


def test_short_filter_needs_no_weights_and_is_the_same():
    x = rand(2, 3, 6, 8)
    kernel = fir([1, 1]).double().expand(3, 1, 2, 2)
    assert not Resample(True).state_dict() and not Resample(False).state_dict()
    torch.testing.assert_close(Resample(False)(x), nn.functional.conv2d(x, kernel, stride=2, groups=3), **ROUNDING)
    torch.testing.assert_close(Resample(True)(x), nn.functional.conv_transpose2d(x, 4 * kernel, stride=2, groups=3), **ROUNDING)


def test_shrunken_view_is_convolution_then_filter_without_a_border_between():
    view, x = awake(shrink(2, 4, (1, 3, 3, 1))), rand(1, 2, 8, 12)
    wide = nn.functional.conv2d(nn.functional.pad(x, [2] * 4), view[0].weight, view[0].bias)    # one pixel more on each side than the image
    wanted = nn.functional.conv2d(wide, fir([1, 3, 3, 1]).double().expand(4, 1, 4, 4), stride=2, groups=4)
    torch.testing.assert_close(view(x), wanted, **ROUNDING)


@pytest.mark.parametrize("channels, groups", [(1, 1), (2, 1), (3, 1), (4, 1), (32, 8), (48, 12), (64, 16), (96, 24), (128, 32), (144, 24), (192, 32), (512, 32)])
def test_norm_groups(channels, groups): assert norm(channels).num_groups == groups


def test_norm_formula():
    h, layer = 5 + 3 * rand(2, 48, 4, 6), norm(48).double()
    g = h.reshape(2, 12, -1)
    by_hand = (g - g.mean(2, keepdim=True)) / (g.var(2, correction=0, keepdim=True) + layer.eps).sqrt()
    torch.testing.assert_close(layer(h), by_hand.reshape(h.shape), **ROUNDING)


def test_fresh_block_is_the_identity():
    block = ResBlock(64, 64, 16).double()
    h = rand(2, 64, 4, 4)
    assert torch.equal(block(h, rand(2, 16)), h)
    wider = ResBlock(64, 96, 16).double()
    assert torch.equal(wider(h, rand(2, 16)), wider.skip(h))


def test_block_formula():
    block, h, emb = awake(ResBlock(32, 64, 16)), rand(2, 32, 4, 4), rand(2, 16, seed=2)
    a, b = (block.scale_shift.weight @ emb.T + block.scale_shift.bias[:, None]).T[:, :, None, None].split(64, dim=1)
    u = nn.functional.group_norm(block.conv1(nn.functional.silu(nn.functional.group_norm(h, 8))), 16)
    wanted = block.skip(h) + block.conv2(nn.functional.silu((1 + a) * u + b))
    torch.testing.assert_close(block(h, emb), wanted, **ROUNDING)


def test_block_formula_with_a_shift_alone_and_a_factor():
    block, h, emb = awake(ResBlock(32, 64, 16, adaptive_scale=False, skip_scale=0.7, eps=1e-3)), rand(2, 32, 4, 4), rand(2, 16, seed=2)
    b = (block.scale_shift.weight @ emb.T + block.scale_shift.bias[:, None]).T[:, :, None, None]
    u = block.conv1(nn.functional.silu(nn.functional.group_norm(h, 8, eps=1e-3)))
    wanted = 0.7 * (block.skip(h) + block.conv2(nn.functional.silu(nn.functional.group_norm(u + b, 16, eps=1e-3))))
    torch.testing.assert_close(block(h, emb), wanted, **ROUNDING)


@pytest.mark.parametrize("up", [True, False])
def test_block_that_resamples(up):
    "Between the first normalization and convolution, and on the way around."
    block, h, emb = awake(ResBlock(32, 32, 16, resample=Resample(up, (1, 3, 3, 1)), skip_conv=True)), rand(2, 32, 4, 4), rand(2, 16, seed=2)
    a, b = block.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
    u = nn.functional.group_norm(block.conv1(block.resample(nn.functional.silu(nn.functional.group_norm(h, 8)))), 8)
    torch.testing.assert_close(block(h, emb), block.skip(block.resample(h)) + block.conv2(nn.functional.silu((1 + a) * u + b)), **ROUNDING)
    assert block(h, emb).shape[-1] == (8 if up else 2) and isinstance(block.skip, nn.Conv2d)


def test_dropout_is_inside_the_block_and_only_in_training():
    block, h, emb = awake(ResBlock(32, 32, 16, dropout=0.5)), rand(1, 32, 4, 4), rand(1, 16)
    assert torch.equal(block(h, emb), block(h, emb))
    block.train()
    assert not torch.equal(block(h, emb), block(h, emb))


def test_attention_is_softmax_over_positions_in_heads_of_32():
    attend, h = awake(Attention(96)), rand(2, 96, 3, 5)
    assert attend.heads == 3
    q, k, v = attend.qkv(attend.norm(h)).reshape(2, 3, 3, 32, 15).unbind(1)
    out = torch.zeros(2, 3, 32, 15, dtype=torch.float64)
    for i in range(15):
        score = (q[..., i, None] * k).sum(2) / 32**0.5
        w = score.exp() / score.exp().sum(-1, keepdim=True)
        out[..., i] = (v * w[:, :, None]).sum(-1)
    torch.testing.assert_close(attend(h), h + attend.out(out.reshape(h.shape)), **ROUNDING)


def test_attention_commutes_with_shuffling_and_starts_as_identity():
    h, order = rand(2, 64, 4, 4), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    def shuffle(h): return h.flatten(2)[:, :, order].reshape(h.shape)
    assert torch.equal(Attention(64).double()(h), h)
    attend = awake(Attention(64))
    torch.testing.assert_close(attend(shuffle(h)), shuffle(attend(h)), **ROUNDING)
    with pytest.raises(ValueError, match="multiples of 32, got 48"): Attention(48)


def test_one_head_and_a_factor():
    attend, h = awake(Attention(48, head_dim=None, skip_scale=0.5)), rand(2, 48, 2, 3)
    q, k, v = attend.qkv(attend.norm(h)).reshape(2, 3, 48, 6).unbind(1)
    w = (q.transpose(1, 2) @ k / 48**0.5).softmax(-1)
    torch.testing.assert_close(attend(h), 0.5 * (h + attend.out((v @ w.transpose(1, 2)).reshape(h.shape))), **ROUNDING)


FAMILY = dict(channels=16, mults=(1, 2), blocks=2, num_labels=3, augment_dim=4, embedding="fourier", noise_mult=2, labels_first=True, adaptive_scale=False,
              skip_scale=0.7, resample="block_conv", taps=(1, 3, 3, 1), image_skip=True, head_dim=None, attention_up=False, eps=1e-6, init="xavier")
CONFIGS = [dict(in_channels=1), dict(in_channels=3, out_channels=6, **FAMILY), dict(in_channels=2, resample="block", embedding="ddpm", image_skip=True), dict(in_channels=3, channels=32, mults=(1, 2, 2), blocks=2, attention=(1, 2), num_labels=4),
           dict(in_channels=5, channels=32, mults=(1,), attention=()), dict(in_channels=2, channels=16, mults=(1, 3, 2), attention=[2], dropout=0.1)]


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_and_config_round_trip(config):
    net = awake(UNet(**config))
    x, c = rand(2, config["in_channels"], 8, 12), torch.tensor([-1., 0.5], dtype=torch.float64)
    assert net(x, c).shape == (2, config.get("out_channels") or x.shape[1], 8, 12)
    twin = UNet(**json.loads(json.dumps(net.config))).double().eval()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x, c), net(x, c))
    assert twin.config == net.config


def test_range_as_attention_and_names_of_parameters_stay():
    net = UNet(1, 32, attention=range(1, 2), num_labels=3)
    assert net.config["attention"] == [1]
    top = {name.split(".")[0] for name in net.state_dict()}
    assert top == {"embed_noise", "embed_label", "stem", "down", "middle", "up", "head"}
    assert "down.1.0.attention.qkv.weight" in net.state_dict() and "up.0.1.block.scale_shift.bias" in net.state_dict()


def test_fresh_network_gives_zero_and_loss_one():
    "sigma_data is the data's own, so lambda (D - x0)^2 is a squared unit normal at any sigma."
    net = UNet(1, 32)
    x0 = 0.5 * torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not net(x0, torch.zeros(500)).any()
    for sigma in (0.01, 0.5, 50.):
        loss = EDMLoss()(EDMPrecond(net), x0, sigma=torch.full((500,), sigma), generator=torch.Generator().manual_seed(1)).mean()
        assert abs(loss - 1) < 0.04    # 32,000 draws: standard deviation sqrt(2 / 32000) = 0.008, five of them


def test_labels():
    net, c = awake(UNet(1, 32, num_labels=3)), torch.tensor([-1., 0.5], dtype=torch.float64)
    x = rand(2, 1, 4, 4)
    none = net(x, c)
    assert torch.equal(net(x, c, torch.tensor([-1, -1])), none)              # in every bit: guidance subtracts the two
    mixed = net(x, c, torch.tensor([-1, 2]))
    torch.testing.assert_close(mixed[0], none[0], **ROUNDING)
    assert (mixed[1] - none[1]).abs().max() > 0.01
    by_hand = net.embed_noise(noise_embedding(16 * c, 32)) + net.embed_label.weight[[0, 2]]
    torch.testing.assert_close(net.condition(c, torch.tensor([0, 2])), nn.functional.silu(by_hand), **ROUNDING)
    assert torch.equal(UNet(1, 32, num_labels=3).eval()(x.float(), c.float(), torch.tensor([0, 1])), torch.zeros(2, 1, 4, 4))


def test_withheld_labels_get_no_gradient():
    net = UNet(1, 32, num_labels=3)
    net.condition(torch.zeros(3), torch.tensor([-1, 1, -1])).sum().backward()
    assert [row.any().item() for row in net.embed_label.weight.grad] == [False, True, False]


@pytest.mark.parametrize("first", [False, True])
def test_no_label_is_minus_one_and_no_augmentation_is_zeros(first):
    "In every bit; and where the class joins the waves it is a one-hot row times the root of the number of classes."
    net, c, x = awake(UNet(1, 32, num_labels=3, augment_dim=2, labels_first=first)), torch.tensor([-1., 0.5], dtype=torch.float64), rand(2, 1, 4, 4)
    assert torch.equal(net(x, c, torch.tensor([-1, -1])), net(x, c)) and torch.equal(net(x, c, augment=torch.zeros(2, 2)), net(x, c))
    assert (net(x, c, torch.tensor([0, -1])) - net(x, c)).abs().amax((1, 2, 3)).gt(1e-3).tolist() == [True, False]
    assert (net(x, c, augment=torch.eye(2)) - net(x, c)).abs().amax((1, 2, 3)).min() > 1e-3    # float32, as pipelines give it
    if first:
        waves = noise_embedding(16 * c, 32) + net.embed_label.weight[:, [2, 0]].T * 3**0.5 + net.embed_label.bias
        torch.testing.assert_close(net.condition(c, torch.tensor([2, 0])), nn.functional.silu(net.embed_noise(waves)), **ROUNDING)


def test_transforms_and_compile_take_the_network():
    "Labels included; torch.vmap could not look at their values."
    net = awake(UNet(1, 32, num_labels=3, augment_dim=2))
    args = rand(3, 1, 8, 8), torch.tensor([-1., 0., 1.], dtype=torch.float64), torch.tensor([0, -1, 2]), rand(3, 2)
    out = net(*args)
    torch.testing.assert_close(torch.vmap(lambda *one: net(*(a[None] for a in one))[0])(*args), out, **ROUNDING)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(*args), out, **ROUNDING)


def test_channels_last_is_the_same():
    net, x, c = awake(UNet(3, 32, mults=(1, 1, 2), attention=(2,))), rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), c), net(x, c), **ROUNDING)


def test_image_skip_shows_every_level_the_image():
    "With the blocks above it silenced, a lower level still sees the image."
    net, x, c = awake(UNet(1, 32, image_skip=True, skip_scale=0.5)), rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.float64)
    seen = []
    net.down[1][0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(x, c)
    net.halves[0].register_forward_hook(lambda module, args, out: 0 * out)
    net(x, c)
    torch.testing.assert_close(seen[1], 0.5 * net.image_skip[0](x), **ROUNDING)
    assert (seen[0] - seen[1]).abs().max() > 0.01


def test_attention_on_the_way_up_is_after_the_last_block_alone():
    stages = UNet(1, 32, blocks=3, attention_up=False).up
    assert [[isinstance(s.attention, Attention) for s in row] for row in stages] == [[False] * 3 + [True], [False] * 4]


def test_xavier():
    torch.manual_seed(0)
    net = UNet(1, 64, num_labels=5, augment_dim=2, init="xavier")
    w = net.up[0][0].block.conv1.weight
    assert abs(w.std() / (2 / (9 * (w.shape[0] + w.shape[1])))**0.5 - 1) < 0.02    # 300,000 draws: 0.001 of chance
    q = net.middle[0].attention.qkv.weight
    assert abs(q.std() / (0.2 * 2 / (q.shape[0] + q.shape[1]))**0.5 - 1) < 0.02
    assert not any(m.weight.any() for n, m in net.named_modules() if n.endswith(("conv2", "attention.out", "head.2", "embed_augment")))
    assert not any(m.bias.any() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None)


def test_images_of_a_batch_do_not_mix():
    net, x, c = awake(UNet(2, 32)), rand(3, 2, 8, 8), torch.tensor([-1., 0., 1.], dtype=torch.float64)
    one_by_one = torch.cat([net(x[i:i + 1], c[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(net(x, c), one_by_one, **ROUNDING)


def test_every_parameter_matters():
    "No weight is dead, so every skip connection and every block is wired in."
    net = awake(UNet(2, 32, mults=(1, 1, 2), blocks=2, attention=(1,), num_labels=2)).requires_grad_(True)
    net(rand(2, 2, 8, 8), torch.tensor([-1., 1.], dtype=torch.float64), torch.tensor([0, 1])).square().sum().backward()
    # a key's bias adds the same to all scores of a query and softmax drops it: its gradient is rounding, others are not tested for size
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_skip_connections_are_last_in_first_out():
    "Every stage on the way up takes the latest tensor of its size that no other has taken."
    net, made, taken, before = awake(UNet(1, 32, mults=(1, 2, 2), blocks=2)), [], [], [0]
    def note(module, args, out):
        if id(module) in up: taken.append(args[0][:, before[0]:])
        elif isinstance(module, Stage) and module not in net.middle:
            if made and args[0].shape[-1] < made[-1].shape[-1]: made.append(args[0])    # halved
            made.append(out)
        before[0] = out.shape[1]
        if module is net.stem: made.append(out)
    up = {id(s) for row in net.up for s in row}
    for m in net.modules():
        if isinstance(m, Stage) or m is net.stem: m.register_forward_hook(note)
    net(rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.float64))
    assert len(made) == len(taken) == 9
    assert all(torch.equal(a, b) for a, b in zip(reversed(made), taken))


def test_view_of_one_level_is_25_pixels():
    "12 convolutions of size 3 in a row, once normalization and attention, which see everything, are out."
    net = UNet(1, 32, mults=(1,), attention=())
    for m in list(net.modules()):
        for name, child in list(m.named_children()):
            if isinstance(child, nn.GroupNorm | Attention): setattr(m, name, nn.Identity())
    x = rand(1, 1, 40, 40).requires_grad_()
    grad, = torch.autograd.grad(awake(net)(x, torch.zeros(1, dtype=torch.float64))[0, 0, 20, 20], x)
    assert (grad[0, 0] != 0).any(0).nonzero().flatten().tolist() == list(range(8, 33))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [lambda: UNet(1, 32, mults=(1, 1), num_labels=2, augment_dim=2, noise_scale=1.), lambda: DiT(1, 2, 32, 1, 2, num_labels=2, augment_dim=2, noise_scale=1.)], ids=["unet", "dit"])
def test_networks_of_another_dtype_take_steps_and_augment_as_they_come(make, dtype):
    torch.manual_seed(0)
    net = make().requires_grad_(False)
    for p in net.parameters(): p.add_(0.1 * torch.randn(p.shape))
    x, t, labels, augment = torch.randn(3, 1, 4, 4), torch.tensor([0, 565, 999]), torch.tensor([0, 1, -1]), torch.randn(3, 2)
    want = net(x, t, labels=labels, augment=augment).double()
    for told in (t, t.float()):
        got = net.to(dtype)(x.to(dtype), told, labels=labels, augment=augment)
        assert got.dtype == dtype and (got.double() - want).norm() < (0.1 if dtype == torch.bfloat16 else 1e-5) * want.norm()    # 8 bits through a few layers


def test_bfloat16_autocast_trains():
    net = UNet(1, 32, num_labels=2)
    with torch.autocast("cpu", torch.bfloat16): out = net(torch.randn(2, 1, 4, 4), torch.zeros(2), torch.tensor([0, -1]))
    out.float().sub(1).square().mean().backward()
    assert net.head[2].weight.grad.isfinite().all() and net.head[2].weight.grad.any()


def test_it_learns():
    "Twenty steps on one batch: the loss must fall well below the 1 of a fresh network."
    torch.manual_seed(0)
    x0, denoiser = torch.randn(8, 1, 1, 1).sign().expand(8, 1, 8, 8) * 0.5, EDMPrecond(UNet(1, 32))
    opt, loss = torch.optim.Adam(denoiser.parameters(), 2e-3), EDMLoss()
    for _ in range(20):
        l = loss(denoiser, x0, sigma=torch.full((8,), 0.5)).mean()
        l.backward(); opt.step(); opt.zero_grad()
    assert l < 0.5


@pytest.mark.parametrize("settings, wanted", [
    (dict(in_channels=0), "in_channels must be a positive integer, got 0"),
    (dict(channels=64.), "channels must be a positive integer, got 64.0"),
    (dict(channels=33, mults=(1, 32)), "channels must be even"),
    (dict(mults=()), "mults must hold"),
    (dict(mults=(1, 0)), r"mults\[1\] must be a positive integer, got 0"),
    (dict(mults=(1, 1.5)), r"mults\[1\] must be a positive integer, got 1.5"),
    (dict(blocks=0), "blocks must be a positive integer"),
    (dict(attention=(2,)), "levels from 0 to 1, got 2"),
    (dict(attention=(-1,)), "levels from 0 to 1, got -1"),
    (dict(channels=48, mults=(1, 1)), "attention at level 1 needs channels in multiples of 32, got 48"),
    (dict(channels=16, attention=(0,)), "attention at level 0 needs channels in multiples of 32, got 16"),
    (dict(num_labels=-1), "num_labels must be an integer from 0, got -1"),
    (dict(dropout=1.), "dropout must be from 0 to below 1, got 1"),
    (dict(noise_scale=0.), "noise_scale must be positive, got 0"),
    (dict(skip_scale=-1.), "skip_scale must be positive, got -1"),
    (dict(eps=0), "eps must be positive, got 0"),
    (dict(augment_dim=-1), "augment_dim must be an integer from 0, got -1"),
    (dict(out_channels=0), "out_channels must be a positive integer, got 0"),
    (dict(noise_mult=0), "noise_mult must be a positive integer, got 0"),
    (dict(channels=96, mults=(1, 1), head_dim=64), "attention at level 1 needs channels in multiples of 64, got 96"),
    (dict(embedding="x"), "embedding must be one of adm, ddpm, fourier, got 'x'"),
    (dict(resample="x"), "resample must be one of plain, block, block_conv, got 'x'"),
    (dict(init="x"), "init must be one of torch, xavier, got 'x'"),
    (dict(taps=(1, 2, 1)), r"taps must be an even number of values .*, got \[1, 2, 1\]"),
    (dict(taps=(1, -1)), "taps must be an even number of values with a sum other than 0"),
])
def test_settings_refused(settings, wanted):
    with pytest.raises(ValueError, match=wanted): UNet(**dict(in_channels=1) | settings)


@pytest.mark.parametrize("shape, labels, wanted", [
    ((2, 1, 6, 8), None, "multiples of 4 for 3 levels, got 6 x 8"),
    ((2, 1, 8, 7), None, "multiples of 4 for 3 levels, got 8 x 7"),
    ((2, 3, 8, 8), None, r"x must be \(B, 1, H, W\), got shape \(2, 3, 8, 8\)"),
    ((1, 8, 8), None, r"x must be \(B, 1, H, W\)"),
    ((2, 1, 8, 8), [0, 3], r"-1 \(none\) to 2, got \[3\]"),
    ((2, 1, 8, 8), [-2, 0], r"got \[-2\]"),
    ((2, 1, 8, 8), [[0], [1]], r"labels must be \(B,\), got shape \(2, 1\)"),
    ((2, 1, 8, 8), [0., 1.], "labels must be integers, got torch.float32"),
])
def test_calls_refused(shape, labels, wanted):
    net = UNet(1, 32, mults=(1, 1, 1), num_labels=3)
    with pytest.raises(ValueError, match=wanted): net(torch.zeros(shape), torch.zeros(2), None if labels is None else torch.tensor(labels))


def test_labels_refused_by_an_unconditional_network():
    with pytest.raises(ValueError, match="num_labels=0"): UNet(1, 32)(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.tensor([-1]))


@pytest.mark.parametrize("dim, augment, wanted", [(0, torch.zeros(1, 2), "augment_dim=0"), (2, torch.zeros(1, 3), r"augment must be \(B, 2\), got shape \(1, 3\)"),
                                                  (2, torch.zeros(2), r"augment must be \(B, 2\), got shape \(2,\)")])
def test_augment_refused(dim, augment, wanted):
    with pytest.raises(ValueError, match=wanted): UNet(1, 32, augment_dim=dim)(torch.zeros(1, 1, 4, 4), torch.zeros(1), augment=augment)
