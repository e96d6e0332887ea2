// Text of models and of strangers. It becomes text nodes, and elements that are made here by name; never markup.

// The same characters as rlhf_cli/text.py: controls, bidirectional marks, blanks without width, tags, lone surrogates.
const HIDDEN = /[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}\ud800-\udfff]/gu;
const TAGS = new Set("P BR HR H1 H2 H3 H4 H5 H6 STRONG EM S CODE PRE BLOCKQUOTE UL OL LI TABLE THEAD TBODY TR TH TD".split(" "));
const IMAGE = /^\/media\/[0-9a-f]{64}$/;

function nameOf(character) {
  const code = character.codePointAt(0);
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  return code === 0x7f ? "\u2421" : `<U+${code.toString(16).toUpperCase().padStart(4, "0")}>`;
}

// The text with every hidden character replaced by a visible name of it.
export const visible = (text) => String(text).replace(HIDDEN, nameOf);

// The text in pieces {from, to, shown, odd}; what is shown of an odd one, a hidden character, is its name.
export function pieces(text) {
  const found = [];
  let from = 0;
  for (const match of text.matchAll(HIDDEN)) {
    const to = match.index + match[0].length;
    found.push({ from, to: match.index, shown: text.slice(from, match.index), odd: false });
    found.push({ from: match.index, to, shown: nameOf(match[0]), odd: true });
    from = to;
  }
  found.push({ from, to: text.length, shown: text.slice(from), odd: false });
  return found.filter((piece) => piece.from < piece.to);
}

// The text as nodes, hidden characters set apart.
export function textNodes(text) {
  return pieces(text).map(({ shown, odd }) => {
    if (!odd) return document.createTextNode(shown);
    const named = document.createElement("span");
    named.className = "odd";
    named.textContent = shown;
    return named;
  });
}

// Show text as text.
export const showText = (element, text) => element.replaceChildren(...textNodes(text));

// Show markdown that the server has rendered and sanitised; what is not a known tag without attributes stays out.
export function showMarkdown(element, html) {
  const rendered = new DOMParser().parseFromString(html, "text/html").body; // inert: nothing runs, nothing loads
  element.replaceChildren(...[...rendered.childNodes].map(copy));
}

function copy(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent;
  if (node.nodeType !== Node.ELEMENT_NODE || !TAGS.has(node.tagName)) return "";
  const made = document.createElement(node.tagName);
  made.append(...[...node.childNodes].map(copy));
  return made;
}

// Show an image from this server's own store; anything else stays text.
export function showImage(element, path, name) {
  if (!IMAGE.test(path)) return showText(element, path);
  const image = document.createElement("img");
  image.src = path;
  image.alt = name;
  element.replaceChildren(image);
}
