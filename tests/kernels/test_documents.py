"""Links in the documents of kernels/, and references to them from code, lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted((ROOT / "kernels").glob("*.md"))


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document):
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text(encoding="utf-8"))
    for link in links:
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor and target.parent == document.parent:
            assert anchor in anchors(target), link


def test_references_in_code():
    sources = [
        path
        for folder in ("kernels", "lla", "tests", "experiments")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = {
        name
        for path in sources
        for name in re.findall(r"kernels/([A-Z]+\.md)", path.read_text(encoding="utf-8"))
    }
    assert {"MATHEMATICS.md", "HOPPER.md", "DECODING.md", "TPU.md"} <= found
    assert found <= {path.name for path in DOCUMENTS}
