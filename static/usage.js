// Usage: what the agents cost, by day and by agent.

import { h } from "./dom.js";
import { count, dollars, duration, thousands } from "./text.js";
import { empty, fold, heading, panel, plain, toggle, toggled } from "./parts.js";
import { changed, on, state } from "./store.js";
import { get, in_turn } from "./api.js";

const DAYS = 14;
const known = { rows: null, today: "", error: null, asked_at: 0 };

export const load_usage = in_turn(async () => {
  known.asked_at = Date.now();
  try {
    const { usage, today } = await get(`/api/usage?days=${DAYS}`);
    Object.assign(known, { rows: usage, today, error: null });
  } catch (error) {
    known.error = error;
  }
  changed();
});

const AGAIN_MS = 5000;
let timer = 0;

on("usage", () => {
  clearTimeout(timer);
  const look = () => location.hash.startsWith("#/usage") && load_usage();
  timer = setTimeout(look, Math.max(0, known.asked_at + AGAIN_MS - Date.now()));
});

// ── By day ───────────────────────────────────────────────────────────────────────────────────────

/** Days of the hive's own calendar. */
function last_days() {
  const today = Date.parse(known.today);
  return Array.from({ length: DAYS }, (_, back) =>
    new Date(today - (DAYS - 1 - back) * 86400000).toISOString().slice(0, 10),
  );
}

const sum = (rows, field) => rows.reduce((total, row) => total + (row[field] ?? 0), 0);
const tokens = (rows) => TOKENS.reduce((total, [, field]) => total + sum(rows, field), 0);

// What the bars show: either is a sum over rows, and words for it.
const MEASURES = {
  Cost: { of: (rows) => sum(rows, "cost_usd"), words: dollars, least: 0.01 },
  Tokens: { of: tokens, words: thousands, least: 1 },
};
const measured = () => toggled("usage:measure", "Cost");
const measure = () => MEASURES[measured()];

const measure_switch = () =>
  h(
    "div",
    { class: "buttons", role: "group", "aria-label": "What the bars show" },
    Object.keys(MEASURES).map((name) => {
      const pressed = String(measured() === name);
      return plain(name, () => toggle("usage:measure", name), { kind: "small", "aria-pressed": pressed });
    }),
  );

/** Agents by what they cost, dearest first: the darkest part of each bar is the first of them. */
const by_cost = (rows) =>
  [...new Set(rows.map((row) => row.agent))]
    .map((name) => [name, rows.filter((row) => row.agent === name)])
    .sort((a, b) => sum(b[1], "cost_usd") - sum(a[1], "cost_usd"));

const SHADES = 6;
const shade = (index) => `shade-${Math.min(index, SHADES - 1)}`;

/** One bar: an agent's part upon another's, as high as what it used; and how high the budget is, where that is near. */
function bar(parts, most, budget) {
  let top = 100;
  return h(
    "svg",
    { class: "day-bar", viewBox: "0 0 10 100", preserveAspectRatio: "none", "aria-hidden": "true" },
    parts.map(([name, part], index) => {
      const height = (100 * part) / most;
      top -= height;
      return height > 0 && h("rect", { key: name, class: shade(index), x: 0, y: top, width: 10, height });
    }),
    budget && h("path", { key: "budget", class: "budget", d: `M0 ${100 - (100 * budget) / most}h10` }),
  );
}

