// What the hive found out about a request while it waited: one line, the packages, and the log on demand.

import { h } from "./dom.js";
import { duration, plural } from "./text.js";
import { act, fold, plain, refusal } from "./parts.js";
import { changed, on } from "./store.js";
import { get } from "./api.js";

const WORDS = {
  waiting: "Pre-check: waits for its turn",
  running: "Pre-check: under way…",
  timed_out: "✗ the pre-check took too long and was given up",
  off: "Pre-checks are switched off",
};

/** "+4.1 MiB" */
function mebibytes(bytes) {
  const size = Math.abs(bytes) / 1024 ** 2;
  const sign = bytes < 0 ? "−" : "+";
  return `${sign}${size >= 0.1 || bytes === 0 ? size.toFixed(1) : size.toFixed(3)} MiB`;
}

// ── The log ──────────────────────────────────────────────────────────────────────────────────────
// It belongs to one run of the check: it is asked for again when the verdict changes, and while the check runs.

const AGAIN_MS = 1000;
const logs = new Map(); // id → {verdict, lines, waits}, of those that are open

async function read_log({ id, precheck }) {
  const { log } = await get(`/api/approvals/${id}/precheck`);
  return { verdict: JSON.stringify(precheck), lines: log };
}

/** Called with each drawing. */
function keep_up(row, known) {
  const is_over = row.precheck.state !== "running";
  if (known.waits || (is_over && known.verdict === JSON.stringify(row.precheck))) return;
  known.waits = true;
  setTimeout(async () => {
    const fresh = await read_log(row).catch(() => ({ ...known, waits: false }));
    if (logs.has(row.id)) logs.set(row.id, fresh); // it may have been closed meanwhile
    changed();
  }, AGAIN_MS);
}

on("approval", ({ id, status }) => status !== "pending" && logs.delete(id));

function log_view(row) {
  const known = logs.get(row.id);
  if (!known) return null;
  keep_up(row, known);
  return h(
    "div",
    { class: "edit" },
    h(
      "pre",
      {
        class: "log",
        tabindex: "0",
        role: "log",
        "aria-label": `Log of the pre-check of ${row.id}`,
        "data-follow": "",
      },
      known.lines.length ? known.lines.join("\n") : "No line yet.",
    ),
  );
}

function log_button(row) {
  const open = logs.has(row.id);
  const group = `precheck:${row.id}`;
  const press = () => {
    if (!open) return act(group, "Log", async () => logs.set(row.id, await read_log(row)));
    logs.delete(row.id);
    changed();
  };
  return [
    plain(open ? "Hide the log" : "Log", press, {
      kind: "quiet",
      "aria-expanded": String(open),
      "aria-label": `${open ? "Hide the log" : "Log"} of the pre-check`,
    }),
    refusal(group),
  ];
}

// ── The verdict ──────────────────────────────────────────────────────────────────────────────────

const tick = (word) => h("span", { class: "ok" }, `✓ ${word}`);

/** The first line says what is wrong; the rest of a message of Nix is in the log. */
const first_words = (text) => text.trim().split("\n", 1)[0];

function verdict({ state, evaluates, builds, seconds, error, at, packages = [] }) {
  const total = packages.reduce((sum, { bytes }) => sum + bytes, 0);
  const number_of = (test) => packages.filter(test).length;
  const figures = [
    [number_of(({ from }) => !from), "new"],
    [number_of(({ to }) => !to), "gone"],
    [number_of(({ from, to }) => from && to), "changed"],
  ].filter(([number]) => number > 0);
  return [
    evaluates && tick("evaluates"),
    builds &&
      h("span", null, tick("builds"), seconds > 0 && h("span", { class: "dim" }, ` in ${duration(seconds * 1000)}`)),
    figures.length > 0 &&
      h(
        "span",
        null,
        "packages: ",
        h("strong", null, figures.map(([number, word]) => `${number} ${word}`).join(", ")),
      ),
    packages.length > 0 && h("strong", null, mebibytes(total)),
    builds && packages.length === 0 && h("span", { class: "dim" }, "no package changes"),
    state === "failed" && h("span", { class: "bad" }, `✗ ${evaluates ? "does not build" : "does not evaluate"}`),
    WORDS[state] && h("span", { class: state === "timed_out" ? "bad" : "dim" }, WORDS[state]),
    at && h("code", { class: "bad" }, `${at.path}:${at.line}`),
    error && h("span", { class: "bad wrap" }, first_words(error)),
  ];
}

export function precheck_line(row) {
  const { precheck } = row;
  if (!precheck) return null;
  return [
    h(
      "div",
      { class: "card-line precheck", role: "status", "aria-label": "Pre-check" },
      verdict(precheck),
      precheck.state !== "off" && precheck.state !== "waiting" && log_button(row),
    ),
    log_view(row),
  ];
}

const FEW = 8;

/** Which packages change: name, from, to, size; the largest changes first. */
export function packages_view(row) {
  const packages = row.precheck?.packages ?? [];
  if (!packages.length) return null;
  const by_size = [...packages].sort((a, b) => Math.abs(b.bytes) - Math.abs(a.bytes));
  const table = (some) =>
    h(
      "table",
      { "aria-label": "Packages that change" },
      h(
        "tbody",
        null,
        some.map(({ name, from, to, bytes }) =>
          h(
            "tr",
            { key: name },
            h("td", { class: "wrap" }, name),
            h("td", null, from ?? "–"),
            h("td", null, to ?? "–"),
            h("td", null, mebibytes(bytes)),
          ),
        ),
      ),
    );
  return h(
    "div",
    { class: "packages scroll", tabindex: "0", role: "group", "aria-label": "Packages" },
    table(by_size.slice(0, FEW)),
    by_size.length > FEW &&
      fold(`packages:${row.id}`, `${plural(by_size.length - FEW, "more package")}`, () => table(by_size.slice(FEW))),
  );
}

/** The line of the diff that an error is at, with what is said of it. */
export const error_mark = ({ precheck }) =>
  precheck?.at && precheck.state !== "ok" ? { ...precheck.at, words: first_words(precheck.error ?? "here") } : null;
