// A question of an agent as a card: its options as buttons, and always room for one's own words.

import { h } from "./dom.js";
import { ago, clock, inline, prose } from "./text.js";
import { act, asking_button, button, draft, field, is_busy, plain, refusal, spend_draft, toggle, toggled } from "./parts.js";
import { state } from "./store.js";
import { post } from "./api.js";

export const open_question = (id) => state.questions.find((row) => row.id === id);

// ── Answering ────────────────────────────────────────────────────────────────────────────────────

const answer_key = (id) => `answer:${id}`;
const question_group = (id) => `question:${id}`;

async function answer(id, text) {
  await post(`/api/questions/${id}/answer`, { text });
  spend_draft(answer_key(id));
}

export function press_option(id, index) {
  const question = open_question(id);
  const option = question.options?.[index];
  if (option === undefined || is_busy(question_group(id))) return;
  if (question.multi) toggle_choice(id, option);
  else act(question_group(id), option, () => answer(id, option));
}

const chosen = (id) => toggled(`chosen:${id}`, []);

function toggle_choice(id, option) {
  const now = chosen(id);
  toggle(`chosen:${id}`, now.includes(option) ? now.filter((other) => other !== option) : [...now, option]);
}

function choices(question, keys) {
  const { id, options, multi } = question;
  const hint = (index) => (keys && index < 9 ? String(index + 1) : "");
  return h(
    "div",
    { class: "options", role: "group", "aria-label": "Suggested answers" },
    options.map((option, index) =>
      multi
        ? h(
            "button",
            {
              key: option,
              type: "button",
              class: "button option",
              "aria-pressed": String(chosen(id).includes(option)),
              disabled: is_busy(question_group(id)),
              onclick: () => toggle_choice(id, option),
            },
            option,
            hint(index) && h("kbd", { "aria-hidden": "true", "data-key": hint(index) }),
          )
        : button(question_group(id), option, () => answer(id, option), { kind: "option", hint: hint(index) }),
    ),
  );
}

// ── The card ─────────────────────────────────────────────────────────────────────────────────────

export function question_card(question, { keys = false, ...props } = {}) {
  const { id } = question;
  const [first, ...rest] = question.question.split("\n");
  const short = first.length <= 120;
  const cancel = () => post(`/api/questions/${id}/cancel`);
  const send = () => {
    const text = [...(question.multi ? chosen(id) : []), draft(answer_key(id)).trim()].filter(Boolean).join(", ");
    return text && act(question_group(id), "Send", () => answer(id, text));
  };
  return h(
    "article",
    { ...props, class: `card ${props.class ?? ""}`, "aria-label": `Question of ${question.from}` },
    h(
      "header",
      { class: "card-head" },
      h(
        "div",
        { class: "card-title" },
        h("span", { class: "label" }, "Question"),
        h("h3", null, short ? [`${question.from} asks: `, inline(first)] : `${question.from} asks`),
      ),
      h(
        "span",
        { class: "dim" },
        ago(question.asked_at),
        question.expires_at && ` · expires ${clock(question.expires_at)}`,
      ),
    ),
    prose(short ? rest.join("\n").trim() : question.question, { class: "card-body" }),
    question.options?.length > 0 && choices(question, keys),
    h(
      "div",
      { class: "card-foot" },
      h(
        "div",
        { class: "decide" },
        field(answer_key(id), {
          label: `Answer to ${question.from}`,
          placeholder: question.options?.length ? "Or in your own words…" : "Your answer",
          on_enter: send,
        }),
        asking_button(question_group(id), "Cancel question", "Cancel the question", cancel, { name: `Cancel question ${id}` }),
        plain("Send", send, { disabled: is_busy(question_group(id)), kind: question.options?.length ? "" : "main" }),
      ),
      refusal(question_group(id)),
    ),
  );
}
