// One request as a card, read from top to bottom: what, why, the diff, the decision.

import { h } from "./dom.js";
import { ago, clock, plural, prose, short_sha, span, you_or } from "./text.js";
import { act, button, draft, field, fold, is_busy, plain, refusal, spend_draft } from "./parts.js";
import { changed, on, state } from "./store.js";
import { get, post } from "./api.js";
import { diff_view } from "./diff.js";
import { deploy_card } from "./deploys.js";

const KINDS = {
  spawn: "New agent",
  apply_commit: "Config change",
  update_inputs: "Update",
  schedule_prompt: "Schedule",
};

export const kind_words = (row) => KINDS[row.kind] ?? row.kind;

export function request_words({ kind, agent, requested_by, schedule }) {
  const who = you_or(requested_by);
  const wants = who === "you" ? "you want" : `${who} wants`;
  if (kind === "spawn") return `${wants} a new agent, ${agent}`;
  if (kind === "apply_commit") return `${wants} to change ${who === agent ? "itself" : agent}`;
  if (kind === "update_inputs") return `${wants} to update the inputs of ${agent || "all agents"}`;
  if (kind === "schedule_prompt")
    return `${wants} to write to ${schedule?.to ?? agent} ${schedule?.every_s ? "regularly" : "later"}`;
  return `${wants}: ${kind}`;
}

// ── What only the request itself tells (the diff, the thread), asked for once ────────────────────
// Its digest changes whenever something else would be done: what was read under another one is not shown.

const details = new Map(); // id → {asked: digest it was asked for, row?, error?}

export function detail(id, digest) {
  const known = details.get(id);
  if (known && (digest === undefined || digest === known.asked || digest === known.row?.digest)) return known;
  details.set(id, { asked: digest });
  load(id, digest);
  return details.get(id);
}

async function load(id, digest) {
  try {
    details.set(id, { asked: digest, row: (await get(`/api/approvals/${id}`)).approval });
  } catch (error) {
    details.set(id, { asked: digest, error });
  }
  changed();
}

on("approval", (row) => {
  const known = details.get(row.id);
  if (known?.row?.digest !== row.digest) return;
  const { diff, files, touches, thread: messages } = known.row;
  known.row = { ...row, diff, files, touches, thread: messages };
});

export function forget_details() {
  details.clear();
}

// ── Deciding ─────────────────────────────────────────────────────────────────────────────────────

const note_key = (row) => `note:${row.id}`;
const group = (row) => `approval:${row.id}`;

async function decide(row, verdict, more = {}) {
  const note = draft(note_key(row)).trim();
  await post(`/api/approvals/${row.id}/${verdict}`, { ...(note && { note }), ...more });
  spend_draft(note_key(row));
}

/** Approval names what was shown: had it changed, the hive would refuse. */
const approve = (row) => decide(row, "approve", { digest: detail(row.id, row.digest).row.digest, undo: true });
const deny = (row) => decide(row, "deny");
const can_approve = (row) => Boolean(detail(row.id, row.digest).row);

export function press(row, key) {
  if (row.status !== "pending" || is_busy(group(row))) return;
  if (key === "a" && can_approve(row)) act(group(row), "Approve", () => approve(row));
  if (key === "d") act(group(row), "Deny", () => deny(row));
}

function decision(row, keys) {
  return h(
    "div",
    { class: "card-foot" },
    h(
      "div",
      { class: "decide" },
      field(note_key(row), { label: `Note to ${you_or(row.requested_by)} (optional)` }),
      button(group(row), "Deny", () => deny(row), { hint: keys && "d", name: `Deny request ${row.id}` }),
      button(group(row), "Approve", () => approve(row), {
        kind: "main",
        hint: keys && "a",
        disabled: !can_approve(row),
        name: `Approve request ${row.id}`,
      }),
    ),
    refusal(group(row)),
  );
}

// ── The card ─────────────────────────────────────────────────────────────────────────────────────

