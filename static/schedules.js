// Messages that the hive writes by itself: later, or again and again.

import { h } from "./dom.js";
import { ago, clock, hive_now, prose_preview, span } from "./text.js";
import {
  asking_button,
  button,
  choice,
  draft,
  empty,
  field,
  fold,
  heading,
  panel,
  refusal,
  set_draft,
  spend_draft,
  toggle,
} from "./parts.js";
import { changed, state } from "./store.js";
import { get, in_turn, post } from "./api.js";

const known = { rows: null, error: null };

export const load_schedules = in_turn(async () => {
  try {
    const { schedules } = await get("/api/schedules");
    Object.assign(known, { rows: schedules.filter(({ next }) => next), error: null }); // the others are over
    load_when_due(known.rows);
  } catch (error) {
    known.error = error;
  }
  changed();
});

let timer = 0;
const LONGEST_WAIT_MS = 86400000;

/** No change tells that one was written: as long as somebody looks, they are asked for when the next one is due. */
function load_when_due(rows) {
  clearTimeout(timer);
  const wait_ms = Math.min(LONGEST_WAIT_MS, ...rows.map(({ next }) => Date.parse(next) - hive_now()));
  const look = () => location.hash === "#/system" && load_schedules();
  timer = setTimeout(look, Math.max(0, wait_ms) + 1000);
}

// ── A new one ────────────────────────────────────────────────────────────────────────────────────

const GROUP = "schedule:new";
const [BODY, TO, FIRST, NUMBER, UNIT] = ["body", "to", "first", "number", "unit"].map((name) => `${GROUP}:${name}`);
const SECONDS = { minutes: 60, hours: 3600, days: 86400, weeks: 7 * 86400 };

const recipient = () => {
  const names = [...state.agents.map(({ name }) => name), "*"];
  return names.includes(draft(TO)) ? draft(TO) : names[0];
};

const every_s = () => (SECONDS[draft(UNIT)] ? Number(draft(NUMBER) || 1) * SECONDS[draft(UNIT)] : null);

const is_complete = () =>
  Boolean(draft(BODY).trim() && draft(FIRST)) && (every_s() === null || Number.isInteger(every_s()));

async function create() {
  const keys = [BODY, TO, FIRST, NUMBER, UNIT];
  const sent = keys.map(draft);
  const again = every_s();
  const first = new Date(draft(FIRST)).toISOString();
  await post("/api/schedules", { to: recipient(), body: draft(BODY).trim(), first, ...(again && { every_s: again }) });
  if (keys.every((key, index) => draft(key) === sent[index])) {
    for (const key of keys) spend_draft(key);
    toggle(GROUP, false);
  } // else the next one is being written
  await load_schedules();
}

const kept_choice = (key, label, value, options) => choice(label, value, options, (name) => set_draft(key, name));

/** A field whose text decides what can be pressed. */
const counted = (key, props) =>
  field(key, {
    ...props,
    oninput: (event) => {
      set_draft(key, event.target.value);
      changed();
    },
  });

const row_of = (words, ...fields) => h("div", { class: "form-row" }, h("span", { class: "dim" }, words), fields);

function form() {
  const names = state.agents.map(({ name }) => [name, name]);
  const units = [["", "only once"], ...Object.keys(SECONDS).map((unit) => [unit, unit])];
  return h(
    "div",
    { class: "form" },
    row_of("To", kept_choice(TO, "Recipient of the schedule", recipient(), [...names, ["*", "all agents"]])),
    row_of("Text", counted(BODY, { tag: "textarea", rows: "2", label: "Text of the schedule", placeholder: "" })),
    row_of("First", counted(FIRST, { type: "datetime-local", label: "First time, by your clock" })),
    row_of(
      "Then every",
      SECONDS[draft(UNIT)] &&
        counted(NUMBER, { type: "number", min: "1", step: "1", label: "Number", placeholder: "1", class: "field number" }),
      kept_choice(UNIT, "How often", draft(UNIT), units),
    ),
    h(
      "div",
      { class: "buttons" },
      button(GROUP, "Create the schedule", create, { kind: "main", disabled: !is_complete() || !state.agents.length }),
    ),
    refusal(GROUP),
  );
}

// ── The list ─────────────────────────────────────────────────────────────────────────────────────

function schedule_row(row) {
  const group = `schedule:${row.id}`;
  const cancel = () => post(`/api/schedules/${row.id}/cancel`).then(load_schedules);
  return h(
    "div",
    { class: "row line", key: row.id },
    h("span", { class: "grow wrap" }, h("strong", null, row.to === "*" ? "all" : row.to), " ", prose_preview(row.body)),
    h(
      "span",
      { class: "dim" },
      row.every_s ? `every ${span(row.every_s * 1000)}` : "once",
      " · next ",
      clock(row.next),
      ", ",
      ago(row.next, "until"),
    ),
    asking_button(group, "Cancel", "Cancel the schedule", cancel, { name: `Cancel schedule ${row.id}` }),
    refusal(group),
  );
}

export function schedules_panel() {
  const { rows, error } = known;
  return [
    heading("Schedules", rows?.length),
    panel(
      null,
      error && h("p", { class: "refusal pad", role: "alert" }, error.message),
      rows?.length === 0 && empty("No message is written by itself, later or regularly."),
      rows?.map(schedule_row),
      fold(GROUP, "New schedule", form, { class: "row column" }),
    ),
  ];
}
