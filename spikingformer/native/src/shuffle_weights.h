// Weights and tables for products by byte shuffles (shuffle_product.h): the order in which an output's groups of four
// inputs are added, and the sums of subsets of a group's weights.
#pragma once
#include <algorithm>

#include "product_args.h"

namespace {

constexpr long kSegmentGroups = 128;         // 128 * 4 * 127 < 2^16; their indices and tables fit the first-level cache
constexpr long kHeld = 8;                    // 8 * 31 < 2^8: groups whose lower or upper parts a byte holds
constexpr long kPairGrain = 4;
constexpr long kTileOutputs = 8;             // that are turned to rows of tokens together
constexpr long kMaxTable = 32;               // bytes of a group and output
constexpr long kSlack = 32;                  // bytes that may be read past the last weights

// Groups of four inputs: tap * ceil(C / 4) + channel / 4, cut into segments of one size; groups past the last one have
// weights of zero.
struct Segments {
  long groups, count, size;
  Segments(long channels, long taps)
      : groups(taps * ((channels + 3) / 4)), count((groups + kSegmentGroups - 1) / kSegmentGroups),
        size((groups + count - 1) / count) {}
  long padded() const { return count * size; }
};

// How the groups of an output and segment are added: first pairs, then single ones, then those of two tables.
struct RowPlan {
  int32_t smallest;  // the sum of the negative weights
  uint16_t pairs, singles;
};

// The weights once more: a header; plans [outputs, padded to tiles][segments]; groups in the order of their plan,
// [outputs, padded][segments][size][4] and their places within the segment [outputs, padded][segments][size].
struct PackedRows {
  int32_t* narrow;  // whether all sums fit int16 and all currents int32
  RowPlan* plans;
  int8_t* weights;
  uint8_t* places;
  long bytes;
  PackedRows(void* memory, const Segments& s, long outputs) {
    const long padded = round_up(outputs, kTileOutputs);
    uint8_t* at = (uint8_t*)memory;
    narrow = (int32_t*)at;
    plans = (RowPlan*)(at + 16);
    weights = (int8_t*)(plans + padded * s.count);
    places = (uint8_t*)(weights + padded * s.padded() * 4 + kSlack);
    bytes = (long)(places + padded * s.padded() + kSlack - at);
  }
};

struct WeightGroup {
  int size;  // the absolute sum
  uint8_t place;
  int8_t weights[4];
};

// The order of a segment's groups: the largest with the smallest, or alone; those of nine bits at the end, with as many
// others as fill their last byte. Pairs come in fours, so that the loops of other outputs are often as long, which the
// processor can foresee; where pairs promise nothing over two tables for all, two tables for all are always as long.
RowPlan plan_groups(WeightGroup* groups, long n, const WeightGroup** order) {
  std::stable_sort(groups, groups + n, [](const WeightGroup& a, const WeightGroup& b) { return a.size < b.size; });
  long end = n;
  while (end && groups[end - 1].size > 255) end--;
  end = maximum(0, n - round_up(n - end, kHeld));
  long pairs = 0, singles = 0, left = 0, right = end - 1;
  const WeightGroup* alone[kSegmentGroups];
  for (; left < right; right--) {
    if (groups[left].size + groups[right].size <= 255) {
      order[2 * pairs] = groups + left++;
      order[2 * pairs++ + 1] = groups + right;
    } else {
      alone[singles++] = groups + right;
    }
  }
  if (left == right) alone[singles++] = groups + left;
  while (pairs % kPairGrain) {
    alone[singles++] = order[2 * --pairs];
    alone[singles++] = order[2 * pairs + 1];
  }
  // Measured cycles a group and vector (EPYC 7003), and three loops that end unforeseen.
  if (2 * pairs * 1.1 + singles * 1.3 + (n - end) * 1.65 + 12 > n * 1.65) pairs = singles = end = 0;
  for (long i = 0; i < singles; i++) order[2 * pairs + i] = alone[i];
  for (long i = end; i < n; i++) order[i] = groups + i;
  return {0, (uint16_t)pairs, (uint16_t)singles};
}

// weight: int8 [outputs][taps][channels]
void pack_rows(const int8_t* weight, const float* scale, const float* bias, long outputs, long channels, long taps,
               const PackedRows& rows) {
  const Segments s(channels, taps);
  const long quads = (channels + 3) / 4;
  bool narrow = true;
  for (long o = 0; o < outputs; o++) {
    long positive = 0, negative = 0;
    for (long part = 0; part < s.count; part++) {
      WeightGroup groups[kSegmentGroups];
      const WeightGroup* order[kSegmentGroups];
      long smallest = 0;
      for (long i = 0; i < s.size; i++) {
        const long g = part * s.size + i, tap = g / quads, c0 = g % quads * 4;
        groups[i] = {0, (uint8_t)i, {0, 0, 0, 0}};
        for (long j = 0; g < s.groups && j < minimum(4, channels - c0); j++) {
          const int w = weight[(o * taps + tap) * channels + c0 + j];
          groups[i].weights[j] = (int8_t)w;
          groups[i].size += w < 0 ? -w : w;
          (w < 0 ? smallest : positive) += w;
        }
      }
      negative += smallest;
      RowPlan& plan = rows.plans[o * s.count + part];
      plan = plan_groups(groups, s.size, order);
      plan.smallest = (int32_t)smallest;
      for (long i = 0; i < s.size; i++) {
        const long at = (o * s.count + part) * s.size + i;
        memcpy(rows.weights + at * 4, order[i]->weights, 4);
        rows.places[at] = order[i]->place;
      }
    }
    const double largest = (double)maximum(positive, -negative);
    const double current = largest * scale[o] + (bias[o] < 0 ? -bias[o] : bias[o]);
    narrow = narrow && largest <= 32767 && current < 1e9;
  }
  *rows.narrow = narrow;
}

// ---- tables ---------------------------------------------------------------------------------------------------------

// Two groups' sums of subsets less the smallest, byte k of a half for subset k: of the weights 0 and 1, and 2 and 3.
struct SubsetSums {
  __m256i pick[4], lowest[2];
  SubsetSums() {
    for (int i = 0; i < 4; i++) {
      alignas(32) int8_t places[32];  // weight i where k has bit i
      for (int k = 0; k < 32; k++) places[k] = (int8_t)((k >> i & 1) ? i + k / 16 * 4 : -1);
      pick[i] = _mm256_load_si256((const __m256i*)places);
    }
    for (int half = 0; half < 2; half++) {
      alignas(32) int8_t places[32];
      for (int k = 0; k < 32; k++) places[k] = (int8_t)(half * 2 + k / 16 * 4);
      lowest[half] = _mm256_load_si256((const __m256i*)places);
    }
  }
  SPK_INLINE void of(const int8_t* weights, __m256i& a, __m256i& b) const {
    int64_t both;
    memcpy(&both, weights, 8);
    const __m256i w = _mm256_set1_epi64x(both);
    const __m256i negative = _mm256_min_epi8(w, _mm256_setzero_si256());
    const __m256i smallest = _mm256_maddubs_epi16(_mm256_set1_epi8(1), negative);  // of two weights: a byte, -254 is 2
    a = _mm256_add_epi8(_mm256_shuffle_epi8(w, pick[0]), _mm256_shuffle_epi8(w, pick[1]));
    b = _mm256_add_epi8(_mm256_shuffle_epi8(w, pick[2]), _mm256_shuffle_epi8(w, pick[3]));
    a = _mm256_sub_epi8(a, _mm256_shuffle_epi8(smallest, lowest[0]));
    b = _mm256_sub_epi8(b, _mm256_shuffle_epi8(smallest, lowest[1]));
  }
};

// Tables of groups whose sums have eight bits: 16 bytes each. May write one table too far.
SPK_INLINE void fill_byte_tables(const int8_t* weights, long groups, uint8_t* tables) {
  const SubsetSums sums;
  for (long g = 0; g < groups; g += 2) {
    __m256i a, b;
    sums.of(weights + g * 4, a, b);
    _mm256_storeu_si256((__m256i*)(tables + g * 16), _mm256_add_epi8(a, b));
  }
}

// Tables of groups whose sums have nine bits, for every two of them: 2 x 16 bytes of the lower four bits, 2 x 16 of the
// upper five. May write one group too far.
SPK_INLINE void fill_split_tables(const int8_t* weights, long groups, uint8_t* tables) {
  const SubsetSums sums;
  for (long g = 0; g < groups; g += 2) {
    __m256i a, b;
    sums.of(weights + g * 4, a, b);
    const __m256i up = _mm256_avg_epu8(a, b), odd = _mm256_and_si256(_mm256_xor_si256(a, b), _mm256_set1_epi8(1));
    const __m256i half = _mm256_sub_epi8(up, odd);
    _mm256_storeu_si256((__m256i*)(tables + g * 32), _mm256_and_si256(_mm256_add_epi8(a, b), _mm256_set1_epi8(15)));
    _mm256_storeu_si256((__m256i*)(tables + g * 32 + 32),
                        _mm256_and_si256(_mm256_srli_epi16(half, 3), _mm256_set1_epi8(31)));
  }
}

}  // namespace
