"ImageData, its numbers, and every way of getting pictures into it."
import errno
import os
import random
import sys
import time
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import run
from ddpm_edm import data as module
from ddpm_edm.data import DATASETS, ImageData, MappedData, digits, from_dataset, image_folder, load_data

X = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)


def picture(size=(20, 16), seed=0):
    "A smooth colour picture whose left half is darker and whose top is redder."
    w, h = size
    x, y = np.meshgrid(np.linspace(0, 1, w), np.linspace(0, 1, h))
    a = np.stack([200 * (1 - y) + 30, 180 * x + 40, 90 + 60 * np.sin(3 * x + seed)], axis=2)
    return Image.fromarray(a.astype(np.uint8))


def save(path: Path, image=None, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **kw)
    return path


def values(data): return data.batch(slice(None))[0]


# --- ImageData

@pytest.mark.parametrize("max_value", [1, 16, 100, 255])
def test_batch_hits_every_value(max_value):
    images = torch.arange(max_value + 1, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    x = values(ImageData(images, max_value=max_value)).flatten()
    exact = torch.linspace(-1, 1, max_value + 1, dtype=torch.float64)
    assert x.dtype == torch.float32 and x[0] == -1 and x[-1] == 1    # the ends exactly: nothing outside [-1, 1]
    assert (x - exact).abs().max() < 2e-7                            # a few float32 roundings of numbers up to 2
    assert torch.equal(((x + 1) * max_value / 2).round().to(torch.uint8), images.flatten())


def test_batch_index_and_labels():
    d = ImageData(X.repeat(3, 1, 1, 1), [0, 1, 2, 2, 1, 0])
    i = torch.tensor([5, 2])
    x, labels = d.batch(i)
    assert torch.equal(x, values(d)[i]) and labels.tolist() == [0, 2] and labels.dtype == torch.int64
    assert ImageData(X).batch(slice(0, 1))[1] is None
    assert (len(d), d.shape, d.num_labels, d.classes) == (6, (3, 4, 5), 3, ["0", "1", "2"])
    assert ImageData(X).num_labels == 0 and repr(d) == "images: 6 images 3 x 4 x 5, 3 classes"


def test_numpy_is_accepted():
    d = ImageData(X.numpy(), np.array([1, 0], dtype=np.uint8))
    assert torch.equal(d.images, X) and d.labels.tolist() == [1, 0]


def test_to_keeps_everything():
    d = digits()
    e = d.to("cpu")
    assert e.fingerprint() == d.fingerprint() and e.name == d.name and torch.equal(values(d), values(e))
    assert ImageData(X).to("cpu").classes == []


def exact_stats(images, max_value):
    "Mean and standard deviation in rational arithmetic."
    v, c = np.unique(images.numpy(), return_counts=True)
    n = int(c.sum())
    p = [(Fraction(int(k), n), Fraction(2 * int(u), max_value) - 1) for u, k in zip(v, c)]
    mean = sum(a * b for a, b in p)
    return float(mean), float(sum(a * (b - mean)**2 for a, b in p))**0.5


@pytest.mark.parametrize("max_value", [16, 255])
def test_stats_are_exact(max_value):
    g = torch.Generator().manual_seed(0)
    images = (torch.rand(50, 3, 9, 7, generator=g)**3 * (max_value + 1)).to(torch.uint8)
    stats = ImageData(images, max_value=max_value).stats()
    assert stats == pytest.approx(exact_stats(images, max_value), abs=2e-15)    # a few float64 roundings of numbers near 1
    x = values(ImageData(images, max_value=max_value)).double()
    assert stats == pytest.approx((x.mean().item(), x.std(unbiased=False).item()), abs=2e-7)    # x itself is float32


def test_stats_of_one_value():
    assert ImageData(torch.full((2, 1, 3, 3), 255, dtype=torch.uint8)).stats() == (1, 0)


def test_digits():
    d = digits()
    assert (len(d), d.shape, d.num_labels, d.name, d.max_value) == (1797, (1, 8, 8), 10, "digits", 16)
    assert d.stats() == pytest.approx(exact_stats(d.images, 16), abs=2e-15)
    assert d.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]    # scikit-learn's documentation
    assert d.stats().std == pytest.approx(0.752098, abs=1e-6)


def test_fingerprint_changes_with_anything():
    base = lambda **kw: ImageData(**(dict(images=X.clone(), labels=[0, 1], classes=["a", "b"]) | kw)).fingerprint()
    pixel = X.clone()
    pixel[1, 2, 3, 4] += 1
    prints = [base(), base(images=pixel), base(labels=[1, 0]), base(classes=["a", "c"]), base(max_value=200),
              base(images=X.reshape(2, 3, 5, 4)), base(images=X.flip(0)), base(labels=None, classes=None)]
    assert len(set(prints)) == len(prints) and base() == prints[0]
    assert len(base()) == 16 and int(base(), 16) >= 0
    assert base(images=X.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)) == base()    # memory layout does not matter


