"The commands: as programs, and as functions with every mistake a person can make."
import errno
import inspect
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_edm import cli
from ddpm_edm.cli import describe_model, distill_run, evaluate_run, import_model, run_command, sample_images, train_images
from ddpm_edm.consistency import consistency_step, few_levels, is_consistency
from ddpm_edm.core import image_grid
from ddpm_edm.data import _attention, default_mults, digits, load_data
from ddpm_edm.metrics import evaluate, pixel_features, to_uint8
from ddpm_edm.noise import karras_sigmas
from ddpm_edm.precond import EDMPrecond
from ddpm_edm.solvers import euler, generate
from ddpm_edm.train import load, save_denoiser, train
from ddpm_edm.unet import UNet

TRAIN, SAMPLE, EVAL, DISTILL, IMPORT, INFO = (f"ddpm-edm-{name}" for name in ("train", "sample", "eval", "distill", "import", "info"))
COMMANDS = {TRAIN: train_images, SAMPLE: sample_images, EVAL: evaluate_run, DISTILL: distill_run, IMPORT: import_model, INFO: describe_model}
TINY = "--images 256 --channels 32 --quiet"
torch.set_num_threads(1)
ENV = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")    # another number of threads rounds differently


def command(name, words, **kw):
    "Run the installed program as a person does."
    program = Path(sys.executable).parent / name
    if not program.exists(): pytest.skip(f"{name} is not installed beside {sys.executable}")
    return subprocess.run([program, *shlex.split(words)], capture_output=True, text=True, timeout=120, env=ENV, **kw)


def call(name, words):
    "Run a command in this process; its exit code."
    try: run_command(COMMANDS[name], name, shlex.split(words))
    except SystemExit as e: return e.code or 0
    return 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run folder made by the program itself, and what the program said."
    folder = tmp_path_factory.mktemp("trained")
    return folder / "runs" / "digits", command(TRAIN, TINY, cwd=folder)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    "Relative paths of a test go to its own folder, and commands run on the CPU."
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(trained, tmp_path):
    "The run folder under a short name."
    os.symlink(trained[0], tmp_path / "run")
    return tmp_path / "run"


def pixels(path): return np.asarray(Image.open(path)).astype(int)


def tiles(path, ncols, size=8):
    "The pictures in a grid of scale 1, row by row."
    a = np.pad(pixels(path), ((0, 1), (0, 1)), constant_values=255)
    h, w = a.shape[0] // (size + 1), a.shape[1] // (size + 1)
    assert w == ncols
    return a.reshape(h, size + 1, w, size + 1).transpose(0, 2, 1, 3)[:, :, :size, :size]


# --- as programs

def test_train_program(trained):
    run, said = trained
    assert said.returncode == 0 and said.stderr == ""    # --quiet: no bar, and no warning of anybody's
    assert "digits: 1797 images 1 x 8 x 8, 10 classes; sigma_data 0.752" in said.stdout
    assert f"wrote {Path('runs/digits')}" in said.stdout and f"next: {SAMPLE} runs/digits" in said.stdout
    for file in ("config.json", "model.safetensors", "metrics.jsonl", "loss.png", "state/latest.safetensors"): assert (run / file).is_file()
    assert list((run / "samples").glob("*.png"))
    config = json.loads((run / "config.json").read_text())
    assert config["training"]["images"] == 256 and config["net"]["channels"] == 32 and config["net"]["num_labels"] == 10