const sample = (...shapes) => h("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, shapes);

function days_of(rows) {
  const agents = by_cost(rows);
  return last_days().map((day) => {
    const mine = rows.filter((row) => row.day === day);
    const parts = agents.map(([name]) => [name, measure().of(mine.filter((row) => row.agent === name))]);
    return { day, mine, parts, whole: measure().of(mine) };
  });
}

const words_of = (parts) =>
  parts
    .filter(([, part]) => part > 0)
    .map(([name, part]) => `${name} ${measure().words(part)}`)
    .join(", ");

const NEAR = 2; // a budget that is higher than this many times the dearest day would only flatten the bars

function day_bars(days, agents) {
  const { words: in_words, least } = measure();
  const highest = Math.max(...days.map(({ whole }) => whole), least);
  const { budget_usd = 0 } = state.usage;
  const budget = measure() === MEASURES.Cost && budget_usd <= NEAR * highest ? budget_usd : 0;
  const most = Math.max(highest, budget);
  const words = ({ day, whole, parts }) => [`${day}: ${in_words(whole)}`, words_of(parts)].filter(Boolean).join(", ");
  return [
    h(
      "ol",
      { class: "chart", "aria-label": `${measured()} by day and agent` },
      days.map((day) =>
        h(
          "li",
          { key: day.day, title: words(day) },
          h("span", { class: "usd" }, day.whole > 0 && in_words(day.whole)),
          bar(day.parts, most, budget),
          h("span", { class: "dim" }, day.day.slice(8)),
        ),
      ),
    ),
    h(
      "p",
      { class: "legend dim" },
      agents.length > 1 &&
        agents
          .slice(0, SHADES)
          .map(([name], index) =>
            h(
              "span",
              { key: name },
              sample(h("rect", { class: shade(index), width: 10, height: 10 })),
              index === SHADES - 1 && agents.length > SHADES ? `${agents.length - index} others` : name,
            ),
          ),
      budget > 0 &&
        h("span", { key: "the budget" }, sample(h("path", { class: "budget", d: "M0 5h10" })), `budget ${dollars(budget)}`),
    ),
  ];
}

function table(label, columns, ...groups) {
  const head = columns.map((column) => h("th", { scope: "col" }, column));
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": label },
    h("table", null, h("thead", null, h("tr", null, head)), groups),
  );
}

const TOKENS = [
  ["In", "input_tokens"],
  ["Out", "output_tokens"],
  ["Cache read", "cache_read_tokens"],
  ["Cache written", "cache_creation_tokens"],
];
const token_cells = (rows) =>
  TOKENS.map(([, field]) => h("td", { title: count(sum(rows, field)) }, thousands(sum(rows, field))));
const token_columns = TOKENS.map(([column]) => column);

function day_table(days) {
  const rows = days.toReversed().map(({ day, mine, parts }) =>
    h(
      "tr",
      { key: day },
      h("th", { scope: "row" }, day),
      [dollars(sum(mine, "cost_usd")), count(sum(mine, "turns")), duration(sum(mine, "duration_ms"))].map((cell) => h("td", null, cell)),
      token_cells(mine),
      h("td", { class: "by-agent" }, words_of(parts)),
    ),
  );
  const columns = ["Day", "Cost", "Turns", "Time", ...token_columns, "By agent"];
  return fold("usage:days", "The same as a table", () => table("Usage by day", columns, h("tbody", null, rows)));
}

// ── By agent ─────────────────────────────────────────────────────────────────────────────────────

function agent_table(rows) {
  const names = by_cost(rows);
  const whole = sum(rows, "cost_usd") || 1;
  const line = (name, mine) => {
    const now = mine.filter((row) => row.day === known.today);
    const figures = [dollars(sum(now, "cost_usd")), dollars(sum(mine, "cost_usd"))];
    const work = [count(sum(mine, "turns")), duration(sum(mine, "duration_ms"))];
    return h(
      "tr",
      { key: name },
      h("th", { scope: "row" }, name),
      figures.map((cell) => h("td", null, cell)),
      h("td", null, share(sum(mine, "cost_usd") / whole)),
      work.map((cell) => h("td", null, cell)),
      token_cells(mine),
    );
  };
  return table(
    "Usage by agent",
    ["Agent", "Today", `${DAYS} days`, "Share", "Turns", "Time", ...token_columns],
    h(
      "tbody",
      null,
      names.map(([name, mine]) => line(name, mine)),
    ),
    names.length > 1 && h("tfoot", null, line("all", rows)),
  );
}

function share(part) {
  const percent = Math.round(100 * part);
  return h(
    "svg",
    { class: "share", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": `${percent} %` },
    h("rect", { class: "shade-5", width: 100, height: 10 }),
    h("rect", { class: "shade-0", width: percent, height: 10 }),
  );
}

const today_words = ({ today_usd, budget_usd }) =>
  `today ${dollars(today_usd)}${budget_usd ? ` of ${dollars(budget_usd)} that all may spend` : ""}`;

function charts(rows) {
  const days = days_of(rows);
  return [
    panel({ class: "pad" }, measure_switch(), day_bars(days, by_cost(rows)), day_table(days)),
    heading("By agent"),
    panel(null, agent_table(rows)),
  ];
}

export function usage_view() {
  const { rows, error } = known;
  return [
    heading("Usage", `${today_words(state.usage)} · last ${DAYS} days`),
    error && h("p", { class: "refusal", role: "alert" }, error.message),
    !rows && !error && panel(null, empty("Loading…")),
    rows?.length === 0 && panel(null, empty("No turn has been counted yet.")),
    rows?.length > 0 && charts(rows),
  ];
}
