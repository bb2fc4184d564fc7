// The steps of a turn: mail, words, thinking, calls of tools with those of their sub-agents, and what happened beside.

import { h, memo } from "./dom.js";
import { clock, count, plural, prose } from "./text.js";
import { plain, toggle, toggled, toggles_made } from "./parts.js";
import { tool_box } from "./tools.js";

/**
 * Events as they are shown: calls joined with their results, sub-agents' steps below the call that began them.
 * A step is known by `id`, begins with the event `event`, and `weight` tells of how many events it consists.
 */
export function steps_of(events) {
  const steps = [];
  const calls = new Map();
  let before = events[0].id - 1;
  for (const event of events) {
    const { id, kind, data } = event;
    if (id > before + 1) steps.push({ id: `hole:${id}`, event: id, hole: [before, id] });
    before = id;
    const up = calls.get(data.parent);
    const list = up?.children ?? steps;
    if (kind === "turn_start" || kind === "mail")
      for (const mail of data.messages ?? []) steps.push({ id: `${id}:${mail.id}`, event: id, mail });
    else if (kind === "text" || kind === "thinking") list.push({ id, event: id, words: event });
    else if (kind === "tool_call") {
      const step = { id, event: id, call: event, result: null, children: [], up, weight: 1 };
      calls.set(data.tool_use_id, step);
      list.push(step);
    } else if (kind === "tool_result") join_result(calls, list, event);
    else if (kind !== "turn_end" && worth_a_line(event)) steps.push({ id, event: id, line: event });
    for (let call = up; call; call = call.up) call.weight += 1;
  }
  return steps;
}

function join_result(calls, list, event) {
  const step = calls.get(event.data.tool_use_id);
  if (step) step.result = event;
  else
    list.push({
      id: event.id,
      event: event.id,
      call: { id: event.id, at: event.at, data: { name: "result of an earlier call", input: {} } },
      result: event,
      children: [],
      weight: 1,
    });
}

/** The steps that lead to an event: the first stands in the turn itself, each next one below it. */
export function path_to(steps, id) {
  for (const step of steps) {
    if ((step.event === id && !step.hole) || step.result?.id === id) return [step];
    const below = path_to(step.children ?? [], id);
    if (below.length) return [step, ...below];
  }
  return [];
}

// Each agent counts its events from 1: what is open in one transcript (`of`) is not in another.
const fold_key = (of, { id }) => `${of}:step:${id}`;

/** Unfolds the last step of a path, and the sub-agents that it lies in. */
export function unfold(path, of) {
  for (const step of path.slice(0, -1)) toggle(`${fold_key(of, step)}:steps`, true);
  const last = path.at(-1);
  if (last.call || last.words?.kind === "thinking") toggle(fold_key(of, last), true);
}

const worth_a_line = (event) => event.kind !== "state" || !["idle", "working"].includes(event.data.state);

export function step_row(who, body, props) {
  return h(
    "div",
    { ...props, class: `step ${props?.class ?? ""}` },
    h("div", { class: "who" }, who),
    h("div", { class: "body" }, body),
  );
}

export function draw_step(step, of) {
  const { id, call, result, words, line, mail } = step;
  const parts = [call ?? words ?? line ?? mail, result, step.weight, toggles_made];
  return memo(id, parts, () => {
    if (mail) return mail_row(step);
    const props = { "data-event": result ? `${call.id} ${result.id}` : id };
    const key = fold_key(of, step);
    if (call) return step_row("", tool_box(key, step, (child) => draw_step(child, of)), props);
    if (words?.kind === "thinking") return thinking_row(key, words, props);
    if (words) return step_row("", prose(words.data.text), props);
    return step_row("", h("p", { class: "dim" }, line_words(line)), props);
  });
}

function mail_row({ event, mail }) {
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
    { "data-event": event },
  );
}

function thinking_row(key, words, props) {
  const text = words.data.text.trim();
  const lines = text.split("\n").length;
  const open = toggled(key);
  if (open || (lines === 1 && text.length < 120)) {
    return step_row(
      "thinking",
      h("div", { class: "thinking" }, prose(text), open && plain("fold", () => toggle(key, false), { kind: "quiet" })),
      props,
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
    props,
  );
}

function line_words({ kind, data, at }) {
  if (kind === "compaction")
    return `${clock(at, true)}  The conversation was compacted${data.pre_tokens ? ` from ${count(data.pre_tokens)}` : ""}${data.post_tokens ? ` to ${count(data.post_tokens)} tokens` : ""}.`;
  if (kind === "state")
    return `${clock(at, true)}  ${data.state.replace("_", " ")}${data.until ? ` until ${clock(data.until)}` : ""}${data.reason ? `: ${data.reason}` : ""}`;
  return `${clock(at, true)}  ${data.text ?? kind}`;
}
