"Training: repeatable to the bit, safe against kills, full disks, NaN and damaged files."
import errno
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from ddpm_edm import train as module
from ddpm_edm.data import ImageData
from ddpm_edm.noise import LogNormal, karras_sigmas
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.train import Settings, Trainer, learning_rate, load, plot_loss, read_log, replacing, sample_picture, save_denoiser, train

# What a run of these tests is made of; the scripts below run it too, in processes that can be killed.
SETUP = """
import torch
torch.set_num_threads(1)
from ddpm_edm.data import ImageData
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.train import train
from ddpm_edm.unet import UNet

def tiny(seed=0, labels=2, channels=1):
    torch.manual_seed(seed)
    return EDMPrecond(UNet(channels, 32, mults=(1,), attention=(), num_labels=labels, dropout=0.1))

def some_data(channels=1, labels=2):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, channels, 4, 4), generator=g, dtype=torch.uint8)
    return ImageData(images, torch.arange(50) % labels if labels else None)

SMALL = dict(precision="fp32", images=160, batch=16, lr=1e-3, warmup=30, ema_halflife=40,
             log_every=60, save_every=50, sample_every=110, progress=False)

def run_in(out, net=None, data=None, **changes):
    return train(net or tiny(), data or some_data(), out, **SMALL | changes)
"""
exec(SETUP)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "A run that nothing disturbed."
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    run_in(out)
    return out


def contents(run):
    "Every file of a run by name; of the log all but the measured speed."
    files = {str(f.relative_to(run)): f.read_bytes() for f in Path(run).rglob("*") if f.is_file()}
    files["metrics.jsonl"] = [m | {"images_per_second": None} for m in read_log(run)]
    return files


def assert_same_run(run, unbroken):
    one, two = contents(run), contents(unbroken)
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []    # equal bytes: a resumed run is the run


def run_script(script, *args, **kw):
    "Run SETUP and a script in a process of its own, with one thread."
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", SETUP + script, *map(str, args)], env=env, capture_output=True, text=True, timeout=600, **kw)


# --- what comes out

def test_run_folder(unbroken):
    assert sorted(contents(unbroken)) == ["config.json", "loss.png", "metrics.jsonl", "model.safetensors", "samples/000000112.png",
                                          "samples/000000160.png", "state/latest.safetensors"]
    config = json.loads((unbroken / "config.json").read_text())
    assert config["training"]["batch"] == 16 and config["shape"] == [1, 4, 4] and config["classes"] == ["0", "1"]
    log = read_log(unbroken)
    assert [m["images"] for m in log] == [64, 128, 160]    # first step at or after each multiple of 60, and the end
    assert all(math.isfinite(m["loss"]) and m["images_per_second"] > 0 for m in log)
    assert log[-1]["lr"] == learning_rate(144, 160, 1e-3, 0.02, 30)    # of the last step


def test_equal_seeds_equal_bits_and_nothing_else_matters(unbroken, tmp_path):
    torch.manual_seed(99)    # the global generator stands elsewhere than in the other run
    net = tiny()
    torch.rand(123)
    before = torch.get_rng_state()
    run_in(tmp_path / "again", net=net)
    assert torch.equal(torch.get_rng_state(), before)    # and is left as it was
    assert_same_run(tmp_path / "again", unbroken)


def test_other_seed_other_weights(unbroken, tmp_path):
    other = run_in(tmp_path / "other", seed=1)
    same = [torch.equal(a, b) for a, b in zip(other.parameters(), load(unbroken).parameters())]
    assert not any(same)


def test_returned_denoiser_is_the_saved_average(unbroken, tmp_path):
    net = tiny()
    returned, x = run_in(tmp_path / "run", net=net), torch.randn(3, 1, 4, 4)
    state = load_file(tmp_path / "run/state/latest.safetensors")
    for name, value in load(tmp_path / "run/model.safetensors").state_dict().items():
        assert torch.equal(value, returned.state_dict()[name]) and torch.equal(value, state[f"ema/{name}"])
    assert not torch.equal(next(net.parameters()), next(returned.parameters()))    # the average lags behind the last weights
    assert torch.equal(load(unbroken)(x, 0.3), returned(x, 0.3)) and not returned.training
    assert returned.config["classes"] == ["0", "1"]


