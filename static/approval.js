// One request as a card, read from top to bottom: what, why, the verdict, the diff, the packages, the decision.

import { h } from "./dom.js";
import { ago, clock, plural, prose, short_sha, span, you_or } from "./text.js";
import { act, button, draft, field, is_busy, plain, refusal, spend_draft, toggle, toggled } from "./parts.js";
import { on, state } from "./store.js";
import { post } from "./api.js";
import { diff_view, split_switch } from "./diff.js";
import { deploy_card, rollback_button } from "./deploys.js";
import { detail, earlier_view, look_again, show_detail, thread_view } from "./detail.js";
import { edit_button, edit_form, is_editing } from "./edit.js";
import { error_mark, packages_view, precheck_line } from "./precheck.js";

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

// ── Deciding ─────────────────────────────────────────────────────────────────────────────────────

const note_key = (row) => `note:${row.id}`;
const group = (row) => `approval:${row.id}`;

on("approval", (row) => row.status !== "pending" && draft(note_key(row)) && spend_draft(note_key(row)));

async function decide(row, verdict, more = {}) {
  const note = draft(note_key(row)).trim();
  await post(`/api/approvals/${row.id}/${verdict}`, { ...(note && { note }), ...more });
  spend_draft(note_key(row), note);
}

export const REST_MS = 800; // how long keys rest when what they act on is another by itself
const drawn = new Map(); // request → {digest of the change that the page shows, since: when it took the place of another}

function note_drawn({ id, digest }) {
  const { row, stale } = detail(id, digest);
  const known = drawn.get(id);
  if (row && !stale && known?.digest !== row.digest) drawn.set(id, { digest: row.digest, since: known ? Date.now() : 0 });
}

const is_drawn = (row) => drawn.has(row.id) && drawn.get(row.id).digest === detail(row.id, row.digest).row?.digest;
const has_rested = (row) => Date.now() > drawn.get(row.id).since + REST_MS;

/** Approval names what was shown: had it changed, the hive would refuse. */
const approve = (row, { digest } = drawn.get(row.id)) => decide(row, "approve", { digest, undo: true });
const deny = (row) => decide(row, "deny");

/** To approve what can't be read whole takes a press more. */
const asks_twice = (row) => detail(row.id, row.digest).row?.cut_bytes > 0;
const sure = (row) => `sure:${row.id}:${row.digest}`;
const takes_a_press_more = (row) => asks_twice(row) && !toggled(sure(row));

function can_approve({ id, digest }) {
  const { row, stale } = detail(id, digest);
  return Boolean(row) && !stale && !is_editing(id);
}

export function press(row, key) {
  if (row.status !== "pending" || is_busy(group(row))) return;
  if (key === "a" && can_approve(row) && is_drawn(row) && has_rested(row)) {
    if (takes_a_press_more(row)) toggle(sure(row), true);
    else act(group(row), "Approve", () => approve(row));
  }
  if (key === "d") act(group(row), "Deny", () => deny(row));
}

/** The newest request that would put another config into the same place: only what waits is known, and enough. */
const overtaken_by = (row) =>
  row.status === "pending" &&
  row.kind === "apply_commit" &&
  state.approvals.findLast(
    (other) => other.id > row.id && other.agent === row.agent && other.kind === row.kind && other.status === "pending",
  );

/** Several requests for one agent, each as it was shown; one that a newer one has overtaken stays to be decided. */
export function approve_all(rows) {
  const agents = [...new Set(rows.map((row) => row.agent))];
  return agents.map((agent) => {
    const mine = rows.filter((row) => row.agent === agent && !overtaken_by(row) && !asks_twice(row));
    if (mine.length < 2) return null;
    const all = `approve_all:${agent}`;
    const approve_each = async () => {
      const shown = mine.filter(is_drawn).map((row) => [row, drawn.get(row.id)]); // before any of them changes
      for (const [row, as] of shown) await approve(row, as);
    };
    return h(
      "div",
      { key: all, class: "decide approve-all" },
      h("p", { class: "dim" }, `${plural(mine.length, "request")} for ${agent}, each shown below.`),
      button(all, `Approve all ${mine.length} for ${agent}`, approve_each, { disabled: !mine.every(can_approve) }),
      refusal(all),
    );
  });
}

