// Deploys: what is being built, with its log as it grows, and what was.

import { h } from "./dom.js";
import { ago, clock, duration, short_sha } from "./text.js";
import { button, empty, heading, panel, plain, refusal, toggle, toggled } from "./parts.js";
import { changed, is_new, is_running_phase, state } from "./store.js";
import { get, post } from "./api.js";
import { compare_panel } from "./compare.js";

const KINDS = {
  spawn: "first deploy",
  apply: "config change",
  rebuild: "rebuild",
  rollback: "roll back",
  update: "update of inputs",
};
const PHASES = ["queued", "building", "switching", "deployed"];

// ── Logs ─────────────────────────────────────────────────────────────────────────────────────────

const errors = new Map();

/** The log so far; asked for once, then the stream adds to it. */
function log_of(id) {
  if (!state.logs.has(id)) {
    state.logs.set(id, []);
    const log = state.logs.get(id);
    get(`/api/deploys/${id}`)
      .then(
        ({ deploy }) => {
          log.splice(0, log.length, ...deploy.log);
          errors.delete(id);
        },
        (error) => errors.set(id, error),
      )
      .finally(changed);
  }
  return state.logs.get(id);
}

function log_view(id) {
  const lines = log_of(id);
  if (errors.has(id)) return h("p", { class: "refusal pad", role: "alert" }, errors.get(id).message);
  return h(
    "pre",
    { class: "log", tabindex: "0", role: "log", "aria-label": `Log of deploy ${id}`, "data-follow": "true" },
    lines.length ? lines.join("\n") : "No line yet.",
  );
}

// ── A deploy ─────────────────────────────────────────────────────────────────────────────────────

function phases(phase) {
  const reached = PHASES.indexOf(phase);
  return h(
    "ol",
    { class: "phases", "aria-label": `Phase: ${phase}` },
    PHASES.map((name, index) =>
      h(
        "li",
        {
          class: index < reached ? "done" : index === reached ? "now" : "",
          "aria-current": index === reached ? "step" : null,
        },
        name,
      ),
    ),
  );
}

const took = ({ started_at, ended_at }) =>
  ended_at ? duration(Date.parse(ended_at) - Date.parse(started_at)) : ago(started_at, "for");

/** A deploy that runs: phases and live log. `bare` leaves out what the card around it already says. */
export function deploy_card(deploy, { bare = false } = {}) {
  const running = is_running_phase(deploy.phase);
  const open = toggled(`log:${deploy.id}`, running && !bare);
  return h(
    "div",
    { class: "deploy", key: `deploy:${deploy.id}` },
    h(
      "div",
      { class: "deploy-top" },
      !bare &&
        h(
          "span",
          null,
          h("strong", null, deploy.agent),
          " ",
          h("span", { class: "dim" }, KINDS[deploy.kind] ?? deploy.kind),
        ),
      running ? phases(deploy.phase) : h("span", { class: deploy.phase === "failed" ? "bad" : "ok" }, deploy.phase),
      h("span", { class: "dim" }, took(deploy)),
      plain(open ? "Hide the log" : "Log", () => toggle(`log:${deploy.id}`, !open), {
        kind: "quiet",
        "aria-expanded": String(open),
      }),
    ),
    deploy.error && h("p", { class: "bad" }, deploy.error),
    open && log_view(deploy.id),
  );
}

/** What runs now can be taken back to the one before: a deploy like any other. */
export function rollback_button(deploy) {
  const mine = state.deploys.filter(({ agent, phase }) => agent === deploy.agent && phase !== "failed");
  const newest = mine.every(({ id }) => id <= deploy.id);
  if (!newest || deploy.phase !== "deployed" || deploy.kind === "spawn") return null;
  const group = `rollback:${deploy.id}`;
  return [
    button(group, "Roll back", () => post(`/api/agents/${deploy.agent}/rollback`), {
      kind: "small",
      name: `Roll ${deploy.agent} back to what ran before deploy ${deploy.id}`,
    }),
    refusal(group),
  ];
}

function history_row(deploy) {
  const open = toggled(`log:${deploy.id}`);
  return h(
    "div",
    { class: `row column ${is_new("deploy", deploy.id) ? "new" : ""}`, key: deploy.id },
    h(
      "div",
      { class: "line" },
      h(
        "span",
        { class: `phase ${deploy.phase === "failed" ? "bad" : "ok"}` },
        deploy.phase === "failed" ? "✗ failed" : "✓ deployed",
      ),
      h("a", { href: `#/agents/${deploy.agent}` }, deploy.agent),
      h(
        "span",
        { class: "dim grow" },
        KINDS[deploy.kind] ?? deploy.kind,
        deploy.approval_id && [" of ", h("a", { href: `#/approvals/${deploy.approval_id}` }, `#${deploy.approval_id}`)],
        deploy.sha && [" · ", h("code", null, short_sha(deploy.sha))],
      ),
      h("span", { class: "dim" }, took(deploy), " · ", clock(deploy.ended_at ?? deploy.started_at)),
      rollback_button(deploy),
      plain(open ? "Hide the log" : "Log", () => toggle(`log:${deploy.id}`, !open), {
        kind: "quiet",
        "aria-expanded": String(open),
      }),
    ),
    deploy.error && h("p", { class: "bad wrap" }, deploy.error),
    open && log_view(deploy.id),
  );
}

// ── The view ─────────────────────────────────────────────────────────────────────────────────────

export function deploys_view() {
  const newest_first = [...state.deploys].sort((a, b) => b.id - a.id);
  const running = newest_first.filter((deploy) => is_running_phase(deploy.phase));
  const ended = newest_first.filter((deploy) => !is_running_phase(deploy.phase));
  return [
    running.length > 0 && [
      heading("Running", running.length),
      panel(
        null,
        running.map((deploy) => h("div", { class: "row column", key: deploy.id }, deploy_card(deploy))),
      ),
    ],
    heading("History"),
    panel(
      null,
      ended.length
        ? ended.map(history_row)
        : empty(
            running.length
              ? "Nothing has ended yet."
              : "Nothing was deployed yet. An approved request is built and switched to here, with its log.",
          ),
    ),
    compare_panel(),
  ];
}
