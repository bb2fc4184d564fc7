// Small parts that every view uses: buttons that know their outcome, fields that keep a draft, marks.

import { h } from "./dom.js";
import { dollars, thousands } from "./text.js";
import { changed, on } from "./store.js";

// ── What the person is doing ─────────────────────────────────────────────────────────────────────
// Drafts outlive the view and a reload; open folds and running actions live as long as the page.

const drafts = new Map(Object.entries(JSON.parse(sessionStorage.getItem("drafts") ?? "{}")));
const toggles = new Map();
const running = new Map(); // group → {busy: label} or {error}

export const draft = (key) => drafts.get(key) ?? "";

export function set_draft(key, text) {
  if (text) drafts.set(key, text);
  else drafts.delete(key);
  sessionStorage.setItem("drafts", JSON.stringify(Object.fromEntries(drafts)));
}

/** Forgets a draft that was `sent`, unless it is another by now, and empties its field if it is still on the page. */
export function spend_draft(key, sent = draft(key).trim()) {
  if (draft(key).trim() !== sent) return;
  set_draft(key, "");
  for (const field of document.querySelectorAll("[data-draft]")) if (field.dataset.draft === key) field.value = "";
}

export const toggled = (key, otherwise = false) => toggles.get(key) ?? otherwise;
export let toggles_made = 0; // tells what is drawn only when needed that a fold may have changed
export function toggle(key, value) {
  toggles.set(key, value);
  toggles_made += 1;
  changed();
}

// ── Actions ──────────────────────────────────────────────────────────────────────────────────────

/** Runs `work` for a group of buttons: all of them wait until it is known how it went. */
export async function act(group, label, work) {
  if (running.get(group)?.busy) return;
  running.set(group, { busy: label });
  changed();
  try {
    await work();
    running.delete(group);
  } catch (error) {
    running.set(group, { error });
  }
  changed();
}

/** What was refused while the hive was away says nothing of it any more. */
on("returned", () => {
  for (const [group, { error }] of running) if (error) running.delete(group);
});

export const is_busy = (group) => Boolean(running.get(group)?.busy);

/** A button of a group. `work` is a function that returns a promise; what it throws is shown by `refusal(group)`. */
export function button(group, label, work, { kind = "", hint = "", disabled = false, name } = {}) {
  const busy = running.get(group)?.busy;
  return h(
    "button",
    {
      type: "button",
      class: `button ${kind} ${busy === label ? "busy" : ""}`,
      disabled: Boolean(busy) || disabled,
      "aria-label": name,
      "aria-keyshortcuts": hint || null,
      onclick: () => act(group, label, work),
    },
    label,
    hint && h("kbd", { "aria-hidden": "true", "data-key": hint }),
  );
}

/** A button that only changes what is shown. */
export function plain(label, onclick, { kind = "", ...props } = {}) {
  return h("button", { type: "button", class: `button ${kind}`, onclick, ...props }, label);
}

/** A button for what can't be undone: the first press asks, and only the second, on what names it, acts. */
export function asking_button(group, label, sure, work, { name, disabled = false } = {}) {
  const asks = `ask:${group}:${label}`;
  const press = (open) => () => toggle(asks, open);
  if (!toggled(asks)) return plain(label, press(true), { kind: "small", "aria-label": name, disabled });
  const act_once = () => work().finally(press(false));
  return h(
    "span",
    { class: "buttons", role: "group", "aria-label": name },
    plain("Keep", press(false), { kind: "small" }),
    button(group, sure, act_once, { kind: "small danger" }),
  );
}

export function refusal(group) {
  const error = running.get(group)?.error;
  if (!error) return null;
  return h("p", { class: "refusal", role: "alert" }, h("strong", null, error.message), error.hint && ` ${error.hint}`);
}

// ── Fields ───────────────────────────────────────────────────────────────────────────────────────

export function field(key, { tag = "input", label, placeholder = label, on_enter, ...props }) {
  return h(tag, {
    key: `field:${key}`,
    class: "field",
    "aria-label": label,
    placeholder,
    "data-draft": key,
    value: draft(key),
    autocomplete: "off",
    oninput: (event) => set_draft(key, event.target.value),
    onkeydown: on_enter && ((event) => enter(event, tag, on_enter)),
    ...props,
  });
}

