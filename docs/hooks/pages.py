"""The site has the repository's own pages, too: README is its first page, and links to files of the repository work.

A page keeps its path in the repository; only `docs/` is left out. So `../RESULTS.md` of `docs/guide.md` becomes
`RESULTS.md`. Every file that a page links to, such as a recipe or a result, is copied into the site. Nothing is read
from elsewhere, and no link leaves for a server that may not be there.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md", "RESULTS.md", "REPRODUCTION.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md",
    "recipes/results/README.md", "findings/README.md",
)  # fmt: skip
_FENCED = re.compile(r"(^ *```.*?^ *```)", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")


def in_repository(uri: str) -> str:
    """The path in the repository of a page of the site."""
    return uri if uri in PAGES else f"docs/{uri}"


def site_path(path: str) -> str:
    """The path on the site of a file of the repository."""
    return path.removeprefix("docs/")


def targets(text: str, page: str) -> Iterator[str]:
    """Yields the paths in the repository to which a page's links lead."""
    for part in _FENCED.split(text)[::2]:
        for _, _, link in _LINK.findall(part):
            path = link.partition("#")[0]
            if path and ":" not in path:
                yield posixpath.normpath(posixpath.join(posixpath.dirname(page), path))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside docs/, and what all pages link to."""
    for path in PAGES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    linked: set[str] = set()
    for file in files.documentation_pages():
        linked |= set(targets(file.content_string, in_repository(file.src_uri)))
    for path in sorted(linked):
        if (ROOT / path).is_file() and files.get_file_from_path(site_path(path)) is None:
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads a page's links to where the site has what they name; a folder of the repository stays a name."""
    uri = page.file.src_uri
    here = in_repository(uri)

    def moved(found: re.Match[str]) -> str:
        mark, text, link = found.groups()
        path, sign, heading = link.partition("#")
        if not path or ":" in path:
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        if (ROOT / target).is_dir():
            return text
        return f"{mark}[{text}]({posixpath.relpath(site_path(target), posixpath.dirname(uri) or '.')}{sign}{heading})"

    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)
