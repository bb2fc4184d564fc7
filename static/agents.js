// All agents: two lines each, and the levers.

import { h } from "./dom.js";
import { ago, clock, dollars, hive_now, inline, plural, short_sha, web_href, you_or } from "./text.js";
import {
  act,
  asking_button,
  button,
  context_bar,
  cost_words,
  draft,
  empty,
  field,
  heading,
  mark,
  panel,
  plain,
  refusal,
  set_draft,
  spend_draft,
  state_words,
  toggle,
  toggled,
} from "./parts.js";
import { agent_named, changed, on, state } from "./store.js";
import { get, in_turn, post } from "./api.js";

// ── What it waits for, in words ──────────────────────────────────────────────────────────────────

const PARKED = new Set(["failed", "needs_login", "rate_limited"]);

/** Whether a resume by hand would end a wait. */
export const is_parked = (agent) => PARKED.has(agent.state) && agent.running !== false;

function paused_words({ paused_by = "", state_reason = "" }) {
  if (state_reason.startsWith("paused")) return `P${state_reason.slice(1)}.`;
  const by = paused_by && ` by ${paused_by === "system" ? "hyperhive" : you_or(paused_by)}`;
  return `Paused${by}${state_reason && `: ${state_reason.replace(/\.$/, "")}`}.`;
}

/** Why it takes no mail, as a sentence; "" while it does. */
export function why_words(agent) {
  if (agent.attached) return "An interactive session has it. Its mail waits until that ends.";
  if (agent.state === "paused") return paused_words(agent);
  return agent.state === "working" ? "" : (agent.state_reason ?? "");
}

const SOON_MS = 3 * 86400000;

export const sign_in_ends_soon = ({ state: now, signed_in_until, signed_in_renews }) =>
  Boolean(signed_in_until) &&
  !signed_in_renews &&
  now !== "needs_login" &&
  Date.parse(signed_in_until) - hive_now() < SOON_MS;

// ── A row ────────────────────────────────────────────────────────────────────────────────────────

function second_line(agent) {
  const why = agent.state === "idle" || agent.state === "stopped" ? "" : why_words(agent);
  if (why) return agent.until ? `${why} It goes on at ${clock(agent.until)}.` : why;
  return agent.status_text ?? agent.state_reason ?? agent.description ?? "";
}

function badges(agent) {
  return [
    agent.needs_update &&
      h(
        "span",
        { class: "badge", title: "Its configuration was made for an older hyperhive: rebuild it" },
        "needs update",
      ),
    sign_in_ends_soon(agent) &&
      h(
        "span",
        { class: "badge warn", title: "It does not renew itself: sign in again before that" },
        "sign-in ends ",
        ago(agent.signed_in_until, "until"),
      ),
    agent.unread > 0 && h("span", { class: "badge", title: "Messages it has not taken yet" }, `${agent.unread} unread`),
  ];
}

function top_line(agent) {
  return h(
    "div",
    { class: "agent-top" },
    agent.kept
      ? h("span", { class: "agent-name" }, agent.name)
      : h("a", { class: "agent-name", href: `#/agents/${agent.name}` }, agent.name),
    h("span", { class: "dim grow" }, state_words(agent), " ", ago(agent.kept ? null : agent.state_since, "for")),
    h("span", { class: "dim money" }, dollars(agent.cost_today_usd)),
    context_bar(agent),
  );
}

/** The row of the side column: two lines, no more. */
function agent_brief(agent) {
  return h(
    "div",
    { class: "row agent", key: agent.name },
    mark(agent),
    h("div", { class: "grow" }, top_line(agent), h("p", { class: "dim second" }, inline(second_line(agent)))),
  );
}

export function agents_brief() {
  const { agents } = state;
  const working = agents.filter((agent) => agent.state === "working").length;
  return [
    heading("Agents", agents.length > 0 && `${working} working`),
    panel(null, agents.length ? agents.map(agent_brief) : empty("No agent yet.")),
  ];
}

function agent_row(agent) {
  const open = toggled(`levers:${agent.name}`);
  return h(
    "div",
    { class: `row agent ${agent.kept ? "kept" : ""} ${open ? "open" : ""}`, key: agent.name },
    mark(agent),
    h(
      "div",
      { class: "grow" },
      top_line(agent),
      h(
        "div",
        { class: "agent-second" },
        h("p", { class: "dim second" }, inline(second_line(agent))),
        h("span", { class: "badges" }, badges(agent)),
        plain(open ? "Close" : "Manage", () => toggle(`levers:${agent.name}`, !open), {
          kind: "quiet",
          "aria-expanded": String(open),
          "aria-label": `${open ? "Close" : "Manage"} ${agent.name}`,
        }),
      ),
      open &&
        h(
          "div",
          { class: "levers" },
          h("p", { class: "dim" }, facts(agent).join(" · ")),
          h("div", { class: "buttons" }, levers(agent), agent.running && own_page(agent), destroy_button(agent)),
          destroy_form(agent),
          refusal(`agent:${agent.name}`),
        ),
    ),
  );
}

function facts(agent) {
  return [
    agent.active_model && `model ${agent.active_model}`,
    `today ${cost_words(agent)}`,
    agent.deployed_sha && `deployed ${short_sha(agent.deployed_sha)}`,
    agent.port && `port ${agent.port}`,
    agent.pending_reminders > 0 && plural(agent.pending_reminders, "reminder"),
    agent.parent && `asked for by ${agent.parent}`,
  ].filter(Boolean);
}

function own_page(agent) {
  const href = web_href(agent.url);
  return href && h("a", { class: "button small", href, target: "_blank", rel: "noopener noreferrer" }, "Its own page");
}

