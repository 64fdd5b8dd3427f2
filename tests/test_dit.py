"The diffusion transformer: patches, positions, attention and blocks against their formulas, what a fresh network is, conditions, sizes, settings."
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_edm.dit import DIT_SIZES, DiT, DiTBlock, SelfAttention, patchify, position_embedding, unpatchify
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.precond import EDMLoss, EDMPrecond
from ddpm_edm.solvers import generate
from ddpm_edm.unet import noise_embedding

ROUNDING = dict(atol=1e-10, rtol=1e-10)    # float64, sums of thousands of terms of order 1
sizes = st.integers(1, 5)


def awake(module, seed=0):
    "float64, with random weights in every linear map, those that start at zero too."
    torch.manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Embedding): m.reset_parameters()
    return module.double().eval().requires_grad_(False)


def rand(*shape, seed=1): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- patches ----

@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, sizes, sizes, sizes)
def test_patches_round_trip_and_hold_their_pixels(B, C, p, q, rows, cols):
    x = torch.arange(B * C * p * rows * q * cols).reshape(B, C, p * rows, q * cols)
    tokens = patchify(x, (p, q))
    assert tokens.shape == (B, rows * cols, C * p * q)
    assert torch.equal(unpatchify(tokens, (p, q), x.shape[2:]), x)
    for r in range(rows):
        for c in range(cols):
            wanted = x[:, :, r * p:(r + 1) * p, c * q:(c + 1) * q].flatten(1)    # by slicing, no reshape of the whole
            assert torch.equal(tokens[:, r * cols + c], wanted)


def test_a_square_patch_may_be_one_number():
    x = rand(2, 3, 4, 6)
    assert torch.equal(patchify(x, 2), patchify(x, (2, 2)))
    assert torch.equal(unpatchify(patchify(x, 2), 2, (4, 6)), x)


def test_a_linear_map_of_patches_is_a_convolution():
    x, layer = rand(2, 3, 8, 12), nn.Conv2d(3, 7, (2, 4), stride=(2, 4)).double()
    by_tokens = nn.functional.linear(patchify(x, (2, 4)), layer.weight.flatten(1), layer.bias)
    torch.testing.assert_close(by_tokens.transpose(1, 2), layer(x).flatten(2), **ROUNDING)


@pytest.mark.parametrize("call, wanted", [
    (lambda: patchify(torch.zeros(1, 1, 6, 8), 4), "multiples of the patch, 4 x 4, got 6 x 8"),
    (lambda: patchify(torch.zeros(1, 1, 8, 6), (1, 4)), "multiples of the patch, 1 x 4, got 8 x 6"),
    (lambda: unpatchify(torch.zeros(1, 4, 4), 2, (4, 6)), "4 patches of 2 x 2 with 4 numbers each do not make images of 4 x 6"),
    (lambda: unpatchify(torch.zeros(1, 4, 5), 2, (4, 4)), "with 5 numbers"),
    (lambda: unpatchify(torch.zeros(1, 4, 4), 2, (1, 16)), "do not make images of 1 x 16"),
])
def test_patches_refused(call, wanted):
    with pytest.raises(ValueError, match=wanted): call()


# ---- positions ----

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8))
def test_similarity_of_positions_depends_on_the_offset_alone(rows, cols, quarter):
    e = position_embedding(rows, cols, 4 * quarter, dtype=torch.float64)
    f = 10_000.**(-torch.arange(quarter, dtype=torch.float64) / quarter)
    place = torch.tensor([[r, c] for r in range(rows) for c in range(cols)], dtype=torch.float64)
    wanted = ((place[:, None] - place)[..., None] * f).cos().sum((-1, -2))
    torch.testing.assert_close(e @ e.T, wanted, atol=1e-10, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.integers(0, 5))
def test_a_larger_grid_continues_a_smaller(rows, cols, more_rows, more_cols):
    small, large = position_embedding(rows, cols, 16), position_embedding(rows + more_rows, cols + more_cols, 16)
    assert torch.equal(large.reshape(rows + more_rows, -1, 16)[:rows, :cols].flatten(0, 1), small)
    assert len(large.unique(dim=0)) == len(large)    # no two places alike


