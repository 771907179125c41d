// The review page: a queue of samples, a verdict a region, each sent at once and marked when it is on the disk.

import { $, ask, element, say } from "./dom.js";
import { figure, shapesOf } from "./picture.js";

const WORDS = { yes: "Yes", no: "No", unsure: "Unsure" };
const MARKS = { yes: "✓", no: "✕", unsure: "?" };
const PICTURES = { image: "image", attribution: "attribution: red speaks for the class, blue against", overlay: "regions" };

let page; // what the server said once
let reviewer = "";
let mine = new Map(); // "place:region" -> {verdict, note, order, saved}
let queue = []; // places, filtered and ordered
let found = null; // places whose critique holds the words, or null
let place = 0; // of the sample that is shown
let chosen = null; // its region
let labels = new Map(); // place -> label map
let figures = []; // of the sample that is shown; none until its label map is there
let writing = Promise.resolve(); // one after the other

const key = (sample, region) => `${sample}:${region}`;
const verdictOf = (sample, region) => mine.get(key(sample, region));
const openRegions = (sample) => page.samples[sample].regions.filter(({ region }) => !verdictOf(sample, region));
const reviewed = (sample) => openRegions(sample).length === 0;
const onDisk = (sample) => page.samples[sample].regions.every(({ region }) => verdictOf(sample, region)?.saved);

// What a correction is worth most on: where the critic is least sure, then where the model relies most on a region.
const least = (sample) => Math.min(1, ...sample.regions.map(({ certainty }) => certainty ?? 1));
const most = (sample) => Math.max(0, ...sample.regions.map(({ reliance }) => reliance ?? 0));
const ORDERS = {
  worth: (a, b) => least(a) - least(b) || most(b) - most(a),
  entropy: (a, b) => a.entropy - b.entropy,
  id: () => 0,
};
const FILTERS = {
  all: () => true,
  open: (n) => !reviewed(n),
  done: (n) => reviewed(n),
  rejected: (n) => page.samples[n].regions.some(({ verdict }) => verdict === "no"),
  differs: (n) =>
    page.samples[n].regions.some(({ region, verdict }) => verdictOf(n, region) && verdictOf(n, region).verdict !== verdict),
  failed: (n) => page.samples[n].regions.some(({ verdict }) => verdict === null),
};

async function start() {
  page = await ask("api/page");
  showJudges();
  const classes = [...new Set(page.samples.map((sample) => sample.class))];
  $("class").append(element("option", { value: "" }, "all"), ...classes.map((name) => element("option", { value: name }, name)));
  bind();
  const name = page.reviewer ?? sessionStorage.getItem("reviewer");
  if (name === null) $("who-box").showModal();
  else await begin(name);
}

function showJudges() {
  const named = ({ name, stand_in }) =>
    stand_in ? element("strong", { class: "stand-in" }, `the stand-in “${name}”, no model`) : element("span", {}, name);
  const list = (people) => people.flatMap((each, n) => (n ? [", ", named(each)] : [named(each)]));
  if (page.critics.length === 0) $("judged").append("No critic was asked yet.");
  else $("judged").append("Critic: ", ...list(page.critics), " · Judge: ", ...list(page.judges));
}

async function begin(name) {
  reviewer = name;
  await reload();
  sessionStorage.setItem("reviewer", reviewer);
  $("who").textContent = `Reviewer: ${reviewer}`;
  refilter();
  const asked = Number(location.hash.slice(1)) - 1;
  const first = queue.find((n) => !reviewed(n)) ?? queue[0] ?? 0;
  await show(Number.isInteger(asked) && page.samples[asked] ? asked : first);
}

async function reload() {
  take(await ask(`api/verdicts?reviewer=${encodeURIComponent(reviewer)}`));
}

function take(said) {
  mine = new Map(said.verdicts.map((each) => [key(each.place, each.region), { ...each, saved: true }]));
  say(
    "stale",
    said.stale ? `${said.stale} of your verdicts are of earlier segmentations: they do not count, and their regions wait for you.` : "",
  );
}

