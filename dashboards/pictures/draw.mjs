// Draws pictures: node draw.mjs --chromium /usr/bin/chromium FOLDER
//
// Each FOLDER/name.json (see ask.py) becomes FOLDER/name.png. What goes wrong in the page is printed and
// ends this with 1, as does an option of a panel that the drawing would ignore.

import { readFile, readdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import { build } from 'esbuild';
import { chromium } from 'playwright-core';
import UPNG from 'upng-js';

const WIDTH = 1440; // CSS pixels; more would make the text too small where the picture is shown
const HEIGHT = 4000; // more than any picture has: tables below the edge would stay empty
const SCALE = 1.25;
const COLOURS = 256; // a third of the size, and no difference to be seen
const SETTLE = 300; // milliseconds without change of the page's layout until it is taken as done

const HERE = path.dirname(fileURLToPath(import.meta.url));
const PAGE = 'http://pictures.invalid/'; // answered below, never by a network
const FILES = [
  // what Grafana's components fetch from a Grafana, and where npm has it
  [/\/build\/img\/icons\/(.+)$/, 'image/svg+xml', (name) => `@grafana/ui/dist/public/img/icons/${name}`],
  [/\/fonts\/inter\/Inter-Regular\.woff2$/, 'font/woff2', () => interOf(400)],
  [/\/fonts\/inter\/Inter-Medium\.woff2$/, 'font/woff2', () => interOf(500)],
];
const interOf = (weight) => `@fontsource/inter/files/inter-latin-${weight}-normal.woff2`;
const FLAGS = [
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-gpu',
  '--disable-quic',
  '--disable-sync',
  '--no-first-run',
];

async function bundle() {
  const { outputFiles } = await build({
    entryPoints: [path.join(HERE, 'src/main.jsx')],
    bundle: true,
    write: false,
    outdir: '/',
    minify: true,
    jsx: 'automatic',
    define: { global: 'window', 'process.env.NODE_ENV': '"production"' },
    loader: { '.svg': 'dataurl', '.png': 'dataurl', '.ttf': 'dataurl', '.woff2': 'dataurl' },
    logLevel: 'error',
  });
  return Object.fromEntries(outputFiles.map((file) => [path.extname(file.path), file.text]));
}

async function serve(page, code, complaints) {
  const answers = {
    '/': { contentType: 'text/html', body: PAGE_HTML },
    '/main.js': { contentType: 'text/javascript', body: code['.js'] },
    '/main.css': { contentType: 'text/css', body: code['.css'] },
  };
  await page.route('**/*', async (route) => {
    const { pathname } = new URL(route.request().url());
    const [pattern, contentType, from] = FILES.find(([pattern]) => pattern.test(pathname)) ?? [];
    if (answers[pathname]) {
      await route.fulfill(answers[pathname]);
    } else if (pattern) {
      const file = path.join(HERE, 'node_modules', from(pathname.match(pattern)[1]));
      await route.fulfill({ contentType, body: await readFile(file) });
    } else {
      complaints.push(`the page wants ${pathname}`);
      await route.abort();
    }
  });
}

const PAGE_HTML = `<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<link rel="stylesheet" href="/main.css"><body><div id="root"></div><script src="/main.js"></script>`;

async function draw(browser, code, picture) {
  const page = await browser.newPage({ viewport: { width: WIDTH, height: HEIGHT }, deviceScaleFactor: SCALE });
  const complaints = [];
  page.on('pageerror', (error) => complaints.push(String(error)));
  page.on('console', (message) => {
    if (message.type() === 'error') complaints.push(message.text());
  });
  try {
    await serve(page, code, complaints);
    await page.goto(PAGE);
    complaints.push(...(await page.evaluate((it) => window.draw(it), picture)));
    await settled(page);
    return { complaints, png: await page.locator('#root').screenshot() };
  } finally {
    await page.close();
  }
}

/** Legends are measured first and plots made after that: wait until nothing is added any more. */
function settled(page) {
  return page.evaluate(
    (quiet) =>
      new Promise((resolve) => {
        let timer = setTimeout(done, quiet);
        const observer = new MutationObserver(() => {
          clearTimeout(timer);
          timer = setTimeout(done, quiet);
        });
        observer.observe(document.body, { attributes: true, childList: true, subtree: true });
        function done() {
          observer.disconnect();
          document.fonts.ready.then(resolve);
        }
      }),
    SETTLE
  );
}

/** The same picture with a palette. */
function crushed(png) {
  const image = UPNG.decode(png);
  return Buffer.from(UPNG.encode([UPNG.toRGBA8(image)[0]], image.width, image.height, COLOURS));
}

const { values, positionals } = parseArgs({
  options: { chromium: { type: 'string' } },
  allowPositionals: true,
});
const [folder] = positionals;
const code = await bundle();
const browser = await chromium.launch({
  executablePath: values.chromium,
  chromiumSandbox: false,
  args: FLAGS,
});
try {
  for (const name of (await readdir(folder)).filter((file) => file.endsWith('.json')).sort()) {
    const picture = JSON.parse(await readFile(path.join(folder, name), 'utf8'));
    const { complaints, png } = await draw(browser, code, picture);
    for (const complaint of complaints) {
      console.error(`${name}: ${complaint}`);
      process.exitCode = 1;
    }
    await writeFile(path.join(folder, name.replace(/\.json$/, '.png')), crushed(png));
  }
} finally {
  await browser.close();
}
