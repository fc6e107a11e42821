"""What the searches say: a table for the terminal, the goals, and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.search_efficiency.pairs import PAIRS
from benchmarks.search_efficiency.run import SHARE, Row
from benchmarks.search_efficiency.strategies import LABELS

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "search_efficiency.png"
GOAL_REGRET = 0.07
GOAL_EXCESS = 0.3
GOAL_MILLISECONDS = 50
FEWEST = 5
"""Full trainings from which a search is never to be worse than random."""

COLOURS = {
    "random": "#999999",
    "screen_1": "#c9b458",
    "screen_3": "#d08c34",
    "tpe": "#7a9cc6",
    "tpe_halving": "#2f5d9b",
    "hyperband": "#7fb069",
    "heterokd": "#b3202c",
}


def show(rows: Sequence[Row]) -> None:
    """One table for each pair: regret and its standard error by strategy and budget."""
    for pair in dict.fromkeys(row.pair for row in rows):
        own = [row for row in rows if row.pair == pair]
        budgets = sorted({row.budget for row in own if row.budget})
        found = {(row.strategy, row.budget): row for row in own}
        grid = found.get(("grid", 0))
        said = "" if grid is None else f": regret of the full grid {grid.regret:.3f} ± {grid.error:.3f}"
        print(f"\n{PAIRS[pair].title}{said}")
        print(f"{'full trainings':<32}" + "".join(f"{budget:>15}" for budget in budgets))
        for strategy in LABELS:
            cells = [found.get((strategy, budget)) for budget in budgets]
            if any(cells):
                shown = [f"{row.regret:.3f} ± {row.error:.3f}" if row else "-" for row in cells]
                print(f"{LABELS[strategy]:<32}" + "".join(f"{cell:>15}" for cell in shown))
        print(f"{'at ' + str(SHARE):<32}{'on test':>15}{'beats grid':>15}{'excess, sd':>15}{'ms a training':>15}")
        for strategy in ("grid", *LABELS):
            row = grid if strategy == "grid" else found.get((strategy, SHARE))
            if row is not None:
                cost = "-" if row.milliseconds is None else f"{row.milliseconds:.1f}"
                excess = f"{row.excess:+.2f} ± {row.excess_error:.2f}"
                name = LABELS.get(strategy, "full grid, one seed")
                print(f"{name:<32}{row.test_regret:>15.3f}{row.beats_grid:>15.2f}{excess:>15}{cost:>15}")


def goals(rows: Sequence[Row], ours: str = "heterokd") -> dict[str, bool]:
    """Each goal on each table, and whether it is met; only what the rows can tell."""
    met: dict[str, bool] = {}
    for pair in dict.fromkeys(row.pair for row in rows):
        found = {(row.strategy, row.budget): row for row in rows if row.pair == pair}
        own, grid = found.get((ours, SHARE)), found.get(("grid", 0))
        halving = found.get(("tpe_halving", SHARE))
        if own is not None:
            met[f"{pair}: regret at {SHARE} at most {GOAL_REGRET}"] = own.regret <= GOAL_REGRET
            met[f"{pair}: reported within {GOAL_EXCESS} deviations of the truth"] = abs(own.excess) <= GOAL_EXCESS
        if own is not None and grid is not None:
            met[f"{pair}: regret at {SHARE} below the full grid's"] = own.regret < grid.regret
        if own is not None and halving is not None:
            clear = own.regret < halving.regret - 2 * math.hypot(own.error, halving.error)
            met[f"{pair}: regret at {SHARE} below TPE with halving by two standard errors"] = clear
        for (strategy, budget), row in found.items():
            random = found.get(("random", budget))
            if strategy == ours and random is not None and budget >= FEWEST:
                worst = random.regret + 2 * math.hypot(row.error, random.error)
                met[f"{pair}: at {budget} not worse than random by two standard errors"] = row.regret <= worst
    return met


def draw(rows: Sequence[Row], file: Path = PICTURE) -> None:
    """Regret against compute, one panel a table, with bands of one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    pairs = list(dict.fromkeys(row.pair for row in rows))
    figure, panels = pyplot.subplots(1, len(pairs), figsize=(4.2 * len(pairs), 3.8), sharey=True, squeeze=False)
    for panel, pair in zip(panels[0], pairs, strict=True):
        for strategy, colour in COLOURS.items():
            own = sorted((row for row in rows if (row.pair, row.strategy) == (pair, strategy)), key=lambda r: r.budget)
            if own:
                x, y, e = ([getattr(row, key) for row in own] for key in ("budget", "regret", "error"))
                width = 2.2 if strategy == "heterokd" else 1.2
                panel.plot(x, y, color=colour, label=LABELS[strategy], linewidth=width, marker="o", markersize=3)
                low, high = ([a + sign * b for a, b in zip(y, e, strict=True)] for sign in (-1, 1))
                panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        grid = next((row for row in rows if (row.pair, row.strategy) == (pair, "grid")), None)
        if grid is not None:
            panel.axhline(grid.regret, color="black", linestyle=":", linewidth=1, label="full grid, one seed (664)")
        panel.set(title=PAIRS[pair].title, xscale="log", xlabel="compute, full trainings")
        panel.set_xticks(sorted({row.budget for row in rows if row.budget}))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set(ylabel="normalised regret, mean", ylim=(0, None))
    panels[0][-1].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
