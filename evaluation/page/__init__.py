"""One page from the reports of evaluate.py: what was measured, against what real volumes are to each other."""

from .model import Claim, Row, Section
from .render import build_page, write_page

__all__ = ["Claim", "Row", "Section", "build_page", "write_page"]
