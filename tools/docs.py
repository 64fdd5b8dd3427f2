"""The README, the list of pages, and checks of every documentation page, without Quarto.

    python tools/docs.py readme [--check]     make README.md from nbs/index.ipynb, nbs/llms.txt from all pages and the tables
                                              of nbs/reference.ipynb from the package, or only compare
    python tools/docs.py check [--out DIR]    build every page and list what is wrong; the pages stay in DIR
"""
import argparse
import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pypandoc
import yaml
from fastcore.nbio import nb2str, read_nb
from nbdev import serve_drv
from nbdev.config import nbpath2html
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parents[1]
SITE = "https://ddpm-edm.github.io/ddpm_edm/"
BLOB = "https://github.com/ddpm-edm/ddpm_edm/blob/main/"
COLAB = "https://colab.research.google.com/github/ddpm-edm/ddpm_edm/blob/main/"
PANDOC = ["--from=markdown-implicit_figures-raw_tex", "--to=html", "--standalone", "--toc", "--mathml", "--wrap=preserve"]
MIMES = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/plain"]   # as Quarto prefers
MAX_BYTES = 3_000_000    # of a page with its pictures
NO_REFERENCES = {"gallery", "reference", "own_images", "solver_lab"}   # pages that speak of nobody's work, or leave that to those they link
LEFTOVERS = {            # what must not stand in running text, and why it probably does
    r"\$": "mathematics not closed, or with a blank just inside its dollars",
    r"\\[A-Za-z]{2,}": "TeX outside dollars",
    r"<su[bp]>": "`^` or `~` in running text made a super- or subscript",
    r":::|\{\{<|\]\(|\*\*|^#\|": "Markdown not understood (nbdev makes symbols in backticks links: put none into a link of your own)",
    r"\n([-*+]|\d+[.)]) \S|\n#+ \S|\n>|\n\|": "list, heading, quote or table without a blank line above",
    r"\bTODO\b|\bFIXME\b|\?\?|@@": "unfinished, or a cross-reference without its label",
}


# ---- cells ----

def text(s: str | list[str]) -> str: return "".join(s)


def options(source: str) -> tuple[dict, str]:
    "Quarto's options of a code cell (`#| key: value` lines, YAML) and the code below them; nbdev's `#| flag` is none."
    head = list(takewhile(lambda line: line.startswith("#|"), source.splitlines()))
    try: opts = yaml.safe_load("\n".join(line[2:].strip() for line in head if ":" in line)) or {}
    except yaml.YAMLError: raise ValueError(f"options are not YAML (quote a value with a colon in it): {head}") from None
    return opts, "\n".join(source.splitlines()[len(head):]).strip()


def shown(output: dict) -> tuple[str, str]:
    "Type and content of an output, as a page shows it."
    data = output.get("data", {"text/plain": output.get("text", "")})
    mime = next((m for m in MIMES if m in data), "")
    return mime, text(data.get(mime, ""))


def is_picture(mime: str, data: str) -> bool:
    return mime.startswith("image/") or (mime == "text/html" and bool(re.search("<(img|svg|video|canvas)", data)))


def to_markdown(cells: list[dict], pictures: Path, html: bool = True) -> str:
    "Cells that nbdev's filters have passed as Markdown; pictures among the outputs go to the folder `pictures`."
    parts = []
    for cell in cells:
        opts, code = options(text(cell["source"])) if cell["cell_type"] == "code" else ({"echo": False}, "")
        if cell["cell_type"] != "code": parts.append(text(cell["source"]))
        if opts.get("echo", True) and code: parts.append(f"```python\n{code}\n```")
        for mime, data in map(shown, cell.get("outputs", [])):
            if mime.startswith("image/"):
                file = pictures / f"{len(list(pictures.glob('*'))):02d}.{mime[6:].split('+')[0]}"
                pictures.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data.encode() if "svg" in mime else base64.b64decode(data))
                alt = re.sub(r"([][*_$`<>|~^\\])", r"\\\1", opts.get("fig-alt", ""))
                parts.append(f"![{alt}]({pictures.name}/{file.name})")
            elif mime == "text/html": parts += [f"```{{=html}}\n{data}\n```"] * html
            elif mime == "text/markdown" or opts.get("output") == "asis": parts.append(data)
            else: parts.append(f"```text\n{data.strip()}\n```")
    return "\n\n".join(parts) + "\n"


# ---- README ----

class ReadmeFilter(FilterDefaults):
    "The documentation's filters, without those that execute cells."
    def base_procs(self): return [p for p in super().base_procs() if "show_doc" not in p.__name__]


