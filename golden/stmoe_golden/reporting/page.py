# SPDX-License-Identifier: Apache-2.0
"""The page of a report: one HTML file with everything in it, for light and dark screens.

It fetches nothing: styles, charts and the small script (theme button, values of the heat map under
the pointer) are inline, and a content security policy forbids the rest. Without the script
everything but those two works.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .figures import Cell, Figure
from .svg_chart import LEVELS, number

__all__ = ["page"]

LIGHT = ("#0067a8", "#c2410c", "#7c3aed", "#15803d", "#b45309",
         "#be185d", "#0f766e", "#6b7280", "#8a94a3", "#4d7c0f")  # fmt: skip
DARK = ("#58b4f0", "#fb8a5a", "#b79af7", "#5fd08a", "#f0b357",
        "#f287b7", "#4fd0c3", "#a3acba", "#7d8796", "#a9d356")  # fmt: skip


def _palette(colours: Sequence[str], low: tuple[int, ...], high: tuple[int, ...]) -> str:
    """CSS variables of series and of the shades of a heat map."""
    out = [f"--s{i}:{colour};" for i, colour in enumerate(colours)]
    for i in range(LEVELS):
        mixed = [round(a + (b - a) * i / (LEVELS - 1)) for a, b in zip(low, high, strict=True)]
        out.append(f"--h{i}:#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x};")
    return "".join(out)


LIGHT_THEME = (
    "color-scheme:light;--back:#f6f7f9;--card:#fff;--ink:#16191d;--soft:#4b5563;--line:#dfe3e8;"
    "--strong:#7a8491;" + _palette(LIGHT, (238, 243, 248), (6, 62, 110))
)
DARK_THEME = (
    "color-scheme:dark;--back:#101318;--card:#191d24;--ink:#eceff3;--soft:#aab3bf;--line:#2e3540;"
    "--strong:#7b8695;" + _palette(DARK, (31, 37, 46), (140, 214, 255))
)

STYLE = (
    f":root{{{LIGHT_THEME}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{DARK_THEME}}}}}"
    f":root[data-theme=light]{{{LIGHT_THEME}}}:root[data-theme=dark]{{{DARK_THEME}}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}
main{max-width:1280px;margin:0 auto;padding:20px}
header{display:flex;align-items:start;justify-content:space-between;gap:16px}
h1{font-size:24px;line-height:1.25;margin:0 0 6px}
h2{font-size:17px;line-height:1.35;margin:0 0 4px}
p{margin:0 0 10px}
.said,.soft{color:var(--soft)}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:16px 18px;
margin:0 0 16px}
.card>p:last-child{margin:0}
.note{border-left:4px solid var(--s4)}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.numbers div{border-left:3px solid var(--s0);padding-left:10px}
.numbers b{display:block;font-size:22px;line-height:1.2;font-variant-numeric:tabular-nums}
.figure{display:grid;grid-template-columns:minmax(0,1.7fr) minmax(0,1fr);gap:18px;margin:0}
.plot{overflow-x:auto}
@media (max-width:900px){.figure{grid-template-columns:minmax(0,1fr)}.plot svg{min-width:560px}}
.rows{overflow:auto;max-height:350px}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:3px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{position:sticky;top:0;background:var(--card);color:var(--soft);font-weight:600}
th:first-child,td:first-child{text-align:left}
.facts td,.facts th{white-space:normal;text-align:left;vertical-align:top}
.facts th{white-space:nowrap;width:1%}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:6px 0;font-size:13px;padding:0;
list-style:none}
.legend i{display:inline-block;width:22px;height:0;border-top:4px solid;margin-right:7px;
vertical-align:middle}
.legend i.dash{border-top-style:dashed}
button{font:inherit;font-size:13px;color:var(--ink);background:var(--card);padding:5px 12px;
border:1px solid var(--strong);border-radius:6px;cursor:pointer;white-space:nowrap}
footer{color:var(--soft);font-size:13px}
code{font-family:ui-monospace,"Liberation Mono",monospace;font-size:.93em;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;font-size:12px;font-family:inherit}
svg text{fill:var(--ink)}
svg text.tick{fill:var(--soft)}
svg text.name{paint-order:stroke;stroke:var(--card);stroke-width:3px}
svg text.label{fill:var(--soft);font-weight:600}
.grid{stroke:var(--line);fill:none}
.axis{stroke:var(--strong);fill:none}
.level{stroke:var(--ink);stroke-dasharray:3 4;fill:none;opacity:.7}
.leader{stroke:var(--strong);fill:none}
.line{fill:none;stroke:currentColor;stroke-width:2.2;stroke-linejoin:round}
.dash{stroke-dasharray:7 4}
.dot{fill:currentColor}
.best{stroke:var(--ink);stroke-width:2}
.front{fill:none;stroke:var(--strong);stroke-width:1.5}
.ring{fill:var(--card);fill-opacity:.6;stroke:currentColor;stroke-width:3}
.fill,.area{fill:currentColor}
.area{opacity:.85}
.heat:not(rect){shape-rendering:crispEdges}
.readout{min-height:1.5em;margin:2px 0 0;font-size:13px;color:var(--soft)}
@media print{button{display:none}.rows{max-height:none}.card{break-inside:avoid}}
"""
    + "".join(f".s{i}{{color:var(--s{i})}}" for i in range(len(LIGHT)))
    + "".join(f".h{i}{{fill:var(--h{i})}}" for i in range(LEVELS))
)

