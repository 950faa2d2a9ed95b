// A model's input: images x channels x height x width, wherever its numbers lie.
#pragma once
#include "common.h"

namespace {

template <class Number> struct Pictures {
  const Number* start;
  long image_stride, channel_stride, row_stride, column_stride;

  // Rows [y0 - 1, y0 + rows + 1) of an image to band [rows + 2][pitch], channels last, each number through `convert`. One
  // pixel before a row and what lies behind it stay as they are; rows outside the picture are zeros.
  template <class To, class F>
  void copy_band(long image, long y0, long rows, long height, long width, long channels, To* band, long pitch,
                 F&& convert) const {
    for (long y = y0 - 1; y < y0 + rows + 1; y++, band += pitch) {
      if (y < 0 || y >= height) {
        memset(band, 0, pitch * sizeof(To));
        continue;
      }
      const Number* from = start + image * image_stride + y * row_stride;
      for (long c = 0; c < channels; c++)
        for (long x = 0; x < width; x++) band[(x + 1) * channels + c] = convert(from[c * channel_stride + x * column_stride]);
    }
  }
};

}  // namespace
