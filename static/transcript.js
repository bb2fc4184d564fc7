// What an agent did, turn by turn: shared by the dashboard's view of an agent and the agent's own page.
//
// `Transcript` keeps the events and draws them. They come live at the end, by pages of older ones, or singly where
// a find looked for them; where some between are not loaded, the ids show it, and the page says so. A turn that is
// folded costs one line, a step that did not change costs nothing, and of what is long the end is shown first.

import { h, memo } from "./dom.js";
import { ago, clock, count, dollars, duration, plural, prose, prose_preview } from "./text.js";
import { act, button, is_busy, plain, refusal, toggle, toggled, toggles_made } from "./parts.js";
import { changed } from "./store.js";
import { Find, find_here } from "./find.js";
import { draw_step, path_to, step_row, steps_of, unfold } from "./steps.js";

const OPEN_TURNS = 3;
const TURNS_SHOWN = 200;
const STEPS_SHOWN = 150;
const STEPS_BEFORE = 10; // shown before one that was found
const PAGE = 500;
const KEPT_CHARACTERS = 16e6; // a page that is left open for days forgets what is oldest
const EVENT_CHARACTERS = 300; // what an event takes beside its data
const LATE_MS = 20000; // what the hive no longer keeps is asked of the agent and comes over the stream

let scrolled_up = false;
addEventListener("wheel", ({ deltaY }) => (scrolled_up = deltaY < 0), { passive: true });
addEventListener("touchmove", () => (scrolled_up = true), { passive: true });
addEventListener("keydown", ({ key }) => ["PageUp", "Home", "ArrowUp"].includes(key) && (scrolled_up = true));

let made = 0;

export class Transcript {
  /** `fetch_older(before, max, find)` → promise of {events, more?, rest?}: `rest` is asked of the agent itself. */
  constructor(name, fetch_older) {
    Object.assign(this, { name, fetch_older, key: `transcript:${name}`, version: 0 });
    this.group = `${this.key}:${++made}`; // what another one of this agent waits for holds up nobody here
    this.turns = new Map(); // number → {number, events, size, version}
    this.order = null;
    this.ids = new Set();
    this.last_id = this.size = 0;
    this.shown = TURNS_SHOWN;
    this.partial = "";
    this.at_start = false;
    this.notes = null; // {text, at}: what the agent keeps in its notes, once it was asked
    this.asking = new Set(); // one for each request under way: {ends: what the agent said it has sent, heard: function}
    this.find = new Find(this);
  }

  // ── What it holds ──────────────────────────────────────────────────────────────────────────────

  /** Events in any order, some perhaps known already. */
  add(events) {
    for (const event of events) {
      if (event.kind === "partial") this.partial = event.data.text;
      else if (event.kind === "notes") this.notes = { text: event.data.text, at: event.at };
      else if (event.kind === "history") this.hear(event.data);
      else this.add_one(event);
    }
    if (this.size > KEPT_CHARACTERS) this.forget_oldest();
    changed();
  }

  add_one(event) {
    if (event.id >= this.last_id) this.partial = ""; // also where an answer was faster than the stream
    if (this.ids.has(event.id)) return;
    this.ids.add(event.id);
    this.last_id = Math.max(this.last_id, event.id);
    const turn = this.turns.get(event.turn) ?? this.open_turn(event.turn);
    const in_order = turn.events.length === 0 || turn.events.at(-1).id < event.id;
    turn.events.push(event);
    if (!in_order) {
      turn.events.sort((a, b) => a.id - b.id);
      this.order = null;
    }
    this.count(turn, event, 1);
  }

  open_turn(number) {
    const turn = { number, events: [], size: 0, version: 0 };
    this.turns.set(number, turn);
    this.order = null;
    return turn;
  }

  count(turn, event, sign) {
    event.size ??= JSON.stringify(event.data).length + EVENT_CHARACTERS;
    turn.size += sign * event.size;
    this.size += sign * event.size;
    turn.version = ++this.version;
  }

  forget_oldest() {
    this.find.begin();
    while (this.size > KEPT_CHARACTERS) {
      const turn = this.sorted()[0];
      const gone = turn.events.splice(0, this.turns.size > 1 ? Infinity : Math.ceil(turn.events.length / 2));
      for (const event of gone) {
        this.ids.delete(event.id);
        this.count(turn, event, -1);
      }
      if (turn.events.length === 0) this.turns.delete(turn.number);
      this.order = null;
      this.at_start = false;
    }
  }

  /** Its turns, oldest first. */
  sorted() {
    this.order ??= [...this.turns.values()].sort((a, b) => a.events[0].id - b.events[0].id);
    return this.order;
  }

  first_id() {
    return this.sorted()[0]?.events[0].id ?? 0;
  }

  /** The id from which on nothing is missing; 1 when that is the beginning. */
  loaded_from() {
    let next = this.last_id;
    for (const turn of this.sorted().toReversed())
      for (let index = turn.events.length - 1; index >= 0; index -= 1) {
        if (turn.events[index].id < next - 1) return next;
        next = turn.events[index].id;
      }
    return this.at_start ? 1 : next;
  }

