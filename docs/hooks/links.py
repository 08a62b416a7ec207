"""A hook of mkdocs: a link that leaves docs/ works in the repository and not on the site, where it becomes its text.

One whose file is not in the repository is a warning, so the build fails.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

log = logging.getLogger("mkdocs.hooks.links")
DOCS = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]*)\)")


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    folder = (DOCS / page.file.src_uri).parent

    def text(link: re.Match[str]) -> str:
        target = (folder / link[2].partition("#")[0]).resolve()
        if target.is_relative_to(DOCS):
            return link[0]
        if not target.exists():
            log.warning("%s: [%s](%s) leads to no file of the repository", page.file.src_uri, link[1], link[2])
        return link[1]

    return LINK.sub(text, markdown)