def test_it_learns(tmp_path):
    # one image only: the best denoiser is that image, so the loss must fall far below a fresh network's
    one = ImageData(some_data().images[:1])
    run_in(tmp_path / "run", net=tiny(labels=0), data=one, images=3200, log_every=400, lr=3e-3, save_every=10**6, sample_every=10**6)
    log = read_log(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"] / 3


def test_label_dropout_reaches_the_network():
    for share in (0., 0.3, 1.):
        trainer, seen = Trainer(tiny(), some_data(), Settings(100, 1000, 1e-3, 0, 0, 10, share, LogNormal(), 0, "fp32")), []
        loss = trainer.loss
        trainer.loss = lambda *args, **kw: seen.append(kw["labels"]) or loss(*args, **kw)
        trainer.step()
        withheld = (seen[0] == -1).double().mean().item()
        assert abs(withheld - share) <= 4 * (share * (1 - share) / 1000)**0.5    # four standard errors of 1000 coin flips


def test_rates_and_average_of_a_step():
    # One step by hand: AdamW's first step moves each weight by lr (its gradient is not zero), less weight decay 0.01
    s = Settings(1000, 16, 1e-2, 1, 0, 16, 0., LogNormal(), 0, "fp32")
    trainer = Trainer(tiny(), some_data(), s)
    start = trainer.denoiser.net.head[2].weight.detach().clone()
    trainer.step()
    after = trainer.denoiser.net.head[2].weight.detach()
    torch.testing.assert_close((after - start).abs(), torch.full_like(start, 1e-2), rtol=1e-3, atol=0)    # Adam's eps against gradients
    # half-life 16 is more than 5 % of 16 images seen, so the ramp rules: 0.5**(16 / 0.8) of the start is left
    torch.testing.assert_close(trainer.ema.model.net.head[2].weight, after + 0.5**20 * (start - after), rtol=1e-6, atol=0)


# --- broken and resumed

WARM = """
import io, os, random, signal, sys, time
import accelerate
from ddpm_edm.train import plot_loss
with torch.no_grad(): tiny()(torch.zeros(1, 1, 4, 4), 1.)    # what takes time once is done once, before the processes part
plot_loss("nowhere").savefig(io.BytesIO())

def child(prepare, **changes):
    pid = os.fork()
    if pid: return pid
    prepare()
    run_in(sys.argv[1], **changes, resume=True)
    os._exit(0)

def done(pid):
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    return status == 0
"""

KILLED_AT_EVERY_FILE_OPERATION = WARM + """
def die_before(k):
    "Kill this process just before its k-th file operation."
    left = [k]
    def wrap(f):
        def g(*args):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return f(*args)
        return g
    for name in ("fsync", "replace"): setattr(os, name, wrap(getattr(os, name)))

kills = 0
while not done(child(lambda: die_before(kills + 1))): kills += 1
print("killed", kills)
"""

KILLED_AT_RANDOM = WARM + """
random.seed(0)
kills = 0
while True:
    pid = child(lambda: None, save_every=1)
    time.sleep(random.uniform(0, 0.3) * 1.2**kills)    # slowly more patient, so that the loop ends on any machine
    os.kill(pid, signal.SIGKILL)
    if done(pid): break
    kills += 1
print("killed", kills)
"""

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@fork
@pytest.mark.parametrize("script", [KILLED_AT_EVERY_FILE_OPERATION, KILLED_AT_RANDOM], ids=["every file operation", "random"])
def test_killed_and_resumed(unbroken, tmp_path, script):
    done = run_script(script, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= (15 if "die_before" in script else 3)    # the first state alone takes a dozen operations
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_signal_saves_and_says_how_to_go_on(tmp_path):
    out, long = tmp_path / "run", SMALL | dict(images=160_000, save_every=10**6, sample_every=10**6)
    script = SETUP + f"train(tiny(), some_data(), {str(out)!r}, **{long})"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.time() + 200
    while len(read_log(out)) < 3 and process.poll() is None and time.time() < end: time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=200)[1]
    assert process.returncode != 0
    last = error.strip().splitlines()[-1]
    seen = int(load_file(out / "state/latest.safetensors")["seen"])
    assert last == f"KeyboardInterrupt: stopped after {seen} of 160000 images, all saved in {out}; go on with resume=True (--resume)"
    assert seen >= read_log(out)[-1]["images"] >= 180    # three logs were written, and the state is not behind them
    assert load(out).config["training"]["images"] == 160_000


def press_ctrl_c(monkeypatch, *at, number=signal.SIGINT):
    "Have the trainer press Ctrl-C, or send another signal, after the steps that reach so many images."
    step = Trainer.step
    def pressing(self):
        step(self)
        for seen in at:
            if self.seen == seen: signal.raise_signal(number)
    monkeypatch.setattr(Trainer, "step", pressing)


# a first step, between logs, at a log and save, just before the end
@pytest.mark.parametrize("at, number", [(16, signal.SIGINT), (48, signal.SIGTERM), (64, signal.SIGINT), (144, signal.SIGINT)])
def test_interrupted_and_resumed(unbroken, tmp_path, monkeypatch, at, number):
    with monkeypatch.context() as m:
        press_ctrl_c(m, at, number=number)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after {at} of 160 images"):
            run_in(tmp_path / "run")
    # other first weights, another place of the global generator: the state replaces them
    run_in(tmp_path / "run", net=tiny(seed=5), resume=True)
    assert_same_run(tmp_path / "run", unbroken)


def test_second_signal_stops_at_once(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell lets its background jobs ignore SIGINT
    try:
        press_ctrl_c(monkeypatch, 16, 16)
        with pytest.raises(KeyboardInterrupt) as e: run_in(tmp_path / "run")
        assert str(e.value) == ""    # Python's own, out of the middle of the step
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally: signal.signal(signal.SIGINT, before)
    assert int(load_file(tmp_path / "run/state/latest.safetensors")["seen"]) == 0    # nothing was saved on the way


def test_signal_in_the_last_step_changes_nothing(unbroken, tmp_path, monkeypatch):
    press_ctrl_c(monkeypatch, 160)
    run_in(tmp_path / "run")
    assert_same_run(tmp_path / "run", unbroken)


def test_train_in_a_thread(unbroken, tmp_path):
    thread = threading.Thread(target=train, args=(tiny(), some_data(), tmp_path / "run"), kwargs=SMALL)
    thread.start()
    thread.join()
    assert_same_run(tmp_path / "run", unbroken)


def test_resuming_a_finished_run_trains_nothing(unbroken, tmp_path, monkeypatch):
    run_in(tmp_path / "run")
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("a step"))
    save_denoiser(tiny(), tmp_path / "run/model.safetensors")    # a kill came between the last state and its model
    run_in(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", unbroken)


def test_resume_sweeps_and_forgets(unbroken, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as m:
        press_ctrl_c(m, 80)
        with pytest.raises(KeyboardInterrupt): run_in(out)
    (out / "samples").mkdir()
    (out / "samples/.000000112.png.tmp.png").write_bytes(b"half a pic")
    (out / ".model.safetensors.tmp.safetensors").write_bytes(b"half")
    (out / "state/.other.tmp").write_bytes(b"of a name that is not written again")
    with open(out / "metrics.jsonl", "a") as f: f.write('{"images": 128, "loss": 7.0, "lr": 1.0, "images_per_second": 1}\n{"images": 1')
    run_in(out, resume=True)
    assert_same_run(out, unbroken)


# --- full disk

@pytest.mark.parametrize("name", ["latest.safetensors", "model.safetensors"])
def test_full_disk(unbroken, tmp_path, monkeypatch, name):
    out, write, calls = tmp_path / "run", Path.write_bytes, []
    def fills_up(self, content):
        if name not in self.name or not calls.append(0) and len(calls) < 3: return write(self, content)    # the third write fails
        write(self, content[:1000])
        good.update(contents(out))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    good = {}
    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", fills_up)
        with pytest.raises(OSError, match=f"No space left on device: '.*run.*{name}'") as e: run_in(out)
        assert e.value.errno == errno.ENOSPC
    assert {k: v for k, v in good.items() if "tmp" not in k} == contents(out) and len(good) == len(contents(out)) + 1
    load(out)
    run_in(out, resume=True)    # once there is room again
    assert_same_run(out, unbroken)


@fork
def test_file_size_limit(tmp_path):
    "The system itself cuts a write short."
    done = run_script("""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
run_in(sys.argv[1])""", tmp_path / "run")
    assert done.returncode == 1
    file = tmp_path / "run/state/latest.safetensors"
    assert done.stderr.strip().splitlines()[-1] == f"OSError: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{file}'"
    assert sorted(f.name for f in (tmp_path / "run").rglob("*") if f.is_file()) == ["config.json", "metrics.jsonl"]


# --- NaN

def test_rate_too_high(tmp_path):
    with pytest.raises(FloatingPointError, match=r"3 of the 4 steps from step 1 .*loss is (nan|inf) at step 2 .*lr=1e\+30.*keeps the last good model"):
        run_in(tmp_path / "run", lr=1e30)
    assert all(p.isfinite().all() for p in load(tmp_path / "run").parameters())
    assert read_log(tmp_path / "run") == []


@pytest.mark.parametrize("what", ["weight", "average", "moment"])
def test_what_is_not_finite_is_never_saved(tmp_path, monkeypatch, what):
    "Losses may be fine while something that would be saved is not."
    step = Trainer.step
    def poisoned(self):
        step(self)
        if self.seen == 112:    # due for a save
            weight = self.denoiser.net.stem.weight
            bad = dict(weight=weight, average=self.ema.model.net.stem.weight, moment=self.opt.state[weight]["exp_avg_sq"])[what]
            bad.data[0] = math.inf
    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(FloatingPointError, match=r"(model|ema|opt)/.* not finite after step 7 \(112 images\)"):
        run_in(tmp_path / "run")
    state = load_file(tmp_path / "run/state/latest.safetensors")
    assert int(state["seen"]) == 64 and all(v.isfinite().all() for v in state.values())
    load(tmp_path / "run")


def test_nan_is_not_saved_on_ctrl_c(tmp_path, monkeypatch):
    step = Trainer.step
    def poisoned(self):
        step(self)
        if self.seen == 48:
            next(self.denoiser.parameters()).data[0] = math.nan
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(FloatingPointError, match=r"not finite after step 3 \(48 images\)"): run_in(tmp_path / "run")


# --- damaged and foreign files

def damage_config(raw, change):
    "The same file with another configuration in its header."
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + size])
    header["__metadata__"]["config"] = change(json.loads(header["__metadata__"]["config"]))
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + raw[8 + size:]


def with_net(**changes): return lambda raw: damage_config(raw, lambda c: json.dumps(c | {"net": c["net"] | changes}))


DAMAGES = {
    "empty": lambda raw: b"",
    "garbage": lambda raw: bytes(range(256)) * 40,
    "truncated": lambda raw: raw[:-1],
    "half": lambda raw: raw[:len(raw) // 2],
    "header cut": lambda raw: raw[:20],
    "huge header": lambda raw: (2**62).to_bytes(8, "little") + raw[8:],
    "header of 100 MB": lambda raw: (10**8).to_bytes(8, "little") + raw[8:],
    "pickle": lambda raw: pickle.dumps({"config": 1}),
    "another library": lambda raw: save({"w": torch.zeros(3)}),
    "no tensors": lambda raw: save({}, {"config": load_config(raw)}),
    "config not JSON": lambda raw: damage_config(raw, lambda c: "{"),
    "config a list": lambda raw: damage_config(raw, lambda c: "[]"),
    "deep JSON": lambda raw: damage_config(raw, lambda c: "[" * 10**5),
    "unknown network": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"network": "Surprise"})),
    "no net": lambda raw: damage_config(raw, lambda c: json.dumps({"sigma_data": 0.5})),
    "no sigma_data": lambda raw: damage_config(raw, lambda c: json.dumps({"net": c["net"]})),
    "sigma_data NaN": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"sigma_data": math.nan})),
    "noise levels upside down": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"sigmas": dict(sigma_min=80., sigma_max=0.002)})),
    "words for noise levels": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"sigmas": dict(sigma_min="low", sigma_max="high")})),
    "no height": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"shape": [1, 4]})),
    "a height of a pixel and a half": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"shape": [1, 1.5, 4]})),
    "a height of none": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"shape": [1, 0, 4]})),
    "a number for a shape": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"shape": 8})),
    "fewer classes than labels": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"classes": ["0"]})),
    "a word for classes": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"classes": "digits"})),
    "a list of noise levels": lambda raw: damage_config(raw, lambda c: json.dumps(c | {"sigmas": [80, 1]})),
    "unknown argument": with_net(depth=3),
    "other width": with_net(channels=64),
    "petabytes": with_net(channels=32 * 10**6),
    "beyond integers": with_net(channels=32 * 10**30),
    "no channels": with_net(channels=0),
    "a word for a number": with_net(channels="many"),
}