@pytest.mark.parametrize("kw, message", [
    (dict(images=X.float()), "from_float"),
    (dict(images=X[0]), r"\(N, C, H, W\).*\(3, 4, 5\)"),
    (dict(images=X[:0]), "not empty"),
    (dict(images=X.int()), "int32"),
    (dict(images=X, max_value=50), "largest pixel value, 119, to 255, got 50"),
    (dict(images=X, max_value=256), "got 256"),
    (dict(images=X, labels=[0]), r"2 integers.*\(1,\)"),
    (dict(images=X, labels=[[0, 1]]), r"\(1, 2\)"),
    (dict(images=X, labels=[0., 1.5]), "integers"),
    (dict(images=X, labels=[0, -1]), "got -1 at 1"),
    (dict(images=X, labels=[-1, -1]), "got -1 at 0"),
    (dict(images=X, labels=[0, 2], classes=["a", "b"]), r"from 0 to 1, got 2 at 1 \(1 of 2"),
    (dict(images=X, classes=["a"]), "classes need labels"),
])
def test_refused(kw, message):
    with pytest.raises(ValueError, match=message): ImageData(**kw)


def test_from_float():
    x = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    d = ImageData.from_float(x, labels=[0, 1] * 10, classes=["a", "b"], name="mine")
    assert (d.name, d.classes, d.max_value) == ("mine", ["a", "b"], 255)
    error = values(d) - x
    assert error.abs().max() <= 1 / 255 + 2e-7        # half a step of 2/255, and float32 rounding
    assert abs(error.mean()) < 1e-4                   # rounding, not cutting off: 4 standard errors of 3840 values
    ends = torch.tensor([-1., 1.]).reshape(1, 1, 1, 2)
    assert torch.equal(values(ImageData.from_float(ends)), ends)
    assert torch.equal(ImageData.from_float(x.double().numpy()).images, d.images)
    d = digits()    # what came from bytes goes back to the same bytes, through half precision too
    back = ImageData.from_float(values(d))
    assert (values(back) - values(d)).abs().max() <= 1 / 255 + 2e-7
    assert torch.equal(ImageData.from_float(values(d).half()).images, back.images)    # multiples of 1/8 are exact in float16


@pytest.mark.parametrize("bad, count, text", [(float("nan"), 2, "nan"), (float("inf"), 2, "inf"), (-float("inf"), 1, "-inf"),
                                               (1.01, 2, "1.01"), (-255., 1, "-255")])
def test_from_float_refuses_and_says_where(bad, count, text):
    x = torch.zeros(4, 1, 3, 3)
    x.view(-1)[[13, 30][:count]] = bad
    for given in (x, x.numpy(), x.double()):
        with pytest.raises(ValueError) as e: ImageData.from_float(given)
        assert f"{count} of 36 values are" in str(e.value)
        assert f"the first is {text} at (1, 0, 1, 1)" in str(e.value)


def test_from_float_refuses_integers_and_shapes():
    with pytest.raises(ValueError, match="uint8"): ImageData.from_float(X)
    with pytest.raises(ValueError, match="N, C, H, W"): ImageData.from_float(torch.zeros(3, 4, 4))


# --- folders

def test_classes_are_first_folders_in_order(tmp_path):
    for name in ("b/2.png", "b/deep/er/1.JPG", "a/x.png", "10/x.png"): save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "a" / "folder.png").mkdir()
    d = image_folder(tmp_path, 8)
    assert d.classes == ["10", "a", "b"] and d.labels.tolist() == [0, 1, 2, 2]
    assert (d.shape, d.name) == ((3, 8, 8), tmp_path.name)
    assert image_folder(tmp_path / "a", (6, 4)).shape == (3, 6, 4)


def test_flat_folder_has_no_labels(tmp_path, monkeypatch):
    for i in range(3): save(tmp_path / f"{i}.png", picture(seed=i))
    d = image_folder(tmp_path, 16)
    assert d.labels is None and d.num_labels == 0 and len(d) == 3
    one = image_folder(save(tmp_path / "other" / "1.png", picture(seed=1)).parent, 16)
    assert torch.equal(d.images[1], one.images[0])    # sorted by name
    monkeypatch.chdir(tmp_path / "other")
    assert image_folder(".", 16).name == "other"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["memory", "mapped"])
def test_gpu_is_not_waited_for(kind):
    d = MappedData(np.zeros((20, 1, 4, 4), np.uint8), torch.arange(20) % 2) if kind == "mapped" else ImageData(torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.arange(20) % 2)
    d, index = d.to("cuda"), torch.tensor([3, 4]) if kind == "mapped" else torch.tensor([3, 4]).cuda()
    d.batch(index)
    torch.cuda.set_sync_debug_mode("error")
    try: x, labels = d.batch(index)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert x.is_cuda and labels.is_cuda and labels.tolist() == [1, 0]


def test_pictures_beside_class_folders(tmp_path):
    save(tmp_path / "a" / "1.png"), save(tmp_path / "2.png")
    with pytest.raises(ValueError, match="beside folders"): image_folder(tmp_path, 8)


def test_hidden_files_are_passed_over(tmp_path):
    save(tmp_path / "a" / "1.png")
    for name in ("a/._1.png", "._a/1.png", ".thumbs/1.png", "a/.cache/x/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07 not a picture")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        d = image_folder(tmp_path, 8, strict=True)
    assert len(d) == 1 and d.classes == ["a"]
    hidden_parent = tmp_path / ".data" / "set"    # a hidden folder above the one asked for is nobody's business
    save(hidden_parent / "1.png")
    assert len(image_folder(hidden_parent, 8)) == 1


