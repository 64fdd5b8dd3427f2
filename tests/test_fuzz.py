"Damaged files given to commands: success or one line of explanation; never a traceback, a hang or a half-written output."
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import IMPORT, INFO, SAMPLE, TRAIN, call

from ddpm_edm.data import digits

COUNT = int(os.environ.get("FUZZ", 30))    # damaged files of each kind; 1,000 of each are 10,000 in all and take a quarter of an hour
torch.set_num_threads(1)


def damage(data: bytes, rng: random.Random) -> bytes:
    "Some bytes changed, taken out, doubled or cut off; more often at the front, where headers are."
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = min(int(len(data) * rng.random()**rng.choice([1, 8])), max(len(data) - 1, 0))
        kind, n = rng.randrange(6), rng.choice([1, 4, 50])
        if kind < 3 and data: data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), 0, 255, ord("9"), ord("-"), ord("e"), ord("]")])
        elif kind == 3: del data[at:at + n]
        elif kind == 4: data[at:at] = data[at:at + n]
        elif kind == 5 and rng.random() < 0.3: del data[at:]
    return bytes(data)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    "A run, checkpoints from elsewhere and pictures, whole."
    import test_zoo
    folder = tmp_path_factory.mktemp("healthy")
    assert call(TRAIN, f"--images 64 --batch 32 --channels 32 --precision fp32 --quiet --out {folder / 'run'}") == 0
    Image.fromarray((digits().images[0, 0].float() * 15).to(torch.uint8).numpy()).save(folder / "picture.png")
    Image.fromarray(np.pad(np.full((4, 4), 255, np.uint8), 2)).save(folder / "mask.png")
    (folder / "photos").mkdir()
    for i, suffix in enumerate((".png", ".jpg", ".webp")):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)).save(folder / "photos" / f"{i}{suffix}")
    (folder / "edm.pkl").write_bytes(test_zoo.edm_pickle(test_zoo.tiny()[1], test_zoo.TINY))
    torch.save(test_zoo.recorded("guided_updown")[1], folder / "adm.pt")
    return folder


KINDS = {    # file to damage, command, words, what it writes
    "model, to sample": ("run/model.safetensors", SAMPLE, "run --n 1 --steps 1 --quiet --device cpu --out out.png", "out.png"),
    "model, to describe": ("run/model.safetensors", INFO, "run", None),
    "log, to describe": ("run/metrics.jsonl", INFO, "run --json", None),
    "picture, to begin from": ("picture.png", SAMPLE, "run --init picture.png --n 1 --steps 1 --quiet --device cpu --out out.png", "out.png"),
    "mask": ("mask.png", SAMPLE, "run --inpaint picture.png --mask mask.png --n 1 --steps 1 --quiet --device cpu --out out.png", "out.png"),
    "pickle, to import": ("edm.pkl", IMPORT, "edm.pkl new", "new"),
    "weights, to import": ("adm.pt", IMPORT, "adm.pt new --head-dim 16 --size 16", "new"),
    "picture, to train on": ("photos/1.jpg", TRAIN, "--data photos --size 8 --images 4 --batch 4 --channels 32 --precision fp32 --quiet --out new", "new"),
    "settings, to resume": ("run/config.json", TRAIN, "--images 64 --batch 32 --channels 32 --precision fp32 --quiet --out run --resume", None),
    "state, to resume": ("run/state/latest.safetensors", TRAIN, "--images 64 --batch 32 --channels 32 --precision fp32 --quiet --out run --resume", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_cost_one_line(kind, healthy, tmp_path, monkeypatch, capsys):
    file, name, words, out = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    for path in healthy.iterdir(): (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    whole, rng, noticed = Path(file).read_bytes(), random.Random(kind), 0
    for k in range(COUNT):
        Path(file).write_bytes(damage(whole, rng))
        before, began = {p: p.stat().st_size for p in Path(".").rglob("*")}, time.process_time()
        code = call(name, words)    # anything but an error that a person can mend comes through as an exception, and fails here
        said = capsys.readouterr()
        assert code in (0, 1) and "Traceback" not in said.err
        assert time.process_time() - began < 60, "most take hundredths of a second"
        noticed += code == 1 or "warning: " in said.err
        if code:
            assert said.err.count("\n") == 1 + said.err.count("warning: ") and said.err.startswith(name), said.err
            assert {p: p.stat().st_size for p in Path(".").rglob("*")} == before, "a failed command must leave no file behind"
        elif out == "new":
            assert call(INFO, out) == 0    # a whole model
            capsys.readouterr()
            shutil.rmtree(out)
        elif out:
            with Image.open(out) as image: image.load()
            Path(out).unlink()
    assert noticed > COUNT // 10    # the damage is damage
