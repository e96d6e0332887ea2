// The owner's page: figures that renew themselves in place, and one group at a time. It changes nothing anywhere.
import { ask, Offline, Refused, whoAmI } from "/pages/api.js";
import { showImage, showText, visible } from "/pages/text.js";

const EVERY_MS = 3000;
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
let chosen = null; // the group on the page
let drawn = ""; // as it was drawn last

const dash = "\u2013";
const percent = (part) => (part === null || part === undefined ? dash : `${Math.round(100 * part)} %`);
const seconds = (s) => (s === null || s === undefined ? dash : s < 90 ? `${s.toFixed(s < 10 ? 1 : 0)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);
const number = (x) => (Number.isInteger(x) ? String(x) : x.toFixed(1));
const oneLine = (text) => visible(text).replace(/\s+/g, " ").trim();

function element(tag, className = "", text = null) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== null) made.textContent = text;
  return made;
}
function line(className, from, to, width) {
  const made = document.createElementNS(SVG, "line");
  for (const [name, value] of Object.entries({ class: className, x1: from, x2: to, y1: 8, y2: 8, "stroke-width": width })) made.setAttribute(name, value);
  return made;
}

// Bring the children of `parent` to `rows` of [key, cells], touching only what is different, so that nothing flickers.
function renew(parent, rows, make, fill) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  rows.forEach((row, i) => {
    let child = known.get(row.key);
    known.delete(row.key);
    if (!child) {
      child = make(row);
      child.dataset.key = row.key;
    }
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] ?? null);
    fill(child, row);
  });
  known.forEach((child) => child.remove());
}
function set(node, text, className) {
  if (node.textContent !== text) node.textContent = text;
  if (className !== undefined && node.className !== className) node.className = className;
}

function tiles(parent, rows) {
  renew(parent, rows.map(([name, value, note]) => ({ key: name, value, note })), (row) => {
    const tile = element("div", "card tile");
    tile.append(element("b"), element("span", "", row.key), element("span"));
    return tile;
  }, (tile, row) => {
    set(tile.children[0], row.value);
    set(tile.children[2], row.note ?? "");
  });
}
function cells(row, values) {
  values.forEach(([text, className], i) => {
    const cell = row.children[i] ?? row.appendChild(element("td"));
    set(cell, text, className ?? "");
  });
}

function showBoard(board) {
  const { items, votes, agreement, responseS, itemS } = board;
  const open = (items.Pending ?? 0) + (items.Running ?? 0);
  tiles($("tiles"), [
    ["groups open", number(open), `${board.pairsInHands} pairs in hands`],
    ["groups complete", number(items.Completed ?? 0), ""],
    ["ended short of votes", number(items.Incomplete ?? 0), items.Stopped ? `${items.Stopped} stopped` : ""],
    ["votes that count", number(votes.counted), `${votes.skipped} skipped, ${votes.late} late, ${votes.undone} undone`],
    ["votes in the last minute", number(board.votesPerMinute), ""],
    ["time per vote, median", seconds(responseS.p50), `95 % within ${seconds(responseS.p95)}`],
    ["time per group, median", seconds(itemS.p50), `95 % within ${seconds(itemS.p95)}`],
  ]);
  pace(board.perMinute);
  tiles($("agreement"), [
    ["Krippendorff's alpha", agreement.alpha === null ? "undefined" : agreement.alpha.toFixed(2), "1 agreement, 0 chance"],
    ["same answer on a pair", percent(agreement.observed), `${agreement.pairs} pairs with two votes`],
    ["expected by the ranking", percent(agreement.expected), "if raters differ by chance alone"],
  ]);
  set($("agreement-note"), "Near-equal answers bring agreement down without anybody's fault; compare the last two.");
  const raters = board.raters.filter((rater) => rater.votes || rater.active).sort((a, b) => b.votes - a.votes);
  renew($("raters"), raters.slice(0, 200).map((rater) => ({ ...rater, key: rater.id })), () => element("tr"), raterRow);
  const hidden = raters.length > 200 ? ` ${raters.length - 200} more with fewer votes.` : "";
  set($("raters-note"), `Figures to look at; no vote is weighted by any of them.${hidden}`);
  renew($("items"), board.latest.map((item) => ({ ...item, key: item.id })), itemRow, fillItem(board.now));
}

function raterRow(row, rater) {
  const tooOneSided = rater.left_share !== null && rater.left_p_value < 0.001;
  const gold = rater.gold_total ? `${rater.gold_right} of ${rater.gold_total}` : dash;
  const goldBad = rater.gold_total >= 10 && rater.gold_right / rater.gold_total < 0.75;
  const name = oneLine(rater.name) + (rater.simulated ? " (simulated)" : "") + (rater.active ? "" : " (revoked)");
  cells(row, [
    [name, "name"], [number(rater.votes)], [number(rater.skipped)], [number(rater.late)],
    [goldBad ? `${gold}, low` : gold, goldBad ? "bad" : ""],
    [tooOneSided ? `${percent(rater.left_share)}, one-sided` : percent(rater.left_share), tooOneSided ? "warn" : ""],
    [number(rater.fast), rater.fast > 3 ? "warn" : ""], [seconds(rater.response_p50_s)],
    [rater.last_vote ? new Date(rater.last_vote).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : dash],
  ]);
}

function itemRow(item) {
  const row = element("tr");
  const cell = element("td", "name");
  const button = element("button", "plain");
  button.type = "button";
  button.addEventListener("click", () => void choose(item.id));
  cell.append(button);
  row.append(cell, ...Array.from({ length: 5 }, () => element("td")));
  row.children[1].className = "name";
  return row;
}
const fillItem = (now) => (row, item) => {
  set(row.firstChild.firstChild, oneLine(item.prompt) || "(no prompt)");
  row.className = item.id === chosen ? "open" : "";
  const values = [item.state, `${item.votes} of ${item.desired}`, number(item.live), number(item.size), `${seconds(Math.max(0, now - item.created_at))} ago`];
  values.forEach((value, i) => set(row.children[i + 1], value));
};

function pace(perMinute) {
  const most = Math.max(1, ...perMinute);
  const text = `Votes per minute, last hour; at most ${Math.max(...perMinute)}`;
  set($("pace").querySelector("figcaption"), text);
  let svg = $("pace").querySelector("svg");
  if (!svg) {
    svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${perMinute.length * 10} 64`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    perMinute.forEach((_, i) => {
      const bar = document.createElementNS(SVG, "rect");
      bar.setAttribute("x", i * 10 + 1);
      bar.setAttribute("width", 8);
      bar.setAttribute("rx", 1.5);
      svg.append(bar);
    });
    $("pace").append(svg);
  }
  svg.setAttribute("aria-label", text);
  perMinute.forEach((count, i) => {
    const height = count ? Math.max(2, (60 * count) / most) : 1;
    svg.children[i].setAttribute("height", height);
    svg.children[i].setAttribute("y", 64 - height);
  });
}

