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
};

// Rows that came in while this page was looking: they slide in, once, and are old then. Rows of a snapshot never do.
const arrived = new Set();
const SLIDE_MS = 1000;
export const is_new = (kind, id) => arrived.has(`${kind}:${id}`);

function arrive(kind, id) {
  const key = `${kind}:${id}`;
  arrived.add(key);
  setTimeout(() => arrived.delete(key), SLIDE_MS);
}

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
const KINDS = ["events", "usage", "roster", "approval", "deploy_log", "snapshot", "returned"];
const listeners = Object.fromEntries(KINDS.map((kind) => [kind, new Set()]));

/** For what no list of this file holds: `on("events", (agent, events) => …)`, `on("approval", (row) => …)`, … */
export const on = (kind, listener) => listeners[kind].add(listener);
const tell = (kind, ...news) => listeners[kind].forEach((listener) => listener(...news));

export function connected(live) {
  if (live === state.live) return;
  state.live = live;
  state.lost_at = live ? null : new Date().toISOString();
  if (live && state.ready) tell("returned");
  changed();
}

export function take(kind, data) {
  if (kind === "snapshot") take_snapshot(data);
  else take_change(data);
  changed();
}

function take_snapshot(snapshot) {
  set_clock(snapshot.now);
  const messages = with_older(snapshot.messages, state.messages);
  const deploys = with_older(snapshot.deploys, state.deploys);
  Object.assign(state, snapshot, { ready: true, messages, deploys });
  arrived.clear();
  sort_agents();
  tell("roster");
  tell("snapshot");
}

/** These rows, oldest first, with the older ones that were `known` before, unless there may be a hole between them. */
export function with_older(rows, known) {
  const ids = new Set(rows.map((row) => row.id));
  const first = Math.min(...ids);
  const older = known.some((row) => ids.has(row.id)) ? known.filter((row) => row.id < first) : [];
  return [...older, ...rows].sort(by_id);
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
      arrive("message", row.id);
    }
    if (state.messages.length > MESSAGES_KEPT) state.messages.splice(0, 500);
  },
  deploy: ({ row }) => {
    if (replace(state.deploys, row)) arrive("deploy", row.id);
  },
  deploy_gone: ({ id }) => remove(state.deploys, id),
  deploy_log: (change) => tell("deploy_log", change),
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
  for (const row of rows) if (!known.has(row.key)) arrive("attention", row.key);
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

/** `list` is "messages" or "deploys". */
export function add_older(list, rows) {
  const known = new Set(state[list].map((row) => row.id));
  state[list] = [...rows.filter((row) => !known.has(row.id)), ...state[list]].sort(by_id);
  changed();
}

// ── Looking ──────────────────────────────────────────────────────────────────────────────────────

export const is_running_phase = (phase) => phase === "queued" || phase === "building" || phase === "switching";
const is_open_approval = (row) => row.status === "pending" || is_running_phase(row.phase);
export const agent_named = (name) => state.agents.find((agent) => agent.name === name);

const padded = (name) => name.replace(/\d+/g, (digits) => digits.padStart(9, "0"));

/** a2 comes before a10. */
export const by_name = (one, other) => (padded(one) < padded(other) ? -1 : 1);

function sort_agents() {
  state.agents.sort((a, b) => b.manager - a.manager || by_name(a.name, b.name));
}
