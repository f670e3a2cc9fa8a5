// Generation from a tokopt artifact in Node.js, greedy unless the model draws its tokens itself. It follows only the
// artifact's manifest: the schedule says which program runs when, and the roles of inputs and outputs what they are. No
// name means anything.
//
//   npm install
//   node generate.mjs model.tokopt 504,3575,282,4649 32      # artifact, prompt's token ids, new tokens
//   node generate.mjs model.tokopt 504,3575 32 inputs.json   # and what a model takes beside it: {"images": [[...]]}
//   node generate.mjs model.tokopt 504,3575 32 '{}' '{"temperature": 0.8, "seed": 1}'   # of pass `sample`
//
//   node generate.mjs model.tokopt 504,3575 32 --nodes 1     # of pass `speculate`: nodes of a call's tree, not the fastest
//   node generate.mjs model.tokopt 504,3575 32 --compare     # with the whole tree and with one node
//
// prints the new token ids, separated by commas.

import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { parseArgs } from 'node:util';
import ort from 'onnxruntime-node';
import { Acceptances, MeasuredNodes } from './nodes.mjs';

const OPTIONS = { logSeverityLevel: 3 }; // quiet: without bound buffers each step copies the cache, and warns

const ARRAYS = {
  int64: BigInt64Array, int32: Int32Array, int8: Int8Array, uint8: Uint8Array, bool: Uint8Array,
  float32: Float32Array, float64: Float64Array,
};

const PADDING = -1; // position of padding
const UNSAID = 1; // the confidence of a program that says none

/** What a program that draws tokens is told, by role, and what a greedy choice takes. */
const DRAWING = { temperature: 0, top_k: 0, top_p: 1, min_p: 0, seed: 0, stream: 0 };

const values = (dtype, array) => ARRAYS[dtype].from(array, dtype === 'int64' ? BigInt : Number);
const tensor = (dtype, array, shape) => new ort.Tensor(dtype, values(dtype, array), shape);
const full = (dtype, shape, value) => tensor(dtype, Array(shape.reduce((a, b) => a * b, 1)).fill(value), shape);

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

/** The entry that decodes and proposes tokens, where there is one. */
const proposing = ({ schedule }) => schedule.entries.find(({ role, tree }) => role === 'decode' && tree?.length);

/** The programs of one call of an entry, in their order: more than one where a program was cut. */
const programs = ({ program, then }) => [program, ...(then ?? [])];

/** The shape of nested lists. */
const shapeOf = (nested) => (Array.isArray(nested) ? [nested.length, ...shapeOf(nested[0])] : []);

/** One text on its way through the schedule. */
class Request {
  constructor(manifest, sessions, slots, { inputs, sampling }) {
    Object.assign(this, { manifest, sessions, inputs, sampling: { ...DRAWING, ...sampling }, states: {}, links: {} });
    this.counting = manifest.schedule.triggers.filter((trigger) => trigger.after === 'tokens');
    this.since = this.counting.map(() => 0); // committed tokens since each of them ran
    this.written = 0; // tokens that were decoded since the prompt
    const size = (axis) => (typeof axis === 'number' ? axis : axis === 'batch' ? 1 : slots);
    for (const { name, dtype, axes, initial } of manifest.states) {
      this.states[name] = full(dtype, axes.map(size), initial);
    }
  }

  entry(role) {
    return this.manifest.schedule.entries.find((entry) => entry.role === role);
  }

  /**
   * The entry that decodes when a call gets so many nodes: with one there is nothing to propose. Of several that follow
   * one another it is the last that takes over at as many tokens as were decoded since the prompt.
   */
  decoding(nodes = 1) {
    const begun = ({ role, since }) => role === 'decode' && (since ?? 0) <= this.written;
    const plain = this.manifest.schedule.entries.filter((entry) => begun(entry) && !entry.tree?.length).at(-1);
    return (nodes > 1 ? proposing(this.manifest) : undefined) ?? plain ?? this.entry('decode');
  }

  /** One call of a program on what roles of inputs stand for; its outputs by role. */
  async run(name, given = {}) {
    const { inputs, outputs } = this.manifest.programs[name];
    const feeds = {};
    for (const input of inputs) {
      if (input.role === 'state') feeds[input.name] = this.states[input.state];
      else if (input.role === 'link') feeds[input.name] = this.links[JSON.stringify([name, input.name])];
      else if (input.role === 'input') feeds[input.name] = this.array(input);
      else if (input.role in DRAWING) feeds[input.name] = tensor(input.dtype, [this.sampling[input.role]], [1]);
      else feeds[input.name] = given[input.role];
    }
    const results = await this.sessions[name].run(feeds);
    for (const output of outputs) if (output.role === 'state') this.states[output.state] = results[output.name];
    for (const { source, target } of this.manifest.links) {
      if (source.program === name) this.links[JSON.stringify([target.program, target.name])] = results[source.name];
    }
    return Object.fromEntries(outputs.map((output) => [output.role, results[output.name]]));
  }

