"""Several evaluated runs side by side: one HTML page that works offline, with CSV and LaTeX tables."""