def llms_text() -> str:
    "The pages by part, each with its promise and the address of its Markdown (llmstxt.org)."
    parts = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    lines = []
    for part in parts:
        pages = [part] if isinstance(part, str) else part["contents"]
        if part is not pages[0]: lines += ["", f"## {part['section']}", ""]
        for page in pages:
            first = text(json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))["cells"][0]["source"])
            title, promise = re.fullmatch(r"# (.+?)\s+> (.+?)\s*", first, flags=re.S).groups()
            lines += [f"# {title}", "", f"> {promise}", ""] if page == "index.ipynb" else [f"- [{title}]({SITE}{nbpath2html(Path(page)).as_posix()}.md): {promise}"]
    return "\n".join(lines) + "\n"


def reference_page() -> str:
    "nbs/reference.ipynb with what its code says of the package as it is now."
    nb, space = json.loads((ROOT / "nbs/reference.ipynb").read_text(encoding="utf-8")), {}
    sys.path.insert(0, str(ROOT))
    for cell in nb["cells"]:
        if cell["cell_type"] != "code" or "%pip" in text(cell["source"]): continue
        exec(text(cell["source"]), space)
        for output in cell["outputs"]: output["data"]["text/markdown"] = "\n".join(space["lines"]).splitlines(True)
    return json.dumps(nb, indent=1, ensure_ascii=False) + "\n"


def readme(check: bool) -> list[str]:
    "Make README.md, its pictures in index_files/, nbs/llms.txt and the tables of nbs/reference.ipynb; with `check` only tell which are out of date."
    nb = read_nb(ROOT / "nbs/index.ipynb")
    ReadmeFilter()(nb)
    front, *cells = json.loads(nb2str(nb))["cells"]
    front = yaml.safe_load(text(front["source"]).strip("-\n"))
    with tempfile.TemporaryDirectory() as tmp:
        md = f"# {front['title']}\n\n> {front['description']}\n\n" + to_markdown(cells, Path(tmp, "index_files"), html=False)
        url = lambda m: f"]({SITE}{nbpath2html(Path(m[1])).as_posix()}{m[2] or ''})"
        Path(tmp, "README.md").write_text(re.sub(r"\]\((?!\w+:)([^)\s#]+\.ipynb)(#[^)\s]*)?\)", url, md), encoding="utf-8")
        made = {p.relative_to(tmp): p.read_bytes() for p in Path(tmp).rglob("*.*")}
    made |= {Path("nbs/llms.txt"): llms_text().encode(), Path("nbs/reference.ipynb"): reference_page().encode()}
    kept = {p.relative_to(ROOT): p.read_bytes() for p in (*(ROOT / p for p in ("README.md", "nbs/llms.txt", "nbs/reference.ipynb")), *ROOT.glob("index_files/*")) if p.exists()}
    stale = [p for p in sorted(made | kept) if made.get(p) != kept.get(p)]
    if check: return [f"{p} is not what the notebooks make; run: python tools/docs.py readme" for p in stale]
    for p in stale:
        (ROOT / p).parent.mkdir(exist_ok=True)
        if p in made: (ROOT / p).write_bytes(made[p])
        else: (ROOT / p).unlink()
    return []


# ---- pages ----

def frame_faults(path: Path) -> list[str]:
    "What a page lacks of what every page has: a promise, what a reader needs, references. (`page_faults` asks for the badge.)"
    first, *rest = [text(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] != "code"] or [""]
    faults = []
    if not re.fullmatch(r"# .+\n+> .+\s*|---\n.*\n---\s*", first, flags=re.S): faults.append("the first cell is not a title and a promise (# Title, then > promise)")
    if not any(re.match("You need|Nothing is needed", line) for cell in rest[:3] for line in cell.splitlines()):
        faults.append("no line near the top says what a reader needs (You need ...)")
    if path.stem not in NO_REFERENCES and not re.search(r"^(\*\*References|#+ (References|Sources)$)", "\n".join(rest), flags=re.M): faults.append("no references")
    return faults


