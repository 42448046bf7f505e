// Vectors of eight floats in the compiler's own vector types: the same sums in the same order on every machine.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mell {

constexpr int64_t kLanes = 8;

// aligned(4): tensors promise no more than the alignment of a float.
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(32)));

static inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
// Not `Vec{} + x`: without fast math that is an addition.
static inline Vec all(float x) { return Vec{x, x, x, x, x, x, x, x}; }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

static inline float sum(Vec v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

static inline float largest(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; i++) most = v[i] > most ? v[i] : most;
  return most;
}

// e^x to about 1e-7 (relative); exactly 0 below -87, finite up to 88; NaN stays NaN.
// Range reduction and coefficients as in S. Moshier's Cephes library, expf.
static inline Vec exponential(Vec x) {
  const Vec low = all(-87.0f), high = all(88.0f);
  const auto vanishes = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec n = (x * 1.44269504088896341f + magic) - magic;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return vanishes ? all(0.0f) : p * scale;
}

// Write 8 rows of 8 floats as columns of a panel `stride` floats wide.
static inline void transpose(const float* const rows[8], float* out, int64_t stride) {
#if defined(__AVX2__)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(rows[i]);
  for (int i = 0; i < 4; i++) {
    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 2; j++) {
      a[4 * i + 2 * j] = _mm256_shuffle_ps(b[4 * i + j], b[4 * i + 2 + j], 0x44);
      a[4 * i + 2 * j + 1] = _mm256_shuffle_ps(b[4 * i + j], b[4 * i + 2 + j], 0xee);
    }
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(out + i * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
#else
  for (int64_t d = 0; d < 8; d++)
    for (int64_t i = 0; i < 8; i++) out[d * stride + i] = rows[i][d];
#endif
}

}  // namespace mell