@pytest.mark.parametrize("size, box", [((40, 20), (10, 0, 30, 20)), ((20, 40), (0, 10, 20, 30))])
def test_crop_is_the_largest_centred_square(tmp_path, size, box):
    save(tmp_path / "1.png", picture(size))
    expected = torch.from_numpy(np.array(picture(size).crop(box).resize((10, 10), Image.Resampling.LANCZOS)))
    got = image_folder(tmp_path, 10).images[0].permute(1, 2, 0)
    assert (got.int() - expected.int()).abs().max() <= 1    # one grey level: resizing with a box or after a crop


def test_same_size_changes_nothing(tmp_path):
    save(tmp_path / "1.png")
    d = image_folder(tmp_path, (16, 20))    # height, width
    assert np.array_equal(d.images[0].permute(1, 2, 0).numpy(), np.array(picture()))


def test_reduction_is_antialiased(tmp_path):
    stripes = np.tile(np.array([[0, 255]], dtype=np.uint8), (64, 32))    # one pixel black, one white
    save(tmp_path / "1.png", Image.fromarray(stripes))
    x = image_folder(tmp_path, 8, mode="L").images.float()
    assert (x - 127.5).abs().max() < 10    # Lanczos leaves 6 at the edges; every 8th pixel would be all black or all white


def test_thin_and_tiny_pictures(tmp_path):
    for i, size in enumerate([(1, 300), (300, 1), (1, 1), (2, 2)]): save(tmp_path / f"{i}.png", picture(size))
    assert image_folder(tmp_path, 16, strict=True).images.shape == (4, 3, 16, 16)


def kinds(folder):
    "One picture in many kinds of file; returns how far each may be from the plain one, in grey levels on average."
    p, exif = picture((32, 32)), Image.Exif()
    exif[0x0112] = 6
    rgba = p.convert("RGBA")
    save(folder / "plain.png", p)
    save(folder / "jpeg.jpg", p, quality=95)
    save(folder / "turned.jpg", p.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95)
    save(folder / "turned.png", p.transpose(Image.Transpose.ROTATE_90), exif=exif)
    save(folder / "palette.png", p.quantize(256))
    save(folder / "palette.gif", p.quantize(256))
    save(folder / "rgba.png", rgba)
    save(folder / "cmyk.tif", p.convert("CMYK"))
    save(folder / "cmyk.jpg", p.convert("CMYK"), quality=95)
    save(folder / "bitmap.bmp", p)
    save(folder / "web.webp", p, lossless=True)
    return {"jpeg.jpg": 3, "turned.jpg": 3, "palette.png": 3, "palette.gif": 3, "cmyk.jpg": 6}    # the others exactly


