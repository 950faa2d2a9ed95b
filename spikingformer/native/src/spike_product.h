// Products of spikes and weights: linear and 3x3 convolution (stride 1, padding 1). A spike adds one row of weights.
//
// Tokens are pixels of one time step, row by row; spikes are bits [tokens][words_of(C)], or counts of spikes [tokens][C].
// Weights are packed [tile][tap][C][tile width]: a linear product has one tap, a convolution nine, tap (dy, dx) reading
// the pixel at (y+dy-1, x+dx-1). A block of them (some taps, some channels, one tile) that fits the first-level cache
// serves a whole chunk of tokens before the next block is touched; the chunk's sums wait in the second-level cache.
//
// Where few inputs fire, each token has a list of those that did, and adds their rows. Where many do, the sums of every
// subset of four rows are tabulated, and four bits of spikes pick one: one addition for four inputs at any rate (the
// "method of four Russians", Arlazarov et al., 1970). Counts go through tables by their two lower bits, each channel
// standing for two: its row, and twice its row; lists hold what counts have above three.
#pragma once
#include "float_product.h"
#include "integer_product.h"

namespace {

// Form: FloatProduct or IntegerProduct.
template <class Form> void product(const ProductArgs& a) {
  const Tiles tiles = product_tiles(a.outputs, Form::lanes);
  const ListBlocks blocks(tiles, a.channels, a.taps);
  const long tokens = a.images * a.height * a.width, reach = a.taps == 9 ? a.width + 1 : 0;
  // A convolution also lists the rows above and below a chunk: several rows at once keep that share small.
  const long usual = Form::chunk(a), most = a.taps == 9 ? maximum(usual, 8 * a.width) : usual;
  const long least = maximum(1, (tokens + most - 1) / most), grain = Form::grain(a);
  const long chunk = round_up((tokens + least - 1) / least, grain), chunks = chunk ? (tokens + chunk - 1) / chunk : 0;
  const long groups = groups_of_tiles(tiles.count, chunks, a.threads);
#pragma omp parallel num_threads(a.threads)
  {
    SpikeLists lists(a, blocks, chunk + 2 * reach);
    Form form(a, chunk, reach);
    long filled = -1;
    Way way = Way::lists;
    bool above = false;
#pragma omp for schedule(dynamic)
    for (long item = 0; item < chunks * groups; item++) {
      const long c = item / groups, group = item % groups, begin = c * chunk, end = minimum(tokens, begin + chunk);
      ProductPiece piece{a, blocks, lists, begin, end, maximum(0, begin - reach), minimum(tokens, end + reach), tokens};
      if (c != filled) {
        const CountRange counts(a, piece.first, a.counts ? piece.last : piece.first);
        way = Form::choose(a, blocks, counts, begin, end);
        above = way == Way::tables && counts.largest > 3;
        if (way == Way::lists || above) lists.fill(a, piece.first, piece.last, above);
        form.fill(piece, way);
        filled = c;
      }
      piece.above = above;
      form.multiply(piece, way, tiles, tiles.count * group / groups, tiles.count * (group + 1) / groups);
    }
  }
}

}  // namespace
