"""A report as one HTML file that opens offline: its style, its tables, its charts, and nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

STYLE: Final = (
    """
:root{--bg:#fbfbf9;--card:#fff;--ink:#1d2329;--soft:#5f6b76;--line:#e3e5e1;--accent:#0b6e4f;--warn:#9a5b00;
--c0:#0b6e4f;--c1:#c8553d;--c2:#2b59c3;--c3:#8d5a97;--c4:#b08900;--c5:#007c91;--c6:#a23b72;--c7:#5c6b73}
@media(prefers-color-scheme:dark){:root{--bg:#14181b;--card:#1b2024;--ink:#e6e9eb;--soft:#98a4ae;--line:#2c3338;
--accent:#5cc8a1;--warn:#e0aa4f;--c0:#5cc8a1;--c1:#f08a72;--c2:#84a9ff;--c3:#cf9ad9;--c4:#e2c044;--c5:#5cc4d6;
--c6:#e585b6;--c7:#a5b3bb}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Vazirmatn,
"Noto Sans","Noto Naskh Arabic",sans-serif}
main{max-width:860px;margin:0 auto;padding:40px 20px 80px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .2em}h2{font-size:1.25rem;margin:2.4em 0 .6em}
h3{font-size:1rem;margin:1.6em 0 .4em}
p{margin:.6em 0}.soft{color:var(--soft)}small{color:var(--soft)}
.verdict{background:var(--card);border:1px solid var(--line);border-left:5px solid var(--accent);border-radius:8px;
padding:18px 22px;margin:24px 0;font-size:1.05rem}.verdict strong{font-size:1.25rem}
.verdict ul{margin:.5em 0 0;padding-left:1.2em}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);text-align:right;border-bottom:1px solid var(--line);padding:6px 10px;
vertical-align:bottom}
td{text-align:right;border-bottom:1px solid var(--line);padding:6px 10px;white-space:nowrap}
th:first-child,td:first-child{text-align:left}td.text,th.text{text-align:start;white-space:normal}
tr.best td{font-weight:650}tr.diagnostic td{color:var(--soft)}
figure{margin:1em 0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px}
figcaption{color:var(--soft);font-size:.9rem;margin-top:6px}
svg{display:block;width:100%;height:auto;font:13px system-ui,sans-serif}
svg .grid{stroke:var(--line)}svg .axis{fill:var(--soft);font-size:12px}svg .label,svg .value{fill:var(--ink)}
svg .interval{stroke-width:3;stroke-linecap:round;opacity:.55}svg .line{fill:none;stroke-width:2.5}
svg .frontier{fill:none;stroke:var(--soft);stroke-dasharray:5 5}svg .diagnostic{opacity:.35}
"""
    + "".join(f"svg .c{n}{{fill:var(--c{n});stroke:var(--c{n})}}svg .c{n}.line{{fill:none}}" for n in range(8))
    + """
details{margin:.5em 0;border:1px solid var(--line);border-radius:8px;padding:8px 14px;background:var(--card)}
summary{cursor:pointer}pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
dl{display:grid;grid-template-columns:minmax(9em,36%) 1fr;gap:4px 18px}dt{color:var(--soft)}dd{margin:0}
.no{color:var(--warn)}
"""
)


def page(title: str, body: Sequence[str], *, lead: str = "") -> str:
    """A whole HTML document. body: HTML of its sections; title and lead: text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<h1 dir="auto">{escape(title)}</h1><p class="soft">{escape(lead)}</p>'
        + "\n".join(body)
        + "</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, classes: Sequence[str] = (), text: Sequence[int] = ()
) -> str:
    """A table of text cells. classes: of each row ("best", "diagnostic", ""). text: columns that are words, and may
    run from right to left."""

    def cell(tag: str, column: int, content: str) -> str:
        words = ' class="text" dir="auto"' if column in text else ""
        return f"<{tag}{words}>{escape(content)}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", i, one) for i, one in enumerate(head)) + "</tr>"]
    for number, row in enumerate(rows):
        style = f' class="{classes[number]}"' if number < len(classes) and classes[number] else ""
        lines.append(f"<tr{style}>" + "".join(cell("td", i, one) for i, one in enumerate(row)) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def figure(svg: str, caption: str) -> str:
    """A chart with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def paragraph(text: str, style: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p{f" class={style!r}" if style else ""} dir="auto">{escape(text)}</p>'


def details(title: str, *parts: str) -> str:
    """What can be opened. title: text; parts: HTML."""
    return f'<details><summary dir="auto">{escape(title)}</summary>{"".join(parts)}</details>'


def preformatted(text: str) -> str:
    """Text as it is."""
    return f'<pre dir="auto">{escape(text)}</pre>'
