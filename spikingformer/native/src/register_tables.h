// Sums of subsets looked up in registers, where the processor permutes whole registers (AVX-512): the same time at any rate.
//
// For one output and a group of five inputs, the sums of all 32 subsets of the five weights are a table of two registers.
// Lanes are tokens; five spikes of a token are an index, and one permutation looks up 16 tokens at once. Sums stay in
// registers over all inputs, and nothing is read at random places: hence twice to three times the speed of tables in the
// first-level cache. The weight gradient is the same with tokens and channels exchanged.
#pragma once
#include "spikes.h"

#if SPK_VECTOR_BYTES == 64 && defined(__AVX512F__)
#define SPK_HAS_REGISTER_TABLES 1

namespace {

constexpr long kGroup = 5;                       // inputs of a table
constexpr long kWordGroups = 6;                  // groups of a 32-bit lane of spikes
constexpr long kWordInputs = kGroup * kWordGroups;
constexpr long kLookUpVectors = 8;               // of 16 lanes, times two outputs: sums held in registers
constexpr long kLookUpLanes = kLookUpVectors * 16;
constexpr long kTable = 32;                      // sums of a table

SPK_INLINE __m512i look_up(__m512i low, __m512i index, __m512i high) { return _mm512_permutex2var_epi32(low, index, high); }
SPK_INLINE __m512 look_up(__m512 low, __m512i index, __m512 high) { return _mm512_permutex2var_ps(low, index, high); }
SPK_INLINE __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
SPK_INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
template <class Scalar> struct Whole;  // a register of them
template <> struct Whole<int32_t> {
  typedef __m512i type;
  static SPK_INLINE type zero() { return _mm512_setzero_si512(); }
  static SPK_INLINE type load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static SPK_INLINE void store(int32_t* p, type v) { _mm512_storeu_si512(p, v); }
  static SPK_INLINE type all(int32_t v) { return _mm512_set1_epi32(v); }
  static SPK_INLINE type add_where(__mmask16 m, type a, int32_t v) { return _mm512_mask_add_epi32(a, m, a, all(v)); }
};
template <> struct Whole<float> {
  typedef __m512 type;
  static SPK_INLINE type zero() { return _mm512_setzero_ps(); }
  static SPK_INLINE type load(const float* p) { return _mm512_loadu_ps(p); }
  static SPK_INLINE void store(float* p, type v) { _mm512_storeu_ps(p, v); }
  static SPK_INLINE type all(float v) { return _mm512_set1_ps(v); }
  static SPK_INLINE type add_where(__mmask16 m, type a, float v) { return _mm512_mask_add_ps(a, m, a, all(v)); }
};

// table[subset] = sum of the subset of five numbers, `step` apart
template <class Scalar> SPK_INLINE void make_table(const Scalar* w, long step, Scalar* table) {
  typedef Whole<Scalar> W;
  typename W::type t = W::add_where(0xaaaa, W::zero(), w[0]);
  t = W::add_where(0xcccc, t, w[step]);
  t = W::add_where(0xf0f0, t, w[2 * step]);
  t = W::add_where(0xff00, t, w[3 * step]);
  W::store(table, t);
  W::store(table + 16, add(t, W::all(w[4 * step])));
}

// Tables of `groups` groups of two outputs, [group][2][kTable]; an output's numbers lie `step` apart.
template <class Scalar>
__attribute__((noinline)) void make_two_tables(const Scalar* a, const Scalar* b, long step, long groups, Scalar* tables) {
  for (const Scalar* end = tables + groups * 2 * kTable; tables < end; tables += 2 * kTable) {
    make_table(a, step, tables);
    make_table(b, step, tables + kTable);
    a += kGroup * step;
    b += kGroup * step;
  }
}

// The spikes that a block of lanes reads through a tap: `shift` further on, where `lanes` has a bit.
struct LookUpTap {
  long shift;
  uint16_t lanes[kLookUpVectors];
};

// sums[output][V * 16] of two outputs over taps and groups. spikes: [word][pitch], 30 inputs a lane, at the block's first
// lane; tables: [tap][group][2][kTable]. Never inlined: among other code the compiler keeps sums in memory.
template <int V, class Scalar>
__attribute__((noinline)) void look_up_block(const uint32_t* spikes, long pitch, const LookUpTap* taps, long tap_count,
                                             long groups, const Scalar* tables, Scalar* sums, long sums_pitch, bool fresh) {
  typedef Whole<Scalar> W;
  typename W::type a[V], b[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    a[v] = fresh ? W::zero() : W::load(sums + v * 16);
    b[v] = fresh ? W::zero() : W::load(sums + sums_pitch + v * 16);
  }
  for (const LookUpTap* tap = taps; tap < taps + tap_count; tap++) {
    const uint32_t* from = spikes + tap->shift;
    for (long left = groups; left > 0; left -= kWordGroups, from += pitch) {
      __m512i index[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) index[v] = _mm512_maskz_loadu_epi32(tap->lanes[v], from + v * 16);
#pragma GCC unroll 1
      for (long g = minimum(left, kWordGroups); g > 0; g--, tables += 2 * kTable) {
        const typename W::type a0 = W::load(tables), a1 = W::load(tables + 16), b0 = W::load(tables + 32),
                               b1 = W::load(tables + 48);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
          a[v] = add(a[v], look_up(a0, index[v], a1));
          asm("" : "+v"(a[v]));  // else the compiler adds in another order and runs out of registers
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
          b[v] = add(b[v], look_up(b0, index[v], b1));
          asm("" : "+v"(b[v]));
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) index[v] = _mm512_srli_epi32(index[v], kGroup);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    W::store(sums + v * 16, a[v]);
    W::store(sums + sums_pitch + v * 16, b[v]);
  }
}

// rows[i] lane j becomes rows[j] lane i.
SPK_INLINE void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  __m512i u[16];  // u[4 * i + k]: lanes 4 * q + k of rows 4 * i.. in quarter q
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    const __m512i a = _mm512_shuffle_i32x4(u[k], u[4 + k], 0x88), b = _mm512_shuffle_i32x4(u[8 + k], u[12 + k], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(u[k], u[4 + k], 0xdd), d = _mm512_shuffle_i32x4(u[8 + k], u[12 + k], 0xdd);
    rows[k] = _mm512_shuffle_i32x4(a, b, 0x88);
    rows[8 + k] = _mm512_shuffle_i32x4(a, b, 0xdd);
    rows[4 + k] = _mm512_shuffle_i32x4(c, d, 0x88);
    rows[12 + k] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }
}

SPK_INLINE long groups_of(long inputs) { return (inputs + kGroup - 1) / kGroup; }
SPK_INLINE long look_up_words(long inputs) { return (inputs + kWordInputs - 1) / kWordInputs; }

}  // namespace
#endif
