"""Stages, packages, and the files and commands behind every number."""

from __future__ import annotations

from experiments.report.html import paragraph, section, table
from experiments.results.run_files import RunFiles


def provenance_section(run: RunFiles) -> str:
    """Return the section."""
    packages = ", ".join(f"{name} {version}" for name, version in run.environment["packages"].items() if version)
    # The stage report writes its receipt after this page, so the page does not depend on it.
    receipts = {folder: receipt for folder, receipt in run.receipts.items() if receipt.stage != "report"}
    rows = [
        (
            receipt.stage,
            receipt.summary,
            f"{folder}/",
            f"groundscope resume={run.root} stages=[{receipt.stage}] force=true",
            f"{receipt.seconds:.1f}",
            receipt.key[:12],
        )
        for folder, receipt in receipts.items()
    ]
    plugins = run.environment.get("plugins") or []
    return section(
        "made",
        "Provenance",
        table(
            ["stage", "result", "files", "command to run it again", "seconds", "key"],
            rows,
            [f"made-{receipt.stage}" for receipt in receipts.values()],
        ),
        paragraph(
            f"Run folder {run.root}: options are in config.yaml, answers in behavior/, head scores in circuits/, probes in "
            "probes/.",
            soft=True,
        ),
        paragraph(f"Python {run.environment['python']} on {run.environment['system']}; {packages}.", soft=True),
        paragraph(f"Installed plug-ins: {'; '.join(map(str, plugins))}.", soft=True) if plugins else "",
    )
