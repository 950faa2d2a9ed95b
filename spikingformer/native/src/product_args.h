// What a product of spikes and weights is called with; layouts: spike_product.h.
#pragma once
#include "shorts.h"

namespace {

struct ProductArgs {
  const void* input;  // bits (uint64 words) or counts (uint8)
  const void* packed;
  const float* scale;  // what a unit of an output's sum is worth
  const float* bias;   // the fp32 form takes none as zeros
  void* out;
  int64_t images, height, width, channels, outputs, taps;
  int32_t counts, accumulate, max_count, threads;
  const void* rows = nullptr;  // integer form: `PackedRows` of shuffle_weights.h, or none
};

}  // namespace
