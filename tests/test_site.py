"""The site is built with warnings as errors, loads nothing from elsewhere, and its pages keep what they promise."""

import ast
import doctest
import html.parser
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

import hf_sl2o

from .test_docs import OF_SITE, PAGES, README

ROOT = Path(__file__).parent.parent
#: How-to pages whose decimals are those of the results.
MEASURED = ("one-run", "repeat", "carry-over", "thin-wire", "bases", "learn", "concepts")

#: Modules whose public names are in the reference, beside those of the package itself.
PUBLIC = ("subspace", "rules", "optim", "meta", "training", "experiments", "experiments.report", "metrics")


# Pages, as they are written


def test_each_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"(\S+\.md)$", text, flags=re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert {page.removeprefix("docs/") for page in OF_SITE} <= set(listed)


@pytest.mark.parametrize("name", MEASURED)
def test_decimals_of_a_page_are_those_of_the_results(name):
    prose = re.sub(r"```.*?```", "", PAGES[f"docs/{name}.md"], flags=re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    known = set(re.findall(r"\d[\d,]*\.\d+", PAGES["RESULTS.md"] + README))
    assert len(known) > 1000 and "1.7347" not in known
    assert not set(re.findall(r"\d[\d,]*\.\d+", prose)) - known


def surprises():
    """The entries of the page, each as (its first words, tests, scripts)."""
    for entry in re.split(r"^- ", PAGES["docs/surprises.md"], flags=re.MULTILINE)[1:]:
        backed = entry.partition("Shown by")[2].partition("\n\n")[0]
        yield entry[:60], re.findall(r"`(tests/\w+\.py)::(\w+)`", backed), re.findall(r"findings/(\w+\.sh)", backed)


def functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_each_surprise_is_backed_and_each_finding_is_there():
    entries, scripts = list(surprises()), set()
    assert len(entries) > 25
    for words, tests, shown in entries:
        assert tests or shown, words
        scripts |= set(shown)
        for file, name in tests:
            assert name in functions(ROOT / file), (words, file, name)
    found = {path.name for path in (ROOT / "findings").glob("*.sh")}
    assert scripts == found, "docs/surprises.md and findings/ differ"
    assert "test_that_is_not_there" not in functions(ROOT / "tests" / "test_site.py")


def messages():
    """Texts that the package may say, with "..." for each value."""
    for path in (ROOT / "hf_sl2o").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%(s|d|g)", "...", node.value)


def is_said(message, known):
    pattern = ".*?".join(map(re.escape, re.split(r"\.\.\.", message)))
    return any(re.search(pattern, text, flags=re.DOTALL) for text in known)


def test_messages_of_the_troubleshooting_page_are_said_by_the_package():
    page, known = PAGES["docs/troubleshooting.md"], list(messages())
    first = re.findall(r"^- `(.+?)`:", page, flags=re.DOTALL | re.MULTILINE)
    assert len(first) == page.count("\n- `") > 30
    quoted = first + re.findall(r"(?:\.|told:) `([^`]+)`(?:: |\.)", page)
    quoted = [re.sub(r"\s+", " ", message) for message in quoted]
    assert len(quoted) > len(first)
    assert [message for message in quoted if not is_said(message, known)] == []
    assert not is_said("learning rate ... is one for Adagrad", known)


# The site, as it is built


class Page(html.parser.HTMLParser):
    """Ids, links, and what a browser loads by itself."""

    LOADS = {
        "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"),
        "video": ("src",), "audio": ("src",), "embed": ("src",), "object": ("data",), "input": ("src",),
    }  # fmt: skip

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = {name: value or "" for name, value in attributes}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self.loads += [given[name] for name in self.LOADS.get(tag, ()) if name in given]
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev", "alternate"):
            self.loads.append(given.get("href", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


def external(address):
    return bool(urllib.parse.urlsplit(address).netloc)


def test_what_a_page_loads_is_seen():
    page = Page('<link rel="stylesheet" href="https://fonts.x/a"><script src="//cdn.x/b.js"></script><a href="x#y">')
    assert [external(address) for address in page.loads] == [True, True] and page.links == ["x#y"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for module in ("mkdocs", "material", "mkdocstrings", "griffe"):
        if importlib.util.find_spec(module) is None:
            pytest.skip("the site needs mkdocs-material and mkdocstrings: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pages(site):
    return {name: Page(path.read_text(encoding="utf-8")) for name, path in site.items() if name.endswith(".html")}


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert len(pages) > 20
    for name, page in pages.items():
        assert page.loads and not [address for address in page.loads if external(address)], name
    sheets = [path.read_text(encoding="utf-8") for name, path in site.items() if name.endswith(".css")]
    assert sheets
    for text in sheets:
        assert not re.findall(r"url\(\s*['\"]?(?:https?:)?//|@import\s+['\"]?(?:url\()?(?:https?:)?//", text)


@pytest.mark.slow
def test_links_lead_somewhere(site, pages):
    followed = 0
    for name, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if name == "404.html" or parts.scheme or parts.netloc:
                continue
            path = urllib.parse.unquote(parts.path)
            target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
            assert target in site or target == ".", (name, link)
            anchor = urllib.parse.unquote(parts.fragment)
            if anchor and target in pages:
                assert anchor in pages[target].ids, (name, link)
            followed += 1
    assert followed > 1000


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(pages):
    ids = set().union(*(page.ids for name, page in pages.items() if name.startswith("reference/")))
    assert {f"hf_sl2o.{name}" for name in hf_sl2o.__all__} <= ids
    shorts = {name.rpartition(".")[2] for name in ids}
    for module in PUBLIC:
        loaded = importlib.import_module(f"hf_sl2o.{module}")
        for name in loaded.__all__:
            value = getattr(loaded, name)
            assert name in shorts or not (inspect.isclass(value) or inspect.isfunction(value)), (module, name)
    assert "hf_sl2o.NoSuchName" not in ids


@pytest.mark.slow
def test_docstrings_are_read_as_they_are_meant(site):
    text = site["reference/subspace.html"].read_text(encoding="utf-8")
    assert "<strong>Args</strong>" in text and "Args:" not in text
    assert not re.findall(r"\[<code>[\w.]+</code>\]", text)  # a link that was none
    arguments = site["reference/training.html"].read_text(encoding="utf-8")
    assert "Folder or Hub id of a basis" in arguments  # help of a dataclass' field


def test_the_example_of_the_docstring_reader():
    pytest.importorskip("griffe", reason="the site needs mkdocstrings: pip install -e '.[docs]'")
    found = importlib.util.spec_from_file_location("docstrings", ROOT / "docs/hooks/docstrings.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    assert doctest.testmod(module) == (0, 1)


def test_figures_are_those_of_their_script(tmp_path):
    """Words and sizes; curves that were computed may differ in the last digits."""
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib: pip install -e '.[analysis]'")
    command = [sys.executable, str(ROOT / "docs/figures/make.py"), "--output_dir", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "figures").glob("*.svg")}

    def words(text):
        return re.findall(r"<!-- (.*?) -->|viewBox=\"(.*?)\"", text)

    assert set(made) == set(kept)
    for name, text in kept.items():
        assert words(made[name]) == words(text) and f"figures/{name}" in PAGES["docs/concepts.md"]
        assert "http" not in re.sub(
            r"xmlns(:\w+)?=\"[^\"]*\"|<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", text, flags=re.S
        )
    assert words(made["step.svg"]) != words(made["lora.svg"])
