"""report.html: one offline page per study that says which student won, by how much, and how sure that is."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

from heterokd import __version__
from heterokd.config import Experiment
from heterokd.plan import Range, planned
from heterokd.priors import published_results
from heterokd.root import StudyFolder, read_json, write_text
from heterokd.significance import compare_study
from heterokd.tasks import TASKS

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: heterokd</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
        padding: 0 1rem; }
 h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
 .lead { font-size: 1.15rem; } .soft { color: #5a5a5a; }
 .wide { overflow-x: auto; }
 table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
 th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }
 th { font-weight: 600; } td.settings { min-width: 16rem; }
 td.number, th.number { text-align: right; white-space: nowrap; }
 tr.winner td { background: #eaf3fb; } tr.baseline td { background: #f5f5f5; }
 .scale { position: relative; height: 1.1rem; min-width: 10rem; }
 .scale i { position: absolute; top: .5rem; height: .15rem; background: #0072b2; }
 .scale b { position: absolute; top: .2rem; width: .6rem; height: .6rem; margin-left: -.3rem; border-radius: 50%;
            background: #0072b2; }
 pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
 figure { margin: 1rem 0 2rem; } figure img { width: 46rem; max-width: 100%; }
 @media print { body { margin: 0; max-width: none; } }
</style></head><body>
<h1>{{ name }}</h1>
<p class="soft">{{ teacher.network }} (teacher, {{ name_of(teacher.metric) }} {{ percent(teacher.val_score) }} on val)
 to {{ student }}; {{ dataset }}; heterokd {{ version }}</p>
{% if winner %}
<p class="lead"><strong>{{ winner.method }}</strong> made the best student:
 {{ name_of(metric) }} <strong>{{ show(winner.mean) }}</strong>{{ interval(winner) }}
 {%- if scratch and winner.method != "scratch" %}, where labels alone (scratch) reach
 {{ show(scratch.mean) }}{{ interval(scratch) }}{% endif %}.</p>
<p>{{ verdict }}</p>
{% else %}<p class="lead">No trial was trained to the end.</p>{% endif %}
<h2>Leading students</h2>
<p class="soft">{{ name_of(metric) }} on val ({{ metric }}). A mean over fresh seeds is not biased by having been
 picked; the value of the trial that found a configuration is, and stands apart. Bars are 95 % intervals of the
 mean.</p>
<div class="wide"><table>
<tr><th class="number">trial</th><th>method</th><th class="number">mean</th><th class="number">95 % interval</th>
 <th class="number">fresh seeds</th><th class="number">when found</th><th>{{ show(low) }} to {{ show(high) }}</th>
 <th>settings</th></tr>
{% for leader in leaders %}
<tr class="{{ 'winner' if leader.number == winner.number else 'baseline' if leader.method == 'scratch' else '' }}">
 <td class="number">{{ leader.number }}</td><td>{{ leader.method }}</td>
 <td class="number">{{ show(leader.mean) if leader.confirmed else "" }}</td>
 <td class="number">{{ show(leader.low) ~ " to " ~ show(leader.high) if leader.low is not none and leader.confirmed
   else "" }}</td>
 <td class="number">{{ leader.seeds | length if leader.confirmed else 0 }}</td>
 <td class="number">{{ show(leader.search_value) }}</td>
 <td><div class="scale">{% if leader.confirmed and leader.low is not none %}
  <i style="left:{{ place(leader.low) }}%;width:{{ place(leader.high) - place(leader.low) }}%"></i>{% endif %}
  <b style="left:{{ place(leader.mean) }}%"></b></div></td>
 <td class="soft settings">{{ settings(leader) }}</td></tr>
{% endfor %}</table></div>
{% if comparisons %}<h2>Which differences are real</h2>
<p class="soft">Configurations with fresh seeds in common, compared on those; noise is estimated from all of them
 together. p is corrected for the number of comparisons (Holm); an effect of 1 is a difference as large as the deviation
 of a seed's difference.</p>
<div class="wide"><table>
<tr><th>configuration</th><th>and</th><th class="number">difference</th><th class="number">95 % interval</th>
 <th class="number">p</th><th class="number">effect</th><th class="number">seeds</th><th>verdict</th></tr>
{% for row in comparisons %}<tr><td>{{ row.first }}</td><td>{{ row.second }}</td>
 <td class="number">{{ "%+.4f" | format(row.difference) }}</td>
 <td class="number">{{ "" if row.low is none else "%+.4f to %+.4f" | format(row.low, row.high) }}</td>
 <td class="number">{{ "%.3f" | format(row.p_holm) }}</td>
 <td class="number">{{ "" if row.effect is none else "%.1f" | format(row.effect) }}</td>
 <td class="number">{{ row.seeds | length }}</td>
 <td>{{ row.verdict }}{% if row.seeds_needed is not none %}, about {{ row.seeds_needed }} seeds would settle
  it{% endif %}</td></tr>
{% endfor %}</table></div>{% endif %}
{% if front %}<h2>Accuracy and cost</h2>
<p class="soft">Students of which none is better in everything. Each can be promoted:
 heterokd promote {{ name }} --trial N</p>
<div class="wide"><table>
<tr><th>student</th><th class="number">trial</th><th>method</th><th class="number">to expect</th>
 <th class="number">fresh seeds</th>{% for cost in costs %}<th class="number">{{ cost }}</th>{% endfor %}</tr>
{% for member in front %}<tr><td>{{ member.student }}</td><td class="number">{{ member.number }}</td>
<td>{{ member.method }}</td><td class="number">{{ show(member.expected) }}</td>
<td class="number">{{ member.seeds | length if member.confirmed else 0 }}</td>
{% for cost in costs %}<td class="number">{{ "%.3g" | format(member[cost.removeprefix("student/")]) }}</td>{% endfor %}
</tr>{% endfor %}</table></div>{% endif %}
{% if pictures %}<h2>Pictures</h2>{% endif %}
{% for picture in pictures %}<figure><img alt="{{ picture.name }}" src="data:image/png;base64,{{ picture.data }}">
<figcaption class="soft">{{ picture.caption }}</figcaption></figure>
{% endfor %}{% for table in published %}
<h2>Published for this pair</h2>
<p class="soft">{{ table.teacher }} to {{ table.student }} on {{ dataset }}, {{ table.metric }} in per cent. Published:
 on the test split, which was also selected on; teacher {{ table.teacher_value }}. Ours: on val, the method's best
 configuration here, the mean over fresh seeds where it is confirmed; teacher {{ percent(teacher.val_score) }}.</p>
<div class="wide"><table>
<tr><th>method</th><th class="number">published</th><th class="number">ours</th><th>source</th></tr>
{% for row in table.rows %}<tr><td>{{ row.method }}</td><td class="number">{{ "%.2f" | format(row.published) }}</td>
<td class="number">{{ "" if row.ours is none else "%.2f" | format(row.ours) }}</td>
<td class="soft">{{ row.source }}</td></tr>
{% endfor %}</table></div>
{% endfor %}
<h2>Trials</h2>
<p>{{ standing.complete }} trained to the end, {{ standing.pruned }} stopped early at a rung, {{ standing.failed }}
 failed, {{ standing.confirmations_done }} repeated on fresh seeds; {{ standing.planned }} planned.</p>
{% for note in notes %}<p>{{ note }}</p>{% endfor %}
{% if failures %}<div class="wide"><table><tr><th class="number">trial</th><th>method</th><th>failed with</th></tr>
{% for failure in failures %}<tr><td class="number">{{ failure.number }}</td><td>{{ failure.method }}</td>
<td>{{ failure.error }}</td></tr>{% endfor %}</table></div>{% endif %}
{% if plan %}<h2>Planned and taken</h2>
<p class="soft">Planned for {{ plan.parallel }} trials at a time on {{ plan.device }}, by costs that were
 {{ plan.source }}. A range holds nine of ten searches like this one.</p>
<div class="wide"><table><tr><th></th><th class="number">planned</th><th class="number">range</th>
 <th class="number">taken</th></tr>
{% for row in plan.rows %}<tr><td>{{ row.name }}</td><td class="number">{{ row.planned }}</td>
<td class="number">{{ row.range }}</td><td class="number">{{ row.taken }}</td></tr>
{% endfor %}</table></div>{% endif %}
{% if winner %}<h2>The winning recipe</h2><pre>{{ recipe }}</pre>
<h2>Next</h2><pre>heterokd promote {{ name }}        # open the test split, compare with the champion, move the alias
heterokd ui                # every trial, in MLflow's pages
python -c 'import mlflow; print(mlflow.pytorch.load_model("models:/{{ registered }}@challenger"))'</pre>{% endif %}
</body></html>
"""


