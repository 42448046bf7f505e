// Attention that walks block tables: keys and values are read where they lie, no gather, no mask.
//
// Keys come in tiles of 64 at fixed positions, with the online softmax of T. Dao et al., "FlashAttention", 2022, between
// tiles. A query's numbers depend on its own keys alone: not on the chunk it came in, nor on its neighbours.
#pragma once

#include <cmath>
#include <vector>

#include "linear.h"

namespace mell {

constexpr int64_t kKeys = 64;
// Query rows (queries times the heads that share keys) of one work item; more pay better for turning keys around.
constexpr int64_t kQueryRows = 48;

struct Pool {
  float* data;           // layer 0's keys of block 0
  int64_t block_stride;  // floats from a block to the next
  int64_t page;          // floats of one layer's keys (or values) in a block
  int64_t block_tokens;
  int64_t kv_heads;
  int64_t head_dim;

  // Keys (or, a page further, values) of all heads at a position of a block table.
  float* keys(int64_t layer, const int64_t* table, int64_t position) const {
    return data + table[position / block_tokens] * block_stride + layer * 2 * page +
           position % block_tokens * kv_heads * head_dim;
  }
};

// Packed tokens [first, first + count) are a sequence's positions [start, start + count).
struct Row {
  int64_t first;
  int64_t start;
  int64_t count;
  const int64_t* table;
};

struct Heads {
  int64_t heads;
  int64_t window;  // a query sees at most so many positions, its own included; 0: all
  float scaling;
};

// One thread's memory for a tile of queries.
struct Scratch {
  std::vector<float> keys, query, scores, out, zeros;
  std::vector<float> most, total;

  Scratch(int64_t rows, int64_t dim)
      : keys(dim * kKeys), query(rows * dim), scores(rows * kKeys), out(rows * dim), zeros(dim), most(rows), total(rows) {}
};

// Scores become weights in place; sums and results so far are scaled down where a larger score came.
static inline void soften(Scratch& s, int64_t at, int64_t row, int64_t begin, int64_t end, int64_t dim, float scaling) {
  float* scores = s.scores.data() + at * kKeys;
  for (int64_t j = 0; j < kKeys; j++) scores[j] = j >= begin && j < end ? scores[j] * scaling : -INFINITY;
  Vec tops = load(scores);
  for (int64_t j = kLanes; j < kKeys; j += kLanes) tops = larger(load(scores + j), tops);
  const float before = s.most[row], most = std::max(before, largest(tops));
  // Nothing seen yet: -inf minus -inf would be NaN.
  const float base = most == -INFINITY ? 0.0f : most;
  Vec sums = {};
  for (int64_t j = 0; j < kKeys; j += kLanes) {
    const Vec weights = exponential(load(scores + j) - base);
    store(scores + j, weights);
    sums += weights;
  }
  const float shrink = exponential(all(before - base))[0];
  s.total[row] = s.total[row] * shrink + sum(sums);
  s.most[row] = most;
  for (int64_t d = 0; d < dim; d += kLanes) store(s.out.data() + row * dim + d, load(s.out.data() + row * dim + d) * shrink);
}

// Where a tile's keys and values of one KV head lie; zeros where there are none.
struct KeyTile {
  const float* keys[kKeys];
  const float* values[kKeys];

