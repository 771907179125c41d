// The cards of the patterns: a name that can be changed, its samples, a verdict on all of its regions.

import { $ } from "./dom.js";

export function bindPatterns({ page, open, only, giveAll, rename }) {
  for (const card of document.querySelectorAll(".pattern")) {
    const number = Number(card.dataset.pattern);
    const pattern = page.patterns[number];
    const input = card.querySelector(".name");
    if (pattern.name !== undefined) input.value = pattern.name;
    input.addEventListener("change", async () => {
      const name = input.value.trim();
      input.value = name === "" ? pattern.name : ((await rename(number, name)) ?? pattern.name);
      pattern.name = input.value;
    });
    input.addEventListener("keydown", (event) => event.key === "Enter" && input.blur());
    card.querySelector(".members").addEventListener("click", () => {
      only(new Set(pattern.members.map(([place]) => place)), `of “${pattern.name}”`);
      $("samples").scrollIntoView();
    });
    for (const verdict of ["no", "yes"]) {
      card.querySelector(`.all-${verdict}`).addEventListener("click", () => giveAll(pattern.members, verdict, pattern.name));
    }
    for (const example of card.querySelectorAll(".example")) {
      example.addEventListener("click", () => open(Number(example.dataset.place), Number(example.dataset.region)));
    }
  }
}