// ── Levers ───────────────────────────────────────────────────────────────────────────────────────

/** One that acts at once. */
export const lever = ({ name }, base, action, label, { group = `agent:${name}`, kind = "small" } = {}) =>
  button(group, label, () => post(`${base}/${action}`), { kind, name: `${label} ${name}` });

/** What each of its pages has. */
export const pause_levers = (agent, base) => [
  (agent.paused || is_parked(agent)) && lever(agent, base, "resume", "Resume"),
  !agent.paused && lever(agent, base, "pause", "Pause"),
];

export function levers(agent) {
  const group = `agent:${agent.name}`;
  const base = `/api/agents/${agent.name}`;
  if (agent.kept) return button(group, "Revive", () => post("/api/agents", { name: agent.name }), { kind: "small" });
  return [
    !agent.running && lever(agent, base, "start", "Start"),
    pause_levers(agent, base),
    agent.running && lever(agent, base, "restart", "Restart"),
    agent.running && lever(agent, base, "stop", "Stop"),
    lever(agent, base, "rebuild", "Rebuild"),
    asking_button(group, "Roll back", `Roll ${agent.name} back`, () => post(`${base}/rollback`), {
      name: `Roll back ${agent.name}`,
    }),
  ];
}

// One that lives and what is kept of it are destroyed by forms of their own: the first may still be on its way.
const destroying = (agent) => `destroy:${agent.name}${agent.kept ? ":kept" : ""}`;

export function destroy_button(agent) {
  if (agent.manager) return null;
  return plain("Destroy…", () => toggle(destroying(agent), !toggled(destroying(agent))), {
    kind: "small danger",
    "aria-expanded": String(toggled(destroying(agent))),
  });
}

let living = [];

/** Another may come under its name. */
on("roster", () => {
  const names = state.agents.map(({ name }) => name);
  for (const name of living) if (!names.includes(name)) disarm({ name });
  living = names;
});

function disarm(agent) {
  spend_draft(`confirm:${destroying(agent)}`);
  toggle(`purge:${agent.name}`, false);
  toggle(destroying(agent), false);
}

/** Destroying asks for the name typed again; without `purge` everything but the container stays. */
export function destroy_form(agent) {
  if (!toggled(destroying(agent))) return null;
  const key = `confirm:${destroying(agent)}`;
  const purge = agent.kept || toggled(`purge:${agent.name}`);
  const confirmed = draft(key).trim() === agent.name;
  const destroy = async () => {
    await post(`/api/agents/${agent.name}/destroy`, { confirm: draft(key).trim(), purge });
    disarm(agent);
  };
  return h(
    "div",
    { class: "destroy" },
    h(
      "p",
      null,
      purge
        ? "Removes the container and wipes its notes, sign-in, configuration and mail. This can't be undone."
        : "Removes the container. Notes, sign-in, configuration and mail are kept; the same name revives them.",
    ),
    h(
      "label",
      { class: "check" },
      h("input", {
        type: "checkbox",
        checked: purge,
        disabled: agent.kept,
        onchange: (event) => toggle(`purge:${agent.name}`, event.target.checked),
      }),
      "wipe everything it has, too",
    ),
    h(
      "div",
      { class: "decide" },
      field(key, { label: `Type ${agent.name} to confirm`, oninput: (event) => confirm_typed(key, event, agent) }),
      button(`agent:${agent.name}`, purge ? "Destroy and wipe" : "Destroy", destroy, {
        kind: "danger",
        disabled: !confirmed,
      }),
    ),
  );
}

function confirm_typed(key, event, agent) {
  set_draft(key, event.target.value);
  toggle(`typed:${agent.name}`, event.target.value);
}

// ── Destroyed ones whose state is kept ───────────────────────────────────────────────────────────
// The stream tells of the living only.

let kept = [];

export const load_kept = in_turn(async () => {
  try {
    kept = (await get("/api/agents")).agents.filter((agent) => agent.kept);
  } catch {
    return; // the banner tells of a lost connection; what was known stays
  }
  changed();
});

on("roster", () => location.hash === "#/agents" && load_kept());

// ── The view ─────────────────────────────────────────────────────────────────────────────────────

function new_agent() {
  const spawn = async () => {
    const [name, description] = [draft("spawn:name").trim(), draft("spawn:description").trim()];
    await post("/api/agents", { name, ...(description && { description }) });
    spend_draft("spawn:name", name);
    spend_draft("spawn:description", description);
  };
  const enter = () => act("spawn", "Create", spawn);
  return h(
    "div",
    { class: "card-foot" },
    h(
      "div",
      { class: "decide" },
      field("spawn:name", {
        label: "Name of a new agent",
        placeholder: "Name (a-z, 9 at most)",
        maxlength: "9",
        class: "field name-field",
        on_enter: enter,
      }),
      field("spawn:description", { label: "What it is for (optional)", on_enter: enter }),
      button("spawn", "Create", spawn, { kind: "main", name: "Create the agent" }),
    ),
    refusal("spawn"),
  );
}

export function agents_view() {
  const { agents } = state;
  const gone = kept.filter(({ name }) => !agent_named(name));
  return [
    heading("Agents", `${plural(agents.length, "agent")} · ${agents.filter((agent) => agent.running).length} running`),
    panel(
      null,
      agents.length ? agents.map(agent_row) : empty("No agent yet. Start with the manager, or create one below."),
      new_agent(),
    ),
    gone.length > 0 && [heading("Destroyed, state kept", gone.length), panel(null, gone.map(agent_row))],
  ];
}
