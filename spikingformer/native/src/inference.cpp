// Whole-model inference on bits: what stands between two products, attention, and products with a fused end.
//
// Tokens are rows ((t * B + b) * H + y) * W + x, channels last. Spikes are bits, one row of words a token; Spikformer's
// integer stream is one byte a channel. Currents are fp32, or 16-bit fixed point for the integer form, which
// spikingformer/engine/int8_reference.py defines bit for bit: no operation here depends on the instruction set.
#include "spike_product.h"

namespace {

// ---- neurons ------------------------------------------------------------------------------------------------------

// Fixed point: h = (v * keep + x * take + 2^13) >> 14 with keep + take = 2^14, so that h lies between v and x.
struct FixedNeuron {
  typedef int16_t Current;
  static constexpr long lanes = SL;
  typedef Short State;
  int keep, take, threshold, scale;
  SPK_INLINE State rest() const { return Short{}; }
  SPK_INLINE Short get(const int16_t* p, long n) const { return n == SL ? load_short(p) : load_short(p, n); }
  SPK_INLINE Short larger(Short a, Short b) const { return max_short(a, b); }
  SPK_INLINE Short charge(Short v, Short x) const {
#if SPK_VECTOR_BYTES == 64 && defined(__AVX512BW__)
    const __m512i weights = _mm512_set1_epi32((take << 16) | keep), half = _mm512_set1_epi32(1 << 13);
    __m512i a = _mm512_madd_epi16(_mm512_unpacklo_epi16((__m512i)v, (__m512i)x), weights);
    __m512i b = _mm512_madd_epi16(_mm512_unpackhi_epi16((__m512i)v, (__m512i)x), weights);
    a = _mm512_srai_epi32(_mm512_add_epi32(a, half), 14);
    b = _mm512_srai_epi32(_mm512_add_epi32(b, half), 14);
    return (Short)_mm512_packs_epi32(a, b);
#elif SPK_VECTOR_BYTES == 32 && defined(__AVX2__)
    const __m256i weights = _mm256_set1_epi32((take << 16) | keep), half = _mm256_set1_epi32(1 << 13);
    __m256i a = _mm256_madd_epi16(_mm256_unpacklo_epi16((__m256i)v, (__m256i)x), weights);
    __m256i b = _mm256_madd_epi16(_mm256_unpackhi_epi16((__m256i)v, (__m256i)x), weights);
    a = _mm256_srai_epi32(_mm256_add_epi32(a, half), 14);
    b = _mm256_srai_epi32(_mm256_add_epi32(b, half), 14);
    return (Short)_mm256_packs_epi32(a, b);
#else
    return join((low(v) * keep + low(x) * take + (1 << 13)) >> 14, (high(v) * keep + high(x) * take + (1 << 13)) >> 14);
#endif
  }
  SPK_INLINE uint64_t step(State& v, Short x) const {
    // Equal shares (tau = 2): (v + x + 1) >> 1, without leaving 16 bits
    Short h = keep == take ? (v | x) - ((v ^ x) >> 1) : charge(v, x);
    Short fired = h >= splat_short(threshold);
    v = ~fired & h;
    return short_bits(fired);
  }
  // Attention's counts (>= 0) as currents: saturating multiplication by `scale`.
  SPK_INLINE uint64_t step_counts(State* v, Short y) const {
    Short limit = splat_short(32767 / scale);
    return step(*v, select_short(y > limit, limit, y) * splat_short(scale));
  }
  static constexpr long states_of_counts = 1;
};

template <class N> struct FloatNeuron {  // N: a Neuron<Float>
  typedef float Current;
  static constexpr long lanes = FL;
  typedef Float::Vector State;
  N neuron;
  float scale;
  SPK_INLINE State rest() const { return splat<Float>(neuron.v_rest); }
  SPK_INLINE Float::Vector get(const float* p, long n) const { return n == FL ? load<Float>(p) : load_part<Float>(p, n); }
  SPK_INLINE Float::Vector larger(Float::Vector a, Float::Vector b) const { return select<Float>(a > b, a, b); }
  SPK_INLINE uint64_t step(State& v, Float::Vector x) const {
    Float::Vector h = neuron.charge(v, x);
    Int fired = neuron.fires(h);
    v = neuron.reset(h, fired);
    return lane_bits(fired);
  }
  SPK_INLINE uint64_t step_counts(State* v, Short y) const {
    uint64_t a = step(v[0], __builtin_convertvector(low(y), Float::Vector) * scale);
    uint64_t b = step(v[1], __builtin_convertvector(high(y), Float::Vector) * scale);
    return a | (b << FL);
  }
  static constexpr long states_of_counts = 2;
};

// The spikes of one word (up to 64 channels, at `x` of its first time step) over all steps; `pool`: the largest of
// `rows` x `columns` pixels.
struct Window {
  long rows, columns, row_stride, column_stride;
};
template <class N, int groups, bool whole, bool pool>
SPK_INLINE void fire_word(const N& neuron, const typename N::Current* x, long here, long stride_t, long steps,
                          const Window& window, uint64_t* bits, long bit_stride) {
  typename N::State v[groups];
  for (long g = 0; g < groups; g++) v[g] = neuron.rest();
  for (long t = 0; t < steps; t++) {
    uint64_t word = 0;
#pragma GCC unroll 16
    for (long g = 0; g < groups; g++) {
      const long n = whole ? N::lanes : minimum(N::lanes, here - g * N::lanes);
      const typename N::Current* base = x + t * stride_t + g * N::lanes;
      auto current = neuron.get(base, n);
      if (pool)
        for (long row = 0; row < window.rows; row++)
          for (long column = row ? 0 : 1; column < window.columns; column++)
            current = neuron.larger(current, neuron.get(base + row * window.row_stride + column * window.column_stride, n));
      uint64_t lanes = neuron.step(v[g], current);
      if (!whole && n < N::lanes) lanes &= (1ull << n) - 1;
      word |= lanes << (g * N::lanes);
    }
    bits[t * bit_stride] = word;
  }
}

template <bool pool, class N>
SPK_INLINE void fire_pixel(const N& neuron, const typename N::Current* x, long here, long stride_t, long steps,
                           const Window& window, uint64_t* bits, long bit_stride) {
  with_vectors<64 / N::lanes>((here + N::lanes - 1) / N::lanes, [&](auto groups) {
    if (here % N::lanes == 0)
      fire_word<N, groups.value, true, pool>(neuron, x, here, stride_t, steps, window, bits, bit_stride);
    else fire_word<N, groups.value, false, pool>(neuron, x, here, stride_t, steps, window, bits, bit_stride);
  });
}

// Currents [steps_in (1 or steps)][images][H][W][C] to bits [steps][images][H'][W'][words]; pool: 3x3, stride 2, first.
template <bool pool, class N>
void fire(const N& neuron, const typename N::Current* x, bool repeated, long steps, long images, long height, long width,
          long channels, uint64_t* bits, int threads) {
  const long words = words_of(channels);
  const long rows = pool ? (height + 1) / 2 : height, columns = pool ? (width + 1) / 2 : width;
  const long pixels = images * rows * columns, stride_t = repeated ? 0 : images * height * width * channels;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long m = 0; m < pixels; m++) {
    const N local = neuron;  // a copy that no store can alias
    const long image = m / (rows * columns), oy = m / columns % rows, ox = m % columns;
    const long y0 = pool ? maximum(0, 2 * oy - 1) : oy, y1 = pool ? minimum(height - 1, 2 * oy + 1) : oy;
    const long x0 = pool ? maximum(0, 2 * ox - 1) : ox, x1 = pool ? minimum(width - 1, 2 * ox + 1) : ox;
    const Window window{y1 - y0 + 1, x1 - x0 + 1, width * channels, channels};
    const typename N::Current* from = x + ((image * height + y0) * width + x0) * channels;
    for (long w = 0; w < words; w++) {
      const long here = minimum(64, channels - w * 64);
      fire_pixel<pool>(local, from + w * 64, here, stride_t, steps, window, bits + m * words + w, pixels * words);
    }
  }
}

