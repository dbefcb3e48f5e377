"""How long the page takes: to its first picture, and from a move of the pointer until its edges are drawn.

First paint is the time from the start of the page to the end of the frame that shows the graph; hover that from the
pointer's event until all is drawn (a pixel is read back, so that no drawing is put off).

Usage: python -m tests.benchmarks.page [--sizes 500:5000 5000:300000]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.viewer.browser import open_browser, wait_until, watch, why_none
from tests.viewer.page_cases import large_graph

MOVES = 200
HOVER = """(node) => {
    const [x, y] = tlclt.positionOf(node);
    const canvas = document.querySelector(".canvas");
    const event = new PointerEvent("pointermove", {clientX: x, clientY: y, bubbles: true});
    const start = performance.now();
    canvas.dispatchEvent(event);
    canvas.querySelectorAll("canvas")[1].getContext("2d").getImageData(0, 0, 1, 1);
    return [performance.now() - start, tlclt.store.hovered === node];
}"""


def measure(browser, n_features: int, n_edges: int) -> list[str]:
    graph = large_graph(n_features, n_edges)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = graph.save_html(Path(folder) / "graph.html")
        written, size = time.perf_counter() - start, path.stat().st_size
        paints = []
        for _ in range(5):
            page = watch(browser, viewport={"width": 1440, "height": 900}).page
            page.goto(path.as_uri())
            wait_until(page, "window.tlclt?.firstPaint")
            paints.append(page.evaluate("tlclt.firstPaint"))
        nodes = page.evaluate("tlclt.scene().visible.nodes")
        chosen = nodes[:: max(len(nodes) // MOVES, 1)]
        hovers, hits = zip(*(page.evaluate(HOVER, node) for node in chosen), strict=True)
        selects = []
        for node in chosen[:10]:
            selects.append(
                page.evaluate(
                    """node => new Promise(done => {
                const start = performance.now();
                tlclt.store.select(node);
                requestAnimationFrame(() => {
                    document.querySelector(".canvas canvas").getContext("2d").getImageData(0, 0, 1, 1);
                    done(performance.now() - start);
                });
            })""",
                    node,
                )
            )
    return [
        f"{len(graph.nodes):,}",
        f"{graph.n_edges:,}",
        f"{size / 2**20:.1f} MiB",
        f"{written:.2f} s",
        f"{statistics.median(paints) / 1000:.2f} s",
        f"{max(paints) / 1000:.2f} s",
        f"{statistics.median(hovers):.1f} ms",
        f"{sorted(hovers)[int(0.95 * len(hovers))]:.1f} ms",
        f"{statistics.median(selects):.0f} ms",
        f"{sum(hits) / len(hits):.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", default=["500:5000", "2000:50000", "4500:750000"], help="features:edges drawn"
    )
    arguments = parser.parse_args()
    reason = why_none()
    if reason:
        raise SystemExit(reason)
    columns = ("nodes", "edges", "file", "written", "first paint", "worst of 5", "hover", "95th", "select", "nodes hit")
    table = Table(*columns, title="The page, headless chromium without a GPU")
    with open_browser() as browser:
        for size in arguments.sizes:
            table.add_row(*measure(browser, *map(int, size.split(":"))))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
