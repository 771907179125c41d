// Pictures with their regions' outlines, numbers and verdicts; a region is chosen by a click.

import { element, svg } from "./dom.js";

const NO_REGION = 255;

// The outline of a region as a path along the edges of its pixels.
export function outline(labels, height, width, region) {
  const inside = (row, column) =>
    row >= 0 && column >= 0 && row < height && column < width && labels[row * width + column] === region;
  const parts = [];
  for (let row = 0; row <= height; row++) {
    for (let column = 0; column < width; column++) {
      const start = column;
      while (column < width && inside(row - 1, column) !== inside(row, column)) column++;
      if (column > start) parts.push(`M${start} ${row}H${column}`);
    }
  }
  for (let column = 0; column <= width; column++) {
    for (let row = 0; row < height; row++) {
      const start = row;
      while (row < height && inside(row, column - 1) !== inside(row, column)) row++;
      if (row > start) parts.push(`M${column} ${start}V${row}`);
    }
  }
  return parts.join("");
}

// For each region, the pixel deepest inside it: where its number is read best.
export function centres(labels, height, width) {
  const depth = new Uint16Array(height * width);
  const at = (row, column, region) =>
    row < 0 || column < 0 || row >= height || column >= width || labels[row * width + column] !== region
      ? 0
      : depth[row * width + column];
  const found = new Map();
  for (let n = 0; n < depth.length; n++) {
    const [row, column, region] = [Math.floor(n / width), n % width, labels[n]];
    depth[n] = 1 + Math.min(at(row - 1, column, region), at(row, column - 1, region));
  }
  for (let n = depth.length - 1; n >= 0; n--) {
    const [row, column, region] = [Math.floor(n / width), n % width, labels[n]];
    depth[n] = Math.min(depth[n], 1 + Math.min(at(row + 1, column, region), at(row, column + 1, region)));
    if (region !== NO_REGION && depth[n] > (found.get(region)?.depth ?? 0)) {
      found.set(region, { depth: depth[n], x: column + 0.5, y: row + 0.5 });
    }
  }
  return found;
}

// A region's pixels as a path to be filled: a box for each run of a row.
export function area(labels, height, width, region) {
  const parts = [];
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const start = column;
      while (column < width && labels[row * width + column] === region) column++;
      if (column > start) parts.push(`M${start} ${row}h${column - start}v1H${start}z`);
    }
  }
  return parts.join("");
}

// What is drawn of a label map, found once: region -> {path, pixels, place of its number}.
export function shapesOf(labels, height, width, regions) {
  const middle = centres(labels, height, width);
  return new Map(
    regions.map(({ region }) => [
      region,
      { path: outline(labels, height, width, region), pixels: area(labels, height, width, region), middle: middle.get(region) },
    ]),
  );
}

// Stripes over what is masked, told from the picture below on dark and on light.
export function hatch(id, size, strength = 1) {
  const step = size / 16;
  return svg(
    "pattern",
    { id, width: step, height: step, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("rect", { width: step, height: step, fill: "#000", "fill-opacity": 0.35 * strength }),
    svg("rect", { width: step / 3, height: step, fill: "#fff", "fill-opacity": 0.6 * strength }),
  );
}

let hatches = 0;

// A small picture for the gallery: `rejected` regions hatched, with dashed outlines.
export function thumbnail({ url, label, shapes, rejected, height, width }) {
  const id = `hatch-${hatches++}`;
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  drawn.append(svg("image", { href: url, width, height, preserveAspectRatio: "none", class: "pixels" }));
  if (rejected.length > 0) drawn.append(svg("defs", {}, hatch(id, Math.max(width, height), 0.5)));
  for (const region of rejected) {
    const { path, pixels } = shapes.get(region);
    drawn.append(
      svg("path", { d: pixels, fill: `url(#${id})` }),
      svg("path", { d: path, class: "edge under" }),
      svg("path", { d: path, class: "edge over rejected" }),
    );
  }
  return drawn;
}

// A figure whose outlines are drawn anew by `update`; the picture below them is fetched once. paint: what else is drawn:
// "none", the regions' colours alone ("regions") or over the grey picture ("overlay"), or what is masked ("mask").
export function figure({ url, caption, labels, shapes, regions, height, width, choose, paint = "none" }) {
  const lines = svg("g");
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption });
  const id = `hatch-${hatches++}`;
  if (url !== null) {
    const kind = paint === "overlay" ? "pixels grey" : "pixels";
    drawn.append(svg("image", { href: url, width, height, preserveAspectRatio: "none", class: kind }));
  }
  if (paint === "mask") drawn.append(svg("defs", {}, hatch(id, Math.max(width, height))));
  if (paint === "regions" || paint === "overlay") {
    for (const { region, rgb } of regions) {
      const opacity = paint === "overlay" ? 0.4 : 1;
      drawn.append(svg("path", { d: shapes.get(region).pixels, fill: `rgb(${rgb.join(",")})`, "fill-opacity": opacity }));
    }
  }
  drawn.append(lines);
  const radius = Math.max(width, height) / 26;
  const within = (at, half, size) => Math.min(Math.max(at, half), size - half);

  function update(chosen, mark, masked) {
    const ordered = [...shapes].sort(([a], [b]) => (a === chosen) - (b === chosen)); // the chosen one on top
    const filled = paint === "mask" ? ordered.filter(([region]) => masked(region)) : [];
    const areas = filled.map(([, { pixels }]) => svg("path", { d: pixels, fill: `url(#${id})` }));
    const edges = ordered.flatMap(([region, { path }]) =>
      ["under", "over"].map((which) =>
        svg("path", { d: path, class: `edge ${which} ${region === chosen ? "chosen" : ""} ${masked(region) ? "rejected" : ""}` }),
      ),
    );
    const numbers = ordered.map(([region, { middle }]) => {
      const half = mark(region) === "" ? radius : radius * 1.5; // wider with a verdict's mark
      const [x, y] = [within(middle.x, half, width), within(middle.y, radius, height)];
      return svg(
        "g",
        { class: region === chosen ? "number chosen" : "number" },
        svg("rect", { x: x - half, y: y - radius, width: 2 * half, height: 2 * radius, rx: radius }),
        svg("text", { x, y: y + radius * 0.42, "font-size": radius * 1.25 }, `${region + 1}${mark(region)}`),
      );
    });
    lines.replaceChildren(...areas, ...edges, ...numbers);
  }

  drawn.addEventListener("click", (event) => {
    const box = drawn.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * width);
    const row = Math.floor(((event.clientY - box.top) / box.height) * height);
    const region = labels[Math.min(row, height - 1) * width + Math.min(column, width - 1)];
    if (region !== NO_REGION) choose(region);
  });
  return { node: element("figure", {}, drawn, element("figcaption", {}, caption)), update };
}
