// Elements are built from text nodes, so that nothing a model or a person wrote is ever read as HTML.

export const $ = (id) => document.getElementById(id);

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function say(id, text) {
  const place = $(id);
  place.textContent = text;
  place.hidden = text === "";
}

export async function ask(url, body) {
  const options =
    body === undefined ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(url, options);
  } catch {
    throw new Error("the server does not answer; start its command anew and open the address that it prints");
  }
  if (answer.headers.get("Content-Type") === "application/octet-stream") return new Uint8Array(await answer.arrayBuffer());
  const text = await answer.text();
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Error(text.slice(0, 300));
  }
  if (!answer.ok) throw new Error(content.error);
  return content;
}
