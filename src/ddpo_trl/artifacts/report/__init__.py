"""`report.html`: what a run left in its folder, on one page that loads nothing from elsewhere."""

from ddpo_trl.artifacts.report.page import write_report


__all__ = ["write_report"]