def load_config(raw): return json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["config"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model(unbroken, tmp_path, damage):
    file = tmp_path / "model.safetensors"
    file.write_bytes(DAMAGES[damage]((unbroken / "model.safetensors").read_bytes()))
    with pytest.raises(ValueError, match="model.safetensors is damaged or was not saved by this library") as e: load(tmp_path)
    assert len(str(e.value)) < 600


def test_load_runs_no_code_of_a_pickle(tmp_path):
    class Bomb:
        def __reduce__(self): return (tmp_path / "ran").touch, ()
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError): load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["nothing", "nothing.safetensors", "."])
def test_missing_model(tmp_path, path):
    with pytest.raises(FileNotFoundError, match="no model at .*need a run folder or a safetensors file"): load(tmp_path / path)


def test_load_leaves_random_numbers_alone_and_owns_its_memory(unbroken, tmp_path):
    file = tmp_path / "copy.safetensors"
    file.write_bytes((unbroken / "model.safetensors").read_bytes())
    before = torch.get_rng_state()
    denoiser = load(str(file))
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(2, 1, 4, 4)
    D = denoiser(x, 1.)
    with open(file, "r+b") as f: f.write(bytes(file.stat().st_size))    # a map of the file would hold zeros now
    assert torch.equal(denoiser(x, 1.), D)
    assert {p.requires_grad for p in denoiser.parameters()} == {False}


