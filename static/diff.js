// A unified diff as git writes it, told apart into files and drawn in colour, each file foldable.
//
// Long ones stay light: lines lie in blocks, which are laid out and coloured when they come near what is seen.
// No line is cut or runs out of sight: it is wrapped.

import { exact, h, visible } from "./dom.js";
import { plural } from "./text.js";
import { fold, plain } from "./parts.js";
import { changed } from "./store.js";
import { colour_line } from "./nix.js";

const LINES_OPEN = 400; // a longer file starts folded
const BLOCK = 24;

// ── Reading ──────────────────────────────────────────────────────────────────────────────────────

/** [{path, lines: [[kind, text, number]], added, removed, note}]; kind is "added", "removed", "same", "place". */
function parse_diff(text) {
  const files = [];
  let file = null;
  let number = 0; // of the line in the new file; 0 while in a header
  for (const line of exact(text).split("\n")) {
    const place = /^@@ -\d+(?:,\d+)? \+(\d+)/.exec(line);
    if (line.startsWith("diff --git ")) {
      file = { path: path_of_header(line), lines: [], added: 0, removed: 0, note: "" };
      files.push(file);
      number = 0;
    } else if (file && place) {
      number = Math.max(1, Number(place[1]));
      if (!line.startsWith("@@ -0,0")) file.lines.push(["place", line]);
    } else if (file && number) number += take_line(file, line, number);
    else if (file) take_header(file, line);
  }
  return files;
}

function path_of_header(line) {
  const half = / b\/(.*)$/.exec(line);
  return half ? half[1] : line.slice(11);
}

function take_header(file, line) {
  if (line.startsWith("+++ b/")) file.path = line.slice(6).replace(/\t$/, "");
  else if (line.startsWith("rename to ")) file.path = line.slice(10);
  else if (line.startsWith("new file")) file.note = line.endsWith(" 100755") ? "new, executable" : "new";
  else if (line.startsWith("new mode")) file.note = line.endsWith(" 100755") ? "now executable" : "not executable now";
  else if (line.startsWith("deleted file")) file.note = "deleted";
  else if (line.startsWith("rename from ")) file.note = `was ${line.slice(12)}`;
}

// How the host ends a diff that is too long: no line of a file, which begins with a sign.
const CUT = /^… \(\d+ bytes more\)$/;

/** Returns by how much the number of the line in the new file moves on. */
function take_line(file, line, number) {
  if (line.startsWith("+")) {
    file.added += 1;
    file.lines.push(["added", line, number]);
    return 1;
  }
  if (line.startsWith("-")) {
    file.removed += 1;
    file.lines.push(["removed", line]);
    return 0;
  }
  if (line === "" || CUT.test(line)) return 0;
  if (line.startsWith("\\")) {
    file.lines.push(["place", line]);
    return 0;
  }
  file.lines.push(["same", line, number]);
  return 1;
}

const READ_KEPT = 50;
const read = new Map();

/** Many drawings of the same diff read it once. */
function read_diff(text) {
  if (read.size > READ_KEPT) read.clear();
  if (!read.has(text)) read.set(text, parse_diff(text));
  return read.get(text);
}

// ── Lines ────────────────────────────────────────────────────────────────────────────────────────
// <diff-block> holds its lines as one text, which the browser's search finds and which measures what the coloured
// lines will. Blocks near what is seen are coloured, one a frame, so that scrolling stays smooth; those that have gone
// by before their turn stay as they are.

const near = new Set();
let next_frame = 0;

const on_sight = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) near.add(target);
      else near.delete(target);
    }
    next_frame ||= requestAnimationFrame(colour_one);
  },
  { rootMargin: "900px" },
);

function colour_one() {
  const [block] = near;
  block?.colour();
  next_frame = near.size ? requestAnimationFrame(colour_one) : 0;
}

