// Holds dashboards against the types of Grafana: node check.mjs old|new FILE.json ...
//
// Each file becomes a constant of the type in shape.ts, and TypeScript's compiler says what does not
// fit, unknown keys included. Prints JSON: by file, what is wrong and in which line of it.

import { readFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';

const HERE = dirname(fileURLToPath(import.meta.url));
const PACKAGES = { old: 'grafana-schema-11', new: '@grafana/schema' };
const HEAD = "import type { Board } from './shape';\nexport const board: Board = ";

// Keys that came after Grafana 11.0, which ignores them. One to a line, as we write them.
const NEWER = /^ *"(allowCustomValue|hideZeros|percentChangeColorMode|perPage|selectionMode)": [^{[\n]*$/gm;

const [age, ...files] = process.argv.slice(2);
const sources = new Map(files.map((file, number) => [
  join(HERE, `checked-${number}.ts`),
  HEAD + readFileSync(file, 'utf8').replace(age === 'old' ? NEWER : /$^/, ''),
]));
const options = {
  strict: true,
  noEmit: true,
  skipLibCheck: true,
  target: ts.ScriptTarget.ES2022,
  module: ts.ModuleKind.ESNext,
  moduleResolution: ts.ModuleResolutionKind.Bundler,
  types: [],
  lib: ['lib.es2022.d.ts', 'lib.dom.d.ts'],
  noErrorTruncation: false,
  paths: {
    '@grafana/schema': [join(HERE, 'node_modules', PACKAGES[age])],
    '@grafana/schema/*': [join(HERE, 'node_modules', PACKAGES[age], '*')],
  },
};
const host = ts.createCompilerHost(options);
const { fileExists, readFile, getSourceFile } = host;
host.fileExists = (name) => sources.has(name) || fileExists.call(host, name);
host.readFile = (name) => sources.get(name) ?? readFile.call(host, name);
host.getSourceFile = (name, language, ...rest) =>
  sources.has(name)
    ? ts.createSourceFile(name, sources.get(name), language)
    : getSourceFile.call(host, name, language, ...rest);

const program = ts.createProgram([...sources.keys()], options, host);
const general = [...program.getOptionsDiagnostics(), ...program.getGlobalDiagnostics(),
  ...program.getSemanticDiagnostics(program.getSourceFile(join(HERE, 'shape.ts')))];
if (general.length > 0) {
  console.error(ts.formatDiagnostics(general, { ...host, getCanonicalFileName: String, getCurrentDirectory: () => HERE, getNewLine: () => '\n' }));
  process.exit(1);
}
const found = {};
[...sources.keys()].forEach((name, number) => {
  const source = program.getSourceFile(name);
  const wrong = [...program.getSyntacticDiagnostics(source), ...program.getSemanticDiagnostics(source)];
  found[basename(files[number])] = wrong.map((each) => {
    const { line } = source.getLineAndCharacterOfPosition(each.start);
    return `${line}: ${ts.flattenDiagnosticMessageText(each.messageText, '\n')}`;
  });
});
console.log(JSON.stringify(found));
