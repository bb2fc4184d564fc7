// Flow: messages between agents as they happen, oldest first, with a composer at the end.

import { h, memo } from "./dom.js";
import { prose, you_or } from "./text.js";
import {
  button,
  choice,
  draft,
  empty,
  fold,
  heading,
  panel,
  plain,
  refusal,
  set_draft,
  toggle,
  toggled,
} from "./parts.js";
import { add_older, by_name, changed, is_new, state } from "./store.js";
import { get, post, send_messages } from "./api.js";
import { composer } from "./composer.js";
import { copies_of, is_unread, route, together } from "./mail.js";
import { talk_graph } from "./graph.js";

// ── Filter and thread ────────────────────────────────────────────────────────────────────────────

const filter = () => toggled("flow:with", "");

const threads = new Map(); // by the message that was asked for: {messages: what the host has of it, however old; error}

export function load_thread(id) {
  const number = Number(id);
  get(`/api/messages/${id}/thread`)
    .then(
      ({ messages }) => threads.set(number, { messages }),
      (error) => threads.set(number, { messages: threads.get(number)?.messages ?? [], error }),
    )
    .finally(changed);
}

function known_of(id) {
  const here = new Set(state.messages.map((message) => message.id));
  return [...(threads.get(id)?.messages ?? []).filter((message) => !here.has(message.id)), ...state.messages];
}

/** All messages that hang together with `id` by what answers what; the copies of one count as that one. */
function thread_of(id) {
  const messages = together(known_of(id));
  const shown_as = new Map(messages.flatMap((message) => copies_of(message).map((copy) => [copy.id, message.id])));
  const as_shown = (number) => shown_as.get(number) ?? number;
  const members = new Set([as_shown(id)]);
  let size;
  do {
    size = members.size;
    for (const message of messages) {
      const answered = message.in_reply_to && as_shown(message.in_reply_to);
      if (answered && members.has(message.id)) members.add(answered);
      if (members.has(answered)) members.add(message.id);
    }
  } while (members.size > size);
  return messages.filter((message) => members.has(message.id));
}

function shown_messages(thread) {
  if (thread) return thread_of(thread);
  const name = filter();
  const with_name = ({ from, to }) => !name || from === name || to === name;
  return together(state.messages.filter(with_name));
}

// ── Older ones ───────────────────────────────────────────────────────────────────────────────────

const FEW = 100; // a snapshot has as many, if there are
let very_first = 0;
export const at_start = () => state.messages.length < FEW || state.messages[0].id === very_first;

/** The next older ones, whoever wrote them: what is here has no holes. */
export async function load_older(most) {
  const first = state.messages[0]?.id;
  const { messages } = await get(`/api/messages?max=${most}${first ? `&before=${first}` : ""}`);
  if (state.messages[0]?.id !== first) return; // some came or went meanwhile: there would be a hole between these
  add_older("messages", messages);
  if (messages.length < most) very_first = state.messages[0]?.id;
}

/** Until one is there that the filter lets through. */
async function earlier() {
  const shown = shown_messages(null).length;
  do await load_older(filter() ? 1000 : 200);
  while (shown_messages(null).length === shown && !at_start());
}

// ── Reading ──────────────────────────────────────────────────────────────────────────────────────

let marking = false;

/** What this view shows to a person who looks counts as read. */
export async function mark_read(id) {
  const shown = shown_messages(Number(id ?? 0)).flatMap(copies_of);
  const ids = shown.filter(is_unread).map((message) => message.id);
  if (!ids.length || marking || document.hidden) return;
  marking = true;
  const done = await post("/api/messages/read", { ids }).then(
    () => true,
    () => false, // still unread then: the next look tries again
  );
  setTimeout(() => {
    marking = false;
    if (done) changed(); // more may have come
  }, 2000);
}

// ── The view ─────────────────────────────────────────────────────────────────────────────────────

const UNDELIVERED = { queued: "waiting", leased: "being read", dead: "undelivered" };

/** " · waiting", or of several copies " · 2 waiting". */
function delivery(message) {
  const copies = copies_of(message).filter((copy) => copy.to !== "operator");
  return Object.entries(UNDELIVERED).map(([name, words]) => {
    const number = copies.filter((copy) => copy.state === name).length;
    const told = message.copies ? `${number} ${words}` : words;
    return number > 0 && h("span", { class: name === "dead" ? "bad" : "" }, ` · ${told}`);
  });
}

const states_of = (message) =>
  copies_of(message)
    .map((copy) => copy.state)
    .join();

function message_row(message) {
  const { id, in_reply_to, from } = message;
  const mine = from === "operator";
  return h(
    "article",
    {
      class: `message ${mine ? "mine" : ""} ${from === "system" ? "from-system" : ""} ${is_new("message", id) ? "new" : ""}`,
      id: `message-${id}`,
      "aria-label": `${you_or(from)} to ${you_or(message.to)}`,
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
      delivery(message),
      message.attempts > 1 && ` · attempt ${message.attempts}`,
    ),
  );
}