  /** The oldest loaded event whose id is not below this one. */
  event_from(id) {
    for (const turn of this.sorted()) {
      const event = turn.events.find((one) => one.id >= id);
      if (event) return event;
    }
    return null;
  }

  has_around = (id) => this.ids.has(id - 1) && (this.ids.has(id + 1) || id === this.last_id);

  /** The newest page again, after a connection was lost. */
  refresh(events) {
    this.add(events);
    if (this.first_id() === 1) this.at_start = true;
  }

  // ── What it asks for ───────────────────────────────────────────────────────────────────────────

  /** Older events, with `find` only those that hold it. How many there are below `before`, at most `max`. */
  async fetch(before, max, find = "") {
    const asked = { ends: [], heard: () => {} };
    this.asking.add(asked);
    try {
      const { events, rest, more } = await this.fetch_older(before, max, find);
      this.add(events);
      const found = { count: events.length, oldest: events[0]?.id, rest, more };
      if (!rest?.asked) return found;
      const late = await this.end_of(asked, { before: rest.before, find });
      return { ...found, count: found.count + late.count, oldest: late.oldest ?? found.oldest };
    } finally {
      this.asking.delete(asked);
    }
  }

  hear(end) {
    for (const asked of this.asking) {
      asked.ends.push(end);
      asked.heard();
    }
  }

  /** The stream may have brought it before the answer that says what to wait for. */
  end_of(asked, what) {
    return new Promise((resolve, reject) => {
      setTimeout(() => reject(new Error(`${this.name} does not answer. Try again.`)), LATE_MS);
      asked.heard = () => {
        const end = asked.ends.find((one) => same_history(one, what));
        if (end) resolve(end);
      };
      asked.heard();
    });
  }

  async earlier(before = this.first_id()) {
    const height = document.documentElement.scrollHeight;
    const hidden = this.turns.size - this.shown;
    this.shown += TURNS_SHOWN;
    if (hidden <= 0 || before !== this.first_id()) await this.fetch_page(before);
    else changed();
    if (!this.find.is_here()) return; // somebody has gone on meanwhile
    requestAnimationFrame(() =>
      requestAnimationFrame(() =>
        scrollBy({ top: document.documentElement.scrollHeight - height, behavior: "instant" }),
      ),
    );
  }

  async fetch_page(before) {
    const { count: number, rest } = await this.fetch(before, PAGE);
    if (rest && !rest.asked) throw new Error(`What is older lies with ${this.name}, which does not run.`);
    this.at_start ||= this.first_id() === 1 || (number === 0 && before === this.first_id());
  }

  /** Who scrolls up to the beginning is given what was before; who has not scrolled is not. */
  fetch_when_seen(dom) {
    const look = (seen) => {
      const { isIntersecting } = seen.at(-1); // it may have come and gone in one go
      if (!dom.isConnected) return watch.disconnect();
      if (isIntersecting && scrolled_up && !is_busy(this.group)) act(this.group, "Earlier…", () => this.earlier());
    };
    const watch = new IntersectionObserver(look, { rootMargin: "200px" });
    watch.observe(dom);
  }

  // ── How it looks ───────────────────────────────────────────────────────────────────────────────

  /** Unfolds all that stands around an event. */
  reveal(id) {
    const turns = this.sorted();
    const index = turns.findIndex((turn) => turn.events.some((event) => event.id === id));
    const turn = turns[index];
    const key = this.key_of(turn);
    this.shown = Math.max(this.shown, turns.length - index + 5);
    toggle(key, true);
    const steps = steps_of(turn.events);
    const path = path_to(steps, id);
    if (!path.length) return;
    unfold(path, this.key);
    const place = steps.indexOf(path[0]);
    if (place < hidden_steps(key, steps)) toggle(`${key}:from`, steps[Math.max(0, place - STEPS_BEFORE)].event);
  }

  key_of = (turn) => `${this.key}:${turn.number}`;

  draw() {
    find_here(this.find);
    const all = this.sorted();
    const turns = all.slice(-this.shown);
    const last = turns.at(-1);
    return h(
      "div",
      { class: "transcript", role: "log", "aria-label": `Transcript of ${this.name}`, "aria-live": "off" },
      !(this.at_start && turns.length === all.length) &&
        turns.length > 0 &&
        h(
          "div",
          { key: "earlier", class: "earlier", made: (dom) => this.fetch_when_seen(dom) },
          button(this.group, "Earlier…", () => this.earlier(), { kind: "small" }),
          refusal(this.group),
        ),
      turns.length === 0 && h("p", { class: "empty" }, "Nothing happened here yet."),
      turns.map((turn, index) => [
        index > 0 && this.draw_hole(turns[index - 1].events.at(-1).id, turn.events[0].id),
        this.draw_turn(turn, index >= turns.length - OPEN_TURNS, turn === last),
      ]),
    );
  }

