// Flow: messages between agents as they happen, oldest first, with a composer at the end.

import { h, memo } from "./dom.js";
import { clock, prose, prose_preview, you_or } from "./text.js";
import {
  act,
  button,
  draft,
  empty,
  field,
  fold,
  heading,
  panel,
  plain,
  refusal,
  set_draft,
  spend_draft,
  toggle,
  toggled,
} from "./parts.js";
import { add_older_messages, is_new, state } from "./store.js";
import { get, post, send_message } from "./api.js";
import { talk_graph } from "./graph.js";

const who = you_or;

/** What Your call shows as a notice stays there until it is seen there. */
function is_unread(message) {
  return (
    message.to === "operator" &&
    message.state !== "acked" &&
    !state.attention.some((row) => row.key === `message-${message.id}`)
  );
}

export const unread_count = () =>
  state.messages.filter((message) => message.from !== "system" && is_unread(message)).length;

// ── The side column ──────────────────────────────────────────────────────────────────────────────

const BRIEF = 6;

export function flow_brief() {
  const latest = together(state.messages.slice(-10 * BRIEF)).slice(-BRIEF);
  return [
    heading("Flow", latest.length > 0 && h("a", { href: "#/flow" }, "all and write")),
    panel(
      { class: "brief" },
      latest.length
        ? latest.map((message) =>
            h(
              "div",
              { class: `row ${is_new("message", message.id) ? "new" : ""}`, key: message.id },
              route(message),
              h("p", { class: "clamp" }, prose_preview(message.body, 200)),
            ),
          )
        : empty("No message yet."),
    ),
  ];
}

/** A message to everyone is stored as a copy each; it is shown once. */
function together(messages) {
  const out = [];
  for (const message of messages) {
    const last = out.at(-1);
    if (
      message.broadcast &&
      last?.broadcast &&
      last.from === message.from &&
      last.at === message.at &&
      last.body === message.body
    )
      out[out.length - 1] = { ...last, to: "all" };
    else out.push(message);
  }
  return out;
}

function route(message) {
  return h(
    "div",
    { class: "row-top" },
    h("span", null, who(message.from), " → ", who(message.to)),
    h("span", null, clock(message.at)),
  );
}

// ── Filter and thread ────────────────────────────────────────────────────────────────────────────

const filter = () => toggled("flow:with", "");

/** All messages that hang together with `id` by what answers what. */
function thread_of(id) {
  const members = new Set([id]);
  let size;
  do {
    size = members.size;
    for (const message of state.messages) {
      if (members.has(message.id) && message.in_reply_to) members.add(message.in_reply_to);
      if (members.has(message.in_reply_to)) members.add(message.id);
    }
  } while (members.size > size);
  return state.messages.filter((message) => members.has(message.id));
}

function shown_messages(thread) {
  if (thread) return thread_of(thread);
  const name = filter();
  return name ? state.messages.filter((message) => message.from === name || message.to === name) : state.messages;
}

// ── Older ones ───────────────────────────────────────────────────────────────────────────────────

const PAGE = 200;
const FEW = 100; // a snapshot has as many, if there are
const reached_start = new Set();
const at_start = () => state.messages.length < FEW || reached_start.has("") || reached_start.has(filter());

async function earlier() {
  const name = filter();
  const first = shown_messages(null)[0]?.id ?? state.messages[0]?.id;
  const { messages } = await get(
    `/api/messages?max=${PAGE}${first ? `&before=${first}` : ""}${name ? `&with=${name}` : ""}`,
  );
  if (messages.length < PAGE) reached_start.add(name);
  add_older_messages(messages);
}

// ── Reading ──────────────────────────────────────────────────────────────────────────────────────

let marking = false;

/** What is on the screen of a person who looks counts as read. */
export async function mark_read() {
  const ids = state.messages.filter(is_unread).map((message) => message.id);
  if (!ids.length || marking || document.hidden) return;
  marking = true;
  try {
    await post("/api/messages/read", { ids });
  } catch {
    // still unread then: the next look tries again
  } finally {
    setTimeout(() => {
      marking = false;
    }, 2000);
  }
}

// ── The view ─────────────────────────────────────────────────────────────────────────────────────

const UNDELIVERED = { queued: "waiting", leased: "being read", dead: "undelivered" };