def test_save_denoiser_alone(tmp_path):
    net = tiny()
    save_denoiser(net, tmp_path / "new" / "a.safetensors", dict(note="é"))
    back = load(tmp_path / "new" / "a.safetensors")
    assert back.config["note"] == "é" and all(map(torch.equal, back.parameters(), net.parameters()))


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "another library"])
def test_damaged_state(unbroken, tmp_path, damage):
    for f in ("config.json", "metrics.jsonl", "model.safetensors", "state/latest.safetensors"):
        (tmp_path / f).parent.mkdir(exist_ok=True)
        (tmp_path / f).write_bytes((unbroken / f).read_bytes())
    file = tmp_path / "state/latest.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(ValueError, match="latest.safetensors is damaged"): run_in(tmp_path, resume=True)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "\0\0"])
def test_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is damaged"): run_in(tmp_path, resume=True)


def test_damaged_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\0\0\0\n")
    with pytest.raises(ValueError, match="metrics.jsonl is damaged"): read_log(tmp_path)


def test_log_in_the_middle_of_a_write(unbroken, tmp_path):
    (tmp_path / "metrics.jsonl").write_text((unbroken / "metrics.jsonl").read_text() + '{"images": 17')
    assert read_log(tmp_path) == read_log(unbroken)
    line, = plot_loss(tmp_path).axes[0].lines
    assert list(line.get_xdata()) == [64, 128, 160]
    assert read_log(tmp_path / "nowhere") == []


# --- which folder

@pytest.mark.parametrize("changes, says", [
    (dict(batch=32), "training.batch is 16 there and 32 here"),
    (dict(noise=LogNormal(0.)), r"training.noise is LogNormal\(P_mean=-.*\) there and LogNormal\(P_mean=0.0"),
    (dict(images=320, seed=3), "training.images is 160 there and 320 here; training.seed is 0 there and 3 here"),
])
def test_another_run_is_there(unbroken, changes, says):
    before = contents(unbroken)
    with pytest.raises(ValueError, match=says): run_in(unbroken, **changes, resume=True)
    assert contents(unbroken) == before


def test_another_network_or_data_is_there(unbroken):
    with pytest.raises(ValueError, match="net.num_labels is 2 there and 0 here"): run_in(unbroken, net=tiny(labels=0))
    data = some_data()
    data.images[3, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"data.fingerprint is \w{16} there"): run_in(unbroken, data=data, resume=True)


def test_not_by_accident(unbroken, tmp_path):
    with pytest.raises(ValueError, match="already holds this run; go on with resume=True"): run_in(unbroken)
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        for resume in (False, True):
            with pytest.raises(ValueError, match="exists and holds no run"): run_in(out, resume=resume)
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


# --- settings

BAD = [dict(batch=64.5), dict(batch="16"), dict(images=0), dict(images=-5), dict(images=math.nan), dict(images=math.inf), dict(images=None),
       dict(lr=0), dict(lr=-1e-3), dict(lr=math.nan), dict(lr=math.inf), dict(lr="fast"), dict(lr_end=1.5), dict(lr_end=-0.1), dict(warmup=-1),
       dict(ema_halflife=0), dict(label_dropout=1.01), dict(label_dropout=math.nan), dict(seed=-1), dict(seed=0.5), dict(precision="fp8"),
       dict(log_every=0), dict(save_every=0.5), dict(sample_every=None), dict(sigma_min=0), dict(sigma_max=math.inf), dict(sigma_max="80")]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_settings_are_named(tmp_path, bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))} must be .*got"): run_in(tmp_path / "run", **bad)
    assert not (tmp_path / "run").exists()


def test_a_run_remembers_where_sampling_begins_and_ends(unbroken, tmp_path):
    "In the model, and in its pictures; the weights are the same; a run with others is another run."
    ends, out = dict(sigma_min=0.03, sigma_max=9.), tmp_path / "run"
    denoiser = run_in(out, **ends)
    assert denoiser.config["sigmas"] == load(out / "model.safetensors").config["sigmas"] == ends
    assert load(unbroken).config["sigmas"] == dict(sigma_min=0.002, sigma_max=80.)
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), load(unbroken).parameters()))
    sample_picture(denoiser, (1, 4, 4), karras_sigmas(18, **ends)).save(tmp_path / "expected.png")
    drawn = (out / "samples/000000160.png").read_bytes()
    assert drawn == (tmp_path / "expected.png").read_bytes() != (unbroken / "samples/000000160.png").read_bytes()
    with pytest.raises(ValueError, match=r"holds another run \(sigmas.sigma_max is 9.0 there and 10.0 here\)"): run_in(out, resume=True, **ends | dict(sigma_max=10))
    with pytest.raises(ValueError, match="need 0 < sigma_min < sigma_max < infinity, got 2.0 and 1.0"): run_in(tmp_path / "none", sigma_min=2, sigma_max=1)
    assert not (tmp_path / "none").exists()