def test_positions_by_hand():
    e = position_embedding(2, 3, 8, dtype=torch.float64)
    def wave(u): return [math.cos(u), math.cos(u / 100), math.sin(u), math.sin(u / 100)]
    wanted = torch.tensor([wave(r) + wave(c) for r in range(2) for c in range(3)], dtype=torch.float64)
    torch.testing.assert_close(e, wanted, **ROUNDING)
    assert position_embedding(1, 1, 4).dtype == torch.float32


@pytest.mark.parametrize("args, wanted", [((0, 2, 8), "at least 1, got 0 and 2"), ((2, -1, 8), "got 2 and -1"), ((2, 2, 6), "multiple of 4, got 6"), ((2, 2, 0), "got 0")])
def test_positions_refused(args, wanted):
    with pytest.raises(ValueError, match=wanted): position_embedding(*args)


# ---- attention and block ----

def attention_by_hand(layer, h):
    "One query, one head, one image at a time."
    B, N, width = h.shape
    d, out = width // layer.heads, torch.zeros_like(h)
    for b in range(B):
        q, k, v = (h[b] @ layer.qkv.weight.T + layer.qkv.bias).split(width, dim=1)
        for head in range(layer.heads):
            part = slice(head * d, (head + 1) * d)
            for i in range(N):
                w = torch.tensor([math.exp(float(q[i, part] @ k[j, part]) / d**0.5) for j in range(N)], dtype=torch.float64)
                out[b, i, part] = (w / w.sum()) @ v[:, part]
    return out @ layer.out.weight.T + layer.out.bias


def norm_by_hand(h): return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def block_by_hand(block, h, emb):
    b1, a1, g1, b2, a2, g2 = (emb @ block.modulation.weight.T + block.modulation.bias)[:, None].split(h.shape[-1], dim=-1)
    h = h + g1 * attention_by_hand(block.attention, norm_by_hand(h) * (1 + a1) + b1)
    u = (norm_by_hand(h) * (1 + a2) + b2) @ block.mlp[0].weight.T + block.mlp[0].bias
    u = 0.5 * u * (1 + ((2 / math.pi)**0.5 * (u + 0.044715 * u**3)).tanh())    # GELU, its tanh form
    return h + g2 * (u @ block.mlp[3].weight.T + block.mlp[3].bias)


def test_attention_formula():
    layer, h = awake(SelfAttention(24, heads=3)), rand(2, 5, 24)
    assert layer.heads == 3 and {block.attention.heads for block in DiT(1, width=24, heads=6).blocks} == {6}
    torch.testing.assert_close(layer(h), attention_by_hand(layer, h), **ROUNDING)


def test_block_formula():
    block, h, emb = awake(DiTBlock(16, heads=2, mlp=2.5)), rand(2, 5, 16), rand(2, 16, seed=2)
    assert block.mlp[0].out_features == 40
    torch.testing.assert_close(block(h, emb), block_by_hand(block, h, emb), **ROUNDING)


