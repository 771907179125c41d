// The page: the report, and the review of its samples one by one, where each verdict is kept at once. Where it is served
// the server keeps it; where it is a file, the browser does until it is downloaded.

import { $, element, say } from "./dom.js";
import { openDisk } from "./disk.js";
import { makeGallery } from "./gallery.js";
import { bindPatterns } from "./patterns.js";
import { figure, shapesOf } from "./picture.js";
import { server } from "./server.js";

const WORDS = { yes: "Yes", no: "No", unsure: "Unsure" };
const MARKS = { yes: "✓", no: "✕", unsure: "?" };
const PICTURES = [
  { kind: "image", caption: "image" },
  { kind: "before", caption: "attribution before: red speaks for the class, blue against" },
  { kind: "image", caption: "regions over the image", paint: "overlay" },
];
const MORE = [
  { kind: null, caption: "regions", paint: "regions" },
  { kind: "image", caption: "mask: hatched and dashed is suppressed", paint: "mask" },
  { kind: "after", caption: "attribution after alignment, in the same colours" },
];

const onDisk = $("data") === null ? null : openDisk($("data").textContent);
const source = onDisk ?? server;
let page; // what is known once
let gallery;
let reviewer = "";
let mine = new Map(); // "place:region" -> {verdict, note, order, saved}
let queue = []; // places, filtered and ordered
let found = null; // places whose critique holds the words, or null
let members = null; // places that one pattern holds, or null
let afterName = null; // what waits for the reviewer's name
let place = 0; // of the sample that is shown
let chosen = null; // its region
let labels = new Map(); // place -> label map
let figures = []; // of the sample that is shown; none until its label map is there
let writing = Promise.resolve(); // one after the other

const key = (sample, region) => `${sample}:${region}`;
const verdictOf = (sample, region) => mine.get(key(sample, region));
const openRegions = (sample) => page.samples[sample].regions.filter(({ region }) => !verdictOf(sample, region));
const reviewed = (sample) => openRegions(sample).length === 0;
const keptAll = (sample) => page.samples[sample].regions.every(({ region }) => verdictOf(sample, region)?.saved);
const percent = (value) => `${Math.round(100 * value)} %`;

// What is masked: by this reviewer's verdict, else as the stage left it, else by the critic's.
function isMasked(sample, { region, verdict, masked }) {
  const own = verdictOf(sample, region)?.verdict;
  if (own !== undefined) return own === "no";
  return masked === null ? verdict === "no" : masked > 0;
}
const rejectedOf = (sample) => page.samples[sample].regions.filter((each) => isMasked(sample, each)).map(({ region }) => region);
const wasMasked = ({ regions, masked_share: share }) =>
  share ?? regions.reduce((sum, { share: held, verdict }) => sum + (verdict === "no" ? held : 0), 0);

// What a correction is worth most on: where the critic is least sure, then where the model relies most on a region.
const least = (sample) => Math.min(1, ...sample.regions.map(({ certainty }) => certainty ?? 1));
const most = (sample) => Math.max(0, ...sample.regions.map(({ reliance }) => reliance ?? 0));
const ORDERS = {
  worth: (a, b) => least(a) - least(b) || most(b) - most(a),
  masked: (a, b) => wasMasked(b) - wasMasked(a),
  reliance: (a, b) => most(b) - most(a),
  entropy: (a, b) => a.entropy - b.entropy,
  id: () => 0,
};
const FILTERS = {
  all: () => true,
  open: (n) => !reviewed(n),
  done: (n) => reviewed(n),
  rejected: (n) => rejectedOf(n).length > 0,
  accepted: (n) => rejectedOf(n).length === 0,
  corrected: (n) => page.samples[n].regions.some(({ given, verdict }) => given !== null && given.verdict !== verdict),
  truth: (n) => page.samples[n].differs === true,
  differs: (n) =>
    page.samples[n].regions.some(({ region, verdict }) => verdictOf(n, region) && verdictOf(n, region).verdict !== verdict),
  failed: (n) => page.samples[n].regions.some(({ verdict }) => verdict === null),
};

