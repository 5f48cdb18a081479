"""The two nbconvert exporters: `jupyter nbconvert --to transformnet-html` and `--to transformnet-pdf`.

Any notebook goes through them: nothing here knows the rest of the library. Imported when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"errors": ["ExportError"], "exporters": ["HTMLReportExporter", "PDFReportExporter"]},
)
