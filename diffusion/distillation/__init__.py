"""Distillation: a student learns the flow map of a teacher, so that it samples in one to four calls."""

from typing import TYPE_CHECKING

from cli.lazy import lazy_exports

if TYPE_CHECKING:
    from .student import check_guidance_of_student, check_inpainting_of_student
    from .teacher import Teacher

__all__ = ["Teacher", "check_guidance_of_student", "check_inpainting_of_student"]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
