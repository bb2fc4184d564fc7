// The files that were sent along with messages: what agents can read under their /operator.

import { h } from "./dom.js";
import { bytes, clock, plural } from "./text.js";
import { asking_button, empty, heading, panel, refusal } from "./parts.js";
import { changed } from "./store.js";
import { get, in_turn, post } from "./api.js";

const known = { rows: null, error: null };

export const load_files = in_turn(async () => {
  try {
    const { files } = await get("/api/files");
    Object.assign(known, { rows: files, error: null });
  } catch (error) {
    known.error = error;
  }
  changed();
});

function file_row({ name, path, size, at }) {
  const group = `file:${name}`;
  const remove = () => post("/api/files/delete", { name }).then(load_files);
  return h(
    "div",
    { class: "row line", key: name },
    h("code", { class: "grow wrap" }, path),
    h("span", { class: "dim" }, `${bytes(size)} · ${clock(at)}`),
    asking_button(group, "Delete", `Delete ${name}`, remove, { name: `Delete the file ${name}` }),
    refusal(group),
  );
}

export function files_panel() {
  const { rows, error } = known;
  return [
    heading("Attached files", rows?.length > 0 && plural(rows.length, "file")),
    panel(
      null,
      error && h("p", { class: "refusal pad", role: "alert" }, error.message),
      rows?.length === 0 && empty("None. Files that you attach to messages lie here; agents can read them."),
      rows?.map(file_row),
    ),
  ];
}
