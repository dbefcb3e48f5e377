// Bundles src/ into page.js (a script that defines tlcltPage.mount), page.css, and the licences of what is in them.
// Usage: node build.mjs [FOLDER], by default dist.
import { build } from "esbuild";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";

const folder = process.argv[2] ?? "dist";
const { metafile } = await build({
  entryPoints: { page: "src/page.tsx" },
  outdir: folder,
  bundle: true,
  minify: true,
  format: "iife",
  globalName: "tlcltPage",
  target: ["es2021"],
  charset: "ascii",
  legalComments: "none",
  banner: { js: "/* The page of tl_clt. The licences of the packages within stand in licenses.txt. */" },
  jsx: "automatic",
  jsxImportSource: "preact",
  metafile: true,
});

const within = Object.keys(metafile.inputs).map((path) => path.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)\//)?.[1]);
const texts = [...new Set(within.filter(Boolean))].sort().map((name) => {
  const place = `node_modules/${name}`;
  const { version } = JSON.parse(readFileSync(`${place}/package.json`, "utf8"));
  const file = readdirSync(place).find((entry) => /^licen[cs]e/i.test(entry));
  if (!file) throw new Error(`${name} has no licence file`);
  return `${name} ${version}\n\n${readFileSync(`${place}/${file}`, "utf8").trim()}\n`;
});
writeFileSync(`${folder}/licenses.txt`, texts.join(`\n${"-".repeat(80)}\n\n`));
