// Small helpers for the document.

export const $ = (id) => document.getElementById(id);

const ICONS = { // lines of 24 x 24
  again: "M4 12a8 8 0 1 0 2.5-5.8M4 4v4.5h4.5", attach: "M20 11l-8.5 8.5a5 5 0 0 1-7-7L13 4a3.4 3.4 0 0 1 5 5l-8.5 8.5",
  close: "M6 6l12 12M18 6L6 18", copy: "M9 9h11v11H9zM5 15H4V4h11v1", delete: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
  download: "M12 4v11M7 11l5 5 5-5M4 20h16", left: "M14 6l-6 6 6 6",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3", menu: "M4 7h16M4 12h16M4 17h16", new: "M12 5v14M5 12h14",
  right: "M10 6l6 6-6 6", send: "M12 19V5M6 11l6-6 6 6", settings: "M4 7h9M19 7h1M4 17h3M13 17h7M13 4.5v5h5v-5zM7 14.5v5h5v-5z",
  stop: "M7 7h10v10H7z", theme: "M12 3a9 9 0 1 0 9 9 7 7 0 0 1-9-9z",
};

/** Make an element: h("p.note.small", { title }, child, ...). null and undefined are no children. */
export function h(tag, props = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = Object.assign(document.createElement(name), { className: classes.join(" ") }, props);
  element.append(...children.filter((child) => child != null));
  return element;
}

export function icon(name) {
  const [svg, path] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  svg.setAttribute("viewBox", "0 0 24 24");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** Make a button that shows an icon; its label is read aloud, and seen under the mouse. */
export function button(label, name, onclick) {
  return h("button.icon", { type: "button", title: label, ariaLabel: label, onclick }, icon(name));
}

/** Return a function that calls `draw` soon, but rests at least `wait` ms, and longer where drawing is slow. */
export function throttled(draw, wait) {
  let timer = 0, rest = wait;
  return () => (timer ||= setTimeout(() => {
    const start = performance.now();
    timer = 0;
    draw();
    rest = Math.max(wait, 4 * (performance.now() - start));
  }, rest));
}

let fading = 0;

/** Say a sentence at the edge of the page for some seconds. */
export function notify(text) {
  $("toast").textContent = text;
  clearTimeout(fading);
  fading = setTimeout(() => ($("toast").textContent = ""), 8000);
}

/** Copy a text; also where the page came by plain HTTP, which has no navigator.clipboard. */
export async function copy(text) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    const area = h("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  notify("Copied.");
}

/** Let the browser save a text as a file. */
export function download(name, text) {
  const link = h("a", { download: name, href: URL.createObjectURL(new Blob([text], { type: "application/json" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Let the user choose files, and give them to `take`. */
export function choose(props, take) {
  const input = h("input", { type: "file", ...props, onchange: () => take([...input.files]) });
  input.click();
}
