// Whole-model inference on spikes as bits: between two layers there are only bits and, where the model has one, the
// residual stream. One call is one layer: product, BatchNorm (folded), residual, max-pool and LIF over all time steps.
//
// Two number systems share the code. Float: weights with BatchNorm folded in, sums and membranes in fp32.
// Integer: int8 weights, int16 sums that spill to int32 before they can overflow, currents and membranes in fixed point
// with 12 fractional bits; spikingformer/native/int8_reference.py defines every operation, and the bits are equal.
//
// bits [T, B, H, W, words_of(C)], stream [T, B, H, W, N], weights [tile][tap][C][tile width].
#include "spikes.h"

namespace {

constexpr long kBlockBytes = 700 * 1024;  // weights walked at one go
constexpr long kSpill = 256;              // int8 weights that an int16 sum takes before it spills: 256 * 128 = 32768

struct EngineArgs {
  int64_t steps, batch, height, width, channels, outputs, taps, tile_width;
  int32_t pool;         // 1: MaxPool(3, 2, 1) of the currents before they fire
  int32_t stream_mode;  // 0 none, 1 write the currents, 2 add to them
  int32_t threads, input_steps;  // input_steps: T, or 1 where every step has the same currents (dense stem only)
  float tau, threshold;                      // float neuron
  int32_t keep, integer_threshold;           // integer neuron: keep = round(4096 / tau)
};

typedef Float::Vector V;
typedef Float::Integer I;
constexpr long kLanes = Float::lanes;

SPK_INLINE I load_int(const int32_t* p) {
  I v;
  memcpy(&v, p, sizeof v);
  return v;
}
SPK_INLINE void store_int(int32_t* p, I v) { memcpy(p, &v, sizeof v); }
SPK_INLINE I choose(I mask, I a, I b) { return (mask & a) | (~mask & b); }

struct Segment {  // one list of spikes and the rows of weights that it picks from
  const void* rows;
  const uint16_t* list;
  long count;
};

struct FloatSystem {
  typedef float Weight;
  typedef float Value;
  typedef V Vector;
  static constexpr long lanes = Float::lanes;
  struct Channels {
    const float* bias;
  };
  static SPK_INLINE V get(const float* p) { return load<Float>(p); }
  static SPK_INLINE void put(float* p, V v) { store<Float>(p, v); }
  static SPK_INLINE V largest(V a, V b) { return select<Float>(a > b, a, b); }
  // sum of rows -> current
  static SPK_INLINE V current(const Channels& ch, long c, V sum) { return sum + load<Float>(ch.bias + c); }

  template <int NV> static SPK_INLINE void sum(float* out, bool first, const Segment* segments, long count) {
    V acc[NV];
    for (int j = 0; j < NV; j++) acc[j] = first ? V{} : load<Float>(out + j * lanes);
    for (long s = 0; s < count; s++)
      add_rows<NV>(acc, (const float*)segments[s].rows, segments[s].list, segments[s].count);
    for (int j = 0; j < NV; j++) store<Float>(out + j * lanes, acc[j]);
  }