def write_report(folder: StudyFolder, experiment: Experiment, summary: Mapping[str, Any]) -> None:
    """Write the page of a study into its folder.

    Args:
        folder: of the study.
        experiment: its question.
        summary: what `Study.summary` says, with the teacher's card under `teacher`.
    """
    leaders = summary["leaders"]
    ends = [value for one in leaders for value in (one["low"], one["high"], one["mean"]) if value is not None]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    width = (high - low) or 1.0
    winner = summary["winner"]
    failures = [
        {"number": trial.number, "method": trial.recipe.method, "error": trial.error.strip().splitlines()[-1]}
        for trial in folder.trials()
        if trial.error
    ]

    def interval(leader: Mapping[str, Any]) -> str:
        if leader["low"] is None or not leader["confirmed"]:
            return ""
        return f" ({show(leader['low'])} to {show(leader['high'])}, {len(leader['seeds'])} fresh seeds)"

    def place(value: float) -> float:
        return round(2 + 96 * (value - low) / width, 2)

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    page = environment.from_string(_PAGE).render(
        name=experiment.name,
        version=__version__,
        teacher=summary["teacher"],
        student=", ".join(experiment.student.networks),
        dataset=experiment.data.dataset,
        metric=summary["metric"],
        winner=winner,
        scratch=summary["scratch"],
        leaders=leaders,
        comparisons=compare_study(folder, summary["metric"], maximise=summary["maximise"]),
        pictures=embedded_pictures(folder),
        plan=plan_table(folder),
        name_of=metric_name,
        published=published_tables(experiment, summary),
        low=low,
        high=high,
        standing=summary["standing"],
        notes=notes(summary),
        front=summary.get("front", ()),
        costs=list(summary.get("objectives", ())[1:]),
        failures=failures,
        registered=experiment.registered_model,
        recipe=folder.trial(winner["number"]).recipe.to_yaml() if winner else "",
        verdict=verdict(summary),
        percent=lambda value: f"{100 * value:.2f} %",
        show=show,
        interval=interval,
        place=place,
        settings=lambda leader: settings(leader["sample"]),
    )
    write_text(folder.report, page)


