"""The documentation site builds without a warning, offline, and has the reference of every public name."""

import logging
import re
from pathlib import Path

import pytest

import transfiner_refine

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install mkdocs-material 'mkdocstrings[python]'")
pytest.importorskip("material", reason="mkdocs-material is not installed: pip install mkdocs-material")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: pip install 'mkdocstrings[python]'")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built; a warning ends the build."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of mkdocs' plugins about each other
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        folder = tmp_path_factory.mktemp("site")
        config = load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(folder))
        logging.getLogger("mkdocs").setLevel(logging.WARNING)
        build(config)
    return folder


def test_every_page_is_in_the_menu(site: Path):
    start = (site / "index.html").read_text(encoding="utf-8")
    pages = [path.relative_to(REPOSITORY / "docs") for path in (REPOSITORY / "docs").rglob("*.md")]
    assert len(pages) > 20
    for page in pages:
        assert f'href="{page.with_suffix(".html").as_posix()}"' in start or page.name == "index.md", page


def test_public_names_are_in_the_reference(site: Path):
    reference = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    names = [name for name in transfiner_refine.__all__ if name != "__version__"]
    missing = [name for name in names if not re.search(rf'id="transfiner_refine\.(\w+\.)*{name}"', reference)]
    assert not missing
    for member in ("Refiner.refine", "Refiner.from_pretrained", "Instances.to_coco", "adapt"):
        assert re.search(rf'id="transfiner_refine\.(\w+\.)*{member}"', reference), member


def test_nothing_is_fetched_from_elsewhere(site: Path):
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not [address for address in fetched if "canonical" not in address], page.name


def test_links_outside_of_the_docs_show_their_path(site: Path):
    page = (site / "limits.html").read_text(encoding="utf-8")
    assert "transfiner_refine/pretrained/README.md" in page and 'href="../transfiner_refine' not in page