  struct Cell {
    V tau, inverse_tau, threshold;
    bool exact;
    explicit Cell(const EngineArgs& a)
        : tau(splat<Float>(a.tau)), inverse_tau(splat<Float>(1 / a.tau)), threshold(splat<Float>(a.threshold)),
          exact(a.tau == 2.f || a.tau == 4.f || a.tau == 1.f) {}
    SPK_INLINE uint32_t step(V& v, V x) const {
      V d = x - v;
      V h = v + (exact ? d * inverse_tau : d / tau);
      I fired = h >= threshold;
      v = only_where<Float>(~fired, h);
      return lane_bits(fired);
    }
  };
  static SPK_INLINE V from_count(const EngineArgs&, V count, float scale, int32_t) { return count * scale; }
};

struct IntegerSystem {
  typedef int8_t Weight;
  typedef int32_t Value;
  typedef I Vector;
  static constexpr long lanes = SPK_VECTOR_BYTES / 2;
  typedef int16_t Short __attribute__((vector_size(SPK_VECTOR_BYTES)));
  struct Channels {
    const int32_t *multiplier, *shift, *bias;
  };
  static SPK_INLINE I get(const int32_t* p) { return load_int(p); }
  static SPK_INLINE void put(int32_t* p, I v) { store_int(p, v); }
  static SPK_INLINE I largest(I a, I b) { return choose(a > b, a, b); }
  // (sum * multiplier, rounded, >> shift) + bias; |sum| < 2^17 and |multiplier| < 2^14 stay inside int32
  static SPK_INLINE I current(const Channels& ch, long c, I sum) {
    const I limit = (I){} + 131071;
    sum = choose(sum > limit, limit, sum);
    sum = choose(sum < -limit, -limit, sum);
    I shift = load_int(ch.shift + c);
    I half = ((I){} + 1) << (shift - 1);
    return ((sum * load_int(ch.multiplier + c) + half) >> shift) + load_int(ch.bias + c);
  }

  static SPK_INLINE Short widen(const int8_t* p) {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
    return (Short)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
    return (Short)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#elif defined(__SSE2__)
    __m128i b = _mm_loadl_epi64((const __m128i*)p);
    return (Short)_mm_srai_epi16(_mm_unpacklo_epi8(b, b), 8);
#else
    typedef int8_t Bytes __attribute__((vector_size(SPK_VECTOR_BYTES / 2)));
    Bytes b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, Short);
#endif
  }
  static SPK_INLINE void spill(int32_t* out, Short v, bool first) {
    I low, high;
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
    low = (I)_mm512_cvtepi16_epi32(_mm512_castsi512_si256((__m512i)v));
    high = (I)_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64((__m512i)v, 1));
#elif SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
    low = (I)_mm256_cvtepi16_epi32(_mm256_castsi256_si128((__m256i)v));
    high = (I)_mm256_cvtepi16_epi32(_mm256_extracti128_si256((__m256i)v, 1));
#else
    for (long i = 0; i < kLanes; i++) low[i] = v[i], high[i] = v[kLanes + i];
#endif
    store_int(out, first ? low : low + load_int(out));
    store_int(out + kLanes, first ? high : high + load_int(out + kLanes));
  }
  template <int NV> static SPK_INLINE void sum(int32_t* out, bool first, const Segment* segments, long count) {
    Short acc[NV] = {};
    long left = kSpill;
    for (long s = 0; s < count; s++) {
      const uint16_t* list = segments[s].list;
      long rest = segments[s].count;
      while (rest) {
        long now = minimum(rest, left);
        for (long i = 0; i < now; i++) {
          const int8_t* row = (const int8_t*)segments[s].rows + (size_t)list[i] * (NV * lanes);
#pragma GCC unroll 12
          for (int j = 0; j < NV; j++) acc[j] += widen(row + j * lanes);
        }
        list += now;
        rest -= now;
        left -= now;
        if (!left) {
          for (int j = 0; j < NV; j++) {
            spill(out + j * lanes, acc[j], first);
            acc[j] = Short{};
          }
          first = false;
          left = kSpill;
        }
      }
    }
    for (int j = 0; j < NV; j++) spill(out + j * lanes, acc[j], first);
  }

  struct Cell {
    I threshold;
    int32_t keep;
    explicit Cell(const EngineArgs& a) : threshold((I){} + a.integer_threshold), keep(a.keep) {}
    SPK_INLINE uint32_t step(I& v, I x) const {
      const I limit = (I){} + 262143;
      I d = x - v;
      d = choose(d > limit, limit, d);
      d = choose(d < -limit, -limit, d);
      I h = v + ((d * keep) >> 12);
      I fired = h >= threshold;
      v = ~fired & h;
      return lane_bits(fired);
    }
  };
  static SPK_INLINE I from_count(const EngineArgs&, V count, float, int32_t scale) {
    return __builtin_convertvector(count, I) * scale;
  }
};