async function choose(id) {
  chosen = id;
  drawn = "";
  await showGroup();
  $("group").scrollIntoView({ block: "start" });
  $("group-title").focus({ preventScroll: true });
}
async function showGroup() {
  const group = await ask("GET", `/owner/groups/${encodeURIComponent(chosen)}`);
  const now = JSON.stringify(group);
  if (now === drawn) return;
  drawn = now;
  $("group").hidden = false;
  const body = document.createDocumentFragment();
  body.append(element("p", "soft", `${group.state}, goal ${group.goal}: ${group.votes} votes of ${group.min} to ${group.max} (${group.desired} desired), ${group.late} late, ${group.undone} undone`));
  const instruction = element("p", "text soft");
  instruction.dir = "auto";
  showText(instruction, group.instruction);
  const prompt = element("div", "prompt text");
  prompt.dir = "auto";
  showText(prompt, group.prompt);
  body.append(instruction, prompt);
  for (const path of group.contextImages) {
    const holder = element("span");
    showImage(holder, path, "Part of the prompt");
    body.append(holder);
  }
  const reach = Math.max(1, ...group.completions.map((c) => Math.max(Math.abs(c.low), Math.abs(c.high))));
  const scale = (score) => 50 + (48 * score) / reach;
  group.completions.forEach((completion, i) => {
    const row = element("div", "rank");
    const text = element("div", "text");
    text.dir = "auto";
    if (completion.image) showImage(text, completion.shown, `Answer ${completion.place}`);
    else showText(text, completion.shown);
    const figures = element("div", "figures");
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 100 16");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `score ${completion.score.toFixed(2)}, 95 % interval ${completion.low.toFixed(2)} to ${completion.high.toFixed(2)}`);
    svg.append(line("line", 0, 100, 1), line("line", 49.7, 50.3, 16), line("band", scale(completion.low), scale(completion.high), 7), line("dot", scale(completion.score) - 0.8, scale(completion.score) + 0.8, 13));
    const words = element("span", "soft", `${completion.score.toFixed(2)} (${completion.low.toFixed(2)} to ${completion.high.toFixed(2)}), best ${percent(completion.pBest)}, ${number(completion.votes)} votes`);
    figures.append(svg, words);
    for (const flag of completion.flags) figures.append(element("span", "chip warn", flag.replaceAll("_", " ")));
    row.append(element("b", "", String(i + 1)), text, figures);
    body.append(row);
  });
  body.append(matrix(group));
  $("group-body").replaceChildren(body);
}
function matrix(group) {
  const holder = element("details");
  holder.open = $("group-body").querySelector("details")?.open ?? false;
  holder.append(element("summary", "soft", "Votes: row preferred over column"));
  const table = element("table", "matrix");
  const head = element("tr");
  head.append(element("th"), ...group.matrix.map((_, j) => element("th", "", String(j + 1))));
  table.append(head);
  group.matrix.forEach((wins, i) => {
    const row = element("tr");
    row.append(element("th", "", String(i + 1)), ...wins.map((count, j) => element("td", "", i === j ? "" : number(count))));
    table.append(row);
  });
  const scroll = element("div", "scroll");
  scroll.append(table);
  holder.append(scroll);
  return holder;
}

function rest(title, text, link) {
  $("board").hidden = true;
  $("sign-out").hidden = true;
  $("rest").hidden = false;
  $("rest-title").textContent = title;
  $("rest-text").textContent = text;
  $("rest-link").hidden = !link;
}

async function refresh() {
  if (document.hidden) return;
  try {
    showBoard(await ask("GET", "/owner/board"));
    if (chosen) await showGroup();
    $("rest").hidden = true;
    $("board").hidden = false;
    $("sign-out").hidden = false;
    set($("fresh"), "", "soft");
  } catch (error) {
    if (error instanceof Refused && error.status === 401) return rest("Not signed in", "This page is for the owner of the votes.", true);
    if (error instanceof Refused && error.status === 403) return rest("Not for this account", "You are signed in to vote; this page is for the owner of the votes.", true);
    if (!(error instanceof Offline || error instanceof Refused)) throw error;
    set($("fresh"), error instanceof Offline ? "no connection, figures are old" : `busy: ${error.message}`, "warn");
  }
}
async function again() {
  try {
    await refresh();
  } finally {
    setTimeout(again, EVERY_MS);
  }
}

$("sign-out").addEventListener("click", async () => {
  await whoAmI();
  await ask("DELETE", "/session");
  rest("Signed out", "", true);
});
document.addEventListener("visibilitychange", () => void refresh());
void again();