#ifdef SPK_HAS_SHUFFLE
// Chunk by chunk of about `usual` tokens over all time steps, so that currents are fired while they are in the cache.
template <class N, class Chunk>
void product_fire_chunks(const ProductArgs& a, const N& neuron, long steps, bool keep, long usual, uint64_t* bits) {
  const long total = a.images / steps * a.height * a.width, words = words_of(a.outputs);
  const long least = (steps * total + usual - 1) / usual;
  const long size = round_up((total + least - 1) / least, kUnit), chunks = (total + size - 1) / size;
  const long groups = groups_of_tiles(words, chunks, a.threads);
#pragma omp parallel num_threads(a.threads)
  {
    const N local = neuron;
    Chunk chunk(a, steps, steps * size);
    Scratch currents(keep ? 0 : steps * size * 64 * sizeof(typename N::Current));
    const long stride = keep ? a.outputs : 64, stride_t = keep ? total * a.outputs : size * 64;
    long filled = -1;
#pragma omp for schedule(dynamic)
    for (long item = 0; item < chunks * groups; item++) {
      const long c = item / groups, group = item % groups;
      const Pixels pixels{c * size, minimum(total, (c + 1) * size), steps, total};
      if (c != filled) chunk.fill(pixels);
      filled = c;
      for (long w = words * group / groups; w < words * (group + 1) / groups; w++) {
        const long first = w * 64, here = minimum(64, a.outputs - first);
        auto* out = keep ? (typename N::Current*)a.out + pixels.begin * a.outputs + first : currents.as<typename N::Current>();
        chunk.multiply(pixels, first, first + here, out, stride_t, stride, a.accumulate);
        for (long m = pixels.begin; m < pixels.end; m++)
          fire_pixel<false>(local, out + (m - pixels.begin) * stride, here, stride_t, steps, {}, bits + m * words + w,
                            total * words);
      }
    }
  }
}
#endif

