// Writing to agents: a field that keeps what is typed, files that go along, and Send.

import { h } from "./dom.js";
import { bytes } from "./text.js";
import { act, button, draft, field, is_busy, plain, refusal, set_draft, spend_draft } from "./parts.js";
import { changed } from "./store.js";
import { get, post, upload } from "./api.js";
import { load_files } from "./files.js";

// ── Files ────────────────────────────────────────────────────────────────────────────────────────
// A file is sent to the hive as soon as it is chosen. One that is there belongs to the draft: it outlives a reload.

const under_way = new Map(); // draft → [{id, name, size, sent, error, abort}]
let last_id = Date.now(); // above those of a draft that has outlived the page before
let max_bytes = null;

const files_key = (key) => `files:${key}`;
const attached = (key) => JSON.parse(draft(files_key(key)) || "[]");
const set_attached = (key, files) => set_draft(files_key(key), files.length ? JSON.stringify(files) : "");
const uploads = (key) => under_way.get(key) ?? [];
const by_id = (one, other) => one.id - other.id; // the order in which they were chosen, however fast they were

function drop_upload(key, upload) {
  under_way.set(
    key,
    uploads(key).filter((other) => other !== upload),
  );
  changed();
}

function attach(key, files) {
  for (const file of files) attach_one(key, file);
}

async function attach_one(key, file) {
  const one = { id: ++last_id, name: file.name, size: file.size, sent: 0, error: null, abort: () => {} };
  under_way.set(key, [...uploads(key), one]);
  changed();
  const on_progress = (sent) => {
    one.sent = sent;
    changed();
  };
  try {
    max_bytes ??= (await get("/api/files")).max_bytes;
    if (file.size > max_bytes) throw new Error(`It is too large: a file may have at most ${bytes(max_bytes)}.`);
    const { name, path, size } = await upload(file, on_progress, (abort) => Object.assign(one, { abort }));
    if (uploads(key).includes(one)) set_attached(key, [...attached(key), { id: one.id, name, path, size }].sort(by_id));
    else await remove_file(name); // it was taken away meanwhile
    drop_upload(key, one);
    load_files(); // a list of them may be looked at by now
  } catch (error) {
    one.error = error;
    changed();
  }
}

/** What was not sent yet is of no use to anybody: it goes from the hive, too. */
async function remove_file(name) {
  await post("/api/files/delete", { name }).catch((error) => {
    if (error.status !== 404) throw error; // it has gone: as was wanted
  });
}

async function detach(key, file) {
  await remove_file(file.name);
  set_attached(
    key,
    attached(key).filter((other) => other.name !== file.name),
  );
}

function chip(file, words, remove) {
  return h("li", { key: file.id, class: "chip" }, h("span", { class: "wrap" }, file.name), words, remove);
}

function chips(key) {
  const done = (file) => {
    const group = `file:${file.name}`;
    const remove = button(group, "×", () => detach(key, file), {
      kind: "quiet",
      name: `Remove ${file.name}`,
      disabled: is_busy(`send:${key}`),
    });
    return chip(file, [h("span", { class: "dim" }, bytes(file.size)), refusal(group)], remove);
  };
  const coming = (file) => {
    const part = file.size ? file.sent / file.size : 0;
    const words = file.error
      ? h("span", { class: "bad wrap", role: "alert" }, file.error.message)
      : h("span", { class: "dim", role: "status" }, `${bytes(file.size)}, ${Math.floor(100 * part)} %`);
    const take_away = () => {
      file.abort();
      drop_upload(key, file);
    };
    return chip(file, words, plain("×", take_away, { kind: "quiet", "aria-label": `Remove ${file.name}` }));
  };
  const all = [...attached(key), ...uploads(key)].sort(by_id);
  const chips_of = all.map((file) => (file.path ? done(file) : coming(file)));
  return all.length > 0 && h("ul", { class: "chips", "aria-label": "Attached files" }, chips_of);
}

function attach_button(key) {
  const input = h("input", {
    type: "file",
    multiple: true,
    hidden: true,
    onchange: ({ target }) => {
      attach(key, target.files);
      target.value = "";
    },
  });
  const press = ({ currentTarget }) => currentTarget.nextSibling.click();
  return [plain("Attach", press, { title: "Files can also be dropped or pasted here" }), input];
}

/** Files that are dropped on the composer or pasted into it; words that are pasted stay words. */
const taking_files = (key) => ({
  ondragover: (event) => event.dataTransfer.types.includes("Files") && event.preventDefault(),
  ondrop: (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    attach(key, event.dataTransfer.files);
  },
  onpaste: (event) => {
    const { files, types } = event.clipboardData;
    if (!files.length || types.includes("text/plain")) return;
    event.preventDefault();
    attach(key, files);
  },
});

// ── The whole ────────────────────────────────────────────────────────────────────────────────────

const with_files = (text, files) =>
  [text, files.map(({ path, size }) => `Attached: ${path} (${bytes(size)})`).join("\n")].filter(Boolean).join("\n\n");

/**
 * `send(body)` returns a promise. `before` stands before the field, `beside` after it, `below` under the whole.
 * `files` says whether there is a hive to take them: an agent's own page has none.
 */
export function composer({ key, label, placeholder, send, name, disabled, files, before, beside, below }) {
  const group = `send:${key}`;
  const waits = () =>
    uploads(key).some(({ error }) => !error) || attached(key).some(({ name }) => is_busy(`file:${name}`));
  const send_all = async () => {
    const text = draft(key).trim();
    const sent = attached(key);
    if ((!text && !sent.length) || waits() || disabled) return;
    await send(with_files(text, sent));
    const left = attached(key).filter(({ path }) => !sent.some((file) => file.path === path));
    set_attached(key, left); // one may have come meanwhile
    spend_draft(key, text);
  };
  return h(
    "div",
    { class: "composer", ...(files && taking_files(key)) },
    files && chips(key),
    h(
      "div",
      { class: "decide" },
      before,
      field(key, { tag: "textarea", rows: "2", label, placeholder, on_enter: () => act(group, "Send", send_all) }),
      files && attach_button(key),
      beside,
      button(group, "Send", send_all, { kind: "main", name, disabled: disabled || waits() }),
    ),
    below,
    refusal(group),
  );
}
