// A model's input: images x channels x height x width, wherever its numbers lie.
#pragma once

namespace {

template <class Number> struct Pictures {
  const Number* start;
  long image_stride, channel_stride, row_stride, column_stride;

  // One row of an image to [width][channels], each number through `convert`.
  template <class To, class F> void copy_row(long image, long row, long width, long channels, To* to, F&& convert) const {
    const Number* from = start + image * image_stride + row * row_stride;
    for (long c = 0; c < channels; c++)
      for (long x = 0; x < width; x++) to[x * channels + c] = convert(from[c * channel_stride + x * column_stride]);
  }
};

}  // namespace