def test_whole_floats_and_zeros_are_fine(tmp_path):
    s = Settings(1e5, 64., 1, 0, 0, 10, 1, LogNormal(), 2**70, "bf16")
    assert (s.images, s.batch) == (100_000, 64) and json.dumps(s.images) == "100000"
    run_in(tmp_path / "run", images=32., lr_end=0, warmup=0, seed=2**70, precision="bf16")


@pytest.mark.parametrize("net, data, says", [
    (dict(labels=3), dict(), "0 labels or the data's 2, got num_labels=3"),
    (dict(labels=2), dict(labels=3), "0 labels or the data's 3, got num_labels=2"),
    (dict(labels=2), dict(labels=0), "0 labels or the data's 0, got num_labels=2"),
    (dict(channels=3), dict(), r"x must be \(B, 3, H, W\)"),
])
def test_network_and_data_must_fit(tmp_path, net, data, says):
    with pytest.raises(ValueError, match=says): run_in(tmp_path / "run", net=tiny(**net), data=some_data(**data))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", [[1, 2], torch.utils.data.TensorDataset(torch.zeros(3, 1, 4, 4))])
def test_data_must_be_image_data(tmp_path, data):
    with pytest.raises(ValueError, match="data must be ImageData, which from_dataset makes of a torch Dataset, got (list|TensorDataset)"): run_in(tmp_path / "run", data=data)


@pytest.mark.parametrize("loss, got", [(lambda *args, **kw: torch.zeros(()), r"shape \(\)"), (lambda denoise, x0, **kw: x0, r"shape \(1, 1, 4, 4\)"), (lambda *args, **kw: 1., "float")])
def test_a_loss_gives_a_value_for_each_image(tmp_path, loss, got):
    with pytest.raises(ValueError, match=f"loss must return one value for each image, .*got {got}"): run_in(tmp_path / "run", loss=loss)
    assert not (tmp_path / "run").exists()    # before anything is written


def test_a_loss_has_the_same_name_in_every_process():
    class Unnamed:
        def __call__(self, *args, **kw): pass
    def name(loss): return Settings(1000, 16, 1e-2, 1, 0, 16, 0., LogNormal(), 0, "fp32", loss=loss).as_dict()["loss"]
    assert name(some_data) == f"{__name__}.some_data" and name(Unnamed()) == name(Unnamed()) and "0x" not in name(Unnamed())


def test_only_what_load_can_build(tmp_path):
    class Other(EDMPrecond): pass
    with pytest.raises(ValueError, match="an EDMPrecond around one of UNet.*got Other"): run_in(tmp_path / "run", net=Other(tiny().net))
    with pytest.raises(ValueError, match="got UNet"): run_in(tmp_path / "run", net=tiny().net)


def test_odd_sizes(tmp_path):
    "No labels used, two channels, a batch larger than the data, images no multiple of the batch, a picture before the first log."
    out = tmp_path / "deep" / "run"
    run_in(out, net=tiny(labels=0, channels=2), data=some_data(channels=2), batch=60, images=100, log_every=1000, sample_every=50)
    assert [m["images"] for m in read_log(out)] == [120]
    assert sorted(f.name for f in (out / "samples").iterdir()) == ["000000060.png", "000000120.png"]


def test_train_goes_on_from_a_loaded_model(unbroken, tmp_path):
    run_in(tmp_path / "more", net=load(unbroken))
    assert not torch.equal(next(load(tmp_path / "more").parameters()), next(load(unbroken).parameters()))


# --- parts

def test_replacing(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with replacing(str(file)) as f:
        f.write_text("one")
        assert not file.exists() and f.suffix == ".txt" and f.parent == file.parent
    with pytest.raises(ZeroDivisionError), replacing(file) as f:
        f.write_text("two")
        1 / 0
    assert file.read_text() == "one" and list(file.parent.iterdir()) == [file]
    with pytest.raises(OSError), replacing(file): pass    # nothing written
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "new") as f: f.write_text("x")
    with pytest.raises(FileExistsError), replacing(file / "b.txt") as f: f.write_text("x")    # a file where a folder should be
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(file) as f: (tmp_path / "elsewhere").read_text()
    assert file.read_text() == "one" and list(file.parent.iterdir()) == [file]


