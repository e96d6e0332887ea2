// Voting: one pair on the screen, the next one waiting behind it, and every vote kept here until the server has it.
import { ask, Offline, Refused, whoAmI } from "/pages/api.js";
import { asSent, select, selectedIn, showMarked, units, withMark } from "/pages/marks.js";
import { showImage, showMarkdown, showText, visible } from "/pages/text.js";

const BLIND_MS = 400; // what is pressed right after a pair appears was meant for the one before
const UNDO_MS = 60000;
const WARN_S = 15;
const RENEW_MS = 45000; // who marks needs longer
const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", 0: "tie", ArrowDown: "tie",
  b: "both_bad", s: "skip", u: "undo", Backspace: "undo" };
const SAID = { left: "Answer 1 it is", right: "Answer 2 it is", tie: "Equal", both_bad: "Both bad", skip: "Skipped" };

const $ = (id) => document.getElementById(id);
const MARKS = { g: "good", x: "bad", Delete: "none" };
const STEPS = { ArrowLeft: ["word", -1], ArrowRight: ["word", 1], ArrowUp: ["sentence", -1], ArrowDown: ["sentence", 1] };
const markButtons = [...document.querySelectorAll("[data-mark]")];
const buttons = Object.fromEntries([...document.querySelectorAll("[data-act]")].map((b) => [b.dataset.act, b]));
const tab = crypto.getRandomValues(new Uint32Array(2)).join("-");

let me = null;
let current = null; // {lease, prompt, ..., until, shown: ms or 0}
let upcoming = []; // leased too, next one first
let last = null; // {pair, outcome, at}: what undo takes back
let stopped = false; // signed out, or another tab goes on
let offline = false;
let retryAt = 0;
let today = 0;
let openItems = null;
let note = ""; // what the status line says when nothing more urgent is to be said
let blindUntil = 0;

// ---- Votes that the server may not have yet, one entry each, so that tabs cannot overwrite each other's.

const memory = new Map();
const prefix = () => `rlhf.vote.${me.id}.`;
function keep(lease, vote) {
  try {
    localStorage.setItem(prefix() + lease, JSON.stringify(vote));
  } catch {
    memory.set(prefix() + lease, JSON.stringify(vote)); // storage is off or full: this tab still remembers
  }
}
function forget(lease) {
  memory.delete(prefix() + lease);
  try {
    localStorage.removeItem(prefix() + lease);
  } catch { /* storage is off */ }
}
function waiting() {
  const found = new Map(memory);
  try {
    for (let i = 0; i < localStorage.length; i++) found.set(localStorage.key(i), localStorage.getItem(localStorage.key(i)));
  } catch { /* storage is off */ }
  const votes = [];
  for (const [key, value] of found) {
    if (!key.startsWith(prefix())) continue;
    try {
      votes.push({ lease: key.slice(prefix().length), ...JSON.parse(value) });
    } catch {
      forget(key.slice(prefix().length));
    }
  }
  return votes.sort((a, b) => a.at - b.at);
}

// ---- Pairs survive a reload of this tab.

function remember() {
  try {
    sessionStorage.setItem("rlhf.pairs", JSON.stringify({ me: me.id, pairs: current ? [current, ...upcoming] : upcoming }));
  } catch { /* then a reload fetches another pair */ }
}
function recall() {
  try {
    const kept = JSON.parse(sessionStorage.getItem("rlhf.pairs"));
    const answered = new Set(waiting().map((vote) => vote.lease));
    if (kept?.me === me.id) return kept.pairs.filter((pair) => !answered.has(pair.lease));
  } catch { /* nothing usable */ }
  return [];
}

// ---- Talking to the server

let sending = null;
function send() {
  sending ??= (async () => {
    await null; // an async function that never waits is over before its promise is kept
    try {
      for (const vote of waiting()) await sendOne(vote);
    } finally {
      sending = null;
    }
  })();
  return sending;
}
async function sendOne({ lease, outcome, response_ms, segments }, again = false) {
  try {
    await ask("POST", `/vote/${encodeURIComponent(lease)}`, { outcome, response_ms, segments }, { keepalive: true });
    if (outcome !== "skip") today += 1;
  } catch (error) {
    if (!(error instanceof Refused) || [401, 408, 429].includes(error.status) || error.status >= 500) throw error;
    if (error.status === 403 && !again) return renewSession(() => sendOne({ lease, outcome, response_ms, segments }, true));
    if (error.status === 410) say("That pair had gone back before your vote arrived; it is kept but does not count.", "warn");
    else if (error.status !== 409) say(`A vote was refused: ${error.message}.`, "bad"); // 409: it was there already
    if (last?.pair.lease === lease) last = null;
  }
  forget(lease);
}