SPK_INLINE void put_bits(uint64_t* row, long column, uint32_t bits) {
  row[column >> 6] |= (uint64_t)bits << (column & 63);
}

// Currents of one tile for all steps of some pixels, [T][pixels][tile width], become spikes and stream.
template <class S> struct Finish {
  const EngineArgs& a;
  typename S::Channels channels;
  typename S::Cell cell;
  typename S::Value* stream;
  uint64_t* bits;  // [T][pixels of a step][words_of(outputs)]
  long out_pixels, words;

  // Pixel by pixel, no pool; sums in, `first_pixel` is the place of the block's first pixel within a step.
  SPK_INLINE void pixels(const typename S::Value* sums, long step_stride, long count, long first_pixel, long column,
                         long sum_steps) const {
    const long width = minimum(a.tile_width, a.outputs - column);
    for (long p = 0; p < count; p++)
      for (long c = 0; c < width; c += kLanes) {
        typename S::Vector v = {}, x = {};
        const bool part = c + kLanes > width;
        for (long t = 0; t < a.steps; t++) {
          if (t < sum_steps) {
            x = S::current(channels, column + c, S::get(sums + t * step_stride + p * a.tile_width + c));
            if (stream) {
              typename S::Value* at = stream + (t * out_pixels + first_pixel + p) * a.outputs + column + c;
              if (!part) {
                if (a.stream_mode == 2) x += S::get(at);
                S::put(at, x);
              } else {
                typename S::Value copy[kLanes] = {};
                if (a.stream_mode == 2) {
                  memcpy(copy, at, (width - c) * sizeof copy[0]);
                  x += S::get(copy);
                }
                S::put(copy, x);
                memcpy(at, copy, (width - c) * sizeof copy[0]);
              }
            }
          }
          if (bits) {
            uint32_t fired = cell.step(v, x);
            if (part) fired &= (1u << (width - c)) - 1;
            put_bits(bits + (t * out_pixels + first_pixel + p) * words, column + c, fired);
          }
        }
      }
  }

  // Output rows [o0, o1) of image b from rows [r0, r1) of sums, which turn into currents in place.
  void pooled(typename S::Value* sums, long b, long r0, long r1, long o0, long o1, long column, long sum_steps) const {
    const long width = minimum(a.tile_width, a.outputs - column), rows = r1 - r0, W = a.width;
    const long OH = (a.height + 1) / 2, OW = (W + 1) / 2;
    for (long i = 0; i < sum_steps * rows * W; i++)
      for (long c = 0; c < width; c += kLanes) {
        typename S::Value* at = sums + i * a.tile_width + c;
        S::put(at, S::current(channels, column + c, S::get(at)));
      }
    for (long oy = o0; oy < o1; oy++)
      for (long ox = 0; ox < OW; ox++) {
        const long y0 = maximum(0, 2 * oy - 1), y1 = minimum(a.height, 2 * oy + 2);
        const long x0 = maximum(0, 2 * ox - 1), x1 = minimum(W, 2 * ox + 2);
        for (long c = 0; c < width; c += kLanes) {
          typename S::Vector v = {}, x = {};
          const bool part = c + kLanes > width;
          for (long t = 0; t < a.steps; t++) {
            if (t < sum_steps) {
              const typename S::Value* image = sums + (t * rows - r0) * W * a.tile_width + c;
              x = S::get(image + (y0 * W + x0) * a.tile_width);
              for (long y = y0; y < y1; y++)
                for (long xx = x0; xx < x1; xx++) x = S::largest(x, S::get(image + (y * W + xx) * a.tile_width));
            }
            uint32_t fired = cell.step(v, x);
            if (part) fired &= (1u << (width - c)) - 1;
            put_bits(bits + (t * out_pixels + (b * OH + oy) * OW + ox) * words, column + c, fired);
          }
        }
      }
  }
};

struct Lists {
  Scratch places, starts;
  Lists(long tokens, long channels)
      : places((tokens * channels + kListSlack) * sizeof(uint16_t)), starts((tokens + 1) * sizeof(uint32_t)) {}
};

