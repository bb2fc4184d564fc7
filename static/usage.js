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

/** Agents by what they cost, dearest first: the darkest part of each bar is the first of them. */
const by_cost = (rows) =>
  [...new Set(rows.map((row) => row.agent))]
    .map((name) => [name, rows.filter((row) => row.agent === name)])
    .sort((a, b) => sum(b[1], "cost_usd") - sum(a[1], "cost_usd"));

const SHADES = 6;
const shade = (index) => `shade-${Math.min(index, SHADES - 1)}`;

/** One bar: an agent's part upon another's, as high as its cost. */
function bar(parts, most) {
  let top = 100;
  return h(
    "svg",
    { class: "day-bar", viewBox: "0 0 10 100", preserveAspectRatio: "none", "aria-hidden": "true" },
    parts.map(([name, usd], index) => {
      const height = (100 * usd) / most;
      top -= height;
      return height > 0 && h("rect", { key: name, class: shade(index), x: 0, y: top, width: 10, height });
    }),
  );
}

function day_bars(rows) {
  const agents = by_cost(rows);
  const days = last_days().map((day) => {
    const cost = (mine) =>
      sum(
        mine.filter((row) => row.day === day),
        "cost_usd",
      );
    const parts = agents.map(([name, mine]) => [name, cost(mine)]);
    return { day, parts, usd: parts.reduce((total, [, usd]) => total + usd, 0) };
  });
  const most = Math.max(...days.map(({ usd }) => usd), 0.01);
  const words = ({ day, usd, parts }) =>
    `${day}: ${dollars(usd)}${parts
      .filter(([, part]) => part > 0)
      .map(([name, part]) => `, ${name} ${dollars(part)}`)
      .join("")}`;
  return [
    h(
      "ol",
      { class: "chart", "aria-label": "Cost by day and agent" },
      days.map((day) =>
        h(
          "li",
          { key: day.day, title: words(day) },
          h("span", { class: "usd" }, day.usd > 0 && dollars(day.usd)),
          bar(day.parts, most),
          h("span", { class: "dim" }, day.day.slice(8)),
        ),
      ),
    ),
    agents.length > 1 &&
      h(
        "p",
        { class: "legend dim" },
        agents.map(([name], index) =>
          h(
            "span",
            { key: name },
            h(
              "svg",
              { viewBox: "0 0 10 10", "aria-hidden": "true" },
              h("rect", { class: shade(index), width: 10, height: 10 }),
            ),
            name,
          ),
        ),
      ),
  ];
}

// ── By agent ─────────────────────────────────────────────────────────────────────────────────────

function agent_table(rows) {
  const today = last_days().at(-1);
  const names = by_cost(rows);
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
