// Words, figures and times as they are shown.

import { h, visible } from "./dom.js";

// ── Prose ────────────────────────────────────────────────────────────────────────────────────────
// Just enough of Markdown to read what agents write: fenced blocks, `code`, **strong**, and addresses.

const FENCE = /^```[^\n]*\n([\s\S]*?)(?:\n```[ \t]*$|(?![\s\S]))/gm;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|(https?:\/\/[^\s<>"'`]+[^\s<>"'`.,;:!?)\]}])/g;

/** `caret` stands at the end of what is still being written. */
export function prose(text, { caret = null, ...props } = {}) {
  const source = visible(text ?? "");
  const blocks = [];
  let at = 0;
  for (const match of source.matchAll(FENCE)) {
    blocks.push(...paragraphs(source.slice(at, match.index)), h("pre", { tabindex: "0" }, match[1]));
    at = match.index + match[0].length;
  }
  blocks.push(...paragraphs(source.slice(at)));
  if (caret && blocks.length === 0) blocks.push(h("p", null, caret));
  else if (caret)
    blocks.push(
      h(
        blocks.at(-1).tag,
        null,
        blocks.pop().children.map(([, child]) => child),
        caret,
      ),
    );
  if (!blocks.length) return null;
  return h("div", { ...props, class: `prose ${props.class ?? ""}` }, blocks);
}

function paragraphs(text) {
  return text
    .split(/\n{2,}/)
    .map((part) => part.replace(/^\n+|\n+$/g, ""))
    .filter(Boolean)
    .map((part) => h("p", null, inline(part)));
}

export function inline(words) {
  const text = visible(words); // before it is cut up: a sequence may span what looks like an address
  const out = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    out.push(text.slice(at, match.index));
    if (match[1]) out.push(h("code", null, match[1]));
    else if (match[2]) out.push(h("strong", null, match[2]));
    else out.push(address(match[3]));
    at = match.index + match[0].length;
  }
  out.push(text.slice(at));
  return out;
}

/** The start of a text, on one line. */
export function prose_preview(text, length = 140) {
  const line = visible(text ?? "")
    .replace(/\s+/g, " ")
    .trim();
  return line.length > length ? `${line.slice(0, length)}…` : line;
}

/** The address as one may open it, or null: only the web's own schemes. */
export function web_href(url) {
  try {
    const { protocol, href } = new URL(url);
    return protocol === "http:" || protocol === "https:" ? href : null;
  } catch {
    return null;
  }
}

/** A link whose text is its address: nothing hides behind a friendly word. */
export function address(url) {
  const href = web_href(url);
  return href ? h("a", { href, target: "_blank", rel: "noopener noreferrer", class: "address" }, url) : String(url);
}

// ── Figures ──────────────────────────────────────────────────────────────────────────────────────

// By hand: the browser's own formatters take longer to set up than this page to be drawn.
export const count = (number) => String(number ?? 0).replace(/\B(?=(\d{3})+$)/g, ",");
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
export const dollars = (usd) => `$${(usd ?? 0).toFixed(usd > 0 && usd < 0.01 ? 4 : 2)}`;
export const short_sha = (sha) => (sha ?? "").slice(0, 7);

/** The operator reads this page: "operator (dashboard)" is "you". */
export const you_or = (name) => (/^operator\b/.test(name ?? "") ? "you" : name);

/** 48201 → "48 k" where room is short. */
export function thousands(number) {
  if (number < 1000) return String(number ?? 0);
  if (number < 1e6) return `${Math.round(number / 1000)} k`;
  return `${(number / 1e6).toFixed(1)} M`;
}

/** 12300 → "12 KiB" */
export function bytes(size) {
  if (size < 1024) return plural(size, "byte");
  if (size < 1024 ** 2) return `${Math.round(size / 1024)} KiB`;
  return size < 1024 ** 3 ? `${(size / 1024 ** 2).toFixed(1)} MiB` : `${(size / 1024 ** 3).toFixed(1)} GiB`;
}

// ── Times ────────────────────────────────────────────────────────────────────────────────────────
// Ages are told by the hive's clock, not the browser's.

let clock_offset_ms = 0;
export function set_clock(now) {
  clock_offset_ms = Date.parse(now) - Date.now();
}
export const hive_now = () => Date.now() + clock_offset_ms;

export function span(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return plural(Math.floor(seconds / 86400), "day");
}

export function duration(ms) {
  return ms < 10000 ? `${(ms / 1000).toFixed(1)} s` : span(ms);
}

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const year_of = (date) =>
  date.getFullYear() === new Date(hive_now()).getFullYear() ? "" : ` ${date.getFullYear()}`;
const day_of = (date) => `${date.getDate()} ${MONTHS[date.getMonth()]}`;
const time_of = (date, ...more) =>
  [date.getHours(), date.getMinutes(), ...more].map((number) => String(number).padStart(2, "0")).join(":");

/** "18:04", or "21 Nov 18:04" when it is another day, with its year when that is another. */
export function clock(at, seconds = false) {
  const date = new Date(at);
  if (Number.isNaN(date.getTime())) return "";
  const time = seconds ? time_of(date, date.getSeconds()) : time_of(date);
  return date.toDateString() === new Date(hive_now()).toDateString() ? time : `${day_of(date)}${year_of(date)} ${time}`;
}

const WORDINGS = {
  ago: (ms) => (ms < 5000 ? "just now" : `${span(ms)} ago`),
  for: (ms) => span(ms),
  until: (ms) => (ms < 0 ? `in ${span(999 - ms)}` : "now"),
};

/** <time-ago at=… wording="ago|for|until">: words that keep up with the clock by themselves. */
class TimeAgo extends HTMLElement {
  static observedAttributes = ["at", "wording"];
  connectedCallback() {
    ticking.add(this);
    this.tick();
  }
  disconnectedCallback() {
    ticking.delete(this);
  }
  attributeChangedCallback() {
    this.tick();
  }
  tick() {
    const at = Date.parse(this.getAttribute("at"));
    if (Number.isNaN(at)) return;
    const words = WORDINGS[this.getAttribute("wording") ?? "ago"](hive_now() - at);
    if (this.textContent !== words) this.textContent = words;
    const date = new Date(at);
    const exact = `${day_of(date)} ${date.getFullYear()}, ${time_of(date, date.getSeconds())}`;
    if (this.title !== exact) this.title = exact;
  }
}

const ticking = new Set();
customElements.define("time-ago", TimeAgo);
setInterval(() => ticking.forEach((element) => element.tick()), 1000);

export const ago = (at, wording = "ago") => (at ? h("time-ago", { at, wording }) : null);