// A product and the neurons that read its currents. `keep`: a.out takes them too (the residual stream); else it is
// scratch at best.
template <class N> void product_fire(const ProductArgs& a, const N& neuron, long steps, bool keep, uint64_t* bits) {
  constexpr bool integer = sizeof(typename N::Current) == 2;
  typedef std::conditional_t<integer, IntegerProduct, FloatProduct> Product;
#ifdef SPK_HAS_SHUFFLE
  const long tokens = a.images * a.height * a.width;
  if (tokens) {
    const ListBlocks blocks(product_tiles(a.outputs, Product::lanes), a.channels, a.taps);
    const CountRange counts(a, 0, a.counts ? tokens : 0);
    const Way way = Product::choose(a, blocks, counts, 0, tokens);
    if constexpr (integer) {
      if (way == Way::shuffles) return product_fire_chunks<N, ShuffleChunk>(a, neuron, steps, keep, shuffled_chunk(a), bits);
      if (way == Way::bytes) return product_fire_chunks<N, CountChunk>(a, neuron, steps, keep, kChunkTokens, bits);
    }
#ifdef SPK_HAS_REGISTER_TABLES
    if constexpr (!integer) {
      // Not where rounding a step's pixels up, or the rows around a chunk's, would cost more than it spares.
      const long pixels = tokens / steps, around = a.taps == 9 ? 2 * (a.width + 1) : 0;
      const bool worthwhile = 2 * round_up(pixels, kUnit) <= 3 * pixels && around * steps <= 8 * kChunkTokens;
      if (way == Way::tables && counts.largest <= 3 && worthwhile)
        return product_fire_chunks<N, FloatChunk>(a, neuron, steps, keep, kChunkTokens, bits);
    }
#endif
  }
#endif
  product<Product>(a);
  fire<false>(neuron, (const typename N::Current*)a.out, false, steps, a.images / steps, a.height, a.width, a.outputs, bits,
              a.threads);
}

