// Tokens by their score; every thread counts how many are better than its own, see reference.py.
#include "shared.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK)
    top(const Scalar *score, int tokens, int r, int prefix, Index *keep, Index *drop) {
  score += Index(blockIdx.y) * tokens + prefix, keep += Index(blockIdx.y) * (tokens - r), drop += Index(blockIdx.y) * r;
  int i = blockIdx.x * BLOCK + threadIdx.x, count = tokens - prefix, kept = count - r;
  int rank = rank_of(i, count, [=](int j) { return to_float(score[j]); });
  if (i < prefix) keep[i] = i;
  if (i < count) (rank < kept ? keep[prefix + rank] : drop[rank - kept]) = prefix + i;
}
