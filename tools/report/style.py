"""The look of the report: one style sheet and one small script, both inside the page.

Wide tables scroll in their cards, so the page itself never scrolls sideways; a chart's column is at least NARROWEST
pixels wide, so the text on it is never below 11 pixels (tools/charts.py), also on a telephone.
"""

from ..charts import FONT

NARROWEST = 320  # pixels of a chart's column, of which its card's padding takes 30
PHONE = 600  # pixels below which the page's margins shrink

STYLE = (
    """
:root { color-scheme: light dark;
  --bg:#f6f5f1; --card:#fffefb; --ink:#22242a; --soft:#6d6f78; --rule:#e4e2da; --heat:214,72,12;
  --edge:rgba(60,55,40,.2);
  --c0:#2f6fb2; --c1:#d2691e; --c2:#2a8f62; --c3:#a64d9c; --c4:#a97c0a; --c5:#2b928c; --c6:#8a5a44; --c7:#7a7d87;
  --good:#207d54; --bad:#b83f2f; }
@media (prefers-color-scheme: dark) { :root {
  --bg:#15171c; --card:#1d2027; --ink:#e8e6e1; --soft:#9a9ca6; --rule:#31353f; --heat:255,120,40;
  --edge:rgba(0,0,0,.75);
  --c0:#6ea8e0; --c1:#f0954f; --c2:#5cc493; --c3:#cf86c6; --c4:#dfb54a; --c5:#66cdc6; --c6:#c0917a; --c7:#a3a6b0;
  --good:#5cc493; --bad:#ea8072; } }
* { box-sizing:border-box }
body { margin:0; background:var(--bg); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1228px; margin:0 auto; padding:36px 24px 80px }
h1 { font-size:30px; line-height:1.2; margin:0; letter-spacing:-.02em; overflow-wrap:anywhere }
h2 { font-size:21px; margin:52px 0 8px; letter-spacing:-.01em } h3 { font-size:16px; margin:30px 0 10px }
.sub { color:var(--soft); margin:4px 0 18px; max-width:860px; overflow-wrap:anywhere }
.tiles + .sub { margin-top:10px; font-size:13px }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(165px,1fr)); gap:14px }
.card,figure { background:var(--card); border:1px solid var(--rule); border-radius:10px; margin:0; min-width:0 }
.card { overflow-x:auto; --cover:var(--card),var(--card); --shade:var(--edge),transparent; background:
  linear-gradient(90deg,var(--cover)) 0 0/24px 100% no-repeat local,
  linear-gradient(90deg,var(--cover)) 100% 0/24px 100% no-repeat local,
  linear-gradient(90deg,var(--shade)) 0 0/12px 100% no-repeat,
  linear-gradient(270deg,var(--shade)) 100% 0/12px 100% no-repeat,var(--card) }
 .card>h3 { margin:14px 14px 4px; font-size:14.5px }
.card>p { margin:6px 14px 12px; color:var(--soft); font-size:12.5px }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr)); gap:14px; margin-top:14px;
  align-items:start }
.tile { padding:14px 16px } .tile span { color:var(--soft); font-size:13px }
.tile b { display:block; font-size:25px; font-weight:620; letter-spacing:-.02em; font-variant-numeric:tabular-nums }
.tile small { color:var(--soft); font-variant-numeric:tabular-nums }
.charts { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,NARROWESTpx),1fr)); gap:14px;
  margin-top:14px }
figure { padding:14px 14px 10px } figure h3 { margin:0; font-size:14.5px; font-weight:620; overflow-wrap:anywhere }
figure p { margin:1px 0 6px; color:var(--soft); font-size:12.5px }
svg { display:block; width:100%; max-width:440px; overflow:visible } svg.intervals { width:160px }
.grid { stroke:var(--rule) } .axis { stroke:var(--soft); opacity:.6 }
.diagonal { stroke:var(--soft); opacity:.5; stroke-dasharray:3 4 }
.bubble { fill:var(--fill); fill-opacity:.5; stroke:var(--fill); stroke-width:1.2 }
.tick { fill:var(--soft); font-size:FONTpx; font-variant-numeric:tabular-nums }
.line { fill:none; stroke-width:2; stroke-linejoin:round; stroke-linecap:round }
.raw { fill:none; stroke-width:1; opacity:.3 }
.wait { fill:var(--card); stroke:var(--soft); stroke-width:.7 }
.area { opacity:.82 } .band { opacity:.16 } .cursor { stroke:var(--ink); opacity:0; stroke-dasharray:2 3 }
.legend { display:flex; flex-wrap:wrap; gap:2px 14px; margin-top:8px; font-size:12.5px; color:var(--soft) }
.legend b { color:var(--ink); font-weight:600; font-variant-numeric:tabular-nums }
.legend .item { overflow-wrap:anywhere; min-width:0 } .spike { flex-basis:100% } .spike>span { color:var(--key) }
.key { display:inline-block; width:12px; height:4px; border-radius:2px; background:var(--key); margin-right:5px;
  vertical-align:middle }
.key.wait { height:8px; background:none; border:1px solid var(--soft) }
.key.dashed { background:none; height:0; border-top:2px dashed var(--key); border-radius:0 }
table { border-collapse:collapse; width:100%; font-size:14px } td,th { padding:6px 14px; text-align:left }
th { color:var(--soft); font-weight:500 } tr+tr>* { border-top:1px solid var(--rule) }
tr+tr th { color:var(--ink); font-weight:450; white-space:nowrap }
td.n,th.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap } td small { color:var(--soft) }
td.vote,td.line { white-space:nowrap } td.text { min-width:150px; overflow-wrap:anywhere }
.dense td,.dense th { padding:5px 9px; font-size:13.5px }
code { font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace }
.up { color:var(--good); font-weight:600 } .down { color:var(--bad); font-weight:600 }
details { margin:12px 0 } summary { cursor:pointer; font-weight:600; padding:4px 0 }
.zero summary { color:var(--soft); font-weight:450; font-size:14px }
.sample { padding:14px 18px; margin:12px 0 }
.prompt { color:var(--soft); white-space:pre-wrap; margin:0 0 10px; overflow-wrap:anywhere }
.chip { display:inline-block; border:1px solid var(--rule); border-radius:20px; padding:0 10px; font-size:12.5px;
  margin:0 6px 8px 0; color:var(--soft); overflow-wrap:anywhere }
.chip.good { color:var(--good); border-color:var(--good) } .chip.bad { color:var(--bad); border-color:var(--bad) }
.response { font:14px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; white-space:pre-wrap;
  overflow-wrap:anywhere; max-height:520px; overflow-y:auto }
.response i { font-style:normal; border-radius:3px; padding:1px 0; background:rgba(var(--heat),var(--a,0)) }
.response i:hover,.response i:focus { outline:1.5px solid var(--ink) }
.h1{--a:.08}.h2{--a:.16}.h3{--a:.24}.h4{--a:.32}.h5{--a:.41}.h6{--a:.5}.h7{--a:.59}.h8{--a:.69}.h9{--a:.8}
.nl { color:var(--soft) } .scale { padding:14px 18px; display:flex; gap:28px; flex-wrap:wrap; align-items:end }
.scale .bar { width:300px; max-width:100% } .scale .ramp { height:12px; border-radius:3px;
  background:linear-gradient(90deg,rgba(var(--heat),0),rgba(var(--heat),.8)); border:1px solid var(--rule) }
.scale .hist { display:flex; align-items:end; height:44px; gap:1px }
.scale .hist span { flex:1; background:var(--soft); opacity:.55; border-radius:2px 2px 0 0; min-height:1px }
.scale .ends { display:flex; justify-content:space-between; color:var(--soft); font-size:12px }
.scale p { margin:0; max-width:430px; color:var(--soft); font-size:13.5px }
#tip { position:fixed; z-index:9; pointer-events:none; opacity:0; background:var(--ink); color:var(--bg);
  border-radius:7px; padding:6px 10px; font-size:12.5px; line-height:1.45; white-space:pre-wrap;
  max-width:calc(100vw - 8px); overflow-wrap:anywhere; left:0; top:0;
  font-variant-numeric:tabular-nums; box-shadow:0 4px 18px rgba(0,0,0,.25) }
.config td:first-child { color:var(--soft); font-family:ui-monospace,Menlo,Consolas,monospace; font-size:13px }
.config td:last-child { overflow-wrap:anywhere }
@media (max-width:PHONEpx) { main { padding:22px 14px 60px } h1 { font-size:25px } .tile b { font-size:21px }
  .tiles { grid-template-columns:repeat(auto-fit,minmax(140px,1fr)); gap:10px } td,th { padding:6px 10px } }
""".replace("NARROWEST", str(NARROWEST))
    .replace("PHONE", str(PHONE))
    .replace("FONT", str(FONT))
)

