"""The sections of the report: a module and an entry of `SECTIONS` each.

A package adds a section by an entry point of group ``groundscope.report_sections``; its value is a `Section`.
"""

from __future__ import annotations

from experiments.report.section import Section
from experiments.report.sections.accuracy import accuracy_section
from experiments.report.sections.arena import arena_section
from experiments.report.sections.audit import audit_section
from experiments.report.sections.card import card_section
from experiments.report.sections.correction import correction_section
from experiments.report.sections.descriptions import descriptions_section
from experiments.report.sections.diagnoses import diagnoses_section
from experiments.report.sections.example import example_section
from experiments.report.sections.heads import heads_section
from experiments.report.sections.input_attribution import input_attribution_section
from experiments.report.sections.levels import levels_section
from experiments.report.sections.patching import patching_section
from experiments.report.sections.probes import probes_section
from experiments.report.sections.provenance import provenance_section
from experiments.report.sections.representation import representation_section
from experiments.report.sections.summary import summary_section
from groundscope.core.registry import Registry

LAST = "made"
"""The section that ends the page, after those of other packages."""


def _problem(section: object) -> str | None:
    return None if isinstance(section, Section) else f"it is a {type(section).__name__}, not a Section"


SECTIONS: Registry[Section] = Registry(
    "report section",
    {
        "summary": Section("Summary", summary_section, ()),
        "example": Section("One error", example_section, ("probe", "patch", "evaluate")),
        "levels": Section("By level", levels_section, ("probe", "patch", "evaluate", "diagnose")),
        "accuracy": Section("Answers", accuracy_section, ("evaluate",)),
        "descriptions": Section("Free text", descriptions_section, ("evaluate",)),
        "known": Section("Probes", probes_section, ("probe",)),
        "used": Section("Patching", patching_section, ("patch",)),
        "heads": Section("Heads", heads_section, ("patch",)),
        "sources": Section("Image and words", input_attribution_section, ("diagnose",)),
        "why": Section("Diagnoses", diagnoses_section, ("diagnose",)),
        "representation": Section("Representation", representation_section, ("representation",)),
        "corrected": Section("Correction", correction_section, ("steer", "evaluate", "export")),
        "arena": Section("Arena", arena_section, ("arena",)),
        "card": Section("Card", card_section, ("card",)),
        "audit": Section("Causes in data", audit_section, ()),
        LAST: Section("Provenance", provenance_section, ()),
    },
    group="groundscope.report_sections",
    check=_problem,
)
"""Id of a section in the page to the section, in order."""
