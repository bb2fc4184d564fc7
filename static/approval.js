// One request as a card, read from top to bottom: what, why, the diff, the decision.

import { h } from "./dom.js";
import { ago, clock, plural, prose, short_sha, span, you_or } from "./text.js";
import { button, field, draft, plain, refusal, spend_draft, act, is_busy } from "./parts.js";
import { changed, state } from "./store.js";
import { get, post } from "./api.js";
import { diff_view } from "./diff.js";
import { deploy_card } from "./deploys.js";

const KINDS = { spawn: "New agent", apply_commit: "Config change", update_inputs: "Update", schedule_prompt: "Schedule" };

export const kind_words = (row) => KINDS[row.kind] ?? row.kind;

export function request_words({ kind, agent, requested_by, schedule }) {
  const who = you_or(requested_by);
  const wants = who === "you" ? "you want" : `${who} wants`;
  if (kind === "spawn") return `${wants} a new agent, ${agent}`;
  if (kind === "apply_commit") return `${wants} to change ${who === agent ? "itself" : agent}`;
  if (kind === "update_inputs") return `${wants} to update the inputs of ${agent || "all agents"}`;
  if (kind === "schedule_prompt") return `${wants} to write to ${schedule?.to ?? agent} ${schedule?.every_s ? "regularly" : "later"}`;
  return `${wants}: ${kind}`;
}

// ── What only the request itself tells (the diff), asked for once ────────────────────────────────
// The commit of a request never changes, so what was read stays true.

const details = new Map(); // id → approval with diff, or {error}

export function detail(id) {
  if (!details.has(id)) {
    details.set(id, null);
    load(id);
  }
  return details.get(id);
}

async function load(id) {
  try {
    details.set(id, (await get(`/api/approvals/${id}`)).approval);
  } catch (error) {
    details.set(id, { error });
  }
  changed();
}

export function forget_details() { details.clear(); }

// ── Deciding ─────────────────────────────────────────────────────────────────────────────────────

const note_key = (row) => `note:${row.id}`;
const group = (row) => `approval:${row.id}`;

/** Approval names the commit that was shown: had it changed, the hive would refuse. */
async function decide(row, verdict) {
  const note = draft(note_key(row)).trim();
  const body = note ? { note } : {};
  if (verdict === "approve" && row.fetched_sha) body.sha = row.fetched_sha;
  await post(`/api/approvals/${row.id}/${verdict}`, body);
  spend_draft(note_key(row));
  details.delete(row.id);
}

const can_approve = (row) => Boolean(detail(row.id));

export function press(row, key) {
  if (row.status !== "pending" || is_busy(group(row))) return;
  if (key === "a" && can_approve(row)) act(group(row), "Approve", () => decide(row, "approve"));
  if (key === "d") act(group(row), "Deny", () => decide(row, "deny"));
}

function decision(row, keys) {
  return h("div", { class: "card-foot" },
    h("div", { class: "decide" },
      field(note_key(row), { label: `Note to ${you_or(row.requested_by)} (optional)` }),
      button(group(row), "Deny", () => decide(row, "deny"), { hint: keys && "d", name: `Deny request ${row.id}` }),
      button(group(row), "Approve", () => decide(row, "approve"), { kind: "main", hint: keys && "a", disabled: !can_approve(row), name: `Approve request ${row.id}` })),
    refusal(group(row)));
}

// ── The card ─────────────────────────────────────────────────────────────────────────────────────

/** `brief` leaves the change out: it was decided. */
export function approval_card(row, { keys = false, brief = false, ...props } = {}) {
  return h("article", { ...props, class: `card ${props.class ?? ""}`, "aria-label": request_words(row) },
    h("header", { class: "card-head" },
      h("div", { class: "card-title" }, h("span", { class: "label" }, kind_words(row)), h("h3", null, request_words(row))),
      h("span", { class: "dim" }, h("a", { href: `#/approvals/${row.id}` }, `#${row.id}`), " · ", `asked by ${you_or(row.requested_by)}`, " · ", ago(row.requested_at))),
    row.description && prose(row.description, { class: "card-body reason" }),
    row.schedule && schedule_view(row.schedule),
    commits(row),
    !brief && changes(row),
    row.status === "pending" ? decision(row, keys) : outcome(row));
}

function schedule_view({ to, body, first, every_s }) {
  return h("div", { class: "card-body" },
    h("p", { class: "dim" }, `To ${to}, first ${clock(first)}${every_s ? `, then every ${span(every_s * 1000)}` : ", once"}:`), prose(body, { class: "quote" }));
}

function commits(row) {
  const facts = [row.base_sha && h("span", { class: "dim" }, "on top of ", h("code", null, short_sha(row.base_sha))),
    row.fetched_sha && h("span", { class: "dim" }, "commit ", h("code", { title: row.fetched_sha }, short_sha(row.fetched_sha)))].filter(Boolean);
  return facts.length > 0 && h("div", { class: "card-line" }, facts);
}

function changes(row) {
  if (row.kind === "schedule_prompt") return null;
  const more = detail(row.id);
  if (!more) return h("p", { class: "card-line dim" }, "Reading the change…");
  if (more.error) {
    return h("div", { class: "card-line" }, h("p", { class: "refusal", role: "alert" }, "The change can't be shown: ", more.error.message),
      plain("Try again", () => { details.delete(row.id); changed(); }, { kind: "small" }));
  }
  if (!more.diff) return null;
  return h("div", { class: "changes" }, more.files?.length > 1 && h("p", { class: "card-line dim" }, plural(more.files.length, "file")), diff_view(`diff:${row.id}`, more.diff));
}

function outcome(row) {
  const running = row.deploy_id && state.deploys.find((deploy) => deploy.id === row.deploy_id);
  const words = { approved: "Approved", denied: "Denied", cancelled: "Cancelled", failed: "Failed" }[row.status] ?? row.status;
  return h("div", { class: "card-foot" },
    h("p", null, h("strong", { class: { failed: "bad", approved: "ok" }[row.status] }, words), row.resolved_by && ` by ${you_or(row.resolved_by)}`,
      row.resolved_at && [", ", ago(row.resolved_at)], row.phase && h("span", { class: "dim" }, ` · ${row.phase}`)),
    row.note && prose(row.note, { class: "quote" }),
    row.error && h("pre", { class: "log", tabindex: "0" }, row.error),
    running && deploy_card(running, { bare: true }));
}
