// Signing an agent in: by the address of a page, and the code that this shows.

import { h } from "./dom.js";
import { address } from "./text.js";
import { act, button, draft, field, refusal, spend_draft } from "./parts.js";
import { post } from "./api.js";

/** `words` stand before the first button, `close` after them. */
export function signin(agent, base, { words = null, close = null } = {}) {
  const login = agent.login ?? {};
  const group = `login:${agent.name}`;
  const key = `code:${agent.name}`;
  const finish = async () => {
    const code = draft(key).trim();
    await post(`${base}/login_finish`, { code });
    spend_draft(key, code); // what is wrong with it may be told, and the next one typed, before this is answered
  };
  const cancel = button(group, "Cancel", () => post(`${base}/login_cancel`));
  const begin = button(group, login.phase === "failed" ? "Try again" : "Sign in", () => post(`${base}/login_begin`), {
    kind: "main",
    name: `Sign ${agent.name} in`,
  });
  const views = {
    starting: () =>
      h(
        "div",
        { class: "decide" },
        h("p", { class: "dim grow" }, "Asking for the address of the sign-in page…"),
        cancel,
      ),
    code_wanted: () => [
      h("p", null, "Open this address, sign in, and paste the code that it shows:"),
      h("p", { class: "wrap" }, login.url && address(login.url)),
      login.error && h("p", { class: "bad" }, login.error),
      h(
        "div",
        { class: "decide" },
        field(key, {
          label: `Code for ${agent.name}`,
          placeholder: "Code",
          on_enter: () => act(group, "Finish", finish),
        }),
        cancel,
        button(group, "Finish", finish, { kind: "main" }),
      ),
    ],
    checking: () => h("div", { class: "decide" }, h("p", { class: "dim grow" }, "Checking the code…"), cancel),
  };
  return h(
    "div",
    { class: "signin" },
    views[login.phase]?.() ?? [
      login.phase === "failed" && h("p", { class: "bad" }, login.error ?? "The sign-in failed."),
      h("div", { class: "decide" }, h("div", { class: "grow" }, words), close, begin),
    ],
    refusal(group),
  );
}
