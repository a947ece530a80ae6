"""What each diagnostic adds to the report: one file each, one function from a run to a section."""

import importlib
from typing import TYPE_CHECKING

from lightning_diag.report.section import Section

if TYPE_CHECKING:
    from lightning_diag.records.read_run import Run

__all__ = ["SECTIONS", "sections"]

SECTIONS: tuple[str, ...] = (
    "questions",
    "alerts",
    "collapse",
    "wiring",
    "learning_rate",
    "updates",
    "attention",
    "activations",
    "latents",
    "blobs",
    "components",
    "hardware",
)
"""Names of the modules beside this one, in the order of the report; each has ``NAME_section``."""


def sections(run: "Run") -> list[Section]:
    """The sections of all diagnostics that left rows in a run.

    A section that cannot be made does not cost the report: it says so in its own place.

    Args:
        run: What `read_run` returned.
    """
    found = []
    for name in SECTIONS:
        make = getattr(importlib.import_module(f"{__name__}.{name}"), f"{name}_section")
        try:
            section = make(run)
        except Exception as error:
            why = f"This part could not be written: {type(error).__name__}: {error}"
            section = Section(name.capitalize(), lines=(why.replace("`", "'"),))
        if section is not None:
            found.append(section)
    return found
