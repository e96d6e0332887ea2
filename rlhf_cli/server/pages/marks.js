// Marks in an answer: what a rater finds good or bad in it. Places count UTF-16 units of the text as it was sent, until
// `asSent` turns them into code points, which every language counts alike.
import { pieces, textNodes } from "/pages/text.js";

// Show text with its marks [{start, end, good}], which are in order and do not overlap.
export function showMarked(element, text, marks) {
  const made = [];
  let from = 0;
  for (const { start, end, good } of marks) {
    const mark = document.createElement("mark");
    mark.className = good ? "liked" : "disliked";
    mark.setAttribute("aria-description", good ? "marked as good" : "marked as bad");
    mark.append(...textNodes(text.slice(start, end)));
    made.push(...textNodes(text.slice(from, start)), mark);
    from = end;
  }
  element.replaceChildren(...made, ...textNodes(text.slice(from)));
}

// The marks once `span` is marked; the newest wins where they overlap, and `good` null leaves only those around it.
export function withMark(marks, span, good) {
  if (good === null) return marks.filter((mark) => mark.end <= span.start || mark.start >= span.end);
  const cut = marks.flatMap((mark) => [
    { ...mark, end: Math.min(mark.end, span.start) },
    { ...mark, start: Math.max(mark.start, span.end) },
  ]).filter((mark) => mark.start < mark.end);
  return [...cut, { start: span.start, end: span.end, good }].sort((a, b) => a.start - b.start);
}

// What the browser's selection covers of an answer, without blanks at the ends; null where that is nothing.
export function selectedIn(element, text) {
  const selection = getSelection();
  if (!selection.rangeCount || selection.isCollapsed || !element.contains(selection.anchorNode)) return null;
  const [whole, range] = [document.createRange(), selection.getRangeAt(0)];
  whole.selectNodeContents(element);
  const before = whole.cloneRange();
  if (range.compareBoundaryPoints(Range.START_TO_START, whole) > 0) whole.setStart(range.startContainer, range.startOffset);
  if (range.compareBoundaryPoints(Range.END_TO_END, whole) < 0) whole.setEnd(range.endContainer, range.endOffset);
  before.setEnd(whole.startContainer, whole.startOffset);
  const at = before.toString().length;
  let [start, end] = [placeOf(text, at, false), placeOf(text, at + whole.toString().length, true)];
  while (start < end && /\s/.test(text[start])) start += 1;
  while (start < end && /\s/.test(text[end - 1])) end -= 1;
  return start < end ? { start, end } : null;
}

// Select a span of an answer, as a mouse would.
export function select(element, text, { start, end }) {
  const [from, to] = [start, end].map((place) => nodeAt(element, shownBefore(text, place)));
  getSelection().setBaseAndExtent(...from, ...to);
  (to[0].parentElement ?? element).scrollIntoView({ block: "nearest" });
}

// Spans of the words or sentences of a text.
export function units(text, granularity) {
  const found = Intl.Segmenter
    ? [...new Intl.Segmenter(undefined, { granularity }).segment(text)].filter((unit) => unit.isWordLike ?? unit.segment.trim())
    : [...text.matchAll(granularity === "word" ? /\S+/g : /\S[^.!?\n]*[.!?]*/g)].map((match) => ({ index: match.index, segment: match[0] }));
  return found.map(({ index, segment }) => ({ start: index, end: index + segment.trimEnd().length }));
}

// Marks of both answers as the server takes them.
export function asSent({ left, right, marks }) {
  const place = (text, at) => [...text.slice(0, at)].length;
  return [["left", left], ["right", right]].flatMap(([side, text]) => marks[side].map(({ start, end, good }) => (
    { side, start: place(text, start), end: place(text, end), good })));
}

// Invisible characters are shown by names of several: the place in the text that a place on the screen stands for.
function placeOf(text, shownAt, isEnd) {
  let shown = 0;
  for (const piece of pieces(text)) {
    const next = shown + piece.shown.length;
    if (shownAt < next || (isEnd && shownAt === next)) {
      if (!piece.odd) return piece.from + shownAt - shown;
      return isEnd ? piece.to : piece.from;
    }
    shown = next;
  }
  return text.length;
}
function shownBefore(text, place) {
  return pieces(text.slice(0, place)).reduce((sum, piece) => sum + piece.shown.length, 0);
}
function nodeAt(element, shownAt) {
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  let left = shownAt;
  let last = element;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (left <= node.length) return [node, left];
    left -= node.length;
    last = node;
  }
  return [last, last.length ?? 0];
}
