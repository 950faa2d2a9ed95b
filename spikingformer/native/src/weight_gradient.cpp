// The gradient of a spike product (spike_product.h) with respect to its weights: by lists, and by tables of subsets.
#include "cached_tables.h"
#include "register_tables.h"

namespace {

struct Geometry {
  long images, height, width, channels, outputs, taps;  // images = T * B; a linear product: 1 x 1 pixels
  long tokens() const { return images * height * width; }
};

// Weight gradient: grad_packed [tap][C][outputs] += sum over pixels that fired of the gradient at the pixel that the tap
// writes. Each thread owns a range of channels and walks all pixels in chunks: per channel a list of pixels that fired,
// per tile of outputs a copy of the chunk's gradients, with a border of zeros for a convolution, so that one list serves
// all nine taps.
struct Chunk {
  long image0, images, y0, rows;  // whole images, or some rows of one
};

template <int NV>
void gradient_tile(const Geometry& g, const float* tile_gradients, const uint16_t* places, const uint32_t* counts,
                   long capacity, long pitch, Range mine, float* grad, long column, bool first) {
  constexpr long L = Float::lanes;
  const long width = minimum(NV * L, g.outputs - column);
  for (long tap = 0; tap < g.taps; tap++) {
    const long shift = g.taps == 9 ? (tap / 3 - 1) * pitch + tap % 3 - 1 : 0;
    for (long c = mine.begin; c < mine.end; c++) {
      Float::Vector acc[NV];
      float* o = grad + (tap * g.channels + c) * g.outputs + column;
      if (first)
        for (int j = 0; j < NV; j++) acc[j] = Float::Vector{};
      else load_tile<NV>(acc, o, width);
      add_rows<NV>(acc, tile_gradients - shift * NV * L, places + (c - mine.begin) * capacity, counts[c - mine.begin]);
      store_tile<NV>(o, acc, width);
    }
  }
}

void weight_gradient(const Geometry& g, const uint64_t* bits, const float* gradient, float* grad, int threads) {
  const Tiles tiles(g.outputs);
  const long words = words_of(g.channels), tile_width = tiles.width();
  const long border = g.taps == 9 ? 1 : 0;
  const long pixels = g.height * g.width, pitch = g.width + 2 * border;
  const long chunk_images = maximum(1, kChunkTokens / pixels);
  const long chunk_rows = pixels > kChunkTokens ? maximum(1, kChunkTokens / g.width) : g.height;
  const long bands = (g.height + chunk_rows - 1) / chunk_rows;
  const long chunks = bands == 1 ? (g.images + chunk_images - 1) / chunk_images : g.images * bands;
  const long capacity = (bands == 1 ? chunk_images : 1) * chunk_rows * g.width;
  const long padded = (bands == 1 ? chunk_images : 1) * (chunk_rows + 2 * border) * pitch;
  const long slack = border ? pitch + 1 : 0;  // taps of the first and last pixels reach this far
#pragma omp parallel num_threads(threads)
  {
    const Range mine = my_share(g.channels, 4);
    const long owned = mine.end - mine.begin;
    Scratch place_memory((owned * capacity + kListSlack) * sizeof(uint16_t)), count_memory((owned + 1) * sizeof(uint32_t));
    Scratch tile_memory((padded + 2 * slack) * tile_width * sizeof(float));
    uint16_t* places = place_memory.as<uint16_t>();
    uint32_t* counts = count_memory.as<uint32_t>();
    float* gradients = tile_memory.as<float>() + slack * tile_width;
    if (border) memset(tile_memory.memory, 0, (padded + 2 * slack) * tile_width * sizeof(float));
    for (long k = 0; k < chunks && owned; k++) {
      Chunk chunk = bands == 1 ? Chunk{k * chunk_images, minimum(chunk_images, g.images - k * chunk_images), 0, g.height}
                               : Chunk{k / bands, 1, k % bands * chunk_rows,
                                       minimum(chunk_rows, g.height - k % bands * chunk_rows)};
      memset(counts, 0, owned * sizeof(uint32_t));
      for (long image = 0; image < chunk.images; image++)
        for (long y = 0; y < chunk.rows; y++)
          for (long x = 0; x < g.width; x++) {
            long token = ((chunk.image0 + image) * g.height + chunk.y0 + y) * g.width + x;
            uint16_t place = (uint16_t)((image * (chunk.rows + 2 * border) + y + border) * pitch + x + border);
            for (long w = mine.begin / 64; w * 64 < mine.end; w++) {
              uint64_t word = bits[token * words + w];
              if (w * 64 < mine.begin) word &= ~0ull << (mine.begin - w * 64);
              if (mine.end - w * 64 < 64) word &= (1ull << (mine.end - w * 64)) - 1;
              while (word) {
                long c = w * 64 + __builtin_ctzll(word) - mine.begin;
                word &= word - 1;
                places[c * capacity + counts[c]++] = place;
              }
            }
          }
      with_vectors<kMaxVectors>(tiles.vectors, [&](auto nv) {
        for (long tile = 0; tile < tiles.count; tile++) {
          const long column = tile * tile_width, width = minimum(tile_width, g.outputs - column);
          for (long image = 0; image < chunk.images; image++)
            for (long y = -border; y < chunk.rows + border; y++) {
              float* row = gradients + ((image * (chunk.rows + 2 * border) + y + border) * pitch + border) * tile_width;
              long source_y = chunk.y0 + y;
              if (source_y < 0 || source_y >= g.height) {
                memset(row, 0, g.width * tile_width * sizeof(float));
                continue;
              }
              const float* source =
                  gradient + (((chunk.image0 + image) * g.height + source_y) * g.width) * g.outputs + column;
              for (long x = 0; x < g.width; x++)
                memcpy(row + x * tile_width, source + x * g.outputs, width * sizeof(float));
            }
          gradient_tile<nv.value>(g, gradients, places, counts, capacity, pitch, mine, grad, column, k == 0);
        }
      });
    }
  }
}

// ---- weight gradient by tables --------------------------------------------------------------------------------------

// Bit j of word i becomes bit i of word j (Warren, Hacker's Delight, 7-3).
void transpose_bits(uint64_t* words) {
  uint64_t mask = 0xffffffffull;
  for (long j = 32; j; j >>= 1, mask ^= mask << j)
    for (long k = 0; k < 64; k = (k + j + 1) & ~j) {
      const uint64_t swapped = ((words[k] >> j) ^ words[k + j]) & mask;
      words[k + j] ^= swapped;
      words[k] ^= swapped << j;
    }
}

// A chunk's spikes, one bit a token: columns [tap][C][pitch] of what each tap reads.
struct SpikeColumns {
  static constexpr long kChunk = 2048;  // tokens
  const Geometry& g;
  const uint64_t* bits;
  const long tokens, words, pitch, reach, span;
  Scratch own_memory, tap_memory;
  SpikeColumns(const Geometry& g, const uint64_t* bits)
      : g(g), bits(bits), tokens(g.tokens()), words(words_of(g.channels)), pitch(minimum(kChunk, tokens + 63) / 64),
        // A tap reads the channel's bits some tokens further on: those of a chunk are transposed once, with as many blocks
        // before and after as a tap may reach, and shifted for each tap.
        reach(g.taps == 9 ? (g.width + 1 + 63) / 64 : 0), span(pitch + 2 * reach),
        own_memory((g.channels * span + 1) * sizeof(uint64_t)),
        tap_memory(g.taps == 9 ? g.taps * g.channels * pitch * sizeof(uint64_t) : 0) {}
  long stride() const { return g.taps == 9 ? pitch : span; }
  const uint64_t* columns() const { return (g.taps == 9 ? tap_memory : own_memory).as<uint64_t>(); }

