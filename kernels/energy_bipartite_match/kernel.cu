// Bipartite matching by ranks of energies, without matrices of cosines; see reference.py for the meaning.
#include "edges.cuh"
#include "energies.cuh"
#include "ranks.cuh"

// a, b: the unprotected tokens of even and of odd rank, by rank; a grid of [blocks of tokens, batch].
extern "C" __global__ void __launch_bounds__(BLOCK) sides(const int *rank, int free, int prefix, Index *a, Index *b) {
  int count = (free + 1) / 2, i = blockIdx.x * BLOCK + threadIdx.x;
  rank += Index(blockIdx.y) * free, a += Index(blockIdx.y) * count, b += Index(blockIdx.y) * (free - count);
  if (i < free) (rank[i] % 2 ? b : a)[rank[i] / 2] = prefix + i;
}

// best[a], partner[a]: the most similar b of every a; a grid of [tiles of A, batch].
extern "C" __global__ void __launch_bounds__(BLOCK) best_partners(
    const Scalar *metric, const float *size, const float *inverse, const Index *a, const Index *b, int tokens,
    int channels, int count, int others, float *best, int *partner) {
  Index row = blockIdx.y;
  metric += row * tokens * channels, size += row * tokens, inverse += row * tokens;
  Units first{count, metric, inverse, channels, 0, 1, a + row * count};
  Units second{others, metric, inverse, channels, 0, 1, b + row * others};
  best_edges(first, second, channels, size, best + row * count, partner + row * count);
}

// The three outputs. `size` is not read: a TensorRT plugin knows the number of tokens by an input that has it.
extern "C" __global__ void __launch_bounds__(BLOCK) place(
    const int *rank, const int *partner, const Index *a, const Index *b, const float *size, int tokens, int count,
    int others, int r, int prefix, Index *keep, Index *drop, Index *dest) {
  Index row = blockIdx.y;
  rank += row * count, partner += row * count, a += row * count, b += row * others;
  keep += row * (tokens - r), drop += row * r, dest += row * r;
  place_edges(
      [=](int i) { return a[i]; }, count, [=](int i) { return b[i]; }, others, rank, partner, r, prefix, keep, drop,
      dest);
}
