"""One page from the reports of evaluate.py: each figure of generated volumes beside the same figure of real ones."""

from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from .model import Claim, Page, Row, Section
    from .render import build_page, write_page

__all__ = ["Claim", "Page", "Row", "Section", "build_page", "write_page"]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
