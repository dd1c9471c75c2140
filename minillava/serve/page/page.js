// The page: a conversation about a picture, and what the model looked at for each word.
import {Refused, chat, curl, get, setKey} from "/page/api.js";
import {colour, decode, gradient, mean, paint, percent, place} from "/page/heat.js";
import * as store from "/page/store.js";

const LARGEST = 2048; // pixels a side of what is sent; the model sees a few hundred of them
const LIKELIEST = 8;
const by = id => document.getElementById(id);
const wide = matchMedia("(min-width: 900px)"), touch = matchMedia("(pointer: coarse)").matches;

function make(tag, parent, text = "", properties = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  Object.assign(element, properties);
  parent?.append(element);
  return element;
}

const panel = by("panel"); // moves below the answer on narrow screens
let talk; // the conversation that is shown
let views = []; // of its answers, as they are shown
let chosen = null; // {view, word}: the word that was clicked
let shown = null; // {view, word}: the word whose map is over the picture
let running = new Map(); // answers that are being made -> AbortController
let arriving = null; // while a picture is being opened: the promise of whether it can be asked about
const urls = new Map(); // of pictures

// ------------------------------------------------------------------------------- a conversation
const newTalk = () => ({id: crypto.randomUUID?.() ?? `t${Date.now()}${Math.random()}`, title: "", time: Date.now(),
  picture: null, nodes: {r: {id: "r", parent: null, pick: null}}, count: 0});

function add(parent, fields) {
  const node = {id: `n${++talk.count}`, parent: parent.id, pick: null, ...fields};
  talk.nodes[node.id] = node;
  parent.pick = node.id;
  return node;
}

const siblings = node => Object.values(talk.nodes).filter(other => other.parent === node.parent && other.id !== "r");

// From the first question to the last answer, by the branches that are chosen.
function path(end) {
  const found = [];
  if (end) {
    for (let node = end; node.id !== "r"; node = talk.nodes[node.parent]) found.unshift(node);
  } else {
    for (let node = talk.nodes.r; node.pick;) found.push(node = talk.nodes[node.pick]);
  }
  return found;
}

function save() {
  try {
    store.save(talk);
  } catch (error) {
    say(`This browser has no room for the conversation (${error.name}): export it, or delete others.`);
  }
  listTalks();
}

async function messages(question) {
  const turns = path(question), {picture} = talk; // of the conversation that is shown now
  const url = picture && await store.picture(picture).then(blob => blob && store.dataUrl(blob));
  if (picture && !url) throw new Refused("This browser has lost the picture. Choose it again.", 0);
  return turns.map((node, i) => {
    if (node.role === "assistant") return {role: "assistant", content: node.answers[0].text};
    const text = {type: "text", text: node.text};
    return {role: "user", content: i === 0 && url ? [{type: "image_url", image_url: {url}}, text] : node.text};
  });
}

// ------------------------------------------------------------------------------------- options
function numbers(text) {
  const found = text.split(/[\s,]+/).filter(Boolean).flatMap(part => {
    const [first, last = first] = part.split("-").map(Number);
    return Array.from({length: Math.min(Math.max(last - first + 1, 1), 999)}, (_, i) => first + i);
  });
  return found.length && found.every(Number.isInteger) ? found : undefined;
}

function options() {
  const number = id => by(id).value === "" ? undefined : Number(by(id).value);
  return {temperature: number("temperature") ?? 0, top_p: number("top_p"), max_tokens: number("max_tokens"),
    seed: number("seed") ?? Math.floor(Math.random() * 2 ** 32)};
}

function look() {
  const layers = numbers(by("layers").value), heads = numbers(by("heads").value);
  return layers || heads ? {layers, heads} : true;
}

const newAnswer = (settings, contrast, prefix = []) => ({settings, contrast, begun: prefix.length, tokens: [...prefix],
  text: prefix.map(token => token.piece).join(""), state: "waiting"});

async function request(node, answer) {
  const prefix = answer.tokens.slice(0, answer.begun).map(token => token.id), {picture} = talk;
  return {
    messages: await messages(talk.nodes[node.parent]), stream: true, stream_options: {include_usage: true},
    ...answer.settings, logprobs: true, top_logprobs: LIKELIEST, token_ids: true,
    ...(picture ? {look: look()} : {}),
    ...(answer.contrast ? {contrast: {method: answer.contrast}} : {}),
    ...(prefix.length ? {prefix_ids: prefix} : {}),
  };
}

