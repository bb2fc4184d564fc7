// What an agent did, turn by turn: shared by the dashboard's view of an agent and the agent's own page.
//
// `Transcript` keeps the events (older ones are put in front, live ones at the end) and draws them. A turn that
// is folded costs one line, one that did not change costs nothing, and a very long one shows its end first.

import { h, memo } from "./dom.js";
import { ago, clock, count, dollars, duration, plural, prose, prose_preview } from "./text.js";
import { act, button, is_busy, plain, refusal, toggle, toggled, toggles_made } from "./parts.js";
import { changed } from "./store.js";
import { tool_box } from "./tools.js";

const OPEN_TURNS = 3;
const STEPS_SHOWN = 150;
const PAGE = 500;
const LATE_MS = 2000; // what the hive no longer keeps is asked of the agent and comes over the stream

let scrolled_up = false;
addEventListener("wheel", ({ deltaY }) => (scrolled_up = deltaY < 0), { passive: true });
addEventListener("touchmove", () => (scrolled_up = true), { passive: true });
addEventListener("keydown", ({ key }) => ["PageUp", "Home", "ArrowUp"].includes(key) && (scrolled_up = true));

export class Transcript {
  /** `fetch_older(before, max)` → promise of events, oldest first. */
  constructor(name, fetch_older) {
    Object.assign(this, { name, fetch_older, key: `transcript:${name}`, version: 0 });
    this.clear();
  }

  clear() {
    this.turns = new Map(); // number → {number, events, version}
    this.ids = new Set();
    this.first_id = Infinity;
    this.last_id = 0;
    this.partial = "";
    this.at_start = false;
  }

  /** Events in any order, some perhaps known already. */
  add(events) {
    for (const event of events) {
      if (event.kind === "partial") this.partial = event.data.text;
      else this.add_one(event);
    }
    changed();
  }

  add_one(event) {
    if (this.ids.has(event.id)) return;
    this.ids.add(event.id);
    if (event.id > this.last_id) this.partial = "";
    this.first_id = Math.min(this.first_id, event.id);
    this.last_id = Math.max(this.last_id, event.id);
    const turn = this.turns.get(event.turn) ?? this.open_turn(event.turn);
    const in_order = turn.events.length === 0 || turn.events.at(-1).id < event.id;
    turn.events.push(event);
    if (!in_order) turn.events.sort((a, b) => a.id - b.id);
    turn.version = ++this.version;
  }

  open_turn(number) {
    const turn = { number, events: [], version: 0 };
    this.turns.set(number, turn);
    return turn;
  }

  /** The newest page again, after a connection was lost: a hole would be a lie, so then the past starts anew. */
  refresh(events) {
    const newest = events[0]?.id ?? 0;
    if (this.last_id && newest > this.last_id + 1) this.clear();
    this.add(events);
    if (this.first_id === 1) this.at_start = true;
  }

  async earlier() {
    const height = document.documentElement.scrollHeight;
    const first_id = this.first_id;
    this.add(await this.fetch_older(first_id, PAGE));
    if (this.first_id === first_id)
      await new Promise((resolve) => {
        setTimeout(resolve, LATE_MS);
      });
    this.at_start = this.first_id === 1 || this.first_id === first_id;
    requestAnimationFrame(() =>
      requestAnimationFrame(() =>
        scrollBy({ top: document.documentElement.scrollHeight - height, behavior: "instant" }),
      ),
    );
  }

  /** Who scrolls up to the beginning is given what was before; who has not scrolled is not. */
  fetch_when_seen(dom) {
    const look = ([{ isIntersecting }]) => {
      if (!dom.isConnected) return watch.disconnect();
      if (isIntersecting && scrolled_up && !is_busy(this.key)) act(this.key, "Earlier…", () => this.earlier());
    };
    const watch = new IntersectionObserver(look, { rootMargin: "200px" });
    watch.observe(dom);
  }

  draw() {
    const turns = [...this.turns.values()].sort((a, b) => a.events[0].id - b.events[0].id);
    const last = turns.at(-1);
    return h(
      "div",
      { class: "transcript", role: "log", "aria-label": `Transcript of ${this.name}`, "aria-live": "off" },
      !this.at_start &&
        turns.length > 0 &&
        h(
          "div",
          { class: "earlier", made: (dom) => this.fetch_when_seen(dom) },
          button(this.key, "Earlier…", () => this.earlier(), { kind: "small" }),
          refusal(this.key),
        ),
      turns.length === 0 && h("p", { class: "empty" }, "Nothing happened here yet."),
      turns.map((turn, index) => this.draw_turn(turn, index >= turns.length - OPEN_TURNS, turn === last)),
    );
  }

  draw_turn(turn, otherwise, is_last) {
    const key = `${this.key}:${turn.number}`;
    const open = toggled(key, otherwise);
    const all = toggled(`${key}:all`);
    const partial = is_last ? this.partial : "";
    return memo(`turn:${turn.number}`, [turn.version, open, all, partial, is_last, open && toggles_made], () =>
      draw_turn(key, turn, { open, all, partial }),
    );
  }
}

