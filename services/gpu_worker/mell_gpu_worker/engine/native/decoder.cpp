// One step of a Llama-shaped decoder in float32: all layers in one call, in one parallel region.
//
// Mirrors transformers' modeling_llama, modeling_mistral, modeling_qwen2 and modeling_qwen3, whose weights it reads
// (packed, see linear.h); the engine compares its logits with theirs before it serves.

#include "attention.h"
#include "draw.h"

namespace mell {

struct Layer {
  const float* norm_before_attention;
  const float* norm_before_mlp;
  const float* query_norm;  // [head_dim], or null
  const float* key_norm;
  Linear query, key, value, output, gate, up, down;
  int64_t window;
  float scaling;
};

struct Decoder {
  const Layer* layers;
  int64_t layer_count;
  int64_t hidden;
  int64_t heads;
  float epsilon;
  const float* final_norm;
  const float* embedding;  // [vocab, hidden]; null: the head's panels hold it too
  Linear head;
};

struct Step {
  int64_t tokens;
  const int64_t* ids;        // [tokens]
  const int64_t* positions;  // [tokens]
  const float* cosines;      // [positions, head_dim]
  const float* sines;
  int64_t rows;
  const int64_t* counts;   // [rows] tokens of each row
  const int64_t* lengths;  // [rows] blocks of each row's table, which follow each other in `tables`
  const int64_t* tables;
  int64_t kept_count;
  const int64_t* kept;  // packed tokens whose logits are wanted
  float* logits;        // [kept, vocab]
  float* workspace;     // see mell_workspace
  int64_t threads;
};

// out = x / sqrt(mean(x^2) + epsilon) * weight.
static void normalise(const float* x, const float* weight, float epsilon, int64_t size, float* out) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; i++) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + epsilon);
  for (i = 0; i < size; i++) out[i] = weight[i] * (x[i] * scale);
}

static void normalise_all(const float* x, const float* weight, float epsilon, int64_t size, int64_t rows, float* out) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < rows; t++) normalise(x + t * size, weight, epsilon, size, out + t * size);
}

// x cos + rotate_half(x) sin, in place.
static void rotate(float* x, const float* cosines, const float* sines, int64_t dim) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i + half] + a * sines[i + half];
  }
}

// Where the parts of a step's workspace lie.
struct Buffers {
  float *x, *normed, *qkv, *attended, *inner, *picked;
  int64_t qkv_size;

  Buffers(const Decoder& m, const Pool& pool, const Step& s) {
    const Layer& layer = m.layers[0];
    qkv_size = layer.query.outputs + layer.key.outputs + layer.value.outputs;
    x = s.workspace;
    normed = x + s.tokens * m.hidden;
    qkv = normed + s.tokens * m.hidden;
    attended = qkv + s.tokens * qkv_size;
    inner = attended + s.tokens * m.heads * pool.head_dim;
    picked = inner + s.tokens * layer.gate.outputs;
  }
};

static void embed(const Decoder& m, const Step& s, float* x) {
#pragma omp for schedule(static)
  for (int64_t t = 0; t < s.tokens; t++) {
    const int64_t id = s.ids[t];
    float* to = x + t * m.hidden;
    if (m.embedding) {
      std::memcpy(to, m.embedding + id * m.hidden, m.hidden * sizeof(float));
    } else {
      const float* column = m.head.panels + id / kPanel * kPanel * m.hidden + id % kPanel;
      for (int64_t i = 0; i < m.hidden; i++) to[i] = column[i * kPanel];
    }
  }
}

// Queries, keys and values of all tokens; keys and values also go to the pool.
static void project(const Decoder& m, const Layer& layer, int64_t index, const Pool& pool, const Step& s,
                    const std::vector<Row>& row_of, const Buffers& b) {
  const int64_t queries = panel_count(layer.query.outputs), keys = panel_count(layer.key.outputs);
  for_items(queries + 2 * keys, s.tokens, [&](int64_t item, int64_t first, int64_t count) {
    const bool is_query = item < queries, is_key = !is_query && item < queries + keys;
    const Linear& w = is_query ? layer.query : is_key ? layer.key : layer.value;
    const int64_t panel = is_query ? item : is_key ? item - queries : item - queries - keys;
    const int64_t offset = is_query ? 0 : layer.query.outputs + (is_key ? 0 : layer.key.outputs);
    float out[kItemRows * kPanel];
    outputs_of(w, panel, b.normed + first * m.hidden, count, out);
    const int64_t width = std::min(kPanel, w.outputs - panel * kPanel);
    for (int64_t t = 0; t < count; t++)
      std::memcpy(b.qkv + (first + t) * b.qkv_size + offset + panel * kPanel, out + t * kPanel, width * sizeof(float));
  });
  const int64_t dim = pool.head_dim, kv_size = pool.kv_heads * dim;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < s.tokens; t++) {
    float* q = b.qkv + t * b.qkv_size;
    const float *cosines = s.cosines + s.positions[t] * dim, *sines = s.sines + s.positions[t] * dim;
    for (int64_t head = 0; head < m.heads + pool.kv_heads; head++) {
      const float* weight = head < m.heads ? layer.query_norm : layer.key_norm;
      if (weight) normalise(q + head * dim, weight, m.epsilon, dim, q + head * dim);
      rotate(q + head * dim, cosines, sines, dim);
    }
    float* to = pool.keys(index, row_of[t].table, s.positions[t]);
    std::memcpy(to, q + m.heads * dim, kv_size * sizeof(float));
    std::memcpy(to + pool.page, q + m.heads * dim + kv_size, kv_size * sizeof(float));
  }
}

