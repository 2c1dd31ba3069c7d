"""The look of the report: one style sheet, for light and dark, for narrow and wide windows, and for paper."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f27; --quiet: #5b6472; --line: #dfe3ea;
  --accent: #1f6feb; --faint: #8fb4ee; --rate: #9a6700;
  --held-back: #b3362b; --inside: #1a7f37; --outside: #8250df; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1218; --card: #181c25; --ink: #e7eaf0; --quiet: #9aa4b5;
  --line: #2b3240; --accent: #6ea8ff; --faint: #3d5f94; --rate: #e0b050; --held-back: #ff8a7a;
  --inside: #4ac26b; --outside: #c297ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
main { padding-bottom: 48px; }
h1 { margin: 2px 0 20px; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 14px; font-size: 1.15rem; }
h3 { margin: 0; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0 0 12px; }
.kind, .quiet, figcaption, .legend { color: var(--quiet); font-size: .875rem; }
.kind { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 0 0 20px; }
.tiles div, section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tiles div { padding: 12px 16px; }
dt { color: var(--quiet); font-size: .8125rem; }
dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
section { padding: 20px; margin-bottom: 20px; }
article + article { margin-top: 24px; padding-top: 20px; border-top: 1px solid var(--line); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 8px; background: var(--page); }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 14px; }
.strip.few { grid-template-columns: repeat(var(--count), minmax(0, 330px)); }
.strip img { width: 100%; }
.strip figure:last-child:not(:first-child) figcaption { color: var(--ink); font-weight: 600; }
figcaption { margin-top: 6px; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 4px; border-radius: 4px; }
.chart { display: block; width: 100%; min-width: 560px; height: auto; }
.chart + .chart { margin-top: 6px; }
.line { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke: var(--faint); stroke-width: 1; }
.smooth { stroke: var(--accent); stroke-width: 2.5; }
.validation { stroke: var(--held-back); stroke-width: 2; }
.line.inside, .key.inside { stroke: var(--inside); border-color: var(--inside); stroke-width: 2.5; }
.line.outside, .key.outside { stroke: var(--outside); border-color: var(--outside); stroke-width: 2.5; }
.line.drift { stroke: var(--rate); stroke-width: 2.5; }
.line.each { stroke-width: 1; opacity: .35; }
.line.dashed { stroke-width: 2; stroke-dasharray: 7 6; }
.key.outside, .key.dashed { margin-left: 14px; }
.key.dashed { border-top: 2px dashed var(--quiet); }
.bars { display: grid; grid-template-columns: minmax(0, max-content) 1fr max-content; gap: 4px 12px;
  align-items: center; margin: 0 0 16px; font-size: .8125rem; font-variant-numeric: tabular-nums; }
.bars dt, .bars dd { font-size: .8125rem; font-weight: 400; }
.bars dt { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; max-width: 260px; }
.bars .track { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; }
.bars .track span { display: block; height: 100%; background: var(--inside); }
.rate { stroke: var(--rate); stroke-width: 2; }
.grid { stroke: var(--line); stroke-width: 1; }
.tick, .axis { fill: var(--quiet); font-size: 12px; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 22px; height: 0; margin: 0 6px 4px 0; border-top: 2.5px solid var(--accent);
  vertical-align: middle; }
.key.validation { border-top: 2px solid var(--held-back); margin-left: 14px; }
.key.raw { border-top: 1.5px solid var(--faint); margin-left: 14px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
.scroll > table { min-width: 460px; }
th, td { padding: 7px 18px 7px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--quiet); font-weight: 500; white-space: nowrap; }
td:last-child { overflow-wrap: anywhere; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
.pairs th { width: 1%; font-weight: 500; white-space: nowrap; padding-right: 28px; }
.pairs td { font-family: ui-monospace, "Cascadia Mono", Menlo, monospace; font-size: .8125rem; }
@media (max-width: 560px) { header, main { padding-left: 12px; padding-right: 12px; } section { padding: 14px; }
  h1 { font-size: 1.5rem; } .strip:not(.few) { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); } }
@media print { body { background: none; } section, .tiles div { border: 0; padding: 0; break-inside: avoid; }
  .strip:not(.few) { grid-template-columns: repeat(4, 1fr); } }
"""
