"""MkDocs hooks: pages and figures from outside docs/, links between them, and the notebook.

A Markdown file keeps its links as they work in the repository, relative to its own place. Files
from outside docs/ have the same path on the site as in the repository, those in docs/ the path
below it. A link to a file that is not on the site, such as a script, leads to the repository if
lla/version.py has its address; otherwise only its text is kept.
"""

import json
import pathlib
import posixpath
import re

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = pathlib.Path(__file__).resolve().parent
PAGES = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "kernels/*.md",
    "lla/*/README.md",
    "experiments/**/*.md",
    "experiments/**/*.png",
)
NOTEBOOKS = "tutorials/*.ipynb"
# A file of the repository that the site shows under another name.
SHOWN_AS = {"README.md": "index.md"}

log = get_plugin_logger("repository")
# What is passed over comes first: code that begins before a bracket does. A link may hold code.
_LINK = re.compile(
    r"^```.*?^```$|`[^`\n]*`"
    r"|(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)",
    re.DOTALL | re.MULTILINE,
)


def repository() -> str | None:
    """The public address of the repository, if there is one."""
    values = {}
    exec((ROOT / "lla" / "version.py").read_text(encoding="utf-8"), values)
    return values["REPOSITORY"] or None


def on_files(files, config):
    """Adds the pages and figures from outside docs/, and a page for each notebook."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    for path in sorted(DOCS.glob(NOTEBOOKS)):
        uri = path.relative_to(DOCS).as_posix()
        page = uri.removesuffix("ipynb") + "md"
        files.append(File.generated(config, page, content=notebook_page(path)))
    return files


def notebook_page(path: pathlib.Path) -> str:
    """A notebook as Markdown, with links to open and to download it; outputs are not shown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    download = f"[Download the notebook]({path.name})"
    address = repository()
    if address and "github.com/" in address:
        where = path.relative_to(ROOT).as_posix()
        colab = address.replace("https://", "https://colab.research.google.com/").replace(
            "github.com/", "github/"
        )
        download += f" or [open it in Colab]({colab}/blob/main/{where})"
    else:
        download += ", or open it in [Colab](https://colab.research.google.com/) by *Upload*"
    shown = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join([shown[0], f"{download}.", *shown[1:]]) + "\n"


def place(uri: str) -> str:
    """Where the source of a page lies in the repository."""
    return uri if (ROOT / uri).exists() else f"docs/{uri}"


def on_page_markdown(markdown, page, config, files):
    """Replaces links that hold in the repository by those that hold on the site."""
    here = place(page.file.src_uri)
    on_site = {place(file.src_uri): file.src_uri for file in files}
    on_site |= SHOWN_AS
    # A notebook is shown by its page, which links to the file itself.
    pages = {uri.removesuffix("md") + "ipynb": uri for uri in on_site.values()}
    own = page.file.src_uri.removesuffix("md") + "ipynb"
    on_site |= {path: pages[uri] for path, uri in on_site.items() if uri in pages and uri != own}

    def link(match):
        text, target = match["text"], match["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        path, sharp, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        if path in on_site:
            start = posixpath.dirname(page.file.src_uri)
            new = posixpath.relpath(on_site[path], start)
            return f"{match['mark']}[{text}]({new}{sharp}{anchor})"
        if not (ROOT / path).exists():
            log.warning(f"{here} links to {target}, which does not exist.")
            return match[0]
        address = repository()
        return f"[{text}]({address}/blob/main/{path}{sharp}{anchor})" if address else text

    return _LINK.sub(link, markdown)
