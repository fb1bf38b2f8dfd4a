"""Links of the pages to files of the repository that are no pages: the site shows their path instead.

A hook of mkdocs. In a checkout these links lead to the file; the site does not hold it.
"""

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn ``[text](../file)`` into ``text (`file`)`` where the file lies outside of ``docs``."""
    folder = posixpath.dirname(page.file.src_uri)

    def shown(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, link[2]))
        if path.startswith("docs/") or "://" in link[2]:
            return link[0]
        return f"`{path}`" if link[1] in path else f"{link[1]} (`{path}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)\)", shown, markdown)
