// Bipartite soft matching without the matrix of scores; see reference.py for the meaning.
#include "edges.cuh"
#include "norms.cuh"
#include "ranks.cuh"

// best[a], partner[a]: the most similar b of every a; a grid of [tiles of A, batch].
extern "C" __global__ void __launch_bounds__(BLOCK) best_partners(
    const Scalar *metric, const float *size, const float *inverse, int tokens, int channels, int prefix,
    float *best, int *partner) {
  Index start = Index(blockIdx.y) * tokens;
  metric += start * channels, size += start, inverse += start;
  int free = tokens - prefix;
  int odd = prefix % 2;
  Units a{(free + 1 - odd) / 2, metric, inverse, channels, prefix + odd, 2};
  Units b{(free + odd) / 2, metric, inverse, channels, prefix + 1 - odd, 2};
  best += Index(blockIdx.y) * a.count, partner += Index(blockIdx.y) * a.count;
  best_edges(a, b, channels, size, best, partner);
}

// The three outputs. `size` is not read: a TensorRT plugin knows the number of tokens by an input that has it.
extern "C" __global__ void __launch_bounds__(BLOCK)
    place(const int *rank, const int *partner, const float *size, int tokens, int r, int prefix, Index *keep, Index *drop,
          Index *dest) {
  int free = tokens - prefix, odd = prefix % 2, count = (free + 1 - odd) / 2;
  rank += Index(blockIdx.y) * count, partner += Index(blockIdx.y) * count;
  keep += Index(blockIdx.y) * (tokens - r), drop += Index(blockIdx.y) * r, dest += Index(blockIdx.y) * r;
  auto a = [=](int i) { return prefix + odd + 2 * i; };
  auto b = [=](int i) { return prefix + 1 - odd + 2 * i; };
  place_edges(a, count, b, free - count, rank, partner, r, prefix, keep, drop, dest);
}