// ----------------------------------------------------------------------------- asking the server
async function ask(text) {
  const node = add(path().at(-1) ?? talk.nodes.r, {role: "user", text});
  talk.title ||= text;
  talk.time = Date.now();
  await answer(node, options());
}

// One answer to a question, or two with contrast: side by side, at the same time.
async function answer(question, settings, prefix = [], contrasts = by("contrast").value ? [null, by("contrast").value] : [null]) {
  const node = add(question, {role: "assistant", answers: contrasts.map(each => newAnswer(settings, each, prefix))});
  await runAll(node);
}

async function runAll(node) {
  chosen = null;
  node.answers.forEach(each => { running.set(each, new AbortController()); });
  render();
  toEnd(true);
  save();
  await Promise.all(node.answers.map(each => run(node, each)));
  render();
  markDifferences(node);
  showBest(node);
  save();
}

// The word that points most clearly explains the page best.
function showBest(node) {
  const view = views.find(each => each.node === node), peak = word => mean(word.tokens)?.peak ?? -1;
  if (shown || !view?.words.length) return;
  show({view, word: view.words.reduce((best, word) => peak(word) > peak(best) ? word : best)});
}

async function run(node, answer) {
  const view = () => views.find(each => each.answer === answer);
  const owner = talk;
  let said = answer.text.length;
  const decoder = new TextDecoder();
  try {
    const body = await request(node, answer);
    for await (const chunk of chat(body, running.get(answer).signal)) {
      take(answer, chunk, decoder);
      view()?.later();
      said = announce(answer.text, said, false);
    }
    answer.state = "done";
  } catch (error) {
    if (error.name !== "AbortError") {
      answer.error = error.message;
      if (error.status === 401) askForKey();
      if (error.seconds) answer.wait = Date.now() + 1000 * error.seconds;
    }
    answer.state = error.name === "AbortError" ? "stopped" : "failed";
  }
  announce(answer.error ?? answer.text, answer.error ? 0 : said, true);
  clip(answer);
  running.delete(answer);
  if (owner === talk) view()?.now();
  buttons();
}

// What a chunk of the stream adds to an answer.
function take(answer, chunk, decoder) {
  if (chunk.minillava?.picture) answer.head = chunk.minillava;
  else if (chunk.minillava) answer.timings = chunk.minillava;
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  answer.state = "running";
  answer.text += choice.delta.content ?? "";
  answer.finish = choice.finish_reason ?? answer.finish;
  for (const entry of choice.logprobs?.content ?? []) {
    const piece = decoder.decode(Uint8Array.from(entry.bytes), {stream: true});
    const top = entry.top_logprobs.map(each => ({id: each.id, text: each.token, p: Math.exp(each.logprob), end: each.end}));
    answer.tokens.push({id: entry.id, piece, p: Math.exp(entry.logprob), top, ms: choice.token_ms, guessed: choice.guessed});
  }
  for (const entry of choice.look ?? []) if (answer.tokens.length) answer.tokens.at(-1).map = decode(entry);
}

// Leave of the tokens what the text has, without what a stop text has cut off.
function clip(answer) {
  let left = answer.text.length;
  for (const token of answer.tokens) {
    token.piece = token.piece.slice(0, left);
    left -= token.piece.length;
  }
}

// Ask for the same answer once more, for its maps alone.
async function mapsAgain(view) {
  const {answer, node} = view, again = newAnswer(answer.settings, answer.contrast, answer.tokens.slice(0, answer.begun));
  const decoder = new TextDecoder();
  by("again-maps").disabled = true;
  say("Computing the maps again …");
  try {
    const body = await request(node, again);
    for await (const chunk of chat(body)) take(again, chunk, decoder);
    answer.head = again.head;
    again.tokens.slice(0, answer.tokens.length).forEach((token, i) => { if (token.map) answer.tokens[i].map = token.map; });
  } catch (error) {
    say(error.message);
    return;
  } finally {
    by("again-maps").disabled = false;
  }
  const same = answer.tokens.every((token, i) => again.tokens[i]?.id === token.id);
  if (!views.includes(view)) return; // another conversation is shown now
  show(shown ?? {view, word: view.words[0]});
  if (!same) say("The server said something else this time, so the maps are not of these words.");
}