  // Positions [base, base + 64), as far as they are in [seen_from, last).
  void find(const Pool& pool, int64_t layer, const int64_t* table, int64_t kv_head, int64_t base, int64_t seen_from,
            int64_t last, const float* zeros) {
    for (int64_t j = 0; j < kKeys; j++) {
      const bool there = base + j < last && base + j >= seen_from;
      keys[j] = there ? pool.keys(layer, table, base + j) + kv_head * pool.head_dim : zeros;
      values[j] = there ? keys[j] + pool.page : zeros;
    }
  }
};

// out[M rows][16 at d] += weights * values, of the first `count` positions. Few rows wait for memory, not for sums: with
// FETCH the next tile's values are asked for meanwhile, a line at a time.
template <int M, bool FETCH>
static inline __attribute__((always_inline)) void add_values(const KeyTile& tile, const KeyTile& next, int64_t d,
                                                             int64_t count, const float* __restrict weights,
                                                             float* __restrict out, int64_t dim) {
  Vec sums[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    sums[m][0] = load(out + m * dim);
    sums[m][1] = load(out + m * dim + kLanes);
  }
  for (int64_t j = 0; j < count; j++) {
    if (FETCH) __builtin_prefetch(next.values[j] + d);
    const Vec left = load(tile.values[j] + d), right = load(tile.values[j] + d + kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vec weight = all(weights[m * kKeys + j]);
      sums[m][0] += left * weight;
      sums[m][1] += right * weight;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    store(out + m * dim, sums[m][0]);
    store(out + m * dim + kLanes, sums[m][1]);
  }
}

static inline void add_values_rows(const KeyTile& tile, const KeyTile& next, int64_t d, int64_t count,
                                   const float* weights, float* out, int64_t dim, int64_t rows) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    add_values<kTileRows, false>(tile, next, d, count, weights + m * kKeys, out + m * dim, dim);
  for (; m + 3 <= rows; m += 3) add_values<3, true>(tile, next, d, count, weights + m * kKeys, out + m * dim, dim);
  for (; m < rows; m++) add_values<1, true>(tile, next, d, count, weights + m * kKeys, out + m * dim, dim);
}

// What one thread computes at a time: queries [at, at + queries) of a row, the heads of some KV heads.
struct QueryTile {
  Row row;
  int64_t at;
  int64_t queries;
  int64_t kv_head;
  int64_t kv_heads;
};

// Scores of `rows` queries with a tile's keys, into s.scores; meanwhile the next tile's keys are fetched.
static inline void score(const KeyTile& tile, const KeyTile& next, const float* query, int64_t rows, int64_t dim,
                         Scratch& s) {
  for (int64_t j = 0; j < kKeys; j += kLanes)
    for (int64_t d = 0; d < dim; d += kLanes) {
      const float* corner[kLanes];
      for (int64_t i = 0; i < kLanes; i++) corner[i] = tile.keys[j + i] + d;
      // A line is two corners wide.
      if (d % (2 * kLanes) == 0)
        for (int64_t i = 0; i < kLanes; i++) __builtin_prefetch(next.keys[j + i] + d);
      // A panel of 16 keys, as of 16 outputs.
      transpose(corner, s.keys.data() + j / kPanel * kPanel * dim + d * kPanel + j % kPanel, kPanel);
    }
  float part[kQueryRows * kPanel];
  for (int64_t j = 0; j < kKeys; j += kPanel) {
    panel_rows(s.keys.data() + j * dim, query, rows, dim, dim, part);
    for (int64_t r = 0; r < rows; r++)
      std::memcpy(s.scores.data() + r * kKeys + j, part + r * kPanel, kPanel * sizeof(float));
  }
}

// q and out are [tokens, heads, dim], q's tokens `q_stride` floats apart.
static void attend_tile(const Pool& pool, int64_t layer, const QueryTile& work, const Heads& h, const float* q,
                        int64_t q_stride, float* out, Scratch& s) {
  const int64_t dim = pool.head_dim, group = h.heads / pool.kv_heads, rows = work.queries * group;
  const int64_t first = work.row.start + work.at, last = first + work.queries;
  const int64_t all_rows = work.kv_heads * rows;  // of scratch: KV heads, queries, heads that share the KV head
  const auto token_of = [&](int64_t r) { return work.row.first + work.at + r % rows / group; };
  const auto head_of = [&](int64_t r) { return (work.kv_head + r / rows) * group + r % group; };
  for (int64_t r = 0; r < all_rows; r++)
    std::memcpy(s.query.data() + r * dim, q + token_of(r) * q_stride + head_of(r) * dim, dim * sizeof(float));
  std::fill_n(s.most.data(), all_rows, -INFINITY);
  std::fill_n(s.total.data(), all_rows, 0.0f);
  std::fill_n(s.out.data(), all_rows * dim, 0.0f);
  const int64_t seen_from = h.window ? std::max<int64_t>(0, first - h.window + 1) : 0;
  const int64_t begin = seen_from / kKeys * kKeys, tiles = (last - begin + kKeys - 1) / kKeys * work.kv_heads;
  KeyTile found[2];
  const auto find = [&](int64_t i) {
    found[i % 2].find(pool, layer, work.row.table, work.kv_head + i % work.kv_heads, begin + i / work.kv_heads * kKeys,
                      seen_from, last, s.zeros.data());
  };
  find(0);
  for (int64_t i = 0; i < tiles; i++) {
    find(i + 1);
    const KeyTile &tile = found[i % 2], &next = found[1 - i % 2];
    const int64_t base = begin + i / work.kv_heads * kKeys, at = i % work.kv_heads * rows;
    score(tile, next, s.query.data() + at * dim, rows, dim, s);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t position = first + r / group;
      const int64_t from = h.window ? std::max<int64_t>(0, position - h.window + 1 - base) : 0;
      soften(s, r, at + r, from, position + 1 - base, dim, h.scaling);
    }
    const int64_t present = std::min(kKeys, last - base);
    for (int64_t d = 0; d < dim; d += kPanel)
      add_values_rows(tile, next, d, present, s.scores.data(), s.out.data() + at * dim + d, dim, rows);
  }
  for (int64_t r = 0; r < all_rows; r++) {
    float* to = out + (token_of(r) * h.heads + head_of(r)) * dim;
    for (int64_t d = 0; d < dim; d++) to[d] = s.out[r * dim + d] / s.total[r];
  }
}

}  // namespace mell
