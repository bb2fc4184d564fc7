// Messages as every view shows them, and the latest of them, which stand beside other views.

import { h } from "./dom.js";
import { clock, prose_preview, you_or } from "./text.js";
import { empty, heading, panel } from "./parts.js";
import { is_new, state } from "./store.js";

// ── One of them ──────────────────────────────────────────────────────────────────────────────────

/** What Your call shows as a notice stays there until it is seen there. */
export function is_unread(message) {
  return (
    message.to === "operator" &&
    message.state !== "acked" &&
    !state.attention.some((row) => row.key === `message-${message.id}`)
  );
}

export const unread_count = () =>
  state.messages.filter((message) => message.from !== "system" && is_unread(message)).length;

/** A message to everyone is stored as a copy each; it is shown once, where the first copy stands. */
export function together(messages) {
  const found = new Map();
  for (const message of messages) {
    const { id, from, at, body, broadcast } = message;
    const key = broadcast ? `${from} ${at} ${body}` : id;
    if (found.has(key)) found.get(key).push(message);
    else found.set(key, [message]);
  }
  return [...found.values()].map((copies) => (copies.length === 1 ? copies[0] : { ...copies[0], to: "all", copies }));
}

export const copies_of = (message) => message.copies ?? [message];

/** From whom to whom, and when. */
export function route(message) {
  return h(
    "div",
    { class: "row-top" },
    h("span", null, you_or(message.from), " → ", you_or(message.to)),
    h("span", null, clock(message.at)),
  );
}

// ── The side column ──────────────────────────────────────────────────────────────────────────────

const BRIEF = 6;

export function flow_brief() {
  const latest = together(state.messages).slice(-BRIEF);
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
