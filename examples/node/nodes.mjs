// How many nodes of a tree a call gets, by the seconds that calls took and the tokens that they committed so far: what
// tokopt/runtime/speculation/planner/measured.py does, which explains it.

const MEMORY = 128; // calls after which what was accepted counts e times less
const DOUBT = 3; // calls that count as much as what is believed without experience
const TIMES = 15; // calls of a size over which the lower quartile of the seconds is taken
const ENOUGH = 3; // calls of a size without which its seconds are not known
const STALE = 256; // calls after which a size is tried once more, times what it costs beside the cheapest; after far fewer where few are known

const depthOf = (depths, size) => Math.max(...depths.slice(0, size));

/** Of calls that proposed down to each depth with all above accepted, how many there were, and with it accepted. */
class Acceptance {
  constructor(depth) {
    Object.assign(this, { tried: Array(depth).fill(0), right: Array(depth).fill(0) });
  }

  /** How many of the proposals of a depth are right; `before` is what to believe without experience. */
  share(place, before) {
    return (this.right[place] + DOUBT * before) / (this.tried[place] + DOUBT);
  }

  /** Take note of a call down to a depth, which committed `count` tokens of at most `limit`. */
  add(depth, count, limit) {
    const fade = 1 - 1 / MEMORY;
    this.tried = this.tried.map((number) => number * fade);
    this.right = this.right.map((number) => number * fade);
    for (let place = 0; place < Math.min(depth, limit - 1, count); place++) {
      this.tried[place] += 1;
      this.right[place] += count > place + 1 ? 1 : 0;
    }
  }
}

export class MeasuredNodes {
  /** `parents` says whom each node of the tree follows, -1 for the root. */
  constructor(parents) {
    const depths = [];
    for (const parent of parents) depths.push(depths.length ? depths[parent] + 1 : 0);
    const sizes = [];
    for (let size = 1; size < parents.length; size *= 2) sizes.push(size);
    sizes.push(parents.length);
    Object.assign(this, { depths, sizes, calls: 0, last: new Map(), seconds: new Map(), accepted: new Map() });
  }

  /** The nodes for a call whose proposals are as sure as `level` says, of at most `limit` tokens. */
  choose(level, limit) {
    if (level <= 0 || limit <= 1) return 1;
    const speeds = this.sizes.map((size) => this.tokens(size, level, limit) / this.cost(size));
    return this.sizes[speeds.indexOf(Math.max(...speeds))];
  }

  /** Take note of a call that committed `count` tokens of at most `limit`. */
  observe(nodes, seconds, count, limit, level) {
    this.calls += 1;
    this.last.set(nodes, this.calls);
    this.seconds.set(nodes, [...(this.seconds.get(nodes) ?? []), Math.max(seconds, 1e-9)].slice(-TIMES));
    if (level <= 0) return;
    const own = this.key(nodes, level);
    if (!this.accepted.has(own)) this.accepted.set(own, new Acceptance(Math.max(...this.depths)));
    for (const [key, acceptance] of this.accepted) {
      const depth = key === own ? depthOf(this.depths, nodes) : 0;
      if (key.startsWith(`${level} `)) acceptance.add(depth, count, limit);
    }
  }

  /** Nodes of a chain tell what fewer of them would have given; of a tree they do not. */
  key(size, level) {
    return `${level} ${this.depths.at(-1) === this.depths.length - 1 ? 0 : size}`;
  }

  /** What a call commits on average. */
  tokens(size, level, limit) {
    const keys = new Set(this.sizes.filter((fewer) => fewer <= size).map((fewer) => this.key(fewer, level)));
    const known = [...keys].filter((key) => this.accepted.has(key)).map((key) => this.accepted.get(key));
    let reached = 1;
    let total = 1;
    for (let place = 0; place < Math.min(depthOf(this.depths, size), limit - 1); place++) {
      const believed = (level + place) / (level + place + 1);
      reached *= known.reduce((share, acceptance) => acceptance.share(place, share), believed);
      total += reached;
    }
    return total;
  }

  /** Seconds of a call; where they are not known, or not since long, those of fewer nodes: it cannot be less. */
  cost(size) {
    const known = new Map();
    for (const [nodes, times] of this.seconds) {
      const sorted = [...times].sort((a, b) => a - b);
      if (times.length >= ENOUGH) known.set(nodes, sorted[Math.floor((times.length - 1) / 4)]);
    }
    if (!known.size) return 1;
    const own = known.get(size);
    if (own) {
      const beside = Math.min(own / Math.min(...known.values()), size); // nodes cost no more than calls
      const count = this.seconds.get(size).length;
      if (this.calls - this.last.get(size) < STALE * beside * (count / TIMES) ** 2) return own;
    }
    const fewer = [...known.keys()].filter((nodes) => nodes < size);
    const least = Math.min(...known.keys());
    return fewer.length ? known.get(Math.max(...fewer)) : (known.get(least) * size) / least;
  }
}

/** Whether anything is accepted: counts over 64 calls. */
export class Acceptances {
  constructor() {
    Object.assign(this, { calls: 0, proposing: 0, accepted: 0, said: false });
  }

  /** Count a call; true, once, when it ends 64 of which those that proposed gave about nothing. */
  add(nodes, tokens) {
    this.calls += 1;
    if (nodes > 1) {
      this.proposing += 1;
      this.accepted += tokens - 1;
    }
    if (this.calls < 64) return false;
    const nothing = this.proposing >= 8 && this.accepted < this.proposing / 16;
    Object.assign(this, { calls: 0, proposing: 0, accepted: 0 });
    const says = nothing && !this.said;
    this.said ||= nothing;
    return says;
  }
}