// Signing in again, in another tab, gives the session another token; as somebody else, these votes are not theirs.
async function renewSession(then) {
  const now = await whoAmI();
  if (now === null) throw new Refused(401, "not signed in", 5);
  if (now.id !== me.id) return location.reload();
  return then();
}

let filling = null;
function fill() {
  filling ??= (async () => {
    try {
      await send(); // before asking for more: the server takes a pair for abandoned when newer ones are asked for
      while (!stopped && upcoming.length < 1) {
        const pair = await ask("POST", "/vote/lease");
        if (pair === null) break;
        if (current?.lease === pair.lease || waiting().some((vote) => vote.lease === pair.lease)) break;
        upcoming.push(timed(pair));
        [pair.left, pair.right].forEach((path) => { if (pair.kind === "image") new Image().src = path; });
        if (!current) next();
      }
      reached();
      if (!current && !stopped) rest("Nothing to vote on right now", "New pairs appear here by themselves.");
      remember();
    } catch (error) {
      failed(error);
    } finally {
      filling = null;
      render();
    }
  })();
  return filling;
}
const timed = (pair) => ({ ...pair, until: Date.now() + pair.secondsLeft * 1000, shown: 0, marks: { left: [], right: [] }, marksBefore: [] });

function reached() {
  if (offline) say("Back online. Everything is kept.");
  offline = false;
  retryAt = 0;
}
function failed(error) {
  if (error instanceof Refused && error.status === 401) return signedOut();
  if (!(error instanceof Offline || error instanceof Refused)) throw error;
  offline = error instanceof Offline;
  const waitS = offline ? 3 : error.waitS;
  if (!offline) say(`The server is busy (${error.message}); trying again in ${waitS} s.`, "warn");
  retryAt = Date.now() + waitS * 1000;
  if (!current && !stopped) rest(offline ? "Offline" : "One moment", "This page goes on by itself.");
}

async function countProgress() {
  const since = Math.floor(new Date().setHours(0, 0, 0, 0) / 1000);
  const progress = await ask("GET", `/vote/progress?since=${since}`);
  today = progress.votes;
  openItems = progress.open_items;
}

// ---- What happens

function next() {
  current = null;
  while (upcoming.length && !current) {
    const pair = upcoming.shift();
    if (pair.until > Date.now()) current = pair;
  }
  if (current) show(current);
  else rest("One moment", "Fetching a pair.");
  remember();
}

function act(what) {
  if (what === "undo" && current?.marksBefore?.length) return unmark();
  if (stopped || Date.now() < blindUntil) return;
  if (what === "undo") return void undo();
  if (!current) return;
  if (current.until <= Date.now()) return lost();
  const pair = current;
  const response_ms = Math.max(0, Math.round(Date.now() - pair.shown));
  keep(pair.lease, { outcome: what, response_ms, segments: pair.segments ? asSent(pair) : undefined, at: Date.now() });
  last = { pair, outcome: what, at: Date.now() };
  say(`${SAID[what]}.`);
  next();
  void fill();
  render();
}

let undoing = false;
async function undo() {
  if (!last || undoing || Date.now() - last.at > UNDO_MS) return;
  undoing = true;
  const { pair, outcome } = last;
  last = null;
  render();
  try {
    await filling;
    if (sending) await sending.catch(() => undefined);
    let again = pair;
    if (waiting().some((vote) => vote.lease === pair.lease)) forget(pair.lease);
    else {
      again = { ...timed(await ask("POST", `/vote/${encodeURIComponent(pair.lease)}/undo`)), marks: pair.marks };
      if (outcome !== "skip") today = Math.max(0, today - 1);
    }
    if (current) upcoming.unshift(current);
    current = again;
    show(current);
    say("Taken back. Vote again.");
    remember();
  } catch (error) {
    if (error instanceof Refused && error.status !== 401) say(`Not taken back: ${error.message}.`, "warn");
    else if (error instanceof Offline) {
      last = { pair, outcome, at: Date.now() - UNDO_MS / 2 };
      say("Offline: try again once the connection is back.", "warn");
    } else failed(error);
  } finally {
    undoing = false;
    render();
  }
}