static void attend(const Decoder& m, const Layer& layer, int64_t index, const Pool& pool,
                   const std::vector<QueryTile>& tiles, const Buffers& b, Scratch& scratch) {
  const Heads heads{m.heads, layer.window, layer.scaling};
#pragma omp for schedule(dynamic, 1)
  for (size_t i = 0; i < tiles.size(); i++)
    attend_tile(pool, index, tiles[i], heads, b.qkv, b.qkv_size, b.attended, scratch);
}

static void run_layer(const Decoder& m, int64_t index, const Pool& pool, const Step& s, const std::vector<Row>& row_of,
                      const std::vector<QueryTile>& tiles, const Buffers& b, Scratch& scratch) {
  const Layer& layer = m.layers[index];
  normalise_all(b.x, layer.norm_before_attention, m.epsilon, m.hidden, s.tokens, b.normed);
  project(m, layer, index, pool, s, row_of, b);
  attend(m, layer, index, pool, tiles, b, scratch);
  apply<true>(layer.output, b.attended, s.tokens, b.x, m.hidden);
  normalise_all(b.x, layer.norm_before_mlp, m.epsilon, m.hidden, s.tokens, b.normed);
  apply_gated(layer.gate, layer.up, b.normed, s.tokens, b.inner);
  apply<true>(layer.down, b.inner, s.tokens, b.x, m.hidden);
}

static void choose_logits(const Decoder& m, const Step& s, const Buffers& b) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < s.kept_count; i++)
    normalise(b.x + s.kept[i] * m.hidden, m.final_norm, m.epsilon, m.hidden, b.picked + i * m.hidden);
  apply<false>(m.head, b.picked, s.kept_count, s.logits, m.head.outputs);
}

}  // namespace mell

extern "C" {

// Sizes of the structures that cross this boundary, for the other side to compare.
void mell_sizes(int64_t* sizes) {
  sizes[0] = sizeof(mell::Layer);
  sizes[1] = sizeof(mell::Decoder);
  sizes[2] = sizeof(mell::Pool);
  sizes[3] = sizeof(mell::Step);
  sizes[4] = sizeof(mell::Draw);
}

// Write a token for each row of logits.
void mell_draw(const mell::Draw* draw) {
#pragma omp parallel num_threads(draw->threads)
  {
    mell::Weights weights;
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < draw->rows; row++) draw->tokens[row] = mell::draw_row(*draw, row, weights);
  }
}

// Write the step's keys and values to the pool, and the logits asked for.
void mell_step(const mell::Decoder* decoder, const mell::Pool* pool, const mell::Step* step) {
  using namespace mell;
  std::vector<Row> row_of;
  std::vector<QueryTile> tiles;
  const int64_t group = decoder->heads / pool->kv_heads, most = std::max<int64_t>(1, kQueryRows / group);
  const int64_t* table = step->tables;
  for (int64_t r = 0; r < step->rows; r++) {
    const int64_t first = static_cast<int64_t>(row_of.size());
    const Row row{first, step->positions[first], step->counts[r], table};
    table += step->lengths[r];
    for (int64_t at = 0; at < row.count; at += most) {
      const int64_t queries = std::min(most, row.count - at);
      // A position's KV heads lie beside each other: read at once where that leaves the threads enough to share.
      const int64_t together = step->rows < 2 * step->threads ? 1 : std::max<int64_t>(1, kQueryRows / (queries * group));
      for (int64_t head = 0; head < pool->kv_heads; head += together)
        tiles.push_back({row, at, queries, head, std::min(together, pool->kv_heads - head)});
    }
    row_of.insert(row_of.end(), row.count, row);
  }
  const Buffers buffers(*decoder, *pool, *step);
#pragma omp parallel num_threads(step->threads)
  {
    Scratch scratch(kQueryRows, pool->head_dim);
    embed(*decoder, *step, buffers.x);
    for (int64_t layer = 0; layer < decoder->layer_count; layer++)
      run_layer(*decoder, layer, *pool, *step, row_of, tiles, buffers, scratch);
    choose_logits(*decoder, *step, buffers);
  }
}
}
