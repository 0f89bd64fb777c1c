"""Several evaluated runs beside each other: one HTML page that works offline, with CSV and LaTeX tables."""

from modstruct.evaluation.report_page.writing import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
