// Vectors of int16 lanes, for the integer form of inference.
#pragma once
#include "spikes.h"

namespace {

typedef int16_t Short __attribute__((vector_size(SPK_VECTOR_BYTES)));
typedef int16_t ShortHalf __attribute__((vector_size(SPK_VECTOR_BYTES / 2)));
typedef int8_t Bytes __attribute__((vector_size(SPK_VECTOR_BYTES / 2)));  // as many lanes as Short
typedef Float::Integer Int;
constexpr long SL = SPK_VECTOR_BYTES / 2, FL = Float::lanes;

SPK_INLINE Short load_short(const int16_t* p) {
  Short v;
  memcpy(&v, p, sizeof v);
  return v;
}
SPK_INLINE Short load_short(const int16_t* p, long n) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)  // a copy of unknown size is a call
  return (Short)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
#else
  Short v = {};
  memcpy(&v, p, n * 2);
  return v;
#endif
}
SPK_INLINE Short splat_short(int v) { return (int16_t)v - (Short){}; }
SPK_INLINE Int low(Short v) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  return (Int)_mm512_cvtepi16_epi32(_mm512_castsi512_si256((__m512i)v));
#else
  ShortHalf h;
  memcpy(&h, &v, sizeof h);
  return __builtin_convertvector(h, Int);
#endif
}
SPK_INLINE Int high(Short v) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  return (Int)_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64((__m512i)v, 1));
#else
  ShortHalf h;
  memcpy(&h, (const char*)&v + sizeof h, sizeof h);
  return __builtin_convertvector(h, Int);
#endif
}
// GCC splits __builtin_convertvector in halves here, at twice the cost: hence the intrinsics.
SPK_INLINE Short widen(const int8_t* p) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  return (Short)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (Short)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  Bytes b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, Short);
#endif
}
SPK_INLINE Short join(Int a, Int b) {  // both within int16
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  const __m512i places = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
  return (Short)_mm512_permutexvar_epi64(places, _mm512_packs_epi32((__m512i)a, (__m512i)b));
#elif SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (Short)_mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)a, (__m256i)b), 0xd8);
#else
  ShortHalf l = __builtin_convertvector(a, ShortHalf), h = __builtin_convertvector(b, ShortHalf);
  Short v;
  memcpy(&v, &l, sizeof l);
  memcpy((char*)&v + sizeof l, &h, sizeof h);
  return v;
#endif
}
SPK_INLINE Short select_short(Short mask, Short a, Short b) { return (mask & a) | (~mask & b); }
SPK_INLINE Short max_short(Short a, Short b) { return select_short(a > b, a, b); }
// Of two terms >= 0, at most 2^15 - 1.
SPK_INLINE Short add_saturated(Short a, Short b) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  return (Short)_mm512_adds_epi16((__m512i)a, (__m512i)b);
#elif SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (Short)_mm256_adds_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Short)_mm_adds_epi16((__m128i)a, (__m128i)b);
#else
  Short sum = a + b;
  return select_short(sum < a, splat_short(32767), sum);
#endif
}
SPK_INLINE Int clamp_int(Int v, int lowest, int highest) {
  Int a = lowest - (Int){}, b = highest - (Int){};
  v = (v < a) ? a : v;
  return (v > b) ? b : v;
}
// The sign bits of SL lanes, lane 0 in bit 0.
SPK_INLINE uint32_t short_bits(Short mask) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  return _mm512_movepi16_mask((__m512i)mask);
#elif SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
  __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16((__m256i)mask, _mm256_setzero_si256()), 0xd8);
  return (uint32_t)_mm256_movemask_epi8(bytes) & 0xffffu;
#elif defined(__x86_64__)
  return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16((__m128i)mask, _mm_setzero_si128()));
#else
  uint32_t bits = 0;
  for (long i = 0; i < SL; i++) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}
// 0/1 lanes from SL bits.
SPK_INLINE Short lanes_of(uint64_t bits) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  return (Short)_mm512_maskz_set1_epi16((__mmask32)bits, 1);
#else
  Short places;
  for (long i = 0; i < SL; i++) places[i] = (int16_t)(1 << i);
  return ((splat_short((int16_t)bits) & places) == places) & 1;
#endif
}

}  // namespace