// Max-pool of spikes: OR over 3x3 windows, stride 2.
void pool_bits(const uint64_t* in, long images, long height, long width, long words, uint64_t* out, int threads) {
  const long rows = (height + 1) / 2, columns = (width + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long m = 0; m < images * rows * columns; m++) {
    const long image = m / (rows * columns), oy = m / columns % rows, ox = m % columns;
    for (long w = 0; w < words; w++) {
      uint64_t word = 0;
      for (long y = maximum(0, 2 * oy - 1); y <= minimum(height - 1, 2 * oy + 1); y++)
        for (long x = maximum(0, 2 * ox - 1); x <= minimum(width - 1, 2 * ox + 1); x++)
          word |= in[((image * height + y) * width + x) * words + w];
      out[m * words + w] = word;
    }
  }
}

// ---- attention ----------------------------------------------------------------------------------------------------

// qkv bits [steps][images][tokens][words of 3C] to spikes [steps][images][tokens][words of C] through k^T v, q (k^T v),
// scale and the neuron. Sums are non-negative and saturate at 2^15 - 1.
template <class N>
void attention(const N& neuron, const uint64_t* qkv, long steps, long images, long tokens, long channels, long heads,
               uint64_t* bits, int threads) {
  const long d = channels / heads, vectors = (d + SL - 1) / SL, in_words = words_of(3 * channels),
             out_words = words_of(channels);
  memset(bits, 0, steps * images * tokens * out_words * sizeof(uint64_t));
#pragma omp parallel num_threads(threads)
  {
    Scratch kv_memory(d * vectors * sizeof(Short)), v_memory(tokens * vectors * N::states_of_counts * sizeof(typename N::State));
    Short* kv = kv_memory.as<Short>();
    typename N::State* states = v_memory.as<typename N::State>();
#pragma omp for schedule(static)
    for (long bh = 0; bh < images * heads; bh++) {
      const long image = bh / heads, head = bh % heads;
      for (long i = 0; i < tokens * vectors * N::states_of_counts; i++) states[i] = neuron.rest();
      for (long t = 0; t < steps; t++) {
        const uint64_t* in = qkv + (t * images + image) * tokens * in_words;
        uint64_t* out = bits + (t * images + image) * tokens * out_words;
        memset(kv, 0, d * vectors * sizeof(Short));
        for (long n = 0; n < tokens; n++) {
          const uint64_t* row = in + n * in_words;
          for (long j = 0; j < vectors; j++) {
            const long lanes = minimum(SL, d - j * SL);
            uint64_t v = cut(row, 2 * channels + head * d + j * SL, lanes);
            if (!v) continue;
            const Short value = lanes_of(v);
            for (long k0 = 0; k0 < d; k0 += 64) {
              uint64_t k = cut(row, channels + head * d + k0, minimum(64, d - k0));
              while (k) {
                Short& count = kv[(k0 + __builtin_ctzll(k)) * vectors + j];
                count = add_saturated(count, value);
                k &= k - 1;
              }
            }
          }
        }
        for (long n = 0; n < tokens; n++) {
          const uint64_t* row = in + n * in_words;
          for (long j = 0; j < vectors; j++) {
            Short sum = {};
            for (long q0 = 0; q0 < d; q0 += 64) {
              uint64_t q = cut(row, head * d + q0, minimum(64, d - q0));
              while (q) {
                sum = add_saturated(sum, kv[(q0 + __builtin_ctzll(q)) * vectors + j]);
                q &= q - 1;
              }
            }
            const long lanes = minimum(SL, d - j * SL);
            uint64_t fired = neuron.step_counts(states + (n * vectors + j) * N::states_of_counts, sum);
            if (lanes < SL) fired &= (1ull << lanes) - 1;
            if (!fired) continue;
            const long bit = head * d + j * SL, w = bit / 64, s = bit % 64;
            // Heads of one token may share a word.
            __atomic_fetch_or(out + n * out_words + w, fired << s, __ATOMIC_RELAXED);
            if (s && s + lanes > 64) __atomic_fetch_or(out + n * out_words + w + 1, fired >> (64 - s), __ATOMIC_RELAXED);
          }
        }
      }
    }
  }
}

