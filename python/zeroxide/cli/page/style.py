"""How the page looks, in light and in dark: all of its CSS."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark;
  --page: #ffffff; --text: #1b1f24; --quiet: #57606a; --rule: #d0d7de; --grid: #e6eaef; --panel: #f6f8fa;
  --c0: #a8b0ba; --c1: #2563b0; --c2: #0f8a8a; --c3: #c2570c; --c4: #7c4dbc; --c5: #b0306e; --c6: #5f7d1f;
  --c7: #8a6d1c; --c8: #40505f; --bad: #c62828; --mark: #1b1f24;
  --p1: #cfe1f7; --p2: #dccff2; --p3: #f7dcc4; --p4: #dfe3e8; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0f1318; --text: #e6e9ed; --quiet: #9aa4b0; --rule: #39424d; --grid: #242c35; --panel: #171d24;
  --c0: #6b7683; --c1: #6cabf5; --c2: #4cc2bd; --c3: #f0924c; --c4: #b798ee; --c5: #ee7fb1; --c6: #a5c45a;
  --c7: #d6b354; --c8: #a9b7c6; --bad: #ff7b72; --mark: #ffffff;
  --p1: #1d3a5c; --p2: #3b2d5c; --p3: #573617; --p4: #323a44; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem clamp(0.8rem, 3vw, 2rem) 3rem; max-width: 66rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; padding-top: 0.8rem; border-top: 1px solid var(--rule); }
.status { color: var(--quiet); margin: 0.2rem 0 1rem; }
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.6rem; }
.headline p { margin: 0; padding: 0.6rem 0.8rem; background: var(--panel); border-radius: 6px; font-size: 0.85rem;
  color: var(--quiet); }
.headline b { display: block; font-size: 1.15rem; color: var(--text); font-variant-numeric: tabular-nums; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.9rem; color: var(--quiet); margin-bottom: 0.2rem; }
figcaption b { color: var(--text); font-weight: 600; }
.legend { font-size: 0.8rem; }
.key { display: inline-block; width: 0.75em; height: 0.75em; border-radius: 2px;
  margin: 0 0.35em 0 0.9em; }
.note, .none { font-size: 0.85rem; color: var(--quiet); max-width: 48rem; margin: 0.5rem 0; }
svg { display: block; width: 100%; height: auto; }
#memory svg { max-width: 42rem; }
.wide svg { min-width: 46rem; }
.scroll { overflow-x: auto; }
.scroll:focus, summary:focus { outline: 2px solid var(--c1); outline-offset: 2px; }
text { font: 12px system-ui, sans-serif; fill: var(--quiet); }
text.end { text-anchor: end; } text.middle { text-anchor: middle; }
text.inside { fill: var(--text); pointer-events: none; }
text.halo { fill: var(--text); paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round; }
.grid { stroke: var(--grid); } .axis { stroke: var(--rule); }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); } .line.c3 { stroke: var(--c3); }
.line.c4 { stroke: var(--c4); }
.faint { stroke-opacity: 0.35; stroke-width: 1; }
.cross { stroke: var(--bad); stroke-width: 1.5; fill: none; }
.hover { fill: transparent; } .hover:hover { fill: var(--text); fill-opacity: 0.07; }
.c0 { fill: var(--c0); background: var(--c0); } .c1 { fill: var(--c1); background: var(--c1); }
.c2 { fill: var(--c2); background: var(--c2); } .c3 { fill: var(--c3); background: var(--c3); }
.c4 { fill: var(--c4); background: var(--c4); } .c5 { fill: var(--c5); background: var(--c5); }
.c6 { fill: var(--c6); background: var(--c6); } .c7 { fill: var(--c7); background: var(--c7); }
.c8 { fill: var(--c8); background: var(--c8); } .line[class] { fill: none; }
.bad { fill: var(--bad); }
.p1 { fill: var(--p1); } .p2 { fill: var(--p2); } .p3 { fill: var(--p3); } .p4 { fill: var(--p4); }
.part, .phase { stroke: var(--page); stroke-width: 0.6; }
.resident { stroke: var(--mark); stroke-width: 2.5; }
.budget { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 7 4; }
.peak { stroke: var(--quiet); stroke-width: 1.5; stroke-dasharray: 2 3; }
details { margin: 0.6rem 0; } summary { cursor: pointer; color: var(--quiet); font-size: 0.9rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; margin: 0.4rem 0; }
caption { text-align: left; color: var(--quiet); padding: 0.2rem 0; white-space: nowrap; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th { font-weight: 500; } th:first-child { text-align: left; }
details .scroll { max-height: 26rem; overflow-y: auto; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 0.25rem 1rem; margin: 0;
  font-size: 0.9rem; }
dt { color: var(--quiet); } dd { margin: 0; min-width: 0; }
pre, code { font: 0.85em ui-monospace, monospace; } pre { white-space: pre-wrap; background: var(--panel);
  padding: 0.7rem; border-radius: 6px; margin: 0.4rem 0; }
@media print { details { display: none; } }
"""