  // By all threads together.
  void fill(long first, long here, Neighbours& neighbours) {
    const long blocks = (here + 63) / 64;
    uint64_t* own = own_memory.as<uint64_t>();
#pragma omp for schedule(static)
    for (long item = 0; item < words * (blocks + 2 * reach); item++) {
      const long w = item / (blocks + 2 * reach), block = item % (blocks + 2 * reach);
      const long start = first + (block - reach) * 64;
      uint64_t square[64];
      for (long i = 0; i < 64; i++)
        square[i] = start + i >= 0 && start + i < tokens ? bits[(start + i) * words + w] : 0;
      transpose_bits(square);
      for (long c = w * 64; c < minimum(g.channels, w * 64 + 64); c++) own[c * span + block] = square[c - w * 64];
    }
    if (g.taps != 9) return;
    neighbours.find(g.height, g.width, first, here);
#pragma omp for schedule(static)
    for (long row = 0; row < g.taps * g.channels; row++) {
      const long dy = row / g.channels / 3 - 1, dx = row / g.channels % 3 - 1;
      const long shift = reach * 64 + dy * g.width + dx, low = shift & 63;
      const uint64_t* from = own + row % g.channels * span + shift / 64;
      uint64_t* to = tap_memory.as<uint64_t>() + row * pitch;
      for (long block = 0; block < blocks; block++) {
        const uint64_t word = low ? from[block] >> low | from[block + 1] << (64 - low) : from[block];
        to[block] = word & neighbours.has(block, dy, dx);
      }
    }
  }
};

#ifdef SPK_HAS_REGISTER_TABLES
// Rows of a gradient, [tokens][stride], to [outputs][pitch]; zeros behind the last token, to a multiple of 16.
void turn_gradient(const float* gradient, long stride, long outputs, long tokens, float* turned, long pitch) {
  for (long t = 0; t < tokens; t += 16)
    for (long column = 0; column < outputs; column += 16) {
      const __mmask16 valid = (__mmask16)((1u << minimum(16, outputs - column)) - 1);
      __m512i square[16];
#pragma GCC unroll 16
      for (long i = 0; i < 16; i++)
        square[i] = _mm512_maskz_loadu_epi32(t + i < tokens ? valid : 0, gradient + (t + i) * stride + column);
      transpose(square);
#pragma GCC unroll 16
      for (long i = 0; i < 16; i++) _mm512_storeu_si512(turned + (column + i) * pitch + t, square[i]);
    }
}

// Lanes are the rows (tap, channel) of the gradient, a table holds the sums of five tokens' gradients of one output.
void weight_gradient_tables(const Geometry& g, const uint64_t* bits, const float* gradient, float* grad, int threads) {
  constexpr long kTokens = 32 * kWordInputs;  // a chunk: its tables fit the second-level cache
  constexpr long kLine = 32, kPitch = kTokens + FL;
  static_assert(kTokens % 64 == 0 && kTokens <= SpikeColumns::kChunk, "a chunk is whole blocks of spikes");
  const long tokens = g.tokens(), rows = g.taps * g.channels, padded = round_up(rows, FL);
  // Few outputs: several threads share a line, so that none waits.
  const long lines = (g.outputs + kLine - 1) / kLine, blocks = (padded + kLookUpLanes - 1) / kLookUpLanes;
  const long parts = maximum(1, minimum(blocks, (2 * threads + lines - 1) / lines));
  SpikeColumns spikes(g, bits);
  Scratch lane_memory(kTokens / kWordInputs * padded * sizeof(uint32_t));
  Scratch sum_memory(round_up(g.outputs, FL) * padded * sizeof(float));
  uint32_t* lanes = lane_memory.as<uint32_t>();
  float* sums = sum_memory.as<float>();
#pragma omp parallel num_threads(threads)
  {
    Neighbours neighbours(spikes.pitch);
    Scratch turned_memory(kLine * kPitch * sizeof(float));
    Scratch table(kTokens / kGroup * 2 * kTable * sizeof(float));
    float* turned = turned_memory.as<float>();
    for (long first = 0; first < tokens; first += kTokens) {
      const long here = minimum(kTokens, tokens - first), groups = groups_of(here);
      spikes.fill(first, here, neighbours);
#pragma omp for schedule(static)
      for (long row0 = 0; row0 < padded; row0 += FL)
        for (long word = 0; word < look_up_words(here); word++)
          for (long row = row0; row < row0 + FL; row++) {
            const long bit = word * kWordInputs;
            lanes[word * padded + row] =
                row < rows ? (uint32_t)cut(spikes.columns() + row * spikes.stride(), bit, minimum(kWordInputs, here - bit)) : 0;
          }
#pragma omp for schedule(dynamic)
      for (long item = 0; item < lines * parts; item++) {
        const long line = item / parts * kLine, part = item % parts, width = minimum(kLine, g.outputs - line);
        const long row0 = blocks * part / parts * kLookUpLanes;
        const long row1 = minimum(padded, blocks * (part + 1) / parts * kLookUpLanes);
        turn_gradient(gradient + first * g.outputs + line, g.outputs, width, here, turned, kPitch);
        for (long o = 0; o < width; o += 2) {
          make_two_tables(turned + o * kPitch, turned + (o + 1) * kPitch, groups, table.as<float>());
          for (long row = row0; row < row1; row += kLookUpLanes) {
            LookUpTap all;
            for (long v = 0; v < kLookUpVectors; v++) {
              all.places[v] = (int32_t)(row + v * FL);
              all.lanes[v] = 0xffff;
            }
            with_vectors<kLookUpVectors>(minimum(kLookUpVectors, (row1 - row) / FL), [&](auto n) {
              look_up_block<n.value>(lanes, padded, &all, 1, groups, table.as<float>(), sums + (line + o) * padded + row,
                                     padded, first == 0);
            });
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row += FL)
      for (long column = 0; column < g.outputs; column += FL) {
        const __mmask16 valid = (__mmask16)((1u << minimum(FL, g.outputs - column)) - 1);
        __m512i square[FL];
        for (long i = 0; i < FL; i++) square[i] = _mm512_loadu_si512(sums + (column + i) * padded + row);
        transpose(square);
        for (long i = 0; i < minimum(FL, rows - row); i++)
          _mm512_mask_storeu_epi32(grad + (row + i) * g.outputs + column, valid, square[i]);
      }
  }
}
#else
// What one thread does at a time: one tile of outputs, channels [c0, c1), a chunk of tokens from `first` on.
struct GradientPiece {
  const Geometry& g;
  const float* gradient;
  const uint64_t* columns;  // [tap][C][pitch]: the chunk's spikes that each tap reads, one bit a token
  long pitch, first, tokens, c0, c1;
};

// sums: [tap][C][NV], the tile's gradient so far.
template <int NV> void gradient_table_tile(const GradientPiece& p, Float::Vector* table, Float::Vector* sums, long column) {
  constexpr long step = table_groups<NV>() * 4;
  const Geometry& g = p.g;
  const long width = minimum(NV * FL, g.outputs - column);
  for (long t0 = 0; t0 < p.tokens; t0 += step) {
    const long here = minimum(step, p.tokens - t0), groups = (here + 3) / 4;
    make_tables<NV>(groups, [&](long i, int j) SPK_INLINE_LAMBDA {
      const long lanes = minimum(FL, width - j * FL);
      if (i >= here || lanes <= 0) return Float::Vector{};
      const float* row = p.gradient + (p.first + t0 + i) * g.outputs + column + j * FL;
      return lanes == FL ? load<Float>(row) : load_part<Float>(row, lanes);
    }, table);
    const bool fresh = p.first == 0 && t0 == 0;
    for (long tap = 0; tap < g.taps; tap++)
      for (long c = p.c0; c < p.c1; c++) {
        const uint64_t now = cut(p.columns + (tap * g.channels + c) * p.pitch, t0, here);
        if (!now && !fresh) continue;
        Float::Vector *kept = sums + (tap * g.channels + c) * NV, acc[NV];
        for (int j = 0; j < NV; j++) acc[j] = fresh ? Float::Vector{} : kept[j];
        add_table_rows<NV>(acc, table, now, groups);
        for (int j = 0; j < NV; j++) kept[j] = acc[j];
      }
  }
}

void weight_gradient_tables(const Geometry& g, const uint64_t* bits, const float* gradient, float* grad, int threads) {
  constexpr long kChunk = SpikeColumns::kChunk;
  const Tiles tiles = product_tiles(g.outputs, FL);
  const long tokens = g.tokens();
  const long parts = maximum(1, minimum((g.channels + 15) / 16, (2 * threads + tiles.count - 1) / tiles.count));
  const long rows = g.taps * g.channels;
  SpikeColumns spikes(g, bits);
  // Rows of a tile lie close together here; in `grad` they are far apart, and often in the same sets of the cache.
  Scratch sum_memory(rows * tiles.count * tiles.width() * sizeof(float));
  float* sums = sum_memory.as<float>();
#pragma omp parallel num_threads(threads)
  {
    Scratch table(kBlockBytes);
    Neighbours neighbours(spikes.pitch);
    for (long first = 0; first < tokens; first += kChunk) {
      const long here = minimum(kChunk, tokens - first);
      spikes.fill(first, here, neighbours);
#pragma omp for schedule(dynamic)
      for (long item = 0; item < tiles.count * parts; item++) {
        const long tile = item / parts, part = item % parts;
        const GradientPiece piece{g, gradient, spikes.columns(), spikes.stride(), first, here, g.channels * part / parts,
                                  g.channels * (part + 1) / parts};
        with_vectors<kTileVectors>(tiles.vectors, [&](auto nv) {
          gradient_table_tile<nv.value>(piece, table.as<Float::Vector>(),
                                        (Float::Vector*)(sums + tile * rows * tiles.width()), tile * tiles.width());
        });
      }
    }
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++)
      for (long tile = 0; tile < tiles.count; tile++) {
        const long column = tile * tiles.width(), width = minimum(tiles.width(), g.outputs - column);
        memcpy(grad + row * g.outputs + column, sums + (tile * rows + row) * tiles.width(), width * sizeof(float));
      }
  }
}
#endif

}  // namespace

// tables: by tables of subsets, the same time at any rate; else by lists, faster where little fires.
SPK_EXPORT(product_weight_gradient)(const uint64_t* bits, const float* gradient, float* grad, long images, long height,
                                    long width, long channels, long outputs, long taps, int tables, int threads) {
  const Geometry g{images, height, width, channels, outputs, taps};
  if (tables) weight_gradient_tables(g, bits, gradient, grad, threads);
  else weight_gradient(g, bits, gradient, grad, threads);
}