template <class S>
void linear_layer(const EngineArgs& a, const uint64_t* bits, const typename S::Weight* weights,
                  const typename S::Channels& channels, typename S::Value* stream, uint64_t* out) {
  typedef typename S::Value Value;
  const long T = a.steps, pixels = a.batch * a.height * a.width, words = words_of(a.channels);
  const long out_words = words_of(a.outputs), tiles = (a.outputs + a.tile_width - 1) / a.tile_width;
  const long sub = 8;
  const long chunk = maximum(sub, minimum(1024 / T, (pixels / (2 * a.threads) + sub - 1) / sub * sub));
  const long chunks = (pixels + chunk - 1) / chunk;
  const Finish<S> finish{a, channels, typename S::Cell(a), stream, out, pixels, out_words};
#pragma omp parallel num_threads(a.threads)
  {
    Lists lists(T * chunk, a.channels);
    Scratch memory(T * sub * a.tile_width * sizeof(Value));
    Value* sums = memory.as<Value>();
    uint16_t* places = lists.places.as<uint16_t>();
    uint32_t* starts = lists.starts.as<uint32_t>();
#pragma omp for schedule(dynamic)
    for (long k = 0; k < chunks; k++) {
      const long p0 = k * chunk, p1 = minimum(pixels, p0 + chunk), n = p1 - p0;
      uint16_t* end = places;
      for (long t = 0; t < T; t++)
        for (long p = 0; p < n; p++) {
          starts[t * n + p] = (uint32_t)(end - places);
          for (long w = 0; w < words; w++)
            end = list_ones(bits[(t * pixels + p0 + p) * words + w], (uint32_t)(w * 64), end);
          if (out) memset(out + (t * pixels + p0 + p) * out_words, 0, out_words * sizeof(uint64_t));
        }
      starts[T * n] = (uint32_t)(end - places);
      with_vectors(a.tile_width / S::lanes, [&](auto nv) {
        for (long tile = 0; tile < tiles; tile++) {
          const typename S::Weight* rows = weights + tile * a.channels * a.tile_width;
          for (long q = 0; q < n; q += sub) {
            const long m = minimum(sub, n - q);
            for (long t = 0; t < T; t++)
              for (long p = 0; p < m; p++) {
                const long i = t * n + q + p;
                const Segment segment{rows, places + starts[i], (long)(starts[i + 1] - starts[i])};
                S::template sum<nv.value>(sums + (t * sub + p) * a.tile_width, true, &segment, 1);
              }
            finish.pixels(sums, sub * a.tile_width, m, p0 + q, tile * a.tile_width, T);
          }
        }
      });
    }
  }
}

// Rows of output bands: how many rows of one image a thread takes at a time so that the sums of a tile stay in cache.
struct Bands {
  long rows, count;  // output rows in a band, bands in an image
  Bands(const EngineArgs& a, long sum_steps) {
    const long out_rows = a.pool ? (a.height + 1) / 2 : a.height;
    const long bytes = sum_steps * a.width * a.tile_width * 4 * (a.pool ? 2 : 1);
    rows = maximum(1, minimum(out_rows, 1024 * 1024 / bytes));
    // at least two bands a thread, as far as there are rows
    while (rows > 1 && a.batch * ((out_rows + rows - 1) / rows) < 2 * a.threads) rows = (rows + 1) / 2;
    count = (out_rows + rows - 1) / rows;
  }
  void span(const EngineArgs& a, long band, long* o0, long* o1, long* r0, long* r1) const {
    const long out_rows = a.pool ? (a.height + 1) / 2 : a.height;
    *o0 = band * rows;
    *o1 = minimum(out_rows, *o0 + rows);
    *r0 = a.pool ? maximum(0, 2 * *o0 - 1) : *o0;
    *r1 = a.pool ? minimum(a.height, 2 * *o1) : *o1;
  }
  long most_rows(const EngineArgs& a) const { return a.pool ? 2 * rows + 1 : rows; }
};

