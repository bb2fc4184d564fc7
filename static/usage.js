// Usage: what the agents cost, by day and by agent.

import { h } from "./dom.js";
import { count, dollars, duration, hive_now, thousands } from "./text.js";
import { empty, heading, panel } from "./parts.js";
import { changed, on } from "./store.js";
import { get } from "./api.js";

const DAYS = 14;
const known = { rows: null, error: null, asked_at: 0 };

export async function load_usage() {
  known.asked_at = Date.now();
  try {
    Object.assign(known, { rows: (await get(`/api/usage?days=${DAYS}`)).usage, error: null });
  } catch (error) {
    known.error = error;
  }
  changed();
}

const AGAIN_MS = 5000;
on("usage", () => {
  if (!location.hash.startsWith("#/usage") || Date.now() - known.asked_at < AGAIN_MS) return;
  load_usage();
});

// ── By day ───────────────────────────────────────────────────────────────────────────────────────

function last_days() {
  return Array.from({ length: DAYS }, (_, back) =>
    new Date(hive_now() - (DAYS - 1 - back) * 86400000).toISOString().slice(0, 10),
  );
}

const sum = (rows, field) => rows.reduce((total, row) => total + (row[field] ?? 0), 0);

function day_bars(rows) {
  const days = last_days().map((day) => ({
    day,
    usd: sum(
      rows.filter((row) => row.day === day),
      "cost_usd",
    ),
  }));
  const most = Math.max(...days.map(({ usd }) => usd), 0.01);
  return h(
    "ol",
    { class: "chart", "aria-label": "Cost by day" },
    days.map(({ day, usd }) =>
      h(
        "li",
        { key: day, title: `${day}: ${dollars(usd)}` },
        h("span", { class: "usd" }, usd > 0 && dollars(usd)),
        h("span", { class: "column", vars: { "--part": usd / most } }),
        h("span", { class: "dim" }, day.slice(8)),
      ),
    ),
  );
}

// ── By agent ─────────────────────────────────────────────────────────────────────────────────────

function agent_table(rows) {
  const today = last_days().at(-1);
  const names = [...new Set(rows.map((row) => row.agent))]
    .map((name) => [name, rows.filter((row) => row.agent === name)])
    .sort((a, b) => sum(b[1], "cost_usd") - sum(a[1], "cost_usd"));
  const columns = ["Agent", "Today", `${DAYS} days`, "Turns", "Time", "In", "Out", "Cache read", "Cache written"];
  const line = (name, mine) =>
    [
      dollars(
        sum(
          mine.filter((row) => row.day === today),
          "cost_usd",
        ),
      ),
      dollars(sum(mine, "cost_usd")),
      count(sum(mine, "turns")),
      duration(sum(mine, "duration_ms")),
      ...["input_tokens", "output_tokens", "cache_read_tokens", "cache_creation_tokens"].map((field) =>
        h("span", { title: count(sum(mine, field)) }, thousands(sum(mine, field))),
      ),
    ].map((value) => h("td", null, value));
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": "Usage by agent" },
    h(
      "table",
      null,
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          columns.map((column) => h("th", { scope: "col" }, column)),
        ),
      ),
      h(
        "tbody",
        null,
        names.map(([name, mine]) => h("tr", { key: name }, h("th", { scope: "row" }, name), line(name, mine))),
      ),
      names.length > 1 && h("tfoot", null, h("tr", null, h("th", { scope: "row" }, "all"), line("", rows))),
    ),
  );
}

export function usage_view() {
  const { rows, error } = known;
  return [
    heading("Usage", `last ${DAYS} days, UTC`),
    error && h("p", { class: "refusal", role: "alert" }, error.message),
    !rows
      ? panel(null, empty("Loading…"))
      : rows.length === 0
        ? panel(null, empty("No turn has been counted yet."))
        : [panel({ class: "pad" }, day_bars(rows)), panel(null, agent_table(rows))],
  ];
}
