"""docs/results.md and docs/precise_gradient.md, made from the results files and the published facts alone."""

from pathlib import Path

from spikingformer.files import write_atomic
from spikingformer.reproduce.curves import write_curves_figure
from spikingformer.reproduce.gradient_page import gradient_page, write_figures
from spikingformer.reproduce.results_page import results_page


def page_texts(results: Path) -> dict[str, str]:
    """The generated pages' text, by file name in the docs folder."""
    return {"results.md": results_page(results), "precise_gradient.md": gradient_page(results)}


def write_pages(results: Path, docs: Path) -> list[Path]:
    """Writes every generated page and figure; returns the files."""
    written = []
    for name, text in page_texts(results).items():
        write_atomic(docs / name, text.encode())
        written.append(docs / name)
    return [*written, write_curves_figure(results, docs / "images"), *write_figures(results, docs / "images")]
