"use strict";
// Shows the state that the server tells, and tells it what the person says. Texts are set as text, never as HTML.
const $ = (id) => document.getElementById(id);
const FAILED = "No answer: the review has ended, or another program holds it. Start sg-local review again.";
let state = null;
let isBusy = false;

async function ask(path, body) {
  if (isBusy) return;
  isBusy = true;
  try {
    const options = body && {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    };
    const reply = await fetch(path, options);
    const value = await reply.json();
    if (reply.ok) {
      state = value;
      show();
    } else {
      tell(value.error);
    }
  } catch {
    tell(FAILED);
  } finally {
    isBusy = false;
  }
}

function tell(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function button(text, key, isPressed, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.setAttribute("aria-pressed", isPressed);
  made.append(document.createTextNode(text));
  if (key) {
    const shownKey = document.createElement("kbd");
    shownKey.textContent = ` ${key}`;
    made.append(shownKey);
  }
  made.addEventListener("click", onClick);
  return made;
}

function show() {
  const row = state.row;
  const place = [...$("labels").children].indexOf(document.activeElement); // who goes by Tab stays at a label
  tell("");
  $("edit").hidden = true;
  document.title = `${state.n_reviewed} of ${state.n_rows} reviewed`;
  $("task").textContent = state.task;
  $("instruction").textContent = state.instruction;
  $("count").textContent = `${state.n_reviewed} of ${state.n_rows} reviewed`;
  $("progress").max = Math.max(1, state.n_rows);
  $("progress").value = state.n_reviewed;
  $("row").hidden = !row;
  $("done").hidden = Boolean(row) && !state.is_over;
  $("done").textContent = state.is_over
    ? "The review has ended. You may close this page."
    : state.n_rows ? "Every row is reviewed." : "There is no row to review.";
  if (row) {
    const sure = row.confidence === null ? "" : `, confidence ${row.confidence.toFixed(3)}`;
    $("which").textContent = `Row ${row.id}${row.drop ? `: ${row.drop}` : ""}${sure}`;
    $("input").textContent = row.input;
    $("shown").textContent = row.shown;
    $("said-name").hidden = $("said").hidden = !row.word;
    $("said").textContent = row.said === null ? row.word : row.said;
    $("labels").replaceChildren(...state.labels.map((label, number) =>
      button(label, number < 9 ? number + 1 : "", row.said === label, () => answer(label))));
    if (place >= 0) $("labels").children[place].focus();
  }
  const can = { b: state.can_go_back, f: state.can_go_forward, u: state.can_undo, q: true };
  for (const one of document.querySelectorAll("[data-key]")) {
    const key = one.dataset.key;
    one.disabled = state.is_over || !(key in can ? can[key] : row);
    one.hidden = key === "e" && state.labels.length > 0;
  }
  $("lines").replaceChildren(...state.lines.map((line) => {
    const item = document.createElement("li");
    item.textContent = line;
    return item;
  }));
}

function answer(output) {
  if (state.row) ask("act", { act: "answer", id: state.row.id, output });
}

function edit() {
  if (!state.row || state.labels.length) return;
  $("edit").hidden = false;
  $("answer").value = state.row.output;
  $("answer").focus();
}

function leave() {
  $("edit").hidden = true;
  document.querySelector("[data-key=e]").focus(); // or what is typed next may go to the hidden field
}

function press(key) {
  const row = state && state.row;
  const moves = { b: "back", f: "forward", u: "undo", q: "end", ArrowLeft: "back", ArrowRight: "forward" };
  const words = { a: "accept", d: "drop" };
  if (!state || state.is_over) return;
  if (key in moves) ask("act", { act: moves[key] });
  else if (row && key in words) ask("act", { act: words[key], id: row.id });
  else if (key === "e") edit();
  else if (/^[1-9]$/.test(key) && state.labels[key - 1] !== undefined) answer(state.labels[key - 1]);
}

for (const one of document.querySelectorAll("[data-key]")) {
  one.addEventListener("click", () => press(one.dataset.key));
}
$("edit").addEventListener("submit", (event) => {
  event.preventDefault();
  answer($("answer").value);
});
$("cancel").addEventListener("click", leave);
document.addEventListener("keydown", (event) => {
  if (event.target === $("answer")) {
    if (event.key === "Escape") leave();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("edit").requestSubmit();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.key === "e") event.preventDefault(); // or the field that it opens has it
  press(event.key);
});
ask("state");
