"""The two nbconvert exporters: `jupyter nbconvert --to transformnet-html` and `--to transformnet-pdf`."""

from .exporters import HTMLReportExporter, PDFReportExporter

__all__ = ["HTMLReportExporter", "PDFReportExporter"]
