"""How the report looks: one stylesheet for light, dark and paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2230; --soft: #667085; --line: #dfe3ea; --paper: #f6f7fa; --card: #ffffff;
  --blue: #2f62d9; --green: #16875b; --amber: #b97800; --red: #c8323a; --violet: #7a4ed6; --wash: #eef3ff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ef; --soft: #98a1b3; --line: #2e3442; --paper: #12141a;
  --card: #1a1d25; --blue: #7ea6ff; --green: #4cc38f; --amber: #e3ac45; --red: #f0767c; --violet: #b596ff;
  --wash: #1d2740; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 52px 0 4px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0 0 12px; max-width: 76ch; }
.soft, figcaption p { color: var(--soft); font-size: 13.5px; }
.top { display: flex; justify-content: space-between; align-items: baseline; gap: 16px; flex-wrap: wrap;
  margin-bottom: 20px; }
.state { font-size: 13px; padding: 3px 12px; border-radius: 99px; border: 1px solid var(--line);
  background: var(--card); }
.state.good { color: var(--green); } .state.bad { color: var(--red); } .state.open { color: var(--amber); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; }
.verdict { background: var(--wash); padding: 24px 26px; }
.verdict p { font-size: 19px; line-height: 1.5; margin: 0 0 6px; } .verdict .soft { font-size: 14px; margin: 8px 0 0; }
.verdict p { max-width: none; } .verdict svg { display: block; width: 100%; height: 34px; margin-top: 12px; }
.scale { display: flex; justify-content: space-between; font-size: 12.5px; color: var(--soft); }
.scale span { flex: 1; text-align: center; } .scale span:first-child { text-align: left; }
.scale span:last-child { text-align: right; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 14px; }
.tile { padding: 14px 16px; } .tile b { display: block; font-size: 22px; letter-spacing: -.02em; line-height: 1.25; }
.tile span { color: var(--soft); font-size: 12.5px; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 16px;
  margin-top: 14px; }
figure { margin: 0; break-inside: avoid; } figure svg { display: block; width: 100%; height: auto; margin: 6px 0 2px; }
figure svg text { font-family: inherit !important; } figcaption p { margin: 0; }
details { margin-top: 8px; } summary { cursor: pointer; color: var(--soft); font-size: 13px; }
.scroll { overflow: auto; max-height: 340px; margin-top: 8px; } .scroll.whole { max-height: none; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: right; padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; white-space: normal; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.facts td:first-child { color: var(--soft); width: 15em; }
.model { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: inherit; }
.prompt { border-left: 3px solid var(--blue); padding-left: 12px; margin: 0 0 14px; font-weight: 550; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 14px 26px; }
.sample { margin-top: 14px; break-inside: avoid; }
.pair h3 { color: var(--soft); font-weight: 500; font-size: 13px; min-height: 26px; } .answer { margin-top: 8px; }
.chip { display: inline-block; font-size: 12px; padding: 0 8px; border-radius: 99px; border: 1px solid var(--line);
  color: var(--soft); margin: 0 6px 4px 0; } .chip.up { color: var(--green); } .chip.down { color: var(--red); }
.chip.warn { color: var(--amber); }
.bar { width: 150px; height: 14px; display: block; }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; overflow: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 10px 0 0; }
.problem { border-color: var(--amber); margin-top: 14px; } .problem p { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 24px 14px 60px; } .pair { grid-template-columns: 1fr; }
  .bar { width: 80px; } }
@media print { :root { --ink: #000; --soft: #555; --line: #ccc; --paper: #fff; --card: #fff; --wash: #fff;
  --blue: #2f62d9; --green: #16875b; --amber: #b97800; --red: #c8323a; --violet: #7a4ed6; }
  main { padding: 0; max-width: none; } .charts { grid-template-columns: 1fr 1fr; } .scroll { max-height: none; }
  .card { border-radius: 0; } details:not([open]) { display: none; } }
"""