async function askForKey() {
  by("ask-key").showModal();
}

// --------------------------------------------------------------------------- showing an answer
// An answer's words; each knows its tokens.
class View {
  constructor(node, answer, parent) {
    Object.assign(this, {node, answer, words: [], done: 0, before: "", planned: false});
    this.element = make("div", parent, "", {className: "answer"});
    if (node.answers.length > 1 || answer.contrast) {
      const name = answer.contrast ? `with contrast (${answer.contrast})` : "without contrast";
      make("h3", this.element, name);
    }
    this.text = make("p", this.element, "", {className: "words"});
    this.note = make("p", this.element, "", {className: "faint note"});
    this.now();
  }

  later() { // at most once a frame
    if (this.planned) return;
    this.planned = true;
    requestAnimationFrame(() => { this.planned = false; this.now(); });
  }

  now() {
    const {tokens} = this.answer, atEnd = isAtEnd();
    for (; this.done < tokens.length; this.done++) this.add(tokens[this.done]);
    this.tell();
    this.text.setAttribute("aria-busy", String(running.has(this.answer)));
    if (this.words.length && !this.words.some(word => word.element.tabIndex === 0)) this.words[0].element.tabIndex = 0;
    if (atEnd) toEnd();
  }

  add(token) {
    const {piece} = token, last = this.words.at(-1);
    if (!piece) { (this.waiting ??= []).push(token); return; }
    const tokens = [...(this.waiting ?? []), token];
    this.waiting = undefined;
    const begins = !this.before || /^\s/.test(piece) || /\s$/.test(this.before) || /^[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]/.test(piece);
    this.before = piece;
    if (begins && /^\s/.test(piece)) this.text.append(/^\s*/.exec(piece)[0]);
    const text = begins ? piece.trimStart() : piece;
    if (!text) return;
    if (begins || !last) this.begin(tokens, text);
    else {
      last.tokens.push(...tokens);
      last.text += text;
      last.element.textContent = last.text;
    }
    this.mark(this.words.at(-1));
  }

  begin(tokens, text) {
    const element = make("span", this.text, text, {className: "word", tabIndex: -1, role: "button"});
    const word = {element, tokens, text};
    this.words.push(word);
    element.addEventListener("pointerenter", event => { if (event.pointerType === "mouse") show({view: this, word}); });
    element.addEventListener("focus", () => { this.rove(word); show({view: this, word}); });
    element.addEventListener("click", () => choose({view: this, word}));
    element.addEventListener("keydown", event => this.key(event, word));
  }

  // The thin line under a word: how unsure the model was. The one above it: the word had been guessed.
  mark({element, tokens}) {
    const least = Math.min(...tokens.map(token => token.p));
    element.classList.toggle("unsure", least < 0.9);
    element.classList.toggle("unsure", least < 0.5);
    element.classList.toggle("guessed", tokens.every(token => token.guessed));
  }

  rove(word) {
    this.words.forEach(other => { other.element.tabIndex = other === word ? 0 : -1; });
  }

  key(event, word) {
    const at = this.words.indexOf(word), to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: this.words.length - 1}[event.key];
    if (to !== undefined) this.words[to]?.element.focus();
    else if (event.key === "Enter" || event.key === " ") { choose({view: this, word}); panel.querySelector("button:enabled")?.focus(); }
    else return;
    event.preventDefault();
  }

  tell() {
    const {answer} = this, {timings, usage} = answer;
    const notes = {waiting: "Waiting for the model to read …", stopped: "Stopped.", failed: answer.error};
    let text = notes[answer.state] ?? "";
    if (timings) {
      const s = ms => `${(ms / 1000).toFixed(ms < 10000 ? 2 : 0)} s`;
      const read = usage ? `${timings.prefill_tokens} of ${usage.prompt_tokens} positions` : `${timings.prefill_tokens} positions`;
      const speed = timings.tokens_per_second ? `, ${timings.tokens_per_second} tokens/s` : "";
      text = `waited ${s(timings.queue_ms)}${timings.picture_ms ? ` · saw the picture in ${s(timings.picture_ms)}` : ""} · read ${read} in ${s(timings.prefill_ms)} · wrote ${usage?.completion_tokens ?? ""} tokens in ${s(timings.decode_ms)}${speed}`;
      text += guesses(timings, usage);
      if (answer.finish === "length") text += " · cut at the longest answer";
      if (answer.settings.temperature) text += ` · temperature ${answer.settings.temperature}, seed ${answer.settings.seed}`;
    }
    this.note.textContent = text;
    this.note.classList.toggle("error", answer.state === "failed");
    this.note.hidden = !text;
  }
}

