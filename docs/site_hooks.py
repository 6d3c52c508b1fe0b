"""What the site needs beside mkdocs: files of the repository that its pages link to.

A page links to a CSV, a picture or a source file by its place in the repository, so that the link
works where the page is read as a file. For the site such a file is copied, and the link changed.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

#: `](target)`, `](target#anchor)` and `src="target"`; addresses with a scheme are left alone.
_LINK = re.compile(r'(\]\(|(?:src|href)=")(?!\w+:|#|/)([^)#"\s]+)')
#: Where copied files go: no page of docs/ begins with it.
_COPIES = "repository"
_SPACE_IN_PERCENT = re.compile(r"(?<=\d) %")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Copy the files outside docs/ that a page links to, and point its links at the copies."""
    folder = posixpath.dirname(page.file.src_uri)
    root = Path(config["docs_dir"]).parent

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, link[2]))
        if target.startswith("docs/"):
            return link[0]
        source = root / target
        if not source.is_file():
            raise PluginError(f"{page.file.src_uri} links to {link[2]}, which is no file")
        copy = f"{_COPIES}/{target}"
        if copy.endswith(".md"):
            copy += ".txt"  # a file to read, not a page of the site
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(source)))
        return link[1] + posixpath.relpath(copy, folder or ".")

    lines = _LINK.sub(moved, markdown).splitlines()
    # In a narrow cell "98 %" would be broken into two lines.
    return "\n".join(
        _SPACE_IN_PERCENT.sub("\N{NO-BREAK SPACE}%", line) if line.startswith("|") else line
        for line in lines
    )
