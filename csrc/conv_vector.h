// Vectors of floats for the instruction set that this file is compiled for. Only kernel files include it: all
// that is here has internal linkage, so each instruction set keeps its own copy.
#pragma once

#include <cstdint>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#define UPDP_PASTE4(a, b, c, d) a##_##b##_##c##_##d
#define UPDP_NAME(op, algorithm, dtype, isa) UPDP_PASTE4(op, algorithm, dtype, isa)
#define UPDP_UNROLL _Pragma("GCC unroll 16")

namespace updp {
namespace {

// Rows of the register tile: with two vectors of columns, as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 14;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRows = 6;
#else
constexpr int kLanes = 4;
constexpr int kRows = 5;
#endif
constexpr int kWide = 2 * kLanes;

// Data may begin anywhere: the element's alignment is all that loads and stores ask for.
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
inline Vec splat(float value) { return value - Vec{}; }

// The first `count` lanes (fewer than kLanes), zeros behind them; nothing beyond is touched.
#if defined(__AVX512F__)
inline Vec load_first(const float* from, int64_t count) {
  return Vec(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
}
inline void store_first(float* to, Vec value, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), __m512(value));
}
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
inline Vec load_first(const float* from, int64_t count) {
  return Vec(_mm256_maskload_ps(from, first_lanes(count)));
}
inline void store_first(float* to, Vec value, int64_t count) {
  _mm256_maskstore_ps(to, first_lanes(count), __m256(value));
}
#else
inline Vec load_first(const float* from, int64_t count) {
  Vec value = {};
  for (int64_t lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
}
inline void store_first(float* to, Vec value, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = value[lane];
}
#endif

inline Vec load_some(const float* from, int64_t count) {
  return count < kLanes ? load_first(from, count) : load(from);
}
inline void store_some(float* to, Vec value, int64_t count) {
  if (count < kLanes)
    store_first(to, value, count);
  else
    store(to, value);
}

// A value that is used often, loaded once: compilers may think that loading it again costs nothing.
inline Vec in_register(Vec value) {
#if defined(__x86_64__)
  __asm__("" : "+v"(value));
#endif
  return value;
}

inline Vec at_most(Vec x, float high) { return x > high ? splat(high) : x; }  // keeps a NaN
inline Vec at_least(Vec x, float low) { return x < low ? splat(low) : x; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Where part `index` of `parts` even parts of `items` begins.
inline int64_t part(int64_t items, int64_t parts, int64_t index) {
  return items / parts * index + least(items % parts, index);
}

}  // namespace
}  // namespace updp
