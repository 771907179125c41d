// What the page shows and keeps, where `lvlmva review` serves it.

import { ask } from "./dom.js";

export const server = {
  kept: "saved",
  page: () => ask("api/page"),
  labels: (place) => ask(`api/samples/${place}/labels`),
  critique: async (place) => (await ask(`api/samples/${place}/critique`)).critique,
  picture: (place, kind) => `api/samples/${place}/${kind}.png`,
  withWords: (words) => ask(`api/found?words=${encodeURIComponent(words)}`),
  verdicts: (reviewer) => ask(`api/verdicts?reviewer=${encodeURIComponent(reviewer)}`),
  give: (said) => ask("api/verdicts", said),
  undo: (reviewer, order) => ask("api/undo", { reviewer, order }),
  rename: (reviewer, pattern, name) => ask("api/names", { reviewer, pattern, name }),
};
