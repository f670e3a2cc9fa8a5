// How many nodes of a tree a call gets, by the seconds that calls took and the tokens that they committed so far: what
// tokopt/runtime/speculation/planner/measured.py does, which explains it.

const TRY = 4; // calls of a size in a row
const SHARE = 1 / 64; // of the time may be lost on trying sizes
const MEMORY = 128; // calls after which what was committed counts e times less
const TIMES = 15; // calls over which the median of the seconds is taken

/** What is known of calls with so many nodes. */
class Size {
  constructor(nodes) {
    Object.assign(this, { nodes, seconds: [], calls: 0, tokens: 0, credit: 0 });
  }

  get cost() {
    return [...this.seconds].sort((a, b) => a - b)[Math.floor((this.seconds.length - 1) / 2)];
  }

  get speed() {
    return this.tokens / this.calls / this.cost;
  }

  loss(speed) {
    return TRY * Math.max(this.cost - this.tokens / this.calls / speed, 0);
  }

  fade(credit) {
    this.calls *= 1 - 1 / MEMORY;
    this.tokens *= 1 - 1 / MEMORY;
    this.credit += credit;
  }

  add(seconds, tokens, timed) {
    if (timed) this.seconds = [...this.seconds, Math.max(seconds, 1e-9)].slice(-TIMES);
    this.calls += 1;
    this.tokens += tokens;
  }
}

export class MeasuredNodes {
  constructor(most) {
    const between = [];
    for (let nodes = 1; 2 * nodes < most; nodes *= 2) between.unshift(2 * nodes);
    this.sizes = [most, ...(most > 1 ? [1] : []), ...between].map((nodes) => new Size(nodes));
    Object.assign(this, { nodes: most, left: TRY, last: 0 });
  }

  /** Take note of a call with so many nodes; `nodes` are those of the next one. */
  observe(nodes, seconds, tokens) {
    const credit = (SHARE * seconds) / Math.max(this.sizes.length - 1, 1);
    for (const size of this.sizes) size.fade(credit);
    this.sizes.find((size) => size.nodes === nodes).add(seconds, tokens, nodes === this.last);
    this.last = nodes;
    this.left -= 1;
    if (this.left <= 0) this.choose();
  }

  choose() {
    const unknown = this.sizes.find((size) => !size.seconds.length);
    if (unknown) return this.take(unknown, TRY);
    const best = this.sizes.reduce((one, other) => (other.speed > one.speed ? other : one));
    for (const size of this.sizes) size.credit = Math.min(size.credit, size.loss(best.speed));
    const due = this.sizes.filter((size) => size !== best && size.credit >= size.loss(best.speed));
    if (!due.length) return this.take(best, 1);
    const tried = due.reduce((one, other) => (other.calls < one.calls ? other : one));
    tried.credit = 0;
    return this.take(tried, TRY);
  }

  take({ nodes }, left) {
    Object.assign(this, { nodes, left });
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