function enter(event, tag, on_enter) {
  if (event.key !== "Enter" || event.isComposing || event.shiftKey) return;
  if (tag === "textarea" && !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  on_enter();
}

/** A field with `options` to choose from, [[value, words]]; `take` is given the one that was chosen. */
export function choice(label, value, options, take, { key = "", ...props } = {}) {
  return h(
    "select",
    {
      key: `${key}:${options.map(([name]) => name).join()}`,
      class: "field",
      "aria-label": label,
      onchange: (event) => {
        take(event.target.value);
        changed();
      },
      ...props,
    },
    options.map(([name, words]) => h("option", { value: name, selected: name === value }, words)),
  );
}

/** A folded part: `summary` is always seen, `content()` is only made when it is open. */
export function fold(key, summary, content, { otherwise = false, ...props } = {}) {
  const open = toggled(key, otherwise);
  return h(
    "div",
    { key, ...props },
    h(
      "button",
      { type: "button", class: "summary", "aria-expanded": String(open), onclick: () => toggle(key, !open) },
      summary,
    ),
    open && content(),
  );
}

// ── Panels ───────────────────────────────────────────────────────────────────────────────────────

export function heading(title, ...right) {
  return h("div", { class: "heading" }, h("h2", null, title), h("span", { class: "dim" }, right));
}

export function panel(props, ...rows) {
  return h("div", { ...props, class: `panel ${props?.class ?? ""}` }, rows);
}

export const fact = (name, ...value) =>
  value.some(Boolean) && h("div", { class: "fact" }, h("dt", null, name), h("dd", null, value));

export const empty = (...words) => h("p", { class: "empty" }, words);

// ── Marks ────────────────────────────────────────────────────────────────────────────────────────
// The hexagon is the state of an agent. Its shape says it, its colour repeats it.

const HEXAGON = "M8 1.2 13.9 4.6v6.8L8 14.8 2.1 11.4V4.6Z";
const INSIDE = {
  needs: "M8 4.8v3.9M8 10.6v.9",
  pause: "M6.6 6v4M9.4 6v4",
  cross: "M6.2 6.2 9.8 9.8M9.8 6.2 6.2 9.8",
  stop: "M6 8h4",
};
const MARKS = {
  working: ["mark-working"],
  starting: ["mark-idle"],
  idle: ["mark-idle"],
  stopped: ["mark-quiet", "stop"],
  offline: ["mark-quiet", "stop"],
  paused: ["mark-quiet", "pause"],
  needs_login: ["mark-needs", "needs"],
  signing_in: ["mark-needs", "needs"],
  rate_limited: ["mark-needs", "pause"],
  failed: ["mark-failed", "cross"],
};

const STATE_WORDS = {
  needs_login: "needs login",
  rate_limited: "at its limit",
  signing_in: "signing in",
};
export const state_words = (agent) =>
  agent.kept ? "destroyed, state kept" : (STATE_WORDS[agent.state] ?? agent.state);

export function mark(agent) {
  const [look, inside] = agent.kept ? ["mark-quiet", "stop"] : (MARKS[agent.state] ?? ["mark-idle"]);
  return h(
    "svg",
    { class: `mark ${look}`, viewBox: "0 0 16 16", role: "img", "aria-label": state_words(agent) },
    h("path", { class: "hexagon", d: HEXAGON }),
    inside && h("path", { class: "inside", d: INSIDE[inside] }),
  );
}

export function logo() {
  return h(
    "svg",
    { class: "logo", viewBox: "0 0 16 16", "aria-hidden": "true" },
    h("path", { class: "hexagon", d: HEXAGON }),
    h("path", { class: "core", d: "M8 5 10.6 6.5v3L8 11 5.4 9.5v-3Z" }),
  );
}

// ── Bars ─────────────────────────────────────────────────────────────────────────────────────────

export function context_bar({ context_tokens, context_window }) {
  if (!context_window) return h("span", { class: "bar unknown", title: "context: not known yet" });
  const part = Math.min(1, (context_tokens ?? 0) / context_window);
  const words = `context: ${Math.round(part * 100)} % of ${thousands(context_window)}`;
  return h("span", {
    class: `bar ${part > 0.85 ? "full" : ""}`,
    role: "img",
    "aria-label": words,
    title: words,
    vars: { "--part": part },
  });
}

export function cost_words({ cost_today_usd, daily_budget_usd }) {
  return daily_budget_usd ? `${dollars(cost_today_usd)} of ${dollars(daily_budget_usd)}` : dollars(cost_today_usd);
}

export const REHEARSAL = "Rehearsal: a scripted stand-in plays Claude; nothing here reaches a model.";