function approve_button(row, keys) {
  note_drawn(row);
  const look = { kind: "main", hint: keys && "a", disabled: !can_approve(row) };
  const name = `Approve request ${row.id}`;
  if (takes_a_press_more(row))
    return button(group(row), "Approve…", async () => toggle(sure(row), true), { ...look, name: `${name}…` });
  if (toggled(sure(row)))
    return button(group(row), "Approve unread", () => approve(row), { ...look, name: `${name} unread` });
  return button(group(row), "Approve", () => approve(row), { ...look, name });
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
      approve_button(row, keys),
    ),
    refusal(group(row)),
  );
}

// ── The card ─────────────────────────────────────────────────────────────────────────────────────

/** `brief` leaves the change out: it was decided. */
export function approval_card(row, { keys = false, brief = false, ...props } = {}) {
  return h(
    "article",
    { ...props, class: `card ${is_long(row) ? "long" : ""} ${props.class ?? ""}`, "aria-label": request_words(row) },
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
    overtaken(row),
    row.status === "pending" && moved(row),
    !brief && precheck_line(row),
    hints(row, brief),
    !brief && [changes(row), packages_view(row), edit_form(row, show_detail), background(row)],
    row.status === "pending" ? decision(row, keys) : outcome(row),
  );
}

function overtaken(row) {
  const newer = overtaken_by(row);
  return (
    newer &&
    h(
      "p",
      { class: "card-line warn" },
      "A newer request for the same agent waits: ",
      h("a", { href: `#/approvals/${newer.id}` }, `#${newer.id}`),
    )
  );
}

/** Another config was deployed meanwhile: what is shown, and what was checked, is not what was at first. */
function moved(row) {
  const { base_sha, first_base_sha, precheck } = row;
  if (!first_base_sha || first_base_sha === base_sha) return null;
  const checked = precheck && precheck.state !== "off" ? ", and checked again," : "";
  return h(
    "p",
    { class: "card-line warn" },
    `Another config was deployed since this was asked. The change is shown${checked} against what runs now.`,
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

// A long change keeps the decision in sight.
const LONG = 40;

function is_long(row) {
  const files = (row.status === "pending" && detail(row.id, row.digest).row?.files) || [];
  return files.reduce((sum, { added, removed }) => sum + added + removed, 0) > LONG;
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
    row.edited &&
      h(
        "span",
        { class: "warn" },
        "edited by you",
        row.proposed_sha && ["; proposed was ", h("code", { title: row.proposed_sha }, short_sha(row.proposed_sha))],
      ),
    edit_button(row),
  ].filter(Boolean);
  return facts.length > 0 && h("div", { class: "card-line" }, facts);
}

function changes(row) {
  if (row.kind === "schedule_prompt") return null;
  const { row: more, error } = detail(row.id, row.digest);
  if (!more && !error) return h("p", { class: "card-line dim" }, "Reading the change…");
  return [
    error &&
      h(
        "div",
        { class: "card-line" },
        h("p", { class: "refusal", role: "alert" }, `The change can't be ${more ? "read again" : "shown"}: `, error.message),
        plain("Try again", () => look_again(row.id), { kind: "small" }),
      ),
    more &&
      h(
        "div",
        { class: "changes" },
        more.diff && (more.files.length > 1 || split_switch()) && diff_top(more.files),
        more.diff &&
          diff_view(`diff:${row.id}:${more.digest}`, more.diff, { at: error_mark(row), cut_bytes: more.cut_bytes }),
      ),
  ];
}

const diff_top = (files) =>
  h("p", { class: "card-line dim" }, files.length > 1 && plural(files.length, "file"), split_switch());

function background(row) {
  const { row: more } = detail(row.id, row.digest);
  return more && [thread_view(more), earlier_view(more, request_words)];
}

function outcome(row) {
  const deploy = row.deploy_id && state.deploys.find(({ id }) => id === row.deploy_id);
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
    deploy && deploy_card(deploy, { bare: true }),
    deploy && rollback_button(deploy),
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