def embedded_pictures(folder: StudyFolder) -> list[dict[str, str]]:
    """Every PNG of a study's pictures with its name, caption and base64 text; the page then needs no other file.

    A caption is what captions.json says of the file's stem, and the stem itself where it says nothing.
    """
    captions = read_json(folder.pictures / "captions.json")
    return [
        {
            "name": file.stem,
            "caption": str(captions.get(file.stem, file.stem.replace("_", " "))),
            "data": base64.b64encode(file.read_bytes()).decode("ascii"),
        }
        for file in sorted(folder.pictures.glob("*.png"))
    ]


def plan_table(folder: StudyFolder) -> dict[str, Any] | None:
    """A study's plan beside what it took; None where it has none."""
    known = planned(folder)
    if known is None:
        return None
    plan, actual = known
    counts = plan.trainings
    ranges: list[tuple[str, str, Range, str]] = [
        ("minutes", "seconds", plan.seconds.times(1 / 60), "%.1f"),
        (plan.device_unit, "device_hours", plan.device_hours, "%.2f"),
        ("MB on disk (the study's own folder, when taken)", "disk", plan.disk.times(1e-6), "%.0f"),
    ]
    if plan.money is not None:
        ranges.insert(2, (plan.currency, "money", plan.money, "%.2f"))
    scale = {"seconds": 1 / 60, "disk": 1e-6}
    rows = [
        {
            "name": name,
            "planned": form % value.expected,
            "range": f"{form % value.low} to {form % value.high}",
            "taken": "" if actual.get(key) is None else form % (actual[key] * scale.get(key, 1.0)),
        }
        for name, key, value, form in ranges
    ]
    numbers = {
        "trainings": ("trainings", counts["published"] + counts["sampled"]),
        "pruned": ("of them stopped early", counts["pruned"]),
        "repeated": ("again on fresh seeds", counts["repeated"]),
    }
    for key, (name, value) in numbers.items():
        rows.append({"name": name, "planned": f"{value:.0f}", "range": "", "taken": str(actual.get(key, ""))})
    return {"rows": rows, "source": plan.source, "parallel": plan.parallel, "device": plan.device}


