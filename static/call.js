// Your call: everything that waits for the operator, and nothing else.

import { h } from "./dom.js";
import { ago, clock, plural, prose } from "./text.js";
import { button, empty, heading, panel, refusal } from "./parts.js";
import { agent_named, changed, is_new, is_running_phase, on, state } from "./store.js";
import { get, in_turn, post } from "./api.js";
import { approval_card, approve_all, kind_words, press, request_words, REST_MS } from "./approval.js";
import { signin } from "./signin.js";
import { is_parked, lever } from "./agents.js";
import { open_question, press_option, question_card } from "./question.js";
import { is_first_run, is_first_step, welcome_card } from "./welcome.js";

// What a notice points to is known here, too, and perhaps newer: then that counts.
const HOLDS = {
  approval: ({ id }) => pending_approval(id),
  question: ({ id }) => open_question(id),
  start_manager: () => !agent_named("manager"),
};
const pending_approval = (id) => state.approvals.find((row) => row.id === id && row.status === "pending");

/** What the hive says needs the operator, and sign-ins under way: they wait for a code. */
export function waiting() {
  const known = new Set(state.attention.map((row) => row.kind === "needs_login" && row.agent));
  const signing_in = state.agents.filter((agent) => agent.state === "signing_in" && !known.has(agent.name));
  return [
    ...state.attention.filter((row) => !(row.kind in HOLDS) || HOLDS[row.kind](row)),
    ...signing_in.map(({ name, state_since }) => ({
      key: `needs_login-${name}`,
      kind: "needs_login",
      agent: name,
      text: "",
      since: state_since,
    })),
  ];
}

// ── The keyboard ─────────────────────────────────────────────────────────────────────────────────
// Keys act on the marked card. When the mark moves to another by itself, keys rest for a moment: a second press
// that was meant for the first request must not decide the next, nor a stray one what has only just come. Whoever
// goes on typing meanwhile, perhaps in a field that has gone, is not heard before they pause.

let marked = "";
let rest_until = 0;

export function rest_keys() {
  rest_until = Date.now() + REST_MS;
}

function mark_card(rows) {
  if (rows.some((row) => row.key === marked)) return;
  rest_keys();
  marked = rows[0]?.key ?? "";
}

let sought; // a card that somebody followed a link to

export function show_card(key) {
  sought = key;
}

/** Once, when it is there: the page may have come before what it shows. */
function bring(row, dom) {
  if (row.key !== sought) return;
  sought = undefined;
  if (marked !== row.key) rest_keys();
  marked = row.key;
  requestAnimationFrame(() => dom.scrollIntoView({ block: "start" }));
  changed();
}

function choose(key) {
  if (marked === key) return;
  marked = key;
  changed();
}

export function call_keys(event) {
  const rows = waiting();
  const index = rows.findIndex((row) => row.key === marked);
  if (event.key === "j" || event.key === "k") return step(rows, index + (event.key === "j" ? 1 : -1));
  const row = rows[index];
  if (Date.now() < rest_until) return rest_keys();
  if (!row || event.repeat) return;
  if (row.kind === "approval") press(pending_approval(row.id), event.key);
  if (row.kind === "question" && /^[1-9]$/.test(event.key)) press_option(row.id, Number(event.key) - 1);
}

function step(rows, index) {
  if (!rows[index]) return;
  choose(rows[index].key);
  document.querySelector(`[data-card="${CSS.escape(rows[index].key)}"]`)?.scrollIntoView({ block: "nearest" });
}

// ── Everything else that needs a person ──────────────────────────────────────────────────────────

const NOTICES = {
  needs_login: {
    label: "Sign-in",
    tone: "bad",
    title: (row) => {
      if (agent_named(row.agent)?.state === "signing_in") return `${row.agent} signs in`;
      return row.key.startsWith("sign_in_ends") ? `${row.agent}'s sign-in ends soon` : `${row.agent} is signed out`;
    },
  },
  failed: { label: "Failed", tone: "bad", title: (row) => `${row.agent} failed` },
  crashed: { label: "Crash", tone: "bad", title: (row) => `${row.agent} crashed` },
  silent: { label: "Silence", tone: "bad", title: (row) => `${row.agent} is silent` },
  rate_limited: { label: "Limit", tone: "warn", title: (row) => `${row.agent} is at its limit` },
  paused: {
    label: "Paused",
    tone: "warn",
    title: (row) => (row.agent ? `${row.agent} was paused` : "agents were paused"),
  },
  budget: { label: "Budget", tone: "warn", title: (row) => `the budget of ${row.agent ?? "the hive"}` },
  dead_letter: {
    label: "Undelivered",
    tone: "bad",
    title: (row) => `a message${row.agent ? ` to ${row.agent}` : ""} could not be delivered`,
  },
};

function notice_card(row, props) {
  const { label, tone, title } = NOTICES[row.kind] ?? { label: row.kind, tone: "warn", title: () => row.text };
  const agent = row.agent && agent_named(row.agent);
  return h(
    "article",
    { ...props, class: `card ${props.class ?? ""}`, "aria-label": title(row) },
    h(
      "header",
      { class: "card-head" },
      h("div", { class: "card-title" }, h("span", { class: `label ${tone}` }, label), h("h3", null, title(row))),
      h(
        "span",
        { class: "dim" },
        ago(row.since),
        agent?.unread > 0 && ` · ${plural(agent.unread, "message")} ${agent.unread === 1 ? "waits" : "wait"}`,
      ),
    ),
    h(
      "div",
      { class: "card-foot" },
      row.kind === "needs_login" && agent
        ? signin(agent, `/api/agents/${agent.name}`, { words: prose(row.text, { class: "dim" }) })
        : h("div", { class: "decide" }, prose(row.text, { class: "dim" }), notice_buttons(row, agent)),
      refusal(notice_group(row)),
    ),
  );
}

