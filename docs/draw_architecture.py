"""Draw docs/pictures/architecture.svg from the imports of the package; `make docs` runs this.

A box is a room (a folder or a file of heterokd/), its width grows with the number of its lines. A room stands above all
rooms that it imports. An arrow is an import; where a longer way of arrows leads to the same room, the direct arrow is
left out. The script prints how many rooms, floors and arrows there are, the omitted arrows included.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path

import matplotlib as mpl
import networkx as nx

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "heterokd"
PICTURE = REPOSITORY / "docs" / "pictures" / "architecture.svg"
WIDTH, FLOOR_HEIGHT, BOX_HEIGHT = 14.0, 1.25, 0.62


def rooms() -> nx.DiGraph:
    """Make the graph of rooms: an edge from each room to each room that it imports, `lines` of code on the nodes."""
    graph = nx.DiGraph()
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        text = file.read_text(encoding="utf-8")
        graph.add_node(room)
        graph.nodes[room]["lines"] = graph.nodes[room].get("lines", 0) + text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "heterokd":
                names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                graph.add_edges_from((room, name) for name in names if name != room and not name.startswith("__"))
    return graph


def floors(graph: nx.DiGraph) -> dict[str, int]:
    """Number the floors from the ground up: a room stands above all that it imports."""
    found: dict[str, int] = {}
    for room in reversed(list(nx.topological_sort(graph))):
        found[room] = 1 + max((found[below] for below in graph.successors(room)), default=0)
    return found


def places(graph: nx.DiGraph, floor_of: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Spread each floor's rooms over the width, each near the rooms above that import it."""
    found: dict[str, tuple[float, float]] = {}
    for floor in range(max(floor_of.values()), 0, -1):
        here = [room for room in floor_of if floor_of[room] == floor]
        above = {room: [found[one][0] for one in graph.predecessors(room) if one in found] for room in here}
        here.sort(key=lambda room: (sum(above[room]) / len(above[room]) if above[room] else WIDTH / 2, room))
        for index, room in enumerate(here):
            shift = 0.6 if floor % 2 else -0.6  # rooms of neighbouring floors do not stand exactly below each other
            found[room] = (WIDTH * (index + 1) / (len(here) + 1) + shift, floor * FLOOR_HEIGHT)
    return found


def draw(graph: nx.DiGraph, floor_of: dict[str, int]) -> None:
    """Write the picture."""
    shown = nx.transitive_reduction(graph)
    position = places(shown, floor_of)
    mpl.rcParams.update({"svg.hashsalt": "heterokd", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(11, 0.72 * max(floor_of.values()) + 0.6))
    for start, end in shown.edges:
        (x0, y0), (x1, y1) = position[start], position[end]
        axes.add_patch(
            FancyArrowPatch(
                (x0, y0 - BOX_HEIGHT / 2),
                (x1, y1 + BOX_HEIGHT / 2),
                arrowstyle="-|>",
                mutation_scale=8,
                connectionstyle=f"arc3,rad={0.0 if floor_of[start] - floor_of[end] == 1 else 0.12}",
                color="#8a94a6",
                linewidth=0.9,
                zorder=1,
            )
        )
    for room, (x, y) in position.items():
        lines = graph.nodes[room]["lines"]
        width = 1.25 + 0.012 * math.sqrt(lines) * 1.6
        is_folder = (PACKAGE / room).is_dir()
        axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - BOX_HEIGHT / 2),
                width,
                BOX_HEIGHT,
                boxstyle="round,pad=0.02,rounding_size=0.08",
                facecolor="#e8eefc" if is_folder else "#f6f6f4",
                edgecolor="#3c5a99" if is_folder else "#8a8a80",
                zorder=2,
            )
        )
        axes.text(x, y + 0.09, room + ("/" if is_folder else ""), ha="center", va="center", fontsize=9, zorder=3)
        axes.text(x, y - 0.17, f"{lines:,} lines", ha="center", va="center", fontsize=6, color="#555", zorder=3)
    axes.set_xlim(-0.6, WIDTH + 0.6)
    axes.set_ylim(0.4, (max(floor_of.values()) + 0.6) * FLOOR_HEIGHT)
    axes.axis("off")
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Draw the picture and print its figures."""
    graph = rooms()
    floor_of = floors(graph)
    draw(graph, floor_of)
    print(f"{len(graph)} rooms, {max(floor_of.values())} floors, {graph.number_of_edges()} arrows")


if __name__ == "__main__":
    main()