template <class S> void clear_rows(const Finish<S>& f, const EngineArgs& a, long b, long o0, long o1) {
  const long OH = a.pool ? (a.height + 1) / 2 : a.height, OW = a.pool ? (a.width + 1) / 2 : a.width;
  if (f.bits)
    for (long t = 0; t < a.steps; t++)
      memset(f.bits + (t * f.out_pixels + (b * OH + o0) * OW) * f.words, 0,
             (o1 - o0) * OW * f.words * sizeof(uint64_t));
}

template <class S>
void conv_layer(const EngineArgs& a, const uint64_t* bits, const typename S::Weight* weights,
                const typename S::Channels& channels, typename S::Value* stream, uint64_t* out) {
  typedef typename S::Value Value;
  const long T = a.steps, H = a.height, W = a.width, words = words_of(a.channels);
  const long tiles = (a.outputs + a.tile_width - 1) / a.tile_width, tap_size = a.channels * a.tile_width;
  const long group = maximum(1, minimum(9, kBlockBytes / (tap_size * (long)sizeof(typename S::Weight))));
  const Bands bands(a, T);
  const long images = bands.count == 1 ? maximum(1, minimum(1024 / (T * H * W), a.batch / (2 * a.threads))) : 1;
  const long units = bands.count == 1 ? (a.batch + images - 1) / images : a.batch * bands.count;
  const long out_pixels = a.pool ? a.batch * ((H + 1) / 2) * ((W + 1) / 2) : a.batch * H * W;
  const Finish<S> finish{a, channels, typename S::Cell(a), stream, out, out_pixels, words_of(a.outputs)};
#pragma omp parallel num_threads(a.threads)
  {
    const long most = bands.most_rows(a);
    Lists lists(images * T * (most + 2) * W, a.channels);
    Scratch memory(T * most * W * a.tile_width * sizeof(Value));
    Value* sums = memory.as<Value>();
    uint16_t* places = lists.places.as<uint16_t>();
    uint32_t* starts = lists.starts.as<uint32_t>();
#pragma omp for schedule(dynamic)
    for (long unit = 0; unit < units; unit++) {
      const long b0 = bands.count == 1 ? unit * images : unit / bands.count;
      const long b1 = minimum(a.batch, b0 + images);
      long o0, o1, r0, r1;
      bands.span(a, bands.count == 1 ? 0 : unit % bands.count, &o0, &o1, &r0, &r1);
      const long l0 = maximum(0, r0 - 1), l1 = minimum(H, r1 + 1), list_rows = l1 - l0, rows = r1 - r0;
      uint16_t* end = places;
      long token = 0;
      for (long b = b0; b < b1; b++) {
        clear_rows(finish, a, b, o0, o1);
        for (long t = 0; t < T; t++)
          for (long i = l0 * W; i < l1 * W; i++) {
            starts[token++] = (uint32_t)(end - places);
            const uint64_t* word = bits + ((t * a.batch + b) * H * W + i) * words;
            for (long w = 0; w < words; w++) end = list_ones(word[w], (uint32_t)(w * 64), end);
          }
      }
      starts[token] = (uint32_t)(end - places);
      with_vectors(a.tile_width / S::lanes, [&](auto nv) {
        for (long tile = 0; tile < tiles; tile++)
          for (long b = b0; b < b1; b++) {
            for (long tap0 = 0; tap0 < 9; tap0 += group) {
              const long tap1 = minimum(9, tap0 + group);
              for (long t = 0; t < T; t++)
                for (long y = r0; y < r1; y++)
                  for (long x = 0; x < W; x++) {
                    Segment segments[9];
                    long count = 0;
                    for (long tap = tap0; tap < tap1; tap++) {
                      const long yy = y + tap / 3 - 1, xx = x + tap % 3 - 1;
                      if (yy < 0 || yy >= H || xx < 0 || xx >= W) continue;
                      const long i = (((b - b0) * T + t) * list_rows + yy - l0) * W + xx;
                      segments[count++] = {weights + (tile * 9 + tap) * tap_size, places + starts[i],
                                           (long)(starts[i + 1] - starts[i])};
                    }
                    S::template sum<nv.value>(sums + ((t * rows + y - r0) * W + x) * a.tile_width, tap0 == 0, segments,
                                              count);
                  }
            }
            if (a.pool) finish.pooled(sums, b, r0, r1, o0, o1, tile * a.tile_width, T);
            else finish.pixels(sums, rows * W * a.tile_width, rows * W, (b * H + r0) * W, tile * a.tile_width, T);
          }
      });
    }
  }
}