@given(st.integers(0, 10**7), st.integers(1, 10**7), st.floats(1e-6, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_learning_rate_bounds(seen, images, lr, lr_end, warmup):
    rate = learning_rate(seen, images, lr, lr_end, warmup)
    assert 0 <= rate <= lr * (1 + 1e-12)    # rounding
    if seen >= max(images, warmup): assert rate == pytest.approx(lr * lr_end, rel=1e-12, abs=1e-18)
    if warmup <= seen < images: assert rate >= learning_rate(seen + 1, images, lr, lr_end, warmup) - 1e-18    # falls


@settings(deadline=None)
@given(seed=st.integers(0, 2**40), n=st.integers(1, 60), batch=st.integers(1, 150), first=st.integers(0, 4))
def test_every_image_once_per_epoch(seed, n, batch, first):
    "Whatever the batch: cut into batches or not, epoch by epoch a permutation."
    start = first * n
    parts = [module._batch_index(seed, s, batch, n) for s in range(start, start + 3 * n, batch)]
    assert all(len(p) == batch for p in parts)
    for epoch, order in enumerate(torch.cat(parts)[:3 * n].split(n), first):
        assert torch.equal(order.sort().values, torch.arange(n))
        assert torch.equal(order, module._order(seed, epoch, n))


def test_epochs_and_seeds_have_their_own_orders():
    orders = {tuple(module._order(seed, epoch, 30).tolist()) for seed in (0, 1, 2**32, 2**32 + 1) for epoch in range(20)}
    assert len(orders) == 80    # a chance repetition has probability 1e-29


def test_draws_of_a_step_depend_on_seed_and_step_alone():
    data, make = some_data(), lambda seed: Settings(1000, 16, 1e-3, 0, 0, 10, 0.5, LogNormal(), seed, "fp32")
    def draws(seed, seen):
        drawn, dropout_seed = module._draw(make(seed), data, seen)
        return torch.cat([t.flatten().double() for t in (*drawn.values(), torch.tensor(dropout_seed))])
    reference = draws(0, 32)
    draws(0, 48), torch.manual_seed(5)
    assert torch.equal(draws(0, 32), reference)
    assert not any(torch.equal(draws(*key), reference) for key in [(0, 48), (1, 32), (2**32, 32)])


# --- how a step is computed

def trained_steps(steps=4, net=None, settings={}, **how):
    "A trainer after some steps of 16 images."
    values = dict(images=1000, batch=16, lr=1e-3, lr_end=0.1, warmup=0, ema_halflife=40, label_dropout=0.1, noise=LogNormal(), seed=0, precision="fp32")
    trainer = Trainer(net or tiny_without_dropout(), some_data(), Settings(**values | settings), **how)
    for _ in range(steps): trainer.step()
    return trainer


def tiny_without_dropout():
    net = tiny()
    for part in net.modules():
        if isinstance(part, torch.nn.Dropout): part.p = 0.
    return net


def weights_of(trainer): return torch.cat([p.detach().flatten() for p in trainer.denoiser.parameters()])


@pytest.mark.parametrize("how", [dict(accumulate=4), dict(settings=dict(channels_last=True)), dict(compile=True)], ids=str)
def test_ways_of_computing_agree(how, monkeypatch):
    if "compile" in how: monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))    # no C++ compiler needed
    one, other = trained_steps(), trained_steps(**how)
    # gradients agree to float32 rounding; Adam divides small ones by themselves, so a weight may differ by a small share of lr
    moved = (weights_of(one) - weights_of(trained_steps(steps=0))).abs().max()
    assert moved > 2e-3 and (weights_of(one) - weights_of(other)).abs().max() < 0.02 * moved
    torch.testing.assert_close(torch.stack(one.losses), torch.stack(other.losses), rtol=1e-4, atol=0)
    torch.testing.assert_close(one.by_sigma, other.by_sigma, rtol=1e-3, atol=1e-4)


compile_ = torch.compile


def test_parts_must_divide_the_batch():
    with pytest.raises(ValueError, match="batch must be a multiple of 1 processes x 3 parts, got 16"): trained_steps(0, accumulate=3)


def test_state_of_channels_last_goes_on_exactly(tmp_path):
    how = dict(settings=dict(channels_last=True))
    whole, half, other = trained_steps(4, **how), trained_steps(2, **how), trained_steps(0, **how)
    module._restore(other, {k: v.clone() for k, v in module._state(half).items()})
    for _ in range(2): other.step()
    assert all(torch.equal(v, module._state(other)[k]) for k, v in module._state(whole).items())
    save_denoiser(whole.ema.model, tmp_path / "model.safetensors")    # safetensors keeps no strides


def test_clip_bounds_the_step():
    "Long gradients are shortened to the given length; Adam hides that from its first step, so look at its moments."
    def gradient(clip): return torch.cat([m["exp_avg"].flatten() for m in trained_steps(1, settings=dict(clip=clip)).opt.state.values()]) / 0.1
    free, clipped = gradient(None), gradient(0.01)
    assert free.norm() > 0.1
    torch.testing.assert_close(clipped.norm().item(), 0.01, rtol=1e-4, atol=0)    # torch adds 1e-6 to the length it divides by
    torch.testing.assert_close(clipped, free * 0.01 / free.norm(), rtol=1e-3, atol=1e-9)
    assert torch.equal(gradient(1e9), free)


@pytest.mark.parametrize("factor", [math.inf, 1e22])    # of the second the gradients are finite, the sum of their squares is not
@pytest.mark.parametrize("how", [dict(precision="fp32"), dict(precision="fp16"), dict(precision="fp32", clip=1.), dict(precision="fp32", optimizer="muon")])
def test_a_gradient_that_is_not_finite_moves_nothing(how, factor):
    trainer = trained_steps(2, settings=how)
    before, moments, loss = weights_of(trainer).clone(), [t.clone() for m in trainer.opt.state.values() for t in m.values() if t.ndim], trainer.loss
    skipped, scale = int(trainer.skipped), trainer.scaler.get_scale()
    trainer.loss = lambda *args, **kw: loss(*args, **kw) * factor
    trainer.step()
    assert torch.equal(weights_of(trainer), before) and int(trainer.skipped) == skipped + 1
    assert all(map(torch.equal, moments, [t for m in trainer.opt.state.values() for t in m.values() if t.ndim]))
    assert trainer.scaler.get_scale() == scale / 2
    trainer.loss = loss
    trainer.step()
    assert not torch.equal(weights_of(trainer), before) and weights_of(trainer).isfinite().all()