function message_row(message) {
  const { id, in_reply_to, state: delivery, from } = message;
  const mine = from === "operator";
  return h(
    "article",
    {
      class: `message ${mine ? "mine" : ""} ${from === "system" ? "from-system" : ""} ${is_new("message", id) ? "new" : ""}`,
      id: `message-${id}`,
      "aria-label": `${who(from)} to ${who(message.to)}`,
    },
    route(message),
    prose(message.body),
    h(
      "p",
      { class: "meta" },
      h("a", { href: `#/flow/thread/${id}` }, `#${id}`),
      in_reply_to && [" · in reply to ", h("a", { href: `#/flow/thread/${id}` }, `#${in_reply_to}`)],
      message.broadcast && " · to everyone",
      message.kind && ` · ${message.kind.replaceAll("_", " ")}`,
      message.to !== "operator" &&
        UNDELIVERED[delivery] &&
        h("span", { class: delivery === "dead" ? "bad" : "" }, ` · ${UNDELIVERED[delivery]}`),
      message.attempts > 1 && ` · attempt ${message.attempts}`,
    ),
  );
}

const SEVERAL = "several";
const NAMED = { "*": "all agents", [SEVERAL]: "those chosen below" };

function choose_several(names, chosen) {
  const press = (name) =>
    toggle("flow:several", chosen.includes(name) ? chosen.filter((other) => other !== name) : [...chosen, name]);
  return h(
    "div",
    { class: "buttons several", role: "group", "aria-label": "Recipients" },
    names.map((name) =>
      plain(name, () => press(name), { key: name, kind: "small", "aria-pressed": String(chosen.includes(name)) }),
    ),
  );
}

function compose(thread) {
  const last = thread && thread_of(thread).at(-1);
  const partner = last && (last.from === "operator" ? last.to : last.from);
  const key = thread ? `flow:${thread}` : "flow";
  const names = state.agents.map((agent) => agent.name);
  const to = names.includes(partner) ? partner : draft("flow:to") || (names.includes(filter()) && filter()) || names[0];
  const several = to === SEVERAL;
  const chosen = several ? toggled("flow:several", []).filter((name) => names.includes(name)) : [to];
  const send = async () => {
    const body = draft(key).trim();
    if (!body || !to) return;
    for (const name of chosen)
      await send_message(`${key}:${name}`, { to: name, body, ...(name === partner && { in_reply_to: last.id }) });
    if (draft(key).trim() === body) spend_draft(key);
  };
  return h(
    "div",
    { class: "composer" },
    h(
      "div",
      { class: "decide" },
      h(
        "select",
        {
          key: `to:${names.join()}:${to}`,
          class: "field to",
          "aria-label": "To",
          onchange: (event) => {
            set_draft("flow:to", event.target.value);
            toggle("flow:to", event.target.value);
          },
        },
        names.map((name) => h("option", { value: name, selected: name === to }, `to ${name}`)),
        names.length > 1 && h("option", { value: "*", selected: to === "*" }, "to all"),
        names.length > 2 && h("option", { value: SEVERAL, selected: several }, "to several…"),
      ),
      field(key, {
        tag: "textarea",
        rows: "2",
        label: to === partner ? `Reply to ${to}` : "Message",
        placeholder: to === partner ? `Reply to ${to}` : `Write to ${NAMED[to] ?? to ?? "an agent, once there is one"}`,
        on_enter: () => act("flow:send", "Send", send),
      }),
      button("flow:send", "Send", send, { kind: "main", disabled: !to || chosen.length === 0 }),
    ),
    several && choose_several(names, chosen),
    refusal("flow:send"),
  );
}

function filter_field() {
  const names = [...new Set(state.messages.flatMap((message) => [message.from, message.to]))]
    .filter((name) => name !== "*")
    .sort();
  return h(
    "label",
    null,
    "with ",
    h(
      "select",
      { class: "field small", onchange: (event) => toggle("flow:with", event.target.value) },
      h("option", { value: "", selected: !filter() }, "anyone"),
      names.map((name) => h("option", { key: name, value: name, selected: filter() === name }, who(name))),
    ),
  );
}

export function flow_view(thread) {
  const messages = together(shown_messages(thread));
  return [
    thread
      ? heading(`Thread of #${thread}`, h("a", { href: "#/flow" }, "All messages"))
      : heading("Flow", filter_field()),
    !thread &&
      messages.length > 0 &&
      panel(
        { class: "talk" },
        fold("flow:graph", "Who talks to whom", () => talk_graph(state.messages)),
      ),
    panel(
      { class: "flow" },
      !thread &&
        messages.length > 0 &&
        !at_start() &&
        h(
          "div",
          { class: "earlier" },
          button("flow:earlier", "Earlier…", earlier, { kind: "small" }),
          refusal("flow:earlier"),
        ),
      messages.length === 0 &&
        empty("No message yet. What agents write to each other and to you appears here as it happens."),
      messages.map((message) =>
        memo(message.id, [message.state, message.attempts, message.to, is_new("message", message.id)], () =>
          message_row(message),
        ),
      ),
      compose(thread),
    ),
  ];
}