async function start() {
  page = await source.page();
  showJudges();
  choices("class", page.samples.map((sample) => sample.class));
  choices("group", page.samples.map((sample) => sample.group).filter((group) => group !== null));
  const lacks = (value, known) => known || $("show").querySelector(`[value=${value}]`).remove();
  lacks("truth", page.samples.some(({ differs }) => differs !== null));
  lacks("corrected", FILTERS.corrected && page.samples.some((_, n) => FILTERS.corrected(n)));
  if (onDisk !== null) $("order").value = "masked";
  gallery = makeGallery({ source, page, rejectedOf, open: (n, region) => turnTo("review", () => show(n, region)) });
  bind();
  bindPatterns({ page, open: (n, region) => turnTo("review", () => show(n, region)), only, giveAll, rename });
  const name = onDisk === null ? (page.reviewer ?? sessionStorage.getItem("reviewer")) : remembered();
  if (name !== null) await begin(name);
  refilter();
  if (onDisk === null) await turnTo("review", openHash);
  else if (/^#\d+$/.test(location.hash)) await turnTo("review", openHash);
  else await turnTo("report");
  if (name === null && onDisk === null) $("who-box").showModal();
}

function choices(id, values) {
  const all = [...new Set(values)].sort();
  $(id).append(element("option", { value: "" }, "all"), ...all.map((name) => element("option", { value: name }, name)));
  $(id).closest("label").hidden = all.length < 2;
}

function openHash() {
  const asked = Number(location.hash.slice(1)) - 1;
  const first = queue.find((n) => !reviewed(n)) ?? queue[0] ?? 0;
  return show(Number.isInteger(asked) && page.samples[asked] ? asked : first);
}

// One page, two views of it: the report, or its samples one by one. What is filtered is filtered in both.
async function turnTo(view, then = () => undefined) {
  const review = view === "review";
  if (document.body.dataset.view === view) return then();
  if (review) $("report").dataset.scroll = scrollY;
  $("report").hidden = review;
  $("review").hidden = !review;
  document.body.dataset.view = view;
  $("switch").textContent = review ? "Back to the report" : "Review the regions";
  $(review ? "queue-filters" : "grid-filters").append(document.querySelector(".filters"));
  $("skip-label").hidden = !review;
  if (review) {
    scrollTo(0, 0);
  } else {
    history.replaceState(null, "", location.pathname + location.search);
    gallery.show(queue);
    scrollTo(0, Number($("report").dataset.scroll ?? 0));
  }
  return then();
}

const remembered = () => {
  try {
    return localStorage.getItem("lvlmva reviewer");
  } catch {
    return null; // a browser that keeps nothing
  }
};

function showJudges() {
  const named = ({ name, stand_in }) =>
    stand_in ? element("strong", { class: "stand-in" }, `the stand-in “${name}”, no model`) : element("span", {}, name);
  const list = (people) => people.flatMap((each, n) => (n ? [", ", named(each)] : [named(each)]));
  if (page.critics.length === 0) $("judged").append("No critic was asked yet.");
  else $("judged").append("Critic: ", ...list(page.critics), " · Judge: ", ...list(page.judges));
}

async function begin(name) {
  take(await source.verdicts(name));
  reviewer = name;
  try {
    if (onDisk === null) sessionStorage.setItem("reviewer", reviewer);
    else localStorage.setItem("lvlmva reviewer", reviewer);
  } catch {
    // asked again next time
  }
  $("who").textContent = `Reviewer: ${reviewer}`;
  for (const id of ["who", "counter", "progress"]) $(id).hidden = false;
  refilter();
}

// Whoever only looks needs no name; whoever judges does.
function withName(then) {
  if (reviewer !== "") return then();
  afterName = then;
  say("who-error", "");
  $("who-box").showModal();
  return undefined;
}

async function reload() {
  take(await source.verdicts(reviewer));
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
  const group = $("group").value;
  queue = page.samples
    .map((_, n) => n)
    .filter((n) => filter(n) && (name === "" || page.samples[n].class === name) && (group === "" || page.samples[n].group === group))
    .filter((n) => (found === null || found.has(n)) && (members === null || members.has(n)))
    .sort((a, b) => ORDERS[$("order").value](page.samples[a], page.samples[b]) || a - b);
  showQueue();
  if (!$("report").hidden) gallery.show(queue);
}

// Only the samples of a pattern, or all again.
function only(places, words) {
  members = places;
  $("of-pattern").hidden = places === null;
  $("of-pattern").firstElementChild.textContent = words ?? "";
  refilter();
}

function showQueue() {
  const items = queue.map((n) => {
    const sample = page.samples[n];
    const done = keptAll(n);
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
  const done = page.samples.filter((_, n) => keptAll(n)).length;
  if (onDisk !== null) showDownloads();
  $("counter").textContent = `${done} of ${page.samples.length} reviewed`;
  $("progress").max = page.samples.length;
  $("progress").value = done;
}

function showDownloads() {
  const said = reviewer === "" ? 0 : onDisk.count(reviewer);
  $("download").hidden = said === 0;
  $("download").textContent = `Download my ${mine.size} verdicts (CSV)`;
  $("download-names").hidden = onDisk.named() === 0;
  say("kept", onDisk.keeps() ? "" : "This browser keeps nothing of a page from the disk: download your verdicts before you close it.");
}

function mark(n) {
  const sign = $("list").querySelector(`[data-place="${n}"] button`);
  if (sign === null) return;
  const done = keptAll(n);
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
  $("facts").textContent = factsOf(sample);
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
    const [map, said] = await Promise.all([labels.get(n) ?? source.labels(n), source.critique(n)]);
    labels.set(n, map);
    if (place !== n) return; // somebody was faster
    $("critique").textContent = said;
    drawPictures(n, map);
    draw();
  } catch (error) {
    if ($("error").hidden) fail(error); // what was not saved is worse than what is not shown
  }
}

function factsOf({ entropy, group, masked_share: now, masked_by_critic: before, left_out: why, differs }) {
  const facts = [`entropy ${entropy.toPrecision(2)} nats`];
  if (group !== null) facts.push(`group ${group}`);
  if (why) facts.push(`left out of the alignment: ${why}`);
  if (now !== null) facts.push(`${percent(now)} of the positive attribution masked`);
  if (now !== null && before !== null && percent(now) !== percent(before)) facts.push(`${percent(before)} by the critic alone`);
  if (differs) facts.push("verdicts differ from the true mask");
  return facts.join(" · ");
}

function drawPictures(n, map) {
  const { height, width } = page;
  const { regions, after } = page.samples[n];
  const shapes = shapesOf(map, height, width, regions);
  const of = ({ kind, caption, paint }) =>
    figure({ url: kind && source.picture(n, kind), caption, paint, labels: map, shapes, regions, height, width, choose });
  const top = PICTURES.map(of);
  const more = MORE.filter(({ kind }) => kind !== "after" || after).map(of);
  figures = [...top, ...more];
  $("pictures").replaceChildren(...top.map(({ node }) => node));
  $("more").replaceChildren(...more.map(({ node }) => node));
  if (!after) $("more").append(element("p", { class: "soft" }, "This sample was not explained after alignment (explain.gallery_samples)."));
}

function draw() {
  const sample = page.samples[place];
  const focused = $("regions").contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  if (figures.length === 0) {
    const waiting = ({ caption }) => element("figure", {}, element("div", { class: "waiting" }), element("figcaption", {}, caption));
    $("pictures").replaceChildren(...PICTURES.map(waiting));
    $("more").replaceChildren();
  }
  const masked = new Set(rejectedOf(place));
  for (const { update } of figures) {
    update(chosen, (region) => MARKS[verdictOf(place, region)?.verdict] ?? "", (region) => masked.has(region));
  }
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

function row({ region, colour, rgb, share, reliance, verdict, asked, certainty, given }) {
  const said = verdictOf(place, region);
  const swatch = element("span", { class: "swatch", "aria-hidden": true }, `${region + 1}`);
  swatch.style.backgroundColor = `rgb(${rgb.join(",")})`;
  swatch.style.color = rgb[0] * 0.299 + rgb[1] * 0.587 + rgb[2] * 0.114 > 140 ? "#000" : "#fff";
  const bar = element("span", { class: "share", "aria-hidden": true }, element("span"));
  bar.firstChild.style.width = `${100 * share}%`;
  const facts = [`π ${percent(share)} of the positive attribution`];
  if (reliance !== null) facts.push(`reliance ${reliance.toFixed(2)}`);
  const critic = [saidByCritic({ verdict, asked, certainty })];
  if (given !== null) critic.push(`; ${given.by.join(", ")}: ${given.verdict}`);
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
  const state = said === undefined ? "" : said.saved ? `${source.kept}${said.note ? `: ${said.note}` : ""}` : "saving …";
  return element(
    "li",
    { class: region === chosen ? "region chosen" : "region", "data-region": region, onclick: () => choose(region) },
    choice,
    element("span", { class: "facts" }, bar, element("span", { class: "soft" }, facts.join(", "))),
    element("span", { class: `critic ${verdict ?? "none"}` }, ...critic),
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
  return withName(() => giveOf(place, region, verdict, advance));
}

function giveOf(sample, region, verdict, advance) {
  const body = { reviewer, place: sample, region, verdict, note: $("note").value };
  $("note").value = "";
  const before = verdictOf(sample, region);
  const sent = { verdict, note: body.note, saved: false };
  mine.set(key(sample, region), sent);
  writing = writing.then(async () => {
    try {
      const event = await source.give(body);
      // a later verdict on the same region may be under way
      if (mine.get(key(sample, region)) === sent) mine.set(key(sample, region), { ...event, saved: true });
      say("error", "");
      $("status").textContent = `${WORDS[verdict]} for region ${region + 1} is ${source.kept}`;
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
    if (place === sample) draw();
  });
  if (advance) onward(sample, region);
  return writing;
}

// One verdict on all regions of a pattern that were not judged yet.
function giveAll(regions, verdict, name) {
  return withName(async () => {
    const open = regions.filter(([sample, region]) => !verdictOf(sample, region));
    for (const [sample, region] of open) giveOf(sample, region, verdict, false);
    await writing;
    gallery.refresh();
    const rest = regions.length - open.length;
    $("status").textContent = `${WORDS[verdict]} for ${open.length} regions of “${name}”${rest ? `; ${rest} had a verdict of yours` : ""}`;
    say("done", $("status").textContent);
  });
}

function rename(pattern, name) {
  return withName(async () => {
    try {
      const { name: kept } = await source.rename(reviewer, pattern, name);
      say("error", "");
      count();
      $("status").textContent = `the pattern is called “${kept}”`;
      return kept;
    } catch (error) {
      fail(error);
      return null;
    }
  });
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
      const undone = await source.undo(reviewer, last.order);
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
  withName(() => {
    for (const { region, verdict } of openRegions(place)) if (verdict !== null) giveOf(place, region, verdict, false);
    if (reviewed(place)) move(1);
    else draw();
  });
}

function fail(error) {
  say("error", error.message);
}

function bind() {
  const showFirst = () => $("review").hidden || show(queue.includes(place) ? place : (queue[0] ?? place));
  for (const id of ["show", "class", "group", "order"]) $(id).addEventListener("change", () => (refilter(), showFirst()));
  $("no-pattern").addEventListener("click", () => (only(null), showFirst()));
  $("reset").addEventListener("click", () => {
    for (const id of ["show", "class", "group"]) $(id).selectedIndex = 0;
    $("words").value = "";
    found = null;
    only(null);
  });
  $("switch").addEventListener("click", toggleView);
  $("download").addEventListener("click", () => onDisk.download(reviewer));
  $("download-names").addEventListener("click", () => withName(() => onDisk.downloadNames(reviewer)));
  $("who-not").addEventListener("click", () => ((afterName = null), $("who-box").close()));
  let timer;
  $("words").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      const words = $("words").value;
      found = words.trim() === "" ? null : new Set(await source.withWords(words).catch((error) => (fail(error), [])));
      refilter();
      if (queue.length && !queue.includes(place)) showFirst();
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
      await begin($("who-name").value.trim().normalize("NFC"));
      $("who-box").close();
      const then = afterName;
      afterName = null;
      if (then !== null) await then();
      else if (!$("review").hidden) await openHash();
    } catch (error) {
      say("who-error", error.message);
    }
  };
  $("who-start").addEventListener("click", enter);
  $("who-name").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // else the same key presses the button that the focus returns to
    enter();
  });
  $("who-box").addEventListener("cancel", () => (afterName = null));
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
};
const EVERYWHERE = {
  "?": () => $("help-box").showModal(),
  r: toggleView,
};

function toggleView() {
  if (!$("review").hidden) return turnTo("report");
  return turnTo("review", openHash);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !$("keys").checked || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input:not([type=checkbox]), select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const name = event.key.toLowerCase();
  if (EVERYWHERE[name]) {
    event.preventDefault();
    EVERYWHERE[name]();
  } else if ($("review").hidden) {
    return; // the other keys are for the sample that is shown
  } else if (event.key === "Escape") {
    turnTo("report");
  } else if ("123456789".includes(event.key)) {
    const region = Number(event.key) - 1;
    if (page.samples[place].regions.some((each) => each.region === region)) choose(region);
  } else if (KEYS[name]) {
    event.preventDefault();
    KEYS[name]();
  }
}

start().catch(fail);