def test_network_by_hand():
    "The whole network from its weights, without its own code: convolutions for patches, loops for attention, waves by formula."
    net = awake(DiT(2, patch=(2, 3), width=16, depth=2, heads=2, num_labels=3, augment_dim=4, noise_scale=7.))
    x, c, labels, augment = rand(3, 2, 4, 9), torch.tensor([-1., 0., 0.7], dtype=torch.float64), torch.tensor([2, -1, 0]), rand(3, 4, seed=3)
    angles = 7 * c[:, None] * 10_000.**(-torch.arange(128, dtype=torch.float64) / 128)
    first, _, last = net.embed_noise
    emb = nn.functional.silu(torch.cat([angles.cos(), angles.sin()], 1) @ first.weight.T + first.bias) @ last.weight.T + last.bias
    emb = emb + augment @ net.embed_augment.weight.T
    for i, label in enumerate(labels.tolist()):
        if label >= 0: emb[i] += net.embed_label.weight[label]
    emb = emb * emb.sigmoid()
    h = nn.functional.conv2d(x, net.stem.weight.reshape(16, 2, 2, 3), net.stem.bias, stride=(2, 3)).flatten(2).transpose(1, 2)
    f = 10_000.**(-torch.arange(4, dtype=torch.float64) / 4)
    for i in range(6):
        r, col = i // 3 * f, i % 3 * f
        h[:, i] += torch.cat([r.cos(), r.sin(), col.cos(), col.sin()])
    for block in net.blocks: h = block_by_hand(block, h, emb)
    b, a = (emb @ net.modulation.weight.T + net.modulation.bias)[:, None].split(16, dim=-1)
    out = (norm_by_hand(h) * (1 + a) + b) @ net.head.weight.T + net.head.bias
    wanted = nn.functional.conv_transpose2d(out.transpose(1, 2).reshape(3, 12, 2, 3), torch.eye(12).double().reshape(12, 2, 2, 3), stride=(2, 3))
    torch.testing.assert_close(net(x, c, labels, augment), wanted, **ROUNDING)
    torch.testing.assert_close(net.condition(c, labels, augment), emb, **ROUNDING)


def test_without_positions_shuffled_patches_give_the_shuffled_answer():
    net, x, c, order = awake(DiT(1, width=16, depth=2)), rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.float64), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    def shuffle(x): return unpatchify(patchify(x, 2)[:, order], 2, (8, 8))
    assert (net(shuffle(x), c) - shuffle(net(x, c))).abs().max() > 0.01
    at = position_embedding(4, 4, 16, dtype=torch.float64)
    net.stem.register_forward_hook(lambda m, args, out: out - at)    # takes off what is added next
    torch.testing.assert_close(net(shuffle(x), c), shuffle(net(x, c)), **ROUNDING)


def test_dropout_is_only_in_training():
    block, h, emb = awake(DiTBlock(16, heads=2, dropout=0.5)), rand(1, 5, 16), rand(1, 16)
    assert torch.equal(block(h, emb), block(h, emb))
    block.train()
    assert not torch.equal(block(h, emb), block(h, emb))


# ---- the start ----

def test_a_fresh_block_is_the_identity_and_a_fresh_network_zero():
    net = DiT(3, width=16, num_labels=2, augment_dim=2)
    h = rand(2, 5, 16).float()
    assert all(torch.equal(block(h, rand(2, 16).float()), h) for block in net.blocks)
    assert not net(rand(2, 3, 4, 4).float(), torch.zeros(2), torch.tensor([0, 1]), torch.ones(2, 2)).any()


def test_loss_of_a_fresh_network_is_one():
    x0 = 0.5 * torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for sigma in (0.01, 0.5, 50.):
        loss = EDMLoss()(EDMPrecond(DiT(1, width=16)), x0, sigma=torch.full((500,), sigma), generator=torch.Generator().manual_seed(1)).mean()
        assert abs(loss - 1) < 0.04    # 32,000 draws: standard deviation sqrt(2 / 32000) = 0.008, five of them


def test_the_first_gradient_reaches_the_head_the_second_the_gates_the_third_all():
    torch.manual_seed(0)
    net, x = DiT(1, width=16, depth=2, num_labels=2, augment_dim=2), torch.randn(4, 1, 4, 4)
    opt, reached = torch.optim.SGD(net.parameters(), 0.01), []
    for _ in range(3):
        opt.zero_grad()
        (net(x, torch.linspace(-1, 1, 4), torch.tensor([0, 1, 0, 1]), torch.ones(4, 2)) - x).square().mean().backward()
        reached.append({name for name, p in net.named_parameters() if p.grad.any()})
        opt.step()
    gates = net.blocks[0].modulation.weight
    assert reached[0] == {"head.weight", "head.bias"}
    assert {"blocks.0.modulation.weight", "blocks.1.modulation.weight", "modulation.weight"} < reached[1]
    assert not any("mlp" in name or "attention" in name for name in reached[1])
    assert reached[2] == {name for name, _ in net.named_parameters()}
    assert gates.any()