// The stem's first convolution reads numbers, not spikes: x [input_steps, B, H, W, C], weights [9][C][tile width].
template <class S, class X, class Weight>
void dense_layer(const EngineArgs& a, const X* x, const Weight* weights, const typename S::Channels& channels,
                 uint64_t* out, int sum_shift) {
  typedef typename S::Value Value;
  typedef typename S::Vector Vector;
  const long H = a.height, W = a.width, steps = a.input_steps;
  const Bands bands(a, steps);
  const long out_pixels = a.pool ? a.batch * ((H + 1) / 2) * ((W + 1) / 2) : a.batch * H * W;
  const Finish<S> finish{a, channels, typename S::Cell(a), nullptr, out, out_pixels, words_of(a.outputs)};
#pragma omp parallel num_threads(a.threads)
  {
    const long most = bands.most_rows(a);
    Scratch memory(steps * most * W * a.tile_width * sizeof(Value));
    Value* sums = memory.as<Value>();
#pragma omp for schedule(dynamic)
    for (long unit = 0; unit < a.batch * bands.count; unit++) {
      const long b = unit / bands.count;
      long o0, o1, r0, r1;
      bands.span(a, unit % bands.count, &o0, &o1, &r0, &r1);
      clear_rows(finish, a, b, o0, o1);
      const long rows = r1 - r0;
      for (long t = 0; t < steps; t++)
        for (long y = r0; y < r1; y++)
          for (long xx = 0; xx < W; xx++) {
            Value* at = sums + ((t * rows + y - r0) * W + xx) * a.tile_width;
            for (long c0 = 0; c0 < a.tile_width; c0 += 4 * kLanes) {
              const long n = minimum(4, (a.tile_width - c0) / kLanes);
              Vector acc[4] = {};
              for (long tap = 0; tap < 9; tap++) {
                const long py = y + tap / 3 - 1, px = xx + tap % 3 - 1;
                if (py < 0 || py >= H || px < 0 || px >= W) continue;
                const X* pixel = x + (((t * a.batch + b) * H + py) * W + px) * a.channels;
                for (long c = 0; c < a.channels; c++) {
                  const Weight* row = weights + (tap * a.channels + c) * a.tile_width + c0;
                  const Value value = (Value)pixel[c];
                  for (long j = 0; j < n; j++) acc[j] += S::get((const Value*)row + j * kLanes) * value;
                }
              }
              for (long j = 0; j < n; j++) {
                if constexpr (sizeof(X) == 2) acc[j] = acc[j] >> sum_shift;
                S::put(at + c0 + j * kLanes, acc[j]);
              }
            }
          }
      if (a.pool) finish.pooled(sums, b, r0, r1, o0, o1, 0, steps);
      else finish.pixels(sums, rows * W * a.tile_width, rows * W, (b * H + r0) * W, 0, steps);
    }
  }
}

// q (k^T v) * scale, then LIF. qkv: bits [T][B][N][words_of(3 C)], q, k and v in turn; out [T][B][N][words_of(C)].
// Sums are small integers, exact in fp32 in any order.
struct HeadBits {
  const uint64_t* row;
  SPK_INLINE uint16_t* list(long first, long count, uint16_t* end) const {
    for (long c = 0; c < count;) {
      const long at = first + c, take = minimum(64 - (at & 63), count - c);
      uint64_t word = row[at >> 6] >> (at & 63);
      if (take < 64) word &= (1ull << take) - 1;
      end = list_ones(word, (uint32_t)c, end);
      c += take;
    }
    return end;
  }
};

