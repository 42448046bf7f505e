// Matrix products over weights packed in panels of 16 outputs, each [inputs, 16]: read once, in order, whatever the batch.
//
// An output is one sum over the inputs, in their order, in one lane: it does not depend on how many rows are computed
// together, so a sequence's numbers are the same alone and in any batch. All functions here run inside a parallel
// region, and all threads of it must call them: `omp for` shares the work out and waits at its end.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace mell {

constexpr int64_t kPanel = 16;
// Rows of one work item, a multiple of the largest tile: enough to pay for fetching a panel, few enough to share out.
constexpr int64_t kItemRows = 96;
constexpr int kTileRows = 6;

struct Linear {
  const float* panels;  // [ceil(outputs / 16), inputs, 16], absent outputs are zero
  const float* bias;    // [ceil(outputs / 16) * 16], or null
  int64_t outputs;
  int64_t inputs;
};

static inline int64_t panel_count(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// M rows of x (a stride apart) times one panel, into out [M, 16].
template <int M>
static inline __attribute__((always_inline)) void tile(const float* __restrict panel, const float* __restrict x,
                                                       int64_t inputs, int64_t stride, float* __restrict out) {
  Vec sums[M][2] = {};
  for (int64_t k = 0; k < inputs; k++) {
    const Vec left = load(panel + k * kPanel), right = load(panel + k * kPanel + kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const Vec input = all(x[m * stride + k]);
      sums[m][0] += left * input;
      sums[m][1] += right * input;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    store(out + m * kPanel, sums[m][0]);
    store(out + m * kPanel + kLanes, sums[m][1]);
  }
}

// `rows` rows of x times one panel, into out [rows, 16].
static inline void panel_rows(const float* panel, const float* x, int64_t rows, int64_t inputs, int64_t stride,
                              float* out) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) tile<kTileRows>(panel, x + m * stride, inputs, stride, out + m * kPanel);
  x += m * stride;
  out += m * kPanel;
  switch (rows - m) {
    case 5: return tile<5>(panel, x, inputs, stride, out);
    case 4: return tile<4>(panel, x, inputs, stride, out);
    case 3: return tile<3>(panel, x, inputs, stride, out);
    case 2: return tile<2>(panel, x, inputs, stride, out);
    case 1: return tile<1>(panel, x, inputs, stride, out);
    default: return;
  }
}

// One panel's outputs for some rows, bias included, into out [rows, 16].
static inline void outputs_of(const Linear& w, int64_t panel, const float* x, int64_t rows, float* out) {
  panel_rows(w.panels + panel * kPanel * w.inputs, x, rows, w.inputs, w.inputs, out);
  if (!w.bias) return;
  for (int64_t m = 0; m < rows; m++)
    for (int64_t i = 0; i < kPanel; i++) out[m * kPanel + i] += w.bias[panel * kPanel + i];
}

// Calls item(panel, first row, rows) for all panels and rows, shared among the region's threads.
template <class Item>
static void for_items(int64_t panels, int64_t rows, const Item& item) {
  const int64_t groups = (rows + kItemRows - 1) / kItemRows;
#pragma omp for schedule(dynamic, 2)
  for (int64_t i = 0; i < panels * groups; i++) {
    const int64_t first = i / panels * kItemRows;
    item(i % panels, first, std::min(kItemRows, rows - first));
  }
}

// y[rows, stride] (+)= x[rows, inputs] * w.
template <bool ADD>
static void apply(const Linear& w, const float* x, int64_t rows, float* y, int64_t stride) {
  for_items(panel_count(w.outputs), rows, [&](int64_t panel, int64_t first, int64_t count) {
    float out[kItemRows * kPanel];
    outputs_of(w, panel, x + first * w.inputs, count, out);
    const int64_t width = std::min(kPanel, w.outputs - panel * kPanel);
    for (int64_t m = 0; m < count; m++) {
      float* to = y + (first + m) * stride + panel * kPanel;
      for (int64_t i = 0; i < width; i++) to[i] = (ADD ? to[i] : 0.0f) + out[m * kPanel + i];
    }
  });
}

// y[rows, outputs] = silu(x * gate) * (x * up).
static void apply_gated(const Linear& gate, const Linear& up, const float* x, int64_t rows, float* y) {
  for_items(panel_count(gate.outputs), rows, [&](int64_t panel, int64_t first, int64_t count) {
    float gates[kItemRows * kPanel], ups[kItemRows * kPanel];
    outputs_of(gate, panel, x + first * gate.inputs, count, gates);
    outputs_of(up, panel, x + first * gate.inputs, count, ups);
    for (int64_t i = 0; i < count * kPanel; i += kLanes) {
      const Vec g = load(gates + i);
      store(ups + i, g / (1.0f + exponential(-g)) * load(ups + i));
    }
    const int64_t width = std::min(kPanel, gate.outputs - panel * kPanel);
    for (int64_t m = 0; m < count; m++)
      std::memcpy(y + (first + m) * gate.outputs + panel * kPanel, ups + m * kPanel, width * sizeof(float));
  });
}

}  // namespace mell
