"""Hooks of the documentation site: show the README as first page, and replace links to files outside `docs` by their paths."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite a page's links, which are valid in the repository, so that they are valid in the site."""
    source = PurePosixPath("README.md") if page.file.src_uri == "index.md" else PurePosixPath("docs", page.file.src_uri)
    if source.name == "README.md":
        markdown = (ROOT / source).read_text(encoding="utf-8")

    def rewrite(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        path, _, anchor = target.partition("#")
        parts: list[str] = []
        for part in (source.parent / path).parts:
            if part == "..":
                parts.pop()
            else:
                parts.append(part)
        if parts[:1] != ["docs"]:
            # The file is not in the site: show its path instead.
            return f"{label} (`{'/'.join(parts)}`)"
        depth = len(PurePosixPath(page.file.src_uri).parent.parts)
        inside = "/".join([*[".."] * depth, *parts[1:]])
        return f"{mark}[{label}]({inside}{'#' + anchor if anchor else ''})"

    return LINK.sub(rewrite, markdown)
