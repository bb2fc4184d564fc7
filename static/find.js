// Find in a transcript, also where turns are folded and where events are not loaded: those are asked for,
// from the newest to the oldest, and how far it has looked is always told.

import { h } from "./dom.js";
import { clock, count } from "./text.js";
import { act, draft, field, is_busy, plain, refusal, set_draft, toggle, toggled } from "./parts.js";
import { changed } from "./store.js";

const PAGE = 100; // events that are asked for at once
const AROUND = 60; // events that are shown with a hit which stands alone
const HERE = "find-here";

/** Every text of an event that a page shows somewhere. */
function* texts_of({ kind, data }) {
  if (kind === "turn_start" || kind === "mail") for (const mail of data.messages ?? []) yield mail.body;
  else if (kind === "tool_call") yield* leaves([data.name, data.input]);
  else if (kind === "tool_result") yield data.output;
  else yield data.text ?? data.reason;
}

function* leaves(value) {
  if (typeof value === "string") yield value;
  else if (value && typeof value === "object") for (const one of Object.values(value)) yield* leaves(one);
}

const escaped = (words) => words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

export class Find {
  constructor(transcript) {
    Object.assign(this, { transcript, key: `find:${transcript.name}` });
    this.begin();
  }

  begin() {
    Object.assign(this, { at: 0, looked_to: Infinity, beyond: "", search: {} });
  }

  get words() {
    return draft(this.key).trim();
  }

  get open() {
    return toggled(this.key);
  }

  show() {
    toggle(this.key, true);
    requestAnimationFrame(() => requestAnimationFrame(() => this.field()?.select()));
  }

  hide() {
    CSS.highlights?.delete(HERE);
    this.begin();
    toggle(this.key, false);
  }

  /** Whether the transcript is what the page shows. */
  is_here = () => shown === this && Boolean(document.querySelector(".transcript"));

  field = () => [...document.querySelectorAll("[data-draft]")].find((dom) => dom.dataset.draft === this.key);

  /** Ids of the loaded events that hold the words, oldest first. */
  hits() {
    const { words, transcript } = this;
    const known = `${words}\n${transcript.version}`;
    if (this.known !== known) {
      const wanted = new RegExp(escaped(words), "iu");
      const holds = (event) => [...texts_of(event)].some((text) => wanted.test(text ?? ""));
      const turns = words ? transcript.sorted() : [];
      this.found = turns.flatMap((turn) => turn.events.filter(holds).map(({ id }) => id));
      this.known = known;
    }
    return this.found;
  }

  /** Every hit from this id on is loaded. */
  complete() {
    return Math.min(this.looked_to, this.transcript.loaded_from());
  }

  // ── Stepping ───────────────────────────────────────────────────────────────────────────────────

  async newer() {
    const next = this.hits().find((id) => id > this.at);
    if (next) await this.go(next);
  }

  /** The next one towards the beginning; what is not loaded is asked for until there is one, or no more. */
  async older() {
    if (!this.words) return;
    const { search } = this; // another one, once it was closed or other words were typed
    while (search === this.search) {
      const complete = this.complete();
      const next = this.hits().findLast((id) => id < (this.at || Infinity) && id >= complete);
      if (next) return this.go(next);
      if (complete <= 1 || this.beyond) return;
      await this.look_further(complete);
    }
  }

  async look_further(before) {
    const { words, search } = this;
    const { count: number, oldest, rest, more } = await this.transcript.fetch(before, PAGE, words);
    if (search !== this.search) return;
    if (rest && !rest.asked) this.beyond = `What is older lies with ${this.transcript.name}, which does not run.`;
    this.looked_to = this.beyond ? rest.before : number < PAGE && !more ? 1 : oldest;
  }

  async go(id) {
    this.at = id;
    if (!this.transcript.has_around(id)) await this.transcript.fetch(id + AROUND / 2, AROUND);
    if (!this.is_here()) return;
    this.transcript.reveal(id);
    requestAnimationFrame(() => requestAnimationFrame(() => this.point_out(id)));
  }

  point_out(id) {
    const place = document.querySelector(`.transcript [data-event~="${id}"]`);
    if (!place || !this.is_here()) return;
    place.scrollIntoView({ block: "center", behavior: "instant" });
    const range = range_of(place, this.words);
    if (!range) return;
    CSS.highlights?.set(HERE, new Highlight(range));
    const box = range.startContainer.parentElement.closest("pre");
    if (box) box.scrollTop += range.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
    scrollBy({ top: range.getBoundingClientRect().top - innerHeight / 2, behavior: "instant" });
  }

  // ── Its row ────────────────────────────────────────────────────────────────────────────────────

  on_input = ({ target }) => {
    set_draft(this.key, target.value);
    this.begin();
    changed();
  };

  draw() {
    if (!this.open) return null;
    const older = () => act(this.key, "Older", () => this.older());
    const newer = () => act(this.key, "Newer", () => this.newer());
    const onkeydown = (event) => {
      if (event.key === "Escape") this.hide();
      if (event.key !== "Enter" || event.isComposing) return;
      event.preventDefault();
      if (event.shiftKey) newer();
      else older();
    };
    return h(
      "div",
      { class: "find", role: "search", "aria-label": `Find in the transcript of ${this.transcript.name}` },
      h(
        "div",
        { class: "decide" },
        field(this.key, { label: "Find", class: "field small grow", maxlength: "200", oninput: this.on_input, onkeydown }),
        plain("Older", older, { kind: "small", disabled: !this.words }),
        plain("Newer", newer, { kind: "small", disabled: !this.words }),
        plain("Close", () => this.hide(), { kind: "small quiet" }),
      ),
      h("p", { class: "dim", role: "status" }, this.words && this.outcome()),
      refusal(this.key),
    );
  }

  outcome() {
    if (is_busy(this.key)) return "Looking further back…";
    const hits = this.hits();
    const place = hits.indexOf(this.at);
    const total = hits.length === 0 ? "Nothing" : `${place < 0 ? "" : `${count(hits.length - place)} of `}${count(hits.length)}`;
    if (this.complete() <= 1) return `${total} in all of it.`;
    const oldest = this.transcript.event_from(this.complete());
    return `${total} since ${clock(oldest.at)}. ${this.beyond || "Enter looks further back."}`;
  }
}

/** Where the words stand in an element, as far as one piece of text holds them whole. */
function range_of(place, words) {
  const walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
  const wanted = new RegExp(escaped(words), "iu");
  while (walker.nextNode()) {
    const match = wanted.exec(walker.currentNode.data);
    if (!match) continue;
    const range = document.createRange();
    range.setStart(walker.currentNode, match.index);
    range.setEnd(walker.currentNode, match.index + match[0].length);
    return range;
  }
  return null;
}

// The browser's own find sees only what is unfolded and loaded: its key opens this one, and pressed again, its own.
let shown = null;

export function find_here(find) {
  shown = find;
}

addEventListener("keydown", (event) => {
  if (event.key !== "f" || !(event.ctrlKey || event.metaKey) || event.shiftKey || event.altKey) return;
  if (!shown || !document.querySelector(".transcript") || document.activeElement === shown.field()) return;
  event.preventDefault();
  shown.show();
});
