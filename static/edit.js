// The operator betters a proposal before deciding: one file at a time, kept as a commit of their own.

import { h } from "./dom.js";
import { act, button, choice, is_busy, plain, refusal } from "./parts.js";
import { changed } from "./store.js";
import { get, post } from "./api.js";

const open_edits = new Map(); // request → {files, path, digest, texts}
const group = (id) => `edit:${id}`;

const can_edit = (row) => row.status === "pending" && (row.kind === "spawn" || row.kind === "apply_commit");

async function open_edit(row) {
  const { files } = await get(`/api/approvals/${row.id}/files`);
  const path = "agent.nix" in files ? "agent.nix" : Object.keys(files)[0];
  open_edits.set(row.id, { files, path, digest: row.digest, texts: {} });
}

function close_edit(id) {
  open_edits.delete(id);
  changed();
}

const changed_paths = ({ files, texts }) => Object.keys(texts).filter((path) => texts[path] !== files[path]);

/** `show` takes the request as it is then: what is approved next is what it shows. */
async function save(id, show) {
  const edit = open_edits.get(id);
  for (const path of changed_paths(edit)) {
    const text = edit.texts[path];
    const { approval } = await post(`/api/approvals/${id}/edit`, { path, text, digest: edit.digest });
    show(approval);
    edit.digest = approval.digest;
    edit.files[path] = text;
  }
  if (open_edits.get(id) === edit && changed_paths(edit).length === 0) open_edits.delete(id); // else: typed meanwhile
}

export function edit_button(row) {
  if (!can_edit(row) || open_edits.has(row.id)) return null;
  return [
    plain("Edit", () => act(group(row.id), "Edit", () => open_edit(row)), {
      kind: "quiet",
      "aria-label": `Edit request ${row.id}`,
    }),
    refusal(group(row.id)),
  ];
}

export function edit_form(row, show) {
  const edit = open_edits.get(row.id);
  if (!edit || row.status !== "pending") return null;
  const { files, path, texts } = edit;
  const many = Object.keys(files).length > 1;
  return h(
    "div",
    { class: "edit", key: `edit:${row.id}` },
    h(
      "div",
      { class: "decide" },
      many
        ? choice("File", path, Object.keys(files).map((name) => [name, name]), (name) => Object.assign(edit, { path: name }))
        : h("p", null, h("code", null, path)),
    ),
    h("textarea", {
      key: path,
      class: "field",
      rows: Math.min(30, files[path].split("\n").length + 2),
      spellcheck: "false",
      "aria-label": `Text of ${path}`,
      value: texts[path] ?? files[path],
      oninput: (event) => {
        texts[path] = event.target.value;
        changed();
      },
    }),
    row.digest !== edit.digest &&
      !is_busy(group(row.id)) &&
      h("p", { class: "warn" }, "The request has changed since: cancel, look at it, and edit it anew."),
    h(
      "div",
      { class: "decide" },
      h("p", { class: "dim" }, "It becomes a commit of yours on top of the proposal. Nothing is deployed yet."),
      plain("Cancel", () => close_edit(row.id)),
      button(group(row.id), "Save the edit", () => save(row.id, show), {
        kind: "main",
        disabled: changed_paths(edit).length === 0 || row.digest !== edit.digest,
      }),
    ),
    refusal(group(row.id)),
  );
}

export const is_editing = (id) => open_edits.has(id);
