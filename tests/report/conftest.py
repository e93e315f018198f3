"""The browser that the pages are shown in."""

from ..web.conftest import chromium

__all__ = ["chromium"]