  draw_hole(from, to) {
    if (to <= from + 1) return null;
    const key = `${this.key}:hole:${to}`;
    return h(
      "div",
      { key, class: "earlier hole" },
      button(key, `${plural(to - from - 1, "event")} not loaded`, () => this.earlier(to), { kind: "small" }),
      refusal(key),
    );
  }

  draw_turn(turn, otherwise, is_last) {
    const key = this.key_of(turn);
    const open = toggled(key, otherwise);
    const partial = is_last ? this.partial : "";
    const hole = (from, to) => this.draw_hole(from, to);
    return memo(`turn:${turn.number}`, [turn.version, open, partial, is_last, open && toggles_made], () =>
      draw_turn(key, turn, { of: this.key, open, partial, hole }),
    );
  }
}

const same_history = (one, other) => one.before === other.before && (one.find ?? "") === (other.find ?? "");

const CARET = h("span", { key: "caret", class: "cursor", "aria-hidden": "true" });

// ── A turn ───────────────────────────────────────────────────────────────────────────────────────

function draw_turn(key, turn, { of, open, partial, hole }) {
  const start = turn.events.find((event) => event.kind === "turn_start");
  const end = turn.events.find((event) => event.kind === "turn_end");
  const steps = steps_of(turn.events);
  const draw = (step) => (step.hole ? hole(...step.hole) : draw_step(step, of));
  if (!start && !end && !steps.some((step) => step.call || step.words))
    return h("section", { class: "turn between" }, steps.map(draw));
  const hidden = hidden_steps(key, steps);
  const more = steps[Math.max(0, hidden - STEPS_SHOWN)];
  return h(
    "section",
    { class: `turn ${open ? "open" : ""}`, "aria-label": `Turn ${turn.number}` },
    turn_line(key, turn, { start, end, steps, open }),
    open &&
      h(
        "div",
        { class: "steps" },
        hidden > 0 &&
          h(
            "div",
            { key: "more", class: "earlier" },
            plain(`${count(hidden)} earlier steps`, () => toggle(`${key}:from`, more.event), { kind: "small" }),
          ),
        steps.slice(hidden).map(draw),
        partial && step_row("", prose(partial, { class: "live-text", caret: CARET }), { key: "partial" }),
        end &&
          end.data.outcome !== "done" &&
          step_row("", how_it_ended(end.data), { key: "end", "data-event": end.id }),
      ),
  );
}

/** How many are left out at the beginning: all but the last, or those before what a person wanted to see. */
function hidden_steps(key, steps) {
  const from = toggled(`${key}:from`);
  if (!from) return Math.max(0, steps.length - STEPS_SHOWN);
  return Math.max(
    0,
    steps.findIndex((step) => step.event >= from),
  );
}

// What comes after a turn that failed, by the class of its failure: its mail is never lost.
const AFTERWARDS = {
  authentication_failed: "Its mail waits for the sign-in.",
  rate_limit: "Its mail waits until the limit resets, or until you resume it.",
  server_error: "It tries again by itself, ever less often.",
  unreachable: "It tries again by itself, ever less often.",
  prompt_too_long: "It goes on in a new conversation, with its notes.",
  billing_error: "Its mail waits until the account has credit and you resume it.",
  model_not_found: "Its mail waits until you choose another model.",
};

function how_it_ended({ outcome, reason, class: failure }) {
  const failed = outcome === "failed";
  return h("p", { class: failed ? "bad" : "dim" }, [
    `${failed ? "The turn failed" : "Interrupted"}${reason ? `: ${reason}` : "."}`,
    failed && ` ${AFTERWARDS[failure] ?? "It tries again by itself."}`,
  ]);
}

function turn_line(key, turn, { start, end, steps, open }) {
  const from = start ?? turn.events[0];
  return h(
    "button",
    { type: "button", class: "turn-line", "aria-expanded": String(open), onclick: () => toggle(key, !open) },
    h("span", { class: "turn-name" }, `Turn ${turn.number}`),
    h("span", null, clock(from.at, true), end && ` – ${clock(end.at, true)}`),
    h("span", { class: "gist" }, !open && gist(start)),
    h("span", { class: "figures" }, end ? figures(end.data) : ["running ", ago(from.at, "for"), tools_so_far(steps)]),
    end &&
      end.data.outcome !== "done" &&
      h("span", { class: end.data.outcome === "failed" ? "bad" : "warn" }, end.data.outcome),
    h("span", { class: "fold-word" }, open ? "fold" : "unfold"),
  );
}

function gist(start) {
  const mail = start?.data.messages?.[0];
  return mail ? `${mail.from}: ${prose_preview(mail.body)}` : "";
}

function figures({ tools, tokens, cost_usd, duration_ms }) {
  return [
    tools > 0 && plural(tools, "tool"),
    tokens > 0 && `${count(tokens)} tokens`,
    dollars(cost_usd),
    duration_ms >= 0 && duration(duration_ms),
  ]
    .filter(Boolean)
    .join(" · ");
}

const tools_so_far = (steps) => {
  const tools = steps.filter((step) => step.call).length;
  return tools > 0 && ` · ${plural(tools, "tool")}`;
};
