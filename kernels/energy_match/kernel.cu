// Energies of all tokens and the matching by their ranks, without the matrix of cosines; see reference.py.
#include "energies.cuh"
#include "ranks.cuh"

// keep and drop: of the 2 r highest, A and B in turns.
extern "C" __global__ void __launch_bounds__(BLOCK)
    place(const int *rank, int tokens, int r, int prefix, Index *keep, Index *drop) {
  int count = tokens - prefix, i = blockIdx.x * BLOCK + threadIdx.x;
  rank += Index(blockIdx.y) * count, keep += Index(blockIdx.y) * (tokens - r), drop += Index(blockIdx.y) * r;
  int before = count_where(
      count, [=](int j) { return rank[j]; }, [=](int place, int j) { return j < i && place >= 2 * r; });
  if (i < prefix) keep[i] = i;
  if (i >= count) return;
  if (rank[i] >= 2 * r)
    keep[prefix + before] = prefix + i;
  else if (rank[i] % 2)
    keep[tokens - 2 * r + rank[i] / 2] = prefix + i;
  else
    drop[rank[i] / 2] = prefix + i;
}

// dest of every dropped token; a grid of [tiles of A, batch].
extern "C" __global__ void __launch_bounds__(BLOCK) partners(
    const Scalar *metric, const float *size, const float *inverse, const Index *keep, const Index *drop, int tokens,
    int channels, int r, Index *dest) {
  Index start = Index(blockIdx.y) * tokens;
  metric += start * channels, size += start, inverse += start;
  int slot = tokens - 2 * r;
  Units a{r, metric, inverse, channels, 0, 1, drop + Index(blockIdx.y) * r};
  Units b{r, metric, inverse, channels, 0, 1, keep + Index(blockIdx.y) * (tokens - r) + slot};
  Best seen[EACH];
  auto score = [=](int row, int column, float cosine) {
    return cosine - MISMATCH * ((size[a.token(row)] > 0) != (size[b.token(column)] > 0));
  };
  all_pairs(a, b, channels, score, seen);
  for (int e = 0; e < EACH; e++) {
    int row = row_to_write(e, r);
    if (row >= 0) dest[Index(blockIdx.y) * r + row] = slot + seen[e].index;
  }
}
