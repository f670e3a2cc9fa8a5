// Greedy generation from a tokopt artifact in Node.js. It follows only the artifact's manifest.
//
//   npm install
//   node generate.mjs model.tokopt 504,3575,282,4649 32      # artifact, prompt's token ids, new tokens
//
// prints the new token ids, separated by commas.

import { readFile } from 'node:fs/promises';
import path from 'node:path';
import ort from 'onnxruntime-node';

const OPTIONS = { logSeverityLevel: 3 }; // quiet: without bound buffers each step copies the cache, and warns

const ARRAYS = { int64: BigInt64Array, float32: Float32Array, bool: Uint8Array, int8: Int8Array, uint8: Uint8Array };

/** A tensor of one value, as the manifest names its dtype. */
function full(dtype, shape, value) {
  const array = new ARRAYS[dtype](shape.reduce((a, b) => a * b, 1));
  return new ort.Tensor(dtype, array.fill(dtype === 'int64' ? BigInt(value) : value), shape);
}

const integers = (values, shape) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), shape);

/** Which new token sees which: each one those before it and itself. */
function causal(count) {
  const seen = new Uint8Array(count * count);
  for (let row = 0; row < count; row++) seen.fill(1, row * count, row * count + row + 1);
  return new ort.Tensor('bool', seen, [1, count, count]);
}

function argmax(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}

class LanguageModel {
  static async load(folder) {
    const manifest = JSON.parse(await readFile(path.join(folder, 'manifest.json'), 'utf8'));
    if (manifest.task !== 'causal-lm') throw new Error(`${folder} holds no language model`);
    const sessions = {};
    for (const [name, program] of Object.entries(manifest.programs)) {
      sessions[name] = await ort.InferenceSession.create(path.join(folder, program.files.onnx), OPTIONS);
    }
    return new LanguageModel(manifest, sessions);
  }

  constructor(manifest, sessions) {
    Object.assign(this, { manifest, sessions });
  }

  /** An empty cache of `slots` slots: every state holds its initial value. */
  allocate(slots) {
    const size = (axis) => (typeof axis === 'number' ? axis : axis === 'batch' ? 1 : slots);
    this.state = {};
    for (const { name, dtype, axes, initial } of this.manifest.states) {
      this.state[name] = full(dtype, axes.map(size), initial);
    }
  }

  /** One call of a program: the outputs that the manifest ties to a state become that state. */
  async run(name, feeds) {
    const known = new Set(this.manifest.programs[name].inputs.map((input) => input.name));
    const state = Object.entries(this.state).filter(([input]) => known.has(input));
    const results = await this.sessions[name].run({ ...feeds, ...Object.fromEntries(state) });
    for (const { name: input, output } of this.manifest.states) {
      if (output in results) this.state[input] = results[output];
    }
    return results;
  }

  /** The likeliest token after `tokens`, which stand at the positions from `start` on. */
  async step(tokens, start) {
    const count = tokens.length;
    const { logits } = await this.run('step', {
      tokens: integers(tokens, [1, count]),
      positions: integers(tokens.map((_, i) => start + i), [1, count]),
      mask: causal(count),
      rows: integers([-1], [1]),
    });
    return argmax(logits.data);
  }

  async generate(prompt, count) {
    const { eos, compact_every: every } = this.manifest.generation;
    this.allocate(prompt.length + count);
    const made = [await this.step(prompt, 0)];
    if ('compact' in this.sessions) await this.run('compact', {});
    while (made.length < count && !eos.includes(made.at(-1))) {
      made.push(await this.step([made.at(-1)], prompt.length + made.length - 1));
      if (every && made.length % every === 0) await this.run('compact', {});
    }
    return made;
  }
}

const [folder, prompt, count = '32'] = process.argv.slice(2);
if (!prompt) {
  console.error('usage: node generate.mjs ARTIFACT TOKEN,TOKEN,... [NEW_TOKENS]');
  process.exit(2);
}
const model = await LanguageModel.load(folder);
console.log((await model.generate(prompt.split(',').map(Number), Number(count))).join(','));