// What drafts were good for; a server without them says nothing of passes.
function guesses({passes, drafted, accepted}, usage) {
  if (passes === undefined || !usage) return "";
  if (!drafted) return " · nothing was guessed";
  return ` · ${accepted} of ${drafted} guesses right (dotted above), ${((usage.completion_tokens - 1) / passes).toFixed(1)} tokens a pass`;
}

// Words that the two answers of one question do not share, by position from the first difference.
function markDifferences(node) {
  const both = views.filter(view => view.node === node);
  if (both.length !== 2) return;
  const [one, two] = both.map(view => view.words), kept = common(one.map(w => w.text), two.map(w => w.text));
  [one, two].forEach((words, side) => words.forEach((word, i) => word.element.classList.toggle("differs", !kept[side].has(i))));
}

// The longest common subsequence of two lists, as the sets of its indices in each.
function common(a, b) {
  const best = Array.from({length: a.length + 1}, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
  const found = [new Set(), new Set()];
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { found[0].add(i++); found[1].add(j++); }
    else if (best[i + 1][j] >= best[i][j + 1]) i++;
    else j++;
  }
  return found;
}

// ------------------------------------------------------------------------ the map over the picture
function show(what) {
  if (shown) shown.word?.element.classList.remove("here");
  shown = what?.word ? what : null;
  shade(null);
  by("picture").classList.toggle("warm", false);
  by("heat").hidden = by("key").hidden = by("again-maps").hidden = true;
  if (!shown) { say(""); return; }
  const {view: {answer}, word} = shown, map = mean(word.tokens);
  word.element.classList.add("here");
  const ms = word.tokens.reduce((sum, token) => sum + token.ms, 0);
  const p = word.tokens.reduce((product, token) => product * token.p, 1);
  const right = word.tokens.filter(token => token.guessed).length;
  const guessed = !right ? "" : right === word.tokens.length ? ", guessed" : `, ${right} of its ${word.tokens.length} tokens guessed`;
  const time = `${guessed}, took ${ms < 9.95 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
  let text = `“${word.text}”: probability ${percent(p)}${time}.`;
  if (map && answer.head) {
    const {picture} = answer.head;
    lay(picture);
    paint(by("heat"), map, picture.side);
    by("picture").classList.add("warm");
    by("heat").hidden = by("key").hidden = false;
    by("most").textContent = `hottest patch: ${percent(map.peak)}`;
    text = `“${word.text}”: ${percent(map.share)} of its attention on the picture, most ${place(map, picture)}; probability ${percent(p)}${time}.`;
  } else if (talk.picture && !running.has(answer) && answer.tokens.slice(answer.begun).some(token => !token.map)) {
    by("again-maps").hidden = false;
    text += " Maps are not kept.";
  }
  say(text);
}

// Lay the square that the model saw over the picture.
function lay({size: [width, height], box: [left, top, right, bottom]}) {
  Object.assign(by("over").style, {left: `${100 * left / width}%`, top: `${100 * top / height}%`,
    width: `${100 * (right - left) / width}%`, height: `${100 * (bottom - top) / height}%`});
}

const say = text => { by("said").textContent = text; };

// The other way round: the words of the answer by how much they looked at one patch.
function shade(patch) {
  const view = shown?.view ?? views.at(-1);
  by("patch").hidden = patch === null;
  views.forEach(each => each.words.forEach(({element}) => { element.style.backgroundColor = element.style.color = ""; }));
  if (patch === null || !view?.answer.head) { by("patch").hidden = true; return; }
  const {side} = view.answer.head.picture, row = Math.floor(patch / side), column = patch % side;
  const used = view.words.map(word => mean(word.tokens)?.values[patch] ?? 0), most = Math.max(...used, 1e-12);
  lay(view.answer.head.picture);
  Object.assign(by("patch").style, {left: `${100 * column / side}%`, top: `${100 * row / side}%`, width: `${100 / side}%`, height: `${100 / side}%`});
  view.words.forEach(({element}, i) => {
    Object.assign(element.style, {backgroundColor: `rgb(${colour(used[i] / most)})`, color: used[i] / most > 0.55 ? "#fff" : "#19191e"});
  });
  const best = [...used.keys()].sort((a, b) => used[b] - used[a]).slice(0, 3).map(i => `“${view.words[i].text}” ${percent(used[i])}`);
  say(`Patch in row ${row}, column ${column}, counted from the top left; used most by ${best.join(", ")}.`);
}

let patchAt = 0;
function atPointer(event) {
  const head = (shown?.view ?? views.at(-1))?.answer.head;
  if (!head) return;
  lay(head.picture);
  const box = by("over").getBoundingClientRect(), {side} = head.picture;
  const column = Math.floor((event.clientX - box.left) / box.width * side), row = Math.floor((event.clientY - box.top) / box.height * side);
  if (row < 0 || column < 0 || row >= side || column >= side) return;
  patchAt = row * side + column;
  shade(patchAt);
}

function patchKey(event) {
  const side = (shown?.view ?? views.at(-1))?.answer.head?.picture.side;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -side, ArrowDown: side}[event.key], to = patchAt + step;
  if (!side || step === undefined) return;
  event.preventDefault();
  if (to < 0 || to >= side * side || (Math.abs(step) === 1 && Math.floor(to / side) !== Math.floor(patchAt / side))) return;
  shade(patchAt = to);
}

// --------------------------------------------------------------------------- what else it could say
function choose(what) {
  chosen?.word?.element.classList.remove("chosen");
  chosen = what;
  panel.hidden = !what;
  panel.replaceChildren();
  show(what);
  if (!what) return;
  const {view, word} = what;
  word.element.classList.add("chosen");
  view.rove(word);
  (wide.matches ? by("side") : view.element).append(panel);
  make("h2", panel, `Instead of “${word.text}”`, {id: "panel-word"});
  word.tokens.forEach((token, i) => alternatives(panel, view, token, word.tokens.length > 1 && `Token ${i + 1} of ${word.tokens.length}`));
  make("p", panel, "What the model could have said there, by its probabilities. Choose one to go on from it.", {className: "faint"});
}

const visible = text => text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5");

function alternatives(panel, view, token, title) {
  if (title) make("h3", panel, title);
  const list = make("ol", panel), at = view.answer.tokens.indexOf(token);
  const all = token.top.some(each => each.id === token.id) ? token.top : [{id: token.id, text: token.piece, p: token.p}, ...token.top];
  for (const each of all) {
    const item = make("li", list), isEnd = Boolean(each.end), isOwn = each.id === token.id;
    const button = make("button", item, "", {type: "button", disabled: isOwn || isEnd || running.size > 0});
    const name = make("span", button, "", {className: "token"}), starts = each.text.startsWith(" ");
    if (starts) make("span", name, "\u2423", {className: "space"}).setAttribute("aria-hidden", "true");
    name.append(isEnd ? "(the end)" : visible(starts ? each.text.slice(1) : each.text));
    const bar = make("span", button, "", {className: "bar"});
    bar.setAttribute("aria-hidden", "true");
    make("i", bar).style.width = `${100 * each.p}%`;
    make("span", button, isOwn ? `${percent(each.p)} chosen` : percent(each.p), {className: "chance"});
    button.classList.toggle("own", isOwn);
    button.addEventListener("click", () => goOn(view, at, each));
  }
}

// The same question, and an answer that begins as this one up to a token, and then with another.
async function goOn(view, at, other) {
  const {answer: old, node} = view, before = old.tokens[at];
  const text = /^\s/.test(before.piece) || at ? other.text : other.text.trimStart();
  const token = {...before, id: other.id, piece: text, p: other.p, guessed: false};
  const kept = old.tokens.slice(0, at).map(each => ({...each, guessed: false})); // in this answer they are given
  await answer(talk.nodes[node.parent], old.settings, [...kept, token], [old.contrast]);
}

// ------------------------------------------------------------------------------------ the thread
function render() {
  const thread = by("thread");
  thread.replaceChildren();
  views = [];
  panel.hidden = true;
  by("side").append(panel);
  for (const node of path()) {
    const article = make("article", thread, "", {className: node.role});
    make("h2", article, node.role === "user" ? "You" : "Answer", {className: "hidden"});
    if (node.role === "user") make("p", article, node.text, {className: "question"});
    else {
      const pair = make("div", article, "", {className: node.answers.length > 1 ? "pair" : ""});
      for (const each of node.answers) views.push(new View(node, each, pair));
      if (node.answers.length > 1) markDifferences(node);
    }
    tools(article, node);
  }
  by("hint").hidden = path().length > 0;
  show(null);
  buttons();
  showPicture();
}

function tools(article, node) {
  const row = make("p", article, "", {className: "row tools"});
  const all = siblings(node), at = all.indexOf(node);
  const button = (text, act, label) => {
    const made = make("button", row, text, {type: "button"});
    if (label) made.setAttribute("aria-label", label);
    made.addEventListener("click", act);
    return made;
  };
  const go = to => { talk.nodes[node.parent].pick = all[to].id; render(); save(); };
  if (all.length > 1) {
    button("‹", () => go(at - 1), "The one before").disabled = at === 0;
    make("span", row, `${at + 1} / ${all.length}`);
    button("›", () => go(at + 1), "The next one").disabled = at === all.length - 1;
  }
  if (node.role === "user") { button("Edit", () => edit(article, node)); return; }
  button("Copy", event => copy(node.answers.map(each => each.text).join("\n\n"), event.target));
  const failed = node.answers.find(each => each.state === "failed");
  if (failed) tryAgain(button("Try again", () => repeat(node)), failed);
  else button("Another answer", () => another(node)).title = "with a new seed; at temperature 1 if it was 0";
  button("Copy as curl", async event => copy(curl(await request(node, node.answers[0])), event.target));
}

// The button counts the seconds that the server asks for.
function tryAgain(button, {wait = 0}) {
  const left = Math.ceil((wait - Date.now()) / 1000);
  button.disabled = left > 0;
  button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
  if (left > 0 && button.isConnected !== false) setTimeout(() => tryAgain(button, {wait}), 500);
}

function repeat(node) {
  node.answers = node.answers.map(each => newAnswer(each.settings, each.contrast, each.tokens.slice(0, each.begun)));
  runAll(node);
}

function another(node) {
  const fresh = options(), old = node.answers[0].settings;
  answer(talk.nodes[node.parent], {...fresh, temperature: fresh.temperature || old.temperature || 1}, [],
    node.answers.map(each => each.contrast));
}

function edit(article, node) {
  const form = make("form"), label = make("label", form, "Your question, edited ");
  const box = make("textarea", label, "", {value: node.text, rows: 2}), row = make("p", form, "", {className: "row"});
  make("button", row, "Ask", {type: "submit"});
  make("button", row, "Leave it", {type: "button"}).addEventListener("click", render);
  form.addEventListener("submit", event => {
    event.preventDefault();
    const text = box.value.trim();
    if (!text || running.size) return;
    answer(add(talk.nodes[node.parent], {role: "user", text}), options());
  });
  box.addEventListener("keydown", event => { if (sends(event)) { event.preventDefault(); form.requestSubmit(); } if (event.key === "Escape") render(); });
  article.replaceChildren(form);
  box.focus();
}

async function copy(text, button) {
  const name = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not allowed, or not on https
    const box = make("textarea", document.body, "", {value: text});
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = name; }, 1500);
}

function buttons() {
  by("stop").hidden = !running.size;
  by("send").hidden = running.size > 0;
  document.querySelectorAll(".tools button, #new, #conversations button").forEach(each => { each.inert = running.size > 0; });
}

const isAtEnd = () => { const {scrollHeight, scrollTop, clientHeight} = scroller(); return scrollHeight - scrollTop - clientHeight < 40; };
const scroller = () => wide.matches ? by("thread") : document.scrollingElement;
const toEnd = () => { const e = scroller(); e.scrollTop = e.scrollHeight; };

// A screen reader hears whole sentences, not tokens. Returns how much of the text has been said.
function announce(text, said, all) {
  const rest = text.slice(said), end = all ? rest.length : rest.search(/[.!?](?=\s)/) + 1;
  if (end > 0 && rest.slice(0, end).trim()) make("p", by("live"), rest.slice(0, end));
  while (by("live").children.length > 20) by("live").firstChild.remove();
  return said + end;
}

// ------------------------------------------------------------------------------------ the picture
async function showPicture() {
  const name = talk.picture, blob = name && await store.picture(name);
  if (talk.picture !== name) return;
  by("picture").hidden = !blob;
  by("choose").hidden = Boolean(blob);
  by("other-picture").hidden = !blob;
  if (!blob) { by("image").removeAttribute("src"); return; }
  if (!urls.has(name)) urls.set(name, URL.createObjectURL(blob));
  if (by("image").src !== urls.get(name)) by("image").src = urls.get(name);
  await by("image").decode().catch(() => undefined);
  by("picture").style.setProperty("--shape", by("image").naturalWidth / by("image").naturalHeight || 1);
}

// Large ones are made smaller: the model sees a few hundred pixels a side.
async function smaller(blob) {
  const image = new Image(), url = URL.createObjectURL(blob);
  try {
    image.src = url;
    await image.decode();
    const times = LARGEST / Math.max(image.naturalWidth, image.naturalHeight);
    if (times >= 1) return blob;
    const canvas = make("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight].map(side => Math.max(1, Math.round(times * side)));
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    const type = blob.type === "image/png" ? "image/png" : "image/jpeg";
    return await new Promise((resolve, reject) => { canvas.toBlob(made => made ? resolve(made) : reject(), type, 0.95); });
  } finally {
    URL.revokeObjectURL(url);
  }
}

// Pictures are taken in one after the other; a question that is sent meanwhile waits for them.
function give(file) {
  if (!file) return;
  const last = (arriving ?? Promise.resolve()).then(() => takeIn(file)).catch(error => {
    say(`The picture could not be taken in: ${error.message}`);
    return false;
  });
  arriving = last;
  last.then(() => { if (arriving === last) arriving = null; });
}

// Whether it is there to be asked about.
async function takeIn(file) {
  let blob;
  try {
    blob = await smaller(file);
  } catch {
    say(`${file.name || "What you gave"} is not a picture that this browser can open.`);
    return false;
  }
  const [name, stays] = await store.keepPicture(blob);
  if (running.size) { // a new picture begins a new conversation, and the answer would be lost
    say("An answer is being written. Give the picture once more when it has ended.");
    return false;
  }
  if (path().length) talk = newTalk();
  talk.picture = name;
  render();
  say(stays ? "" : "This browser cannot keep the picture; after a reload it is gone.");
  by("question").focus();
  return true;
}

// ------------------------------------------------------------------------------------ the history
function listTalks() {
  const list = by("conversations"), all = store.conversations();
  list.replaceChildren();
  for (const each of all) {
    const item = make("li", list), open = make("button", item, "", {type: "button", className: "open"});
    if (each.picture) thumbnail(make("img", open, "", {alt: ""}), each.picture);
    make("span", open, each.title || "Without a question");
    if (each.id === talk.id) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => openTalk(each));
    const gone = make("button", item, "×", {type: "button"});
    gone.setAttribute("aria-label", `Delete “${each.title}”`);
    gone.addEventListener("click", () => {
      store.remove(each);
      if (each.id === talk.id) openTalk(newTalk());
      else listTalks();
    });
  }
  buttons();
}

async function thumbnail(image, name) {
  const blob = await store.picture(name);
  if (!blob) return;
  if (!urls.has(name)) urls.set(name, URL.createObjectURL(blob));
  image.src = urls.get(name);
}

function openTalk(other) {
  if (running.size) return;
  talk = other;
  chosen = shown = null;
  for (const node of Object.values(talk.nodes))
    for (const each of node.answers ?? []) if (["waiting", "running"].includes(each.state)) { each.state = "stopped"; clip(each); }
  by("question").value = "";
  render();
  listTalks();
  toEnd();
}

function fold(button, part, open) {
  by(part).hidden = !open;
  by(button).setAttribute("aria-expanded", String(open));
  document.body.classList.toggle(`with-${part}`, open);
}

// --------------------------------------------------------------------------------------- the keys
// Enter sends, but not while an input method composes, and not where it is the only way to a new line.
const sends = event => event.key === "Enter" && !event.shiftKey && !touch && !event.isComposing && event.keyCode !== 229;

function onKey(event) {
  if (event.key !== "Escape") return;
  if (running.size) stop();
  else if (chosen) { const {element} = chosen.word; choose(null); element.focus(); }
  else for (const part of ["options", "history"]) fold(`open-${part}`, part, part === "history" && wide.matches && !by(part).hidden);
}

const stop = () => running.forEach(controller => controller.abort());

function theme(name) {
  document.documentElement.dataset.theme = name;
  by("theme-name").textContent = `Colours: ${name === "auto" ? "as the system's" : name}`;
  store.setting("theme", name);
}

// -------------------------------------------------------------------------------------- the start
function listen() {
  by("ask").addEventListener("submit", async event => {
    event.preventDefault();
    if (arriving && !await arriving) return; // the question stays where it was written
    const text = by("question").value.trim();
    if (!text || running.size) return;
    by("question").value = "";
    ask(text);
  });
  by("question").addEventListener("keydown", event => {
    if (sends(event)) { event.preventDefault(); by("ask").requestSubmit(); }
    if (event.key === "ArrowUp" && !by("question").value && !running.size)
      [...document.querySelectorAll("article.user .tools button:last-child")].at(-1)?.click();
  });
  by("stop").addEventListener("click", stop);
  by("choose").addEventListener("click", () => by("file").click());
  by("other-picture").addEventListener("click", () => by("file").click());
  by("file").addEventListener("change", () => { give(by("file").files[0]); by("file").value = ""; });
  by("again-maps").addEventListener("click", () => shown && mapsAgain(shown.view));
  for (const id of ["layers", "heads"]) by(id).addEventListener("change", () => {
    views.forEach(({answer}) => answer.tokens.forEach(token => { delete token.map; }));
    show(shown);
  });
  document.addEventListener("paste", event => give([...event.clipboardData.files].find(file => file.type.startsWith("image/"))));
  document.addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("dragging"); });
  document.addEventListener("dragleave", event => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
  document.addEventListener("drop", event => { event.preventDefault(); document.body.classList.remove("dragging"); give(event.dataTransfer.files[0]); });
  document.addEventListener("keydown", onKey);
  const picture = by("picture"), back = () => { shade(null); show(chosen ?? shown); };
  picture.tabIndex = 0;
  picture.setAttribute("role", "application");
  picture.setAttribute("aria-label", "The picture: arrow keys go from patch to patch");
  picture.addEventListener("pointermove", atPointer);
  picture.addEventListener("pointerdown", atPointer);
  picture.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") back(); });
  picture.addEventListener("keydown", patchKey);
  picture.addEventListener("blur", back);
  by("thread").addEventListener("pointerleave", () => { if (chosen) show(chosen); });
  wide.addEventListener("change", () => { fold("open-history", "history", wide.matches); choose(chosen); });
  listenToMenus();
}

function listenToMenus() {
  for (const part of ["history", "options"]) by(`open-${part}`).addEventListener("click", () => fold(`open-${part}`, part, by(part).hidden));
  by("options").addEventListener("submit", event => event.preventDefault());
  by("new").addEventListener("click", () => { openTalk(newTalk()); by("question").focus(); });
  by("theme").addEventListener("click", () => theme({auto: "light", light: "dark", dark: "auto"}[document.documentElement.dataset.theme]));
  by("clear").addEventListener("click", async () => {
    if (!confirm("Delete all conversations and pictures of this page from this browser?")) return;
    await store.clear();
    openTalk(newTalk());
  });
  by("export").addEventListener("click", async () => {
    const url = URL.createObjectURL(new Blob([await store.exported()], {type: "application/json"}));
    make("a", null, "", {href: url, download: "minillava-conversations.json"}).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  });
  by("import").addEventListener("click", () => {
    const file = make("input", null, "", {type: "file", accept: "application/json"});
    file.addEventListener("change", async () => {
      try {
        await store.imported(await file.files[0].text());
      } catch (error) {
        say(`The file could not be read: ${error.message}`);
      }
      listTalks();
    });
    file.click();
  });
  by("ask-key").addEventListener("close", () => {
    if (by("api-key").value) setKey(by("api-key").value);
    by("api-key").value = "";
    greet();
  });
}

async function greet() {
  try {
    const models = await get("/v1/models");
    by("model").textContent = models.data[0].id;
    by("status").textContent = "ready";
  } catch (error) {
    by("status").textContent = error.status === 401 ? "wants a key" : "does not answer";
    if (error.status === 401) askForKey();
  }
}

by("key").querySelector("i").style.backgroundImage = gradient;
theme(store.setting("theme") ?? "auto");
talk = store.conversations()[0] ?? newTalk();
listen();
fold("open-history", "history", wide.matches);
openTalk(talk);
greet();