function lost() {
  say("That pair went back after its time and is somebody else's now. Here is another.", "warn");
  next();
  void fill();
  render();
}

async function renew(pair) {
  try {
    const { secondsLeft } = await ask("POST", `/vote/${encodeURIComponent(pair.lease)}/renew`);
    pair.until = Date.now() + secondsLeft * 1000;
    remember();
  } catch (error) {
    if (error instanceof Refused && [404, 410].includes(error.status) && pair === current) lost();
  }
}

// ---- Marks in the answers, where they are asked for

const MOST_MARKS = 64;
let picked = null; // {side, start, end}: what is selected
let held = null; // the same when a button was touched: some browsers drop the selection by that
let keyboardSide = null; // the answer that arrows select in

function pick() {
  picked = null;
  if (current?.segments) {
    for (const side of ["left", "right"]) {
      const span = selectedIn($(side), current[side]);
      if (span) picked = { side, ...span };
    }
  }
  const marked = picked && current.marks[picked.side].some((m) => m.start < picked.end && m.end > picked.start);
  for (const button of markButtons) button.disabled = !picked || (button.dataset.mark === "none" && !marked);
  const words = picked ? visible(current[picked.side].slice(picked.start, picked.end)) : "";
  const short = words.length > 60 ? `${words.slice(0, 59)}\u2026` : words;
  const hint = keyboardSide ? "Arrows select, G good, X bad, M or Esc ends" : "Select words to mark (optional)";
  $("picked").textContent = picked ? `\u201c${short}\u201d` : hint;
}
function mark(what, span = picked) {
  if (!span || !current) return;
  const before = current.marks;
  const marks = withMark(before[span.side], span, { good: true, bad: false, none: null }[what]);
  if (marks.length + before[span.side === "left" ? "right" : "left"].length > MOST_MARKS) return say(`No more than ${MOST_MARKS} marks.`, "warn");
  current.marksBefore.push(before);
  current.marks = { ...before, [span.side]: marks };
  say({ good: "Marked as good.", bad: "Marked as bad.", none: "Unmarked." }[what]);
  remarked(span);
}
function unmark() {
  current.marks = current.marksBefore.pop();
  say("Mark taken back.");
  remarked(picked);
}
function remarked(span) {
  for (const side of ["left", "right"]) showMarked($(side), current[side], current.marks[side]);
  if (keyboardSide && span) select($(span.side), current[span.side], span);
  else getSelection().removeAllRanges();
  pick();
  remember();
  if (current.until - Date.now() < RENEW_MS) void renew(current);
  render();
}
function selectByKeyboard() {
  keyboardSide = keyboardSide === null ? "left" : keyboardSide === "left" ? "right" : null;
  getSelection().removeAllRanges();
  if (keyboardSide && !$("more").hidden) { fold($("more"), true); fit(); }
  picked = null;
  if (keyboardSide) step("word", 1, false);
  pick();
}
function step(granularity, way, extend) {
  const text = current[keyboardSide];
  const all = units(text, granularity);
  const from = picked?.side === keyboardSide ? picked : { start: 0, end: 0 };
  const to = way > 0 ? all.find((unit) => unit.start >= from.end) : all.findLast((unit) => unit.end <= from.start);
  if (to) select($(keyboardSide), text, extend ? { start: Math.min(from.start, to.start), end: Math.max(from.end, to.end) } : to);
}
// True where the key was one for marking.
function markKey(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  pick(); // the browser tells of a selection a little later
  if (key === "m") selectByKeyboard();
  else if (MARKS[key]) mark(MARKS[key]);
  else if (keyboardSide && STEPS[key]) step(...STEPS[key], event.shiftKey);
  else if (keyboardSide && key === "Escape") {
    keyboardSide = null;
    getSelection().removeAllRanges();
  } else return false;
  return true;
}

// ---- The screen

