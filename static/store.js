// What the page knows: the last snapshot with every change since. Views read `state`; nothing else writes it.

import { set_clock } from "./text.js";

export const state = {
  ready: false,
  live: false,
  lost_at: null,
  hive: {},
  version: "",
  agents: [],
  approvals: [],
  questions: [],
  messages: [],
  deploys: [],
  attention: [],
  usage: { today_usd: 0 },
  paused_all: false,
  logs: new Map(), // deploy id → lines
};

// Rows that came in while this page was looking: they slide in, once. Rows of a snapshot never do.
const arrived = new Set();
export const is_new = (kind, id) => arrived.has(`${kind}:${id}`);

// ── Drawing again ────────────────────────────────────────────────────────────────────────────────

let draw = () => {};
let due = false;
export function draw_with(function_) {
  draw = function_;
}

/** Asks for a new drawing: many changes, one drawing. A hidden page has no frames, but it has a title. */
export function changed() {
  if (due) return;
  due = true;
  const now = () => {
    due = false;
    draw();
  };
  if (document.hidden) setTimeout(now, 200);
  else requestAnimationFrame(now);
}

// ── Changes ──────────────────────────────────────────────────────────────────────────────────────

const MESSAGES_KEPT = 2000;
const LOG_LINES_KEPT = 5000;
const listeners = { events: new Set(), usage: new Set(), roster: new Set(), approval: new Set() };

/** For what no list of this file holds: `on("events", (agent, events) => …)`, `on("usage", …)`, `on("roster", …)`. */
export const on = (kind, listener) => listeners[kind].add(listener);
const tell = (kind, ...news) => listeners[kind].forEach((listener) => listener(...news));

export function connected(live) {
  if (live === state.live) return;
  state.live = live;
  state.lost_at = live ? null : new Date().toISOString();
  changed();
}

export function take(kind, data) {
  if (kind === "snapshot") take_snapshot(data);
  else take_change(data);
  changed();
}

function take_snapshot(snapshot) {
  set_clock(snapshot.now);
  const messages = with_older(snapshot.messages);
  Object.assign(state, snapshot, { ready: true, messages });
  state.logs.clear(); // lines may have been missed: who looks at one asks for the whole
  arrived.clear();
  sort_agents();
  tell("roster");
}

/** Keeps the older messages that were loaded before, unless there may be a hole between them and these. */
function with_older(messages) {
  const ids = new Set(messages.map((message) => message.id));
  if (!state.messages.some((message) => ids.has(message.id))) return messages;
  return [...state.messages.filter((message) => message.id < messages[0].id), ...messages];
}

const CHANGES = {
  agent: ({ row }) => {
    if (replace(state.agents, row, "name")) tell("roster");
    sort_agents();
  },
  agent_gone: ({ name }) => {
    remove(state.agents, name, "name");
    tell("roster");
  },
  approval: ({ row }) => {
    if (is_open_approval(row)) replace(state.approvals, row);
    else remove(state.approvals, row.id);
    tell("approval", row);
  },
  question: ({ row }) => (row.status === "open" ? replace(state.questions, row) : remove(state.questions, row.id)),
  message: ({ row }) => {
    if (replace(state.messages, row)) {
      state.messages.sort(by_id); // changes need not come in the order in which messages were written
      arrived.add(`message:${row.id}`);
    }
    if (state.messages.length > MESSAGES_KEPT) state.messages.splice(0, 500);
  },
  deploy: ({ row }) => {
    if (replace(state.deploys, row)) arrived.add(`deploy:${row.id}`);
  },
  deploy_gone: ({ id }) => remove(state.deploys, id),
  deploy_log: ({ id, lines }) => add_log(id, lines),
  attention: ({ rows }) => take_attention(rows),
  usage: ({ today_usd }) => {
    state.usage.today_usd = today_usd;
    tell("usage");
  },
  events: ({ agent, events }) => tell("events", agent, events),
};

function take_change(change) {
  CHANGES[change.kind]?.(change);
}

function take_attention(rows) {
  const known = new Set(state.attention.map((row) => row.key));
  for (const row of rows) if (!known.has(row.key)) arrived.add(`attention:${row.key}`);
  state.attention = rows;
}

/** Puts `row` in place of the one with the same id, or at the end; says whether it is a new one. */
function replace(rows, row, by = "id") {
  const index = rows.findIndex((other) => other[by] === row[by]);
  if (index < 0) rows.push(row);
  else rows[index] = row;
  return index < 0;
}

const by_id = (a, b) => a.id - b.id;

function remove(rows, id, by = "id") {
  const index = rows.findIndex((row) => row[by] === id);
  if (index >= 0) rows.splice(index, 1);
}

function add_log(id, lines) {
  const log = state.logs.get(id);
  if (!log) return; // nobody looks at it: whoever opens it asks for the whole
  log.push(...lines);
  if (log.length > LOG_LINES_KEPT) log.splice(0, log.length - LOG_LINES_KEPT);
}

export function add_older_messages(rows) {
  const known = new Set(state.messages.map((message) => message.id));
  state.messages = [...rows.filter((row) => !known.has(row.id)), ...state.messages].sort(by_id);
  changed();
}

// ── Looking ──────────────────────────────────────────────────────────────────────────────────────

export const is_running_phase = (phase) => phase === "queued" || phase === "building" || phase === "switching";
const is_open_approval = (row) => row.status === "pending" || is_running_phase(row.phase);
export const agent_named = (name) => state.agents.find((agent) => agent.name === name);

function sort_agents() {
  state.agents.sort((a, b) => b.manager - a.manager || a.name.localeCompare(b.name));
}