def test_fp16_overflow_is_survived(tmp_path, monkeypatch):
    "A factor so large that the first gradients overflow: these steps are left out, the factor falls, the training goes on."
    made = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, init_scale, **kw: made(device, init_scale=init_scale * 2.**8, **kw))
    run_in(tmp_path / "run", net=tiny_without_dropout(), precision="fp16", images=400, log_every=200)
    log, state = read_log(tmp_path / "run"), load_file(tmp_path / "run/state/latest.safetensors")
    assert log[0]["skipped"] > 0 == log[-1]["skipped"] and log[-1]["loss"] < 1.5
    assert state["scaler"][0] < 2.**24 and load(tmp_path / "run")(torch.zeros(1, 1, 4, 4), 1.).isfinite().all()


def test_scaler_is_part_of_the_state():
    trainer, other = trained_steps(3, settings=dict(precision="fp16")), trained_steps(0, settings=dict(precision="fp16"))
    trainer.scaler.update(1234.)
    module._restore(other, module._state(trainer))
    assert other.scaler.get_scale() == 1234.
    other.step()
    assert other.scaler.get_scale() == 1234. and other.scaler.state_dict()["_growth_tracker"] == 4    # steps without overflow


def test_loss_by_sigma_adds_up(unbroken):
    edges = [0, *module.SIGMA_EDGES, math.inf]
    assert edges[1:-1] == pytest.approx([10**(k / 2) for k in range(-4, 4)], rel=1e-3)    # two bins a decade, rounded to 4 places
    trainer, seen = trained_steps(0), []
    loss = trainer.loss
    trainer.loss = lambda *args, **kw: seen.append((kw["sigma"], loss(*args, **kw))) or seen[-1][1]
    for _ in range(3): trainer.step()
    sigma, losses = (torch.cat(values) for values in zip(*seen))
    for k, (low, high) in enumerate(zip(edges, edges[1:])):
        inside = (sigma > low) & (sigma <= high)
        assert trainer.by_sigma[1, k] == inside.sum()
        torch.testing.assert_close(trainer.by_sigma[0, k], losses[inside].sum().detach(), rtol=1e-5, atol=1e-6)    # order of adding
    torch.testing.assert_close(trainer.by_sigma[0].sum() / 48, torch.stack(trainer.losses).mean(), rtol=1e-5, atol=0)
    lines = plot_loss(unbroken).axes[1].lines
    for x, low, high in zip(lines[-1].get_xdata()[1:-1], edges[1:], edges[2:]): assert low < x < high    # drawn inside their bins
    for line in read_log(unbroken): assert len(line["loss_by_sigma"]) == 9 and line["skipped"] == 0


def test_no_part_of_a_step_looks_at_the_device(monkeypatch):
    "What would make the host wait for a GPU: item, tolist, bool, nonzero, and copies to the CPU."
    trainer, looked = trained_steps(1), []
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")): looked.append(str(func))
            return func(*args, **kwargs or {})
    monkeypatch.setattr(module, "_draw", lambda *a, drawn=module._draw(trainer.settings, trainer.data, 16): drawn)    # the host's own numbers
    core = sys.modules["ddpm_edm.core"]
    monkeypatch.setattr(core, "_refused", lambda value, good: False)          # they look on the CPU only
    monkeypatch.setattr(sys.modules["ddpm_edm.unet"], "_check_labels", lambda *a: None)
    before = weights_of(trainer).clone()
    with Watch(): trainer.step()
    assert looked == [] and not torch.equal(weights_of(trainer), before)


# --- precision by measurement

def test_auto_is_written_down_and_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "conv_times", lambda *a: {("fp32", False): 1., ("fp32", True): 0.99, ("bf16", False): 0.5, ("bf16", True): 0.6})
    with monkeypatch.context() as m:
        press_ctrl_c(m, 64)
        with pytest.raises(KeyboardInterrupt): run_in(tmp_path / "run", precision="auto")
    training = json.loads((tmp_path / "run/config.json").read_text())["training"]
    assert training["precision"] == "bf16" and training["channels_last"] is False
    monkeypatch.setattr(module, "conv_times", lambda *a: pytest.fail("a resumed run measures nothing"))
    run_in(tmp_path / "run", precision="auto", resume=True)
    run_in(tmp_path / "same", precision="bf16")
    assert_same_run(tmp_path / "run", tmp_path / "same")


def test_fastest_wants_a_clear_win():
    slow, times = ("fp32", False), {("fp32", False): 1., ("fp32", True): 0.95, ("bf16", False): 0.88}
    assert module.fastest(times) == slow
    assert module.fastest(times, margin=1.05) == ("bf16", False)
    assert module.fastest(times | {("fp32", True): 0.5}) == ("fp32", True)
    assert module.fastest({("fp32", False): 1., ("fp16", False): 0.3, ("fp16", True): 0.29}) == ("fp16", False)


@pytest.mark.parametrize("asked, kept", [(None, True), (False, False)])
def test_a_layout_that_is_asked_for(tmp_path, monkeypatch, asked, kept):
    monkeypatch.setattr(module, "conv_times", lambda *a: {("fp32", False): 1., ("fp32", True): 0.5})
    run_in(tmp_path / "run", precision="auto", channels_last=asked, images=16)
    assert json.loads((tmp_path / "run/config.json").read_text())["training"]["channels_last"] is kept


def test_conv_times():
    times = module.conv_times("cpu", repeats=2)
    assert {k for k in times} == {("fp32", False), ("bf16", False)} and all(t > 0 for t in times.values())


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="no GPU with units for bf16")
def test_auto_finds_the_units_of_a_gpu():
    assert module.fastest(module.conv_times("cuda"))[0] == "bf16"


# --- trackers

