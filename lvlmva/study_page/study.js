// The study page: one question at a time, each answer sent at once; nothing here knows which side is which.

import { $, ask, element, say } from "./dom.js";

const YES_NO = [
  ["yes", "Yes", "Y"],
  ["no", "No", "N"],
  ["unsure", "Unsure", "U"],
];
const KINDS = {
  explanation: {
    title: "Which explanation is better?",
    about: (item) => [
      "Both explain a model's output for the class ",
      element("b", {}, item.class),
      ": red is what speaks for it, blue what speaks against it. Better is the one that points at what the class is about.",
    ],
    pictures: { image: "the image", left: "left", right: "right" },
    answers: [
      ["left", "Left", "1"],
      ["same", "No difference", "0"],
      ["right", "Right", "2"],
    ],
  },
  regions: {
    title: "Are these the irrelevant regions?",
    about: (item) => [
      "The class is ",
      element("b", {}, item.class),
      ...(item.rejected.length
        ? [`. Rejected as irrelevant or misleading: ${list(item.rejected)}. Kept as relevant: ${list(item.kept)}.`]
        : [". No region was rejected: all that the model looks at counts as relevant."]),
    ],
    pictures: { image: "the image", rejected: "what was rejected, the rest faded", regions: "all regions" },
    answers: YES_NO,
  },
  reasoning: {
    title: "Is the reasoning right?",
    about: (item) => ["The class is ", element("b", {}, item.class), `. Rejected: ${list(item.rejected)}.`],
    pictures: { image: "the image", rejected: "what was rejected, the rest faded", regions: "all regions" },
    answers: YES_NO,
  },
};

let study; // what the server said once
let participant = "";
let items = []; // {question, class, ..., answer}
let place = 0;
let writing = Promise.resolve(); // one after the other

const list = (names) => (names.length ? names.join(", ") : "none");

async function start() {
  study = await ask("api/study");
  $("samples").textContent = study.samples === 1 ? "one picture" : `${study.samples} pictures`;
  for (const id of ["judged", "judged-again"]) $(id).replaceChildren(...whoJudged());
  bind();
  show("start");
  $("participant").value = study.participant ?? sessionStorage.getItem("participant") ?? "";
}

function whoJudged() {
  const named = ({ name, stand_in }) =>
    stand_in
      ? element("strong", { class: "stand-in" }, `the stand-in “${name}”, a program by rule and no model`)
      : element("b", {}, name);
  const all = (people) => people.flatMap((each, n) => (n ? [", ", named(each)] : [named(each)]));
  return ["What you will read was written by ", ...all(study.critics), "; regions are rejected as read from it by ", ...all(study.judges), "."];
}

function show(id) {
  for (const section of ["start", "asked", "end"]) $(section).hidden = section !== id;
  $("progress-bar").hidden = id === "start";
  scrollTo(0, 0);
}

async function begin(name) {
  const found = await ask(`api/items?participant=${encodeURIComponent(name)}`);
  ({ participant, items } = found);
  sessionStorage.setItem("participant", participant);
  const open = items.findIndex(({ answer }) => answer === null);
  if (open < 0) finish();
  else move(open);
}

function move(n) {
  if (n < 0) return;
  if (n >= items.length) {
    const open = items.findIndex(({ answer }) => answer === null);
    if (open < 0) return finish();
    n = open; // those that were passed over
  }
  place = n;
  show("asked");
  draw(true);
  $("question").focus({ preventScroll: true });
}

function finish() {
  $("all").textContent = items.length;
  count();
  show("end");
  $("end-title").focus({ preventScroll: true });
}

function count() {
  const done = items.filter(({ answer }) => answer !== null).length;
  $("counter").textContent = `${done} of ${items.length} answered`;
  $("progress").max = items.length;
  $("progress").value = done;
}

function draw(anew) {
  const item = items[place];
  const { title, about, pictures, answers } = KINDS[item.question];
  $("part").textContent = `Question ${place + 1} of ${items.length}`;
  $("question").textContent = title;
  $("about").replaceChildren(...about(item));
  if (anew) drawPictures(item, pictures);
  $("critique-box").hidden = item.question !== "reasoning";
  $("critique").textContent = item.critique ?? "";
  const focused = document.activeElement?.dataset?.answer;
  $("answers").replaceChildren(
    ...answers.map(([value, word, key]) =>
      element(
        "button",
        { type: "button", "data-answer": value, "aria-pressed": item.answer === value ? "true" : "false", onclick: () => give(value) },
        `${word} `,
        element("kbd", { "aria-hidden": true }, key),
      ),
    ),
  );
  if (focused) $("answers").querySelector(`[data-answer="${focused}"]`)?.focus();
  $("previous").disabled = place === 0;
  count();
}

function drawPictures(item, pictures) {
  const at = place;
  const figures = Object.entries(pictures).map(([kind, caption]) => {
    const shown = element("img", {
      src: `api/items/${at}/${kind}.png?participant=${encodeURIComponent(participant)}`,
      alt: caption,
    });
    const words = kind === "left" || kind === "right" ? element("b", {}, caption) : caption;
    return element("figure", {}, shown, element("figcaption", {}, words));
  });
  $("pictures").className = item.question === "explanation" ? "two" : "";
  $("pictures").replaceChildren(...figures);
}

// Shown at once, sent in turn; what could not be written is taken back and said.
function give(answer) {
  const [at, who, all] = [place, participant, items];
  const before = items[at].answer;
  items[at].answer = answer;
  draw(false);
  writing = writing.then(async () => {
    try {
      await ask("api/answers", { participant: who, item: at, answer });
      say("error", "");
      $("status").textContent = "saved";
      if (place === at && items === all && !$("asked").hidden) move(at + 1);
    } catch (error) {
      all[at].answer = before;
      say("error", `not saved, question ${at + 1}: ${error.message}`);
      if (items === all && !$("asked").hidden) draw(false);
    }
  });
  return writing;
}

function bind() {
  $("begin").addEventListener("submit", async (event) => {
    event.preventDefault();
    const name = $("participant").value.trim();
    if (!$("consent").checked) return say("begin-error", "Please agree first, or leave the page.");
    try {
      say("begin-error", "");
      await begin(name);
    } catch (error) {
      say("begin-error", error.message);
    }
    return undefined;
  });
  $("previous").addEventListener("click", () => move(place - 1));
  $("next").addEventListener("click", () => move(place + 1));
  $("back").addEventListener("click", () => move(0));
  $("another").addEventListener("click", () => {
    sessionStorage.removeItem("participant");
    [participant, items] = ["", []];
    $("participant").value = "";
    $("consent").checked = false;
    show("start");
    $("participant").focus();
  });
  document.addEventListener("keydown", onKey);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !$("keys").checked || $("asked").hidden) return;
  const key = event.key.toUpperCase();
  const answer = KINDS[items[place].question].answers.find((each) => each[2] === key);
  if (answer) give(answer[0]);
  else if (key === "J") move(place + 1);
  else if (key === "K") move(place - 1);
  else return;
  event.preventDefault();
}

start().catch((error) => say("error", error.message));