function refilter() {
  const filter = FILTERS[$("show").value];
  const name = $("class").value;
  queue = page.samples
    .map((_, n) => n)
    .filter((n) => filter(n) && (name === "" || page.samples[n].class === name) && (found === null || found.has(n)))
    .sort((a, b) => ORDERS[$("order").value](page.samples[a], page.samples[b]) || a - b);
  showQueue();
}

function showQueue() {
  const items = queue.map((n) => {
    const sample = page.samples[n];
    const done = onDisk(n);
    const button = element(
      "button",
      { type: "button", "aria-current": n === place ? "true" : null, onclick: () => show(n) },
      element("span", { class: done ? "done" : "open", "aria-hidden": true }, done ? "✓" : "○"),
      element("span", { class: "id" }, sample.id),
      element("span", { class: "soft" }, sample.class),
      element("span", { class: "off-screen" }, done ? "reviewed" : "not reviewed"),
    );
    return element("li", { "data-place": n }, button);
  });
  $("list").replaceChildren(...items);
  $("shown").textContent = `(${queue.length})`;
  count();
}

function count() {
  const done = page.samples.filter((_, n) => onDisk(n)).length;
  $("counter").textContent = `${done} of ${page.samples.length} reviewed`;
  $("progress").max = page.samples.length;
  $("progress").value = done;
}

function mark(n) {
  const sign = $("list").querySelector(`[data-place="${n}"] button`);
  if (sign === null) return;
  const done = onDisk(n);
  sign.firstChild.className = done ? "done" : "open";
  sign.firstChild.textContent = done ? "✓" : "○";
  sign.lastChild.textContent = done ? "reviewed" : "not reviewed";
}

async function show(n, region = null) {
  if (page.samples[n] === undefined) return;
  place = n;
  const sample = page.samples[n];
  chosen = region ?? openRegions(n)[0]?.region ?? sample.regions[0]?.region ?? null;
  history.replaceState(null, "", `#${n + 1}`);
  $("name").textContent = sample.id;
  $("class-name").textContent = `class ${sample.class}`;
  const at = queue.indexOf(n);
  $("place").textContent = at < 0 ? "" : `${at + 1} of ${queue.length}`;
  $("critique").textContent = "";
  for (const item of $("list").children) {
    const current = Number(item.dataset.place) === n;
    item.firstChild.toggleAttribute("aria-current", current);
    if (current) item.scrollIntoView({ block: "nearest" });
  }
  figures = [];
  draw();
  try {
    const [map, said] = await Promise.all([labels.get(n) ?? ask(`api/samples/${n}/labels`), ask(`api/samples/${n}/critique`)]);
    labels.set(n, map);
    if (place !== n) return; // somebody was faster
    $("critique").textContent = said.critique;
    drawPictures(n, map);
    draw();
  } catch (error) {
    if ($("error").hidden) fail(error); // what was not saved is worse than what is not shown
  }
}

function drawPictures(n, map) {
  const { height, width } = page;
  const shapes = shapesOf(map, height, width, page.samples[n].regions);
  figures = Object.entries(PICTURES).map(([kind, caption]) =>
    figure({ url: `api/samples/${n}/${kind}.png`, caption, labels: map, shapes, height, width, choose }),
  );
  $("pictures").replaceChildren(...figures.map(({ node }) => node));
}

function draw() {
  const sample = page.samples[place];
  const focused = $("regions").contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  if (figures.length === 0) {
    const waiting = Object.values(PICTURES).map((caption) =>
      element("figure", {}, element("div", { class: "waiting" }), element("figcaption", {}, caption)),
    );
    $("pictures").replaceChildren(...waiting);
  }
  for (const { update } of figures) update(chosen, (region) => MARKS[verdictOf(place, region)?.verdict] ?? "");
  $("regions").replaceChildren(...sample.regions.map((each) => row(each)));
  if (sample.regions.length === 0) $("regions").append(element("li", {}, "No region: the model has no positive attribution here."));
  const again = [...$("regions").querySelectorAll("button")].find((each) => each.getAttribute("aria-label") === focused);
  again?.focus();
  $("undo").disabled = mine.size === 0;
  $("accept").disabled = !openRegions(place).some(({ verdict }) => verdict !== null);
}