def test_trackers_get_the_log(tmp_path):
    from accelerate.tracking import GeneralTracker
    class Notes(GeneralTracker):
        name, requires_logging_directory, lines, closed = "notes", False, [], False
        def __init__(self): super().__init__(_blank=True)
        @property
        def tracker(self): return self.lines
        def store_init_configuration(self, values): self.config = values
        def log(self, values, step=None, **kw): self.lines.append((step, values))
        def finish(self): self.closed = True
    notes = Notes()
    run_in(tmp_path / "run", log_with=notes)
    assert [step for step, _ in notes.lines] == [64, 128, 160] and notes.closed and notes.config["batch"] == 16
    assert notes.lines[0][1]["loss"] == read_log(tmp_path / "run")[0]["loss"] and "loss below 1" in notes.lines[0][1]


def test_tensorboard_takes_settings_and_figures(tmp_path):
    "The real one: it refuses settings that are no number or text."
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_in(tmp_path / "run", power_ema=(0.1,), log_with="tensorboard")
    logs = [events.EventAccumulator(str(f)).Reload() for f in (tmp_path / "run").rglob("events.out.tfevents*")]
    found = [log for log in logs if "loss" in log.Tags()["scalars"]]
    assert [e.step for e in found[0].Scalars("loss")] == [64, 128, 160]


@pytest.mark.parametrize("change", [dict(blocks=10**9), dict(mults=[1] * 10**6), dict(depth=10**9)])
def test_a_file_that_asks_for_more_blocks_than_it_holds(change, tmp_path):
    "Refused before anything is built, which would take for ever."
    save_denoiser(tiny(), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as f: config, tensors = json.loads(f.metadata()["config"]), {k: f.get_tensor(k) for k in f.keys()}
    config["net"] |= change
    save_file(tensors, tmp_path / "b.safetensors", {"config": json.dumps(config)})
    with pytest.raises(ValueError, match="its settings ask for"): load(tmp_path / "b.safetensors")


def test_a_tracker_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="log_with must name trackers that are installed, got 'comet_ml'"):
        run_in(tmp_path / "run", log_with="comet_ml")
    assert not (tmp_path / "run").exists()


# --- augmentation, averages of other lengths, other networks and data

def augmented(pipe):
    torch.manual_seed(0)
    return EDMPrecond(UNet(1, 32, mults=(1,), attention=(), num_labels=2, augment_dim=pipe.dim))


def test_augmentation_reaches_images_and_network(tmp_path):
    from ddpm_edm.augment import Augment
    pipe = Augment(xflip=1.)
    trainer, seen = trained_steps(0, net=augmented(pipe), settings=dict(augment=pipe)), []
    loss = trainer.loss
    trainer.loss = lambda model, x0, **kw: seen.append((x0, kw["augment"])) or loss(model, x0, **kw)
    trainer.step()
    x0, told = seen[0]
    original = trainer.data.batch(module._draw(trainer.settings, trainer.data, 0)[0]["index"])[0]
    flipped = told[:, 0] == 1
    assert 0 < flipped.sum() < 16
    assert torch.equal(x0, torch.where(flipped[:, None, None, None], original.flip(3), original))
    run_in(tmp_path / "run", net=augmented(pipe), augment=pipe)
    assert "xflip=1.0" in json.loads((tmp_path / "run/config.json").read_text())["training"]["augment"]
    with pytest.raises(ValueError, match="training.augment is"): run_in(tmp_path / "run", net=augmented(pipe), augment=Augment(xflip=0.5), resume=True)
    with pytest.raises(ValueError, match="told of augmentation by augment_dim=1, got augment_dim=0"): run_in(tmp_path / "other", augment=pipe)
    with pytest.raises(ValueError, match="told of augmentation by augment_dim=0, got augment_dim=1"): run_in(tmp_path / "other", net=augmented(pipe))


def test_averages_of_other_lengths_afterwards(tmp_path, monkeypatch):
    from ddpm_edm.ema import ema_snapshots, posthoc_ema
    widths = dict(power_ema=(0.05, 0.2), images=320, sample_every=32, save_every=64)
    run_in(tmp_path / "run", **widths)
    assert [s[:2] for s in ema_snapshots(tmp_path / "run")] == [(w, n) for n in range(32, 321, 32) for w in (0.05, 0.2)]
    state = load_file(tmp_path / "run/state/latest.safetensors")
    for name, value in posthoc_ema(tmp_path / "run", 0.2).items():    # the last stored one is itself, to float32 rounding
        torch.testing.assert_close(value, state[f"power/0.2/{name}"], rtol=1e-4, atol=1e-5)
    press_ctrl_c(monkeypatch, 176)
    with pytest.raises(KeyboardInterrupt): run_in(tmp_path / "broken", **widths)
    run_in(tmp_path / "broken", resume=True, **widths)
    assert_same_run(tmp_path / "broken", tmp_path / "run")
    with pytest.raises(ValueError, match="sigma_rel"): run_in(tmp_path / "bad", power_ema=(0.5,))


def test_a_transformer_is_trained_and_loaded(tmp_path):
    from ddpm_edm.dit import DiT
    torch.manual_seed(0)
    net = EDMPrecond(DiT(1, patch=2, width=32, depth=1, heads=2, num_labels=2))
    trained = run_in(tmp_path / "run", net=net)
    x, labels = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, -1])
    back = load(tmp_path / "run")
    assert type(back.net) is DiT and torch.equal(back(x, 0.5, labels=labels), trained(x, 0.5, labels=labels))


def test_images_on_disk_train_like_those_in_memory(tmp_path):
    import numpy as np
    from ddpm_edm.data import MappedData
    data = some_data()
    np.save(tmp_path / "images.npy", data.images.numpy())
    on_disk = MappedData(np.load(tmp_path / "images.npy", mmap_mode="r"), data.labels, name=data.name)
    run_in(tmp_path / "disk", data=on_disk)
    run_in(tmp_path / "memory", data=data)
    assert_same_run(tmp_path / "disk", tmp_path / "memory")
