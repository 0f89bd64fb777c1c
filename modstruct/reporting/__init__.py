"""Several evaluated runs beside each other: one HTML page that works offline, with CSV and LaTeX tables."""

from modstruct.reporting.writing import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
