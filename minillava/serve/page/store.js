// What stays in this browser: conversations in localStorage, pictures in IndexedDB by the hash of
// their bytes. Maps are not kept: the same seed makes the same ones again.
const PREFIX = "minillava.talk.";
const kept = new Map(); // pictures, also where the browser has no database to keep them in

export const setting = (name, value) =>
  value === undefined ? localStorage.getItem(`minillava.${name}`) : localStorage.setItem(`minillava.${name}`, value);

export function conversations() {
  const found = Object.keys(localStorage).filter(key => key.startsWith(PREFIX));
  return found.map(key => JSON.parse(localStorage.getItem(key))).sort((a, b) => b.time - a.time);
}

// Throws if the browser has no room.
export function save(talk) {
  localStorage.setItem(PREFIX + talk.id, JSON.stringify(talk, (key, value) => key === "map" ? undefined : value));
}

export const remove = talk => localStorage.removeItem(PREFIX + talk.id);

function database() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("minillava", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("pictures");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function inStore(mode, act) {
  const base = await database();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = base.transaction("pictures", mode), request = act(transaction.objectStore("pictures"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    base.close();
  }
}

async function nameOf(blob) {
  const digest = await crypto.subtle?.digest("SHA-256", await blob.arrayBuffer());
  // without https and off this machine there is no digest; a name that nothing else has will do
  return digest ? Array.from(new Uint8Array(digest), b => b.toString(16).padStart(2, "0")).join("") : `p${Date.now()}`;
}

// Keep a picture; returns its name, and whether it will be there after a reload.
export async function keepPicture(blob) {
  const name = await nameOf(blob);
  kept.set(name, blob);
  try {
    await inStore("readwrite", store => store.put(blob, name));
    return [name, true];
  } catch {
    return [name, false];
  }
}

export async function picture(name) {
  if (!kept.has(name)) {
    const blob = await inStore("readonly", store => store.get(name)).catch(() => undefined);
    if (blob) kept.set(name, blob);
  }
  return kept.get(name);
}

export async function clear() {
  for (const key of Object.keys(localStorage)) if (key.startsWith("minillava.")) localStorage.removeItem(key);
  kept.clear();
  await inStore("readwrite", store => store.clear()).catch(() => undefined);
}

export const dataUrl = blob => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

// Everything as one JSON text, pictures included, and back again.
export async function exported() {
  const talks = conversations(), pictures = {};
  for (const {picture: name} of talks) {
    const blob = name && await picture(name);
    if (blob) pictures[name] = await dataUrl(blob);
  }
  return JSON.stringify({minillava: 1, talks, pictures});
}

export async function imported(text) {
  const found = JSON.parse(text);
  if (found?.minillava !== 1 || !Array.isArray(found.talks)) throw new Error("not a file that this page exported");
  const names = {};
  for (const [name, url] of Object.entries(found.pictures ?? {})) {
    const bytes = Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), c => c.charCodeAt(0));
    const type = /^data:(image\/[a-z]+);/.exec(url)?.[1] ?? "image/png";
    [names[name]] = await keepPicture(new Blob([bytes], {type}));
  }
  for (const talk of found.talks) save({...talk, picture: names[talk.picture] ?? null});
}