const SEVERAL = "several";
const NAMED = { "*": "all agents", [SEVERAL]: "those chosen below" };

function choose_several(key, names, chosen) {
  const press = (name) =>
    toggle(key, chosen.includes(name) ? chosen.filter((other) => other !== name) : [...chosen, name]);
  return h(
    "div",
    { class: "buttons several", role: "group", "aria-label": "Recipients" },
    names.map((name) =>
      plain(name, () => press(name), { key: name, kind: "small", "aria-pressed": String(chosen.includes(name)) }),
    ),
  );
}

const begun = new Map(); // draft → whom it is for and what it answers, as shown when it was begun: no news changes that

const is_begun = (key) => Boolean(draft(key) || draft(`files:${key}`));

function begun_as(key, thread, names) {
  const known = begun.get(key);
  if (known?.usual && (known.last || !thread) && is_begun(key)) return known;
  const last = thread && thread_of(thread).at(-1);
  const partner = last && (last.from === "operator" ? last.to : last.from);
  const usual = [partner, filter()].find((name) => names.includes(name)) ?? names[0];
  begun.set(key, { last, partner, usual });
  return begun.get(key);
}

function compose(thread) {
  const key = thread ? `flow:${thread}` : "flow";
  const names = state.agents.map((agent) => agent.name);
  const { last, partner, usual } = begun_as(key, thread, names);
  const choices = [
    ...names.map((name) => [name, `to ${name}`]),
    ...(names.length > 1 ? [["*", "to all"]] : []),
    ...(names.length > 2 ? [[SEVERAL, "to several…"]] : []),
  ];
  const is_there = (wanted) => choices.some(([name]) => name === wanted);
  const wished = draft(`${key}:to`);
  if (wished && !is_there(wished) && !is_begun(key)) set_draft(`${key}:to`, "");
  const to = draft(`${key}:to`) || usual;
  const has_gone = Boolean(to) && !is_there(to); // nobody else gets what was meant for it
  const several = to === SEVERAL;
  const chosen = several ? toggled(`${key}:several`, []).filter((name) => names.includes(name)) : [to];
  const wish = (name) => set_draft(`${key}:to`, name);
  const shown = has_gone ? [[to, `${NAMED[to] ?? to} (gone)`], ...choices] : choices;
  const recipients = choice("To", to, shown, wish, { key: `${key}:${usual}`, class: "field to" });
  return composer({
    key,
    label: to === partner ? `Reply to ${to}` : "Message",
    placeholder: to === partner ? `Reply to ${to}` : `Write to ${NAMED[to] ?? to ?? "an agent, once there is one"}`,
    send: (body) => {
      const reply = (name) => name === partner && { in_reply_to: last.id };
      return send_messages(key, ...chosen.map((name) => ({ to: name, body, ...reply(name) })));
    },
    disabled: !to || has_gone || chosen.length === 0 || (thread && !last),
    files: true,
    before: recipients,
    below: several && choose_several(`${key}:several`, names, chosen),
  });
}

function filter_field() {
  const agents = state.agents.map((agent) => agent.name);
  const names = [...new Set([...agents, ...state.messages.flatMap((message) => [message.from, message.to])])].sort(by_name);
  return h(
    "label",
    null,
    "with ",
    h(
      "select",
      { class: "field small", onchange: (event) => toggle("flow:with", event.target.value) },
      h("option", { value: "", selected: !filter() }, "anyone"),
      names.map((name) => h("option", { key: name, value: name, selected: filter() === name }, you_or(name))),
    ),
  );
}

function nothing_in(thread) {
  if (!thread && filter()) return `No message with ${you_or(filter())} among these.`;
  if (!thread) return "No message yet. What agents write to each other and to you appears here as it happens.";
  return threads.has(thread) ? `There is no message #${thread}.` : "Loading…";
}

/** Why the thread may not be whole; that there is none is said in its place. */
function thread_error(thread) {
  const { error } = threads.get(thread) ?? {};
  if (!error || error.status === 404) return null;
  return h("p", { class: "refusal pad", role: "alert" }, error.message);
}

/** `id`: of a message whose thread it is to be. */
export function flow_view(id) {
  const thread = Number(id ?? 0);
  const messages = shown_messages(thread);
  const error = thread_error(thread);
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
        !at_start() &&
        h(
          "div",
          { class: "earlier" },
          button("flow:earlier", "Earlier…", earlier, { kind: "small" }),
          refusal("flow:earlier"),
        ),
      error,
      messages.length === 0 && !error && empty(nothing_in(thread)),
      messages.map((message) =>
        memo(message.id, [states_of(message), message.attempts, message.to, is_new("message", message.id)], () =>
          message_row(message),
        ),
      ),
      compose(thread),
    ),
  ];
}
