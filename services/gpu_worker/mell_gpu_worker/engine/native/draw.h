// Drawing tokens from logits as draw.py defines it: one pass over a row, and a sort of its likeliest tokens only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "vectors.h"

namespace mell {

// One value a row in each array; see DrawParams.
struct Draw {
  int64_t rows, vocab;
  const float* logits;  // [rows, vocab]
  const double* temperature;
  const int64_t* top_k;
  const double* top_p;
  const double* min_p;
  const double* uniform;
  int64_t* tokens;
  int64_t threads;
};

constexpr double kWeightOne = 1099511627776.0;  // 2^40
constexpr double kNoWeight = -28.0;             // exp of less is below 2^-40
constexpr int kIdBits = 22;
constexpr uint64_t kIdMask = (uint64_t{1} << kIdBits) - 1;

typedef double DoubleVec __attribute__((vector_size(32)));
typedef int64_t LongVec __attribute__((vector_size(32)));
typedef float FloatVec __attribute__((vector_size(16), aligned(4), may_alias));
constexpr int64_t kDoubles = 4;

static inline DoubleVec all_doubles(double x) { return DoubleVec{x, x, x, x}; }

// e^x within an ulp or two, for x from kNoWeight to 0.
static inline DoubleVec exponential(DoubleVec x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, in the lowest bits
  const DoubleVec shifted = x * 1.4426950408889634 + kShift;
  const DoubleVec n = shifted - kShift;
  const DoubleVec r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  DoubleVec p = all_doubles(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = (p * r + 1.0) * r + 1.0;
  // 2^n: n, as an integer, goes where a double has its exponent.
  return p * (DoubleVec)(((LongVec)shifted + 1023) << 52);
}

// Weights of similar size lie in one bin: a power of two, and the three bits below it.
constexpr int64_t kBins = 42 * 8;
static inline int64_t bin_of(uint64_t weight) {
  if (weight < 8) return static_cast<int64_t>(weight);
  const int power = 63 - __builtin_clzll(weight);
  return power * 8 + static_cast<int64_t>(weight >> (power - 3) & 7);
}

// The least weight of a bin.
static inline uint64_t least_of(int64_t bin) {
  return bin < 8 ? static_cast<uint64_t>(bin) : static_cast<uint64_t>(8 + bin % 8) << (bin / 8 - 3);
}

static inline float largest_of(const float* x, int64_t size) {
  if (size < kLanes) return *std::max_element(x, x + size);
  Vec most = load(x);
  for (int64_t i = kLanes; i + kLanes <= size; i += kLanes) most = larger(most, load(x + i));
  return largest(larger(most, load(x + size - kLanes)));
}

// The weights of one row and, for the cuts, how they are spread; kept from row to row for its memory.
struct Weights {
  std::vector<uint64_t> each;
  std::vector<uint64_t> keys;
  int64_t counts[kBins];
  uint64_t sums[kBins];
  uint64_t total;

  void take(const float* logits, int64_t vocab, double temperature) {
    each.resize(vocab);
    total = 0;
    const double largest = static_cast<double>(largest_of(logits, vocab)) / temperature;
    int64_t id = 0;
    for (; id + kDoubles <= vocab; id += kDoubles) take_four(logits + id, temperature, largest, id, kDoubles);
    if (id < vocab) {
      float rest[kDoubles] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      std::copy(logits + id, logits + vocab, rest);
      take_four(rest, temperature, largest, id, vocab - id);
    }
  }

  void take_four(const float* logits, double temperature, double largest, int64_t id, int64_t count) {
    const FloatVec four = *reinterpret_cast<const FloatVec*>(logits);
    const DoubleVec x = __builtin_convertvector(four, DoubleVec) / temperature - largest;
    const DoubleVec none = all_doubles(kNoWeight);
    // So is what is no number: that row is refused elsewhere.
    const DoubleVec weighed = exponential(x > none ? x : none) * kWeightOne;
    for (int64_t i = 0; i < count; i++) {
      const uint64_t weight = static_cast<uint64_t>(static_cast<int64_t>(weighed[i]));
      each[id + i] = weight;
      total += weight;
    }
  }

  void spread() {
    std::fill(counts, counts + kBins, 0);
    std::fill(sums, sums + kBins, 0);
    for (const uint64_t weight : each) {
      const int64_t bin = bin_of(weight);
      counts[bin]++;
      sums[bin] += weight;
    }
  }

  // Sort, most first, at least as many of the likeliest as the cuts can keep; equal weights by id.
  void sort_likeliest(int64_t top_k, double top_p, double least) {
    const double wanted = top_p * static_cast<double>(total);
    int64_t bin = kBins, count = 0;
    uint64_t sum = 0;
    do {
      bin--;
      count += counts[bin];
      sum += sums[bin];
      if (top_k > 0 ? count >= top_k : static_cast<double>(sum) >= wanted || static_cast<double>(least_of(bin)) < least) break;
    } while (bin > 1);
    const uint64_t lowest = std::max<uint64_t>(least_of(bin), 1);
    keys.clear();
    for (size_t id = 0; id < each.size(); id++)
      if (each[id] >= lowest) keys.push_back(each[id] << kIdBits | (kIdMask - id));
    std::sort(keys.begin(), keys.end(), std::greater<uint64_t>());
    if (top_k > 0 && static_cast<int64_t>(keys.size()) > top_k) keys.resize(top_k);
  }
};

// What of `total` the row's uniform number points at; the product may round up to the total itself.
static inline uint64_t target_of(double uniform, uint64_t total) {
  return std::min(static_cast<uint64_t>(uniform * static_cast<double>(total)), total - 1);
}

static int64_t draw_whole(const Weights& weights, double uniform) {
  const uint64_t target = target_of(uniform, weights.total);
  uint64_t sum = 0;
  for (size_t id = 0; id < weights.each.size(); id++)
    if ((sum += weights.each[id]) > target) return static_cast<int64_t>(id);
  return static_cast<int64_t>(weights.each.size()) - 1;
}

static int64_t draw_cut(Weights& weights, int64_t top_k, double top_p, double min_p, double uniform) {
  const double least = min_p * kWeightOne;  // the likeliest token's weight is one
  weights.spread();
  weights.sort_likeliest(top_k, top_p, least);
  uint64_t total = weights.total;
  if (top_k > 0) {
    total = 0;
    for (const uint64_t key : weights.keys) total += key >> kIdBits;
  }
  const double wanted = top_p * static_cast<double>(total);
  uint64_t kept = 0;
  size_t count = 0;
  for (; count < weights.keys.size(); count++) {
    const uint64_t weight = weights.keys[count] >> kIdBits;
    if (!(static_cast<double>(kept) < wanted) || static_cast<double>(weight) < least) break;
    kept += weight;
  }
  const uint64_t target = kept ? target_of(uniform, kept) : 0;
  uint64_t sum = 0;
  for (size_t at = 0; at < count; at++)
    if ((sum += weights.keys[at] >> kIdBits) > target) return static_cast<int64_t>(kIdMask - (weights.keys[at] & kIdMask));
  return weights.keys.empty() ? 0 : static_cast<int64_t>(kIdMask - (weights.keys[0] & kIdMask));
}

static int64_t draw_row(const Draw& d, int64_t row, Weights& weights) {
  weights.take(d.logits + row * d.vocab, d.vocab, d.temperature[row]);
  if (!weights.total) return 0;
  const bool cut = d.top_k[row] > 0 || d.top_p[row] < 1.0 || d.min_p[row] > 0.0;
  return cut ? draw_cut(weights, d.top_k[row], d.top_p[row], d.min_p[row], d.uniform[row])
             : draw_whole(weights, d.uniform[row]);
}

}  // namespace mell
