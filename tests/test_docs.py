"Every page of the documentation builds without a fault, and the tool that says so does see faults."
import base64
import importlib
import importlib.util
import json
import re
import sys

import pytest
from conftest import ROOT, run

spec = importlib.util.spec_from_file_location("docs", ROOT / "tools/docs.py")
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)


def test_site(): print(run(sys.executable, "tools/docs.py", "check"))


def test_gallery(monkeypatch):
    "What the gallery shows are pictures that the pages have now, with their descriptions, under the right headings."
    cells = json.loads((ROOT / "nbs/gallery.ipynb").read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(ROOT / "nbs")
    space = {}
    for cell in cells:
        if cell["cell_type"] == "code" and "git clone" not in "".join(cell["source"]): exec("".join(cell["source"]).replace("HTML(f'", "made = (f'"), space)
    stored = "".join(cells[-1]["outputs"][0]["data"]["text/html"])
    def plain(page): return re.sub(r'src="[^"]+"', "", page)    # how Pillow packs pictures may change
    assert plain(space["made"]) == plain(stored), "run nbs/gallery.ipynb"
    assert stored.count("<img") == stored.count('alt="') > 30 and 'alt=""' not in stored


def test_reference():
    "The page of all names has each public name once, under its module. (`test_readme` says whether it is up to date, `test_site` follows its links.)"
    cells = json.loads((ROOT / "nbs/reference.ipynb").read_text(encoding="utf-8"))["cells"]
    page = "".join(line for cell in cells for out in cell.get("outputs", []) for line in out["data"]["text/markdown"])
    modules = re.findall(r"^## (\w+)$(.*?)(?=^## |\Z)", page, flags=re.M | re.S)
    assert sorted(name for name, _ in modules) == sorted(p.stem for p in (ROOT / "ddpm_edm").glob("[a-z]*.py"))
    for name, lines in modules:
        listed = re.findall(r"^\| \[(\w+)\]\(\d\d[a-z]?_\w+\.ipynb(?:#[\w-]+)?\) \| \S", lines, flags=re.M)
        assert sorted(listed) == sorted(importlib.import_module(f"ddpm_edm.{name}").__all__), name


PNG = base64.b64encode(b"bytes of a picture").decode()
BADGE = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({docs.COLAB}nbs/00_core.ipynb)"


def md(source): return {"cell_type": "markdown", "metadata": {}, "source": source.splitlines(True)}
def code(source, *outputs): return {"cell_type": "code", "metadata": {}, "source": source.splitlines(True), "outputs": list(outputs)}
def show(mime, data): return {"output_type": "display_data", "data": {mime: data}}
def stream(text, name="stdout"): return {"output_type": "stream", "name": name, "text": [text]}


GOOD = [
    md("---\ntitle: Core\n---") | {"cell_type": "raw"},   # as nbdev's filters leave title and promise
    md(f"You need nothing.\n\n{BADGE}\n\nSee [below](#one-two), [itself](00_core.ipynb#one-two), [the site]({docs.SITE}core.html#one-two), [code]({docs.BLOB}ddpm_edm/core.py#L1)."),
    md("## One two\n\nInline $x_0 + \\sigma n$ and\n\n$$\\nabla_x \\log p(x;\\sigma) = \\frac{D - x}{\\sigma^2} \\tag{Tweedie}$$\n\n- a list\n- of two[^1]\n\n[^1]: A note."),
    code('#| fig-alt: "A square: [1, 2] of $x^2$"\nplt.imshow(x)', show("image/png", PNG), stream("3 of 4\n")),
    code("#| eval: false\nimport torch\nx = 1"),
    md("**References.** Somebody, *something* (2022), eq. 3."),
]
FAULTS = {
    "TeX": ([md(r"$\frac{1}{$")], "pandoc"),
    "unknown TeX": ([md(r"$\nosuchcommand{1}$")], "pandoc"),
    "blank in dollars": ([md("Here $ x $ is")], "mathematics"),
    "TeX in text": ([md(r"as \alpha goes")], "TeX outside dollars"),
    "superscript": ([md("a^2+b^2 is")], "super- or subscript"),
    "div": ([md("::: {.callout-note}\nno end")], "pandoc"),
    "list": ([md("Two things:\n- one\n- two")], "blank line above"),
    "link": ([md("[x](99_none.ipynb)")], "link leads nowhere: none.html"),
    "file": ([md("[x](none.txt)")], "link leads nowhere: none.txt"),
    "anchor": ([md("[x](#three)")], "no such anchor: #three"),
    "anchor of a page": ([md("[x](00_core.ipynb#three)")], "no such anchor: core.html#three"),
    "anchor of the site": ([md(f"[x]({docs.SITE}core.html#three)")], "no such anchor"),
    "source": ([md(f"[x]({docs.BLOB}ddpm_edm/none.py)")], "no such file in the repository"),
    "nested link": ([md(f"[see [x]({docs.SITE}core.html)](00_core.ipynb)")], "Markdown not understood"),
    "cross-reference": ([md("See @fig-none.")], "cross-reference"),
    "alt text": ([code("plot()", show("image/png", PNG))], "picture without alt text (#| fig-alt"),
    "alt text of an animation": ([code("plot()", show("text/html", "<img id='_anim_img1'>"))], "picture without alt text (#| fig-alt"),
    "alt text in Markdown": ([md(f"![](data:image/png;base64,{PNG})")], "1 picture(s) without alt text"),
    "no picture": ([code("#| fig-alt: nothing\nplot()")], "fig-alt without a stored picture"),
    "options": ([code("#| fig-alt: Left: a, right: b\nplot()", show("image/png", PNG))], "options are not YAML"),
    "error": ([code("1/0", {"output_type": "error", "ename": "ZeroDivisionError", "evalue": "division by zero", "traceback": []})], "stored error ZeroDivisionError"),
    "stderr": ([code("warn()", stream("a warning", "stderr"))], "stored stderr"),
    "widget": ([code("interact()", show("application/vnd.jupyter.widget-view+json", {"model_id": "1"}))], "stored widget"),
    "path": ([code("print(p)", stream("saved to /home/me/x"))], "path of one machine"),
    "repr": ([code("f", stream("<f.g object at 0x7f>"))], "repr of an object"),
    "imports": ([code("import torch\nx = slow()")], "imports and other code"),
    "size": ([code("x", stream("x" * docs.MAX_BYTES))], "MB, more than"),
    "source as one string": ([md("a\n\nb") | {"source": "a\n\nb"}], "source is one string"),
}


def faults(tmp_path, cells, name="00_core.ipynb", **others):
    (tmp_path / "nbs").mkdir()
    for file, content in {name: cells, **others}.items():
        (tmp_path / "nbs" / file).write_text(json.dumps({"cells": content, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    (tmp_path / "_quarto.yml").write_text("website: {sidebar: {contents: [{section: Score, contents: [00_core.ipynb]}]}}")
    return docs.build(tmp_path, tmp_path / "site", filters=False)[0]


def test_good_page(tmp_path): assert faults(tmp_path, GOOD) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault, tmp_path):
    cells, message = FAULTS[fault]
    found = faults(tmp_path, GOOD + cells)
    assert any(message in f for f in found), found


@pytest.mark.parametrize("change, message", [
    (lambda cells: [md("# Core\n\n> A promise.\n\nThen more.")] + cells[1:], "nbdev keeps only title and promise"),
    (lambda cells: [md("# Core\n\nNo promise.")] + cells[1:], "not a title and a promise"),
    (lambda cells: cells[1:], "not a title and a promise"),
    (lambda cells: cells[:1] + cells[2:], "no Colab badge"),
    (lambda cells: cells[:1] + [md(BADGE)] + cells[2:], "what a reader needs"),
    (lambda cells: cells[:-1], "no references"),
])
def test_frame_of_page(change, message, tmp_path):
    found = faults(tmp_path, change(GOOD))
    assert any(message in f for f in found), found


def test_map(tmp_path):
    "The home page leads to every page."
    (tmp_path / "one").mkdir()
    home = [md("---\ntitle: Home\n---") | {"cell_type": "raw"}, md(f"You need nothing.\n\n{BADGE.replace('00_core', 'index')}"), md("## Sources\n\n[Core](00_core.ipynb)")]
    assert not any("map of the book" in f for f in faults(tmp_path / "one", GOOD, **{"index.ipynb": home}))
    (tmp_path / "two").mkdir()
    assert "index.ipynb: the map of the book lacks 00_core.ipynb" in faults(tmp_path / "two", GOOD, **{"index.ipynb": home[:2] + [md("## Sources\n\nNone.")]})


def test_sidebar(tmp_path):
    found = faults(tmp_path, GOOD, "01_other.ipynb")
    assert "_quarto.yml: the sidebar lacks 01_other.ipynb" in found
    assert "_quarto.yml: the sidebar names 00_core.ipynb, which is not there" in found
