// The specification: edited here, shown as a change with its price, then saved. Nothing is asked of a model without a
// click that stands beside the price.

import { $, ask, element, say } from "./dom.js";

let begun; // what the file said when the edit began
let plan = null; // the change that was shown last, and what was sent for it

async function start() {
  bind();
  await load();
  await corrections();
}

async function load() {
  begun = await ask("api/specification");
  $("file").textContent = begun.file;
  $("named").textContent = begun.named
    ? "The critic is told them (critique.name_spurious_feature)."
    : "The critic is not told them: critique.name_spurious_feature is false.";
  const named = ({ name, stand_in }) =>
    stand_in ? element("strong", { class: "stand-in" }, `the stand-in “${name}”, no model`) : element("b", {}, name);
  $("critic").replaceChildren("Critic: ", ...begun.critics.flatMap((each, n) => (n ? [", ", named(each)] : [named(each)])));
  fill(begun);
}

function fill({ picture, classes, spurious_features }) {
  $("picture").value = picture;
  $("classes").replaceChildren(
    ...classes.map(({ name, description }, n) => {
      const area = element("textarea", { id: `class-${n}`, rows: 2, "data-class": name });
      area.value = description;
      return element("div", {}, element("label", { for: `class-${n}` }, `Class ${name}`), area);
    }),
  );
  $("features").replaceChildren();
  for (const feature of spurious_features) addFeature(feature);
  forget();
}

function addFeature(text) {
  const input = element("input", { type: "text", autocomplete: "off", "aria-label": "spurious feature" });
  input.value = text;
  const item = element("li", {}, input);
  item.append(element("button", { type: "button", "aria-label": `remove ${text || "this one"}`, onclick: () => (item.remove(), forget()) }, "Remove"));
  $("features").append(item);
  forget();
  return input;
}

function wanted() {
  return {
    picture: $("picture").value,
    classes: [...document.querySelectorAll("[data-class]")].map((area) => ({ name: area.dataset.class, description: area.value })),
    spurious_features: [...$("features").querySelectorAll("input")].map((input) => input.value).filter((text) => text.trim() !== ""),
    digest: begun.digest,
  };
}

// A change that was shown counts no longer once anything else is written.
function forget() {
  plan = null;
  $("plan").hidden = true;
}

async function show() {
  const sent = wanted();
  const found = await ask("api/plan", sent);
  plan = { ...sent, shown: found.shown };
  const unchanged = found.diff === "";
  const kinds = { "+": "new", "-": "gone" };
  $("diff").replaceChildren(
    ...(unchanged ? ["Nothing is changed."] : found.diff.split("\n").map((line, n) => element("span", { class: n > 1 ? kinds[line[0]] : "soft" }, line || " "))),
  );
  const lines = found.samples ? [`The prompt about ${found.samples} samples of the alignment set changes.`, ...found.lines] : found.lines;
  $("price").replaceChildren(...lines.map((line) => element("li", {}, line)));
  $("save").disabled = unchanged;
  $("plan").hidden = false;
  $("plan-title").focus();
}

async function save() {
  const { digest } = await ask("api/save", plan);
  await load();
  if (begun.digest !== digest) say("error", "saved, and somebody saved another change since: this is theirs");
  status("Saved. `dvc repro` asks anew about what changed.");
  await corrections();
}

async function corrections() {
  const found = await ask("api/corrections");
  $("counted").textContent = `Experts corrected the critic on ${found.corrections} of ${found.judged} regions.`;
  $("common").replaceChildren(...found.in_common.map(card));
  if (found.in_common.length === 0) $("common").append(element("p", {}, "Too few corrections of one kind to have anything in common."));
  const enough = found.corrections >= found.enough;
  $("question").hidden = found.model === null || !enough;
  $("asking").hidden = true;
  $("proposal").hidden = true;
  $("who").textContent =
    found.model === null
      ? "No model is configured (critique.critic and judge.judge are stand-ins): the list above is all there is."
      : enough
        ? `${found.model} can be asked how the descriptions should change. You decide what is taken over.`
        : `From ${found.enough} corrections on, ${found.model} can be asked how the descriptions should change.`;
}