template <class S>
void attention_layer(const EngineArgs& a, const uint64_t* qkv, long heads, float scale, int32_t integer_scale,
                     uint64_t* out) {
  const long T = a.steps, B = a.batch, N = a.height * a.width, C = a.channels, d = C / heads;
  const long in_words = words_of(3 * C), out_words = words_of(C), dp = (d + kLanes - 1) / kLanes * kLanes;
  long group = 1;  // heads whose bits end on a word: threads never share a word of the output
  while (group < heads && group * d % 64) group++;
  const long groups = (heads + group - 1) / group;
  const typename S::Cell cell(a);
#pragma omp parallel num_threads(a.threads)
  {
    Scratch v_memory(N * dp * sizeof(float)), kv_memory(d * dp * sizeof(float)), y_memory(dp * sizeof(float));
    Scratch state_memory(N * dp * sizeof(typename S::Value));
    Scratch list_memory((d * N + d + kListSlack) * sizeof(uint16_t)), count_memory(d * sizeof(uint32_t));
    float *vf = v_memory.as<float>(), *kv = kv_memory.as<float>();
    typename S::Value* state = state_memory.as<typename S::Value>();
    uint16_t* list = list_memory.as<uint16_t>();
    uint32_t* counts = count_memory.as<uint32_t>();
#pragma omp for schedule(dynamic) collapse(2)
    for (long b = 0; b < B; b++)
      for (long g = 0; g < groups; g++) {
        const long head1 = minimum(heads, (g + 1) * group);
        const long word0 = g * group * d / 64, word1 = minimum(out_words, (head1 * d + 63) / 64);
        for (long t = 0; t < T; t++)
          for (long n = 0; n < N; n++)
            memset(out + ((t * B + b) * N + n) * out_words + word0, 0, (word1 - word0) * sizeof(uint64_t));
        for (long head = g * group; head < head1; head++) {
          memset(state, 0, N * dp * sizeof state[0]);
          for (long t = 0; t < T; t++) {
            const uint64_t* rows = qkv + (t * B + b) * N * in_words;
            memset(vf, 0, N * dp * sizeof(float));
            memset(counts, 0, d * sizeof(uint32_t));
            uint16_t places[4096 + kListSlack];
            for (long n = 0; n < N; n++) {
              const HeadBits bits{rows + n * in_words};
              const uint16_t* end = bits.list(2 * C + head * d, d, places);
              for (const uint16_t* p = places; p < end; p++) vf[n * dp + *p] = 1.f;
              end = bits.list(C + head * d, d, places);
              for (const uint16_t* p = places; p < end; p++) list[*p * N + counts[*p]++] = (uint16_t)n;
            }
            for (long i = 0; i < d; i++)
              for (long c = 0; c < dp; c += kLanes) {
                V acc = {};
                for (uint32_t s = 0; s < counts[i]; s++) acc += load<Float>(vf + list[i * N + s] * dp + c);
                store<Float>(kv + i * dp + c, acc);
              }
            for (long n = 0; n < N; n++) {
              const HeadBits bits{rows + n * in_words};
              const uint16_t* end = bits.list(head * d, d, places);
              uint64_t* target = out + ((t * B + b) * N + n) * out_words;
              for (long c = 0; c < dp; c += kLanes) {
                V acc = {};
                for (const uint16_t* p = places; p < end; p++) acc += load<Float>(kv + *p * dp + c);
                typename S::Vector v = S::get(state + n * dp + c);
                uint32_t fired = cell.step(v, S::from_count(a, acc, scale, integer_scale));
                S::put(state + n * dp + c, v);
                const long left = minimum(kLanes, d - c), column = head * d + c;
                if (left < 32) fired &= (1u << left) - 1;
                target[column >> 6] |= (uint64_t)fired << (column & 63);
                if ((column & 63) + left > 64) target[(column >> 6) + 1] |= (uint64_t)fired >> (64 - (column & 63));
              }
            }
          }
        }
      }
  }
}

