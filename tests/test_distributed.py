"Training and sampling in several processes: the same weights and pictures as in one, and a clear end when a process dies."
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from ddpm_edm.train import load, read_log

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun with gloo")

# No dropout: its masks depend on how a batch is shared out
SETUP = """
import os, sys, time, signal
import torch
torch.set_num_threads(1)
from ddpm_edm.data import ImageData
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.train import Trainer, train
from ddpm_edm.unet import UNet

def run_in(out, **changes):
    torch.manual_seed(0)
    net = EDMPrecond(UNet(1, 32, mults=(1,), attention=(), num_labels=2))
    images = torch.randint(256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    settings = dict(precision="fp32", images=800, batch=16, lr=1e-3, warmup=100, ema_halflife=100, log_every=160, save_every=160,
                    sample_every=800, progress=False)
    return train(net, ImageData(images, torch.arange(50) % 2), out, **settings | changes)
"""


def start(script, processes, folder, *args):
    "Run SETUP and a script, kept in a folder, in processes of their own; with more than one, by torchrun."
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"] if processes > 1 else []
    file = folder / f"script{processes}.py"
    file.write_text(SETUP + script)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *launcher, str(file), *map(str, args)], env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def finish(process):
    "Its return code and all that it said."
    out, error = process.communicate(timeout=300)
    return process.returncode, out + error


TRAIN = "run_in(sys.argv[1], **eval(sys.argv[2]))"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "50 steps by one process; by two; by one and then, from its state on, by two; by one and by two with Muon."
    folder = tmp_path_factory.mktemp("distributed")
    for muon in ("", " muon"):
        changes = dict(optimizer="muon") if muon else {}
        for process in [start(TRAIN, n, folder, folder / f"{name}{muon}", changes) for n, name in ((1, "one"), (2, "two"))]:
            code, said = finish(process)
            assert code == 0, said
    stop = """
step = Trainer.step
def stopping(self):
    step(self)
    if self.seen == 400: signal.raise_signal(signal.SIGINT)
Trainer.step = stopping
try: run_in(sys.argv[1])
except KeyboardInterrupt: pass
"""
    for code, said in (finish(start(stop, 1, folder, folder / "both")), finish(start(TRAIN, 2, folder, folder / "both", dict(resume=True)))): assert code == 0, said
    return folder


@pytest.mark.parametrize("one,other", [("one", "two"), ("one", "both"), ("one muon", "two muon")])
def test_two_processes_equal_one(runs, one, other):
    a, b = (load_file(runs / name / "state/latest.safetensors") for name in (one, other))
    assert a.keys() == b.keys() and int(a["seen"]) == int(b["seen"]) == 800
    largest = max(v.abs().max().item() for k, v in a.items() if k.startswith("model/"))
    for name in a:
        if name.startswith(("model/", "ema/")):
            # the two halves' gradients are added in another order: float32 rounding, let grow for 50 steps of 1e-3
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-4 * largest, msg=lambda m: f"{name}: {m}")
    for x, y in zip(read_log(runs / one), read_log(runs / other), strict=True):
        assert x["images"] == y["images"] and x["loss"] == pytest.approx(y["loss"], rel=1e-4)


def test_two_processes_are_not_two_trainings(runs):
    "A gradient that is not shared, or images that both of them see, would give other weights."
    a, b = load_file(runs / "one" / "state/latest.safetensors"), load_file(runs / "two" / "state/latest.safetensors")
    assert sum((a[k] - b[k]).abs().max() > 0 for k in a if k.startswith("model/")) > 0    # two did compute by themselves
    config = [(runs / name / "config.json").read_text() for name in ("one", "two", "both")]
    assert len(set(config)) == 1


KILL = """
if os.environ.get("RANK") == "1":
    step = Trainer.step
    def dying(self):
        step(self)
        if self.seen == 496: os.kill(os.getpid(), signal.SIGKILL)
    Trainer.step = dying
run_in(sys.argv[1])
"""


def test_a_killed_process_ends_the_others_and_the_run_resumes(runs, tmp_path):
    out, began = tmp_path / "run", time.monotonic()
    code, said = finish(start(KILL, 2, tmp_path, out))
    assert code != 0 and time.monotonic() - began < 120
    assert re.search(r"another process of this training has ended, so this one does too; .* keeps the last saved state", said), said[-3000:]
    assert int(load_file(out / "state/latest.safetensors")["seen"]) == 480    # saved every 160
    code, said = finish(start(TRAIN, 2, tmp_path, out, dict(resume=True)))
    assert code == 0, said
    a, b = load(runs / "two"), load(out)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-6)    # the same sums in the same order


def test_ctrl_c_saves_once(tmp_path):
    "The launcher passes the signal on to processes that have got it from the terminal already."
    out = tmp_path / "run"
    process = start(TRAIN, 2, tmp_path, out, dict(images=10**6, log_every=160, precision="auto"))
    while len(read_log(out)) < 2 and process.poll() is None: time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in map(int, workers): os.kill(pid, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    seen = int(load_file(out / "state/latest.safetensors")["seen"])
    assert code != 0 and f"stopped after {seen} of 1000000 images, all saved in {out}" in said


def test_a_batch_that_cannot_be_shared(tmp_path):
    code, said = finish(start(TRAIN, 2, tmp_path, tmp_path / "run", dict(batch=15)))
    assert code != 0 and "batch must be a multiple of 2 processes x 1 parts, got 15" in said


def test_shared_sampling_draws_the_same_pictures(runs, tmp_path):
    import numpy as np
    from PIL import Image
    script = "from ddpm_edm.cli import sample_images\nsample_images(sys.argv[1], n=7, steps=4, scale=1, out=sys.argv[2], quiet=True, solver='dpmpp_2m')"
    said = []
    for processes in (1, 2):
        code, words = finish(start(script, processes, tmp_path, runs / "one", tmp_path / f"{processes}.png"))
        assert code == 0, words
        said.append(words)
    a, b = (np.array(Image.open(tmp_path / f"{k}.png")).astype(int) for k in (1, 2))
    assert a.shape == b.shape and abs(a - b).max() <= 1    # one grey level: float32 rounds differently in another batch
    assert said[1].count("wrote") == 1, said[1]