/** `brief` leaves the change out: it was decided. */
export function approval_card(row, { keys = false, brief = false, ...props } = {}) {
  return h(
    "article",
    { ...props, class: `card ${props.class ?? ""}`, "aria-label": request_words(row) },
    h(
      "header",
      { class: "card-head" },
      h(
        "div",
        { class: "card-title" },
        h("span", { class: "label" }, kind_words(row)),
        h("h3", null, request_words(row)),
      ),
      h(
        "span",
        { class: "dim" },
        h("a", { href: `#/approvals/${row.id}` }, `#${row.id}`),
        " · ",
        `asked by ${you_or(row.requested_by)}`,
        " · ",
        ago(row.requested_at),
      ),
    ),
    row.description && prose(row.description, { class: "card-body reason" }),
    row.schedule && schedule_view(row.schedule),
    row.superseded_by &&
      h(
        "p",
        { class: "card-line warn" },
        "A newer request for the same agent waits: ",
        h("a", { href: `#/approvals/${row.superseded_by}` }, `#${row.superseded_by}`),
      ),
    hints(row, brief),
    !brief && changes(row),
    row.status === "pending" ? decision(row, keys) : outcome(row),
  );
}

function schedule_view({ to, body, first, every_s }) {
  return h(
    "div",
    { class: "card-body" },
    h(
      "p",
      { class: "dim" },
      `To ${to}, first ${clock(first)}${every_s ? `, then every ${span(every_s * 1000)}` : ", once"}:`,
    ),
    prose(body, { class: "quote" }),
  );
}

/** Where it stands, and what it may touch: beside the diff, never instead of it. */
function hints(row, brief) {
  const touches = brief ? [] : (detail(row.id, row.digest).row?.touches ?? []);
  const facts = [
    touches.length > 0 && h("span", null, "Touches ", touches.join(", ")),
    row.base_sha &&
      h("span", { class: "dim" }, "on top of ", h("code", { title: row.base_sha }, short_sha(row.base_sha))),
    row.fetched_sha &&
      h("span", { class: "dim" }, "commit ", h("code", { title: row.fetched_sha }, short_sha(row.fetched_sha))),
    row.proposed_sha && h("span", { class: "dim" }, "edited by you"),
  ].filter(Boolean);
  return facts.length > 0 && h("div", { class: "card-line" }, facts);
}

function thread({ id, thread: messages = [] }) {
  return (
    messages.length > 0 &&
    fold(
      `thread:${id}`,
      `What led to it: ${plural(messages.length, "message")}`,
      () =>
        h(
          "div",
          { class: "card-body thread" },
          messages.map((message) =>
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

function changes(row) {
  if (row.kind === "schedule_prompt") return null;
  const { row: more, error } = detail(row.id, row.digest);
  if (error) {
    return h(
      "div",
      { class: "card-line" },
      h("p", { class: "refusal", role: "alert" }, "The change can't be shown: ", error.message),
      plain(
        "Try again",
        () => {
          details.delete(row.id);
          changed();
        },
        { kind: "small" },
      ),
    );
  }
  if (!more) return h("p", { class: "card-line dim" }, "Reading the change…");
  return h(
    "div",
    { class: "changes" },
    more.diff && more.files.length > 1 && h("p", { class: "card-line dim" }, plural(more.files.length, "file")),
    more.diff && diff_view(`diff:${row.id}`, more.diff),
    thread(more),
  );
}

function outcome(row) {
  const running = row.deploy_id && state.deploys.find((deploy) => deploy.id === row.deploy_id);
  const words =
    { approved: "Approved", denied: "Denied", cancelled: "Cancelled", failed: "Failed" }[row.status] ?? row.status;
  return h(
    "div",
    { class: "card-foot" },
    h(
      "p",
      null,
      h("strong", { class: { failed: "bad", approved: "ok" }[row.status] }, words),
      row.resolved_by && ` by ${you_or(row.resolved_by)}`,
      row.resolved_at && [", ", ago(row.resolved_at)],
      row.phase && h("span", { class: "dim" }, ` · ${row.phase}`),
    ),
    row.note && prose(row.note, { class: "quote" }),
    row.error && h("pre", { class: "log", tabindex: "0" }, row.error),
    running && deploy_card(running, { bare: true }),
    row.undo_until &&
      h(
        "div",
        { class: "decide" },
        h("p", { class: "dim" }, "It begins ", ago(row.undo_until, "until"), "."),
        button(group(row), "Undo", () => post(`/api/approvals/${row.id}/undo`), {
          name: `Undo the approval of request ${row.id}`,
        }),
      ),
    refusal(group(row)),
  );
}