function saidByCritic({ verdict, asked, certainty }) {
  if (verdict === null) return "critic: no verdict";
  if (!asked) return "critic: not asked, nothing depends on it";
  return `critic: ${verdict}${certainty === null ? "" : ` (${Math.round(100 * certainty)} %)`}`;
}

function row({ region, colour, rgb, share, reliance, verdict, asked, certainty }) {
  const said = verdictOf(place, region);
  const swatch = element("span", { class: "swatch", "aria-hidden": true }, `${region + 1}`);
  swatch.style.backgroundColor = `rgb(${rgb.join(",")})`;
  swatch.style.color = rgb[0] * 0.299 + rgb[1] * 0.587 + rgb[2] * 0.114 > 140 ? "#000" : "#fff";
  const bar = element("span", { class: "share", "aria-hidden": true }, element("span"));
  bar.firstChild.style.width = `${100 * share}%`;
  const percent = (value) => `${Math.round(100 * value)} %`;
  const facts = [`π ${percent(share)} of the positive attribution`];
  if (reliance !== null) facts.push(`reliance ${reliance.toFixed(2)}`);
  const critic = saidByCritic({ verdict, asked, certainty });
  const buttons = Object.entries(WORDS).map(([value, word]) =>
    element(
      "button",
      {
        type: "button",
        class: value,
        "aria-pressed": said?.verdict === value ? "true" : "false",
        "aria-label": `${word}: region ${region + 1}, ${colour}`,
        onclick: (event) => {
          event.stopPropagation();
          give(region, value);
        },
      },
      `${MARKS[value]} ${word}`,
    ),
  );
  const choice = element(
    "button",
    {
      type: "button",
      class: "choose",
      "aria-pressed": region === chosen ? "true" : "false",
      "aria-label": `choose region ${region + 1}, ${colour}`,
    },
    swatch,
    element("span", { class: "colour" }, colour),
  );
  const state = said === undefined ? "" : said.saved ? `saved${said.note ? `: ${said.note}` : ""}` : "saving …";
  return element(
    "li",
    { class: region === chosen ? "region chosen" : "region", "data-region": region, onclick: () => choose(region) },
    choice,
    element("span", { class: "facts" }, bar, element("span", { class: "soft" }, facts.join(", "))),
    element("span", { class: `critic ${verdict ?? "none"}` }, critic),
    element("span", { class: "verdicts", role: "group", "aria-label": `verdict on region ${region + 1}` }, ...buttons),
    element("span", { class: "state soft", dir: "auto" }, state),
  );
}

function choose(region) {
  chosen = region;
  draw();
}

// Shown at once, sent in turn; what could not be written is taken back and said.
function give(region, verdict, advance = true) {
  const sample = place;
  const body = { reviewer, place: sample, region, verdict, note: $("note").value };
  $("note").value = "";
  const before = verdictOf(sample, region);
  const sent = { verdict, note: body.note, saved: false };
  mine.set(key(sample, region), sent);
  writing = writing.then(async () => {
    try {
      const event = await ask("api/verdicts", body);
      // a later verdict on the same region may be under way
      if (mine.get(key(sample, region)) === sent) mine.set(key(sample, region), { ...event, saved: true });
      say("error", "");
      $("status").textContent = `${WORDS[verdict]} for region ${region + 1} is saved`;
    } catch (error) {
      if (mine.get(key(sample, region)) === sent) {
        if (before === undefined) mine.delete(key(sample, region));
        else mine.set(key(sample, region), before);
      }
      fail(new Error(`not saved, region ${region + 1} of ${page.samples[sample].id}: ${error.message}`));
      await reload().catch(() => {}); // said just now
    }
    mark(sample);
    count();
    draw();
  });
  if (advance) onward(sample, region);
  return writing;
}