def test_first_weights_keep_the_size():
    "Xavier: uniform of variance 2 / (fan in + fan out); within 10%, 5 standard errors of 4,000 or more uniform draws are under 8%."
    net = DiT(4, 4, width=64, depth=1, heads=2, num_labels=200, augment_dim=100)
    for m in (net.stem, net.embed_noise[0], net.embed_noise[2], net.blocks[0].attention.qkv, net.blocks[0].attention.out, net.blocks[0].mlp[0], net.blocks[0].mlp[3], net.embed_augment):
        n_out, n_in = m.weight.shape
        assert abs(m.weight.var() * (n_in + n_out) / 2 - 1) < 0.1
        assert m.bias is None or not m.bias.any()
    assert abs(net.embed_label.weight.std() - 1) < 0.05    # 12,800 normals: 0.006, more than five of them


# ---- conditions ----

def test_labels_and_augmentation():
    net, c, x = awake(DiT(1, width=16, num_labels=3, augment_dim=2)), torch.tensor([-1., 0.5], dtype=torch.float64), rand(2, 1, 4, 4)
    none = net(x, c)
    assert torch.equal(net(x, c, torch.tensor([-1, -1])), none)                                 # in every bit: guidance subtracts the two
    assert torch.equal(net(x, c, None, torch.zeros(2, 2, dtype=torch.float64)), none)
    mixed = net(x, c, torch.tensor([-1, 2]))
    torch.testing.assert_close(mixed[0], none[0], **ROUNDING)
    assert (mixed[1] - none[1]).abs().max() > 1e-3
    told = net(x, c, None, torch.tensor([[0., 0.], [1., -1.]], dtype=torch.float64))
    torch.testing.assert_close(told[0], none[0], **ROUNDING)
    assert (told[1] - none[1]).abs().max() > 1e-3
    assert (net(x, c + 0.5) - none).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(net(x, c[:1], torch.tensor([1])), net(x, c[:1].expand(2), torch.tensor([1, 1])), **ROUNDING)    # one for all
    int32 = net(x, c, torch.tensor([0, 1], dtype=torch.int32))
    assert torch.equal(int32, net(x, c, torch.tensor([0, 1])))


def test_withheld_labels_get_no_gradient():
    net = DiT(1, width=16, num_labels=3)
    net.condition(torch.zeros(3), torch.tensor([-1, 1, -1])).sum().backward()
    assert [row.any().item() for row in net.embed_label.weight.grad] == [False, True, False]


def test_noise_scale_and_features():
    net, c = awake(DiT(1, width=16, noise_scale=3.)), torch.tensor([-1., 0.5], dtype=torch.float64)
    torch.testing.assert_close(net.condition(c), nn.functional.silu(net.embed_noise(noise_embedding(3 * c, 256))), **ROUNDING)


