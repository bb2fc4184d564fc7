// What only a request itself tells: its diff, what led to it, and how earlier ones were decided.

import { h } from "./dom.js";
import { ago, clock, plural, prose, you_or } from "./text.js";
import { fold } from "./parts.js";
import { changed, on, state } from "./store.js";
import { get } from "./api.js";

// ── Asked for once ───────────────────────────────────────────────────────────────────────────────
// Its digest changes whenever something else would be done: what was read under another one is not shown.
// What was read before a connection was lost is shown until it was read again, and is not decided upon.

const details = new Map(); // id → {asked: digest it was asked for, row?, error?, stale?: "known" | "asked for again"}

export function detail(id, digest) {
  const known = details.get(id);
  if (known && (digest === undefined || digest === known.asked || digest === known.row?.digest)) {
    if (known.stale !== "known") return known;
    known.stale = "asked for again";
  } else details.set(id, { asked: digest });
  load(id, digest);
  return details.get(id);
}

export function look_again(id) {
  const known = details.get(id);
  if (known?.row) Object.assign(known, { stale: "known", error: null });
  else details.delete(id);
  changed();
}

on("returned", () => [...details.keys()].forEach(look_again));

/** Decided while no change could be told: what is known of it is asked for again. */
on("snapshot", () => {
  const open = new Set(state.approvals.map(({ id }) => id));
  for (const [id, { row }] of details) if (row?.status === "pending" && !open.has(id)) look_again(id);
});

// A few at a time: a hundred at once would hold up what a person presses meanwhile.
const AT_ONCE = 3;
const wanted = [];
const told = new Set(); // requests with news since they were asked for: that answer may be older than the news
let loading = 0;

function load(id, digest) {
  wanted.push([id, digest]);
  if (loading < AT_ONCE) load_next();
}

async function load_next() {
  loading += 1;
  while (wanted.length) {
    const [id, digest] = wanted.shift();
    told.delete(id);
    try {
      show_detail((await get(`/api/approvals/${id}`)).approval, digest);
    } catch (error) {
      details.set(id, { ...details.get(id), asked: digest, error });
    }
    if (told.delete(id)) wanted.push([id, digest]);
    if (wanted.length % 8 === 0) changed(); // many answers, one drawing
  }
  loading -= 1;
  changed();
}

export function show_detail(row, asked = row.digest) {
  details.set(row.id, { asked, row });
}

const MORE = ["diff", "cut_bytes", "files", "touches", "thread", "earlier"];

on("approval", (row) => {
  if (loading) told.add(row.id);
  const known = details.get(row.id);
  if (row.status !== "pending" && location.hash !== `#/approvals/${row.id}`) details.delete(row.id);
  if (known?.row?.digest !== row.digest) return;
  known.row = { ...row, ...Object.fromEntries(MORE.map((key) => [key, known.row[key]])) };
});

// ── What led to it, and what was before ──────────────────────────────────────────────────────────

export function thread_view({ id, thread = [] }) {
  return (
    thread.length > 0 &&
    fold(
      `thread:${id}`,
      `What led to it: ${plural(thread.length, "message")}`,
      () =>
        h(
          "div",
          { class: "card-body thread" },
          thread.map((message) =>
            h(
              "div",
              { key: message.id },
              h(
                "p",
                { class: "row-top" },
                h("span", null, you_or(message.from), " → ", you_or(message.to)),
                h("span", null, clock(message.at)),
              ),
              prose(message.body),
            ),
          ),
        ),
      { class: "file" },
    )
  );
}

const TONES = { approved: "ok", failed: "bad", denied: "warn" };

export function earlier_view({ id, agent, earlier = [] }, words) {
  return (
    earlier.length > 0 &&
    fold(
      `earlier:${id}`,
      `Earlier decisions for ${agent}: ${earlier.length}`,
      () =>
        h(
          "div",
          { class: "card-body thread" },
          earlier.map((row) =>
            h(
              "div",
              { key: row.id },
              h(
                "p",
                { class: "row-top" },
                h(
                  "span",
                  null,
                  h("a", { href: `#/approvals/${row.id}` }, `#${row.id}`),
                  ` ${words(row)}: `,
                  h("span", { class: TONES[row.status] ?? "" }, row.status),
                  row.phase && ` (${row.phase})`,
                ),
                ago(row.resolved_at),
              ),
              row.note && prose(row.note, { class: "quote" }),
            ),
          ),
        ),
      { class: "file" },
    )
  );
}