class DiffBlock extends HTMLElement {
  fill(given) {
    this.given = given;
    const { lines } = given;
    this.style.setProperty("--lines", lines.length);
    this.textContent = lines.map(([kind, line]) => `${plain_line(kind, visible(line))}\n`).join("");
    if (lines.every(([kind]) => kind === lines[0][0])) this.className = lines[0][0];
  }
  connectedCallback() {
    if (this.given) on_sight.observe(this);
  }
  disconnectedCallback() {
    this.rest();
  }
  rest() {
    on_sight.unobserve(this);
    near.delete(this);
  }
  colour() {
    near.delete(this);
    if (getSelection().type === "Range" && getSelection().containsNode(this, true)) return; // not while it is being copied
    this.rest();
    const { lines, begun, split, mark } = this.given;
    this.given = null;
    const draw = line_drawer(begun(), mark);
    this.className = "coloured";
    this.replaceChildren(...(split ? split_rows(lines, draw) : lines.map((line) => draw(line))));
  }
}
customElements.define("diff-block", DiffBlock);

const signed = (line) => `${line.slice(0, 1)} `;
const plain_line = (kind, line) => (kind === "place" ? line : signed(line) + line.slice(1));

function element(tag, name, ...children) {
  const dom = document.createElement(tag);
  if (name) dom.className = name;
  dom.append(...children);
  return dom;
}

/** The words of a line of Nix with their classes; `begun` is what earlier lines have begun, old and new each their own. */
function nix_words([kind, line], begun, side = kind === "removed" ? "old" : "new") {
  const { parts, state } = colour_line(visible(line.slice(1)), begun[side]);
  begun[side] = state;
  if (kind === "same" && side === "new") begun.old = begun.new;
  return parts;
}

/** For each block what was begun before it, read no further than it is asked for. */
function beginnings(blocks) {
  const known = [{ old: "", new: "" }];
  const after = (lines, begun) => {
    for (const line of lines) {
      if (line[0] === "place") begun = { old: "", new: "" };
      else nix_words(line, begun);
    }
    return begun;
  };
  return (index) => {
    while (known.length <= index) known.push(after(blocks[known.length - 1], { ...known.at(-1) }));
    return { ...known[index] };
  };
}

/** Draws one line after the other, coloured unless `begun` is null. */
function line_drawer(begun, mark) {
  return (line, side) => {
    const [kind, text, number] = line;
    if (kind === "place") {
      if (begun) begun = { old: "", new: "" };
      return element("span", "place", `${visible(text)}\n`);
    }
    const parts = begun ? nix_words(line, begun, side) : [["", visible(text.slice(1))]];
    const words = parts.map(([word, part]) => (word ? element("span", `nix-${word}`, part) : part));
    const marked = mark && side !== "old" && kind !== "removed" && number === mark.line;
    const dom = element("span", marked ? `${kind} marked` : kind, element("i", "sign", signed(text)), ...words, "\n");
    if (marked) dom.append(element("span", "mark-words", `↑ ${visible(mark.words)}\n`));
    return dom;
  };
}

const nothing = () => element("span", "nothing", "");

/** Old on the left, new on the right: a run of removed lines stands beside the added ones that follow it. */
function split_rows(lines, draw) {
  const rows = [];
  const row = (left, right) => rows.push(element("div", "pair", left, right));
  for (let at = 0; at < lines.length;) {
    const run = (kind) => {
      const from = at;
      while (lines[at]?.[0] === kind) at += 1;
      return lines.slice(from, at);
    };
    if (lines[at][0] === "place") rows.push(draw(lines[at++]));
    else if (lines[at][0] === "same") row(draw(lines[at], "old"), draw(lines[at++], "new"));
    else {
      const [old_lines, new_lines] = [run("removed"), run("added")];
      for (let n = 0; n < Math.max(old_lines.length, new_lines.length); n += 1)
        row(old_lines[n] ? draw(old_lines[n]) : nothing(), new_lines[n] ? draw(new_lines[n]) : nothing());
    }
  }
  return rows;
}

/** Side by side, a run of changed lines is kept together as far as it goes. */
function blocks_of(lines, split) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    let end = Math.min(at + BLOCK, lines.length);
    while (split && end < lines.length && lines[end][0] !== "same" && end - at < 8 * BLOCK) end += 1;
    blocks.push(lines.slice(at, end));
    at = end;
  }
  return blocks;
}