function card(each) {
  const said = each.expert === "no" ? "spurious or irrelevant" : "relevant";
  const items = each.shared.map((shared) => {
    const what = shared.kind === "place" ? `at the ${shared.value}` : `the critic wrote “${shared.value}”`;
    const counts = `${shared.count} of ${shared.total}; of those left as they were ${Math.round(100 * shared.others)} %`;
    const item = element("li", {}, element("span", {}, element("b", {}, what), ` (${counts})`));
    const buttons = element("span", { class: "actions" });
    if (each.expert === "no") {
      const text = shared.kind === "place" ? `what lies at the ${shared.value} of the image` : shared.value;
      buttons.append(element("button", { type: "button", "aria-label": `accept: ${what}`, onclick: () => takeOver(text, item) }, "Accept as a feature"));
    }
    buttons.append(element("button", { type: "button", "aria-label": `refuse: ${what}`, onclick: () => item.remove() }, "Refuse"));
    item.append(buttons);
    return item;
  });
  const notes = each.notes.map((note) => element("li", {}, element("span", { dir: "auto" }, `note: ${note}`)));
  return element(
    "div",
    { class: "card" },
    element("h3", {}, `Class ${each.class}: ${each.total} regions called ${said} by experts, not by the critic`),
    element("ul", {}, ...items, ...notes),
    ...(items.length + notes.length ? [] : [element("p", { class: "soft" }, "They share no place and no words.")]),
  );
}

function takeOver(text, item) {
  item.remove();
  addFeature(text).focus();
  status("Put under the spurious features; say it in your own words, then look at the change and its price.");
}

async function question() {
  const found = await ask("api/question");
  $("question-price").textContent = found.price;
  $("question-text").textContent = found.text;
  $("ask").textContent = found.free ? `Show what ${found.model} answered (in the store, free)` : `Ask ${found.model} at this price`;
  $("ask").disabled = found.replay && !found.free;
  $("ask").onclick = () => act(() => propose(found.shown), $("ask"));
  $("asking").hidden = false;
}

async function propose(shown) {
  status("asking ...");
  const found = await ask("api/proposal", { shown });
  status("");
  const now = new Map(begun.classes.map(({ name, description }) => [name, description]));
  const changes = found.specification.classes.filter(({ name, description }) => now.get(name) !== description);
  const features = found.specification.spurious_features;
  const differs = JSON.stringify(features) !== JSON.stringify(begun.spurious_features);
  const cards = changes.map(({ name, description }) =>
    choice(`Class ${name}`, now.get(name), description, () => {
      document.querySelector(`[data-class="${CSS.escape(name)}"]`).value = description;
    }),
  );
  if (differs) {
    const show = (list) => (list.length ? list.join("; ") : "none");
    cards.push(
      choice("Spurious features", show(begun.spurious_features), show(features), () => {
        $("features").replaceChildren();
        for (const feature of features) addFeature(feature);
      }),
    );
  }
  $("proposal").replaceChildren(
    element("p", {}, element("b", {}, found.model), ` proposes (${found.spent}): `, element("span", { dir: "auto" }, found.why || "no reason given")),
    ...(cards.length ? cards : [element("p", {}, "It would leave everything as it is.")]),
  );
  $("proposal").hidden = false;
  $("asking").hidden = true;
}

function choice(title, before, after, accept) {
  const box = element("div", { class: "card" }, element("h3", {}, title));
  const two = element("div", { class: "two" });
  two.append(
    element("div", {}, element("span", { class: "soft" }, "now"), element("br"), before),
    element("div", {}, element("span", { class: "soft" }, "proposed"), element("br"), after),
  );
  const take = () => {
    accept();
    forget();
    box.remove();
    status("Put into the form; look at the change and its price, then save.");
  };
  box.append(
    two,
    element(
      "div",
      { class: "actions" },
      element("button", { type: "button", "aria-label": `accept: ${title}`, onclick: take }, "Accept"),
      element("button", { type: "button", "aria-label": `refuse: ${title}`, onclick: () => box.remove() }, "Refuse"),
    ),
  );
  return box;
}

function status(text) {
  $("status").textContent = text;
}

// One thing at a time; what went wrong is said at the top.
async function act(what, button) {
  if (button) button.disabled = true;
  say("error", "");
  try {
    await what();
  } catch (error) {
    status("");
    say("error", error.message);
    $("error").scrollIntoView({ block: "nearest" });
  } finally {
    if (button) button.disabled = false;
  }
}

function bind() {
  $("words").addEventListener("submit", (event) => {
    event.preventDefault();
    act(show);
  });
  $("words").addEventListener("input", forget);
  $("add").addEventListener("click", () => addFeature("").focus());
  $("save").addEventListener("click", () => act(save));
  $("discard").addEventListener("click", forget);
  $("question").addEventListener("click", () => act(question, $("question")));
}

start().catch((error) => say("error", error.message));
