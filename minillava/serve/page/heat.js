// Maps of attention: from what the server sends to colours over the picture, and to words.
import {SCALE} from "/page/scale.js";

// A number from 0 to 1 as a colour of the scale.
export function colour(v) {
  const at = Math.min(Math.max(v, 0), 1) * (SCALE.length - 1), i = Math.min(Math.floor(at), SCALE.length - 2);
  return SCALE[i].map((c, k) => Math.round(c + (SCALE[i + 1][k] - c) * (at - i)));
}

export const gradient = `linear-gradient(to right, ${SCALE.map(c => `rgb(${c})`).join(", ")})`;

export const percent = v => v > 0 && v < 0.0001 ? "< 0.01 %" : (100 * v).toFixed(v < 0.01 ? 2 : 1) + " %";

// An entry of `look`: 255 stands for its largest number.
export function decode(entry) {
  const bytes = Uint8Array.from(atob(entry.map), c => c.charCodeAt(0));
  return {values: Float32Array.from(bytes, b => b / 255 * entry.peak), share: entry.share, count: entry.ids.length};
}

// The map of a word: the mean over its tokens that have a letter or digit, else over all of them;
// null if there is none.
export function mean(tokens) {
  const seen = tokens.filter(token => token.map), spoken = seen.filter(token => /[\p{L}\p{N}]/u.test(token.piece));
  const used = spoken.length ? spoken : seen;
  if (!used.length) return null;
  const count = used.reduce((sum, token) => sum + token.map.count, 0);
  const values = new Float32Array(used[0].map.values.length);
  let share = 0;
  for (const {map} of used) {
    share += map.share * map.count / count;
    map.values.forEach((v, i) => { values[i] += v * map.count / count; });
  }
  return {values, share, peak: Math.max(...values)};
}

// One pixel a patch; the browser scales it up smoothly.
export function paint(canvas, map, side) {
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d"), image = context.createImageData(side, side);
  map.values.forEach((v, i) => image.data.set([...colour(v / Math.max(map.peak, 1e-12)), 255], 4 * i));
  context.putImageData(image, 0, 0);
}

// Where the hottest patch is, in words. box: the square that the model saw, in pixels of the picture.
export function place(map, {size: [width, height], box: [left, top, right, bottom], side}) {
  const at = map.values.indexOf(map.peak), row = Math.floor(at / side), column = at % side;
  const x = (left + (column + 0.5) / side * (right - left)) / width;
  const y = (top + (row + 0.5) / side * (bottom - top)) / height;
  if (x < 0 || x > 1 || y < 0 || y > 1) return "in the padding beside the picture";
  const third = (v, names) => names[Math.min(Math.floor(3 * v), 2)];
  const found = [third(y, ["top", "", "bottom"]), third(x, ["left", "", "right"])].filter(Boolean).join(" ");
  return found ? `at the ${found}` : "in the middle";
}
