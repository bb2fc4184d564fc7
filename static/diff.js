// A unified diff as git writes it, told apart into files and drawn in colour, each file foldable.
//
// Long ones stay light: lines lie in blocks that are laid out and coloured when they come near what is seen.
// No line is cut or runs out of sight: it is wrapped.

import { exact, h, visible } from "./dom.js";
import { fold, plain } from "./parts.js";
import { changed } from "./store.js";
import { colour_line } from "./nix.js";

const LINES_OPEN = 400; // a longer file starts folded
const BLOCK = 40;

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
  if (line.startsWith("+++ b/")) file.path = line.slice(6);
  else if (line.startsWith("new file")) file.note = "new";
  else if (line.startsWith("deleted file")) file.note = "deleted";
  else if (line.startsWith("rename from ")) file.note = `was ${line.slice(12)}`;
  else if (line.startsWith("Binary files")) file.note = "binary, not shown";
}

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
  if (line === "") return 0;
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
// <diff-block> holds its lines as one text, which the browser's search finds, until it comes near what is seen:
// then each line gets its colour. The page's renderer need not know ten thousand lines one by one.

const on_sight = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) target.show();
  },
  { rootMargin: "900px" },
);

class DiffBlock extends HTMLElement {
  fill(given) {
    this.given = given;
    this.style.setProperty("--lines", given.lines.length);
    this.textContent = given.lines.map(([, line]) => `${visible(line)}\n`).join("");
  }
  connectedCallback() {
    if (this.given) on_sight.observe(this);
  }
  disconnectedCallback() {
    on_sight.unobserve(this);
  }
  show() {
    on_sight.unobserve(this);
    const { lines, split, nix, mark } = this.given;
    this.given = null;
    const draw = line_drawer(nix, mark);
    this.replaceChildren(...(split ? split_rows(lines, draw) : lines.map((line) => draw(line))));
  }
}
customElements.define("diff-block", DiffBlock);

function element(tag, name, ...children) {
  const dom = document.createElement(tag);
  if (name) dom.className = name;
  dom.append(...children);
  return dom;
}

/** Draws one line after the other. Old and new are two texts: what was begun in one is not carried into the other. */
function line_drawer(nix, mark) {
  const begun = { old: "", new: "" };
  const words = (text, side) => {
    if (!nix) return [text];
    const { parts, state } = colour_line(text, begun[side]);
    begun[side] = state;
    return parts.map(([word, part]) => (word ? element("span", `nix-${word}`, part) : part));
  };
  return ([kind, line, number], side = kind === "removed" ? "old" : "new") => {
    if (kind === "place") {
      Object.assign(begun, { old: "", new: "" });
      return element("span", "place", `${visible(line)}\n`);
    }
    const marked = mark && side === "new" && number === mark.line;
    const text = element("span", "text", ...words(visible(line.slice(1)), side));
    if (kind === "same" && side === "new") begun.old = begun.new;
    const dom = element("span", marked ? `${kind} marked` : kind, element("i", "sign", line.slice(0, 1)), text, "\n");
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

/** `mark` = {line, words}: a line of the new file with what is said of it. */
export function diff_lines(lines, { split = false, nix = false, mark = null } = {}) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    let end = Math.min(at + BLOCK, lines.length);
    while (end < lines.length && lines[end][0] !== "same" && end - at < 4 * BLOCK) end += 1; // keep runs together
    blocks.push(lines.slice(at, end));
    at = end;
  }
  return h(
    "pre",
    { class: `diff ${split ? "split" : ""}`, tabindex: "0", key: `${split}:${mark?.line}` },
    blocks.map((block, index) =>
      h("diff-block", { key: index, made: (dom) => dom.fill({ lines: block, split, nix, mark }) }),
    ),
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

export function diff_view(key, text, { at = null } = {}) {
  const files = read_diff(text);
  if (!files.length) return h("p", { class: "dim pad" }, text.trim() ? text : "No change to any file.");
  return files.map((file) =>
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
