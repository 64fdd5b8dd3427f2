"The ablation: each row changes what the page says and nothing else, page and command are one, and the command runs."
import ast
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from ddpm_edm.noise import LogNormal
from ddpm_edm.precond import EDMLoss, VELoss, VPLoss

PAGE, COMMAND = ROOT / "nbs/09b_ablation.ipynb", ROOT / "benchmarks/ablation.py"
CELLS = [c for c in json.loads(PAGE.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code" and "%pip" not in "".join(c["source"])]
SLOW = [c for c in CELLS if c["source"][0].startswith("#| slow")]
SHARED = ("device", "data", "sd", "by_noise", "by_output", "WRAPPERS", "DEEP", "WIDE", "OURS", "SONG", "GENTLE", "Row", "ROWS", "shuffled", "fresh", "trained", "LEVELS", "errors", "drawn")
torch.set_num_threads(1)


def tree(cell): return ast.parse("".join(cell["source"]))
def names(node) -> set[str]:
    "What a statement defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)): return {(a.asname or a.name).split(".")[0] for a in node.names}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


PAGE_BODY = [node for cell in CELLS for node in tree(cell).body]


@pytest.fixture(scope="module")
def page() -> dict:
    "The page's imports and definitions, without its runs and figures."
    wanted = {*SHARED, "seen", "unseen", "real", "judge", "frechet", "nearest", "quality", "spliced", "effective", "astray"}
    body = [n for n in PAGE_BODY if isinstance(n, (ast.Import, ast.ImportFrom))]
    first = {}
    for node in PAGE_BODY:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
            for name in names(node) & wanted: first.setdefault(name, node)    # loops reuse short names later on
    body += sorted(set(first.values()), key=PAGE_BODY.index)
    space = {}
    exec(compile(ast.Module(body, []), str(PAGE), "exec"), space)
    assert space.keys() >= wanted
    return space


@pytest.fixture(scope="module")
def command():
    sys.path.insert(0, str(COMMAND.parent))    # as for a script: digits.py lies beside
    try:
        spec = importlib.util.spec_from_file_location("ablation_command", COMMAND)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally: sys.path.remove(str(COMMAND.parent))
    return module


# --- page and command

@pytest.mark.parametrize("name", SHARED)
def test_page_and_command_are_one(name):
    here, there = ([ast.unparse(node) for node in body if name in names(node) and not isinstance(node, (ast.Import, ast.ImportFrom))][:1]
                   for body in (PAGE_BODY, ast.parse(COMMAND.read_text(encoding="utf-8")).body))
    assert here and here == there


def test_live_cells_do_not_need_slow_ones():
    only_slow = set().union(*(names(node) for cell in SLOW for node in tree(cell).body))
    only_slow -= set().union(*(names(node) for cell in CELLS if cell not in SLOW for node in tree(cell).body))
    assert {"models", "results", "pictures"} <= only_slow
    for cell in CELLS:
        used = {n.id for n in ast.walk(tree(cell)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        own = {n.arg for n in ast.walk(tree(cell)) if isinstance(n, ast.arg)} | {n.id for n in ast.walk(tree(cell)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if cell not in SLOW: assert not (used - own) & only_slow


def test_slow_results_are_kept_and_say_where_they_are_from():
    printed = "".join(t for c in SLOW for o in c["outputs"] if o["output_type"] == "stream" for t in o["text"])
    figures = [o for c in SLOW for o in c["outputs"] if "image/png" in o.get("data", {})]
    assert "images on " in printed and "cores" in printed and len(figures) >= 3
    for row in ("A, VP", "A, VE", "B, VP", "B, VE", "C, VP", "C, VE", "D, VP", "D, VE", "D + weight, VP", "D + weight, VE", "D + density",
                "E, density moved", "F", "F, not told"): assert f"{row:>17} " in printed


def test_same_measures(page, command):
    x = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + page["data"].batch(slice(0, 40))[0]
    mine, theirs = page["quality"](x), command.quality(x, np.repeat(np.arange(10), 4))
    assert mine == pytest.approx({"accuracy": theirs["label_accuracy"], "frechet": theirs["frechet"], "nearest": theirs["nearest_over_real"]}, rel=1e-6)


# --- the rows

def differing(page, a, b):
    "Which of wrapper, density, weight, network, training, augmentation and being told differ."
    sigma, a, b = torch.logspace(-2, 2, 9), page["ROWS"][a], page["ROWS"][b]
    return [a.wrapper != b.wrapper, a.noise != b.noise, not torch.allclose(a.weight(sigma), b.weight(sigma)), *(x != y for x, y in zip(a[3:], b[3:]))]


@pytest.mark.parametrize("a, b, change", [
    ("B, VP", "C, VP", [3]), ("B, VE", "C, VE", [3]), ("A, VP", "A, VE", [0, 1, 4]), ("B, VP", "B, VE", [0, 1]),
    ("A, VP", "B, VP", [3, 4]), ("A, VE", "B, VE", [3, 4]),                        # dropout is a setting of the network
    ("C, VP", "D, VP", [0]), ("C, VE", "D, VE", [0]), ("D, VP", "D, VE", [1]),
    ("D, VP", "D + weight, VP", [2]), ("D, VE", "D + weight, VE", [2]),
    ("D, VP", "D + density", [1]), ("D, VE", "D + density", [1]),
    ("D + weight, VP", "E", [1]), ("D + weight, VE", "E", [1]), ("D + density", "E", [2]),
    ("E", "E, density moved", [1]), ("E", "F, not told", [5, 6]), ("F, not told", "F", [6]),
])
def test_one_change_at_a_time(page, a, b, change): assert [i for i, differs in enumerate(differing(page, a, b)) if differs] == change


def test_what_a_and_b_change(page):
    rows = page["ROWS"]
    for column, halflife in (("VP", 0.1), ("VE", 0.01)):
        a, b, c = (rows[f"{letter}, {column}"] for letter in "ABC")
        assert a.network == b.network | dict(dropout=0.1) and c.network == page["WIDE"] and b.training == c.training == page["OURS"]
        assert a.training == page["SONG"] | dict(halflife=halflife)
        # theirs over EDM's: 128 of 512 images, 2e-4 of 1e-3, half-lives as shares of 1.3 million steps and of 200 million images
        assert a.training["batch"] / b.training["batch"] == 128 / 512 and a.training["lr"] / b.training["lr"] == pytest.approx(2e-4 / 1e-3)
        theirs = math.log(0.5) / math.log(0.9999 if column == "VP" else 0.999) / 1.3e6
        assert a.training["halflife"] / b.training["halflife"] == pytest.approx(theirs / (0.5 / 200), rel=0.1)
        assert a.training["warmup"] == pytest.approx(5000 / 1.3e6, rel=0.05) and b.training["warmup"] == 10 / 200
    assert rows["A, VP"].training["clip"] == 1 and rows["B, VP"].training["clip"] == math.inf


def test_digits_are_changed_gently(page):
    "A digit stays what it was: the judge reads nearly all changed digits, and most are not changed at all."
    pipe, (x0, labels) = page["GENTLE"], page["data"].batch(slice(None))
    x, told = pipe(x0, pipe.draw(len(x0), torch.Generator().manual_seed(0)))
    changed = (told != 0).any(1)
    assert changed.double().mean().item() == pytest.approx(1 - 0.88**4, abs=5 * 0.5 / len(x0)**0.5)     # five standard errors
    assert torch.equal(x[~changed], x0[~changed])
    read = page["judge"].predict((x.flatten(1).double().numpy() + 1) * 8)
    assert (read == labels.numpy()).mean() > 0.95


def test_ends_are_the_papers_losses(page):
    sigma = torch.logspace(-2, 2, 9)
    for row, loss in (("C, VP", VPLoss()), ("C, VE", VELoss()), ("E", EDMLoss(sigma_data=page["sd"]))):
        wrapper, noise, weight = page["ROWS"][row][:3]
        assert noise == loss.noise and torch.allclose(weight(sigma), loss.weight(sigma))
    assert page["ROWS"]["E"].noise == LogNormal(-1.2, 1.2) and page["ROWS"]["E, density moved"].noise == LogNormal(-0.6, 1.2)
    assert [page["ROWS"][row].wrapper for row in ("C, VP", "C, VE", "E")] == ["VP", "VE", "EDM"]
    c_out = page["fresh"]("E").coefs(sigma)[1]
    assert torch.allclose(page["ROWS"]["E"].weight(sigma) * c_out**2, torch.ones(9))     # each output error counts once


def test_each_network_hears_its_number_at_the_same_resolution(page):
    "A doubling of sigma is 4 ln 2 of the sinusoids' argument for VE and EDM alike; VP's time is heard as it is."
    argument = lambda row, s: page["fresh"](row).coefs(torch.tensor(s))[3].item() * page["fresh"](row).net.noise_scale
    for row in ("C, VE", "E"): assert argument(row, 2.) - argument(row, 1.) == pytest.approx(4 * math.log(2), abs=1e-5)
    assert page["fresh"]("C, VP").net.noise_scale == 1


def test_worth_of_a_batch(page):
    for row in ("C, VP", "C, VE", "D + weight, VP", "D + weight, VE", "E"): assert page["effective"](row) == pytest.approx(64, abs=1e-6)
    for row in ("D, VP", "D, VE", "D + density"): assert page["effective"](row) < 63


# --- training

def test_rows_see_the_same(page, monkeypatch):
    "First weights, images, labels and unit noise depend on the seed alone; only the noise levels are the row's own."
    seen, loss = {}, page["DenoisingLoss"]
    def record(noise, weight):
        made = loss(noise, weight)
        def call(model, x0, *, sigma, n, labels):
            seen[key].append([x0, n, labels, sigma])
            return made(model, x0, sigma=sigma, n=n, labels=labels)
        return call
    monkeypatch.setitem(page, "DenoisingLoss", record)
    for key in [("C, VE", 0), ("E", 0), ("E", 1)]:
        seen[key] = []
        page["trained"](*key, images=128)
    batches = {k: [torch.cat(parts) for parts in zip(*v)] for k, v in seen.items()}
    one, two, other = batches["C, VE", 0], batches["E", 0], batches["E", 1]
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3])) and not torch.equal(one[3], two[3])
    assert not any(torch.equal(a, b) for a, b in zip(two, other))
    assert len(one[0]) == 128 and abs(one[1].std().item() - 1) < 5 / (2 * 128 * 64)**0.5     # five standard errors
    for a, b in (("C, VP", "E"), ("E", "F, not told"), ("A, VP", "B, VE")):
        for p, q in zip(page["fresh"](a, 3).parameters(), page["fresh"](b, 3).parameters(), strict=True): assert torch.equal(p, q)
    told, plain = page["fresh"]("F", 3).state_dict(), page["fresh"]("E", 3).state_dict()
    assert told.keys() - plain.keys() == {"net.embed_augment.weight"} and all(torch.equal(v, told[k]) for k, v in plain.items())


def test_training_follows_the_row(page, monkeypatch):
    "Batch, rates, clipping and augmentation reach the training; changes given by the caller win."
    calls, rates, loss, clip = [], [], page["DenoisingLoss"], torch.nn.utils.clip_grad_norm_
    def record(noise, weight):
        made = loss(noise, weight)
        def call(model, x0, **cond):
            calls.append((x0, cond))
            return made(model, x0, **cond)
        return call
    def clipped(parameters, limit):
        rates.append(limit)
        return clip(parameters, limit)
    monkeypatch.setitem(page, "DenoisingLoss", record)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    page["trained"]("A, VP", images=48)
    assert [len(x0) for x0, _ in calls] == [16] * 3 and rates == [1.] * 3
    calls.clear()
    for row in ("E", "F", "F, not told"): page["trained"](row, images=64)
    (plain, a), (changed, b), (again, c) = calls
    assert torch.equal(changed, again) and not torch.equal(plain, changed)
    assert a.keys() == c.keys() == {"sigma", "n", "labels"} and b.keys() == a.keys() | {"augment"}
    assert b["augment"].shape == (64, page["GENTLE"].dim) and torch.equal(a["n"], b["n"]) and torch.equal(a["sigma"], b["sigma"])
    kept = (b["augment"] == 0).all(1)
    assert torch.equal(plain[kept], changed[kept]) and 0.2 < kept.double().mean() < 0.9
    calls.clear()
    page["trained"]("E", images=64, batch=32)
    assert [len(x0) for x0, _ in calls] == [32] * 2


def test_unseen_digits_are_not_trained_on(page):
    a, b = page["seen"].tolist(), page["unseen"].tolist()
    assert len(a) == 1500 and len(b) == 297 and sorted(a + b) == list(range(1797))


def test_training_is_repeatable_and_learns(page):
    once, twice = (page["trained"]("E", 0, images=640) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters()))
    before, after = page["errors"](page["fresh"]("E")), page["errors"](once)
    assert all(a < b for a, b in zip(after[4:], before[4:]))     # ten steps: at middle and high levels
    assert not any(p.requires_grad for p in once.parameters())


def test_old_wrapper_hides_its_error_at_high_noise(page):
    "After the same few steps, at sigma = 80: the network's own error is less, the denoiser's far more."
    error = {row: (page["errors"](page["trained"](row, 0, images=1280))[-1] / page["by_output"](80.))**0.5 for row in ("C, VP", "E")}
    assert error["C, VP"] / 80 < error["E"] / page["sd"] and error["C, VP"] > 5 * error["E"]     # c_out is 80, and sd to 1e-4


# --- measures

def test_errors_are_those_of_the_denoiser(page):
    x0, labels = page["data"].batch(page["unseen"])
    knows = lambda x, sigma, labels: x0
    assert page["errors"](knows) == [0.] * 13
    shifted = page["errors"](lambda x, sigma, labels: x0 + 0.5)
    assert shifted == pytest.approx([0.25 * page["by_output"](s) for s in page["LEVELS"]], rel=1e-5)
    found = page["errors"](lambda x, sigma, labels: x)           # the noise is all there: sigma^2, n one for all
    assert [v / (page["by_output"](s) * s**2) for v, s in zip(found, page["LEVELS"])] == pytest.approx([found[0] / (page["by_output"](0.02) * 0.02**2)] * 13, rel=1e-3)


def test_splice(page):
    heard = []
    def say(name): return lambda x, sigma, labels: heard.append((name, sigma)) or 0 * x
    page["drawn"](page["spliced"](say("high"), say("low"), at=2.), count=10, steps=5)
    assert len(heard) == 9 and {name for name, sigma in heard if sigma > 2} == {"high"} and {name for name, sigma in heard if sigma <= 2} == {"low"}
    assert [sigma for _, sigma in heard][0] == 80. and min(sigma for _, sigma in heard) == pytest.approx(0.02)


def test_astray(page):
    x = torch.zeros(4, 1, 8, 8)
    x[1, 0, 3, 3], x[2, 0, 0, 0] = -2.5, 1.9
    assert page["astray"](x) == 0.25


# --- misuse and the command itself

def test_bad_input(page, command):
    with pytest.raises(ValueError, match="row must be one of 'A, VP', .*, got 'G'"): page["trained"]("G")
    with pytest.raises(ValueError, match="images must be at least one batch, 64, got 63"): page["trained"]("E", images=63)
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"): command.ablation(seeds=0)
    for bad in (10, 25, -20):
        with pytest.raises(ValueError, match=f"samples must be a multiple of 10 and at least 20, got {bad}"): command.ablation(samples=bad)


def test_mean_and_error(command):
    assert command.over_seeds([1., 2., 3.]) == pytest.approx((2, 1 / 3**0.5))
    assert command.over_seeds([4.]) == (4., None)
    runs = [dict(accuracy=a, frechet=1., nearest=1., errors=[0.5] * 13) for a in (0.25, 0.75)]
    assert "accuracy 0.5 ± 0.25" in command.line("E", runs) and "0.500 at 80" in command.line("E", runs)
    assert "±" not in command.line("E", runs[:1])


def test_command():
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    def start(words): return subprocess.run([sys.executable, COMMAND, *shlex.split(words)], capture_output=True, text=True, timeout=300, env=env)
    done = start("--images 64 --seeds 1 --samples 20 --as-json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images"] == 64 and result["seeds"] == 1 and len(result["levels"]) == 13 and result["device"]
    assert list(result["rows"])[0] == "A, VP" and len(result["rows"]) == 15
    for (run,) in result["rows"].values():
        assert 0 <= run["accuracy"] <= 1 and run["frechet"] > 0 and run["nearest"] > 0
        assert len(run["errors"]) == 13 and all(0 < v < math.inf for v in run["errors"])
    done = start("--samples 15")
    assert done.returncode == 1 and done.stderr == "ablation.py: error: samples must be a multiple of 10 and at least 20, got 15\n"