def stored_faults(path: Path) -> list[str]:
    "What is wrong with a notebook as it is stored."
    faults = frame_faults(path)
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        def say(what, i=i): faults.append(f"cell {i}: {what}")
        source = text(cell["source"])
        if isinstance(cell["source"], str) and "\n" in source: say("source is one string, whose newlines Quarto loses; run nbdev-clean")
        if i == 0 and cell["cell_type"] == "markdown" and (rest := re.sub(r"\A# .*\s*(> .*)?", "", source).strip()):
            say(f"nbdev keeps only title and promise of the first cell; move this to the next: {rest[:60]!r}")
        if cell["cell_type"] != "code": continue
        try: opts, code = options(source)
        except ValueError as e: say(e); continue
        if not re.search(r"^#\|\s*(export|hide|eval: *false)", source, flags=re.M):
            tree = ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.M))
            imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree))
            if imports and any(isinstance(node, (ast.Expr, ast.Assign)) for node in tree.body): say("imports and other code in one cell")
        for output in cell["outputs"]:
            mime, data = shown(output)
            if output["output_type"] == "error": say(f"stored error {output['ename']}: {output['evalue']}")
            if output.get("name") == "stderr": say(f"stored stderr: {data.strip()[:100]!r}")
            if any("widget" in m for m in output.get("data", {})): say("stored widget")
            if is_picture(mime, data) and not opts.get("fig-alt"): say("picture without alt text (#| fig-alt: ...)")
            if mime != "text/plain": continue
            if re.search(r"(^|\W)/(tmp|home|root|Users|work)/\w", data): say(f"path of one machine: {data.strip()[:100]!r}")
            if re.search(r"<\S+ object at|^<(Figure|Axes)|<matplotlib", data): say(f"repr of an object: {data.strip()[:100]!r}")
        if opts.get("fig-alt") and not any(is_picture(*shown(o)) for o in cell["outputs"]): say("fig-alt without a stored picture")
    return faults


class Page(HTMLParser):
    "Ids and links of an HTML page, its running text (no code, no mathematics), and the number of pictures without alt text."
    SKIP = {"code", "pre", "math", "script", "style", "title"}

    def __init__(self, html: str):
        super().__init__()
        self.ids, self.links, self.silent, self.text, self.skipping, self.parent = {""}, [], 0, "", 0, ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = {"id": "", "class": "", **dict(attrs)}
        self.ids.add(attrs["id"])
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        self.silent += tag == "img" and not attrs.get("alt") and not attrs["id"].startswith("_anim_img")
        self.skipping += tag in self.SKIP
        if tag in ("sub", "sup") and "footnote" not in self.parent: self.text += f"<{tag}>"
        self.parent = attrs["class"]

    def handle_endtag(self, tag): self.skipping -= tag in self.SKIP
    def handle_data(self, data): self.text += "" if self.skipping else data


def render(nb: Path, file: Path, up: str) -> list[str]:
    "Processed notebook -> Markdown -> HTML; `up` leads from the page's folder to the site's. Returns what pandoc objects to."
    pictures = file.with_name(file.stem + "_files")
    shutil.rmtree(pictures, ignore_errors=True)
    md = to_markdown(json.loads(nb.read_text(encoding="utf-8"))["cells"], pictures)
    labels = set(re.findall(r"(?:#\| label: |\{#)((?:fig|eq|sec|tbl)-[\w-]+)", nb.read_text(encoding="utf-8")))
    md = re.sub(r"@((?:fig|eq|sec|tbl)-[\w-]+)", lambda m: m[1] if m[1] in labels else f"??{m[1]}", md)
    run = subprocess.run([pypandoc.get_pandoc_path(), *PANDOC], input=md, capture_output=True, text=True, encoding="utf-8")
    html = run.stdout.replace(f'href="{SITE}', f'href="{up}')
    html = re.sub(r'href="(?!\w+:)([^"#]+\.ipynb)(?=["#])', lambda m: f'href="{nbpath2html(Path(m[1])).as_posix()}', html)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(html, encoding="utf-8")
    return [f"pandoc: {' '.join(w.split())}" for w in re.split(r"^(?=\[)", run.stderr, flags=re.M) if w]


def page_faults(file: Path, pages: dict[Path, Page | None], nbs: Path, out: Path, source: str) -> list[str]:
    "What is wrong with a rendered page: links and anchors that lead nowhere, no alt text, no badge, leftovers, size."
    page, faults = pages[file], []
    for url in page.links:
        u = urlsplit(url)
        path = next((url.removeprefix(p) for p in (BLOB, COLAB) if url.startswith(p)), "")
        if not (ROOT / path.split("#")[0]).exists(): faults.append(f"no such file in the repository: {url}")
        if u.scheme or u.netloc: continue
        target = (file.parent / unquote(u.path)).resolve() if u.path else file
        if target == out: target /= "index.html"
        if target not in pages:
            if not (target.exists() or Path(nbs, os.path.relpath(target, out)).exists()): faults.append(f"link leads nowhere: {url}")
        # nbdev links a method to an anchor that it does not make: its class must be there
        elif pages[target] and pages[target].ids.isdisjoint({unquote(u.fragment), u.fragment.split(".")[0]}):
            faults.append(f"no such anchor: {url}")
    if COLAB + source not in page.links: faults.append("no Colab badge that opens this page")
    if page.silent: faults.append(f"{page.silent} picture(s) without alt text")
    for pattern, cause in LEFTOVERS.items():
        found = [" ".join(page.text[max(0, m.start() - 30):m.end() + 30].split()) for m in re.finditer(pattern, page.text, flags=re.M)]
        if found: faults.append(f"{cause}, {len(found)}x: {found[0]!r}")
    size = sum(p.stat().st_size for p in (file, *file.with_name(file.stem + "_files").glob("*")))
    if size > MAX_BYTES: faults.append(f"{size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}")
    return faults


