"""One page from the reports of evaluate.py: what was measured, against what real volumes are to each other."""

from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from .model import Claim, Row, Section
    from .render import build_page, write_page

__all__ = ["Claim", "Row", "Section", "build_page", "write_page"]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
