"What people install: complete, small, light to import, free to upgrade."
import ast
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, copy_source, run
from sklearn.datasets import load_sample_images

INI = ConfigParser(delimiters=["="], interpolation=None)
INI.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = INI["DEFAULT"]


def lines(key): return [line for line in SETTINGS[key].splitlines() if line]


COMMANDS = [line.split()[0] for line in lines("console_scripts")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from the sdist, which is built from the files that make it; all in a copy and without the network."
    source = copy_source(tmp_path_factory.mktemp("build"), "pyproject.toml", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "ddpm_edm", "nbs")
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    path, = (source / "dist").glob("*.whl")
    assert len(list((source / "dist").glob("*.tar.gz"))) == 1
    assert path.stat().st_size < 1e6
    return zipfile.ZipFile(path)


PYTHON = r"""
import importlib.metadata, sys
import ddpm_edm
assert ddpm_edm.__file__.startswith(sys.prefix), ddpm_edm.__file__
assert ddpm_edm.__version__ == importlib.metadata.version("ddpm_edm")
assert "torch" not in sys.modules
print(ddpm_edm.__path__[0], {e.name for e in importlib.metadata.distribution("ddpm_edm").entry_points if e.group == "console_scripts"})
"""


def pythons() -> dict[str, str]:
    "The Pythons of this machine that the package is for, on PATH or of pyenv."
    found = {"%d.%d" % sys.version_info[:2]: sys._base_executable}
    for version in SETTINGS["pythons"].split():
        homes = sorted((Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions").glob(f"{version}.*/bin"))
        for python in filter(None, [shutil.which(f"python{version}"), *(str(home / f"python{version}") for home in homes)]):
            works = subprocess.run([python, "-c", "import ensurepip, venv, sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True)
            if works.returncode == 0 and works.stdout.strip() == version: found.setdefault(version, python)
    return found


@pytest.mark.parametrize("version", pythons())
def test_installs(version, wheel, tmp_path):
    """Into a fresh environment of every Python there is: all modules compile, and it is imported, without one warning.

    Without its requirements, gigabytes of them; `tools/colab.py` installs these too, and so does CI for each Python."""
    run(pythons()[version], "-m", "venv", tmp_path / "env")    # with a pip of its own: ours may be too old for that Python
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", wheel.filename)
    there, commands = run(python, "-W", "error", "-c", PYTHON, cwd=tmp_path, PYTHONPATH=None).split(maxsplit=1)
    run(python, "-W", "error", "-m", "compileall", "-q", "-f", there, cwd=tmp_path)
    assert ast.literal_eval(commands) == set(COMMANDS)
    assert set(COMMANDS) <= {file.stem for file in python.parent.iterdir()}


SCRIPTS = """
import contextlib, io, pathlib, runpy, sys
import ddpm_edm
folder = pathlib.Path(ddpm_edm.__path__[0]).parent
assert folder == pathlib.Path(sys.argv[1]), folder
for script in sorted((folder / "bin").iterdir()):
    sys.argv, said = [str(script), "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(said): runpy.run_path(str(script), run_name="__main__")
    except SystemExit as e: print(script.name, e.code, said.getvalue().split()[:2])
"""


def test_installed_commands(wheel, tmp_path):
    "The scripts that the wheel brings run the code that it brings."
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path / "wheel", wheel.filename)
    said = run(sys.executable, "-c", SCRIPTS, tmp_path / "wheel", cwd=tmp_path, PYTHONPATH=str(tmp_path / "wheel")).splitlines()
    assert said == [f"{name} 0 ['usage:', '{name}']" for name in sorted(COMMANDS)]


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


def test_pythons_are_the_same_everywhere(wheel):
    "In the package's metadata and in CI."
    versions = SETTINGS["pythons"].split()
    assert versions[0] == SETTINGS["min_python"]
    meta = email.message_from_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))))
    assert [c.split(" :: ")[-1] for c in meta.get_all("Classifier") if c.startswith("Programming Language :: Python :: 3.")] == versions
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == versions == [row["python"] for row in jobs["colab"]["strategy"]["matrix"]["include"]]


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


def test_requirements_are_complete():
    "What the package imports, it requires; what it imports for some functions alone is tried and asked for by name."
    asked_for = {"diffusers", "torch_fidelity"}
    named = {"PIL": "pillow", "sklearn": "scikit-learn"}
    required = {re.split("[>=]", line)[0] for line in lines("requirements")}
    for path in (ROOT / "ddpm_edm").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - asked_for:
                assert named.get(top, top) in required, f"{path.name} imports {top}"


def loaded(code: str, *packages: str) -> str:
    return run(sys.executable, "-c", f"import sys, importlib; {code}; print(*(p for p in {packages} if p in sys.modules))").strip()


def test_import_is_light():
    heavy = "sklearn", "accelerate", "matplotlib", "torchvision", "huggingface_hub", "ipywidgets"
    assert loaded("import ddpm_edm", "torch", "numpy", *heavy) == ""
    names = [f"ddpm_edm.{p.stem}" for p in (ROOT / "ddpm_edm").glob("[!_]*.py")]
    assert loaded(f"[importlib.import_module(m) for m in {names}]", *heavy) == ""


def test_import_is_quick():
    """Beyond torch's own import `import ddpm_edm` takes under 0.1 s, and `ddpm-edm-train --help` under 1 s.

    In seconds of the processor, which a busy machine hardly stretches. Measured: 0.3 ms, and 0.2 s for all modules and the help."""
    code = """
import sys, time, torch
a = time.process_time()
import ddpm_edm
b = time.process_time()
from ddpm_edm.cli import train_main
sys.argv = ["ddpm-edm-train", "--help"]
try: train_main()
except SystemExit: print("", b - a, time.process_time() - b, sep="\\n")
"""
    package, command = map(float, run(sys.executable, "-c", code).splitlines()[-2:])
    assert package < 0.1 and command < 1, (package, command)


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not on PATH; a job of CI runs it")
def test_types():
    "The annotations agree with the code and with each other: py.typed tells others to rely on them."
    run("pyright", "--pythonpath", sys.executable, "ddpm_edm")