function onward(sample, region) {
  const left = openRegions(sample);
  const following = left.find((each) => each.region > region) ?? left[0];
  if (following !== undefined) choose(following.region);
  else move(1);
}

function move(step) {
  const at = queue.indexOf(place);
  const skip = $("skip").checked && step > 0;
  for (let n = at < 0 ? (step > 0 ? 0 : queue.length - 1) : at + step; n >= 0 && n < queue.length; n += step) {
    if (!skip || !reviewed(queue[n])) return show(queue[n]);
  }
  const left = queue.find((n) => !reviewed(n));
  if (skip && left !== undefined) return show(left); // those before
  draw();
  $("status").textContent = step > 0 ? "the last of these samples" : "the first of these samples";
  return undefined;
}

function undo() {
  writing = writing.then(async () => {
    const last = [...mine.values()].reduce((a, b) => (b.saved && b.order > (a?.order ?? 0) ? b : a), undefined);
    if (last === undefined) return;
    try {
      const undone = await ask("api/undo", { reviewer, order: last.order });
      take(undone);
      say("error", "");
      $("status").textContent = `the verdict on region ${undone.region + 1} is undone`;
      mark(undone.place);
      count();
      await show(undone.place, undone.region);
    } catch (error) {
      fail(error);
      await reload().catch(fail);
      draw();
    }
  });
  return writing;
}

function accept() {
  for (const { region, verdict } of openRegions(place)) if (verdict !== null) give(region, verdict, false);
  if (reviewed(place)) move(1);
  else draw();
}

function fail(error) {
  say("error", error.message);
}

function bind() {
  for (const id of ["show", "class", "order"]) $(id).addEventListener("change", () => (refilter(), show(queue.includes(place) ? place : (queue[0] ?? place))));
  let timer;
  $("words").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      const words = $("words").value;
      found = words.trim() === "" ? null : new Set(await ask(`api/found?words=${encodeURIComponent(words)}`).catch((error) => (fail(error), [])));
      refilter();
      if (queue.length && !queue.includes(place)) show(queue[0]);
    }, 200);
  });
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  $("undo").addEventListener("click", undo);
  $("accept").addEventListener("click", accept);
  $("help").addEventListener("click", () => $("help-box").showModal());
  $("help-close").addEventListener("click", () => $("help-box").close());
  $("who").addEventListener("click", () => (say("who-error", ""), $("who-box").showModal()));
  const enter = async () => {
    try {
      await begin($("who-name").value.trim());
      $("who-box").close();
    } catch (error) {
      say("who-error", error.message);
    }
  };
  $("who-start").addEventListener("click", enter);
  $("who-name").addEventListener("keydown", (event) => event.key === "Enter" && enter());
  $("who-box").addEventListener("cancel", (event) => reviewer === "" && event.preventDefault());
  // another tab of the same reviewer may have gone on
  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "visible" && reviewer !== "") {
      writing = writing.then(() => reload().then(() => (showQueue(), draw()), fail));
    }
  });
  if (matchMedia("(max-width: 60rem)").matches) $("queue").open = false;
  document.addEventListener("keydown", onKey);
}

const KEYS = {
  y: () => chosen !== null && give(chosen, "yes"),
  n: () => chosen !== null && give(chosen, "no"),
  u: () => chosen !== null && give(chosen, "unsure"),
  j: () => move(1),
  k: () => move(-1),
  z: undo,
  a: accept,
  "?": () => $("help-box").showModal(),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !$("keys").checked || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input:not([type=checkbox]), select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const region = "123456789".indexOf(event.key);
  if (region >= 0 && event.key.length === 1) {
    if (page.samples[place].regions.some((each) => each.region === region)) choose(region);
  } else if (KEYS[event.key.toLowerCase()] && reviewer !== "") {
    event.preventDefault();
    KEYS[event.key.toLowerCase()]();
  }
}

start().catch(fail);
