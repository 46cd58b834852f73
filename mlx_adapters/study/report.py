"""A study's tables (Markdown, CSV, JSON), plots, and one HTML page that needs nothing else."""

import base64
import csv
import html
import io
import json
import math
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_adapters import __version__
from mlx_adapters.errors import counted, writing_to
from mlx_adapters.evaluate.score import Z95
from mlx_adapters.files.writing import write_whole
from mlx_adapters.study.cells import BASE, cell_folder, finished
from mlx_adapters.study.grid import Study
from mlx_adapters.study.plots import draw

__all__ = ["average", "cells_of", "columns", "none_right", "write"]

Result = dict[str, Any]


def write(study: Study, folder: Path) -> list[Result]:
    """Write `results.json`, `.csv`, `.md`, plots and `report.html` from what is done; return the results."""
    names = ([BASE] if study.settings.base else []) + [cell.id for cell in study.cells]
    results = [row for name in names if (row := finished(folder, name)) is not None]
    for row in results:
        if row["status"] == "done":
            row["average"] = average(row["scores"])
    facts = _facts(study, results)
    plots = draw(results, {name: cell_folder(folder, name) / "adapter" for name in names})
    heads, rows = columns(results), cells_of(results)
    text = io.StringIO()
    csv.writer(text).writerows([heads, *rows])
    with writing_to(folder):
        about = {"about": dict(facts), "cells": results}
        write_whole(folder / "results.json", json.dumps(about, indent=1) + "\n")
        write_whole(folder / "results.csv", text.getvalue())
        markdown = _markdown(study, heads, rows, facts, none_right(results))
        write_whole(folder / "results.md", markdown)
        for title, picture in plots.items():
            write_whole(folder / f"{title.replace(' ', '-')}.png", picture)
        write_whole(folder / "report.html", _page(study, heads, rows, facts, plots, results))
    return results