// MaxPool(3, 2, 1) of spikes is the OR of their bits: bits [images, H, W, words] -> [images, (H+1)/2, (W+1)/2, words].
void pool_layer(const uint64_t* bits, long images, long H, long W, long words, uint64_t* out, int threads) {
  const long OH = (H + 1) / 2, OW = (W + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < images * OH; row++)
    for (long ox = 0; ox < OW; ox++)
      for (long w = 0; w < words; w++) {
        const long oy = row % OH;
        uint64_t any = 0;
        for (long y = maximum(0, 2 * oy - 1); y < minimum(H, 2 * oy + 2); y++)
          for (long x = maximum(0, 2 * ox - 1); x < minimum(W, 2 * ox + 2); x++)
            any |= bits[((row / OH * H + y) * W + x) * words + w];
        out[(row * OW + ox) * words + w] = any;
      }
}

// Sums of the stream over tokens and time: out [B, C].
template <class Value, class Sum>
void head_sums(const Value* stream, long T, long B, long N, long C, Sum* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long b = 0; b < B; b++) {
    for (long c = 0; c < C; c++) out[b * C + c] = 0;
    for (long t = 0; t < T; t++)
      for (long n = 0; n < N; n++)
        for (long c = 0; c < C; c++) out[b * C + c] += stream[((t * B + b) * N + n) * C + c];
  }
}

}  // namespace

SPK_EXPORT(engine_float_layer)(const EngineArgs* a, const uint64_t* bits, const float* weights, const float* bias,
                               float* stream, uint64_t* out) {
  if (a->taps == 9) conv_layer<FloatSystem>(*a, bits, weights, {bias}, stream, out);
  else linear_layer<FloatSystem>(*a, bits, weights, {bias}, stream, out);
}
SPK_EXPORT(engine_integer_layer)(const EngineArgs* a, const uint64_t* bits, const int8_t* weights,
                                 const int32_t* multiplier, const int32_t* shift, const int32_t* bias, int32_t* stream,
                                 uint64_t* out) {
  const IntegerSystem::Channels channels{multiplier, shift, bias};
  if (a->taps == 9) conv_layer<IntegerSystem>(*a, bits, weights, channels, stream, out);
  else linear_layer<IntegerSystem>(*a, bits, weights, channels, stream, out);
}
SPK_EXPORT(engine_float_stem)(const EngineArgs* a, const float* x, const float* weights, const float* bias,
                              uint64_t* out) {
  dense_layer<FloatSystem>(*a, x, weights, {bias}, out, 0);
}
SPK_EXPORT(engine_integer_stem)(const EngineArgs* a, const int16_t* x, const int32_t* weights,
                                const int32_t* multiplier, const int32_t* shift, const int32_t* bias, uint64_t* out,
                                int sum_shift) {
  dense_layer<IntegerSystem>(*a, x, weights, {multiplier, shift, bias}, out, sum_shift);
}
SPK_EXPORT(engine_attention)(const EngineArgs* a, int integer, const uint64_t* qkv, long heads, float scale,
                             int integer_scale, uint64_t* out) {
  if (integer) attention_layer<IntegerSystem>(*a, qkv, heads, scale, integer_scale, out);
  else attention_layer<FloatSystem>(*a, qkv, heads, scale, integer_scale, out);
}
SPK_EXPORT(engine_pool)(const uint64_t* bits, long images, long height, long width, long words, uint64_t* out,
                        int threads) {
  pool_layer(bits, images, height, width, words, out, threads);
}
SPK_EXPORT(engine_head_sums)(int integer, const void* stream, long T, long B, long N, long C, void* out, int threads) {
  if (integer) head_sums((const int32_t*)stream, T, B, N, C, (int64_t*)out, threads);
  else head_sums((const float*)stream, T, B, N, C, (float*)out, threads);
}
