// What the page shows and keeps, where it is a file: the data stand in it, verdicts stay in this browser until they are
// downloaded as the CSV that `lvlmva review` would have written.

const NAME = /^[\p{L}\p{N}_](?:[\p{L}\p{N}_ .-]{0,58}[\p{L}\p{N}_])?$/u; // as lvlmva_core/overrides.py
const COLUMNS = ["sample", "segmentation", "region", "verdict", "note", "reviewer", "order"];
const NAME_COLUMNS = ["sample", "segmentation", "region", "name", "reviewer"];
const LONGEST_NOTE = 2000;

// The last verdict on each region that was not taken back.
export function standing(events) {
  const said = new Map();
  for (const event of events) {
    const key = `${event.place}:${event.region}`;
    const before = said.get(key) ?? [];
    said.set(key, event.verdict === "undo" ? before.slice(0, -1) : [...before, event]);
  }
  return [...said.values()].flatMap((each) => each.slice(-1));
}

// Pairs of bytes: label, how often it comes in a row, minus 1.
export function labelsOf(text, size) {
  const pairs = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  const labels = new Uint8Array(size);
  let at = 0;
  for (let n = 0; n < pairs.length; n += 2) {
    labels.fill(pairs[n], at, at + pairs[n + 1] + 1);
    at += pairs[n + 1] + 1;
  }
  return labels;
}

function quoted(cell) {
  const text = String(cell);
  return /[,"\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const csv = (columns, rows) => [columns, ...rows].map((row) => `${row.map(quoted).join(",")}\n`).join("");

function saveFile(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export function openDisk(text) {
  const data = JSON.parse(text);
  const { samples, pictures } = data;
  const memory = new Map(); // reviewer -> events, where the browser keeps nothing
  let keeps = true;
  const namesKey = `lvlmva names ${data.digest}`;
  let names = {}; // pattern -> name
  try {
    names = JSON.parse(localStorage.getItem(namesKey) ?? "{}");
  } catch {
    keeps = false;
  }
  for (const [pattern, name] of Object.entries(names)) if (data.patterns[pattern]) data.patterns[pattern].name = name;
  const keyOf = (reviewer) => `lvlmva ${data.digest} ${reviewer.toLowerCase()}`;

  function read(reviewer) {
    if (memory.has(reviewer)) return memory.get(reviewer);
    let events = [];
    try {
      events = JSON.parse(localStorage.getItem(keyOf(reviewer)) ?? "[]");
    } catch {
      keeps = false;
    }
    memory.set(reviewer, events);
    return events;
  }

  // Another tab of the same file may have gone on: its events are taken over before one is added.
  function add(reviewer, event) {
    memory.delete(reviewer);
    const events = keeps ? read(reviewer) : (memory.get(reviewer) ?? []);
    const all = [...events, { ...event, order: (events.at(-1)?.order ?? 0) + 1 }];
    memory.set(reviewer, all);
    try {
      localStorage.setItem(keyOf(reviewer), JSON.stringify(all));
    } catch {
      keeps = false;
    }
    return all.at(-1);
  }

  const said = (reviewer) => ({ verdicts: standing(read(reviewer)), stale: 0 });

  return {
    kept: "kept in this browser",
    keeps: () => keeps,
    page: async () => data,
    labels: async (place) => labelsOf(pictures[place].labels, data.height * data.width),
    critique: async (place) => pictures[place].critique,
    picture: (place, kind) => pictures[place][kind],
    withWords: async (words) => {
      const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
      return samples.flatMap((sample, place) => {
        const held = `${sample.id} ${sample.class} ${pictures[place].critique}`.toLowerCase();
        return wanted.every((word) => held.includes(word)) ? [place] : [];
      });
    },
    verdicts: async (reviewer) => {
      if (!NAME.test(reviewer) || reviewer.toLowerCase() === "verdicts") {
        throw new Error("a name has 1 to 60 letters, digits, spaces, dots or hyphens, begins and ends with a letter or digit, and is not “verdicts”");
      }
      memory.delete(keeps ? reviewer : "");
      return said(reviewer);
    },
    give: async ({ reviewer, place, region, verdict, note }) =>
      add(reviewer, { place, region, verdict, note: note.split(/\s+/).filter(Boolean).join(" ").slice(0, LONGEST_NOTE) }),
    undo: async (reviewer, order) => {
      const event = standing(read(reviewer)).find((each) => each.order === order);
      if (event === undefined) throw new Error("that verdict does not stand any more; look again");
      add(reviewer, { place: event.place, region: event.region, verdict: "undo", note: "" });
      return { place: event.place, region: event.region, ...said(reviewer) };
    },
    rename: async (reviewer, pattern, name) => {
      names = { ...names, [pattern]: name };
      try {
        localStorage.setItem(namesKey, JSON.stringify(names));
      } catch {
        keeps = false;
      }
      return { name };
    },
    count: (reviewer) => read(reviewer).length,
    named: () => Object.keys(names).length,
    download: (reviewer) => {
      const rows = read(reviewer).map(({ place, region, verdict, note, order }) => [
        samples[place].id, samples[place].digest, region, verdict, note, reviewer, order,
      ]);
      saveFile(`${reviewer}.csv`, csv(COLUMNS, rows));
    },
    downloadNames: (reviewer) => {
      const rows = Object.entries(names).map(([pattern, name]) => {
        const { sample, segmentation, region } = data.patterns[pattern].anchor;
        return [sample, segmentation, region, name, reviewer];
      });
      saveFile(`${reviewer} names.csv`, csv(NAME_COLUMNS, rows));
    },
  };
}
