// System: what runs here, what is scheduled, and who did what.

import { h } from "./dom.js";
import { ago, clock, dollars, prose_preview, span, web_href } from "./text.js";
import { button, empty, heading, panel, refusal } from "./parts.js";
import { changed, state } from "./store.js";
import { get, post } from "./api.js";
import { notify_panel } from "./notify.js";

const PAGE = 100;
const known = { audit: null, schedules: null, error: null, at_start: false };

export async function load_system() {
  try {
    const [{ audit }, { schedules }] = await Promise.all([get(`/api/audit?max=${PAGE}`), get("/api/schedules")]);
    Object.assign(known, { audit: newest_first(audit), schedules, error: null, at_start: audit.length < PAGE });
  } catch (error) {
    known.error = error;
  }
  changed();
}

const newest_first = (rows) => [...rows].sort((a, b) => b.id - a.id);

async function earlier() {
  const { audit } = await get(`/api/audit?max=${PAGE}&before=${known.audit.at(-1).id}`);
  Object.assign(known, { audit: [...known.audit, ...newest_first(audit)], at_start: audit.length < PAGE });
}

// ── Parts ────────────────────────────────────────────────────────────────────────────────────────

const CONTAINERS = {
  nixos: "NixOS containers",
  process: "plain processes: no isolation between agents and this machine",
};

function facts() {
  const { hive, usage, version } = state;
  const home = web_href(hive.home);
  const fact = (name, value) => value && h("div", { class: "fact" }, h("dt", null, name), h("dd", null, value));
  return panel(
    { class: "pad" },
    h(
      "dl",
      { class: "facts wide" },
      fact("hyperhive", version),
      fact("machine", hive.name),
      fact("agents run as", CONTAINERS[hive.containers] ?? hive.containers),
      fact("domain", hive.domain),
      home && fact("address", h("a", { href: home }, home)),
      usage.budget_usd && fact("today", `${dollars(usage.today_usd)} of ${dollars(usage.budget_usd)} that all may spend`),
      hive.rehearsal && fact("Claude", "a rehearsal: scripted, no model is reached"),
    ),
  );
}

function schedule_row(row) {
  return h(
    "div",
    { class: "row line", key: row.id },
    h("span", { class: "grow" }, h("strong", null, row.to), " ", prose_preview(row.body)),
    h(
      "span",
      { class: "dim" },
      row.every_s ? `every ${span(row.every_s * 1000)}` : "once",
      " · next ",
      ago(row.next ?? row.first, "until"),
    ),
    button(`schedule:${row.id}`, "Cancel", () => post(`/api/schedules/${row.id}/cancel`).then(load_system), {
      kind: "small",
      name: `Cancel schedule ${row.id}`,
    }),
    refusal(`schedule:${row.id}`),
  );
}

function audit_row(row) {
  return h(
    "tr",
    { key: row.id },
    h("td", { class: "dim" }, clock(row.at, true)),
    h("td", null, row.who),
    h("td", null, row.what.replaceAll("_", " ")),
    h("td", null, row.subject),
    h("td", { class: "wrap dim" }, row.outcome),
  );
}

function audit_table() {
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": "Audit" },
    h(
      "table",
      { class: "audit" },
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          ["When", "Who", "What", "Whom", "Outcome"].map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h("tbody", null, known.audit.map(audit_row)),
    ),
  );
}

export function system_view() {
  return [
    heading("System"),
    facts(),
    known.error && h("p", { class: "refusal", role: "alert" }, known.error.message),
    known.schedules?.length > 0 && [
      heading("Schedules", known.schedules.length),
      panel(null, known.schedules.map(schedule_row)),
    ],
    notify_panel(),
    heading("Audit", known.audit && button("audit", "Look again", load_system, { kind: "quiet" })),
    panel(
      null,
      !known.audit
        ? empty(known.error ? "Not known." : "Loading…")
        : known.audit.length
          ? audit_table()
          : empty("Nothing was done yet."),
      known.audit?.length > 0 &&
        !known.at_start &&
        h(
          "div",
          { class: "earlier" },
          button("audit:earlier", "Earlier…", earlier, { kind: "small" }),
          refusal("audit:earlier"),
        ),
    ),
  ];
}