// counts[token][channel] += bit, for Spikformer's stream; set: counts = bit.
void add_bits(const uint64_t* bits, long tokens, long channels, bool set, uint8_t* counts, int threads) {
  const long words = words_of(channels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long t = 0; t < tokens; t++)
    for (long c = 0; c < channels; c += 8) {
      const uint64_t eight = bits[t * words + c / 64] >> (c & 63) & 255;
      // Byte i keeps bit i alone; 127 more takes any of them to the byte's top bit.
      const uint64_t apart = eight * 0x0101010101010101 & 0x8040201008040201;
      uint64_t now = (apart + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101, before = 0;
      const long n = minimum(8, channels - c);
      if (!set) memcpy(&before, counts + t * channels + c, n);
      now += before;
      memcpy(counts + t * channels + c, &now, n);
    }
}

// Classes from the residual stream [steps][images][tokens][channels], in units of `unit`: the mean over all tokens and
// steps so far, times weight [channels][classes], plus bias. In double precision, always in the same order.
template <class In>
void head(float* logits, const In* x, double unit, long steps, long images, long tokens, long channels,
          const double* weight, const double* bias, long classes, int threads) {
  typedef std::conditional_t<std::is_floating_point_v<In>, double, int64_t> Sum;
#pragma omp parallel num_threads(threads)
  {
    Scratch sum_memory(channels * sizeof(Sum)), logit_memory(classes * sizeof(double));
    Sum* sums = sum_memory.as<Sum>();
    double* y = logit_memory.as<double>();
#pragma omp for schedule(static)
    for (long image = 0; image < images; image++) {
      for (long c = 0; c < channels; c++) sums[c] = 0;
      for (long t = 0; t < steps; t++) {
        for (long n = 0; n < tokens; n++) {
          const In* row = x + ((t * images + image) * tokens + n) * channels;
          for (long c = 0; c < channels; c++) sums[c] += (Sum)row[c];
        }
        for (long k = 0; k < classes; k++) y[k] = 0;
        for (long c = 0; c < channels; c++) {
          const double feature = (double)sums[c] * unit / (double)(tokens * (t + 1));
          for (long k = 0; k < classes; k++) y[k] += feature * weight[c * classes + k];
        }
        for (long k = 0; k < classes; k++) logits[(t * images + image) * classes + k] = (float)(y[k] + bias[k]);
      }
    }
  }
}

template <class F> void with_float_neuron(const NeuronArgs& args, float scale, F&& f) {
  with_neuron<Float>(args, [&](auto neuron) { f(FloatNeuron<decltype(neuron)>{neuron, scale}); });
}

FixedNeuron fixed(int keep, int take, int threshold, int scale) { return {keep, take, threshold, scale}; }

}  // namespace

