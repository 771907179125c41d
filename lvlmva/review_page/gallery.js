// The samples as cards: filled when they come into view, so that a thousand of them cost nothing at first.

import { $, element } from "./dom.js";
import { shapesOf, thumbnail } from "./picture.js";

const PRINTED = 24;

export function makeGallery({ source, page, rejectedOf, open }) {
  const { height, width } = page;
  const filled = new Map(); // place -> what it was filled for

  async function fill(card) {
    const place = Number(card.dataset.place);
    const rejected = rejectedOf(place);
    const state = rejected.join(" ");
    if (filled.get(card) === state) return;
    filled.set(card, state);
    try {
      const labels = await source.labels(place);
      const sample = page.samples[place];
      const shapes = shapesOf(labels, height, width, sample.regions.filter(({ region }) => rejected.includes(region)));
      const size = { height, width };
      const told = rejected.length === 0 ? "no region rejected" : `rejected regions ${rejected.map((each) => each + 1).join(", ")}`;
      card.querySelector(".thumbs").replaceChildren(
        thumbnail({ url: source.picture(place, "image"), label: `image, ${told}`, shapes, rejected, ...size }),
        thumbnail({ url: source.picture(place, "before"), label: "attribution", shapes, rejected: [], ...size }),
      );
    } catch {
      filled.delete(card); // tried again when it is seen again
    }
  }

  const watcher = new IntersectionObserver(
    (seen) => seen.filter(({ isIntersecting }) => isIntersecting).forEach(({ target }) => fill(target)),
    { rootMargin: "400px" },
  );

  function told(place) {
    const { regions, masked_share: share, left_out: why } = page.samples[place];
    const rejected = rejectedOf(place).length;
    if (why) return "left out";
    const counted = `${rejected} of ${regions.length} rejected`;
    return share === null ? counted : `${counted}, ${Math.round(100 * share)} % masked`;
  }

  function card(place) {
    const sample = page.samples[place];
    const button = element(
      "button",
      { type: "button", class: "card", "data-place": place, onclick: () => open(place) },
      element("span", { class: "thumbs", style: null }),
      element("span", { class: "id" }, sample.id),
      element("span", { class: "soft" }, `class ${sample.class}`),
      element("span", { class: "soft told" }, told(place)),
    );
    button.querySelector(".thumbs").style.aspectRatio = `${2 * width} / ${height}`;
    watcher.observe(button);
    return element("li", {}, button);
  }

  function show(places) {
    watcher.disconnect();
    filled.clear();
    $("grid").replaceChildren(...places.map(card));
    $("grid-shown").textContent = `(${places.length} of ${page.samples.length})`;
    $("nothing").hidden = places.length > 0;
  }

  // After verdicts, what is in view is drawn anew.
  function refresh() {
    for (const each of $("grid").querySelectorAll(".card")) {
      each.querySelector(".told").textContent = told(Number(each.dataset.place));
      if (filled.has(each)) fill(each);
    }
  }

  addEventListener("beforeprint", () => [...$("grid").querySelectorAll(".card")].slice(0, PRINTED).forEach(fill));
  return { show, refresh };
}
