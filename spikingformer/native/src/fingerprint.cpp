// A number for what memory holds: whether weights have changed.
#include "common.h"

namespace {

typedef uint32_t HashVector __attribute__((vector_size(SPK_VECTOR_BYTES)));
constexpr long kHashStreams = 8;  // vectors side by side, so that their products overlap
constexpr long kHashStride = kHashStreams * SPK_VECTOR_BYTES;

SPK_INLINE HashVector mixed(HashVector hash, const char* word) {
  HashVector w;
  memcpy(&w, word, sizeof w);
  hash = (hash ^ w) * 0x9E3779B1u;
  return hash << 13 | hash >> 19;  // a changed sign moves down, where the next product spreads it
}

SPK_INLINE uint64_t mixed(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
  return hash << 29 | hash >> 35;
}

// Each word goes through a chain of its own column: one that changes always changes the hash.
uint64_t hash_of(const char* p, long bytes) {
  HashVector a = {}, b = {}, c = {}, d = {}, e = {}, f = {}, g = {}, h = {};
  char rest[kHashStride];
  for (long at = 0; at < bytes; at += kHashStride) {
    const char* from = p + at;
    if (bytes - at < kHashStride) {
      memset(rest, 0, kHashStride);
      memcpy(rest, from, bytes - at);
      from = rest;
    }
    constexpr long V = SPK_VECTOR_BYTES;
    // Read once, so as not to push what the products need out of the last cache.
    for (long i = 0; i < kHashStride; i += 64) __builtin_prefetch(from + 4096 + i, 0, 0);
    a = mixed(a, from), b = mixed(b, from + V), c = mixed(c, from + 2 * V), d = mixed(d, from + 3 * V);
    e = mixed(e, from + 4 * V), f = mixed(f, from + 5 * V), g = mixed(g, from + 6 * V), h = mixed(h, from + 7 * V);
  }
  const HashVector streams[kHashStreams] = {a, b, c, d, e, f, g, h};
  uint64_t words[kHashStride / 8], sum = bytes;
  memcpy(words, streams, kHashStride);
  for (uint64_t word : words) sum = mixed(sum, word);
  return sum;
}

void fingerprint(const void* const* memory, const int64_t* bytes, long count, uint64_t* result, int threads) {
  constexpr long kPiece = 1 << 17;  // a thread's unit of work
  long pieces = 0;
  for (long i = 0; i < count; i++) pieces += (bytes[i] + kPiece - 1) / kPiece;
  Scratch scratch((pieces + 1) * (sizeof(uint64_t) + sizeof(const char*) + sizeof(int64_t)));
  uint64_t* hashes = scratch.as<uint64_t>();
  const char** starts = (const char**)(hashes + pieces + 1);
  int64_t* sizes = (int64_t*)(starts + pieces + 1);
  long n = 0;
  for (long i = 0; i < count; i++)
    for (long at = 0; at < bytes[i]; at += kPiece, n++) {
      starts[n] = (const char*)memory[i] + at;
      sizes[n] = minimum(kPiece, bytes[i] - at);
    }
#pragma omp parallel for num_threads(threads) if (pieces > 8)
  for (long i = 0; i < pieces; i++) hashes[i] = hash_of(starts[i], sizes[i]);
  uint64_t sum = count;
  for (long i = 0; i < pieces; i++) sum = mixed(sum, hashes[i]);
  *result = sum;
}

}  // namespace

// A number that changes with the contents of memory. One changed word always changes it.
SPK_EXPORT(fingerprint)(const void* const* memory, const int64_t* bytes, long count, uint64_t* result, int threads) {
  fingerprint(memory, bytes, count, result, threads);
}