def sidebar(node: str | list | dict) -> set[str]:
    "Every page that Quarto's sidebar names."
    if isinstance(node, str): return {node}
    if isinstance(node, dict): node = [*node.get("contents", []), *(node[k] for k in ("href", "file") if k in node)]
    return {page for item in node for page in sidebar(item)}


def build(root: Path, out: Path, filters: bool = True) -> tuple[list[str], str]:
    "Build each notebook of `root/nbs` as a page in the folder `out` (`filters`: pass it through nbdev's); faults and a summary."
    nbs, proc, out = root / "nbs", root / ("_proc" if filters else "nbs"), out.resolve()
    names = [p.relative_to(nbs) for p in sorted(nbs.rglob("*.ipynb"))]
    faults = {name: stored_faults(nbs / name) for name in names}
    if filters:
        os.chdir(root)                 # where nbdev looks for its settings,
        sys.path.insert(0, str(root))  # and the pages for the package
        for name in names: (proc / name).parent.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:   # nbdev.serve.proc_nbs, page by page
            jobs = {name: pool.submit(serve_drv.main, (nbs / name, proc / name, FilterDefaults)) for name in names}
        for name, job in jobs.items(): faults[name] += [f"nbdev: {e}" for e in [job.exception()] if e]
    files, pages = {name: out / nbpath2html(name) for name in names}, {}
    for name, file in files.items():
        try: faults[name] += render(proc / name, file, "../" * (len(name.parts) - 1))
        except (FileNotFoundError, ValueError): pass    # nbdev failed, or options are not YAML: told above
        pages[file] = Page(file.read_text(encoding="utf-8")) if file.exists() else None
    for name, file in files.items(): faults[name] += page_faults(file, pages, nbs, out, f"nbs/{name.as_posix()}") if pages[file] else []
    there = {name.as_posix() for name in names}
    listed = sidebar(yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"])
    found = [f"{name}: {what}" for name in names for what in dict.fromkeys(faults[name])]
    found += [f"_quarto.yml: the sidebar lacks {page}" for page in sorted(there - listed)]
    found += [f"_quarto.yml: the sidebar names {page}, which is not there" for page in sorted(listed - there)]
    if home := pages.get(out / "index.html"):
        found += [f"index.ipynb: the map of the book lacks {name}" for name in names if os.path.relpath(files[name], out) not in {*home.links, "index.html"}]
    built = [page for page in pages.values() if page]
    return found, (f"{len(built)} of {len(names)} pages, {len(list(out.rglob('*_files/*')))} pictures, "
                   f"{sum(not url.startswith('#cb') for page in built for url in page.links)} links, {len(found)} faults")


def check(out: str | None) -> list[str]:
    "Build the documentation in a copy, so that the tree stays clean."
    out = out and Path(out).resolve()
    with tempfile.TemporaryDirectory() as tmp:
        for name in ("pyproject.toml", "_quarto.yml"): shutil.copy(ROOT / name, tmp)
        rubbish = shutil.ignore_patterns("runs", ".*", "__pycache__")
        for name in ("nbs", "ddpm_edm"): shutil.copytree(ROOT / name, Path(tmp, name), ignore=rubbish)
        faults, summary = build(Path(tmp), out or Path(tmp, "site"))
        os.chdir(ROOT)
    print(summary, flush=True)
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function, option, kind in ((readme, "--check", {"action": "store_true"}), (check, "--out", {"metavar": "DIR"})):
        command = commands.add_parser(function.__name__, description=function.__doc__)
        command.add_argument(option, **kind)
        command.set_defaults(function=function)
    args = vars(parser.parse_args())
    if faults := args.pop("function")(**args): sys.exit("\n".join(faults))
