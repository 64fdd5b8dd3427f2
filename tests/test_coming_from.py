"The page for people from other libraries: its blocks run against the packages, and theirs equals ours."
import importlib.util
import json
import re

import pytest
import torch
from conftest import ROOT

PAGE = ROOT / "nbs/tutorials/coming_from.ipynb"


def blocks():
    "The page's code in order: (package or None, source); a heading is ('##', '')."
    for cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            if not source.startswith(("#| hide", "#| fig-alt")): yield None, source
            continue
        if source.startswith("## "): yield "##", ""
        for block in source.split("```py\n")[1:]:
            block = block.split("```")[0]
            if found := re.search(r"from (k_diffusion|diffusers|ddpm_edm)\.?\w* import", block): yield found[1], block


def run_page(package):
    "The page's cells and the blocks of one package: pairs (theirs, ours), one for each section that has both."
    space, pairs = {}, []
    for name, source in blocks():
        if name == "##":
            if "theirs" in space: pairs.append((space.pop("theirs"), space.pop("ours")))
        elif name in (None, package) or (name, package) == ("ddpm_edm", "diffusers"): exec(source, space)
    return pairs


@pytest.mark.parametrize("package, count, tolerance", [
    ("k_diffusion", 1, 2e-6),    # of the largest value; its levels are float32, with a relative rounding of 6e-8
    ("diffusers", 2, 2e-4),      # its coefficients too, and logarithms of them
])
def test_theirs_is_ours(package, count, tolerance):
    if importlib.util.find_spec(package) is None: pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    pairs = run_page(package)
    assert len(pairs) == count
    for theirs, ours in pairs: assert (theirs.double() - ours.double()).abs().max() < tolerance * ours.abs().max()
