"""A report as one HTML page: nothing is loaded, nothing is executed, all text is escaped."""

from __future__ import annotations

from collections.abc import Sequence

from .parts import Bars, Chart, Report, Table
from .svg import bar_chart, escaped, line_chart, sample

MOST_BYTES = 1_000_000
# Points of a curve, and whether each says its numbers: the first that keeps the page small enough is taken.
DETAIL = ((240, True), (240, False), (80, False), (30, False), (10, False))
MOST_ROWS, MOST_COLUMNS = 400, 60

STYLE = """
:root{--ink:#222;--soft:#666;--paper:#fff;--line:#ddd;--c0:#c2410c;--c1:#0072b2;--c2:#00805a;--c3:#b0508c;
--c4:#a87400;--c5:#3a9bd9;--c6:#7a4b2a;--c7:#6b7280}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--soft:#a5a5a5;--paper:#16181c;--line:#3a3d44;--c0:#ff8a4c;
--c1:#5cb3f0;--c2:#3ec79a;--c3:#e08cc0;--c4:#e3b341;--c5:#8fd0ff;--c6:#c79a76;--c7:#a3aab5}}
*{box-sizing:border-box}
body{margin:0 auto;padding:16px;max-width:1160px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2rem 0 .5rem}p{margin:.5rem 0}
.k,.n{color:var(--soft);font-size:.875rem}
.d{display:grid;gap:20px;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr))}
figure{margin:0;min-width:0}figcaption{font-weight:600;font-size:.95rem}
figure>svg{display:block;width:100%;max-width:510px;height:auto}
svg text{font:11.5px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;fill:var(--ink)}
.g{stroke:var(--line);stroke-width:.7}.a{fill:none;stroke:var(--soft)}.f{fill:none;stroke:var(--soft);opacity:.35}
.l{fill:none;stroke-linejoin:round;stroke-linecap:round;stroke:var(--c)}.b{fill:var(--c);opacity:.16}
.r{fill:var(--c)}.w{fill:none;stroke:var(--ink)}
circle{fill:transparent}circle:hover{fill:var(--ink)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}
ul{list-style:none;margin:.25rem 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.875rem}
.s{width:30px;height:12px;margin-right:5px;vertical-align:-1px}
.t{overflow-x:auto;margin:.5rem 0}table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:4px 10px 4px 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th{overflow-wrap:normal;vertical-align:bottom}td{white-space:nowrap}
th:first-child,td:first-child,.v td{text-align:left}.v td{white-space:normal;min-width:8em}
details{margin:.5rem 0}summary{cursor:pointer}
"""


def page(report: Report, made_with: str) -> str:
    """Returns the report as HTML of less than 1 MB.

    Args:
        report ([`Report`]): What it says.
        made_with (`str`): Stands at the end: which version made it, and when.

    Raises:
        `ValueError`: it has more figures than a page can hold.
    """
    for most, tips in DETAIL:
        text = _html(report, made_with, most, tips)
        if len(text.encode("utf-8", "replace")) < MOST_BYTES:
            return text
    raise ValueError(
        f"the report of {report.title} has {len(report.figures())} figures and takes more than {MOST_BYTES:,} bytes; "
        "report on a part of it"
    )


def _html(report: Report, made_with: str, most: int, tips: bool) -> str:
    body = []
    for section in report.sections:
        body.append(f"<section><h2>{escaped(section.title)}</h2>")
        figures: list[str] = []
        for part in [*section.parts, None]:
            if isinstance(part, Chart | Bars):
                figures.append(_figure(part, most, tips))
                continue
            if figures:
                body.append(f'<div class="d">{"".join(figures)}</div>')
                figures = []
            if isinstance(part, Table):
                body.append(_table(part))
            elif part is not None:
                body.append(f"<p>{escaped(part, 2000)}</p>")
        body.append("</section>")
    title = escaped(report.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{title}: {escaped(report.kind)}</title><style>{STYLE}</style></head>\n'
        f'<body><h1>{title}</h1><p class="k">{escaped(report.kind)}</p>\n'
        + "\n".join(body)
        + f'\n<p class="n">{escaped(made_with, 400)}</p></body></html>\n'
    )


def _figure(part: Chart | Bars, most: int, tips: bool) -> str:
    drawn = bar_chart(part) if isinstance(part, Bars) else line_chart(part, most, tips=tips)
    notes = [part.note] if part.note else []
    legend = ""
    if isinstance(part, Chart):
        longest = max((len(curve.points) for curve in part.curves), default=0)
        if longest > most:
            notes.append(
                f"Of {longest:,} points at most {most} are drawn: the lowest and the highest of each stretch."
            )
        if len(part.curves) > 1 or part.faint:
            legend = "".join(f"<li>{sample(curve)}{escaped(curve.name, 60)}</li>" for curve in part.curves)
            legend = f"<ul>{legend}</ul>"
    below = f'<p class="n">{escaped(" ".join(notes), 1000)}</p>' if notes else ""
    return f"<figure><figcaption>{escaped(part.title)}</figcaption>{drawn}{legend}{below}</figure>"


def _table(table: Table) -> str:
    rows = [_row("td", row) for row in table.rows[:MOST_ROWS]]
    head = _row("th", table.heads) if table.heads else ""
    kind = ' class="v"' if len(table.heads or table.rows[0]) == 2 and not table.heads else ""
    left = f'<p class="n">and {len(table.rows) - MOST_ROWS:,} more</p>' if len(table.rows) > MOST_ROWS else ""
    made = f'<div class="t"><table{kind}>{head}{"".join(rows)}</table></div>{left}'
    return f"<details><summary>{escaped(table.folded)}</summary>{made}</details>" if table.folded else made


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells[:MOST_COLUMNS]) + "</tr>"