  array({ name, dtype }) {
    if (!(name in this.inputs)) throw new Error(`input ${name} is missing`);
    return tensor(dtype, this.inputs[name].flat(Infinity), shapeOf(this.inputs[name]));
  }

  /**
   * Read tokens that stand at the positions from `start` on; the tokens that follow, `limit` at most. A program that
   * speculates is given the first `nodes` of its tree.
   */
  async read(entry, tokens, start, limit, nodes) {
    const wanted = this.sizes(entry).fixed ?? tokens.length;
    const padding = Array(wanted - tokens.length).fill(0);
    const positions = [...padding.map(() => PADDING), ...tokens.map((_, i) => start + i)];
    const parent = (entry.tree ?? []).slice(0, nodes);
    const told = {
      tokens: tensor('int64', [...padding, ...tokens], [1, wanted]),
      positions: tensor('int64', positions, [1, wanted]),
      mask: causal(wanted),
      rows: tensor('int64', [-1], [1]),
      limit: tensor('int64', [limit], [1]),
      parent: tensor('int64', parent, [parent.length]),
    };
    let emitted;
    for (const program of programs(entry)) emitted = await this.run(program, told); // the last one emits
    this.confidence = Number(emitted.confidence?.data[0] ?? UNSAID); // in what the next call would propose
    if (emitted.tokens) return Array.from(emitted.tokens.data.slice(0, Number(emitted.count.data[0])), Number);
    return [argmax(emitted.logits.data.slice(-this.manifest.generation.vocabulary))];
  }

  /** How many tokens the program of an entry takes in one call. */
  sizes({ program }) {
    const { inputs, ranges } = this.manifest.programs[program];
    const axis = inputs.find((input) => input.role === 'tokens')?.axes[1] ?? 1;
    return typeof axis === 'number' ? { fixed: axis, most: axis } : { most: ranges[axis].max ?? Infinity };
  }

  draws(entry) {
    return this.manifest.programs[programs(entry).at(-1)].outputs.some((output) => output.role === 'tokens');
  }

  /** `limit`, and no more than the tokens left to the next trigger, when so many of the prompt are read before. */
  allowed(limit, prompt = 0) {
    const left = this.counting.map(({ every, prompt: counts }, i) => {
      const rest = every - this.since[i] - (counts ? prompt : 0);
      return rest > 0 ? rest : every;
    });
    return Math.min(limit, ...left);
  }

  /** Count tokens for the triggers that count them, and run those that are due. */
  async count(tokens, counts = () => true) {
    for (const [i, trigger] of this.counting.entries()) if (counts(trigger)) this.since[i] += tokens;
    for (const [i, trigger] of this.counting.entries()) {
      if (counts(trigger) && this.since[i] >= trigger.every) await this.trigger(trigger);
    }
  }

  async trigger({ program }) {
    await this.run(program, { due: tensor('bool', [1], [1]) });
    for (const [i, other] of this.counting.entries()) if (other.program === program) this.since[i] = 0;
  }

  /** Read the prompt in as many calls as it takes; the tokens that follow it. */
  async prefill(prompt, limit) {
    const entry = this.entry('prefill');
    const { most, fixed } = this.sizes(entry);
    let made = [];
    let start = fixed ? -((fixed - (prompt.length % fixed)) % fixed) : 0; // padding comes first
    while (start < prompt.length) {
      const within = this.counting.map(({ every, prompt: counts }, i) => (counts ? every - this.since[i] : Infinity));
      const size = fixed ?? Math.min(prompt.length - start, most, ...within);
      const end = start + size;
      const last = end >= prompt.length;
      const begin = Math.max(start, 0);
      made = await this.read(entry, prompt.slice(begin, end), begin, last ? this.allowed(limit, size) : 0);
      await this.count(size, (trigger) => trigger.prompt);
      start = end;
    }
    if (this.draws(entry)) await this.count(made.length);
    for (const trigger of this.manifest.schedule.triggers) if (trigger.after === 'prefill') await this.trigger(trigger);
    return made;
  }

  /** The tokens that follow the last one, which stands at `position`; `trees` says how many nodes are proposed. */
  async decode(token, position, limit, trees) {
    const most = this.allowed(limit);
    const level = this.confidence;
    const nodes = trees?.next(level, most);
    const entry = this.decoding(nodes);
    const begun = performance.now();
    const made = await this.read(entry, [token], position, most, nodes);
    trees?.observe(nodes, (performance.now() - begun) / 1000, made.length, most, level);
    this.written += made.length;
    await this.count(this.draws(entry) ? made.length : 1);
    return made;
  }
}

/** How many nodes the calls of a model get: `fixed`, or as many as write fastest. Knows what calls took and gave. */
class Trees {
  constructor(folder, tree, fixed) {
    Object.assign(this, { folder, fixed, measured: new MeasuredNodes(tree), acceptances: new Acceptances() });
    Object.assign(this, { calls: 0, tokens: 0, seconds: 0 });
  }

  next(level, limit) {
    return this.fixed ?? this.measured.choose(level, limit);
  }