SPK_EXPORT(engine_fire_f32)(const float* x, int repeated, long steps, long images, long height, long width, long channels,
                            int pool, const NeuronArgs* neuron, uint64_t* bits, int threads) {
  with_float_neuron(*neuron, 1.f, [&](const auto& n) {
    if (pool) fire<true>(n, x, repeated, steps, images, height, width, channels, bits, threads);
    else fire<false>(n, x, repeated, steps, images, height, width, channels, bits, threads);
  });
}
SPK_EXPORT(engine_fire_i16)(const int16_t* x, int repeated, long steps, long images, long height, long width,
                            long channels, int pool, int keep, int take, int threshold, uint64_t* bits, int threads) {
  const FixedNeuron n = fixed(keep, take, threshold, 1);
  if (pool) fire<true>(n, x, repeated, steps, images, height, width, channels, bits, threads);
  else fire<false>(n, x, repeated, steps, images, height, width, channels, bits, threads);
}
SPK_EXPORT(engine_pool_bits)(const uint64_t* in, long images, long height, long width, long words, uint64_t* out,
                             int threads) {
  pool_bits(in, images, height, width, words, out, threads);
}
SPK_EXPORT(engine_attention_f32)(const uint64_t* qkv, long steps, long images, long tokens, long channels, long heads,
                                 float scale, const NeuronArgs* neuron, uint64_t* bits, int threads) {
  with_float_neuron(*neuron, scale, [&](const auto& n) {
    attention(n, qkv, steps, images, tokens, channels, heads, bits, threads);
  });
}
SPK_EXPORT(engine_attention_i16)(const uint64_t* qkv, long steps, long images, long tokens, long channels, long heads,
                                 int scale, int keep, int take, int threshold, uint64_t* bits, int threads) {
  attention(fixed(keep, take, threshold, scale), qkv, steps, images, tokens, channels, heads, bits, threads);
}
SPK_EXPORT(engine_product_f32)(const ProductArgs* args) { product<FloatProduct>(*args); }
SPK_EXPORT(engine_product_i8)(const ProductArgs* args) { product<IntegerProduct>(*args); }
// The product, then neurons without pooling on its currents (with `accumulate`, on a.out) over `steps` time steps.
SPK_EXPORT(engine_product_fire_i8)(const ProductArgs* args, long steps, int keep_currents, int keep, int take, int threshold,
                                   uint64_t* bits) {
  product_fire(*args, fixed(keep, take, threshold, 1), steps, keep_currents, bits);
}
SPK_EXPORT(engine_product_fire_f32)(const ProductArgs* args, long steps, int keep_currents, const NeuronArgs* neuron,
                                    uint64_t* bits) {
  with_float_neuron(*neuron, 1.f, [&](const auto& n) { product_fire(*args, n, steps, keep_currents, bits); });
}
// *width = outputs of a tile of packed int8 weights
SPK_EXPORT(engine_tile_width)(long outputs, int64_t* width) { *width = product_tiles(outputs, SL).width(); }
// The weights (int8 [outputs][taps][channels]) as byte shuffles read them; *bytes = their size, 0 where there are none.
// rows: null to ask for the size alone.
SPK_EXPORT(engine_pack_rows)(const int8_t* weight, const float* scale, const float* bias, long outputs, long channels,
                             long taps, void* rows, int64_t* bytes) {
#ifdef SPK_HAS_SHUFFLE
  const PackedRows packed(rows, Segments(channels, taps), outputs);
  *bytes = packed.bytes;
  if (rows) pack_rows(weight, scale, bias, outputs, channels, taps, packed);
#else
  *bytes = 0;
#endif
}
SPK_EXPORT(engine_add_bits)(const uint64_t* bits, long tokens, long channels, int set, uint8_t* counts, int threads) {
  add_bits(bits, tokens, channels, set, counts, threads);
}
#define SPK_HEAD(name, In)                                                                                             \
  SPK_EXPORT(name)(float* logits, const In* x, double unit, long steps, long images, long tokens, long channels,       \
                   const double* weight, const double* bias, long classes, int threads) {                              \
    head(logits, x, unit, steps, images, tokens, channels, weight, bias, classes, threads);                            \
  }
SPK_HEAD(engine_head_f32, float)
SPK_HEAD(engine_head_i16, int16_t)
SPK_HEAD(engine_head_u8, uint8_t)
