"What people install: complete, small, light to import, free to upgrade."
import email
import re
import shutil
import sys
import zipfile
from configparser import ConfigParser

import pytest
import torch
import yaml
from conftest import ROOT, copy_source, run
from sklearn.datasets import load_sample_images

INI = ConfigParser(delimiters=["="], interpolation=None)
INI.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = INI["DEFAULT"]


def lines(key): return [line for line in SETTINGS[key].splitlines() if line]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from the sdist, which is built from the files that make it; all in a copy and without the network."
    source = copy_source(tmp_path_factory.mktemp("build"), "pyproject.toml", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "ddpm_edm", "nbs")
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    path, = (source / "dist").glob("*.whl")
    assert len(list((source / "dist").glob("*.tar.gz"))) == 1
    assert path.stat().st_size < 1e6
    return zipfile.ZipFile(path)


def test_files(wheel):
    modules = {f"ddpm_edm/{p.name}" for p in (ROOT / "ddpm_edm").glob("*.py")}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == modules | {"ddpm_edm/py.typed"}   # no notebooks, tests or tools
    assert any(name.endswith("LICENSE") for name in wheel.namelist())


def test_metadata(wheel):
    info = {name.split("/")[-1]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    meta = email.message_from_string(info["METADATA"])
    squeeze = lambda s: re.sub(r"[\s\"'()]", "", s).lower()
    required = [squeeze(r) for r in meta.get_all("Requires-Dist")]
    assert [r for r in required if ";" not in r] == [squeeze(r) for r in lines("requirements")]
    for extra in ("dev", "bench"):
        assert [r.split(";")[0] for r in required if r.endswith(f";extra=={extra}")] == [squeeze(r) for r in lines(f"{extra}_requirements")]
    assert meta["Requires-Python"] == f">={SETTINGS['min_python']}"
    assert meta["Author"] == SETTINGS["author"]
    assert meta["Keywords"].replace(",", " ").split() == SETTINGS["keywords"].split()
    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Version"] == re.search('"(.+)"', (ROOT / "ddpm_edm/__init__.py").read_text())[1]
    assert meta.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    scripts = ConfigParser(delimiters=["="])
    scripts.read_string(info["entry_points.txt"])
    assert dict(scripts["console_scripts"]) == dict(re.split(r"\s*=\s*", line) for line in lines("console_scripts"))
    assert dict(scripts["nbdev"]) == {"ddpm_edm": "ddpm_edm._modidx:d"}


def test_the_citation_names_this_version():
    "CITATION.cff is read by GitHub, Zenodo and reference managers."
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == re.search('"(.+)"', (ROOT / "ddpm_edm/__init__.py").read_text())[1]
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["authors"] and citation["license"] == "Apache-2.0"


def test_contributing_examples_work(monkeypatch):
    "The solver and the data set that CONTRIBUTING.md adds are right, and short as it says."
    from ddpm_edm import data
    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))
    solver, check, added = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    space = {}
    for block in (solver, check, added): exec(block, space)    # `check` asserts the measured order
    assert len(solver.splitlines()) <= 20
    photographs = data.load_data("photographs")
    assert (len(photographs), photographs.shape, photographs.num_labels) == (520, (3, 32, 32), 2)
    assert torch.equal(photographs.images[21], torch.tensor(load_sample_images().images[0][32:64, 32:64]).permute(2, 0, 1))    # second row, second column


def test_requirements_have_only_lower_bounds():
    "An upper bound here would hold back every project that uses the package."
    for requirement in lines("requirements"): assert re.fullmatch(r"[A-Za-z0-9_.-]+(>=[0-9.]+)?", requirement), requirement


def loaded(code: str, *packages: str) -> str:
    return run(sys.executable, "-c", f"import sys, importlib; {code}; print(*(p for p in {packages} if p in sys.modules))").strip()


def test_import_is_light():
    heavy = "sklearn", "accelerate", "matplotlib", "torchvision", "huggingface_hub", "ipywidgets"
    assert loaded("import ddpm_edm", "torch", "numpy", *heavy) == ""
    names = [f"ddpm_edm.{p.stem}" for p in (ROOT / "ddpm_edm").glob("[!_]*.py")]
    assert loaded(f"[importlib.import_module(m) for m in {names}]", *heavy) == ""


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not on PATH; a job of CI runs it")
def test_types():
    "The annotations agree with the code and with each other: py.typed tells others to rely on them."
    run("pyright", "--pythonpath", sys.executable, "ddpm_edm")