def test_sample_program(trained, tmp_path):
    said = command(SAMPLE, f"{shlex.quote(str(trained[0]))} --n 64 --labels 3 --steps 18 --seed 0 --out samples.png", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "wrote samples.png: 64 pictures by 18 heun steps, 35 evaluations" in said.stdout and "next" in said.stdout
    assert "35/35" in said.stderr    # the bar counts evaluations of the network
    assert pixels(tmp_path / "samples.png").shape == ((8 * 9 - 1) * 4,) * 2


@pytest.mark.parametrize("name, words, code", [(TRAIN, "--data cifar", 1), (SAMPLE, "", 2), (EVAL, "nowhere", 1)])
def test_program_errors_are_one_line(name, words, code, tmp_path):
    said = command(name, words, cwd=tmp_path)
    assert said.returncode == code and said.stderr.startswith(f"{name}: error: ") and said.stderr.count("\n") == 1
    assert "Traceback" not in said.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_interrupted_and_resumed_is_uninterrupted(tmp_path):
    "Ctrl-C saves, says how to go on, exits 130; with --resume the model is bit for bit that of an unbroken run."
    words = "--precision fp32 --images 2560 --channels 32 --lr 2e-3 --ema-halflife 200 --out"
    program = Path(sys.executable).parent / TRAIN
    if not program.exists(): pytest.skip(f"{TRAIN} is not installed")
    p = subprocess.Popen([program, *shlex.split(f"{words} broken")], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=ENV)
    begun, deadline = tmp_path / "broken" / "model.safetensors", time.monotonic() + 120    # written before the first step
    while not begun.exists() and time.monotonic() < deadline and p.poll() is None: time.sleep(0.02)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=120)[1]
    assert p.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"{TRAIN}: stopped after ") and "of 2560 images" in last and "--resume" in last and "Traceback" not in err
    assert call(TRAIN, f"{words} broken --resume --quiet") == call(TRAIN, f"{words} whole --quiet") == 0
    same = Path("broken/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert same    # apart, or pytest would spell out how megabytes differ
    images = lambda run: [json.loads(line)["images"] for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert images("broken") == images("whole")


def test_modules_import_light():
    "Importing every module must not import what only some functions need."
    code = ("import importlib, pkgutil, sys, ddpm_edm\n"
            "names = [m.name for m in pkgutil.iter_modules(ddpm_edm.__path__) if not m.name.startswith('_')]\n"
            "for name in names: importlib.import_module('ddpm_edm.' + name)\n"
            "print(*names, '|', *[h for h in ('sklearn', 'accelerate', 'matplotlib', 'torchvision') if h in sys.modules])")
    names, heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("|")
    assert {"cli", "core", "data", "train"} <= set(names.split()) and heavy.split() == []


# --- help and defaults

@pytest.mark.parametrize("name, function", COMMANDS.items())
def test_help_explains_every_setting(name, function, capsys):
    assert call(name, "--help") == 0
    text = capsys.readouterr().out.replace("_", "-")
    assert " ".join(function.__doc__.split()).replace("_", "-") in " ".join(text.split())
    parser = cli._parser(function, name)
    actions = {a.dest: a for a in parser._actions}
    for p in inspect.signature(function).parameters.values():
        action = actions[p.name]
        assert len(action.help.split(" (default")[0]) > 5, f"{p.name} has no help"
        assert action.default == p.default or p.default is inspect.Parameter.empty    # the command does what the function does
        assert (("--" if action.option_strings else "") + p.name).replace("_", "-") in text
    assert "pdb" not in text and "xtra" not in text


def test_every_command_has_examples():
    assert set(cli.EXAMPLES) == set(COMMANDS)
    for name, examples in cli.EXAMPLES.items(): assert 2 <= len(examples) <= 4 and all(0 < len(why) < 90 for why in examples.values())


EVERY = [(name, words) for name, examples in cli.EXAMPLES.items() for words in examples]


@pytest.mark.parametrize("name, words", EVERY)
def test_examples_are_read_and_shown(name, words, capsys):
    "The command's own parser takes each, and gives the function all it needs; --help shows it whole on a line of its own, for copying."
    function, asked = COMMANDS[name], vars(cli._parser(COMMANDS[name], name).parse_args(shlex.split(words)))
    inspect.signature(function).bind(**{k: v for k, v in asked.items() if k in inspect.signature(function).parameters})
    required = {k for k, p in inspect.signature(function).parameters.items() if p.default is p.empty}
    assert not {k for k in required if asked[k] is None}
    assert call(name, "--help") == 0
    assert f"    {name} {words}".rstrip() in capsys.readouterr().out.split("examples:")[1].splitlines()


def test_examples_work(run, capsys):
    "One after the other, as written but for words that make them short; those of import with files of that layout and name."
    import test_zoo
    Path("runs").mkdir()
    os.rename("run", "runs/digits")
    folder_of_pictures(Path("photos"), n=20)
    Path("edm-cifar10-32x32-cond-vp.pkl").write_bytes(test_zoo.edm_pickle(test_zoo.tiny()[1], test_zoo.TINY))
    torch.save(test_zoo.recorded("guided_updown")[1], "256x256_diffusion.pt")
    short = {TRAIN: "--images 8 --batch 4 --channels 32 --size 8 --quiet", SAMPLE: "--steps 2 --quiet --device cpu", INFO: "",
             EVAL: "--n 40 --steps 1 --quiet --device cpu --features pixels", DISTILL: "--images 8 --batch 4 --quiet", IMPORT: ""}
    for name, words in EVERY:
        if name == IMPORT and words.startswith("ddpm-celebahq"): continue    # needs diffusers; test_zoo and test_coming_from import its folders
        if name == TRAIN and words == "": continue                           # trained already
        more = short[name] + " --head-dim 16" * ("--head-dim" in words)      # this small network's; what is said last counts
        assert call(name, f"{words} {more}") == 0, (words, capsys.readouterr().err)
        said = capsys.readouterr()
        if "--json" in words: json.loads(said.out)
        else: assert said.out


def test_help_of_the_program(tmp_path):
    said = command(SAMPLE, "--help", cwd=tmp_path)
    assert said.returncode == 0 and said.stdout.startswith(f"usage: {SAMPLE} ") and said.stderr == ""


def test_defaults_are_those_of_the_library(monkeypatch, capsys):
    "What is trained where nothing is asked for, and what the help says of it; the digits are not measured."
    mine, theirs = (inspect.signature(f).parameters for f in (train_images, train))
    for name in ("stable_targets", "label_dropout", "seed", "precision"): assert mine[name].default == theirs[name].default
    noise, net = theirs["noise"].default, inspect.signature(UNet).parameters
    default = {name: theirs[name].default for name in ("images", "batch", "ema_halflife", "lr", "optimizer")} | {name: net[name].default for name in ("channels", "blocks", "dropout")}
    default |= dict(p_mean=noise.P_mean, p_std=noise.P_std)
    help_of = {a.dest: a.help for a in cli._parser(train_images, TRAIN)._actions}
    for name, value in default.items(): assert f"default: {value if isinstance(value, str) else f'{value:g}'}" in help_of[name]
    got = asked_of_train(monkeypatch)
    monkeypatch.setattr(cli, "recipe", None)    # not to be called
    train_images(out="run")
    expected = {name: p.default for name, p in theirs.items() if p.kind is p.KEYWORD_ONLY}
    assert {name: got[name] for name in expected if name in got and name != "progress"} == {name: v for name, v in expected.items() if name in got and name != "progress"}
    assert got["net"] == UNet(1, mults=[1, 1], attention=[1], num_labels=10).config and got["sigma_data"] == 0.752
    assert capsys.readouterr().out.splitlines()[-1] == "next: ddpm-edm-sample run"


# --- completion

def test_completion_is_one_line_of_flags(capsys):
    for name, function in COMMANDS.items():
        assert call(name, "--print-completion bash") == 0    # though a run or file would be needed otherwise
        line = capsys.readouterr().out
        assert line.startswith("complete -o default -W '") and line.endswith(f"' {name}\n") and line.count("\n") == 1
        flags = set(line.split("'")[1].split())
        wanted = {"--" + k.replace("_", "-") for k, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
        assert flags == wanted | {"--help", "--print-completion"}
        for shell in ("fish", ""): assert call(name, f"--print-completion {shell}") == 2
        capsys.readouterr()


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
@pytest.mark.parametrize("shell, start", [("bash", ["--norc", "--noprofile", "-i"]), ("zsh", ["-f", "-i"])])
def test_completion_in_a_shell(shell, start, tmp_path, capsys):
    "Tab, as typed in a terminal, completes a flag, and a file after it."
    import pty
    import shutil
    if not shutil.which(shell): pytest.skip(f"no {shell} here")
    assert call(SAMPLE, f"--print-completion {shell}") == 0
    Path("completion").write_text(capsys.readouterr().out)
    Path("a-picture.png").touch()
    pid, terminal = pty.fork()
    if pid == 0: os.execvpe(shell, [shell, *start], os.environ | dict(TERM="dumb", ZDOTDIR=str(tmp_path), HOME=str(tmp_path)))    # the child is the shell
    said = b""
    def until(text):
        nonlocal said
        deadline, said = time.monotonic() + 30, b""
        while text not in said:
            assert time.monotonic() < deadline, said
            if select.select([terminal], [], [], 0.1)[0]: said += os.read(terminal, 4096)
    try:
        os.write(terminal, b". ./completion; echo rea''dy\n")
        until(b"ready")
        os.write(terminal, b"ddpm-edm-sample --upsc\t")
        until(b"--upscale ")
        os.write(terminal, b"a-pi\t")
        until(b"a-picture.png")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


# --- run_command

def settings_of(words):
    "What a function gets from these words."
    got = {}
    def f(
        run: str,                     # positional
        label_dropout: float = 0.1,   # a float
        n: int = None,                # a whole number
        sigma_min: float = 0.5,       # another float
        dry_run: bool = False,        # a switch
    ): "Help."; got.update(locals())
    run_command(f, "f", shlex.split(words))
    return {k: v for k, v in got.items() if k != "got"}


@pytest.mark.parametrize("words, expected", [
    ("r", dict(run="r", label_dropout=0.1, n=None, sigma_min=0.5, dry_run=False)),
    ("r --label-dropout 0.2 --sigma_min=-1.5 --dry-run", dict(label_dropout=0.2, sigma_min=-1.5, dry_run=True)),
    ("--label_dropout=0.2 --sigma-min -1.5 --dry_run r --n 3", dict(label_dropout=0.2, sigma_min=-1.5, dry_run=True, n=3)),
    ("a_b-c", dict(run="a_b-c")),
    ("-- --strange", dict(run="--strange")),
])
def test_flags(words, expected):
    assert {k: settings_of(words)[k] for k in expected} == expected


@pytest.mark.parametrize("words, message", [
    ("r --label 0.2", "unrecognized arguments: --label"), ("r --n three", "'three'"), ("", "run"), ("r s", "unrecognized arguments: s"),
    ("r --n", "expected one argument"), ("r --pdb", "--pdb"), ("r --xtra 1", "--xtra")])
def test_unreadable_words(words, message, capsys):
    with pytest.raises(SystemExit) as e: settings_of(words)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("f: error: ") and message in err and err.count("\n") == 1 and "f --help" in err


@pytest.mark.parametrize("error, line", [
    (ValueError("two\n  lines"), "two lines"),
    (ValueError(), "ValueError"),
    (FileNotFoundError("no folder x"), "no folder x"),
    (FloatingPointError("loss nan"), "loss nan"),
    (OSError(errno.ENOSPC, "No space left on device", "a/model"), "No space left on device: a/model"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b"), "Permission denied: a/b"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error: a file"),
    (MemoryError(), "out of memory; a smaller batch"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory; a smaller batch"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "out of memory; a smaller batch"),
])
def test_mendable_errors_are_one_line(error, line, capsys):
    def f(): raise error
    with pytest.raises(SystemExit) as e: run_command(f, "f", [])
    err = capsys.readouterr().err
    assert e.value.code == 1 and err.startswith(f"f: error: {line}") and err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("bug"), TypeError("bug"), IndexError("bug"), AssertionError("bug")])
def test_bugs_keep_their_traceback(error):
    def f(): raise error
    with pytest.raises(type(error), match="bug"): run_command(f, "f", [])


@pytest.mark.parametrize("error, line", [(KeyboardInterrupt(), "f: stopped\n"), (KeyboardInterrupt("go on with --resume"), "f: go on with --resume\n")])
def test_interrupt_exits_130(error, line, capsys):
    def f(): raise error
    with pytest.raises(SystemExit) as e: run_command(f, "f", [])
    assert e.value.code == 130 and capsys.readouterr().err == "\n" + line


def test_warnings_are_one_line_and_handler_is_given_back(capsys):
    def f(): warnings.warn("skipped\n 1 picture", stacklevel=1)
    before = warnings.showwarning
    run_command(f, "f", [])
    assert capsys.readouterr().err == "f: warning: skipped 1 picture\n" and warnings.showwarning is before


# --- training

@pytest.mark.parametrize("height, width, mults", [
    (8, 8, [1, 1]), (28, 28, [1, 1, 2]), (32, 32, [1, 1, 2, 2]), (7, 7, [1]), (1, 1, [1]), (4, 4, [1]), (8, 12, [1, 1]), (12, 64, [1, 1]), (6, 6, [1])])
def test_default_mults(height, width, mults):
    assert default_mults(height, width) == mults


def test_every_size_gets_a_network():
    "Sizes that do not divide get fewer levels, never an error; attention never sees more than 256 positions."
    for h in (1, 2, 3, 5, 7, 8, 12, 20, 28, 31, 36, 48):
        for w in (h, h + 1, 2 * h):
            mults, attention = default_mults(h, w), _attention(h, w)
            net = UNet(1, 32, mults, attention=attention)
            with torch.no_grad(): assert net(torch.zeros(1, 1, h, w), torch.zeros(1)).shape == (1, 1, h, w)
            assert all(h * w // 4**level <= 256 for level in attention)
    assert _attention(256, 256) == [4, 5, 6] and _attention(8, 8) == [1]


def folder_of_pictures(path, classes=("cats", "dogs"), n=3, size=12):
    rng = np.random.default_rng(0)
    for c in classes:
        (path / c).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path / c / f"{i}.png")
    return path


def test_train_folder_then_sample_by_name(capsys):
    folder_of_pictures(Path("my pets"))
    (Path("my pets") / "cats" / "broken.png").write_bytes(b"oops")
    assert call(TRAIN, "--data 'my pets' --size 8 --images 8 --batch 4 --channels 32 --quiet") == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"{TRAIN}: warning: skipped 1 of 7") and said.err.count("\n") == 1
    assert f"next: {SAMPLE} 'runs/my pets'" in said.out
    assert load("runs/my pets").config["classes"] == ["cats", "dogs"]
    assert call(SAMPLE, "'runs/my pets' --labels dogs,0 --n 4 --steps 2 --scale 1 --out a/b/c.png --quiet") == 0    # folders are made
    assert pixels("a/b/c.png").shape == (17, 17, 3)
    assert call(SAMPLE, "'runs/my pets' --labels birds") == 1
    assert "cats, dogs, got 'birds'" in capsys.readouterr().err


def test_seed_decides_and_the_caller_keeps_his_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weights = []
    for i, seed in enumerate((0, 0, 1)):
        train_images(out=f"run{i}", images=64, batch=64, channels=32, seed=seed, quiet=True)
        weights.append(torch.cat([p.flatten() for p in load(f"run{i}").parameters()]))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_unconditional(capsys):
    assert call(TRAIN, f"{TINY} --unconditional --out plain") == 0
    assert load("plain").net.num_labels == 0
    assert call(SAMPLE, "plain --steps 1 --quiet --scale 1") == 0
    assert tiles("samples.png", 8).shape[:2] == (8, 8)    # 64 by default
    assert call(SAMPLE, "plain --labels 3") == 1
    assert "labels must be left out for a model without classes, got '3'" in capsys.readouterr().err


def asked_of_train(monkeypatch):
    "Instead of training: a dictionary of what `train` was last asked for."
    got = {}
    def spy(denoiser, data, out, **settings):
        got.clear()
        got.update(settings, net=denoiser.net.config, sigma_data=denoiser.sigma_data, size=data.shape[1:])
        Path(out, "samples").mkdir(parents=True, exist_ok=True)
        Path(out, "samples", "000000008.png").touch()
    monkeypatch.setattr(cli, "train", spy)
    return got


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda"])
def test_a_folder_gets_its_settings_by_recipe(device, monkeypatch, capsys):
    "What recipe measures, cut down to a first look without CUDA; what is asked for goes before; and all of it is said."
    from ddpm_edm.data import image_folder, recipe
    monkeypatch.setattr(cli, "_usable", lambda asked: device)
    got, gpu = asked_of_train(monkeypatch), device == "cuda"
    folder_of_pictures(Path("photos"), n=60, size=40)
    d = image_folder("photos", 32 if gpu else 16)
    r = recipe(d)
    assert call(TRAIN, "--data photos") == 0
    said = capsys.readouterr().out
    assert got["size"] == d.shape[1:] and got["sigma_data"] == r.sigma_data and got["noise"] == r.train["noise"]
    images, batch = (r.train["images"], r.train["batch"]) if gpu else (r.train["images"] // 16, 32)
    assert (got["images"], got["batch"], got["ema_halflife"]) == (images, batch, images / 30)
    assert got["net"] == UNet(**r.net | dict(channels=64 if gpu else 32)).config and got["net"]["num_labels"] == 2
    assert [got[f"{k}_every"] for k in ("log", "save", "sample")] == [images // 120, images // 12, images // 6]
    for name in ("sigma_data", "sigma_min", "sigma_max", "noise"): assert f"{name} " in said and r.reasons[name] in said
    assert ("else 960,000" in said) != gpu and f"{images:,}" in said and "samples/000000008.png" in said
    assert (got["optimizer"], got["lr"]) == (("adamw", 0.001) if gpu else ("muon", 0.004)) and ("muon" in said) != gpu and f" {got['lr']:g} " in said.replace("\n", " \n")
    assert dict(sigma_min=got["sigma_min"], sigma_max=got["sigma_max"]) == r.sigmas and said.splitlines()[-1] == f"next: {SAMPLE} runs/photos"
    assert said.count("\n") < 20
    words = "--images 1200 --batch 5 --channels 96 --blocks 2 --dropout 0.3 --p-mean -2 --size 12 --unconditional"
    assert call(TRAIN, f"--data photos {words}") == 0
    assert (got["images"], got["batch"], got["ema_halflife"], got["size"]) == (1200, 5, 40, (12, 12)) and got["log_every"] == 10
    assert [got["net"][k] for k in ("channels", "blocks", "dropout", "num_labels")] == [96, 2, 0.3, 0] and (got["noise"].P_mean, got["noise"].P_std) == (-2, 1.2)
    assert capsys.readouterr().out.count("as asked") == 6    # images, batch, channels, blocks, dropout, noise
    assert call(TRAIN, "--data photos --optimizer adamw") == 0 and (got["optimizer"], got["lr"]) == ("adamw", 0.001)
    assert call(TRAIN, "--data photos --optimizer muon --lr 3e-4") == 0 and (got["optimizer"], got["lr"]) == ("muon", 3e-4)
    assert call(TRAIN, "--data photos --ema-halflife 77 --p-std 0.5") == 0
    assert got["ema_halflife"] == 77 and got["noise"].P_std == 0.5 and got["noise"].P_mean == r.train["noise"].P_mean


def test_200_pictures_to_a_grid_by_one_command(capsys):
    "And the command that it names next draws more."
    folder_of_pictures(Path("photos"), classes=("",), n=200)
    assert call(TRAIN, "--data photos/ --out runs/mine --size 8 --images 64 --batch 32 --quiet") == 0
    said = capsys.readouterr().out
    grid = Path("runs/mine") / said.split("loss.png, ")[1].splitlines()[0]
    assert pixels(grid).shape == ((8 * 9 - 1) * 4,) * 2 + (3,)    # 8 x 8 samples
    command = said.splitlines()[-1].removeprefix(f"next: {SAMPLE} ")
    assert call(SAMPLE, f"{command} --n 4 --steps 2 --scale 1 --quiet") == 0
    assert pixels("samples.png").shape == (17, 17, 3)


def test_sampling_begins_and_ends_where_the_run_says(capsys):
    "By sample and by eval, unless other levels are asked for; a file that says nothing gets EDM's."
    folder_of_pictures(Path("photos"), n=20)
    assert call(TRAIN, "--data photos --out run --size 8 --images 640 --batch 32 --channels 32 --quiet") == 0
    ends = load("run").config["sigmas"]
    assert ends["sigma_max"] < 80 and ends["sigma_min"] != 0.002
    def drawn(run, more=""):
        assert call(SAMPLE, f"{run} --n 4 --labels 0 --steps 4 --scale 1 --quiet {more}") == 0
        return pixels("samples.png")
    own = drawn("run")
    def expected(**ends): return np.asarray(image_grid(generate(load("run"), range(4), [3, 8, 8], karras_sigmas(4, **ends), labels=torch.zeros(4, dtype=torch.long)), scale=1))
    assert (own == expected(**ends)).all() and (drawn("run", "--sigma-max 80") == expected(**ends | dict(sigma_max=80.))).all()
    assert (drawn("run", "--sigma-min 0.3") == expected(**ends | dict(sigma_min=0.3))).all()
    assert (expected(**ends | dict(sigma_max=80.)) != own).any() and (expected(**ends | dict(sigma_min=0.3)) != own).any()
    plain = load("run")
    save_denoiser(plain, "plain.safetensors", dict(shape=[3, 8, 8]))
    assert (drawn("plain.safetensors") == expected()).all()
    assert call(EVAL, "run --data photos --n 10 --steps 4 --features pixels --seed 5 --quiet") == 0
    d = load_data("photos", 8)
    labels = d.labels[torch.randperm(len(d), generator=torch.Generator().manual_seed(5))][:10]
    def clipped(**ends): return (generate(plain, range(5, 15), d.shape, karras_sigmas(4, **ends), labels=labels).abs() > 1 + 1 / 255).double().mean().item()
    found = json.loads(Path("run/eval.json").read_text())["clipped"]
    assert found == pytest.approx(clipped(**ends), abs=1e-3) and abs(found - clipped()) > 1e-2    # rounding moves a pixel or two of 1920


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_known_sets_get_their_settings_by_recipe_too(name, monkeypatch, capsys):
    "All but the digits, which the defaults were made for."
    from ddpm_edm.data import ImageData, recipe
    monkeypatch.setattr(cli, "_usable", lambda asked: "cuda")
    got = asked_of_train(monkeypatch)
    shape = (3, 32, 32) if name == "cifar10" else (1, 28, 28)
    images = torch.randint(256, (40, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    d = ImageData(images, torch.arange(40) % 10, name=name)
    monkeypatch.setattr(cli, "load_data", lambda *how: d if how[0] == name else digits())
    r = recipe(d)
    assert call(TRAIN, f"--data {name}") == 0
    assert got["net"] == UNet(**r.net).config and got["sigma_data"] == r.sigma_data and got["sigma_max"] == r.sigmas["sigma_max"]
    assert {k: got[k] for k in r.train} == r.train and got["optimizer"] == "adamw" and "measured" in capsys.readouterr().out
    assert call(TRAIN, "") == 0
    assert (got["images"], got["lr"], got["optimizer"]) == (240_000, 0.001, "adamw") and got["noise"].P_mean == -0.6 and not {"sigma_min", "sigma_max"} & set(got) and "measured" not in capsys.readouterr().out


def test_pictures_kept_on_disk_are_the_same(capsys):
    folder_of_pictures(Path("photos"), n=5)
    words = "--data photos --size 8 --images 8 --batch 4 --channels 32 --precision fp32 --quiet --out"
    assert call(TRAIN, f"{words} a --cache kept") == call(TRAIN, f"{words} b --cache kept") == call(TRAIN, f"{words} c") == 0
    assert len(list(Path("kept").glob("*.pixels"))) == 1 and "on disk" in capsys.readouterr().out
    assert Path("a/model.safetensors").read_bytes() == Path("c/model.safetensors").read_bytes()


def test_transformer(capsys):
    "A DiT by name, in its own sizes, for digits and for a folder of odd size, and drawn from like others."
    assert call(TRAIN, "--network dit --images 8 --batch 4 --channels 64 --quiet --out dit") == 0
    net = load("dit").net
    assert type(net).__name__ == "DiT" and (net.config["width"], net.config["depth"], net.config["patch"], net.num_labels) == (64, 4, 2, 10)
    assert call(SAMPLE, "dit --labels 3 --n 2 --steps 2 --quiet") == 0
    folder_of_pictures(Path("photos"), n=5)
    assert call(TRAIN, "--network dit --data photos --size 7 --images 8 --batch 4 --blocks 1 --quiet --out odd") == 0
    net = load("odd").net.config
    assert (net["width"], net["depth"], net["patch"], net["in_channels"]) == (128, 1, 1, 3)


def test_names_of_classes_with_commas():
    names = ["3", "large, blue", "small"]
    assert cli._parse_labels("large, blue", names) == [1] and cli._parse_labels("small,3", names) == [2, 0] and cli._parse_labels("1,0", names) == [1, 0]
    with pytest.raises(ValueError, match="among 3, 'large, blue', small, got 'large'"): cli._parse_labels("large,3", names)


def errors(name, words, capsys):
    "The single line a mistake gets."
    assert call(name, words) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"{name}: error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize("words, message", [
    ("--data cifar", "digits, mnist, fashion_mnist, cifar10 or a folder of pictures, got 'cifar'"),
    ("--data no/where --size 8", "got 'no/where'"),
    ("--data empty --size 8", "no picture in empty"),
    ("--data alike --size 8", "data must hold different images; the 2 of alike are all alike"), ("--cache kept", "cache is for a folder of pictures; digits is kept"),
    ("--network cnn", "network must be unet or dit, got 'cnn'"),
    ("--data pictures --size 0", "size must be"),
    ("--data pictures --size 8 --strict", "cats/broken.png"),
    ("--data digits --size 8", "one size"),
    ("--images 0", "images must be"), ("--images -5", "images must be"),
    ("--batch 0", "batch must be"), ("--batch -1", "batch must be"),
    ("--lr 0", "lr must be positive"), ("--lr nan", "lr must be positive"), ("--lr inf", "lr must be positive"),
    ("--channels 20", "channels"), ("--channels 0", "channels"), ("--channels -32", "channels"), ("--channels 2", "channels"),
    ("--blocks 0", "blocks"), ("--dropout 2", "dropout"), ("--dropout -1", "dropout"),
    ("--ema-halflife 0", "ema_halflife"), ("--optimizer sgd", "optimizer"), ("--stable-targets --augment 0.1", "stable_targets must be False with augment"), ("--label-dropout 1.5", "label_dropout"), ("--p-std -1", "P_std"), ("--p-mean nan", "P_mean"),
    ("--seed -1", "seed must be from 0"), ("--seed 99999999999999999999999", "seed must be from 0"),
    ("--precision fp8", "fp32, bf16, fp16, got 'fp8'"),
    ("--out file.txt", "file.txt exists"), ("--out file.txt/run", "file.txt"), ("--out pictures", "holds no run"),
])
def test_training_mistakes(words, message, capsys):
    folder_of_pictures(Path("pictures"))
    Path("pictures/cats/broken.png").write_bytes(b"oops")
    Path("empty").mkdir()
    Path("alike").mkdir()
    for i in "ab": Image.fromarray(np.full((9, 9), 7, np.uint8)).save(f"alike/{i}.png")
    Path("file.txt").write_text("mine")
    before = sorted(Path(".").rglob("*"))
    assert message in errors(TRAIN, f"{words} --quiet", capsys)
    assert sorted(Path(".").rglob("*")) == before and Path("file.txt").read_text() == "mine"    # nothing made, nothing lost


def test_another_run_in_the_way(run, capsys):
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    assert "already holds this run" in errors(TRAIN, f"{TINY} --out run", capsys)
    for more in ("--images 512", "--images 512 --resume", "--lr 3e-3 --resume", "--unconditional --resume", "--seed 1 --resume"):
        line = errors(TRAIN, f"{TINY} --out run {more}", capsys)
        assert "holds another run" in line or "already holds" in line
    assert "training.lr is 0.001 there and 0.003 here" in errors(TRAIN, f"{TINY} --out run --lr 3e-3 --resume", capsys)
    assert before == {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(capsys):
    Path("locked").mkdir(mode=0o500)
    assert "Permission denied: " in errors(TRAIN, f"{TINY} --out locked/run", capsys)


def test_full_disk(monkeypatch, run, capsys):
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in errors(TRAIN, f"{TINY} --out new", capsys)
    assert "No space left on device" in errors(SAMPLE, "run --n 1 --steps 1 --quiet", capsys)
    assert not Path("samples.png").exists() and not list(Path(".").glob(".samples*"))


# --- drawing

@pytest.mark.parametrize("words, message", [
    ("nowhere", "no model at nowhere"), ("cut.safetensors", "can't be read safely"), ("text.safetensors", "can't be read safely"), ("empty", "no model at empty"),
    ("run --labels 10", "from 0 to 9 or among 0, 1, 2"), ("run --labels=-1", "got '-1'"), ("run --labels 3,", "got ''"), ("run --labels three", "'three'"),
    ("run --n 0", "n must be"), ("run --n -3", "n must be"), ("run --steps 0", "steps must be"), ("run --batch 0", "batch must be"),
    ("run --scale 0", "scale must be"), ("run --rho 0", "rho must be"), ("run --seed -1", "seeds must be"), ("run --seed 4294967296", "seeds must be"),
    ("run --sigma-min 5 --sigma-max 5", "sigma_min < sigma_max"), ("run --sigma-min 0", "sigma_min"), ("run --sigma-max inf", "sigma_max"),
    ("run --solver rk4", "unipc, got 'rk4'"), ("run --guidance nan", "guidance must be a finite number"), ("run --out empty", "out must be a file, got the folder empty"),
    ("run --guidance 2 --interval 3", "interval must be two noise levels such as 0.2,5, got '3'"), ("run --guidance 2 --interval 5,1", "0 <= low < high"),
    ("run --interval 1,2", "interval needs a guidance other than 1"), ("run --device gpu", "'gpu' can't be used"), ("run --device meta", "'meta' can't be used"),
    ("run --out samples.xyz", "got 'samples.xyz'"), ("run --out samples", "got 'samples'"), ("run --out text.safetensors/s.png", "text.safetensors"),
    ("bare.safetensors", "does not say how large"),
])
def test_drawing_mistakes(words, message, run, capsys):
    whole = (run / "model.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:len(whole) // 2])
    Path("text.safetensors").write_text("not a model")
    save_denoiser(EDMPrecond(UNet(1, 32, [1], attention=[])), "bare.safetensors")
    Path("empty").mkdir()
    before = sorted(Path(".").rglob("*"))
    assert message in errors(SAMPLE, f"{words} --quiet", capsys)
    assert sorted(Path(".").rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run, capsys):
    assert "device 'cuda' can't be used" in errors(SAMPLE, "run --device cuda --quiet", capsys)


def test_truncated_anywhere(run, capsys):
    whole = (run / "model.safetensors").read_bytes()
    for share in (0, 1e-5, 0.001, 0.3, 0.9999):
        Path("cut.safetensors").write_bytes(whole[:int(len(whole) * share)])
        assert "cut.safetensors" in errors(SAMPLE, "cut.safetensors --quiet", capsys)


def test_model_file_alone_is_enough(run):
    Path("copied.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    for source in ("copied.safetensors", "run"): assert call(SAMPLE, f"{source} --n 2 --steps 2 --device cpu --quiet --out {Path(source).stem}.png") == 0
    assert Path("copied.png").read_bytes() == Path("run.png").read_bytes()


@pytest.mark.parametrize("words, counts", [
    ("", [8] * 10), ("--n 23", [3, 3, 3] + [2] * 7), ("--labels 4,1 --n 5", [3, 2]), ("--n 3", [1, 1, 1]), ("--labels 4,1,7 --n 2", [1, 1])])
def test_rows_are_one_label_each(run, monkeypatch, words, counts):
    "Row i holds counts[i] pictures, all of the i-th label wanted, with seeds in order, and white after them."
    seen = {}
    def spy(denoise, seeds, shape, sigmas, step, *, labels, x0, batch, device):
        seen.update(seeds=list(seeds), labels=labels.tolist())
        return (torch.arange(len(seeds)) / len(seeds) - 0.5).reshape(-1, 1, 1, 1).expand(-1, *shape)    # picture i is plain grey
    monkeypatch.setattr(cli, "generate", spy)
    assert call(SAMPLE, f"run --seed 7 {words} --scale 1 --quiet") == 0
    wanted = [4, 1, 7] if "4,1,7" in words else [4, 1] if "4,1" in words else list(range(10))
    assert seen["seeds"] == list(range(7, 7 + sum(counts)))
    assert seen["labels"] == [l for l, k in zip(wanted, counts) for _ in range(k)]
    grid = tiles("samples.png", max(counts))
    got = [[int(t[0, 0]) for t in row] for row in grid]
    shades, n = iter(range(sum(counts))), sum(counts)
    for row, k in zip(got, counts):
        assert row[:k] == [round(float((torch.tensor(next(shades)) / n + 0.5) * 127.5)) for _ in range(k)]
        assert row[k:] == [255] * (max(counts) - k)


@pytest.fixture
def pictures():
    "Pictures to give to a command: any greys, the same smaller, a mask, and unusable ones."
    g = np.random.default_rng(0)
    def save(name, a, **kw): Image.fromarray(a.astype(np.uint8), **kw).save(name)
    save("any.png", g.integers(0, 256, (8, 8))), save("small.png", g.integers(60, 196, (4, 4)))
    save("mask.png", np.pad(np.full((3, 4), 255), ((2, 3), (1, 3)))), save("wide.png", np.zeros((8, 9))), save("grey.png", np.full((8, 8), 128))
    Path("torn.png").write_bytes(Path("any.png").read_bytes()[:60])


@pytest.mark.parametrize("how", ["--solver heun", "--solver euler --guidance 2 --labels 3", "--solver dpmpp_3m", "--solver deis --guidance 3 --interval 0.1,5 --labels 1,2",
                                 "--solver unipc --init any.png", "--batch 2"])
def test_inpainting_keeps_the_rest_bit_for_bit(how, run, pictures):
    assert call(SAMPLE, f"run --inpaint any.png --mask mask.png --n 5 --steps 4 --scale 1 --out filled.png --quiet --device cpu {how}") == 0
    made, given, hole = tiles("filled.png", 3), pixels("any.png"), pixels("mask.png") > 0
    made = made.reshape(-1, 8, 8)[:5]    # the grid's last place is empty
    assert (made[:, ~hole] == given[~hole]).all()
    assert (made[0] != made[1])[hole].any()    # the hole is drawn, by each seed in its own way


def test_upscaled_pictures_shrink_to_the_given_one(run, pictures):
    assert call(SAMPLE, "run --upscale small.png --n 4 --steps 6 --scale 1 --out large.png --quiet --device cpu") == 0
    blocks = tiles("large.png", 2).reshape(4, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(4, 4, 4, 4)
    inside = ((blocks > 0) & (blocks < 255)).all(3)    # what was cut off at black or white can't be told
    assert inside.sum() > 5 and abs(blocks.mean(3) - pixels("small.png"))[inside].max() <= 0.5    # rounding to grey levels


def test_init_is_noised_and_denoised(run, pictures, capsys):
    assert call(SAMPLE, "run --init any.png --strength 0.5 --n 2 --steps 8 --scale 1 --out i.png --quiet --device cpu") == 0
    x0 = torch.from_numpy(pixels("any.png"))[None].float() / 127.5 - 1
    x = generate(load("run"), [0, 1], (1, 8, 8), karras_sigmas(8)[-5:], x0=x0, labels=torch.tensor([-1, -1]))
    assert abs(pixels("i.png") - np.asarray(image_grid(x, 2, scale=1)).astype(int)).max() <= 1    # a grey level of rounding
    assert "by 4 heun steps, 7 evaluations" in capsys.readouterr().out
    assert call(SAMPLE, "run --init any.png --strength 0.1 --n 1 --steps 8 --scale 1 --out near.png --quiet --device cpu") == 0
    assert abs(pixels("near.png") - pixels("any.png")).max() <= 4    # one step from sigma 0.002, and an untrained network


@pytest.mark.parametrize("words, message", [
    ("--inpaint any.png", "inpaint and mask go together, got only inpaint"), ("--mask mask.png", "inpaint and mask go together, got only mask"),
    ("--inpaint any.png --mask wide.png", "mask must be a picture of 8 x 8 pixels, height by width, got 8 x 9 in wide.png"),
    ("--inpaint any.png --mask any.png", "mask must be white where to fill and black where to keep and nothing between, got grey in any.png"),
    ("--inpaint wide.png --mask mask.png", "inpaint must be a picture of 8 x 8 pixels"), ("--inpaint torn.png --mask mask.png", "inpaint must be a picture, got torn.png"),
    ("--inpaint nothing.png --mask mask.png", "inpaint must be a picture, got nothing.png"), ("--inpaint . --mask mask.png", "inpaint must be a picture, got ."),
    ("--upscale any.png", "upscale must be a picture that fits 2, 3, ... times into the model's 8 x 8 pixels, got 8 x 8 in any.png"),
    ("--upscale wide.png", "got 8 x 9 in wide.png"), ("--upscale small.png --inpaint any.png --mask mask.png", "two tasks"),
    ("--init wide.png", "init must be a picture of 8 x 8"), ("--init any.png --strength 0", "strength must be above 0 and at most 1, got 0.0"),
    ("--init any.png --strength 1.5", "strength must be"), ("--init any.png --guidance 2", "guidance needs labels to go towards, such as --labels 3"),
])
def test_editing_mistakes(words, message, run, pictures, capsys):
    before = sorted(Path(".").rglob("*"))
    assert message in errors(SAMPLE, f"run {words} --quiet", capsys)
    assert sorted(Path(".").rglob("*")) == before


def test_guidance_is_that_of_the_library(run):
    from ddpm_edm.guidance import Guided
    assert call(SAMPLE, "run --labels 1,2 --n 2 --steps 4 --guidance 2.5 --interval 0.1,9 --scale 1 --out g.png --quiet --device cpu") == 0
    x = generate(Guided(load("run"), 2.5, interval=(0.1, 9.)), [0, 1], (1, 8, 8), karras_sigmas(4), labels=torch.tensor([1, 2]))
    shown, wanted = (np.asarray(image).astype(int) for image in (Image.open("g.png"), image_grid(x, 1, scale=1)))
    assert shown.shape == wanted.shape and abs(shown - wanted).max() <= 1    # a grey level of rounding


@pytest.mark.parametrize("solver", ["heun", "euler", "dpmpp_2m", "unipc"])
def test_same_pictures_from_same_seeds(run, solver):
    "A picture depends on its seed, label and schedule, not on batch or number."
    base = f"run --labels 3 --steps 4 --solver {solver} --scale 1 --quiet"
    for words in ("--n 9 --out a.png", "--n 9 --out b.png", "--n 9 --batch 2 --out c.png", "--n 1 --seed 5 --out d.png", "--n 9 --seed 1 --out e.png"):
        assert call(SAMPLE, f"{base} {words}") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    a, c, d, e = (tiles(f, k) for f, k in (("a.png", 3), ("c.png", 3), ("d.png", 1), ("e.png", 3)))
    assert abs(a - c).max() <= 1 and abs(a[1, 2] - d[0, 0]).max() <= 1    # one grey level: float32 rounds differently in another batch
    assert abs(a.reshape(9, 8, 8)[1:] - e.reshape(9, 8, 8)[:8]).max() <= 1
    assert abs(a[0, 0] - a[0, 1]).max() > 50    # different seeds are different pictures


def test_json_is_all_there_is_on_stdout(run, capsys):
    "One object where scripts read; bars and warnings go elsewhere; a mistake leaves stdout empty."
    assert call(SAMPLE, "run --labels 3,1 --n 3 --steps 2 --seed 7 --out s.png --json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == dict(out="s.png", pictures=3, labels=["3", "3", "1"], seed=7, steps=2, solver="heun", evaluations=3) and "evaluations" in said.err
    assert call(EVAL, "run --n 12 --steps 1 --features pixels --cache refs --out e.json --json --quiet") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads(Path("e.json").read_text()) and json.loads(said.out)["samples"] == 12 and "comes out too high" in said.err
    for name, words in ((SAMPLE, "run --steps 0"), (EVAL, "run --n 3"), (INFO, "nothing")):
        assert call(name, f"{words} --json") == 1
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith(f"{name}: error: ")


def test_json_of_pictures_without_labels(run, pictures, capsys):
    assert call(SAMPLE, "run --init any.png --n 2 --steps 2 --json --quiet") == 0
    assert json.loads(capsys.readouterr().out)["labels"] == [None, None]


def test_bar_counts_evaluations(run, capsys):
    for words, total in (("--n 5 --batch 2 --steps 3", "15/15"), ("--n 4 --batch 4 --steps 3 --solver euler", "3/3")):
        assert call(SAMPLE, f"run --labels 0 {words}") == 0
        err = capsys.readouterr().err
        assert total in err and "evaluations" in err and err.count("\n") == 1    # one bar, one line
    assert call(SAMPLE, "run --n 1 --steps 1 --quiet") == 0
    assert capsys.readouterr().err == ""


def test_training_bar_is_one_line(capsys):
    "Sample pictures during training draw no bar into the training's."
    assert call(TRAIN, "--images 256 --channels 32 --out run") == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "256/256" in err and "evaluations" not in err


def test_other_picture_formats(run):
    for suffix in (".jpg", ".bmp", ".webp", ".PNG"):
        assert call(SAMPLE, f"run --n 1 --steps 1 --quiet --out s{suffix}") == 0
        assert pixels(f"s{suffix}").shape[:2] == (32, 32)


def test_drawing_ignores_the_callers_random_numbers(run):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    sample_images(str(run), n=1, steps=1, quiet=True)
    assert torch.equal(torch.rand(2), expected)


def test_digits_fit_the_default_network():
    assert digits().shape == (1, 8, 8) and default_mults(8, 8) == [1, 1]


# --- measuring

def test_eval_program(trained, tmp_path):
    said = command(EVAL, f"{shlex.quote(str(trained[0]))} --n 40 --steps 3 --features pixels --out e.json --cache refs", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "5/5" in said.stderr    # evaluations of the network
    assert "40 samples against 1797 images of digits; averaged to at most 16 x 16, 17 levels" in said.stdout and "wrote e.json" in said.stdout
    assert "distance (pixels)" in said.stdout and "FID" not in said.stdout and "copies of training images" in said.stdout
    assert sorted(f.name for f in tmp_path.iterdir()) == ["e.json", "refs"]
    assert json.loads((tmp_path / "e.json").read_text())["features"] == "pixels"


def test_eval_is_evaluate_of_generate(run, capsys):
    assert call(EVAL, "run --n 40 --steps 3 --solver euler --seed 5 --batch 7 --features pixels --device cpu --cache refs --out e.json --quiet") == 0
    d, report = digits(), json.loads(Path("e.json").read_text())
    labels = d.labels[torch.randperm(1797, generator=torch.Generator().manual_seed(5))][:40]
    x = generate(load("run"), range(5, 45), (1, 8, 8), karras_sigmas(3), euler, labels=labels)
    expected = evaluate(to_uint8(x.clamp(-1, 1), 17), d, pixel_features)
    assert report["clipped"] == pytest.approx((x.abs() > 1 + 1 / 16).double().mean().item(), abs=1e-3)
    for name, row in expected["figures"].items():
        for k, v in row.items(): assert report["figures"][name][k] == (None if v is None else pytest.approx(v, rel=0.02, abs=1e-6))    # another batch rounds otherwise: a pixel may move by a level
    assert report["copies"] == expected["copies"] and (report["steps"], report["solver"], report["seed"], report["run"]) == (3, "euler", 5, "run")
    reference, = Path("refs").iterdir()
    assert reference.name == f"digits-{d.fingerprint()}-pixels.safetensors"
    before = reference.stat().st_mtime_ns
    assert call(EVAL, "run --n 10 --steps 1 --features pixels --cache refs --out f.json --quiet") == 0 and reference.stat().st_mtime_ns == before
    reference.write_bytes(reference.read_bytes()[:100])
    capsys.readouterr()
    assert "is damaged or holds no statistics" in errors(EVAL, "run --n 10 --features pixels --cache refs --quiet", capsys)


def test_eval_by_its_own_classifier(run, monkeypatch):
    "The judge is trained once and kept."
    real = cli.classifier
    monkeypatch.setattr(cli, "classifier", lambda *a: real(*a, images=128))
    names = []
    for n in (10, 12):
        assert call(EVAL, f"run --n {n} --steps 1 --cache refs --out {n}.json --quiet") == 0
        names.append(json.loads(Path(f"{n}.json").read_text())["features"])
    assert names[0] == names[1] and names[0].startswith("classifier of digits ")
    assert len(list(Path("refs").glob("*.safetensors"))) == 2


def test_eval_of_a_folder(capsys):
    folder_of_pictures(Path("pets"), n=20)
    folder_of_pictures(Path("others"), n=19)
    assert call(TRAIN, "--data pets --size 8 --images 8 --batch 4 --channels 32 --unconditional --quiet") == 0
    capsys.readouterr()
    words = "runs/pets --n 20 --steps 1 --features pixels --quiet"
    assert "trained on data called 'pets'; if it is a folder, say by --data" in errors(EVAL, words, capsys)
    assert "trained on 40 images of pets with fingerprint" in errors(EVAL, f"{words} --data others", capsys)
    assert "trained on 40 images of pets with fingerprint" in errors(EVAL, f"{words} --data pets --size 9", capsys)
    assert call(EVAL, f"{words} --data pets") == 0
    said = capsys.readouterr()
    assert "comes out too high" in said.err and "20 samples against 40 images of pets" in said.out    # 20 samples for 192 pixels
    unread = subprocess.run(["sh", "-c", f"{Path(sys.executable).parent / INFO} runs/pets --json | true"], capture_output=True, text=True)
    assert unread.stderr == ""    # as by | head
    wide = load_data("pets", (4, 8))    # twice as wide as high
    train(EDMPrecond(UNet(3, 32, mults=(1,), attention=())), wide, "runs/wide", images=4, batch=4, precision="fp32", progress=False)
    assert call(EVAL, f"{words.replace('runs/pets', 'runs/wide')} --data pets") == 0
    assert Path("runs/pets/eval.json").is_file() and list(Path("runs/references").glob("pets-*-pixels.safetensors"))


@pytest.mark.parametrize("words, message", [
    ("nowhere", "no model at nowhere"), ("run --n 3", "n must be at least 10, got 3"), ("run --n 0", "n must be at least 10"), ("run --steps 0", "steps must be"),
    ("run --batch 0", "batch must be"), ("run --features fid", "classifier, inception or pixels, got 'fid'"), ("run --solver rk4", "got 'rk4'"),
    ("run --device gpu", "can't be used"), ("run --data cifar", "got 'cifar'"), ("run --data digits --size 8", "one size"), ("run --seed -1 --features pixels --n 10", "seed"),
    ("bare.safetensors", "does not say how large"), ("alone.safetensors", "does not say what it was trained on"), ("run --features inception --weights none.pth", "none.pth|not installed")])
def test_measuring_mistakes(words, message, run, capsys):
    save_denoiser(EDMPrecond(UNet(1, 32, [1], attention=[])), "bare.safetensors")
    save_denoiser(EDMPrecond(UNet(1, 32, [1], attention=[])), "alone.safetensors", dict(shape=[1, 8, 8]))
    before = sorted(Path(".").rglob("*"))
    line = errors(EVAL, f"{words} --out e.json --cache refs --quiet", capsys)
    assert any(m in line for m in message.split("|")) and not Path("e.json").exists()
    if "--seed" not in words: assert sorted(Path(".").rglob("*")) == before    # refused before anything is written


# --- models: distil, import, info

@pytest.fixture(scope="module")
def student(trained, tmp_path_factory):
    "A consistency model made of the trained one."
    folder = tmp_path_factory.mktemp("student")
    assert call(DISTILL, f"{trained[0]} --images 256 --out {folder / 'fast'} --quiet") == 0
    return folder / "fast"


def test_distill_makes_a_run_folder(student, trained, tmp_path):
    teacher, fast = load(trained[0]), load(student)
    assert is_consistency(fast) and not is_consistency(teacher)
    assert fast.config["data"] == teacher.config["data"] and fast.config["net"] == teacher.config["net"]
    assert {"model.safetensors", "config.json", "metrics.jsonl", "loss.png", "samples", "state"} <= {f.name for f in student.iterdir()}
    assert any((a != b).any() for a, b in zip(fast.parameters(), teacher.parameters()))


@pytest.mark.parametrize("steps", [None, 1, 3])
def test_consistency_models_are_sampled_their_way(student, steps, capsys):
    assert call(SAMPLE, f"{student} --labels 1,2 --n 2 --scale 1 --out c.png --quiet --device cpu" + f" --steps {steps}" * bool(steps)) == 0
    x = generate(load(student), [0, 1], (1, 8, 8), few_levels(steps or 2), consistency_step, labels=torch.tensor([1, 2]))
    assert abs(pixels("c.png") - np.asarray(image_grid(x, 1, scale=1)).astype(int)).max() <= 1    # a grey level of rounding
    k = steps or 2
    assert f"by {k} consistency step{'s' * (k > 1)}, {k} evaluation{'s' * (k > 1)} of" in capsys.readouterr().out


def test_consistency_models_are_measured_their_way(student):
    assert call(EVAL, f"{student} --n 20 --features pixels --out e.json --cache cache --quiet --device cpu") == 0
    report = json.loads(Path("e.json").read_text())
    assert (report["steps"], report["solver"]) == (2, "consistency")


@pytest.mark.parametrize("name, words, message", [
    (DISTILL, "fast", "run must hold a diffusion model, but fast holds a consistency model"), (DISTILL, "nothing", "no model at nothing"),
    (DISTILL, "run --method magic", 'method must be "distillation" or "tuning"'), (DISTILL, "run --images 0", "images must be"),
    (SAMPLE, "fast --solver heun", "solver must be left out for a consistency model, got 'heun'"), (SAMPLE, "fast --rho 3", "rho must be left out for a consistency model, got 3"),
    (SAMPLE, "fast --sigma-min 0.5", "sigma_min must be left out for a consistency model, got 0.5"), (SAMPLE, "fast --sigma-max 0.1", "sigma_max must be above 0.8, the last level above zero"),
    (EVAL, "run --out run", "out must be a file, got the folder run"), (TRAIN, "--augment 1.5", "augment must be a probability, from 0 to 1, got 1.5"),
    (SAMPLE, "fast --inpaint any.png --mask mask.png", "need a diffusion model, got a consistency model"),
    (SAMPLE, "fast --guidance 2", "guidance, inpaint and upscale need a diffusion model"),
    (INFO, "nothing", "no model at nothing"), (INFO, "any.png", "any.png"), (IMPORT, "nothing.pkl new", "no file at nothing.pkl"),
    (IMPORT, "any.png new", "any.png can't be read safely"), (IMPORT, "run fast", "out must be new or an empty folder, got fast"),
    (IMPORT, "run any.png", "out must be new or an empty folder, got any.png"), (IMPORT, "run new --schedule x", "schedule must be linear or cosine"),
    (IMPORT, "run new --size 0", "size must be at least 1"), (IMPORT, "run new --size 9", "size must be left out, as the source says 8 x 8, got 9"),
])
def test_mistakes_with_models(name, words, message, student, run, pictures, capsys):
    os.symlink(student, "fast")
    before = sorted(Path(".").rglob("*"))
    assert message in errors(name, words + " --quiet" * (name in (SAMPLE, DISTILL)), capsys)
    assert sorted(Path(".").rglob("*")) == before


def test_info_says_what_the_folder_holds(run, student, capsys):
    assert call(INFO, "run --json") == 0
    about, model = json.loads(capsys.readouterr().out), load("run")
    assert about["weights"] == sum(p.numel() for p in model.parameters()) and about["seen"] == 256 and about["kind"] == "diffusion model"
    assert about["settings"] == model.config["net"] and about["pictures"] == [1, 8, 8] and about["data"] == model.config["data"]
    assert call(INFO, f"{student}") == 0
    said = capsys.readouterr().out
    assert "consistency model" in said and "ConsistencyLoss" in said and "1 x 8 x 8" in said and f"{about['weights']:,}" in said
    assert call(INFO, "run/model.safetensors --json") == 0    # a file alone: no log
    assert set(about) - set(json.loads(capsys.readouterr().out)) == {"seen", "loss"}


def test_imported_checkpoints_are_models_like_others(tmp_path):
    "EDM's pickle, made as its authors' program makes it, to pictures by two commands; and weights alone, told what they don't say."
    import test_zoo
    Path("edm.pkl").write_bytes(test_zoo.edm_pickle(test_zoo.tiny()[1], test_zoo.TINY))
    assert call(IMPORT, "edm.pkl edm") == 0 and call(SAMPLE, "edm --n 2 --steps 3 --scale 1 --out e.png --quiet --device cpu") == 0
    x = generate(test_zoo.load_edm_pickle("edm.pkl"), [0, 1], (1, 4, 4), karras_sigmas(3))
    assert abs(pixels("e.png") - np.asarray(image_grid(x, 2, scale=1)).astype(int)).max() <= 1
    torch.save(test_zoo.recorded("guided_updown")[1], "adm.pt")
    assert call(IMPORT, "adm.pt adm --head-dim 16 --schedule cosine --size 16") == 0
    assert call(INFO, "adm --json") == 0 and call(SAMPLE, "adm --n 1 --labels 2 --steps 2 --out a.png --quiet --device cpu") == 0
    assert load_config("adm")["shape"][1:] == [16, 16]


def load_config(folder): return json.loads((Path(folder) / "config.json").read_text())
