"""What the page of a dataset adds to the look of reports."""

from library.pages.style import STYLE

DATASET_STYLE = (
    STYLE
    + """
:root { --good: #1a7f37; --error: #c4321f; --warning: #9a6700; --note: #1f6feb; --veil: #be1e3c; }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --error: #ff8a7a; --warning: #e0b050;
  --note: #6ea8ff; } }
.tiles { grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); }
.verdict { margin: -4px 0 20px; padding: 12px 16px; border-radius: 12px; border: 1px solid var(--line);
  border-left: 6px solid var(--good); background: var(--card); font-weight: 600; }
.verdict.error { border-left-color: var(--error); } .verdict.warning { border-left-color: var(--warning); }
.verdict span { font-weight: 400; color: var(--quiet); }
.overview { list-style: none; margin: 0 0 24px; padding: 0; columns: 2 340px; column-gap: 32px; font-size: .9rem; }
.overview li { display: flex; gap: 10px; align-items: baseline; padding: 4px 0; break-inside: avoid; }
.overview a { color: inherit; text-decoration: none; flex: 1; border-bottom: 1px dotted var(--line); }
.overview a:hover { color: var(--accent); }
.overview b { font-variant-numeric: tabular-nums; }
.badge { display: inline-block; min-width: 62px; padding: 1px 9px; border-radius: 99px; font-size: .75rem;
  font-weight: 600; text-align: center; color: #fff; background: var(--note); }
.badge.error { background: #b3291a; } .badge.warning { background: #9a6700; } .badge.note { background: #2b62b8; }
.finding { scroll-margin-top: 12px; padding-top: 20px; border-top: 1px solid var(--line); }
.finding > h3 { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: baseline; }
.finding code { font: .8125rem ui-monospace, "Cascadia Mono", Menlo, monospace; color: var(--quiet); font-weight: 400; }
.remedy { margin: 6px 0 12px; overflow-wrap: anywhere; }
.cases { list-style: none; margin: 0; padding: 0; display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); }
.cases li { border: 1px solid var(--line); border-radius: 10px; padding: 12px; min-width: 0; }
.cases h4 { margin: 0; font-size: .875rem; overflow-wrap: anywhere; }
.cases p { margin: 2px 0 0; font-size: .875rem; overflow-wrap: anywhere; }
.cases .place { color: var(--quiet); font-size: .75rem; }
.shots { display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 8px; align-items: flex-end; }
.shots img { max-height: 104px; width: auto; border-radius: 6px;
  background: repeating-conic-gradient(#8884 0 25%, #8881 0 50%) 0 0 / 16px 16px; }
.more { color: var(--quiet); font-size: .875rem; margin: 10px 0 0; }
.buckets { list-style: none; margin: 0; padding: 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
.buckets li { display: flex; gap: 14px; align-items: center; border: 1px solid var(--line); border-radius: 10px;
  padding: 10px 12px; }
.buckets .short { border-color: var(--warning); }
.buckets svg { width: 52px; height: 52px; flex: none; }
.buckets span { display: block; color: var(--quiet); font-size: .8125rem; }
.shape { fill: var(--faint); stroke: var(--accent); stroke-width: 1.5; }
.bar { fill: var(--accent); } .mean { stroke: var(--rate); stroke-width: 2; stroke-dasharray: 5 4; }
.sheet { display: grid; gap: 16px 12px; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
.sheet figure { min-width: 0; } .sheet img { max-height: 150px; width: auto; border-radius: 6px; }
.sheet figcaption { font-size: .8125rem; overflow-wrap: anywhere; margin-top: 4px; }
.sheet figcaption b { color: var(--ink); display: block; } .sheet em { font-style: normal; color: var(--warning); }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; background: var(--veil);
  vertical-align: -1px; opacity: .8; }
@media (max-width: 560px) { .cases, .sheet { grid-template-columns: minmax(0, 1fr); } }
"""
)
