// One agent: its transcript, a composer, its state. The dashboard and the agent's own page use the same parts;
// they differ in where the calls go (`base`) and in which levers there are.

import { h } from "./dom.js";
import { ago, clock, prose, short_sha, you_or } from "./text.js";
import {
  act,
  asking_button,
  button,
  context_bar,
  cost_words,
  draft,
  empty,
  fact,
  field,
  heading,
  mark,
  panel,
  plain,
  refusal,
  REHEARSAL,
  spend_draft,
  state_words,
  toggle,
  toggled,
} from "./parts.js";
import { agent_named, changed, on, state } from "./store.js";
import { get, in_turn, post, send_messages } from "./api.js";
import { composer } from "./composer.js";
import { Transcript } from "./transcript.js";
import { signin } from "./signin.js";
import { destroy_button, destroy_form, levers, sign_in_ends_soon, why_words } from "./agents.js";

// ── Writing to it ─────────────────────────────────────────────────────────────────────────────────

const WHEN = {
  working: "It reaches the running turn.",
  paused: "It waits until you resume.",
  stopped: "It waits until the agent runs.",
  offline: "It waits until the agent runs.",
  failed: "It waits until the agent runs.",
  needs_login: "It waits until the sign-in.",
  rate_limited: "It waits for the limit.",
};

function write_to(agent, { base, to }) {
  const { name, state: now } = agent;
  const key = `to:${name}`;
  return composer({
    key,
    label: `Write to ${name}`,
    placeholder: `Write to ${name}. ${WHEN[now] ?? ""}`,
    name: `Send to ${name}`,
    send: (body) => send_messages(key, to ? { to, body } : { body }),
    files: Boolean(to),
    beside: button(`interrupt:${name}`, "Interrupt", () => post(`${base}/interrupt`), { disabled: now !== "working" }),
    below: refusal(`interrupt:${name}`),
  });
}

// ── State ────────────────────────────────────────────────────────────────────────────────────────

function model_form(agent, base) {
  const key = `model:${agent.name}`;
  const group = `agent:${agent.name}`;
  const set = async () => {
    const model = draft(key).trim();
    await post(`${base}/model`, { model });
    if (draft(key).trim() !== model) return; // another is being typed
    spend_draft(key);
    toggle(`${key}:open`, false);
  };
  return h(
    "div",
    { class: "decide" },
    field(key, {
      label: `Model for ${agent.name}`,
      placeholder: "sonnet, opus, haiku, or a full name",
      on_enter: () => act(group, "Set model", set),
    }),
    button(group, "Set model", set),
  );
}

function state_panel(agent, base, { first = null, end = null, last = null }) {
  const group = `agent:${agent.name}`;
  const disabled = agent.running === false; // there is nobody to do it
  const model_open = toggled(`model:${agent.name}:open`);
  return panel(
    { class: "pad" },
    h(
      "dl",
      { class: "facts" },
      fact("model", agent.active_model ?? "not known yet"),
      agent.context_window &&
        fact(
          "context",
          `${Math.round((100 * (agent.context_tokens ?? 0)) / agent.context_window)} % of ${Math.round(agent.context_window / 1000)} k `,
          context_bar(agent),
        ),
      fact("today", cost_words(agent)),
      agent.signed_in_until &&
        fact(
          "signed in",
          agent.signed_in_renews
            ? "renews itself"
            : ["until ", clock(agent.signed_in_until), ", ", ago(agent.signed_in_until, "until")],
        ),
      agent.deployed_sha && fact("deployed", h("code", null, short_sha(agent.deployed_sha))),
      agent.pending_reminders > 0 && fact("reminders", agent.pending_reminders),
      agent.unread > 0 && fact("waiting mail", agent.unread),
      agent.description && fact("purpose", agent.description),
    ),
    h(
      "div",
      { class: "buttons" },
      first,
      button(group, "Compact", () => post(`${base}/compact`), { kind: "small", disabled }),
      asking_button(group, "New session", "Begin a new session", () => post(`${base}/new_session`), { disabled }),
      plain("Model", () => toggle(`model:${agent.name}:open`, !model_open), {
        kind: "small",
        "aria-expanded": String(model_open),
      }),
      !wants_signin(agent) && plain("Sign in", () => toggle(opened(agent), true), { kind: "small" }),
      end,
    ),
    model_open && model_form(agent, base),
    last,
    refusal(group),
  );
}