const CARET = h("span", { key: "caret", class: "cursor", "aria-hidden": "true" });

// ── A turn ───────────────────────────────────────────────────────────────────────────────────────

function draw_turn(key, turn, { open, all, partial }) {
  const start = turn.events.find((event) => event.kind === "turn_start");
  const end = turn.events.find((event) => event.kind === "turn_end");
  const steps = steps_of(turn.events);
  if (!start && !end && !steps.some((step) => step.call || step.words))
    return h("section", { class: "turn between" }, steps.map(draw_step));
  const hidden = all ? 0 : Math.max(0, steps.length - STEPS_SHOWN);
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
            { class: "earlier" },
            plain(`${count(hidden)} earlier steps`, () => toggle(`${key}:all`, true), { kind: "small" }),
          ),
        steps.slice(hidden).map(draw_step),
        partial && step_row("", prose(partial, { class: "live-text", caret: CARET }), { key: "partial" }),
        end && end.data.outcome !== "done" && step_row("", how_it_ended(end.data), { key: "end" }),
      ),
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

// ── Steps ────────────────────────────────────────────────────────────────────────────────────────

/** Events as they are shown: calls joined with their results, sub-agents' steps below the call that began them. */
function steps_of(events) {
  const steps = [];
  const calls = new Map();
  for (const event of events) {
    const { data } = event;
    const list = calls.get(data.parent)?.children ?? steps;
    if (event.kind === "turn_start" || event.kind === "mail")
      for (const mail of data.messages ?? []) steps.push({ id: `${event.id}:${mail.id}`, mail });
    else if (event.kind === "text" || event.kind === "thinking") list.push({ id: event.id, words: event });
    else if (event.kind === "tool_call") {
      const step = { id: event.id, call: event, result: null, children: [] };
      calls.set(data.tool_use_id, step);
      list.push(step);
    } else if (event.kind === "tool_result") join_result(calls, list, event);
    else if (event.kind !== "turn_end" && worth_a_line(event)) steps.push({ id: event.id, line: event });
  }
  return steps;
}

function join_result(calls, list, event) {
  const step = calls.get(event.data.tool_use_id);
  if (step) step.result = event;
  else
    list.push({
      id: event.id,
      call: { id: event.id, at: event.at, data: { name: "result of an earlier call", input: {} } },
      result: event,
      children: [],
    });
}

const worth_a_line = (event) => event.kind !== "state" || !["idle", "working"].includes(event.data.state);

function step_row(who, body, props) {
  return h(
    "div",
    { ...props, class: `step ${props?.class ?? ""}` },
    h("div", { class: "who" }, who),
    h("div", { class: "body" }, body),
  );
}

function draw_step(step) {
  if (step.mail) return mail_row(step);
  if (step.call) return step_row("", tool_box(step, draw_step), { key: step.id });
  if (step.words?.kind === "thinking") return thinking_row(step);
  if (step.words) return step_row("", prose(step.words.data.text), { key: step.id });
  return step_row("", h("p", { class: "dim" }, line_words(step.line)), { key: step.id });
}

function mail_row({ id, mail }) {
  const more = [
    `message ${mail.id}`,
    mail.in_reply_to && `in reply to ${mail.in_reply_to}`,
    mail.broadcast && "to everyone",
    mail.redelivered && "given again",
    mail.via === "page" && "typed on this agent's page",
  ];
  const from = mail.via === "page" || mail.from === "operator" ? "you" : mail.from;
  return step_row(
    `from ${from}`,
    h("div", { class: "mail" }, prose(mail.body), h("p", { class: "meta" }, more.filter(Boolean).join(" · "))),
    { key: id },
  );
}

function thinking_row({ id, words }) {
  const key = `thinking:${id}`;
  const text = words.data.text.trim();
  const lines = text.split("\n").length;
  const open = toggled(key);
  if (open || (lines === 1 && text.length < 120)) {
    return step_row(
      "thinking",
      h("div", { class: "thinking" }, prose(text), open && plain("fold", () => toggle(key, false), { kind: "quiet" })),
      { key: id },
    );
  }
  return step_row(
    "thinking",
    h(
      "button",
      { type: "button", class: "thinking folded", "aria-expanded": "false", onclick: () => toggle(key, true) },
      h("span", { class: "gist" }, text.split("\n", 1)[0]),
      h("span", { class: "fold-word" }, lines > 1 ? `${plural(lines, "line")}, unfold` : "unfold"),
    ),
    { key: id },
  );
}

function line_words({ kind, data, at }) {
  if (kind === "compaction")
    return `${clock(at, true)}  The conversation was compacted${data.pre_tokens ? ` from ${count(data.pre_tokens)}` : ""}${data.post_tokens ? ` to ${count(data.post_tokens)} tokens` : ""}.`;
  if (kind === "state")
    return `${clock(at, true)}  ${data.state.replace("_", " ")}${data.reason ? `: ${data.reason}` : ""}${data.until ? ` until ${clock(data.until)}` : ""}`;
  return `${clock(at, true)}  ${data.text ?? kind}`;
}
