// Ranks of scores, for kernels that place tokens by them.
#include "shared.cuh"

// rank[i] of score [batch, count] from best to worst, ties by lowest index; a grid of [blocks of scores, batch].
extern "C" __global__ void __launch_bounds__(BLOCK) ranks(const float *score, int count, int *rank) {
  score += Index(blockIdx.y) * count, rank += Index(blockIdx.y) * count;
  int i = blockIdx.x * BLOCK + threadIdx.x, place = rank_of(i, count, [=](int j) { return score[j]; });
  if (i < count) rank[i] = place;
}