const SIGNED_OUT = new Set(["needs_login", "signing_in"]);
const UNDER_WAY = new Set(["starting", "code_wanted", "checking"]);
const opened = ({ name }) => `login:${name}`; // by hand, while it is signed in

const needs_signin = (agent) => SIGNED_OUT.has(agent.state) || UNDER_WAY.has(agent.login?.phase);
const wants_signin = (agent) => needs_signin(agent) || toggled(opened(agent));

const signing_in = new Set(); // agents, as they were drawn last

function signin_panel(agent, base) {
  const { name, login } = agent;
  if (UNDER_WAY.has(login?.phase)) signing_in.add(name);
  else if (signing_in.delete(name) && login?.phase === "done") toggle(opened(agent), false);
  if (!wants_signin(agent)) return null;
  const close =
    !needs_signin(agent) &&
    plain("Close", () => toggle(opened(agent), false), { "aria-label": `Close the sign-in of ${name}` });
  const words = close && h("p", { class: "dim" }, "A new sign-in takes the place of the one it has.");
  return panel({ class: "pad" }, signin(agent, base, { words, close }));
}

// ── Open threads ─────────────────────────────────────────────────────────────────────────────────

function thread_rows(name, { questions, reminders }) {
  return [
    ...questions.map((row) =>
      h(
        "div",
        { class: "row", key: `q${row.id}` },
        h(
          "div",
          { class: "row-top" },
          h("span", null, row.to === name ? `${you_or(row.from)} asked` : `asked ${you_or(row.to)}`),
          h("span", null, clock(row.asked_at)),
        ),
        prose(row.question),
      ),
    ),
    ...reminders.map((row) =>
      h(
        "div",
        { class: "row", key: `r${row.id}` },
        h("div", { class: "row-top" }, h("span", null, "reminder"), ago(row.due_at, "until")),
        prose(row.body),
      ),
    ),
  ];
}

function threads_panel(name, threads) {
  const rows = thread_rows(name, threads);
  return [
    heading("Open threads", rows.length || null),
    panel({ class: "brief" }, rows.length ? rows : empty("No open question, no reminder.")),
  ];
}

// ── The whole ────────────────────────────────────────────────────────────────────────────────────

function reason_line(agent) {
  const words = why_words(agent);
  const tone = agent.state === "failed" ? "bad" : agent.attached ? "warn" : "dim";
  return words && h("p", { class: `reason-line ${tone}` }, words);
}

function sign_in_line(agent) {
  return (
    sign_in_ends_soon(agent) &&
    !wants_signin(agent) &&
    h(
      "p",
      { class: "reason-line warn" },
      "Its sign-in ends ",
      ago(agent.signed_in_until, "until"),
      " and does not renew itself. ",
      plain("Sign in again", () => toggle(opened(agent), true), { kind: "small" }),
    )
  );
}