function show(pair) {
  const before = pair.shown;
  pair.shown ||= Date.now();
  blindUntil = Date.now() + BLIND_MS;
  stopResting();
  showText($("instruction"), pair.instruction);
  showText($("prompt"), pair.prompt);
  $("context").replaceChildren();
  for (const path of pair.contextImages) {
    const holder = document.createElement("span");
    showImage(holder, path, "Part of the prompt");
    $("context").append(holder);
  }
  for (const [side, name] of [["left", "Answer 1"], ["right", "Answer 2"]]) {
    const html = pair[`${side}Html`];
    $(side).classList.toggle("markdown", html !== undefined);
    if (pair.kind === "image") showImage($(side), pair[side], name);
    else if (html !== undefined) showMarkdown($(side), html);
    else if (pair.segments) showMarked($(side), pair[side], pair.marks[side]);
    else showText($(side), pair[side]);
  }
  $("marking").hidden = $("help-marks").hidden = !pair.segments;
  keyboardSide = null;
  getSelection().removeAllRanges();
  pick();
  fold($("more"), false);
  fold($("prompt-more"), false);
  fit();
  $("pair").classList.remove("fresh");
  void $("pair").offsetWidth; // starts the animation anew
  $("pair").classList.add("fresh");
  window.scrollTo(0, 0);
  if (!before && pair.until - Date.now() < 1000 * (pair.secondsLeft - 2)) void renew(pair); // it was waiting
}

// Long texts are folded on both sides alike, so that neither looks shorter than it is.
function fit() {
  if (!current) return;
  const open = $("more").getAttribute("aria-expanded") === "true";
  $("pair").classList.add("short");
  const cut = ["left", "right"].map((side) => $(side).scrollHeight > $(side).clientHeight + 24);
  $("more").hidden = !cut.some(Boolean);
  $("pair").classList.toggle("short", !open && cut.some(Boolean));
  ["left", "right"].forEach((side, i) => $(side).parentElement.classList.toggle("cut", !open && cut[i]));
  $("prompt").classList.add("short");
  const promptCut = $("prompt").scrollHeight > $("prompt").clientHeight + 8;
  $("prompt-more").hidden = !promptCut;
  $("prompt").classList.toggle("short", promptCut && $("prompt-more").getAttribute("aria-expanded") !== "true");
  const [top, bottom] = [$("instruction").parentElement.offsetHeight, $("answers").offsetHeight];
  document.body.classList.toggle("packed", bottom > 0.45 * window.innerHeight);
  document.body.classList.toggle("cramped", top + bottom > 0.75 * window.innerHeight);
  const scrolls = promptCut && !$("prompt").classList.contains("short");
  if (scrolls) $("prompt").tabIndex = 0; else $("prompt").removeAttribute("tabindex");
}
function fold(button, open) {
  button.setAttribute("aria-expanded", String(open));
  const [all, less] = button === $("more") ? ["Show more of both", "Show less of both"] : ["Show the whole prompt", "Show less of the prompt"];
  button.textContent = open ? less : all;
}

let restAction = null;
function rest(title, text, label = "", action = null) {
  current = null;
  $("rest-title").textContent = title;
  $("rest-text").textContent = text;
  $("rest-action").textContent = label;
  $("rest-action").hidden = !label;
  restAction = action;
  $("rest").hidden = false;
  $("voting").hidden = true;
  $("answers").hidden = !last || stopped;
}
function stopResting() {
  $("rest").hidden = true;
  $("voting").hidden = false;
  $("answers").hidden = false;
}
function signedOut() {
  stopped = true;
  rest("You are not signed in", "Follow the link you were sent, or ask for a new one. Votes that wait here are sent once you are back.",
    "Sign in with a secret", () => location.assign("/login"));
}
function elsewhere() {
  stopped = true;
  rest("Voting goes on in another tab", "One tab at a time, so that no pair waits in two of them.", "Vote here", () => location.reload());
}