SCRIPT = """
"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const themes = ["auto", "light", "dark"];
  let at = 0;
  button.hidden = false;
  button.addEventListener("click", () => {
    at = (at + 1) % themes.length;
    if (at) root.dataset.theme = themes[at]; else delete root.dataset.theme;
    button.textContent = "Theme: " + themes[at];
  });
  for (const svg of document.querySelectorAll("svg[data-heat]")) {
    const [left, top, width, height] = svg.dataset.heat.split(" ").map(Number);
    const rows = svg.dataset.values.split(";").map((row) => row.split(","));
    const [rowName, columnName, unit] = svg.dataset.names.split(",");
    const out = document.createElement("p");
    out.className = "readout";
    svg.after(out);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const x = ((event.clientX - box.left) * scale - left) / width;
      const y = ((event.clientY - box.top) * scale - top) / height;
      const value = rows[Math.floor(y)]?.[Math.floor(x)];
      out.textContent = value === undefined ? ""
        : `${rowName} ${Math.floor(y)}, ${columnName} ${Math.floor(x)}: ${value} ${unit}`;
    });
  }
})();
"""

SECURITY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else escape(value)


def _table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headers)
    body = "".join("<tr>" + "".join(f"<td>{_cell(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(figure: Figure) -> str:
    legend = "".join(
        f'<li><i class="s{colour}{" dash" if dashed else ""}"></i>{escape(name)}</li>'
        for name, colour, dashed in figure.legend
    )
    return (
        f'<section class="card" id="{figure.key}"><h2>{escape(figure.title)}</h2>'
        f'<p class="said">{escape(figure.sentence)}</p>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + f'<figure class="figure"><div class="plot">{figure.svg}</div>'
        f'<div class="rows" tabindex="0" role="region" aria-label="{escape(figure.title)}, table">'
        f"{_table(figure.headers, figure.table)}</div></figure></section>"
    )


def page(
    *,
    title: str,
    verdict: Sequence[str],
    numbers: Sequence[tuple[str, str]],
    notes: Sequence[str],
    facts: Sequence[tuple[str, str]],
    figures: Sequence[Figure],
    tables: Sequence[tuple[str, str, Sequence[str], Sequence[Sequence[Cell]]]] = (),
    footer: str,
) -> str:
    """The whole page.

    Parameters
    ----------
    verdict : sequence of str
        Sentences that answer what the reader came for.
    numbers : sequence of (name, value)
        Shown large.
    notes : sequence of str
        What stands in the way, or is missing.
    facts : sequence of (name, value)
        Settings.
    tables : sequence of (title, sentence, headers, rows)
        Tables without a chart, after the figures.
    """
    cards = "".join(f"<div><b>{escape(v)}</b>{escape(n)}</div>" for n, v in numbers)
    settings = "".join(f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>" for n, v in facts)
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{SECURITY}">'
            f"<title>{escape(title)}</title>"
            '<link rel="icon" href="data:,">'
            f"<style>{STYLE}</style></head><body><main>",
            f"<header><div><h1>{escape(title)}</h1>",
            *(f"<p>{escape(text)}</p>" for text in verdict),
            '</div><button id="theme" type="button" hidden>Theme: auto</button></header>',
            f'<section class="card numbers">{cards}</section>' if cards else "",
            *(f'<section class="card note"><p>{escape(text)}</p></section>' for text in notes),
            *(_figure(figure) for figure in figures),
            *(
                f'<section class="card"><h2>{escape(name)}</h2><p class="said">{escape(said)}</p>'
                f'<div class="rows" tabindex="0">{_table(headers, rows)}</div></section>'
                for name, said, headers, rows in tables
            ),
            f'<section class="card"><h2>Settings</h2><table class="facts">{settings}</table>'
            "</section>" if facts else "",
            f"<footer><p>{escape(footer)}</p></footer></main>",
            f"<script>{SCRIPT}</script></body></html>\n",
        ]
    )  # fmt: skip
