// The cluster as the page draws it, made from each state of the feed. Knows no document.

const STATES = ["running", "placed", "moving", "waiting"];

// The paper's classes of sizes, by the share of a GPU that a request takes: up to a quarter, a third, a half, more.
export const CLASSES = ["T", "S", "M", "L"];

export function classOf(blocks, capacity) {
  return CLASSES[(4 * blocks > capacity) + (3 * blocks > capacity) + (2 * blocks > capacity)];
}

function naturally(one, other) {
  return one.name.localeCompare(other.name, "en", { numeric: true }) || (one.worker < other.worker ? -1 : 1);
}

function gpuOf(worker) {
  return { ...worker, segments: [], held: 0, incoming: 0 };
}

// What a move carries: what was copied, or while it is under way what will be at most.
export function load(move, gpu) {
  const tokens = move.blocks * (gpu?.block_tokens ?? 0);
  if (move.outcome !== "moving") return { bytes: move.copied_bytes, tokens: move.prefilled_tokens };
  return {
    bytes: move.mode === "tokens" ? 0 : tokens * (gpu?.kv_bytes_per_token ?? 0),
    tokens: move.mode === "kv" ? 0 : tokens,
  };
}

export class Cluster {
  constructor() {
    this.gpus = new Map();
    this.models = [];
    this.moves = [];
    this.known = new Set();
    this.rates = { rate: [], ttft: [], waiting: [], memory: [] };
  }

  // Takes a state; returns the moves that are new since the last one.
  take(state) {
    const { status, rows } = state;
    const gpus = status.workers.map(gpuOf);
    rows.sequence.forEach((sequence, row) => {
      const gpu = gpus[rows.worker[row]];
      if (!gpu) return;
      const segment = {
        sequence, blocks: rows.blocks[row], tokens: rows.tokens[row], state: STATES[rows.state[row]],
        target: gpus[rows.target[row]]?.worker ?? "", size: classOf(rows.blocks[row], gpu.kv_blocks),
      };
      gpu.segments.push(segment);
      gpu.held += segment.blocks;
    });
    this.gpus = new Map(gpus.sort(naturally).map((gpu) => [gpu.worker, gpu]));
    const models = new Set([...this.models, ...gpus.map((gpu) => gpu.model)]);
    this.models = [...models].sort();
    this.state = state;
    this.remember(state);
    return this.takeMoves(status);
  }

  takeMoves(status) {
    const first = this.moves.length === 0 && this.known.size === 0;
    this.moves = [...status.moves, ...status.recent_moves];
    for (const move of status.moves) {
      const target = this.gpus.get(move.target);
      if (target) target.incoming += move.blocks;
    }
    const fresh = this.moves.filter((move) => !this.known.has(move.migration));
    this.known = new Set(this.moves.map((move) => move.migration));
    // What came out before anybody looked has happened; it is in the table, and not drawn again.
    return first ? fresh.filter((move) => move.outcome === "moving") : fresh;
  }

  remember(state) {
    const { frontend, status } = state;
    const memory = this.memory();
    const now = {
      rate: frontend.tokens_per_s, ttft: frontend.ttft_p50_s, waiting: this.waiting(),
      memory: memory.blocks ? memory.used / memory.blocks : 0,
    };
    for (const [name, value] of Object.entries(now)) {
      this.rates[name].push(value);
      if (this.rates[name].length > 120) this.rates[name].shift();
    }
    this.paused = status.moves_paused;
  }

  waiting() {
    const preempted = [...this.gpus.values()].reduce((sum, gpu) => sum + gpu.waiting, 0);
    return this.queued() + preempted;
  }

  queued() {
    return this.state.rows.state.reduce((sum, state) => sum + (STATES[state] === "waiting"), 0);
  }

  memory() {
    const sum = { used: 0, blocks: 0, usedBytes: 0, bytes: 0 };
    for (const gpu of this.gpus.values()) {
      const blockBytes = gpu.block_tokens * gpu.kv_bytes_per_token;
      sum.used += gpu.used_blocks;
      sum.blocks += gpu.kv_blocks;
      sum.usedBytes += gpu.used_blocks * blockBytes;
      sum.bytes += gpu.kv_blocks * blockBytes;
    }
    return sum;
  }

  standing() {
    const counts = { active: 0, standby: 0, draining: 0, drained: 0, silent: 0 };
    for (const gpu of this.gpus.values()) counts[gpu.state] += 1;
    return counts;
  }

  hue(model) {
    return this.models.indexOf(model) % 8;
  }
}
