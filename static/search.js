// Search over messages, requests and the audit: what is here at once, what is older on demand.

import { h } from "./dom.js";
import { clock, plural, prose_preview, you_or } from "./text.js";
import { button, draft, empty, field, heading, panel, refusal, set_draft } from "./parts.js";
import { changed, state, with_older } from "./store.js";
import { get, in_turn } from "./api.js";
import { request_words } from "./approval.js";
import { load_past, past } from "./call.js";
import { at_start, load_older } from "./flow.js";
import { together } from "./mail.js";

const PAGE = 1000;
const SHOWN = 100;
const KEY = "search";
const known = { audit: [], audit_end: false, error: null };

export const load_search = in_turn(async () => {
  try {
    const [{ audit }] = await Promise.all([get(`/api/audit?max=${PAGE}`), load_past()]);
    const rows = with_older(audit, known.audit);
    const audit_end = audit.length < PAGE || (known.audit_end && rows.length > audit.length);
    Object.assign(known, { audit: rows, audit_end, error: null });
    if (state.messages.length < PAGE && !at_start()) await load_older(PAGE);
  } catch (error) {
    known.error = error;
  }
  changed();
});

async function further_back() {
  if (!at_start()) await load_older(PAGE);
  if (known.audit_end) return;
  const oldest = () => Math.min(...known.audit.map(({ id }) => id));
  const before = oldest();
  const { audit } = await get(`/api/audit?max=${PAGE}&before=${before}`);
  if (before !== oldest()) return; // there would be a hole between these
  Object.assign(known, { audit: [...known.audit, ...audit], audit_end: audit.length < PAGE });
}

// ── Finding ──────────────────────────────────────────────────────────────────────────────────────

/** Every word must be there, anywhere. */
const has_all = (words, ...texts) => {
  const text = texts.filter(Boolean).join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
};

function found(words) {
  return [
    ...together(state.messages)
      .filter(({ id, body, from, to }) => has_all(words, `#${id}`, body, from, to))
      .map((row) => ({
        key: `m${row.id}`,
        at: row.at,
        label: "Message",
        href: `#/flow/thread/${row.id}`,
        text: `${you_or(row.from)} → ${you_or(row.to)}: ${prose_preview(row.body, 200)}`,
      })),
    ...(past.rows ?? [])
      .filter((row) => has_all(words, `#${row.id}`, request_words(row), row.description, row.note, row.status))
      .map((row) => ({
        key: `a${row.id}`,
        at: row.requested_at,
        label: "Request",
        href: `#/approvals/${row.id}`,
        text: `#${row.id} ${request_words(row)}, ${row.status}. ${prose_preview(row.description ?? "", 160)}`,
      })),
    ...known.audit
      .filter((row) => has_all(words, row.who, row.what, row.subject, row.outcome))
      .map((row) => ({
        key: `u${row.id}`,
        at: row.at,
        label: "Audit",
        href: "#/system",
        text: [row.who, row.what.replaceAll("_", " "), row.subject, row.outcome].filter(Boolean).join(" · "),
      })),
  ].sort((a, b) => Date.parse(b.at) - Date.parse(a.at));
}

export function search_view() {
  const words = draft(KEY).toLowerCase().split(/\s+/).filter(Boolean);
  const rows = words.length ? found(words) : [];
  const error = known.error ?? past.error;
  return [
    heading("Search", words.length > 0 && plural(rows.length, "hit")),
    panel(
      { class: "pad" },
      field(KEY, {
        label: "Search messages, requests and the audit",
        type: "search",
        class: "field whole",
        made: (dom) => setTimeout(() => dom.focus()),
        oninput: (event) => {
          set_draft(KEY, event.target.value);
          changed();
        },
      }),
    ),
    error && h("p", { class: "refusal", role: "alert" }, error.message),
    words.length > 0 &&
      panel(
        { role: "region", "aria-label": "Hits", "aria-live": "polite" },
        rows.length === 0 && empty("Nothing here holds all of these words."),
        rows
          .slice(0, SHOWN)
          .map(({ key, at, label, href, text }) =>
            h(
              "a",
              { key, class: "row line", href },
              h("span", { class: "label" }, label),
              h("span", { class: "grow wrap" }, text),
              h("span", { class: "dim" }, clock(at)),
            ),
          ),
        (!at_start() || !known.audit_end) &&
          h("div", { class: "earlier" }, button("search", "Look further back", further_back, { kind: "small" })),
        refusal("search"),
      ),
  ];
}