def test_images_of_a_batch_do_not_mix():
    net, x, c = awake(DiT(2, width=16)), rand(3, 2, 8, 8), torch.tensor([-1., 0., 1.], dtype=torch.float64)
    one_by_one = torch.cat([net(x[i:i + 1], c[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(net(x, c), one_by_one, **ROUNDING)


def test_every_parameter_matters():
    net = awake(DiT(2, width=16, depth=2, num_labels=2, augment_dim=1)).requires_grad_(True)
    net(rand(2, 2, 8, 8), torch.tensor([-1., 1.], dtype=torch.float64), torch.tensor([0, 1]), rand(2, 1)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_denoiser_hands_conditions_on_and_samples_any_shape():
    net, x = awake(DiT(1, width=16, num_labels=3, augment_dim=2)), rand(2, 1, 4, 8)
    labels, augment, sigma = torch.tensor([2, 0]), rand(2, 2), torch.tensor([0.3, 5.], dtype=torch.float64)
    D = EDMPrecond(net, 0.5)(x, sigma, labels=labels, augment=augment)
    s = sigma[:, None, None, None]
    F = net(x / (s**2 + 0.25).sqrt(), sigma.log() / 4, labels, augment)
    torch.testing.assert_close(D, 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * F, rtol=0, atol=1e-5)    # the wrapper calls it in float32 at least
    made = generate(EDMPrecond(DiT(1, width=16, num_labels=3)), range(2), (1, 4, 10), karras_sigmas(4), labels=torch.tensor([0, -1]))
    assert made.shape == (2, 1, 4, 10) and made.isfinite().all()


# ---- sizes, settings, files ----

CONFIGS = [dict(in_channels=1), dict(in_channels=3, patch=1, width=32, depth=2, heads=8, num_labels=4), dict(in_channels=5, patch=(4, 2), width=20, depth=1, heads=5, mlp=1.5),
           dict(in_channels=2, patch=[1, 4], width=12, heads=3, dropout=0.1, augment_dim=3, noise_scale=1.)]


@pytest.mark.parametrize("config", CONFIGS)
def test_shapes_and_config_round_trip(config):
    net = awake(DiT(**config))
    c = torch.tensor([-1., 0.5], dtype=torch.float64)
    twin = type(net)(**json.loads(json.dumps(net.config))).double().eval()
    twin.load_state_dict(net.state_dict())
    assert twin.config == net.config
    assert (net.in_channels, net.num_labels, net.augment_dim) == (config["in_channels"], config.get("num_labels", 0), config.get("augment_dim", 0))
    for size in ((8, 8), (4, 12), (16, 8)):    # one network, several sizes
        x = rand(2, config["in_channels"], *size)
        assert net(x, c).shape == x.shape
        assert torch.equal(twin(x, c), net(x, c))


def test_defaults_and_names_of_parameters_stay():
    net = DiT(1, num_labels=3, augment_dim=2)
    assert net.config == dict(in_channels=1, patch=2, width=128, depth=4, heads=4, mlp=4., num_labels=3, augment_dim=2, dropout=0., noise_scale=16.)
    assert {name.split(".")[0] for name in net.state_dict()} == {"embed_noise", "embed_label", "embed_augment", "stem", "blocks", "modulation", "head"}
    assert {"blocks.3.attention.qkv.weight", "blocks.0.mlp.3.bias", "blocks.0.modulation.weight"} < set(net.state_dict())
    assert not list(net.buffers())    # positions are computed, not kept


PUBLISHED = {"S/8": (33, .36), "S/4": (33, 1.41), "S/2": (33, 6.06), "B/8": (131, 1.42), "B/4": (130, 5.56), "B/2": (130, 23.01),
             "L/8": (459, 5.01), "L/4": (458, 19.70), "L/2": (458, 80.71), "XL/8": (676, 7.39), "XL/4": (675, 29.05), "XL/2": (675, 118.64)}    # 10^6 weights, 10^9 multiplications


def counted(net, *shape):
    with torch.device("meta"): args = torch.zeros(1, *shape), torch.zeros(1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad(): net.to("meta")(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    "The paper's networks also store positions, know a vector for no class and double the output (learned variance)."
    (size, patch), (millions, giga) = name.split("/"), PUBLISHED[name]
    p = int(patch)
    with torch.device("meta"): net = DiT(4, p, **DIT_SIZES[size], num_labels=1000)
    N, w = (32 // p)**2, net.width
    weights = sum(t.numel() for t in net.parameters()) + N * w + w + 4 * p**2 * (w + 1)
    assert abs(weights / 1e6 - millions) < 0.6    # rounded to a million, up or down
    assert abs((counted(net, 4, 32, 32) / 2 + 4 * p**2 * N * w) / 1e9 / giga - 1) < 0.02
    if name == "XL/2": assert weights == 675_129_632    # as the authors' code prints it


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 2, (1, 2), (4, 2)]), st.sampled_from([(8, 1), (12, 3), (16, 4)]), st.integers(1, 3), st.sampled_from([1., 2.5, 4.]), st.sampled_from([(4, 4), (8, 12)]))
def test_operations_follow_the_formula(C, patch, width_heads, depth, mlp, size):
    (w, heads), (p, q) = width_heads, (patch, patch) if isinstance(patch, int) else patch
    net = DiT(C, patch, w, depth, heads, mlp)
    N, hidden = size[0] * size[1] // (p * q), round(mlp * w)
    once = depth * (4 * N * w**2 + 2 * N * w * hidden + 2 * N**2 * w + 6 * w**2) + 2 * N * C * p * q * w + 256 * w + 3 * w**2
    assert counted(net, C, *size) == 2 * once


@pytest.mark.parametrize("change, wanted", [
    (dict(in_channels=0), "in_channels must be a positive integer, got 0"),
    (dict(patch=0), "patch must be a positive integer, got 0"),
    (dict(patch=(2, 1.5)), "patch must be a positive integer, got 1.5"),
    (dict(patch=(2, 2, 2)), "patch must be one side or"),
    (dict(patch=2.), "patch"),
    (dict(width=64.), "width must be a positive integer, got 64.0"),
    (dict(width=30, heads=3), "width must be a multiple of 4"),
    (dict(depth=0), "depth must be a positive integer, got 0"),
    (dict(heads=0), "heads must be a positive integer, got 0"),
    (dict(heads=3), "heads must divide width, got 3 heads for width 128"),
    (dict(mlp=0.), "mlp must be positive, got 0"),
    (dict(mlp=math.inf), "mlp must be positive, got inf"),
    (dict(num_labels=-1), "num_labels must be an integer from 0, got -1"),
    (dict(augment_dim=1.5), "augment_dim must be an integer from 0, got 1.5"),
    (dict(dropout=1.), "dropout must be from 0 to below 1, got 1"),
    (dict(noise_scale=0.), "noise_scale must be positive, got 0"),
])
def test_settings_refused(change, wanted):
    with pytest.raises(ValueError, match=wanted): DiT(**dict(in_channels=1) | change)


@pytest.mark.parametrize("shape, c, cond, wanted", [
    ((2, 1, 6, 8), 2, {}, "multiples of the patch, 4 x 4, got 6 x 8"),
    ((2, 1, 8, 7), 2, {}, "multiples of the patch, 4 x 4, got 8 x 7"),
    ((2, 3, 8, 8), 2, {}, r"x must be \(B, 1, H, W\), got shape \(2, 3, 8, 8\)"),
    ((1, 8, 8), 1, {}, r"x must be \(B, 1, H, W\)"),
    ((2, 1, 8, 8), 3, {}, r"c_noise must be \(2,\) for 2 images, got shape \(3,\)"),
    ((2, 1, 8, 8), 2, dict(labels=[0, 3]), r"-1 \(none\) to 2, got \[3\]"),
    ((2, 1, 8, 8), 2, dict(labels=[-2, 0]), r"got \[-2\]"),
    ((2, 1, 8, 8), 2, dict(labels=[[0], [1]]), r"labels must be \(B,\), got shape \(2, 1\)"),
    ((2, 1, 8, 8), 2, dict(labels=[0, 1, 2]), r"labels must be \(2,\) for 2 images, got shape \(3,\)"),
    ((2, 1, 8, 8), 2, dict(labels=[0., 1.]), "labels must be integers, got torch.float32"),
    ((2, 1, 8, 8), 2, dict(augment=[[0.], [1.]]), r"augment must be \(B, 2\), got shape \(2, 1\)"),
    ((2, 1, 8, 8), 2, dict(augment=[0., 1.]), r"augment must be \(B, 2\), got shape \(2,\)"),
])
def test_calls_refused(shape, c, cond, wanted):
    net = DiT(1, 4, width=16, depth=1, num_labels=3, augment_dim=2)
    with pytest.raises(ValueError, match=wanted): net(torch.zeros(shape), torch.zeros(c), **{k: torch.tensor(v) for k, v in cond.items()})


@pytest.mark.parametrize("cond, wanted", [(dict(labels=torch.tensor([-1])), "labels given to a network built with num_labels=0"), (dict(augment=torch.zeros(1, 0)), "augment given to a network built with augment_dim=0")])
def test_conditions_refused_by_a_network_without(cond, wanted):
    with pytest.raises(ValueError, match=wanted): DiT(1, width=16)(torch.zeros(1, 1, 4, 4), torch.zeros(1), **cond)


# ---- machinery ----

def test_meta_device():
    with torch.device("meta"): net = DiT(3, num_labels=10, augment_dim=9)
    with torch.device("meta"): args = torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 9)
    assert net(*args).shape == (2, 3, 8, 8) and net(*args).device.type == "meta"
    saved = DiT(3, num_labels=10, augment_dim=9).state_dict()
    net.load_state_dict(saved, assign=True)
    assert {p.device.type for p in net.parameters()} == {"cpu"}


def test_vmap_compile_and_per_sample_gradients():
    "No value of a label is looked at where there is none to see."
    net, x, c, labels = awake(DiT(1, width=16, depth=1, num_labels=3)), rand(4, 1, 4, 4), torch.linspace(-1, 1, 4, dtype=torch.float64), torch.tensor([0, 2, -1, 1])
    wanted = net(x, c, labels)
    with sdpa_kernel(SDPBackend.MATH):    # the fused kernel has no rule for vmap, and says so
        mapped = torch.vmap(net)(x.reshape(2, 2, 1, 4, 4), c.reshape(2, 2), labels.reshape(2, 2))
        def loss(weights, x, c, l): return torch.func.functional_call(net, weights, (x[None], c[None], l[None])).square().sum()
        weights = dict(net.named_parameters())
        grads = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(weights, x, c, labels)
    torch.testing.assert_close(mapped.flatten(0, 1), wanted, **ROUNDING)
    one = torch.func.grad(loss)(weights, x[1], c[1], labels[1])
    torch.testing.assert_close({k: g[1] for k, g in grads.items()}, one, **ROUNDING)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, c, labels), wanted, **ROUNDING)


def test_bfloat16_autocast_trains_with_a_float32_stream():
    net, seen = DiT(1, width=16, num_labels=2), []
    net.blocks[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16): out = net(torch.randn(2, 1, 4, 4), torch.zeros(2), torch.tensor([0, -1]))
    assert seen == [torch.float32]    # positions are float32, so what the blocks add to is not rounded
    out.float().sub(1).square().mean().backward()
    assert net.head.bias.grad.isfinite().all() and net.head.bias.grad.any()


def test_half_networks_count_positions_in_float32():
    net, x = DiT(1, 1, width=16, depth=1).bfloat16(), torch.zeros(1, 1, 1, 300, dtype=torch.bfloat16)
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    net(x, torch.zeros(1, dtype=torch.bfloat16))
    torch.testing.assert_close(seen[0].float(), position_embedding(1, 300, 16).bfloat16().float(), atol=0, rtol=0)
    assert not torch.equal(seen[0][256], seen[0][257])


def test_channels_last_gives_the_same():
    net, x, c = awake(DiT(3, width=16)), rand(2, 3, 8, 4), torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last), c), net(x, c), **ROUNDING)


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_it_learns(size):
    "Forty steps on one batch, square or not: the loss must fall well below the 1 of a fresh network."
    torch.manual_seed(0)
    x0, denoiser = torch.randn(8, 1, 1, 1).sign().expand(8, 1, *size) * 0.5, EDMPrecond(DiT(1, width=32, depth=2))
    opt, loss = torch.optim.Adam(denoiser.parameters(), 2e-3), EDMLoss()
    for _ in range(40):
        l = loss(denoiser, x0, sigma=torch.full((8,), 0.5)).mean()
        l.backward(); opt.step(); opt.zero_grad()
    assert l < 0.5