def metric_name(metric: str) -> str:
    """A metric's key in words: `val/miou` is mIoU, `val/pixel_accuracy` is pixel accuracy."""
    key = metric.rsplit("/", 1)[-1]
    return next((task.score_name for task in TASKS.values() if task.score == key), key.replace("_", " "))


def published_tables(experiment: Experiment, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What papers print of the experiment's pairs, beside this study's best of each method; one table a student.

    Empty for pairs of no table. Only the tables' metric is compared: a study of another one has no numbers of its own
    there.
    """
    tables = []
    for student in experiment.student.networks:
        pair = published_results(experiment.data.dataset, experiment.teacher.network, student)
        if pair is None:
            continue
        ours: dict[str, float] = {}
        for leader in summary["leaders"] if summary["metric"] == f"val/{pair.metric}" else ():
            if leader["sample"].get("student.network", student) == student:
                ours.setdefault(leader["method"], 100 * leader["mean"])  # the leaders come best first
        tables.append(
            {
                "teacher": pair.teacher_name,
                "student": pair.student_name,
                "metric": pair.metric_name,
                "teacher_value": "unknown" if pair.teacher_value is None else f"{pair.teacher_value:.2f}",
                "rows": [
                    {
                        "method": result.method,
                        "published": result.value,
                        "ours": ours.get(result.method),
                        "source": result.source,
                    }
                    for result in sorted(pair.results, key=lambda result: -result.value)
                ],
            }
        )
    return tables


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a search left out, ended early or paused, and what it spent of its budget: one sentence each."""
    found = [f"Left out: {reason}." for key in ("left_out", "excluded") for reason in summary.get(key, {}).values()]
    harmful = summary.get("negative_transfer", ())
    if harmful:
        worse = ", ".join(f"trial {one['number']} ({one['method']}, epoch {one['epoch']})" for one in harmful)
        found.append(f"Negative transfer, ended early: clearly worse than the same student on labels alone: {worse}.")
    standing = summary["standing"]
    if standing.get("diverged"):
        found.append(f"{standing['diverged']} trial(s) ended at once because a loss or a metric was no number.")
    if standing.get("paused"):
        found.append(
            f"The budget paused {standing['paused']} trial(s); a larger one, with --resume, goes on with them."
        )
    spent, budget = summary.get("spent") or {}, summary.get("budget") or {}
    limits = {key: limit for key, limit in budget.items() if limit is not None and key != "price"}
    if limits:
        parts = [f"{spent[key]:.4g} of {limit:g} {key.replace('_', ' ')}" for key, limit in limits.items()]
        found.append(f"Spent: {', '.join(parts)}.")
    return found


def show(value: float) -> str:
    """A metric with four digits."""
    return f"{value:.4f}"


def settings(sample: Mapping[str, Any]) -> str:
    """A sample's values in one line, without the method's name before each."""
    parts = []
    for key, value in sample.items():
        if key != "method":
            shown = f"{value:.4g}" if isinstance(value, float) else value
            parts.append(f"{key.rsplit('.', 1)[-1]} {shown}")
    return ", ".join(parts)


def verdict(summary: Mapping[str, Any]) -> str:
    """How sure the study is that its winner is better than scratch, in one sentence."""
    winner, scratch = summary["winner"], summary["scratch"]
    if winner is None:
        return "No trial was trained to the end."
    if winner["method"] == "scratch":
        return "Distillation brought nothing here: the student trained on labels alone is the best."
    if scratch is None:
        return "The study had no scratch trial, so what distillation adds is not known."
    if not winner["confirmed"] or winner["low"] is None or scratch["high"] is None:
        return "One seed each: the difference may be noise. More trials, or search.confirm_share, would tell."
    # Both half widths come from the same pooled deviation and quantile, so the difference has its own interval.
    widths = [(leader["high"] - leader["low"]) / 2 for leader in (winner, scratch)]
    difference, half = winner["mean"] - scratch["mean"], math.hypot(*widths)
    if not summary["maximise"]:
        difference = -difference
    gain = f"{difference:+.4f} over scratch (95 % interval {difference - half:+.4f} to {difference + half:+.4f})"
    if difference > half:
        return f"The gain is real: {gain}."
    return f"The gain may be noise: {gain}; more repetitions (search.confirm_share, or a larger budget) would tell."