/** `mark` = {line, words}: a line of the new file with what is said of it. */
export function diff_lines(lines, { split = false, nix = false, mark = null } = {}) {
  const blocks = blocks_of(lines, split);
  const begun_before = beginnings(blocks);
  return h(
    "pre",
    { class: `diff ${split ? "split" : ""}`, tabindex: "0", key: `${split}:${mark?.line}` },
    blocks.map((block, index) => {
      const begun = () => (nix ? begun_before(index) : null);
      return h("diff-block", { key: index, made: (dom) => dom.fill({ lines: block, begun, split, mark }) });
    }),
  );
}

// ── The whole ────────────────────────────────────────────────────────────────────────────────────

const WIDE = matchMedia("(min-width: 1001px)");
WIDE.addEventListener("change", changed);
const STORED = "hyperhive-diff";
let wants_split = localStorage.getItem(STORED) === "split";

function set_split(yes) {
  wants_split = yes;
  localStorage.setItem(STORED, yes ? "split" : "unified");
  changed();
}

/** One or both ways to look at it: side by side only where there is room. */
export function split_switch() {
  if (!WIDE.matches) return null;
  const choice = (label, yes) =>
    plain(label, () => set_split(yes), { kind: "quiet", "aria-pressed": String(wants_split === yes) });
  return h(
    "span",
    { class: "switch", role: "group", "aria-label": "How changes are shown" },
    choice("Unified", false),
    choice("Side by side", true),
  );
}

/** `cut_bytes` of a very long one are missing at its end. */
export function diff_view(key, text, { at = null, cut_bytes = 0 } = {}) {
  const files = read_diff(text);
  if (!files.length) return h("p", { class: "dim pad" }, text.trim() ? text : "No change to any file.");
  const words = `${plural(cut_bytes, "byte")} of this change are not shown here: it is too long.`;
  const cut = cut_bytes > 0 && h("p", { class: "card-line bad", role: "note" }, words);
  const views = files.map((file) =>
    fold(
      `${key}:${file.path}`,
      [
        h("span", { class: "path" }, file.path),
        h("span", { class: "figures" }, counts(file)),
        file.note && h("span", { class: "dim" }, file.note),
        at?.path === file.path && h("span", { class: "bad" }, `✗ line ${at.line}`),
      ],
      () =>
        file.lines.length > 0 &&
        diff_lines(file.lines, {
          split: wants_split && WIDE.matches && file.removed > 0,
          nix: file.path.endsWith(".nix"),
          mark: at?.path === file.path ? at : null,
        }),
      { otherwise: file.lines.length <= LINES_OPEN || at?.path === file.path, class: "file" },
    ),
  );
  return [cut, views];
}

export const counts = ({ added, removed }) => [
  h("b", { class: "plus" }, `+${added}`),
  " ",
  h("b", { class: "minus" }, `−${removed}`),
];

/** What an edit tool did, as lines: the common start and end of both texts stay plain. */
export function edit_lines(before, after) {
  const old_lines = before === "" ? [] : exact(before).split("\n");
  const new_lines = after === "" ? [] : exact(after).split("\n");
  let start = 0;
  while (start < old_lines.length && start < new_lines.length && old_lines[start] === new_lines[start]) start += 1;
  let end = 0;
  while (
    end < old_lines.length - start &&
    end < new_lines.length - start &&
    old_lines.at(-1 - end) === new_lines.at(-1 - end)
  )
    end += 1;
  return [
    ...old_lines.slice(0, start).map((line) => ["same", ` ${line}`]),
    ...old_lines.slice(start, old_lines.length - end).map((line) => ["removed", `-${line}`]),
    ...new_lines.slice(start, new_lines.length - end).map((line) => ["added", `+${line}`]),
    ...old_lines.slice(old_lines.length - end).map((line) => ["same", ` ${line}`]),
  ];
}