  observe(nodes, seconds, tokens, limit, level) {
    this.calls += 1;
    this.tokens += tokens;
    this.seconds += seconds;
    if (this.fixed === undefined) this.measured.observe(nodes, seconds, tokens, limit, level);
    if (limit > 1 && this.acceptances.add(nodes, tokens)) {
      console.error(`${this.folder}: of the tokens proposed in 64 calls about none was accepted`);
    }
  }
}

/**
 * How sessions are opened. Each has threads of its own, so that where several programs run in turns, those of the one
 * that ran last are not to spin beside those of the next.
 */
function sessionOptions({ schedule }) {
  const running = new Set(schedule.entries.flatMap(programs));
  return running.size > 1 ? { ...OPTIONS, extra: { session: { force_spinning_stop: '1' } } } : OPTIONS;
}

async function load(folder) {
  const manifest = JSON.parse(await readFile(path.join(folder, 'manifest.json'), 'utf8'));
  if (![4, 5].includes(manifest.format_version)) throw new Error(`${folder} is of another format; export it again`);
  if (!manifest.schedule.entries.some(({ role }) => role === 'decode')) throw new Error(`${folder} writes no texts`);
  const sessions = {};
  const options = sessionOptions(manifest);
  for (const [name, program] of Object.entries(manifest.programs)) {
    sessions[name] = await ort.InferenceSession.create(path.join(folder, program.files.onnx), options);
  }
  return { manifest, sessions };
}

async function generate({ manifest, sessions }, prompt, count, given, trees) {
  const { entries } = manifest.schedule;
  const spare = Math.max(0, ...entries.map(({ slots, tree }) => (typeof slots === 'number' ? slots : (tree?.length ?? 0))));
  const slots = prompt.length + count + 2 * spare; // a call's own slots, and the padding of a fixed number of tokens
  const request = new Request(manifest, sessions, slots, given);
  for (const { program, role } of entries) if (role === 'encode') await request.run(program);
  const made = [];
  const take = (tokens) => {
    for (const token of tokens) {
      made.push(token);
      if (made.length === count || manifest.generation.eos.includes(token)) return false;
    }
    return true;
  };
  let goesOn = take(await request.prefill(prompt, count));
  while (goesOn) {
    goesOn = take(await request.decode(made.at(-1), prompt.length + made.length - 1, count - made.length, trees));
  }
  return made;
}

/** The text with the whole tree and with one node: its tokens, and a line that says what both took. */
async function compare(model, prompt, count, given, tree) {
  const runs = [];
  for (const nodes of [tree.length, 1]) {
    await generate(model, prompt, Math.min(count, 8), given, new Trees('', tree, nodes)); // the first allocates
    const trees = new Trees(folder, tree, nodes);
    const tokens = await generate(model, prompt, count, given, trees);
    runs.push({ tokens: tokens.join(','), speed: trees.tokens / trees.seconds, gave: trees.tokens / trees.calls });
  }
  const [fast, plain] = runs;
  if (fast.tokens !== plain.tokens) throw new Error(`other text with the tree: ${fast.tokens}, without: ${plain.tokens}`);
  console.log(fast.tokens);
  console.log(
    `the same text with and without speculation: ${fast.gave.toFixed(2)} tokens per call, ${fast.speed.toFixed(1)} ` +
      `tokens/s, ${(fast.speed / plain.speed).toFixed(2)} times as fast`,
  );
}

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: { nodes: { type: 'string' }, compare: { type: 'boolean' } },
});
const [folder, prompt, count = '32', inputs = '{}', sampling = '{}'] = positionals;
if (!prompt) {
  console.error('usage: node generate.mjs ARTIFACT TOKEN,TOKEN,... [NEW_TOKENS] [INPUTS] [SAMPLING] [--nodes N | --compare]');
  console.error('INPUTS and SAMPLING are JSON, or a file of it');
  process.exit(2);
}
const read = async (text) => JSON.parse(text.startsWith('{') ? text : await readFile(text, 'utf8'));
const model = await load(folder);
const given = { inputs: await read(inputs), sampling: await read(sampling) };
const takes = new Set(Object.values(model.manifest.programs).flatMap((program) => program.inputs.map(({ role }) => role)));
const unknown = Object.keys(given.sampling).find((role) => !(role in DRAWING && takes.has(role)));
if (unknown) throw new Error(`${folder} does not take ${unknown}; export it with the pass sample`);
const tree = proposing(model.manifest)?.tree;
const fixed = options.nodes === undefined ? undefined : Number(options.nodes);
if ((options.compare || fixed !== undefined) && !tree) throw new Error(`${folder} does not speculate`);
if (fixed !== undefined && !(Number.isInteger(fixed) && fixed >= 1 && fixed <= tree.length)) {
  throw new Error(`--nodes must be 1 to ${tree.length}`);
}
const ids = prompt.split(',').map(Number);
if (options.compare) await compare(model, ids, Number(count), given, tree);
else {
  const trees = tree ? new Trees(folder, tree, fixed) : undefined;
  console.log((await generate(model, ids, Number(count), given, trees)).join(','));
}