def average(scores: Sequence[Result]) -> dict[str, float]:
    """The mean accuracy over the sets, each weighing the same, with a 95 % interval (shares of one).

    One set: its Wilson interval. Of k sets Price and Bonett's (2004, doi.org/10.1016/S0167-9473(03)00007-0),
    with p_i = (right_i + 2/k) / (n_i + 4/k), as if some more answers were right and as many wrong:

        sum p_i / k  +-  1.96 sqrt(sum p_i (1 - p_i) / (n_i + 4/k)) / k

    The interval is not a single point even where no answer, or every one, is right.
    """
    k = len(scores)
    mean = sum(score["accuracy"] for score in scores) / k
    if k == 1:
        return {"accuracy": mean, "low": scores[0]["low"], "high": scores[0]["high"]}
    items = [score["total"] + 4 / k for score in scores]
    shares = [(score["correct"] + 2 / k) / n for score, n in zip(scores, items)]
    half = Z95 * math.sqrt(sum(p * (1 - p) / n for p, n in zip(shares, items))) / k
    centre = sum(shares) / k
    return {"accuracy": mean, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def none_right(results: Sequence[Result]) -> list[str]:
    """A line for each set of which no answer is right in some cell."""
    lines = []
    for name in _sets(results):
        scores = [(row["id"], s) for row in results for s in row.get("scores", []) if s["task"] == name]
        wrong = [cell for cell, score in scores if score["correct"] == 0]
        unread = [cell for cell, score in scores if score["unanswered"] == score["total"]]
        if wrong:
            read = f"; in {', '.join(unread)} no answer could be read" if unread else ""
            lines.append(
                f"{name}: no answer is right in {', '.join(wrong)}{read}. Look at the responses in "
                "cells/ID/eval.json before you believe it"
            )
    return lines


def columns(results: Sequence[Result]) -> list[str]:
    """The heads of `cells_of`."""
    sets = _sets(results)
    return [
        *("method", "placement", "size", "trainable", "lr", "seed"),
        *sets,
        *(["average"] if len(sets) != 1 else []),
    ]


def cells_of(results: Sequence[Result]) -> list[list[str]]:
    """The table, a row a cell: accuracies in percent with their 95 % intervals."""
    sets, table = _sets(results), []
    for row in results:
        head = [row["method"], row.get("placement") or "", row.get("size") or ""]
        if row["status"] != "done":
            table.append([f"{row['id']} (failed)", "", "", "", "", "", *[""] * (len(columns(results)) - 6)])
            continue
        head.append(
            f"{row['trainable']:,} ({row['trainable'] / row['parameters']:.3%})" if "trainable" in row else ""
        )
        head += ["" if row[key] is None else f"{row[key]:g}" for key in ("lr", "seed")]
        found = {score["task"]: _share(score) for score in row["scores"]}
        total = [_share(row.get("average") or average(row["scores"]))] if len(sets) != 1 else []
        table.append([*head, *(found.get(name, "") for name in sets), *total])
    return table


def _sets(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(score["task"] for row in results for score in row.get("scores", [])))


def _share(score: Result) -> str:
    return f"{score['accuracy']:.1%} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def _facts(study: Study, results: Sequence[Result]) -> list[tuple[str, str]]:
    """What was measured, and how."""
    settings, done = study.settings, [row for row in results if row["status"] == "done"]
    steps = sorted({row["steps"] for row in done if "steps" in row})
    totals = sorted({score["total"] for row in done for score in row["scores"]})
    rows = sorted({row["rows"] for row in done if "rows" in row})
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm", "transformers"))
    seconds = [sum(row.get(key, 0.0) for row in done) / 60 for key in ("train_seconds", "eval_seconds")]
    return [
        ("Model", study.model),
        ("Training data", f"{settings.data}, {_numbers(rows, 'row')}"),
        ("Training", f"{_numbers(steps, 'step')}; one run per cell and seed"),
        ("Tests", f"{settings.tasks}; {_numbers(totals, 'item')} each"),
        ("Overlap of training and test", _overlap(done)),
        (
            "Answers",
            f"{settings.decoding} decoding, {settings.reading} reading of the answer; both readings in JSON",
        ),
        (
            "Intervals",
            "95 %, Wilson; of an average over sets, Price and Bonett's (2004). They cover the choice of "
            "items, not that of the training seed",
        ),
        ("Seeds", _numbers(sorted({cell.train.seed for cell in study.cells}))),
        ("Cells", f"{len(done)} of {len(study.cells) + settings.base} done"),
        ("Work", f"{seconds[0]:.1f} min of training, {seconds[1]:.1f} min of testing"),
        ("Versions", f"mlx-adapters {__version__}, {versions}, Python {platform.python_version()}"),
        ("Machine", f"{platform.system()} {platform.machine()}"),
    ]


def _overlap(done: Sequence[Result]) -> str:
    worst: dict[str, Result] = {}
    for row in done:
        for score in row["scores"]:
            before = worst.get(score["task"])
            if (
                before is None
                or score["seen_total"] + score["near_total"] > before["seen_total"] + before["near_total"]
            ):
                worst[score["task"]] = score
    parts = [
        f"{name}: {s['seen_total']} seen, {s['near_total']} near, {s['unseen_total']} unseen"
        for name, s in worst.items()
    ]
    return "; ".join(parts) or "nothing measured"


def _numbers(values: Sequence[Any], noun: str = "") -> str:
    """`8, 16 rows`."""
    text = ", ".join(map(str, values)) or "none"
    return f"{text} {noun if list(values) == [1] else noun + 's'}" if noun else text


def _markdown(
    study: Study, heads: list[str], rows: list[list[str]], facts: list[tuple[str, str]], wrong: list[str]
) -> str:
    lines = [f"# {study.settings.name}", "", _line(heads), _line(["---"] * len(heads)), *map(_line, rows), ""]
    lines += [line for text in wrong for line in (text, "")]
    return "\n".join([*lines, *(f"- {key}: {value}" for key, value in facts), ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _page(
    study: Study,
    heads: list[str],
    rows: list[list[str]],
    facts: list[tuple[str, str]],
    plots: dict[str, bytes],
    results: Sequence[Result],
) -> str:
    e = html.escape
    title = e(study.settings.name)
    figures = "".join(
        f'<figure><img alt="{e(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{e(name.capitalize())}</figcaption></figure>"
        for name, data in plots.items()
    )
    failed = [row for row in results if row["status"] == "failed"]
    errors = "".join(f"<li><b>{e(row['id'])}</b>: {e(row['error'])}</li>" for row in failed)
    about = "".join(f"<dt>{e(key)}</dt><dd>{e(value)}</dd>" for key, value in facts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body><main>
<h1>{title}</h1>{_best(results)}
<h2>Accuracy</h2>{_table(heads, rows)}
<p class="note">Percent, with 95 % intervals. Two cells compare by <code>mlx-adapters compare</code> on their
cells/ID/eval.json.
Click a head to sort.</p>
{"".join(f"<p>{e(line)}.</p>" for line in none_right(results))}
{"<h2>Failed cells</h2><ul>" + errors + "</ul>" if failed else ""}
<h2>Seen in training and not</h2>{_seen_table(results)}
<h2>Plots</h2><div class="plots">{figures}</div>
<h2>What was measured, and how</h2><dl>{about}</dl>
</main><script>{_SORT}</script></body></html>
"""


def _best(results: Sequence[Result]) -> str:
    done = [row for row in results if row["status"] == "done"]
    adapted = [row for row in done if row["id"] != BASE]
    if not adapted:
        return "<p>No adapter is done yet.</p>"
    best = max(adapted, key=lambda row: row["average"]["accuracy"])
    text = f"Best of {counted(len(adapted), 'adapter')} here: <b>{html.escape(best['id'])}</b>, "
    text += _share(best["average"])
    base = [row for row in done if row["id"] == BASE]
    text += f"; the base model has {_share(base[0]['average'])}" if base else ""
    return f"<p class=lead>{text}. Chosen on the test items themselves, so a little flattered.</p>"


def _seen_table(results: Sequence[Result]) -> str:
    rows = [
        [row["id"], score["task"], *(_part(score, kind) for kind in ("seen", "near", "unseen"))]
        for row in results
        for score in row.get("scores", [])
        if row["id"] != BASE
    ]
    return _table(["cell", "set", "seen", "near", "unseen"], rows)


def _part(score: Result, kind: str) -> str:
    total = score[f"{kind}_total"]
    return f"{score[f'{kind}_correct'] / total:.1%} of {total}" if total else "none"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(heads, "th")}</thead><tbody>{body}</tbody></table></div>'


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--paper:#fff;--line:#d8dee6;--soft:#5b6776;--band:#f4f6f9}
@media(prefers-color-scheme:dark){
:root{--ink:#e4e8ee;--paper:#14181e;--line:#333c48;--soft:#9aa6b4;--band:#1b2129}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:auto;padding:1.5rem 1rem 4rem}h1{font-size:1.6rem}
h2{font-size:1.2rem;margin-top:2.2rem}
.lead{font-size:1.05rem}.note,figcaption{color:var(--soft);font-size:.88rem}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .7rem;text-align:left;white-space:nowrap;border-bottom:1px solid var(--line)}
th{cursor:pointer;border-bottom-width:2px}tbody tr:nth-child(even){background:var(--band)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1rem}
figure{margin:0}img{width:100%;background:#fff;border-radius:6px;border:1px solid var(--line)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.2rem}dt{color:var(--soft)}dd{margin:0}
dd{overflow-wrap:anywhere}
@media(max-width:40rem){dl{display:block}dd{margin-bottom:.6rem}}
@media print{.wide{overflow:visible}table{font-size:.7rem}figure{break-inside:avoid}}
"""
_SORT = """
document.querySelectorAll('th').forEach(h=>h.onclick=()=>{const b=h.closest('table').tBodies[0],i=h.cellIndex,
v=r=>{const t=r.cells[i].textContent.replace(/,/g,''),n=parseFloat(t);return isNaN(n)?t:n},d=h.d=-(h.d||-1);
[...b.rows].sort((x,y)=>{const p=v(x),q=v(y);return (p>q?1:p<q?-1:0)*d}).forEach(r=>b.append(r))})
"""