export function agent_main(agent, transcript, where, crumbs) {
  return [
    h(
      "div",
      { class: "heading agent-heading" },
      h(
        "h2",
        null,
        crumbs,
        mark(agent),
        h("strong", null, agent.name),
        " ",
        h("span", { class: "dim" }, state_words(agent), " ", ago(agent.state_since, "for")),
      ),
      h("span", { class: "dim" }, agent.until && ["goes on at ", clock(agent.until), ", ", ago(agent.until, "until")]),
      h(
        "div",
        { class: "buttons" },
        !transcript.find.open &&
          plain("Find", () => transcript.find.show(), { kind: "small", "aria-keyshortcuts": "Control+F" }),
        plain("State", () => toggle("side", !toggled("side")), {
          kind: "small narrow",
          "aria-expanded": String(toggled("side")),
        }),
      ),
      transcript.find.draw(),
    ),
    agent.status_text && h("p", { class: "status dim" }, agent.status_text),
    agent.rehearsal && h("p", { class: "rehearsal" }, REHEARSAL),
    reason_line(agent),
    sign_in_line(agent),
    signin_panel(agent, where.base),
    panel({ class: "transcript-panel" }, transcript.draw(), write_to(agent, where)),
  ];
}

/** The notes that it keeps for later sessions: only it can read them, so it is asked. */
function notes_panel({ name, running }, base, notes) {
  const group = `notes:${name}`;
  const ask = button(group, notes ? "Look again" : "Show", () => post(`${base}/send_notes`), {
    kind: "quiet",
    disabled: running === false,
    name: `Show the notes of ${name}`,
  });
  return [
    heading("Notes", ask),
    refusal(group),
    notes && panel({ class: "brief" }, notes.text ? prose(notes.text, { class: "pad" }) : empty("It has written none yet.")),
  ];
}

/** `more` has levers before and after those that both pages have, and forms below. */
export function agent_side(agent, base, threads, notes, more = {}) {
  return [
    heading("State"),
    state_panel(agent, base, more),
    threads_panel(agent.name, threads),
    notes_panel(agent, base, notes),
  ];
}

// ── On the dashboard ─────────────────────────────────────────────────────────────────────────────

let shown = null; // {name, transcript, reminders, counted: how many there were when they were asked for, error, load}

export function show_agent(name) {
  const path = `/api/agents/${name}`;
  const older = (before, max, find) =>
    get(`${path}/events?before=${before}&max=${max}${find && `&find=${encodeURIComponent(find)}`}`);
  if (shown?.name !== name) {
    const mine = { name, transcript: new Transcript(name, older), reminders: [], error: null };
    shown = Object.assign(mine, { load: in_turn(() => load_agent(mine)) });
  }
  shown.counted = agent_named(name)?.pending_reminders;
  return shown.load();
}

on("roster", () => {
  if (shown && !agent_named(shown.name)) shown = null; // should one come under this name, it is another
});

/** Also after a connection was lost: what happened meanwhile is asked for again. */
async function load_agent(mine) {
  try {
    const answer = await get(`/api/agents/${mine.name}`);
    mine.transcript.refresh(answer.events);
    Object.assign(mine, { reminders: answer.reminders, error: null });
  } catch (error) {
    mine.error = error;
  }
  changed();
}

on("events", (name, events) => {
  if (shown?.name === name) shown.transcript.add(events);
});

export function agent_view(name) {
  const agent = agent_named(name);
  if (!agent) {
    shown = null; // what was asked for was refused
    return panel(null, empty(`There is no agent named ${name}.`));
  }
  if (shown?.name !== name) show_agent(name);
  return [
    agent_main(agent, shown.transcript, { base: `/api/agents/${name}`, to: name }, [
      h("a", { href: "#/agents" }, "Agents"),
      " / ",
    ]),
    shown.error && h("p", { class: "refusal", role: "alert" }, shown.error.message),
  ];
}

export function agent_view_side(name) {
  const agent = agent_named(name);
  if (!agent) return null;
  if (agent.pending_reminders !== shown.counted) {
    shown.counted = agent.pending_reminders;
    shown.load();
  }
  const questions = state.questions.filter((row) => row.from === name || row.to === name);
  return agent_side(
    agent,
    `/api/agents/${name}`,
    { questions, reminders: shown.reminders },
    shown.transcript.notes,
    { first: levers(agent), end: destroy_button(agent), last: destroy_form(agent) },
  );
}
