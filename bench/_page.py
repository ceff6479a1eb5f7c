"""Where a report goes: the sections and pictures of a page, or the screen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from _common import console
from tables import fill


class Page:
    """`results.md` and `images/` of a folder; without one, what would be written there is shown, pictures left out."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def section(self, name: str, text: str) -> None:
        """Put `text` between the marks of that name."""
        if self.folder is None:
            console.print(text, markup=False, soft_wrap=True)
        else:
            page = self.folder / "results.md"
            fill(page, name, text)
            console.print(f"wrote {name!r} of {page}", markup=False)

    def picture(self, name: str, caption: str, draw: Callable[[Path], Path]) -> str:
        """What shows a picture in a section, to be put behind its text.

        Args:
            name: the file's. draw: writes the picture to a path, and returns it.
        """
        if self.folder is None:
            return ""
        path = draw(self.folder / "images" / name)
        console.print(f"wrote {path}")
        return f"\n\n![{caption}](images/{path.name})"
