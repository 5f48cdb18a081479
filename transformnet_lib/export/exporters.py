"""The nbconvert side: from a notebook to one file. Tags hide what a reader need not see."""

from copy import deepcopy
from pathlib import Path

from nbconvert.exporters import Exporter
from traitlets import List, Unicode, default
from traitlets.config import Config

from .document import Document, read
from .html import html
from .pdf import pdf


class _ReportExporter(Exporter):
    """Cells tagged `hide` are dropped, `hide-input` their source, `hide-output` their outputs.

    A notebook with metadata `{"transformnet": {"hide_input": true}}` shows no source at all.
    """

    @property
    def default_config(self):
        tags = {
            "enabled": True,
            "remove_cell_tags": {"hide"},
            "remove_input_tags": {"hide-input"},
            "remove_all_outputs_tags": {"hide-output"},
        }
        # Coalesced, a progress bar is one text whose overwritten parts can be dropped.
        config = Config({"TagRemovePreprocessor": tags, "CoalesceStreamsPreprocessor": {"enabled": True}})
        config.merge(super().default_config)
        return config

    def from_notebook_node(self, nb, resources=None, **kwargs):
        """The file's content and nbconvert's resources. Raises ExportError, one line, naming the cell."""
        nb = deepcopy(nb)
        for number, cell in enumerate(nb.cells, 1):  # hidden cells count too: messages name the notebook's own cell
            cell.metadata["transformnet_cell"] = number
            # --no-input sets an option of other exporters, which everybody knows
            no_input = self.config.TemplateExporter.get("exclude_input", False)
            if no_input or nb.metadata.get("transformnet", {}).get("hide_input"):
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
        nb, resources = super().from_notebook_node(nb, resources, **kwargs)
        metadata = resources["metadata"]
        folder = Path(metadata["path"]) if metadata.get("path") is not None else None
        return self.write(read(nb, name=metadata.get("name") or "Notebook", folder=folder)), resources

    def write(self, document: Document):
        raise NotImplementedError


class HTMLReportExporter(_ReportExporter):
    """One self-contained page, which asks no host for anything."""

    export_from_notebook = "Report (HTML)"
    output_mimetype = "text/html"
    beside = List(Unicode(), help="Names of files in the page's folder, such as its PDF, that its head links to.").tag(
        config=True
    )

    @default("file_extension")
    def _file_extension_default(self):
        return ".html"

    def write(self, document: Document) -> str:
        return html(document, beside=self.beside)


class PDFReportExporter(_ReportExporter):
    """A typeset, tagged A4 PDF."""

    export_from_notebook = "Report (PDF)"
    output_mimetype = "application/pdf"

    @default("file_extension")
    def _file_extension_default(self):
        return ".pdf"

    def write(self, document: Document) -> bytes:
        return pdf(document)
