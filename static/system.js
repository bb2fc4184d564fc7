// System: what runs here, what is scheduled and attached, and who did what.

import { h } from "./dom.js";
import { bytes, clock, dollars, plural, web_href } from "./text.js";
import { button, empty, fact, fold, heading, panel, refusal } from "./parts.js";
import { changed, state, with_older } from "./store.js";
import { get, in_turn, post } from "./api.js";
import { notify_panel } from "./notify.js";
import { files_panel, load_files } from "./files.js";
import { load_schedules, schedules_panel } from "./schedules.js";

const PAGE = 100;
const known = { audit: null, error: null, at_start: false, system: null, findings: null };

export function load_system() {
  load_facts();
  load_audit();
  load_schedules();
  load_files();
}

const load_facts = in_turn(async () => {
  try {
    Object.assign(known, { system: await get("/api/system"), error: null });
  } catch (error) {
    known.error = error;
  }
  changed();
});

async function load_findings() {
  known.findings = (await get("/api/doctor")).findings;
  changed();
}

const load_audit = in_turn(async () => {
  try {
    const { audit } = await get(`/api/audit?max=${PAGE}`);
    const rows = with_older(audit, known.audit ?? []);
    const at_start = audit.length < PAGE || (known.at_start && rows.length > audit.length);
    Object.assign(known, { audit: newest_first(rows), error: null, at_start });
  } catch (error) {
    known.error = error;
  }
  changed();
});

const newest_first = (rows) => [...rows].sort((a, b) => b.id - a.id);

async function earlier() {
  const { id } = known.audit.at(-1);
  const { audit } = await get(`/api/audit?max=${PAGE}&before=${id}`);
  if (known.audit.at(-1).id !== id) return; // there would be a hole between these
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
      known.system && system_facts(known.system),
    ),
  );
}

const LIBRARIES = { python: "Python", sqlite: "SQLite", bottle: "bottle", waitress: "waitress", linux: "Linux" };

function system_facts({ versions, disk, sockets }) {
  const running_on = Object.entries(LIBRARIES).map(([key, name]) => `${name} ${versions[key]}`);
  const connections = sockets.reduce((sum, socket) => sum + socket.connections, 0);
  return [
    fact("runs on", running_on.join(", ")),
    fact("disk", `${bytes(disk.free_bytes)} free of ${bytes(disk.total_bytes)} at ${disk.folder}`),
    fact("database", bytes(disk.database_bytes)),
    fact(
      "sockets",
      fold("system:sockets", `${sockets.length}, with ${plural(connections, "connection")}`, () =>
        h(
          "ul",
          null,
          sockets.map(({ path, connections: number }) =>
            h("li", { key: path }, h("code", { class: "wrap" }, path), h("span", { class: "dim" }, ` ${number}`)),
          ),
        ),
      ),
    ),
  ];
}

// ── The doctor, and the daemon's log ─────────────────────────────────────────────────────────────

function finding({ check, ok, found, fix }) {
  return h(
    "div",
    { class: "row line", key: check },
    h("span", { class: ok ? "ok" : "bad" }, ok ? "ok" : "to mend"),
    h("strong", null, check),
    h("span", { class: "grow wrap dim" }, found, !ok && fix && `. ${fix}`),
  );
}

function doctor_panel() {
  const { findings } = known;
  return [
    heading("Doctor", button("doctor", findings ? "Look again" : "Look for faults", load_findings, { kind: "quiet" })),
    panel(
      null,
      refusal("doctor"),
      findings ? findings.map(finding) : empty("Looks for what can be wrong on this machine, and says what to do."),
    ),
  ];
}

function log_panel() {
  const lines = known.system?.log;
  const text = () => lines.map(({ at, level, text: line }) => `${clock(at, true)} ${level} ${line}`).join("\n");
  return [
    heading("Log of the daemon", button("log", "Look again", load_facts, { kind: "quiet" })),
    panel(
      null,
      refusal("log"),
      lines?.length
        ? fold("system:log", `The last ${plural(lines.length, "line")}`, () =>
            h("pre", { class: "log", tabindex: "0", "aria-label": "Log of the daemon" }, text()),
          )
        : empty(lines ? "No line yet." : "Loading…"),
    ),
  ];
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
    schedules_panel(),
    files_panel(),
    notify_panel(),
    doctor_panel(),
    log_panel(),
    heading("Audit", known.audit && button("audit", "Look again", load_audit, { kind: "quiet" })),
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