# Crosshair at one step in every chart, a tooltip in the hovered one; entropy and probability of a token.
SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const figures = [...document.querySelectorAll("figure[data-chart]")];
function show(text, event) {
  tip.textContent = text;
  tip.style.opacity = 1;
  const x = event.clientX + 14, y = event.clientY + 14, w = tip.offsetWidth, h = tip.offsetHeight;
  tip.style.left = (x + w > innerWidth ? Math.max(4, x - w - 28) : x) + "px";
  tip.style.top = (y + h > innerHeight ? Math.max(4, y - h - 28) : y) + "px";
}
function hide() {
  tip.style.opacity = 0;
  figures.forEach(f => { f.querySelector(".cursor").style.opacity = 0; });
}
function figure(value, percent) {
  if (value === null) return "-";
  return percent ? (100 * value).toPrecision(3) + " %" : String(Number(value.toPrecision(4)));
}
function share(chart, step) {
  const steps = chart.steps, place = chart.x === "k" ? Math.log : Number;
  const first = place(steps[0]), span = place(steps[steps.length - 1]) - first;
  return span ? (place(step) - first) / span : .5;
}
function nearest(chart, fraction) {
  return chart.steps.reduce((best, step, i) => Math.abs(share(chart, step) - fraction)
    < Math.abs(share(chart, chart.steps[best]) - fraction) ? i : best, 0);
}
figures.forEach(f => {
  const svg = f.querySelector("svg"), chart = data.charts[f.dataset.chart];
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * data.width;
    const fraction = Math.min(1, Math.max(0, (x - data.left) / (data.right - data.left)));
    const index = nearest(chart, fraction), step = chart.steps[index];
    figures.forEach(g => {
      const other = data.charts[g.dataset.chart], at = share(other, step);
      const line = g.querySelector(".cursor"), where = data.left + (data.right - data.left) * at;
      line.style.opacity = other.x === chart.x && at > -.01 && at < 1.01 ? .6 : 0;
      line.setAttribute("x1", where);
      line.setAttribute("x2", where);
    });
    const title = chart.spans ? "mean of steps " + chart.spans[index].join(" to ") : chart.x + " " + step;
    const rows = chart.names.map((name, i) => name + "  " + figure(chart.values[i][index], chart.percent));
    show([title, ...rows].join("\n"), event);
  });
  svg.addEventListener("pointerleave", hide);
});
document.querySelectorAll(".response").forEach(r => {
  r.addEventListener("pointermove", event => {
    const token = event.target.closest("i");
    if (!token) return hide();
    const [entropy, probability] = token.dataset.t.split(" ");
    show(JSON.stringify(token.dataset.s || token.textContent) + "\\nentropy " + entropy + " nats\\nprobability "
      + probability, event);
  });
  r.addEventListener("pointerleave", hide);
});
"""
