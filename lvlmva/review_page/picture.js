// A picture with its regions' outlines, numbers and verdicts; a region is chosen by a click.

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

export function figure({ url, caption, labels, height, width, regions, chosen, mark, choose }) {
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": caption });
  drawn.append(svg("image", { href: url, width, height, preserveAspectRatio: "none", class: "pixels" }));
  const radius = Math.max(width, height) / 26;
  const middle = centres(labels, height, width);
  const ordered = [...regions].sort((a, b) => (a.region === chosen) - (b.region === chosen)); // the chosen one on top
  for (const { region } of ordered) {
    const path = outline(labels, height, width, region);
    const state = region === chosen ? "chosen" : "";
    drawn.append(svg("path", { d: path, class: `edge under ${state}` }), svg("path", { d: path, class: `edge over ${state}` }));
  }
  for (const { region } of regions) {
    const place = middle.get(region);
    if (place === undefined) continue;
    const label = svg("g", { class: region === chosen ? "number chosen" : "number" });
    const [x, y] = [Math.min(Math.max(place.x, radius), width - radius), Math.min(Math.max(place.y, radius), height - radius)];
    const half = mark(region) === "" ? radius : radius * 1.5; // wider with a verdict's mark
    label.append(
      svg("rect", { x: x - half, y: y - radius, width: 2 * half, height: 2 * radius, rx: radius }),
      svg("text", { x, y: y + radius * 0.42, "font-size": radius * 1.25 }, `${region + 1}${mark(region)}`),
    );
    drawn.append(label);
  }
  drawn.addEventListener("click", (event) => {
    const box = drawn.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * width);
    const row = Math.floor(((event.clientY - box.top) / box.height) * height);
    const region = labels[Math.min(row, height - 1) * width + Math.min(column, width - 1)];
    if (region !== NO_REGION) choose(region);
  });
  return element("figure", {}, drawn, element("figcaption", {}, caption));
}
