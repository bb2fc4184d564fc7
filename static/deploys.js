// Deploys: what is being built, with its log as it grows, and what was.

import { h } from "./dom.js";
import { ago, clock, duration, short_sha } from "./text.js";
import { asking_button, button, empty, heading, panel, plain, refusal, toggle, toggled } from "./parts.js";
import { add_older, agent_named, changed, is_new, is_running_phase, on, state } from "./store.js";
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

const LOG_LINES_SHOWN = 5000;
const logs = new Map(); // deploy → {lines, each at its number, asked, error}

/** The log so far; asked for once, then the stream adds to it. After a snapshot some may be missing. */
function log_of(id) {
  if (!logs.has(id)) logs.set(id, { lines: [], asked: false, error: null });
  const log = logs.get(id);
  if (log.asked) return log;
  log.asked = true;
  get(`/api/deploys/${id}`)
    .then(
      ({ deploy }) => {
        deploy.log.forEach((line, index) => {
          log.lines[index] = line;
        });
        log.error = null;
      },
      (error) => {
        log.error = error;
      },
    )
    .finally(changed);
  return log;
}

on("deploy_log", ({ id, first, lines }) => {
  const log = logs.get(id);
  if (!log) return; // nobody looks at it: whoever opens it asks for the whole
  lines.forEach((line, index) => {
    log.lines[first - 1 + index] = line;
  });
});

for (const kind of ["snapshot", "returned"])
  on(kind, () => {
    for (const log of logs.values()) log.asked = false;
  });

function log_view(id) {
  const { lines, error } = log_of(id);
  if (error) return h("p", { class: "refusal pad", role: "alert" }, error.message);
  const shown = lines.slice(-LOG_LINES_SHOWN).filter(() => true); // without the holes of what is still to come
  return h(
    "pre",
    { class: "log", tabindex: "0", role: "log", "aria-label": `Log of deploy ${id}`, "data-follow": "true" },
    shown.length ? shown.join("\n") : "No line yet.",
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
    asking_button(
      group,
      "Roll back",
      `Roll ${deploy.agent} back`,
      () => post(`/api/agents/${deploy.agent}/rollback`),
      { name: `Roll ${deploy.agent} back to what ran before deploy ${deploy.id}` },
    ),
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
      agent_named(deploy.agent) ? h("a", { href: `#/agents/${deploy.agent}` }, deploy.agent) : deploy.agent,
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

// ── Older ones ───────────────────────────────────────────────────────────────────────────────────

const FEW = 20; // a snapshot has as many, if there are
const PAGE = 50;
let very_first = 0;

const first_known = () => Math.min(...state.deploys.map(({ id }) => id));
const at_start = () => state.deploys.length < FEW || first_known() === very_first;

async function earlier() {
  const first = first_known();
  const { deploys } = await get(`/api/deploys?max=${PAGE}&before=${first}`);
  if (first !== first_known()) return; // there would be a hole between these
  add_older("deploys", deploys);
  if (deploys.length < PAGE) very_first = first_known();
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
      !at_start() &&
        h(
          "div",
          { class: "earlier" },
          button("deploys:earlier", "Earlier…", earlier, { kind: "small" }),
          refusal("deploys:earlier"),
        ),
    ),
    compare_panel(),
  ];
}