def test_kinds_of_file(tmp_path):
    slack = kinds(tmp_path)
    files = sorted(f.name for f in tmp_path.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = image_folder(tmp_path, 32, strict=True).images.float()
    plain = x[files.index("plain.png")]
    for f, image in zip(files, x):
        off = (image - plain).abs().mean().item()
        assert off <= slack.get(f, 0.), (f, off)    # a wrong turn costs more than 50


def test_grey_and_modes(tmp_path):
    a = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    save(tmp_path / "8.png", Image.fromarray(a))
    save(tmp_path / "16.png", Image.fromarray(a.astype(np.uint16) * 257))
    save(tmp_path / "32.tif", Image.fromarray(a.astype(np.int32) * 257))
    save(tmp_path / "la.png", Image.merge("LA", [Image.fromarray(a), Image.new("L", (8, 8), 255)]))
    for mode, channels in (("L", 1), ("RGB", 3), ("RGBA", 4)):
        d = image_folder(tmp_path, 8, mode, strict=True)
        assert d.shape == (channels, 8, 8)
        for image in d.images: assert np.array_equal(image[0].numpy(), a)    # 16 bits become 8, not white
    save(tmp_path / "f.tif", Image.fromarray(a.astype(np.float32) / 255))
    with pytest.raises(ValueError, match="f.tif.*no known range"): image_folder(tmp_path, 8, strict=True)


def test_black_and_white_bitmap(tmp_path):
    save(tmp_path / "1.png", Image.fromarray(np.eye(8) > 0))
    assert np.array_equal(image_folder(tmp_path, 8, "L").images[0, 0].numpy(), np.eye(8) * 255)


def test_transparency_goes_on_white(tmp_path):
    "What lies hidden under transparent pixels must not come to light."
    a = np.zeros((8, 8, 4), dtype=np.uint8)
    a[:4] = (255, 0, 0, 255)
    a[4:] = (0, 255, 0, 0)    # green, but transparent
    save(tmp_path / "rgba.png", Image.fromarray(a))
    p = Image.fromarray((a[..., 3] == 0).astype(np.uint8)).convert("P")
    p.putpalette([255, 0, 0, 0, 255, 0])
    save(tmp_path / "palette.png", p, transparency=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = image_folder(tmp_path, 8, strict=True).images
    for image in x:
        assert image[:, 0, 0].tolist() == [255, 0, 0] and image[:, -1, -1].tolist() == [255, 255, 255]
    rgba = image_folder(tmp_path, 8, "RGBA").images
    assert rgba[1, 3, 0, 0] == 255 and rgba[1, 3, -1, -1] == 0    # files sorted: palette, rgba


# --- damage

@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("share", [0., 0.02, 0.5, 0.9])
def test_truncated_picture_is_named(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)    # fills files evenly
    bad = save(tmp_path / f"bad{suffix}", Image.fromarray(noise))
    for i in range(2): save(tmp_path / f"good{i}.png")
    bad.write_bytes(bad.read_bytes()[:int(bad.stat().st_size * share)])
    with pytest.warns(UserWarning, match=r"skipped 1 of 3 pictures.*bad\." + suffix[1:]): d = image_folder(tmp_path, 8)
    assert len(d) == 2
    with pytest.raises(ValueError, match=r"cannot read picture .*bad\." + suffix[1:]): image_folder(tmp_path, 8, strict=True)


def test_any_damage_is_survived(tmp_path):
    "Flipped bytes end in a picture or in a named refusal, never in another error."
    rng = random.Random(0)
    kinds(tmp_path)
    for f in list(tmp_path.iterdir()):
        whole = f.read_bytes()
        for k in range(8):
            hurt = bytearray(whole)
            for _ in range(1 + k): hurt[rng.randrange(min(len(hurt), 400 if k % 2 else len(hurt)))] = rng.randrange(256)
            (tmp_path / "hurt").mkdir(exist_ok=True)
            (tmp_path / "hurt" / f"{k}{f.name}").write_bytes(hurt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d = image_folder(tmp_path / "hurt", 8)
        strict_errors = 0
        for f in sorted((tmp_path / "hurt").iterdir())[:20]:
            alone = tmp_path / f"alone {f.name}"
            alone.mkdir()
            f.rename(alone / f.name)
            try: image_folder(alone, 8, strict=True)
            except ValueError as e: strict_errors += f.name in str(e)
    assert 0 < len(d) < 88 and strict_errors


def test_counts_of_damage(tmp_path):
    save(tmp_path / "good" / "1.png")
    for i in range(7): (save(tmp_path / "bad" / f"{i}.png")).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"skipped 7 of 8 .*0\.png .* and 2 more"): d = image_folder(tmp_path, 8)
    assert d.classes == ["good"] and d.labels.tolist() == [0]    # a class without a picture is none


def test_no_readable_picture(tmp_path):
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(FileNotFoundError, match=r"none of the 1 pictures.*1\.png"): image_folder(tmp_path, 8)


def test_decompression_bomb(tmp_path, monkeypatch):
    save(tmp_path / "good.png", picture((10, 10)))
    save(tmp_path / "huge.png", picture((100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)    # Pillow refuses more than twice that
    with pytest.warns(UserWarning, match="huge.png.*exceeds limit"): assert len(image_folder(tmp_path, 8)) == 1
    with pytest.raises(ValueError, match="huge.png.*exceeds limit"): image_folder(tmp_path, 8, strict=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    save(tmp_path / "good.png")
    save(tmp_path / "locked.png").chmod(0)
    with pytest.warns(UserWarning, match="locked.png"): assert len(image_folder(tmp_path, 8)) == 1


@pytest.mark.parametrize("size", [0, -1, (8, 0), (8, 8, 3), (8,)])
def test_size_refused(tmp_path, size):
    with pytest.raises(ValueError, match="size must be"): image_folder(tmp_path, size)


def test_mode_refused(tmp_path):
    with pytest.raises(ValueError, match="mode must be"): image_folder(tmp_path, 8, "CMYK")


# --- load_data and torchvision

def test_load_data(tmp_path):
    assert load_data("digits").fingerprint() == digits().fingerprint()
    save(tmp_path / "1.png")
    assert load_data(tmp_path, 8).fingerprint() == load_data(str(tmp_path), 8).fingerprint()
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2.png"): load_data(tmp_path, 8, strict=True)


@pytest.mark.parametrize("args, error, message", [
    (("cifar",), FileNotFoundError, "digits, mnist, fashion_mnist, cifar10 or a folder of pictures, got 'cifar'"),
    (("digits", 8), ValueError, "comes in one size"),
    (("no/such/folder", 8), FileNotFoundError, "no/such/folder"),
    (("",), FileNotFoundError, "got ''"),
])
def test_load_data_refuses(args, error, message):
    with pytest.raises(error, match=message): load_data(*args)


def test_load_data_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="needs a size"): load_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="no picture in .*looked for .*png"): load_data(tmp_path, 8)
    file = save(tmp_path / "1.png")
    with pytest.raises(FileNotFoundError, match="folder of pictures, got"): load_data(file, 8)
    with pytest.raises(FileNotFoundError, match="no folder"): image_folder(file, 8)


NAMES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [OSError("<urlopen error [Errno -3] Temporary failure in name resolution>"),
                                   RuntimeError("Dataset not found or corrupted."), EOFError()])
def test_failed_download_names_set_and_folder(monkeypatch, tmp_path, name, error):
    import torchvision
    def fail(*args, **kw): raise error
    monkeypatch.setattr(torchvision.datasets, NAMES[name], fail)
    with pytest.raises(FileNotFoundError) as e: DATASETS[name](tmp_path)
    for word in (name, str(tmp_path), str(error) or "EOFError"): assert word in str(e.value)
    with pytest.raises(FileNotFoundError, match="'data'"): load_data(name)


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_set(monkeypatch, tmp_path, name):
    import torchvision
    g, asked = torch.Generator().manual_seed(0), {}
    class Fake:
        classes = [f"class {i}" for i in range(10)]
        def __init__(self, root, train, download):
            asked.update(root=root, train=train, download=download)
            if name == "cifar10": self.data, self.targets = np.arange(6 * 32 * 32 * 3, dtype=np.uint8).reshape(6, 32, 32, 3), [3, 1, 4, 1, 5, 9]
            else: self.data, self.targets = torch.randint(256, (6, 28, 28), generator=g, dtype=torch.uint8), torch.tensor([3, 1, 4, 1, 5, 9])
            asked["data"] = torch.as_tensor(self.data)
    monkeypatch.setattr(torchvision.datasets, NAMES[name], Fake)
    d = DATASETS[name](tmp_path)
    assert (asked["root"], asked["train"], asked["download"]) == (tmp_path, True, True)
    assert (d.name, len(d), d.labels.tolist(), d.classes) == (name, 6, [3, 1, 4, 1, 5, 9], Fake.classes)
    assert d.shape == ((3, 32, 32) if name == "cifar10" else (1, 28, 28))
    assert torch.equal(d.images.permute(0, 2, 3, 1).squeeze(-1), asked["data"]) and d.images.is_contiguous()


# --- parts

@pytest.mark.parametrize("kind", ["memory", "mapped"])
@pytest.mark.parametrize("first, n", [(0.9, 1617), (0.5, 898), (1, 1), (1796, 1796)])
def test_split_is_disjoint_and_repeatable(kind, first, n):
    d = ImageData(torch.arange(1797).to(torch.uint8).reshape(-1, 1, 1, 1).repeat(1, 1, 1, 2), torch.arange(1797) % 10)
    d.images[:, 0, 0, 1] = (torch.arange(1797) // 256).to(torch.uint8)    # every image is its own number
    if kind == "mapped": d = MappedData(d.images.numpy(), d.labels, d.classes)
    number = lambda part: (part.images[:, 0, 0, 0].long() + 256 * part.images[:, 0, 0, 1].long()).tolist()
    a, b = d.split(first, seed=3)
    assert len(a) == n and sorted(number(a) + number(b)) == list(range(1797))
    assert number(a) == sorted(number(a)) and number(b) == sorted(number(b))
    assert [p.fingerprint() for p in d.split(first, seed=3)] == [a.fingerprint(), b.fingerprint()]
    assert n in (1, 1796) or d.split(first, seed=4)[0].fingerprint() != a.fingerprint()
    assert a.classes == d.classes and (a.labels == torch.tensor(number(a)) % 10).all()
    assert type(a) is type(d)


@pytest.mark.parametrize("first", [0, 2, -1, 0., 1., 1.5])
def test_split_needs_two_parts(first):
    with pytest.raises(ValueError, match="first must leave images to both parts"): ImageData(X).split(first)


def test_take():
    d = ImageData(X, [0, 1], ["a", "b"])
    e = d.take(torch.tensor([1]))
    assert torch.equal(e.images, X[1:]) and e.labels.tolist() == [1] and e.classes == ["a", "b"]    # no class is renumbered


def test_stats_and_fingerprint_in_pieces(monkeypatch):
    d = digits()
    whole = d.stats(), d.fingerprint()
    assert max(len(p) for p in d.pieces()) == 1797
    monkeypatch.setattr(module.math, "prod", lambda shape: 2**24 // 100)    # 100 images a piece
    assert [len(p) for p in d.pieces()] == [100] * 17 + [97] and (d.stats(), d.fingerprint()) == whole


# --- on disk

def mapped_digits():
    d = digits()
    return MappedData((d.images * 15).numpy(), d.labels, d.classes, "digits"), ImageData(d.images * 15, d.labels, d.classes, "digits")


def test_mapped_answers_as_memory_does():
    disk, memory = mapped_digits()
    for index in (slice(0, 7), torch.tensor([5, 3, 5]), memory.labels == 3, slice(None, None, 100), torch.tensor(4)):
        for a, b in zip(disk.batch(index), memory.batch(index)): assert torch.equal(a, b)
    for what in ("shape", "num_labels", "classes", "name", "max_value"): assert getattr(disk, what) == getattr(memory, what)
    assert len(disk) == len(memory) and repr(disk) == repr(memory) + ", on disk"
    assert (disk.stats(), disk.fingerprint()) == (memory.stats(), memory.fingerprint())
    a, b = disk.take(memory.labels == 3).split(20), memory.take(memory.labels == 3).split(20)
    assert [p.fingerprint() for p in a] == [p.fingerprint() for p in b] and a[0].stats() == b[0].stats()
    moved = disk.to("cpu")
    assert moved.fingerprint() == disk.fingerprint() and moved.device == torch.device("cpu")


def test_mapped_remembers(monkeypatch):
    disk, _ = mapped_digits()
    known = disk.stats(), disk.fingerprint()
    monkeypatch.setattr(module.MappedData, "pieces", lambda self: pytest.fail("read again"))
    assert (disk.stats(), disk.fingerprint()) == known and disk.to("cpu").stats() == known[0]


def test_mapped_batches_are_copies(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    disk = MappedData(np.load(tmp_path / "x.npy", mmap_mode="r"))
    disk.pixels(slice(0, 1)).zero_()    # a read-only map would end the process
    assert torch.equal(disk.images, X)


def test_mapped_meta_device():
    "Batches go to the device, images stay."
    disk, _ = mapped_digits()
    x, labels = disk.to("meta").batch(torch.arange(3))
    assert x.device.type == labels.device.type == "meta" and x.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("kw, message", [
    (dict(mapped=np.zeros((2, 3, 4))), r"\(2, 3, 4\) float64"),
    (dict(mapped=X.numpy()[:0]), "not empty"),
    (dict(mapped=X.numpy(), labels=[0]), "2 integers"),
    (dict(mapped=X.numpy(), classes=["a"]), "classes need labels"),
])
def test_mapped_refuses(kw, message):
    with pytest.raises(ValueError, match=message): MappedData(**kw)


def folder_of_six(path):
    for i in range(6): save(path / "ab"[i % 2] / f"{i}.png", picture(seed=i))
    return path


def cache_file(tmp_path):
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1 and not files[0].name.startswith(".")    # nothing half-written beside it
    return files[0]


def opened(folder, tmp_path, size=8, **kw):
    "The cached set and the warnings of opening it."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return image_folder(folder, size, cache=tmp_path / "cache", **kw), [str(w.message) for w in caught]


def test_cache_is_made_once(tmp_path, monkeypatch):
    folder = folder_of_six(tmp_path / "set")
    memory, (disk, said) = image_folder(folder, 8), opened(folder, tmp_path)
    assert not said and isinstance(disk, MappedData) and disk.fingerprint() == memory.fingerprint() and disk.name == memory.name
    monkeypatch.setattr(module, "_read_image", lambda *args: pytest.fail("decoded again"))
    again, said = opened(folder, tmp_path)
    assert not said and again.fingerprint() == memory.fingerprint()
    assert load_data(folder, 8, cache=tmp_path / "cache").fingerprint() == memory.fingerprint()


@pytest.mark.parametrize("change, why", [("add", "have changed"), ("remove", "have changed"), ("touch", "have changed"), ("edit", "have changed"),
                                         ("cut", "its end is missing"), ("empty", "its end is missing"), ("grow", "wrong size"),
                                         ("garble", "description is garbled"), ("noise", "its end is missing")])
def test_cache_that_is_stale_or_damaged_is_made_again(tmp_path, change, why):
    folder = folder_of_six(tmp_path / "set")
    opened(folder, tmp_path)
    cache, one = cache_file(tmp_path), folder / "a" / "0.png"
    whole = cache.read_bytes()
    if change == "add": save(folder / "a" / "new.png")
    if change == "remove": one.unlink()
    if change == "touch": os.utime(one, ns=(1, 1))
    if change == "edit": save(one, picture(seed=9))
    if change == "cut": cache.write_bytes(whole[:-1])
    if change == "empty": cache.write_bytes(b"")
    if change == "grow": cache.write_bytes(b"x" + whole)
    if change == "garble": cache.write_bytes(whole[:-40] + b"!" * 24 + whole[-16:])
    if change == "noise": cache.write_bytes(os.urandom(len(whole)))
    data, said = opened(folder, tmp_path)
    assert len(said) == 1 and why in said[0] and str(cache) in said[0] and "made again" in said[0]
    assert data.fingerprint() == image_folder(folder, 8).fingerprint()
    assert cache_file(tmp_path) == cache and opened(folder, tmp_path)[1] == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_cache_that_may_not_be_read_is_made_again(tmp_path):
    folder = folder_of_six(tmp_path / "set")
    opened(folder, tmp_path)
    cache_file(tmp_path).chmod(0)
    data, said = opened(folder, tmp_path)
    assert "Permission denied" in said[0] and len(data) == 6


def test_cache_per_setting(tmp_path):
    folder = folder_of_six(tmp_path / "set")
    for kw in (dict(size=8), dict(size=(8, 12)), dict(size=8, mode="L")):
        data, said = opened(folder, tmp_path, **kw)
        assert not said and data.fingerprint() == image_folder(folder, **kw).fingerprint()
    other, said = opened(folder_of_six(tmp_path / "elsewhere" / "set"), tmp_path)    # another folder of the same name
    assert not said and len(list((tmp_path / "cache").iterdir())) == 4


def test_cache_remembers_damaged_pictures(tmp_path):
    folder = folder_of_six(tmp_path / "set")
    (folder / "a" / "2.png").write_bytes(b"")
    for _ in range(2):
        data, said = opened(folder, tmp_path)
        assert len(data) == 5 and len(said) == 1 and "skipped 1 of 6" in said[0]
        assert data.labels.tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="cannot read picture .*2.png"): opened(folder, tmp_path, strict=True)
    with pytest.raises(ValueError, match="cannot read picture .*2.png"): opened(folder, tmp_path, size=9, strict=True)
    cache_file(tmp_path)    # the one of size 8


def test_cache_of_no_picture(tmp_path):
    save(tmp_path / "set" / "1.png").write_bytes(b"nothing")
    with pytest.raises(FileNotFoundError, match="none of the 1 pictures"): opened(tmp_path / "set", tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_full_disk(tmp_path, monkeypatch):
    folder = folder_of_six(tmp_path / "set")
    opened(folder, tmp_path)
    before = cache_file(tmp_path).read_bytes()
    save(folder / "a" / "new.png")
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as e, pytest.warns(UserWarning, match="have changed"):
        image_folder(folder, 8, cache=tmp_path / "cache")
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(cache_file(tmp_path))
    assert cache_file(tmp_path).read_bytes() == before


LIMITED = """
import resource, signal, sys
from ddpm_edm.data import image_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: image_folder("set", 100, cache="cache")
except OSError as e: print(e.errno, e.filename)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_file_limit_of_the_system(tmp_path):
    folder_of_six(tmp_path / "set")
    out = run(sys.executable, "-c", LIMITED, cwd=tmp_path, PYTHONPATH=str(Path(module.__file__).parents[1]))
    assert out.split()[0] == str(errno.EFBIG) and "cache/set RGB" in out
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_kill_left_is_swept(tmp_path):
    folder = folder_of_six(tmp_path / "set")
    opened(folder, tmp_path)
    cache = cache_file(tmp_path)
    old, young = (cache.with_name(f".{cache.name}.{k}.part") for k in ("aa", "bb"))
    for f in (old, young): f.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    save(folder / "a" / "new.png")
    opened(folder, tmp_path)
    assert not old.exists() and young.exists()    # a young one may belong to a process that is still writing


def test_cache_folder_is_a_file(tmp_path):
    folder = folder_of_six(tmp_path / "set")
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(OSError, match="cache"): image_folder(folder, 8, cache=tmp_path / "cache")


MEMORY = """
import resource, sys, numpy as np, torch
from ddpm_edm.data import ImageData, MappedData
torch.set_num_threads(1)
shape = (16_000, 3, 64, 64)
with open("big.raw", "wb") as f: f.truncate(16_000 * 3 * 64 * 64)    # 197 MB of zeros that take no room on the disk
ImageData(torch.zeros(1500, 3, 64, 64, dtype=torch.uint8)).stats()
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 120 * 2**20,) * 2)
mapped = np.memmap("big.raw", np.uint8, "r", shape=shape)
try:
    data = ImageData(torch.tensor(mapped)) if sys.argv[1] == "memory" else MappedData(mapped)
    a, b = data.split(0.5)
    for d in (data, a): d.batch(torch.randint(len(d), (64,))), d.stats(), d.fingerprint()
    print("fits")
except (MemoryError, RuntimeError): print("does not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA")
@pytest.mark.parametrize("how, answer", [("mapped", "fits"), ("memory", "does not fit")])
def test_memory_is_bounded(tmp_path, how, answer):
    "197 MB of images in a process that may have 120 MB more than an empty one."
    assert run(sys.executable, "-c", MEMORY, how, cwd=tmp_path, PYTHONPATH=str(Path(module.__file__).parents[1])).strip() == answer


def test_set_beyond_memory_says_what_to_do(tmp_path):
    folder_of_six(tmp_path / "set")
    with pytest.raises(MemoryError, match="6 images 3 x 9000000 x 9000000 need 1.46e.06 GB.*cache"): image_folder(tmp_path / "set", 9_000_000)


def test_threads_work_ahead_by_a_bounded_number():
    began = []
    def read(i):
        began.append(i)
        if i % 7 == 3: raise ValueError(str(i))
        return torch.tensor(i)
    for i, got in enumerate(module._in_order(read, 1000)):
        assert (str(got) == str(i) and isinstance(got, ValueError)) if i % 7 == 3 else got == i
        assert max(began) < i // 256 * 256 + 256
    assert i == 999


# --- other people's data sets

class Listed(torch.utils.data.Dataset):
    def __init__(self, items, **attributes):
        self.items = items
        self.__dict__.update(attributes)
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]


KINDS = {"pil": lambda x: Image.fromarray(x.permute(1, 2, 0).numpy()), "array": lambda x: x.permute(1, 2, 0).numpy(),
         "uint8": lambda x: x, "float": lambda x: x / 255, "double": lambda x: x.double().numpy().transpose(1, 2, 0) / 255}


@pytest.mark.parametrize("kind", KINDS)
def test_dataset_kinds(kind):
    d = from_dataset(Listed([(KINDS[kind](x), k, "more") for k, x in enumerate(X)]))
    assert torch.equal(d.images, X) and d.labels.tolist() == [0, 1] and d.name == "Listed" and d.classes == ["0", "1"]
    for items in ([KINDS[kind](x) for x in X], [(KINDS[kind](x),) for x in X]):
        assert from_dataset(Listed(items)).labels is None
    assert torch.equal(from_dataset([KINDS[kind](x) for x in X]).images, X)    # a plain list has a length and items too


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_dataset_of_any_channels(channels):
    x = torch.randint(256, (3, channels, 5, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(from_dataset(list(x)).images, x)
    big = from_dataset(list(x), size=(10, 12))
    assert big.shape == (channels, 10, 12)
    assert abs(big.images.float().mean() - x.float().mean()) < 6    # enlarged, not shifted: bicubic overshoots are cut at 0 and 255


def test_dataset_grey_and_planes():
    a = X[0, 0]
    for item in (Image.fromarray(a.numpy()), a, a.numpy(), a / 255, Image.fromarray(a.numpy().astype(np.uint16) * 257)):
        assert torch.equal(from_dataset([item]).images, a[None, None])


def test_dataset_first_picture_decides_the_mode():
    rgb, grey = picture(), picture().convert("L")
    assert from_dataset([rgb, grey, rgb.convert("RGBA"), rgb.quantize(16)], size=8).shape == (3, 8, 8)
    assert from_dataset([grey, rgb], size=8).shape == (1, 8, 8)


def test_dataset_sizes():
    items = [picture((20, 30)), picture((40, 10))]
    with pytest.raises(ValueError, match=r"item 1 of list is \(3, 10, 40\), but item 0 is \(3, 30, 20\); give a size"): from_dataset(items)
    d = from_dataset(items, size=(6, 8))
    tensors = from_dataset([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in items], size=(6, 8))
    assert d.shape == tensors.shape == (3, 6, 8)
    assert (d.images.float() - tensors.images.float()).abs().mean() < 3    # Lanczos and bicubic, in grey levels; a wrong cut costs more than 20


def test_dataset_tensors_are_antialiased():
    noise = torch.randint(256, (1, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert from_dataset([noise], size=8).images.float().std() < 20    # 74 / 8 and a little; picking pixels would keep 74


def test_dataset_value_range():
    x = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
    assert torch.equal(from_dataset([x], value_range=(-1, 1)).images, ImageData.from_float(x[None]).images)
    assert from_dataset([torch.tensor([[0., 0.5], [0.25, 1.]])]).images.flatten().tolist() == [0, 128, 64, 255]
    with pytest.raises(ValueError, match=r"item 0 of list: values from -1 to 1, not in value_range \(0.0, 1.0\)"): from_dataset([x])
    with pytest.raises(ValueError, match="item 1 of list: values from nan"): from_dataset([x[0] / 2 + 0.5, torch.full((3, 4), float("nan"))])


@pytest.mark.parametrize("label", [1, np.int64(1), torch.tensor(1), np.uint8(1), torch.tensor([1])])
def test_dataset_labels(label): assert from_dataset([(X[0], 0), (X[1], label)]).labels.tolist() == [0, 1]


def test_dataset_classes():
    d = from_dataset(Listed([(x, 1) for x in X], classes=["cat", "dog", "owl"]))
    assert d.classes == ["cat", "dog", "owl"] and d.labels.tolist() == [1, 1]
    assert from_dataset(torch.utils.data.Subset(Listed([(x, 2) for x in X], classes=["a", "b", "c"]), [0])).num_labels == 3
    with pytest.raises(ValueError, match="from 0 to 1, got 2 at 0"): from_dataset(Listed([(x, 2) for x in X], classes=["cat", "dog"]))
    with pytest.raises(ValueError, match="got -1 at 1"): from_dataset([(X[0], 0), (X[1], -1)])
    assert from_dataset([(x, {"boxes": 3}) for x in X], labels=False).labels is None


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(X)
    def __len__(self): return 2


@pytest.mark.parametrize("dataset, kw, message", [
    (Stream(), {}, "length and items by number, got Stream"),
    (3, {}, "got int"),
    ([], {}, "length 0"),
    ([(X[0], 0.5)], {}, "item 0 of list: its label is '0.5', no integer; labels=False"),
    ([(X[0], 0), (X[1], None)], {}, "item 1 of list: its label is 'None'"),
    ([(X[0], 0), (X[1],)], {}, "item 1 of list has no label, unlike item 0"),
    ([(X[0],), (X[1], 1)], {}, "item 1 of list has a label, unlike item 0"),
    ([X[0], "two"], {}, "item 1 of list: an image must be a PIL image, a tensor or an array, got str"),
    ([X[0].int()], {}, "item 0 of list: pixels must be uint8 or floats, got torch.int32"),
    ([X], {}, r"item 0 of list: a tensor must be \(C, H, W\).*got shape \(2, 3, 4, 5\)"),
    ([X[0]], dict(size=0), "size must be"),
    ([X[0]], dict(value_range=(1, 0)), "two rising numbers"),
    ([X[0]], dict(cache="x"), "a cache needs a name"),
])
def test_dataset_refused(dataset, kw, message):
    with pytest.raises(ValueError, match=message): from_dataset(dataset, **kw)


def test_dataset_that_fails_names_the_item():
    class Broken(Listed):
        def __getitem__(self, i):
            if i == 1: raise OSError("bad sector")
            return X[0]
    with pytest.raises(ValueError, match="item 1 of mine: bad sector") as e: from_dataset(Broken([0, 1, 2]), name="mine")
    assert isinstance(e.value.__cause__, OSError)


def test_dataset_cache(tmp_path):
    items, read = [(x, k) for k, x in enumerate(X)], []
    class Counted(Listed):
        def __getitem__(self, i):
            read.append(i)
            return items[i]
    dataset = Counted(items, classes=["a", "b"])
    a, b = (from_dataset(dataset, name="mine", cache=tmp_path) for _ in range(2))
    assert isinstance(b, MappedData) and a.fingerprint() == b.fingerprint() == from_dataset(items_of(dataset), name="mine").fingerprint()
    assert read.count(1) == 2    # when the cache was made, and for the comparison
    with pytest.warns(UserWarning, match="settings have changed"): assert from_dataset(dataset, size=6, name="mine", cache=tmp_path).shape == (3, 6, 6)


def items_of(dataset): return Listed([dataset[i] for i in range(len(dataset))], classes=dataset.classes)


# --- training

def test_training_refuses_another_set_and_labels_beyond(tmp_path):
    from ddpm_edm.precond import EDMPrecond
    from ddpm_edm.train import train
    from ddpm_edm.unet import UNet
    def go(data, num_labels=10, resume=False):
        torch.manual_seed(0)
        denoiser = EDMPrecond(UNet(1, channels=32, mults=(1,), attention=(), num_labels=num_labels), 0.75)
        return train(denoiser, data, tmp_path / "run", images=8, batch=4, progress=False, resume=resume)
    disk, memory = mapped_digits()
    a = go(disk)
    go(memory, resume=True)    # in memory or on disk: it is the same data
    memory.images[77, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="data.fingerprint is .* there and .* here"): go(memory, resume=True)
    with pytest.raises(ValueError, match="0 labels or the data's 10, got num_labels=5"): go(disk, num_labels=5)
    assert a.net.num_labels == 10