let saidClass = "";
function say(text, kind = "") {
  note = text;
  saidClass = kind;
}
function render() {
  const votes = me ? waiting().length : 0;
  const left = current ? Math.ceil((current.until - Date.now()) / 1000) : Infinity;
  let text = note;
  let kind = saidClass;
  if (offline) [text, kind] = [`Offline, ${votes} ${votes === 1 ? "vote" : "votes"} waiting`, "warn"];
  else if (left <= WARN_S && !stopped) [text, kind] = [`This pair goes back in ${WARN_S} s or less`, "warn"];
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").className = `status ${kind || "soft"}`;
  const undoable = current?.marksBefore?.length > 0 || (last !== null && Date.now() - last.at <= UNDO_MS);
  buttons.undo.disabled = !undoable;
  for (const what of ["left", "right", "tie", "both_bad", "skip"]) buttons[what].disabled = !current;
  if (me && openItems !== null) $("progress").textContent = `${today} today, ${openItems} open`;
}

// ---- What may happen to the page

for (const [what, button] of Object.entries(buttons)) button.addEventListener("click", () => act(what));
for (const button of markButtons) {
  button.addEventListener("pointerdown", () => { held = picked; });
  button.addEventListener("mousedown", (event) => event.preventDefault()); // the selection stays
  button.addEventListener("click", () => { mark(button.dataset.mark, held ?? picked); held = null; });
}
document.addEventListener("selectionchange", pick);
$("more").addEventListener("click", () => { fold($("more"), $("more").getAttribute("aria-expanded") !== "true"); fit(); });
$("prompt-more").addEventListener("click", () => { fold($("prompt-more"), $("prompt-more").getAttribute("aria-expanded") !== "true"); fit(); });
$("rest-action").addEventListener("click", () => restAction?.());
$("help-open").addEventListener("click", () => $("help").showModal());
$("help-close").addEventListener("click", () => $("help").close());
$("picture-close").addEventListener("click", () => $("picture").close());
$("sign-out").addEventListener("click", async () => {
  await ask("DELETE", "/session");
  $("help").close();
  signedOut();
  render();
});
document.addEventListener("click", (event) => {
  const touched = event.target.closest("#pair mark"); // to change or remove it
  if (touched && getSelection().isCollapsed) return getSelection().selectAllChildren(touched);
  if (event.target.tagName !== "IMG" || !event.target.closest("#voting")) return;
  $("picture-image").src = event.target.src;
  $("picture-image").alt = event.target.alt;
  $("picture").showModal();
});
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input, textarea, select, [tabindex]")) return;
  if (event.key === "?") return $("help").showModal();
  if (current?.segments && markKey(event)) return event.preventDefault();
  const what = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!what || $("answers").hidden) return;
  event.preventDefault();
  act(what);
});
window.addEventListener("resize", fit);
window.addEventListener("online", () => { retryAt = 0; void fill(); });
window.addEventListener("offline", () => { offline = true; render(); });
window.addEventListener("storage", (event) => {
  if (event.key === "rlhf.tab" && event.newValue && event.newValue !== tab) { elsewhere(); render(); }
});
document.addEventListener("visibilitychange", tick);

let ticks = 0;
function tick() {
  if (stopped || !me || document.hidden) return;
  if (current && current.until <= Date.now()) lost();
  const idle = upcoming.length === 0 || waiting().length > 0;
  ticks += 1;
  if (idle && Date.now() >= retryAt && (offline || waiting().length > 0 || ticks % (current ? 8 : 2) === 0)) void fill();
  if (ticks % 20 === 0 && !offline) countProgress().catch(() => undefined).then(render);
  render();
}

async function start() {
  try {
    me = await whoAmI();
  } catch {
    rest("No connection", "This page goes on by itself.");
    setTimeout(start, 3000);
    return;
  }
  if (me === null) return signedOut();
  if (me.role !== "rater") {
    stopped = true;
    return rest("Signed in as owner", "Owners look on; people who vote have a link of their own.", "To the owner's page", () => location.assign("/owner"));
  }
  try {
    localStorage.setItem("rlhf.tab", tab);
  } catch { /* storage is off; then there is one tab as far as we know */ }
  setInterval(tick, 1000);
  upcoming = recall();
  if (upcoming.length) {
    const had = upcoming.length;
    upcoming.forEach((pair) => { pair.shown = 0; });
    next();
    if (!current) say(`${had === 1 ? "A pair" : "The pairs"} you had open went back after ${had === 1 ? "its" : "their"} time. Here is another.`, "warn");
  }
  await countProgress().catch(failed);
  await fill();
  render();
}
void start();