const notice_group = (row) => `notice:${row.key}`;
const BROKEN = new Set(["failed", "crashed", "silent"]);

/** Mail that was set aside begins its attempts anew, and the notice of it is seen. */
async function give_again(row) {
  await post(`/api/messages/${row.message}/give_again`);
  await post("/api/messages/read", { ids: [row.id] });
}

/** A notice that came as a message goes when that is read; the others when what they tell of is over. */
function notice_buttons(row, agent) {
  const act = (label, action) =>
    lever(agent, `/api/agents/${agent.name}`, action, label, { group: notice_group(row), kind: "main" });
  return [
    row.key.startsWith("message-") &&
      button(notice_group(row), "Seen", () => post("/api/messages/read", { ids: [row.id] }), {
        name: `Seen: ${row.text}`,
      }),
    row.message && button(notice_group(row), "Give it again", () => give_again(row), { kind: "main" }),
    row.message && h("a", { class: "button", href: `#/flow/thread/${row.message}` }, `Look at #${row.message}`),
    agent && h("a", { class: "button", href: `#/agents/${agent.name}` }, `Open ${agent.name}`),
    agent && BROKEN.has(row.kind) && (agent.running ? act("Restart", "restart") : act("Start", "start")),
    agent && (BROKEN.has(row.kind) || row.kind === "rate_limited") && is_parked(agent) && act("Resume", "resume"),
    agent?.paused && (row.kind === "budget" || row.kind === "paused") && act("Resume", "resume"),
  ];
}

// ── The view ─────────────────────────────────────────────────────────────────────────────────────

function card(row) {
  const keys = row.key === marked;
  const props = {
    key: row.key,
    "data-card": row.key,
    class: `${is_new("attention", row.key) ? "new" : ""} ${keys ? "marked" : ""}`,
    onpointerdown: () => choose(row.key),
    made: (dom) => {
      dom.addEventListener("focusin", () => choose(row.key));
      bring(row, dom);
    },
  };
  if (is_first_step(row)) return welcome_card(props);
  if (row.kind === "approval") return approval_card(pending_approval(row.id), { keys, ...props });
  if (row.kind === "question") return question_card(open_question(row.id), { keys, ...props });
  return notice_card(row, props);
}

// What fills a screen is drawn first and seen at once; the rest comes with the next frame.
const FIRST = 4;
let begun = false;

function first_screen(rows) {
  if (begun || rows.length <= FIRST) return rows;
  begun = true;
  changed();
  return rows.slice(0, FIRST);
}

const oldest = (rows) => rows.map((row) => row.since).sort()[0];

export function call_view() {
  const rows = waiting();
  mark_card(rows);
  const under_way = state.approvals.filter((row) => is_running_phase(row.phase));
  return [
    heading(
      rows.length
        ? `${plural(rows.length, "thing")} ${rows.length === 1 ? "waits" : "wait"} for you`
        : "Nothing waits for you",
      rows.length > 0 && ["oldest ", ago(oldest(rows), "for")],
    ),
    approve_all(rows.filter((row) => row.kind === "approval").map((row) => pending_approval(row.id))),
    h(
      "div",
      { class: "cards" },
      is_first_run() && !rows.some(is_first_step) && welcome_card({}),
      rows.length || is_first_run()
        ? first_screen(rows).map(card)
        : panel(
            null,
            empty("All requests are decided and all questions answered. What comes next appears here by itself."),
          ),
    ),
    under_way.length > 0 && [
      heading("Under way", plural(under_way.length, "request")),
      h(
        "div",
        { class: "cards" },
        under_way.map((row) => approval_card(row, { key: row.id, brief: true })),
      ),
    ],
    h("p", { class: "after" }, h("a", { href: "#/approvals" }, "All requests and how they ended")),
  ];
}

// ── Requests of the past ─────────────────────────────────────────────────────────────────────────

export const past = { rows: null, error: null };

export const load_past = in_turn(async () => {
  try {
    Object.assign(past, { rows: (await get("/api/approvals")).approvals, error: null });
  } catch (error) {
    past.error = error;
  }
  changed();
});

on("approval", (row) => {
  if (load_past.is_under_way()) load_past();
  if (past.rows) past.rows = [row, ...past.rows.filter(({ id }) => id !== row.id)].sort((a, b) => b.id - a.id);
});

export function past_view() {
  return [
    heading("All requests", h("a", { href: "#/call" }, "Your call")),
    panel(
      null,
      past.error && h("p", { class: "refusal pad", role: "alert" }, past.error.message),
      !past.rows && !past.error && empty("Loading…"),
      past.rows?.length === 0 && empty("Nobody asked for anything yet."),
      past.rows?.map((row) =>
        h(
          "a",
          { key: row.id, class: "row line", href: `#/approvals/${row.id}` },
          h("span", { class: "label" }, kind_words(row)),
          h("span", { class: "grow" }, `#${row.id} ${request_words(row)}`),
          h(
            "span",
            { class: { failed: "bad", approved: "ok", pending: "warn" }[row.status] ?? "dim" },
            row.phase && row.status === "approved" ? row.phase : row.status,
          ),
          h("span", { class: "dim" }, clock(row.requested_at)),
        ),
      ),
    ),
  ];
}
